"""blockprune.py with the `transformers` package: its Trainer, and a tiny LLaMA that generates.

The Trainer is that of tests/examples/trainer.py. What is asked of it is what people rely on: however
a step's batch is cut up, the same masks come out; a resumed run ends at the same bits; what is saved
is what was trained.
"""
import copy
import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from blockprune import (bake, cut_dimensions, density, mask_dimensions, mask_weight, masks, penalty,
                        set_threshold, threshold_schedule)

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

sys.path.insert(0, str(Path(__file__).resolve().parent / "examples"))
example = importlib.import_module("trainer")


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()


def make_trainer(folder, dropout=0.1, **arguments):
    """A trainer of 8 steps of 8 sentences, of which 5 are an epoch. All is seeded."""
    transformers.set_seed(0)
    model = example.put_masks_on(example.tiny_bert())
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    settings = {
        "max_steps": 8,
        "per_device_train_batch_size": 8,
        "learning_rate": 3e-3,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    settings.update(arguments)
    args = transformers.TrainingArguments(str(folder), **settings)
    data = example.sentences(60)
    trainer = example.PruningTrainer(model, args, train_dataset=data[:40], eval_dataset=data[40:])
    trainer.score_lr = 1.0      # so large that blocks go within 8 steps
    trainer.final_lambda = 1.0
    return trainer


def assert_same_state(model, other):
    state = model.state_dict()
    other_state = other.state_dict()
    assert state.keys() == other_state.keys()
    for name in state:
        assert torch.equal(state[name], other_state[name]), name


def test_the_example_prunes_and_saves():
    right, kept = example.main()
    assert right > 0.95
    assert kept["attention"] < 0.8
    assert kept["ffn"] < 0.4


# ------------------------------------------------------------------------------- in the middle of it


@pytest.mark.parametrize("loss_kwargs", [
    pytest.param(True, id="items are counted"),
    pytest.param(False, id="items are not counted")])
def test_accumulated_batches_give_the_masks_of_one_batch(tmp_path, loss_kwargs):
    scores = []
    kept = []
    for batch, accumulated in ((8, 1), (4, 2)):
        trainer = make_trainer(tmp_path, dropout=0.0, per_device_train_batch_size=batch,
                               gradient_accumulation_steps=accumulated)
        trainer.model_accepts_loss_kwargs = loss_kwargs
        trainer.train()
        scores.append([mask.scores.detach() for mask in masks(trainer.model)])
        kept.append([mask.block_mask() for mask in masks(trainer.model)])
    assert 0.1 < density(trainer.model)["all"] < 0.9
    for one, two in zip(*kept):
        assert torch.equal(one, two)
    for one, two in zip(*scores):
        assert_close(one, two, rtol=1e-4, atol=1e-4)
