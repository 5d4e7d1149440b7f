"""blockprune.py with the `transformers` package: its Trainer, its files, models that generate.

The Trainer is that of tests/examples/trainer.py; masks and BERT are those of huggingface.py there.
"""
import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

EXAMPLES = Path(__file__).resolve().parent / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES.parents[1])]

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
load_file = pytest.importorskip("safetensors.torch").load_file

import huggingface
import trainer as example
from blockprune import (bake, cut_dimensions, cut_heads, density, mask_dimensions, mask_weight,
                        masks, penalty, set_threshold, threshold_schedule)

pytestmark = pytest.mark.hf


def make_trainer(folder, head=transformers.BertForSequenceClassification, dropout=0.1,
                 **arguments):
    """A trainer of 8 steps of 8 sentences, of which 5 are an epoch. All is seeded."""
    transformers.logging.disable_progress_bar()
    transformers.set_seed(0)
    config = huggingface.make_bert().config
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    config.is_decoder = head is transformers.BertLMHeadModel
    model = head(config)
    huggingface.mask_bert(model)
    data = example.rows(60)
    if config.is_decoder:
        for row in data:
            row["labels"] = row["input_ids"]    # as many labels in each batch
    settings = {"max_steps": 8, "per_device_train_batch_size": 8, "learning_rate": 3e-3,
                "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    args = transformers.TrainingArguments(str(folder), **{**settings, **arguments})
    trainer = example.PruningTrainer(model, args, train_dataset=data[:40], eval_dataset=data[40:])
    trainer.score_lr = 1.0      # so large that blocks go within 8 steps
    trainer.final_lambda = 1.0
    return trainer


def trained_scores(trainer):
    """All scores after a training in fp64: Adam makes whole steps of what is rounding in fp32."""
    trainer.model.double()
    trainer.train()
    assert 0.1 < density(trainer.model)["all"] < 0.9
    return [mask.owner.scores.detach() for mask in masks(trainer.model)]


# ---------------------------------------------------------------------------------- while it trains


# A model may use num_items_in_batch, may take it without using it, or may not take it.
@pytest.mark.parametrize("takes_items, head", [
    pytest.param(True, transformers.BertLMHeadModel, id="used"),
    pytest.param(True, transformers.BertForSequenceClassification, id="not used"),
    pytest.param(False, transformers.BertForSequenceClassification, id="not taken")])
def test_accumulated_batches_give_the_scores_of_one_batch(tmp_path, takes_items, head):
    scores = []
    for batch, accumulated in ((8, 1), (4, 2)):
        trainer = make_trainer(tmp_path, head, dropout=0.0, per_device_train_batch_size=batch,
                               gradient_accumulation_steps=accumulated)
        trainer.model_accepts_loss_kwargs = takes_items
        scores.append(trained_scores(trainer))
    assert_close(scores[0], scores[1], rtol=0, atol=1e-6)


def test_two_processes_give_the_scores_of_one(tmp_path):
    """A step of two processes with 4 sentences each is that of 8 in one."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run([*command, __file__, tmp_path], env={**os.environ, "OMP_NUM_THREADS": "1"},
                   check=True)
    one = make_trainer(tmp_path, dropout=0.0)
    expected = trained_scores(one)
    for rank in (0, 1):
        assert_close(torch.load(tmp_path / f"{rank}.pt"), expected, rtol=0, atol=1e-6)


def test_tau_follows_the_schedule_and_is_final_in_evaluation(tmp_path):
    trained = []
    evaluated = []

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            trained.append(next(masks(model)).threshold.item())

        def on_evaluate(self, args, state, control, model, **kwargs):
            evaluated.append(next(masks(model)).threshold.item())

    trainer = make_trainer(tmp_path, eval_strategy="steps", eval_steps=2)
    trainer.add_callback(Watch())
    trainer.train()
    assert trained == pytest.approx([threshold_schedule(step, 8, 0.4, 4) for step in range(8)])
    assert evaluated == pytest.approx([0.1] * 4)


@pytest.mark.parametrize("training", [True, False])
def test_the_loss_has_the_penalty_in_training_alone(tmp_path, training):
    trainer = make_trainer(tmp_path, dropout=0.0)
    trainer.state.max_steps, trainer.state.global_step = 8, 2
    rows = trainer.train_dataset[:8]
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    trainer.model.train(training)
    expected = trainer.model(**batch).loss
    if training:
        tau = threshold_schedule(2, 8, 0.4, 4)
        expected = expected + tau / 0.1 * penalty(trainer.model)
    assert_close(trainer.compute_loss(trainer.model, batch), expected)


# ------------------------------------------------------------------------------- stopped and saved


def test_a_resumed_run_ends_at_the_same_bits(tmp_path):
    # Step 3 is in the middle of an epoch, with dropout, and with an evaluation between the steps.
    settings = dict(save_strategy="steps", save_steps=3, eval_strategy="steps", eval_steps=3)
    whole = make_trainer(tmp_path, **settings)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert 0.1 < density(whole.model)["all"] < 0.9
    for one, other in ((whole.model, resumed.model), (whole.optimizer, resumed.optimizer)):
        assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_masked_and_baked_models_open_with_the_same_logits(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    model = trainer.model.eval()
    trainer.save_model(str(tmp_path / "masked"))
    baked = bake(copy.deepcopy(model))
    baked.save_pretrained(tmp_path / "baked")

    # Scores that are shared are in the file once, and are shared again in a model masked alike.
    masked = huggingface.make_bert().eval()
    huggingface.mask_bert(masked)
    masked.load_state_dict(load_file(tmp_path / "masked" / "model.safetensors"), strict=True)
    opened = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "baked")
    ids = torch.randint(40, (5, 16))
    with torch.no_grad():
        expected = model(ids).logits
        for other in (masked, baked, opened):
            assert torch.equal(other(ids).logits, expected)


def test_tied_embeddings_masked_alike_are_tied_when_opened(tmp_path):
    model = make_model("llama", tie_word_embeddings=True)
    owner = mask_weight(model.model.embed_tokens, (5, 16))
    mask_weight(model.lm_head, (5, 16), share=owner)
    set_threshold(model, 0.5)
    owner.scores.data.normal_()
    _, logits = generate(model)
    bake(model).save_pretrained(tmp_path)
    opened = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert opened.lm_head.weight is opened.model.embed_tokens.weight
    assert 0.2 < (opened.lm_head.weight == 0).double().mean() < 0.8
    assert torch.equal(generate(opened)[1], logits)


# ----------------------------------------------------------------------------- models that generate


def make_model(name, **changes):
    """A random model of 2 layers with 4 heads of 16, in fp64: rounding must not change a token."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        name, vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=44, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        **changes)
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    # Biases are not 0, and weights so large that the model has more than one word to say.
    for parameter_name, parameter in model.named_parameters():
        if "norm" not in parameter_name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def generate(model):
    """12 more tokens for 3 prompts, the shorter ones padded on the left; and their logits."""
    ids = torch.tensor([[5, 6, 7, 8, 9], [0, 0, 11, 12, 13], [0, 20, 21, 22, 23]])
    with torch.no_grad():
        output = model.generate(
            ids, attention_mask=(ids != 0).long(), max_new_tokens=12, do_sample=False,
            output_logits=True, return_dict_in_generate=True)
    return output.sequences, torch.stack(output.logits)


@pytest.mark.parametrize("name, changes", [
    pytest.param("llama", {}, id="llama"),
    pytest.param("llama", {"mlp_bias": True, "attention_bias": True}, id="with biases"),
    pytest.param("qwen2", {"num_key_value_heads": 4}, id="qwen2"),
    pytest.param("mistral", {"num_key_value_heads": 2}, id="grouped-query attention")])
def test_a_model_generates_the_same_masked_baked_and_cut(name, changes):
    model = make_model(name, **changes)
    dense_tokens, _ = generate(model)
    # About half is pruned, and all that the third head gives to o_proj.
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            mask_weight(linear, (16, 16), kind="attention").scores.data.normal_(std=3)
        out = mask_weight(attention.o_proj, (16, 16), kind="attention")
        out.scores.data[:, 2] = -9
        inner = mask_dimensions(mlp.up_proj, mlp.down_proj, gate=mlp.gate_proj)
        inner.scores.data.normal_(std=3)
    set_threshold(model, 0.4)

    tokens, logits = generate(model)
    assert not torch.equal(tokens, dense_tokens)
    assert len(tokens[:, 5:].unique()) > 5
    bake(model)
    baked_tokens, baked_logits = generate(model)
    assert torch.equal(baked_tokens, tokens)
    assert torch.equal(baked_logits, logits)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        if attention.k_proj.out_features == 64:         # a key and value for each head
            heads = cut_heads(attention.q_proj, attention.k_proj, attention.v_proj,
                              attention.o_proj, head_size=16)
            assert 0 < len(heads) < 4
        left = cut_dimensions(mlp.up_proj, mlp.down_proj, mlp.act_fn, gate=mlp.gate_proj)
        assert 10 < len(left) < 34
    cut_tokens, cut_logits = generate(model)
    assert torch.equal(cut_tokens, tokens)
    assert_close(cut_logits, logits, rtol=0, atol=1e-9)


if __name__ == "__main__":      # one of two processes
    folder = Path(sys.argv[1])
    one_of_two = make_trainer(folder, dropout=0.0, per_device_train_batch_size=4)
    assert one_of_two.args.world_size == 2
    torch.save(trained_scores(one_of_two), folder / f"{one_of_two.args.process_index}.pt")
