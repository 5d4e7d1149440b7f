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
load_file = pytest.importorskip("safetensors.torch").load_file

sys.path.insert(0, str(Path(__file__).resolve().parent / "examples"))
example = importlib.import_module("trainer")


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()


def make_trainer(folder, head=None, dropout=0.1, **arguments):
    """A trainer of 8 steps of 8 sentences, of which 5 are an epoch. All is seeded."""
    transformers.set_seed(0)
    model = example.tiny_bert()
    data = example.sentences(60)
    if head is transformers.BertLMHeadModel:
        model.config.is_decoder = True
        model = head(model.config)
        for row in data:
            row["labels"] = row["input_ids"]    # as many labels in each batch
    example.put_masks_on(model)
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


# A model may use num_items_in_batch, may take it without using it, or may not take it.
@pytest.mark.parametrize("takes_items, head", [
    pytest.param(True, transformers.BertLMHeadModel, id="used"),
    pytest.param(True, transformers.BertForSequenceClassification, id="not used"),
    pytest.param(False, transformers.BertForSequenceClassification, id="not taken")])
def test_accumulated_batches_give_the_masks_of_one_batch(tmp_path, takes_items, head):
    scores = []
    kept = []
    for batch, accumulated in ((8, 1), (4, 2)):
        trainer = make_trainer(tmp_path, head=head, dropout=0.0, per_device_train_batch_size=batch,
                               gradient_accumulation_steps=accumulated)
        trainer.model_accepts_loss_kwargs = takes_items
        trainer.train()
        scores.append([mask.scores.detach() for mask in masks(trainer.model)])
        kept.append([mask.block_mask() for mask in masks(trainer.model)])
    assert 0.1 < density(trainer.model)["all"] < 0.9
    for one, two in zip(*kept):
        assert torch.equal(one, two)
    for one, two in zip(*scores):
        assert_close(one, two, rtol=1e-4, atol=1e-4)


class Watch(transformers.TrainerCallback):
    """Notes τ after each step and each evaluation."""

    def __init__(self):
        self.trained = []
        self.evaluated = []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.trained.append(next(masks(model)).threshold.item())

    def on_evaluate(self, args, state, control, model, **kwargs):
        self.evaluated.append(next(masks(model)).threshold.item())


def test_training_follows_the_schedule_and_evaluation_is_at_the_final_threshold(tmp_path):
    watch = Watch()
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=2, eval_strategy="steps",
                           eval_steps=2)
    trainer.add_callback(watch)
    trainer.train()
    schedule = [threshold_schedule(step, 8, 0.4, 4) for step in range(8)]
    assert watch.trained == pytest.approx(schedule)
    assert schedule[0] < 0.05 and schedule[-1] == 0.1
    assert watch.evaluated == pytest.approx([0.1] * 4)


def test_the_loss_has_the_penalty_in_training_alone(tmp_path):
    trainer = make_trainer(tmp_path, dropout=0.0)
    trainer.state.max_steps = 8
    trainer.state.global_step = 2
    rows = trainer.train_dataset[:8]
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    tau = threshold_schedule(2, 8, 0.4, 4)
    for training in (True, False):
        trainer.model.train(training)
        expected = trainer.model(**batch).loss
        if training:
            expected = expected + tau / 0.1 * penalty(trainer.model)
        assert_close(trainer.compute_loss(trainer.model, batch), expected)


# ----------------------------------------------------------------------------- stopped and saved


def test_a_resumed_run_ends_at_the_same_bits(tmp_path):
    # Step 3 is in the middle of an epoch, with dropout, and with an evaluation between the steps.
    settings = dict(save_strategy="steps", save_steps=3, eval_strategy="steps", eval_steps=3)
    whole = make_trainer(tmp_path, **settings)
    whole.train()
    checkpoint = tmp_path / "checkpoint-3"
    assert checkpoint.is_dir()
    resumed = make_trainer(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert 0.1 < density(whole.model)["all"] < 0.9
    assert_same_state(whole.model, resumed.model)
    for group, other in zip(whole.optimizer.param_groups, resumed.optimizer.param_groups):
        for parameter, other_parameter in zip(group["params"], other["params"]):
            moments = whole.optimizer.state[parameter]
            for name, value in resumed.optimizer.state[other_parameter].items():
                assert torch.equal(value, moments[name])


def test_what_is_saved_has_the_logits_of_the_masked_model(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    model = trainer.model.eval()
    ids = torch.randint(40, (5, 12))
    with torch.no_grad():
        expected = model(ids).logits

    # 1. The masked model, with scores and τ, loads into one that is masked alike.
    trainer.save_model(str(tmp_path / "masked"))
    state = load_file(tmp_path / "masked" / "model.safetensors")
    again = example.put_masks_on(example.tiny_bert()).eval()
    again.load_state_dict(state, strict=True)
    assert_same_state(model, again)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, expected)
    layer = again.bert.encoder.layer[0]
    rows = layer.intermediate.dense.parametrizations.weight[0]
    columns = layer.output.dense.parametrizations.weight[0]
    assert rows.scores is columns.scores

    # 2. A baked copy is an ordinary BERT.
    baked = bake(copy.deepcopy(model))
    baked.save_pretrained(tmp_path / "baked")
    reloaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "baked").eval()
    with torch.no_grad():
        assert torch.equal(baked(ids).logits, expected)
        assert torch.equal(reloaded(ids).logits, expected)
        assert torch.equal(model(ids).logits, expected)     # the original has its masks still
    assert len(list(masks(model))) == 12
