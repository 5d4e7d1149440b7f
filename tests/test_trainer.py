"""blockprune.py with the `transformers` package: its Trainer, and a tiny LLaMA that generates.

The Trainer is that of tests/examples/trainer.py. The same masks come out however a step's batch is
divided; a resumed run ends at the same bits; what is saved is what was trained. The LLaMA generates
the same tokens masked, baked and cut.
"""
import copy
import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from blockprune import (bake, cut_dimensions, cut_heads, density, mask_dimensions, mask_weight,
                        masks, penalty, set_threshold, threshold_schedule)

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


def make_trainer(folder, head=transformers.BertForSequenceClassification, dropout=0.1,
                 **arguments):
    """A trainer of 8 steps of 8 sentences, of which 5 are an epoch. All is seeded."""
    transformers.set_seed(0)
    config = example.tiny_bert().config
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    config.is_decoder = head is transformers.BertLMHeadModel
    model = example.put_masks_on(head(config))
    data = example.sentences(60)
    if config.is_decoder:
        for row in data:
            row["labels"] = row["input_ids"]    # as many labels in each batch
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


# ---------------------------------------------------------------------------------- while it trains


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
        trainer.model.double()      # Adam makes whole steps of what is rounding in fp32
        trainer.train()
        scores.append([mask.owner.scores.detach() for mask in masks(trainer.model)])
        kept.append([mask.block_mask() for mask in masks(trainer.model)])
    assert 0.1 < density(trainer.model)["all"] < 0.9
    for one, two in zip(*kept):
        assert torch.equal(one, two)
    for one, two in zip(*scores):
        assert_close(one, two, rtol=0, atol=1e-6)


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


# ------------------------------------------------------------------------------- stopped and saved


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
    assert rows.owner is columns.owner

    # 2. A baked copy is an ordinary BERT.
    baked = bake(copy.deepcopy(model))
    baked.save_pretrained(tmp_path / "baked")
    reloaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "baked").eval()
    with torch.no_grad():
        assert torch.equal(baked(ids).logits, expected)
        assert torch.equal(reloaded(ids).logits, expected)
        assert torch.equal(model(ids).logits, expected)     # the original has its masks still
    assert len(list(masks(model))) == 12


# ------------------------------------------------------------------------------- a LLaMA generates


def tiny_llama(biases, key_value_heads):
    """A random LLaMA in fp64, where rounding cannot turn one token into another."""
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=44, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=key_value_heads, mlp_bias=biases,
        attention_bias=biases, pad_token_id=0, bos_token_id=1, eos_token_id=None)
    model = transformers.LlamaForCausalLM(config).double().eval()
    # Biases are not 0, and weights so large that the model has more than one word to say.
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def attention_of(layer):
    attention = layer.self_attn
    return attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj


def put_random_masks_on(llama):
    """About half of the blocks of attention and of the inner dimensions are pruned."""
    for layer in llama.model.layers:
        for linear in attention_of(layer):
            mask_weight(linear, (4, 8), kind="attention")
        mlp = layer.mlp
        mask_dimensions(mlp.up_proj, mlp.down_proj, gate=mlp.gate_proj)
    for mask in masks(llama):
        mask.owner.scores.data.normal_(std=3)
    set_threshold(llama, 0.5)


def generate(model):
    """12 more tokens for 3 prompts, the shorter ones padded on the left; and their logits."""
    ids = torch.tensor([[5, 6, 7, 8, 9], [0, 0, 11, 12, 13], [0, 20, 21, 22, 23]])
    with torch.no_grad():
        output = model.generate(
            ids, attention_mask=(ids != 0).long(), max_new_tokens=12, do_sample=False,
            output_logits=True, return_dict_in_generate=True)
    return output.sequences, torch.stack(output.logits)


@pytest.mark.parametrize("key_value_heads", [4, 2])     # two of four: grouped-query attention
@pytest.mark.parametrize("biases", [True, False])
def test_a_llama_generates_the_same_masked_baked_and_cut(biases, key_value_heads):
    torch.manual_seed(0)
    model = tiny_llama(biases, key_value_heads)
    dense_tokens, _ = generate(model)
    put_random_masks_on(model)
    # In each layer the values of the third head of four, which are two blocks high, are pruned.
    for layer in model.model.layers:
        values = layer.self_attn.v_proj.parametrizations.weight[0]
        values.scores.data[4:6] = -9
    assert 0.3 < density(model)["all"] < 0.7

    # Masked.
    tokens, logits = generate(model)
    assert not torch.equal(tokens, dense_tokens)
    assert len(tokens[:, 5:].unique()) > 5
    # Baked.
    bake(model)
    baked_tokens, baked_logits = generate(model)
    assert torch.equal(baked_tokens, tokens)
    assert torch.equal(baked_logits, logits)
    # Cut: dimensions, and heads where each has keys and values of its own.
    for layer in model.model.layers:
        mlp = layer.mlp
        left = len(cut_dimensions(mlp.up_proj, mlp.down_proj, mlp.act_fn, gate=mlp.gate_proj))
        assert 10 < left < 34
        assert mlp.up_proj.out_features == mlp.gate_proj.out_features == left
        if key_value_heads == 4:
            assert cut_heads(*attention_of(layer), head_size=8) == [0, 1, 3]
    cut_tokens, cut_logits = generate(model)
    assert torch.equal(cut_tokens, tokens)
    assert_close(cut_logits, logits, rtol=0, atol=1e-9)
