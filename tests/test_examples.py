"""The examples of tests/examples/, each run by itself: it does what its first lines say.

They make up their tasks on the spot, so the right answer is known.
"""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from blockprune import mask_weight, set_threshold

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "tests" / "examples"
sys.path.insert(0, str(EXAMPLES))


def test_blockprune_copied_alone_finds_the_planted_blocks(tmp_path):
    """In an empty folder: of this project, planted.py needs blockprune.py and nothing else."""
    shutil.copy(ROOT / "blockprune.py", tmp_path)
    shutil.copy(EXAMPLES / "planted.py", tmp_path)
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    environment.pop("PYTHONPATH", None)
    done = subprocess.run([sys.executable, "planted.py"], cwd=tmp_path, env=environment,
                          capture_output=True, text=True, check=True)

    printed = re.search(r"planted: (.*)\nfound:   (.*)\nerror: ([\d.]+)", done.stdout)
    planted, found, error = printed.groups()
    assert planted == "[[1, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1]]"
    assert found == planted
    assert float(error) < 0.01


def test_a_classifier_loses_half_of_its_weights_and_no_accuracy():
    import classification
    dense, masked, cut, kept, widths = classification.main()
    assert dense > 0.95
    assert masked >= 0.98 * dense
    assert cut == masked
    assert kept["attention"] < 0.5
    assert kept["all"] < 0.5
    assert len(widths) == 2
    assert max(widths) < 128


def test_an_encoder_decoder_loses_half_of_its_weights_and_still_writes():
    import generation
    dense, pruned, kept, widths = generation.main()
    assert dense > 0.95
    assert pruned >= 0.95
    assert set(kept) == {"encoder", "decoder", "cross", "ffn", "all"}
    assert kept["all"] < 0.5
    assert len(widths) == 2
    assert max(widths) < 128


def test_a_convolution_loses_channels_and_filters():
    import convolution
    right, channels, kept = convolution.main()
    assert right > 0.95
    assert 1 <= channels < 8        # of 12
    assert kept["filters"] < 0.5


def test_models_of_transformers_are_pruned_saved_and_loaded():
    pytest.importorskip("transformers")
    import huggingface
    results = huggingface.main()
    assert len(results) == 2
    for _, kept, zeros, difference in results:
        assert 0 < kept["all"] < 0.9
        assert zeros > 2000
        assert difference == 0


def test_in_gpt2_a_bias_goes_with_its_column():
    """Its weights are (in, out). Without output 8 to 15 of 32, what comes out there is 0."""
    pytest.importorskip("transformers")
    import huggingface
    gpt2 = huggingface.models()[1]
    square = gpt2.transformer.h[0].attn.c_proj      # as many inputs as outputs: shapes say nothing
    torch.nn.init.normal_(square.bias)
    W = square.weight.detach().clone()
    b = square.bias.detach().clone()
    x = torch.randn(3, 32)

    mask = mask_weight(square, (32, 8), output_dim=1)       # four blocks of eight columns
    set_threshold(square, 0.1)
    mask.scores.data[0, 1] = -9
    expected = x @ W + b
    expected[:, 8:16] = 0
    torch.testing.assert_close(square(x), expected)
