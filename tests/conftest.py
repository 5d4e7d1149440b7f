"""What all tests share: the project can be imported, torch has one thread, and no GPU is seen."""
import os
import sys
from pathlib import Path

# `import bert` works wherever pytest is started from.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def pytest_configure(config):
    """pytest calls this before it imports a file of tests."""
    config.addinivalue_line("markers", "gpu: needs a GPU, and runs by `pytest -m gpu`")

    # The suite's numbers are CPU numbers: tolerances, equal bits, what a run says of its device. So
    # a GPU is hidden from the tests and from the programs that they start, but for `-m gpu`. This
    # comes before torch is imported, which may look for GPUs as soon as it is there.
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""

    # The matrices are tiny: more threads than one only wait for each other.
    import torch
    torch.set_num_threads(1)
