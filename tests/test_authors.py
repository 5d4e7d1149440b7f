"""Step by step, what the authors' own trainer computes.

tests/golden/nn_pruning.json holds whole trainings of tiny BERTs by the authors' code,
huggingface/nn_pruning at 0cef2b2: initial weights, batches and hyper-parameters, and of every step
what came out. Here our model is built from the same weights and trained on the same batches by the
two functions of a step that train() calls too, and each of these must agree: thresholds, λ,
penalty, losses, gradients and their norm, masks and bias masks; at the end scores, weights, widths.

The cases: hybrid, block, unstructured and struct, 40 steps each, in fp64. Where we differ on
purpose, the cases step around it, on one side or on the other:
    padding        their softmaxes include it, ours do not: the batches have none
    learning rate  theirs starts at 0, ours at 1/warm-up: both are constant here
    AdamW          theirs adds ε before the bias correction: torch's took its place, with ε 1e-3
    struct         ours ties one score over the four matrices of a head: here they are scored apart
    the floor      theirs can keep 0.5 % of the blocks: it was set to 0

That it can fail, with one line of blockprune.py or train_squad.py changed at a time; the first
quantity that is off, and by how much, in the case hybrid if no other is named:
    the gradient of a score a mean over its block, not a sum     gradient of scores, step 0: 0.35
    σ′(S) in the straight-through gradient                       gradient of scores, step 0: 0.35
    W ⊙ M, not W, in the gradient of a score                     gradient norm, step 8: 9.7e-05
    the penalty one mean over all score tensors                  penalty, step 0: 0.11
    the bias not masked                                          gradient norm, step 9: 1.3e-07
    λ without τ                                                  gradient of scores, step 0: 0.0078
    the block of `out` not transposed (block: 2 × 3)             its place; gradient, step 0: 0.22
    fc1 and fc2 scored apart                                     sharing; gradient, step 0: 0.50
    query and key with the same scores                           sharing; gradient, step 0: 0.37
    λ of attention and of feed-forward layers exchanged          penalty, step 1: 0.0051
    no gradient clip                                             gradient of scores, step 1: 0.0026
    α of cross entropy and of distillation exchanged             gradient of scores, step 0: 0.83
    τ of the step before                                         loss, step 4: 0.28
"""
import json
import math
from pathlib import Path

import pytest
import torch

import train_squad
from bert import HF_NAMES, BertConfig, BertForQuestionAnswering, hf_tensors
from blockprune import mask_dimensions, mask_weight, masks, parameter_groups, set_threshold
from compact import compact
from train_squad import Config, add_masks, step_loss, threshold_and_lambda, update

GOLDEN_PATH = Path(__file__).parent / "golden" / "nn_pruning.json"
GOLDEN = json.loads(GOLDEN_PATH.read_text(encoding="utf-8"))
TOLERANCE = 1e-9
OUR_KIND = {"attention": "attention", "dense": "ffn"}      # the file's word for it: ours


@pytest.fixture(autouse=True)
def fp64(monkeypatch):
    """All in double precision; loss_terms() casts logits with .float(), which is .double() here."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


# ---------------------------------------------------------------------- a case as one of our models


def full_name(name):
    """The file's name of a tensor or module that hf_tensors() or HF_NAMES names."""
    if name.startswith("qa_outputs"):
        return name
    return f"bert.{name}"


def settings_of(hyper):
    """The hyper-parameters of the file, as our settings."""
    return Config(
        method="hybrid",        # or any other: what counts is that there are masks
        precision="fp32", device="cpu", lr=hyper.get("lr"), score_lr=hyper.get("score_lr"),
        clip=hyper.get("clip", 1),
        alpha_ce=hyper.get("alpha_ce", 0.1), alpha_kd=hyper.get("alpha_kd", 0.9),
        temperature=hyper.get("temperature", 2), weight_decay=hyper.get("weight_decay", 0),
        initial_warmup=hyper["initial_warmup"], final_warmup=hyper["final_warmup"],
        threshold=hyper["threshold"], final_lambda=hyper["final_lambda"],
        attention_lambda=hyper.get("attention_lambda"), ffn_lambda=hyper.get("dense_lambda"))


def build_model(case):
    """Our BERT with the case's weights."""
    model = BertForQuestionAnswering(BertConfig(**case["config"]))
    for name, tensor in hf_tensors(model).items():
        tensor.data.copy_(torch.tensor(case["weights"][full_name(name)]))
    return model


def put_masks(model, case):
    """As train_squad.py does; Struct with independent scores, as the authors have it."""
    if case["method"] != "struct":
        r, c = case["block"]
        add_masks(model, case["method"], f"{r}x{c}")
        return
    E = model.config.hidden_size
    D = model.config.head_size
    for layer in model.bert.layers:
        for linear in (layer.attention.query, layer.attention.key, layer.attention.value):
            mask_weight(linear, (D, E), kind="attention")
        mask_weight(layer.attention.out, (E, D), kind="attention")
        mask_dimensions(layer.ffn.fc1, layer.ffn.fc2)


def masked_linears(model, case):
    """The masked modules, in the file's order."""
    modules = {}
    for ours, theirs in HF_NAMES.items():
        for layer in range(model.config.num_hidden_layers):
            name = full_name(theirs.format(layer))
            modules[name] = model.get_submodule(ours.format(layer))
    return [modules[row["name"]] for row in case["linears"]]


def weight_mask(linear):
    return linear.parametrizations.weight[0]


def bias_mask(linear):
    """1 where the bias of an output counts."""
    bias = linear.parametrizations.bias
    return bias[0](torch.ones_like(bias.original))


def distinct_scores(linears):
    """Each score tensor once, in the order in which it is met."""
    scores = []
    for linear in linears:
        found = weight_mask(linear).owner.scores
        if not any(found is other for other in scores):
            scores.append(found)
    return scores


# ------------------------------------------------------------------------------------- comparisons


def assert_close(what, ours, theirs):
    """Numbers of any shape, to within the tolerance; NaN is close to nothing."""
    ours = torch.as_tensor(ours, dtype=torch.float64).detach().flatten()
    theirs = torch.as_tensor(theirs, dtype=torch.float64).flatten()
    assert ours.shape == theirs.shape, what
    difference = (ours - theirs).abs().max().item()
    assert difference <= TOLERANCE, f"{what}: off by {difference:.1e}"


def assert_masks_equal(step, linears, masks_there, bias_masks_there):
    """Every block and every output, exactly. In the file a mask is a string of 0 and 1."""
    for i, linear in enumerate(linears):
        blocks = weight_mask(linear).block_mask().flatten().tolist()
        expected_blocks = [float(bit) for bit in masks_there[i]]
        assert blocks == expected_blocks, f"mask {i} at step {step}"
        outputs = bias_mask(linear).tolist()
        expected_outputs = [float(bit) for bit in bias_masks_there[i]]
        assert outputs == expected_outputs, f"bias mask {i} at step {step}"


# ------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("name", GOLDEN["cases"])
def test_masks_and_shared_scores_are_the_authors(name):
    case = GOLDEN["cases"][name]
    model = build_model(case)
    put_masks(model, case)
    linears = masked_linears(model, case)
    scores = distinct_scores(linears)
    # The masks are on the modules of the file, and nowhere else.
    masks_of_linears = {id(weight_mask(linear)) for linear in linears}
    assert masks_of_linears == {id(mask) for mask in masks(model)}
    assert len(scores) == len({row["scores"] for row in case["linears"]})
    for linear, row in zip(linears, case["linears"]):
        mask = weight_mask(linear)
        assert mask.kind == OUR_KIND[row["kind"]]
        assert list(mask.block) == row["block"]
        assert mask.owner.scores is scores[row["scores"]]


@pytest.mark.parametrize("name", GOLDEN["cases"])
def test_every_step_of_a_training_is_the_authors(name, monkeypatch):
    case = GOLDEN["cases"][name]
    hyper = case["hyper"]
    expected = case["expected"]
    config = settings_of(hyper)
    total = hyper["steps"]
    warmup = hyper["warmup"]

    model = build_model(case)
    weights = {full_name(name): tensor for name, tensor in hf_tensors(model).items()}
    put_masks(model, case)
    linears = masked_linears(model, case)
    scores = distinct_scores(linears)
    groups = parameter_groups(model, config.lr, config.score_lr, config.weight_decay)
    for group in groups:
        group["peak_lr"] = group["lr"]
    optimizer_class = getattr(torch.optim, hyper["optimizer"])
    optimizer = optimizer_class(groups, **hyper["options"])
    # The rates of the file are constant. (Their schedule has a test of its own.)
    monkeypatch.setattr(train_squad, "learning_rate_factor", lambda step, total, warmup: 1.0)

    model.train()
    for step in range(total):
        rows = case["batches"][step % len(case["batches"])]
        batch = {key: torch.tensor(values) for key, values in rows.items()}
        batch["real"] = torch.ones_like(batch["ids"], dtype=torch.bool)     # no padding
        teacher_logits = (batch["teacher_start"], batch["teacher_end"])

        # The first half of the step, as train() takes it.
        found = step_loss(model, batch, teacher_logits, step, config, total, warmup)
        optimizer.zero_grad()
        found["loss"].backward()

        # Gradients before they are clipped, and the masks that were used.
        gradients = expected["gradients"].get(str(step))
        if gradients is not None:
            for i, S in enumerate(scores):
                what = f"gradient of scores {i} at step {step}"
                assert_close(what, S.grad, gradients["scores"][i])
            for weight, values in gradients["weights"].items():
                what = f"gradient of {weight} at step {step}"
                assert_close(what, weights[weight].grad, values)
        if str(step) in expected["masks"]:
            assert_masks_equal(step, linears, expected["masks"][str(step)],
                               expected["bias_masks"][str(step)])

        # The second half.
        found["norm"] = update(model, optimizer, step, config, total, warmup)
        assert set(found) == set(expected["steps"])
        for quantity, value in found.items():
            assert_close(f"{quantity} at step {step}", value, expected["steps"][quantity][step])

    # After the last update, at the final τ.
    set_threshold(model, config.threshold)
    final = expected["final"]
    assert_masks_equal("final", linears, expected["masks"]["final"],
                       expected["bias_masks"]["final"])
    for i, S in enumerate(scores):
        assert_close(f"scores {i}", S, final["scores"][i])
    effective = {full_name(name): tensor for name, tensor in hf_tensors(model).items()}
    for weight, (total_sum, norm) in zip(case["weights"], final["effective"], strict=True):
        assert_close(f"sum of {weight}", effective[weight].sum(), total_sum)
        assert_close(f"norm of {weight}", effective[weight].norm(), norm)
    widths = [max(1, width) for width in compact(model).config.ffn]     # they keep one at least
    assert widths == final["ffn"]


def test_the_papers_schedule_is_the_authors():
    """110,660 steps, of which τ is flat for 5,400 at the start and 54,000 at the end."""
    schedule = GOLDEN["schedule"]
    hyper = schedule["hyper"]
    config = settings_of(hyper)
    total = hyper["steps"]
    warmup = hyper["warmup"]
    for step, tau, lam in schedule["rows"]:
        our_tau, our_lambda = threshold_and_lambda(step, config, total, warmup)
        assert math.isclose(our_tau, tau, abs_tol=1e-12)
        assert math.isclose(our_lambda, lam, abs_tol=1e-10)
