"""The examples of tests/examples/ by themselves: each does what its first lines say.

They make their tasks up on the spot, so that the right answer is known. `blockprune.py` is all that planted.py needs.
"""
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import blockprune

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "tests" / "examples"
sys.path.insert(0, str(EXAMPLES))


def test_blockprune_copied_alone_finds_the_planted_blocks(tmp_path):
    """In an empty folder, with nothing of ours but that file on the path."""
    for path in (ROOT / "blockprune.py", EXAMPLES / "planted.py"):
        shutil.copy(path, tmp_path)
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "planted.py"], cwd=tmp_path, env=clean, capture_output=True, text=True)
    planted, found, error = re.search(r"planted: (.*)\nfound:   (.*)\nerror: ([\d.]+)", done.stdout).groups()
    assert planted == found == "[[1, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1]]" and float(error) < 0.01


def test_a_classifier_loses_half_of_its_weights_and_no_accuracy():
    dense, masked, cut, kept, widths = importlib.import_module("classification").main()
    assert dense > 0.95 and masked >= 0.98 * dense and cut == masked
    assert kept["attention"] < 0.5 and kept["all"] < 0.5 and all(0 <= width < 128 for width in widths)


def test_an_encoder_decoder_loses_half_of_its_weights_and_still_writes():
    dense, pruned, kept, widths = importlib.import_module("generation").main()
    assert set(kept) == {"encoder", "decoder", "cross", "ffn", "all"} and kept["all"] < 0.5
    assert dense > 0.95 and pruned >= 0.95 and all(0 <= width < 128 for width in widths)


def test_a_convolution_loses_channels():
    right, channels, kept = importlib.import_module("convolution").main()
    assert right > 0.95 and 1 <= channels < 8 and kept["filters"] < 0.5


def test_models_of_transformers_are_pruned_saved_and_loaded():
    pytest.importorskip("transformers")
    example = importlib.import_module("huggingface")
    for model, kept, zeros, difference in example.main():
        assert 0 < kept["all"] < 0.9 and zeros > 2000 and difference == 0
    square = example.models()[1].transformer.h[0].attn.c_proj        # (in, out) = (32, 32): a column goes with its bias
    torch.nn.init.normal_(square.bias)
    x, before = torch.randn(3, 32), (square.weight.detach().clone(), square.bias.detach().clone())
    mask = blockprune.mask_weight(square, (32, 8), output_dim=1)
    blockprune.set_threshold(square, 0.1)
    mask.scores.data[0, 1] = -9
    expected = x @ before[0] + before[1]
    expected[:, 8:16] = 0
    torch.testing.assert_close(square(x), expected)
