"""What all tests share: the project can be imported, torch has one thread, and no GPU is seen."""
import os
import sys
from pathlib import Path

# `import bert` and `import tiny` work wherever pytest is started from.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def pytest_configure(config):
    """pytest calls this before it imports a file of tests."""
    config.addinivalue_line("markers", "hf: needs transformers, and runs where it is installed")
    # The suite's numbers are CPU numbers: tolerances, equal bits, what a run says of its device.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # The matrices are tiny: more threads than one only wait for each other.
    import torch
    torch.set_num_threads(1)
