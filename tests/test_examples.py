"""The examples of tests/examples/ print what they should: some is pruned, and the task solved."""
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "tests" / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    """run(PATH) is `python PATH`, in this process; it returns what was printed."""
    def run_example(path):
        # As Python does, put the example's folder first. It has to find the root by itself.
        others = [entry for entry in sys.path if Path(entry).resolve() not in (ROOT, EXAMPLES)]
        monkeypatch.setattr(sys, "path", [str(path.parent)] + others)
        for module in ("blockprune", "common", "huggingface"):
            monkeypatch.delitem(sys.modules, module, raising=False)
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out
    return run_example


@pytest.mark.parametrize("copied", [False, True], ids=["in place", "beside blockprune.py alone"])
def test_the_planted_blocks_are_found(run, tmp_path, copied):
    folder = EXAMPLES
    if copied:
        folder = tmp_path
        shutil.copy(ROOT / "blockprune.py", folder)
        shutil.copy(EXAMPLES / "planted.py", folder)
    output = run(folder / "planted.py")
    planted, found = re.search(r"planted: (.*)\nfound:   (.*)\n", output).groups()
    assert planted == "[[1, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1]]"
    assert found == planted
    assert_printed(output, {"error: #": (0, 0.01)})


def assert_printed(output, bounds):
    """Each # of a pattern is a number within the bounds, wherever the pattern is in the output."""
    for pattern, (low, high) in bounds.items():
        regex = re.escape(pattern).replace(r"\#", r"([\d.]+(?:e-\d+)?)")
        found = re.findall(regex, output)
        assert found, pattern
        for numbers in found:
            for number in [numbers] if isinstance(numbers, str) else numbers:
                assert low <= float(number) <= high, pattern


def test_a_classifier_solves_its_task_with_half_of_its_weights(run):
    assert_printed(run(EXAMPLES / "classification.py"), {
        "accuracy: #": (0.98, 1),
        "kept: # of attention, # of the FFN": (0.03, 0.6),
        "left: [#, #] of 128": (3, 60)})


def test_an_encoder_decoder_keeps_the_attention_it_needs(run):
    """To write backwards it has to look at the input, and hardly at anything else."""
    assert_printed(run(EXAMPLES / "generation.py"), {
        "mistake: #": (0.95, 1),
        "kept: # of attention in the encoder, # in the decoder": (0, 0.3),
        "# across": (0.5, 0.98),
        "left: [#, #] of 128": (10, 90)})


@pytest.mark.hf
def test_models_of_transformers_are_opened_and_cut(run):
    pytest.importorskip("transformers")
    bert, gpt2 = run(EXAMPLES / "huggingface.py").split("GPT2")
    same = {"accuracy: #": (0.98, 1), "by the cut: #": (0, 1e-5)}
    assert_printed(bert, {**same, "[(#, #), (#, #)]": (1, 120)})
    assert_printed(gpt2, {**same, "[(4, #), (4, #)]": (20, 220)})
    heads = re.findall(r"\((\d), ", bert)
    assert sum(int(number) for number in heads) < 8     # of two layers with four


@pytest.mark.hf
def test_the_trainer_prunes_while_it_solves_the_task(run):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    assert_printed(run(EXAMPLES / "trainer.py"), {
        "processes: 1, accuracy: #": (0.95, 1),
        "kept: # of attention": (0.2, 0.9),
        "# of the FFN": (0.02, 0.4)})
