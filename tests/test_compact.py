"""compact.py: compaction never changes the function, and the numbers beside it are true.

In order: random models; each reason to cut something, alone; what else compaction keeps; export,
transformers, and linears that are not BERT's; what is counted, by hand; the benchmark, on a clock
of ours; the check on real text; pictures and results.json.
"The same function" means: the same logits at real tokens, in eval mode.

    E hidden size   H heads   D head size   F width of a feed-forward layer   T tokens
    Q, K, V, O the weights of query, key, value and out; W1, W2 those of fc1 and fc2
"""
import copy
import dataclasses
import hashlib
import json
import math
import os
import random
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bert import (ACTIVATIONS, BertConfig, BertForQuestionAnswering, hf_tensors, load_model,
                  save_model)
from blockprune import bake, cut_dimensions, masks, set_threshold
from compact import (benchmark, check, compact, count_parameters, counted, draw, flops,
                     heads_authors_rule, mask_rows)
from train_squad import Config, Squad, add_masks, best_spans, write_results

CASES = int(os.environ.get("FUZZ", 40))     # random models
DEAD = -9.0                                 # a score that is pruned at τ = 0.1

# All different, so that no axis stands in for another: layers 2, H 3, D 4, F 7, E 12, vocabulary
# 19, T at most 9, types 5.
TINY = dict(vocab_size=19, hidden_size=12, num_hidden_layers=2, num_attention_heads=3,
            intermediate_size=7, max_position_embeddings=9, type_vocab_size=5)
# One head and five dimensions in the first layer, nothing in the second.
UNEVEN = BertConfig(**TINY, heads=[1, 0], ffn=[5, 0])
# The paper's headline model, on BERT-base.
HEADLINE = BertConfig(heads=[4, 4, 6, 7, 7, 5, 6, 7, 5, 5, 5, 3],
                      ffn=[552, 717, 795, 789, 833, 792, 620, 466, 283, 112, 96, 238])


def scramble(model):
    """In eval mode; every parameter random, gains and biases too, and large enough to be seen."""
    model.eval()
    for name, parameter in model.named_parameters():
        mean = 0.0
        if name.endswith("norm.weight"):
            mean = 1.0
        nn.init.normal_(parameter, mean=mean, std=0.5)
    return model


def tiny(**changes) -> BertForQuestionAnswering:
    torch.manual_seed(0)
    return scramble(BertForQuestionAnswering(BertConfig(**TINY, **changes)))


def random_inputs(config, rows=3, T=8):
    """ids, types, and which tokens are real: from 1 to T of each row, then comes padding."""
    ids = torch.randint(config.vocab_size, (rows, T))
    types = torch.randint(config.type_vocab_size, (rows, T))
    lengths = torch.randint(1, T + 1, (rows, 1))
    real = torch.arange(T) < lengths
    return ids, types, real


@torch.no_grad()
def logits(model, inputs):
    """Start logits and end logits at the real tokens, (2, number of real tokens)."""
    _, _, real = inputs
    start, end = model(*inputs)
    return torch.stack([start[real], end[real]])


def assert_same(found, expected, tolerance=1e-12):
    """The tolerance is relative where the numbers are larger than 1."""
    allowed = tolerance * max(1, expected.abs().max())
    assert (found - expected).abs().max() <= allowed


def assert_bit_equal(model, other):
    tensors = hf_tensors(model)
    other_tensors = hf_tensors(other)
    assert tensors.keys() == other_tensors.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == other_tensors[name].dtype, name
        assert torch.equal(tensor, other_tensors[name]), name


# ----------------------------------------------------------------------------------- random models


def random_case(seed):
    """A model of random shape with the masks of a random method, and inputs for it.

    Bands of its rows and columns are empty: some are pruned together with their biases, others are
    zero beside biases that stay. So some heads, dimensions and whole layers are empty, and some of
    them are so in one of their matrices alone.
    """
    rng = random.Random(seed)
    torch.manual_seed(seed)
    method = rng.choice(["dense", "hybrid", "block", "struct", "unstructured"])
    # A mask needs a matrix that it can be put on.
    fewest = 1
    if method == "dense":
        fewest = 0
    model = random_model(rng, layers=1 + seed % 3, fewest=fewest)

    for linear in linears_of(model):
        if rng.random() < 0.3:
            fill_random_band(rng, linear.weight.data, rng.randint(0, 1), 0.0)
    if method != "dense":
        put_random_masks(rng, model, method)
    inputs = random_inputs(model.config, rows=rng.randint(1, 4), T=rng.randint(1, 9))
    return model, inputs


def random_model(rng, layers, fewest):
    """With at least so many heads and dimensions in each layer."""
    E = rng.randint(6, 20)
    F = rng.randint(1, 11)
    divisors = [n for n in range(1, E + 1) if E % n == 0]
    H = rng.choice(divisors)
    config = BertConfig(
        vocab_size=23, hidden_size=E, num_hidden_layers=layers, num_attention_heads=H,
        intermediate_size=F, hidden_act=rng.choice(list(ACTIVATIONS)), max_position_embeddings=9,
        type_vocab_size=3, heads=random_widths(rng, layers, fewest, H),
        ffn=random_widths(rng, layers, fewest, F))
    return scramble(BertForQuestionAnswering(config))


def random_widths(rng, layers, fewest, most):
    """A number of heads or dimensions for each layer; half of the time, all of them."""
    widths = []
    for _ in range(layers):
        width = most
        if rng.random() < 0.5:
            width = rng.randint(fewest, most)
        widths.append(width)
    return widths


def linears_of(model):
    """The linears that may be pruned."""
    return [module for module in model.bert.layers.modules() if isinstance(module, nn.Linear)]


def fill_random_band(rng, matrix, dim, value):
    """Put the value into some rows that lie side by side (dim 0), or some columns (dim 1)."""
    size = matrix.shape[dim]
    first, last = sorted([rng.randint(0, size), rng.randint(0, size)])
    matrix.narrow(dim, first, last - first).fill_(value)


def put_random_masks(rng, model, method):
    # The block must fit all matrices.
    largest = min([min(linear.weight.shape) for linear in linears_of(model)])
    r = rng.randint(1, largest)
    c = rng.randint(1, largest)
    add_masks(model, method, f"{r}x{c}")
    for mask in masks(model):
        nn.init.normal_(mask.owner.scores, std=2)
        if rng.random() < 0.5:
            scores = mask.owner.scores.data.view(mask.grid)
            fill_random_band(rng, scores, 0, DEAD)
            fill_random_band(rng, scores, 1, DEAD)
    set_threshold(model, 0.1)


SEEDS = pytest.mark.parametrize("seed", range(CASES))


@SEEDS
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_masked_baked_and_compacted_are_one_function(seed, dtype, tolerance):
    model, inputs = random_case(seed)
    model = model.to(dtype)
    expected = logits(model, inputs)
    baked = bake(copy.deepcopy(model))
    assert_same(logits(baked, inputs), expected, tolerance)
    small = compact(model)
    assert_same(logits(small, inputs), expected, tolerance)
    # There is nothing left to cut.
    assert_bit_equal(compact(small), small)


@SEEDS
def test_a_compacted_model_is_saved_and_loaded(seed, tmp_path):
    model, inputs = random_case(seed)
    small = compact(model)
    save_model(small, tmp_path)
    loaded = load_model(tmp_path).eval()
    assert_bit_equal(loaded, small)
    assert_same(logits(loaded, inputs), logits(model, inputs), 1e-5)


@SEEDS
def test_what_is_needed_is_left_and_the_rest_of_the_configuration_is_kept(seed):
    model, _ = random_case(seed)
    config = model.config
    small = compact(model).config
    assert small.heads == needed_heads(model)
    assert small.ffn == needed_dimensions(model)
    assert dataclasses.replace(small, heads=config.heads, ffn=config.ffn) == config


def needed_heads(model) -> list[int]:
    """By layer, how many heads have weights in their rows of V and in their columns of O."""
    D = model.config.head_size
    needed = []
    for layer in model.bert.layers:
        V = layer.attention.value.weight
        O = layer.attention.out.weight
        count = 0
        for first in range(0, len(V), D):
            head = slice(first, first + D)
            if V[head].any() and O[:, head].any():
                count += 1
        needed.append(count)
    return needed


def needed_dimensions(model) -> list[int]:
    """By layer, how many dimensions have weights in their row of W1 and in their column of W2."""
    needed = []
    for layer in model.bert.layers:
        W1 = layer.ffn.fc1.weight
        W2 = layer.ffn.fc2.weight
        count = 0
        for j in range(len(W1)):
            if W1[j].any() and W2[:, j].any():
                count += 1
        needed.append(count)
    return needed


@SEEDS
def test_counts_of_random_models(seed):
    model, _ = random_case(seed)
    assert_counts_are_right(model)
    assert_counts_are_right(compact(model))


def assert_counts_are_right(model):
    """count_parameters() and flops(), once more, from the configuration alone."""
    c = model.config
    E = c.hidden_size
    D = c.head_size
    T = 5
    linear = 0
    biases_and_norms = 0
    multiply_adds = 0
    for H, F in zip(c.heads, c.ffn):
        weights = 4 * H * D * E + 2 * F * E
        linear += weights
        biases_and_norms += 3 * H * D + E       # query, key and value; out
        biases_and_norms += F + E               # fc1; fc2
        biases_and_norms += 4 * E               # gain and bias of two norms
        multiply_adds += T * weights            # each token meets each weight
        multiply_adds += 2 * T * T * H * D      # each pair of tokens, in Q Kᵀ and with V
    multiply_adds += T * 2 * E                  # the QA head
    assert flops(c, T) == 2 * multiply_adds     # additions count as well

    nonzero = 0
    for module in linears_of(model):
        nonzero += int((module.weight != 0).sum())
    embeddings = (c.vocab_size + c.max_position_embeddings + c.type_vocab_size) * E
    embeddings += 2 * E                         # their norm
    qa_head = 2 * E + 2
    encoder = linear + biases_and_norms
    total = embeddings + encoder + qa_head
    assert count_parameters(model) == {
        "linear": linear,
        "linear_nonzero": nonzero,
        "linear_dense": c.num_hidden_layers * (4 * E * E + 2 * c.intermediate_size * E),
        "encoder": encoder,
        "total": total,
        "bytes": 4 * total,
    }


def test_random_models_are_cut_in_every_way():
    """This is about random_case(): 40 seeds are enough to see all of it."""
    seen = set()
    for seed in range(CASES):
        model, _ = random_case(seed)
        small = compact(model)
        for layer, small_layer in zip(model.bert.layers, small.bert.layers):
            a = layer.attention
            small_a = small_layer.attention
            seen.add(how_it_was_cut(a.value, a.out, small_a.value, small_a.out))
            f = layer.ffn
            small_f = small_layer.ffn
            seen.add(how_it_was_cut(f.fc1, f.fc2, small_f.fc1, small_f.fc2))
    assert seen == {
        ("none were there", "no constant"),
        ("all are left", "no constant"),
        ("some are left", "no constant"),
        ("some are left", "a constant"),
        ("none are left", "no constant"),
        ("none are left", "a constant"),
    }


def how_it_was_cut(before, out, small_before, small_out):
    """What became of heads or dimensions, and whether a constant went into the bias after them."""
    rows = len(before.weight)
    small_rows = len(small_before.weight)
    if rows == 0:
        left = "none were there"
    elif small_rows == 0:
        left = "none are left"
    elif small_rows < rows:
        left = "some are left"
    else:
        left = "all are left"
    constant = "no constant"
    if not torch.equal(out.bias, small_out.bias):
        constant = "a constant"
    return left, constant


# ----------------------------------------------------------------------- each reason to cut, alone

SECOND = slice(4, 8)    # the second head: its rows of Q, K and V, its columns of O


def without(reason):
    """A tiny model in fp64, in whose second layer the weights that the reason names are zero."""
    model = tiny().double()
    a = model.bert.layers[1].attention
    f = model.bert.layers[1].ffn
    Q, K, V, O = [linear.weight.data for linear in (a.query, a.key, a.value, a.out)]
    bQ, bK, bV, bO = [linear.bias.data for linear in (a.query, a.key, a.value, a.out)]
    W1, W2 = [linear.weight.data for linear in (f.fc1, f.fc2)]
    b1, b2 = [linear.bias.data for linear in (f.fc1, f.fc2)]
    zero = {
        "nothing": [],
        "all biases": [bQ, bK, bV, bO, b1, b2],
        # Of one head.
        "V": [V[SECOND]],
        "V and its bias": [V[SECOND], bV[SECOND]],
        "O": [O[:, SECOND]],
        "Q": [Q[SECOND]],
        "K": [K[SECOND]],
        "half of V": [V[4:6], bV[4:6]],
        "half of V, the other half of O": [V[4:6], O[:, 6:8]],
        # Of several heads.
        "halves of two heads of V": [V[2:6]],
        "V of one head, O of another": [V[0:4], O[:, 8:12]],
        "Q, K and their biases": [Q, K, bQ, bK],
        "V of all heads": [V],
        "O of all heads": [O],
        # Of the feed-forward layer.
        "a row of fc1": [W1[2]],
        "a row of fc1 and its bias": [W1[2], b1[2]],
        "half a row of fc1": [W1[2, :6]],
        "a column of fc2": [W2[:, 2]],
        "a row of fc1, another column of fc2": [W1[0], W2[:, 5]],
        "fc1": [W1],
        "fc2": [W2],
        # Of both.
        "the other sides": [O[5], W1[:, 2], W2[2]],
        "all weights": [Q, K, V, O, W1, W2],
        "the layer": [Q, K, V, O, W1, W2, bQ, bK, bV, bO, b1, b2],
    }
    for tensor in zero[reason]:
        tensor.zero_()
    return model


@pytest.mark.parametrize("reason, heads, width", [      # what is left of 3 heads and 7 dimensions
    ("nothing", 3, 7),
    ("all biases", 3, 7),
    ("V", 2, 7),
    ("V and its bias", 2, 7),
    ("O", 2, 7),
    ("Q", 3, 7),
    ("K", 3, 7),
    ("half of V", 3, 7),
    ("half of V, the other half of O", 3, 7),
    ("halves of two heads of V", 3, 7),
    ("V of one head, O of another", 1, 7),
    ("Q, K and their biases", 3, 7),
    ("V of all heads", 0, 7),
    ("O of all heads", 0, 7),
    ("a row of fc1", 3, 6),
    ("a row of fc1 and its bias", 3, 6),
    ("half a row of fc1", 3, 7),
    ("a column of fc2", 3, 6),
    ("a row of fc1, another column of fc2", 3, 5),
    ("fc1", 3, 0),
    ("fc2", 3, 0),
    ("the other sides", 3, 7),
    ("all weights", 0, 0),
    ("the layer", 0, 0),
])
def test_each_reason_alone(reason, heads, width):
    model = without(reason)
    inputs = random_inputs(model.config)
    small = compact(model)
    assert small.config.heads == [3, heads]
    assert small.config.ffn == [7, width]
    assert_same(logits(small, inputs), logits(model, inputs))
    if heads == 3 and width == 7:
        assert_bit_equal(small, model)


def gelu(x):
    return x * (1 + math.erf(x / math.sqrt(2))) / 2


def gelu_tanh(x):
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)
    return x / 2 * (1 + math.tanh(inner))


def relu(x):
    return max(x, 0.0)


def silu(x):
    return x / (1 + math.exp(-x))


BY_HAND = {
    "gelu": gelu,
    "relu": relu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "silu": silu,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_constants_are_folded_in_fp64_and_rounded_once(name):
    """Into the bias of `out` goes O bᵥ, into that of fc2 W₂ act(b₁). Python's numbers are fp64."""
    model = tiny(hidden_act=name)
    a = model.bert.layers[1].attention
    f = model.bert.layers[1].ffn
    a.value.weight.data[SECOND] = 0
    f.fc1.weight.data[[2, 5]] = 0
    small = compact(model).bert.layers[1]

    O = a.out.weight.tolist()
    bO = a.out.bias.tolist()
    bV = a.value.bias.tolist()
    expected = []
    for e in range(12):
        terms = [O[e][j] * bV[j] for j in (4, 5, 6, 7)]
        expected.append(math.fsum([bO[e]] + terms))
    assert torch.equal(small.attention.out.bias, torch.tensor(expected))

    act = BY_HAND[name]
    W2 = f.fc2.weight.tolist()
    b2 = f.fc2.bias.tolist()
    b1 = f.fc1.bias.tolist()
    expected = []
    for e in range(12):
        terms = [W2[e][j] * act(b1[j]) for j in (2, 5)]
        expected.append(math.fsum([b2[e]] + terms))
    # act itself is computed in the model's own precision.
    torch.testing.assert_close(small.ffn.fc2.bias, torch.tensor(expected), rtol=0, atol=1e-7)


@pytest.mark.parametrize("value, heads, width", [
    (-0.0, 2, 6),
    (1e-45, 3, 7),      # the smallest number of fp32
    (math.inf, 3, 7),
    (math.nan, 3, 7),
])
@pytest.mark.parametrize("side", ["V and fc1", "O and fc2"])
def test_empty_means_equal_to_zero(side, value, heads, width):
    model = tiny()
    a = model.bert.layers[1].attention
    f = model.bert.layers[1].ffn
    if side == "V and fc1":
        of_heads = a.value.weight.data
        of_dimensions = f.fc1.weight.data
    else:
        of_heads = a.out.weight.data.T
        of_dimensions = f.fc2.weight.data.T
    # A head and a dimension are empty, but for one value.
    of_heads[SECOND] = 0
    of_heads[5, 3] = value
    of_dimensions[2] = 0
    of_dimensions[2, 3] = value
    small = compact(model)
    assert small.config.heads == [3, heads]
    assert small.config.ffn == [7, width]


@pytest.mark.parametrize("reason, authors, exact", [
    ("nothing", 3, 3),
    ("half of V", 3, 3),
    ("V", 2, 2),
    ("Q", 2, 3),
    ("K", 2, 3),
    ("O", 3, 2),
    ("V of all heads", 1, 0),       # they keep at least one
])
def test_heads_by_the_authors_rule(reason, authors, exact):
    model = without(reason)
    assert heads_authors_rule(model) == [3, authors]
    assert compact(model).config.heads == [3, exact]


def test_no_head_by_the_authors_rule_where_there_was_none():
    assert heads_authors_rule(BertForQuestionAnswering(UNEVEN)) == [1, 0]


@pytest.mark.parametrize("reason", ["Q", "K"])
def test_the_authors_rule_changes_the_function(reason):
    """It cuts a head with an empty Q or K. Without that head the logits are others."""
    model = without(reason)
    inputs = random_inputs(model.config)
    expected = logits(model, inputs)
    model.bert.layers[1].attention.out.weight.data[:, SECOND] = 0
    assert (logits(model, inputs) - expected).abs().max() > 0.1


# ---------------------------------------------------------------------- what else compaction keeps


def half_masked():
    """A tiny model with the masks of Hybrid on it: every second score is dead."""
    model = tiny()
    add_masks(model, "hybrid", "4x3")
    set_threshold(model, 0.1)
    for mask in masks(model):
        mask.owner.scores.data.flatten()[::2] = DEAD
    return model


def test_the_masked_model_is_left_as_it_is():
    model = half_masked()
    inputs = random_inputs(model.config)
    expected = logits(model, inputs)
    before = copy.deepcopy(model.state_dict())
    small = compact(model)
    assert torch.equal(logits(model, inputs), expected)
    state = model.state_dict()
    assert state.keys() == before.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, before[name]), name
    assert len(list(masks(model))) == 2 * 6
    assert len(list(masks(small))) == 0


def test_the_compacted_model_has_a_memory_of_its_own():
    model = half_masked()
    inputs = random_inputs(model.config)
    small = compact(model)
    expected = logits(small, inputs)
    for parameter in model.parameters():
        parameter.data.fill_(DEAD)
    # That was seen by the model: all its scores are dead.
    assert needed_heads(model) == [0, 0]
    assert needed_dimensions(model) == [0, 0]
    assert torch.equal(logits(small, inputs), expected)


def test_no_random_number_is_drawn():
    model = half_masked()
    state = torch.get_rng_state()
    compact(model)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_kept(training):
    model = tiny().train(training)
    for module in compact(model).modules():
        assert module.training == training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_precision_is_kept_and_matrices_may_share_memory(dtype):
    model = without("V of one head, O of another").to(dtype)
    a = model.bert.layers[1].attention
    a.value.bias.data.zero_()           # so that no constant is folded, and nothing is rounded
    a.key.weight = a.query.weight
    inputs = random_inputs(model.config)
    small = compact(model)
    assert small.config.heads == [3, 1]
    for parameter in small.parameters():
        assert parameter.dtype == dtype
    assert_same(logits(small.double(), inputs), logits(model.double(), inputs))


def test_gradients_are_those_of_the_model_before():
    """Of all that is left, also below layers with nothing in them."""
    model = tiny().double()
    model.bert.layers[0].attention.value.weight.data.zero_()
    model.bert.layers[1].ffn.fc2.weight.data.zero_()
    small = compact(model)
    assert small.config.heads == [0, 3]
    assert small.config.ffn == [7, 0]
    inputs = random_inputs(model.config)
    backward(model, inputs)
    backward(small, inputs)

    before = hf_tensors(model)
    for name, parameter in hf_tensors(small).items():
        if parameter.numel() == 0:
            continue
        torch.testing.assert_close(parameter.grad, before[name].grad)
        # The bias of a key shifts all scores of a query alike.
        if not name.endswith("key.bias"):
            assert parameter.grad.any(), name


def backward(model, inputs):
    _, _, real = inputs
    start, end = model(*inputs)
    loss = start[real].pow(2).sum() + end[real].pow(2).sum()
    loss.backward()


# ----------------------------------------- export, transformers, and linears that are not BERT's


def test_a_compact_model_is_exported_with_empty_layers_and_any_batch_and_length():
    model = without("the layer").float()
    model.bert.layers[0].attention.out.weight.data[:, SECOND] = 0
    small = compact(model)
    assert small.config.heads == [2, 0]
    assert small.config.ffn == [7, 0]
    # ids, types and real are all (B, T).
    axes = {0: torch.export.Dim("B", max=64), 1: torch.export.Dim("T", max=9)}
    inputs = random_inputs(small.config)
    program = torch.export.export(small, inputs, dynamic_shapes=(axes, axes, axes))
    exported = program.module()
    for rows, length in [(3, 8), (1, 9), (7, 2), (5, 5)]:
        inputs = random_inputs(small.config, rows, length)
        assert_same(logits(exported, inputs), logits(small, inputs), 1e-6)


def test_live_a_baked_model_opens_in_transformers(tmp_path):
    """At full size, with zeros for what is pruned."""
    transformers = pytest.importorskip("transformers")
    model = half_masked()
    inputs = random_inputs(model.config)
    save_model(model, tmp_path)
    theirs = transformers.BertForQuestionAnswering.from_pretrained(tmp_path).eval()
    zeros = sum([int((parameter == 0).sum()) for parameter in theirs.parameters()])
    assert zeros > 300
    ids, types, real = inputs
    with torch.no_grad():
        found = theirs(input_ids=ids, token_type_ids=types, attention_mask=real.long())
    found_logits = torch.stack([found.start_logits[real], found.end_logits[real]])
    assert_same(found_logits, logits(model, inputs), 1e-5)


@pytest.mark.parametrize("fc1_has_bias", [True, False])
@pytest.mark.parametrize("fc2_has_bias", [True, False])
@torch.no_grad()
def test_dimensions_of_any_two_linears(fc1_has_bias, fc2_has_bias):
    """softplus(0) is log 2: without a bias too there is a constant, and fc2 gets a bias for it."""
    act = nn.functional.softplus
    fc1 = nn.Linear(5, 6, bias=fc1_has_bias).double()
    fc2 = nn.Linear(6, 4, bias=fc2_has_bias).double()
    fc1.weight[1] = 0           # dimension 1 is empty in fc1,
    fc2.weight[:, 3] = 0        # dimension 3 in fc2,
    fc1.weight[4] = 0           # and dimension 4 in both
    fc2.weight[:, 4] = 0
    x = torch.randn(7, 5).double()
    expected = fc2(act(fc1(x)))
    assert len(cut_dimensions(fc1, fc2, act)) == 3
    assert_same(fc2(act(fc1(x))), expected)

    # The linears say what they are now.
    assert fc1.out_features == fc2.in_features == 3
    assert fc1.weight.shape == (3, 5)
    assert fc2.weight.shape == (4, 3)
    if fc1_has_bias:
        assert fc1.bias.shape == (3,)
    else:
        assert fc1.bias is None
    assert fc2.bias.shape == (4,)
    # There is nothing left to cut.
    assert len(cut_dimensions(fc1, fc2, act)) == 3


@pytest.mark.parametrize("fc1, fc2, message", [
    (nn.Linear(6, 4), nn.Linear(5, 6), "as many outputs"),
    (nn.Linear(5, 3), nn.Conv1d(3, 4, 1), "plain layer"),
    (nn.Embedding(5, 3), nn.Linear(3, 4), "plain layer"),
])
def test_what_is_no_pair_of_linears_is_refused(fc1, fc2, message):
    with pytest.raises(ValueError, match=message):
        cut_dimensions(fc1, fc2, nn.functional.relu)


def test_what_is_frozen_stays_frozen():
    fc1 = nn.Linear(5, 6)
    fc2 = nn.Linear(6, 4).requires_grad_(False)
    # Dimension 2 adds 0: the bias of fc2 is not touched.
    fc1.weight.data[2] = 0
    fc1.bias.data[2] = 0
    bias = fc2.bias
    assert len(cut_dimensions(fc1, fc2, nn.functional.relu)) == 5
    assert fc2.bias is bias
    assert [parameter.requires_grad for parameter in fc1.parameters()] == [True, True]
    assert [parameter.requires_grad for parameter in fc2.parameters()] == [False, False]
    # Dimension 1 adds a constant: the bias of fc2 is a new one.
    fc1.weight.data[1] = 0
    fc1.bias.data[1] = 3
    assert len(cut_dimensions(fc1, fc2, nn.functional.relu)) == 4
    assert fc2.bias is not bias
    assert not fc2.bias.requires_grad


# ------------------------------------------------------------------------- what is counted, by hand


def of_ones(config):
    """A model without memory: every parameter is a single 1, seen as if it had the full shape."""
    with torch.device("meta"):
        model = BertForQuestionAnswering(config)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            ones = torch.ones(()).expand(parameter.shape)
            setattr(module, name, nn.Parameter(ones))
    return model


# Of UNEVEN, where E is 12, D 4 and F 7.
#
#   first layer     4 matrices of 1 head, 4 · 12 each; 2 of 5 dimensions, 12 each   192 + 120
#                   biases: 4 each of query, key and value; out; fc1; fc2           12 + 12 + 5 + 12
#                   gain and bias of two norms                                      4 · 12
#   second layer    no matrices; biases of out and fc2; the norms                   24 + 48
#   embeddings      19 words, 9 positions, 5 types; gain and bias of a norm         35 · 12
#   QA head         2 · 12 weights, 2 biases                                        26
#   dense layer     4 matrices of 12 · 12, 2 of 12 · 7                              576 + 168
def test_parameters_by_hand():
    linear = 192 + 120
    first_layer = linear + 41 + 48
    second_layer = 24 + 48
    total = 420 + first_layer + second_layer + 26
    assert count_parameters(of_ones(UNEVEN)) == {
        "linear": linear,
        "linear_nonzero": linear,
        "linear_dense": 2 * (576 + 168),
        "encoder": first_layer + second_layer,
        "total": total,
        "bytes": 4 * total,
    }


@pytest.mark.parametrize("config, linear, total", [
    (BertConfig(), 84_934_656, 108_893_186),
    (HEADLINE, 22_248_960, 46_161_559),
])
def test_parameters_of_the_papers_models(config, linear, total):
    embeddings = (30_522 + 512 + 2 + 2) * 768       # words, positions, types, a norm
    qa_head = 2 * 768 + 2
    assert count_parameters(of_ones(config)) == {
        "linear": linear,
        "linear_nonzero": linear,
        "linear_dense": 84_934_656,
        "encoder": total - embeddings - qa_head,
        "total": total,
        "bytes": 4 * total,
    }


def test_bytes_are_of_fp32_whatever_the_model_is_in():
    assert count_parameters(tiny().double()) == count_parameters(tiny())


def test_what_is_masked_counts_as_zero_and_scores_do_not_count():
    model = tiny()
    dense = count_parameters(model)
    assert dense["linear_nonzero"] == dense["linear"]
    add_masks(model, "struct", "1x1")
    set_threshold(model, 0.1)
    assert count_parameters(model) == dense

    layer = model.bert.layers[0]
    layer.attention.query.parametrizations.weight[0].scores.data[1] = DEAD
    layer.ffn.fc1.parametrizations.weight[0].owner.scores.data[:3] = DEAD
    # A head is 4 · 12 weights in each of four matrices, a dimension 12 in each of two.
    left = dense["linear"] - 4 * 48 - 3 * 24
    assert count_parameters(model) == {**dense, "linear_nonzero": left}
    assert count_parameters(compact(model))["linear"] == left


# Of UNEVEN with 8 tokens: E is 12, and the first layer has one head of 4 and 5 dimensions.
def test_flops_by_hand():
    multiply_adds = 0
    multiply_adds += 4 * 8 * 12 * 4         # query, key, value and out
    multiply_adds += 2 * 8 * 8 * 4          # Q Kᵀ, and its product with V
    multiply_adds += 2 * 8 * 12 * 5         # fc1 and fc2
    multiply_adds += 8 * 12 * 2             # the QA head
    assert flops(UNEVEN, 8) == 2 * multiply_adds


@pytest.mark.parametrize("config", [
    UNEVEN,
    BertConfig(**TINY),
    BertConfig(**TINY, heads=[2, 3], ffn=[0, 6]),
])
def test_flops_as_torch_counts_them(config):
    model = BertForQuestionAnswering(config)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(1, 8, dtype=torch.long))
    assert flops(config, 8) == counter.get_total_flops()


def test_flops_of_the_papers_headline_model():
    ratio = flops(BertConfig(), 384) / flops(HEADLINE, 384)
    assert round(ratio, 2) == 3.62


# ----------------------------------------------------------------------------------- the benchmark


class Clock:
    """In place of time.perf_counter(), in seconds."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class TimedModel(nn.Module):
    """Its passes take the given milliseconds, one after the other. Each is noted in `passes`."""

    def __init__(self, clock, passes, milliseconds):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=7)
        self.clock = clock
        self.passes = passes
        self.milliseconds = milliseconds

    def forward(self, ids):
        self.clock.now += self.milliseconds.pop(0) / 1000
        assert not self.training
        assert not torch.is_grad_enabled()
        self.passes.append((self, ids, torch.is_autocast_enabled("cpu")))


@pytest.mark.parametrize("precision, autocast", [("fp32", False), ("bf16", True)])
def test_benchmark_on_a_clock_of_ours(monkeypatch, precision, autocast):
    """The models take turns of two passes, of which the second counts. The first turn warms up."""
    clock = Clock()
    monkeypatch.setattr("time.perf_counter", clock)
    passes = []
    model = TimedModel(clock, passes, [900, 80, 99, 5, 99, 7, 99, 6])
    other = TimedModel(clock, passes, [700, 60, 88, 2, 88, 1, 88, 4])
    times, other_times = benchmark([model, other], batch=2, length=50, repeats=3,
                                   precision=precision)
    assert times == pytest.approx([5, 7, 6])
    assert other_times == pytest.approx([2, 1, 4])

    turns = [who for who, _, _ in passes]
    assert turns == [model, model, other, other] * 4
    first_ids = passes[0][1]
    assert first_ids.shape == (2, 50)
    assert set(first_ids.flatten().tolist()) == {0, 1, 2, 3, 4, 5, 6}
    for _, ids, autocast_is_on in passes:
        assert torch.equal(ids, first_ids)
        assert autocast_is_on == autocast


# --------------------------------------------------------------------------- the check on real text


def batch_of(start, end, real=None):
    """A batch of one row, for models that take these logits as their ids and types."""
    start = torch.tensor([start]).double()
    end = torch.tensor([end]).double()
    if real is None:
        real = torch.ones(start.shape, dtype=torch.bool)
    else:
        real = torch.tensor([real], dtype=torch.bool)
    return {"ids": start, "types": end, "real": real, "context": real}


def check_shifted(batches, start_shift, end_shift=0.0):
    """The largest difference that check() finds. Spans are single tokens.

    The first model gives back the logits of the batch, the second one adds the shifts to them.
    """
    start_shift = torch.tensor(start_shift)
    end_shift = torch.tensor(end_shift)

    def as_they_are(start, end, real):
        return start, end

    def shifted(start, end, real):
        return start + start_shift, end + end_shift

    def spans(start, end, context):
        return best_spans(start, end, context, longest=1)

    worst, _ = check(as_they_are, shifted, iter(batches), spans)
    return worst


def test_check_accepts_a_compacted_model_and_refuses_one_with_another_bias():
    model = without("V of one head, O of another")
    small = compact(model)
    inputs = random_inputs(model.config)
    ids, types, real = inputs
    batches = [{"ids": ids, "types": types, "real": real, "context": real}]
    allowed = float(1e-5 * max(1, logits(model, inputs).abs().max()))

    def spans(start, end, context):
        return best_spans(start, end, context, longest=3)

    worst, _ = check(model, small, batches, spans)
    assert 0 <= worst < 1e-12
    # A little less than what is allowed, and a little more.
    small.qa_outputs.bias.data[1] += 0.9 * allowed
    assert check(model, small, batches, spans) == pytest.approx((0.9 * allowed, allowed))
    small.qa_outputs.bias.data[1] += 0.2 * allowed
    with pytest.raises(ValueError, match=f"{1.1 * allowed:.2e} where {allowed:.2e} is allowed"):
        check(model, small, batches, spans)


# The largest logit is −40, in the second of three batches: 1e-5 · 40 are allowed in all of them.
THREE_BATCHES = [
    batch_of([0, 1], [3, 0]),
    batch_of([0, 1], [-40, 0]),
    batch_of([0.5, 1], [3, 0]),
]


def test_check_finds_the_largest_difference():
    assert check_shifted(THREE_BATCHES, [3e-4, -3.9e-4]) == pytest.approx(3.9e-4)


@pytest.mark.parametrize("start_shift, end_shift", [
    ([3e-4, 4.1e-4], [0, 0]),
    ([-4.1e-4, 0], [0, 0]),
    ([0, 0], [0, 4.1e-4]),
])
def test_check_refuses_a_larger_difference(start_shift, end_shift):
    with pytest.raises(ValueError, match="4.10e-04 where 4.00e-04 is allowed"):
        check_shifted(THREE_BATCHES, start_shift, end_shift)


def test_what_is_allowed_follows_the_largest_logit_down_to_1():
    # Without the −40 it is 3.
    batches = [THREE_BATCHES[0], THREE_BATCHES[2]]
    with pytest.raises(ValueError, match="3.90e-04 where 3.00e-05 is allowed"):
        check_shifted(batches, [0, 3.9e-4])
    # The largest is 0.1, which counts as 1.
    with pytest.raises(ValueError, match="2.00e-05 where 1.00e-05 is allowed"):
        check_shifted([batch_of([0, 0.1], [0, 0])], [0, 2e-5])


def test_check_ignores_padding():
    batches = [batch_of([0, 1, 9e9], [3, 0, 9e9], real=[1, 1, 0])]
    assert check_shifted(batches, [0, 0, 5]) == 0
    assert check_shifted(batches, [0, 0, math.nan]) == 0
    with pytest.raises(ValueError, match="where 3.00e-05 is allowed"):
        check_shifted(batches, [0, 1e-3, 0])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_check_refuses_what_is_not_a_number(bad):
    good = batch_of([0, 1], [3, 0])
    hole = batch_of([0, bad], [3, 0])
    # In the second model alone.
    with pytest.raises(ValueError, match="differs"):
        check_shifted([good], [0, bad])
    # In both models, in the only batch and in one of three.
    with pytest.raises(ValueError, match="differs"):
        check_shifted([hole], [0, 0])
    with pytest.raises(ValueError, match="differs"):
        check_shifted([good, hole, good], [0, 0])
    # In both, with the shift: ∞ − ∞ is a NaN.
    with pytest.raises(ValueError, match="differs"):
        check_shifted([hole], [0, -bad])


# The logits are (gap, 0) for the start and (0, 0) for the end: the first span is better by the gap.
# Each logit moves by 9e-6, of 1e-5 allowed, so that the second span gains 4 · 9e-6 = 3.6e-5 on it.
# It may become the better one where the gap is at most twice what is allowed, 2e-5.
def test_check_allows_another_span_only_where_the_two_are_near():
    shift = [-9e-6, 9e-6]
    # Another span, and near enough.
    assert check_shifted([batch_of([1.9e-5, 0], [0, 0])], shift, shift) == pytest.approx(9e-6)
    # Another span, and too far.
    with pytest.raises(ValueError, match="1 other span"):
        check_shifted([batch_of([2.1e-5, 0], [0, 0])], shift, shift)
    # So far that the best span stays.
    assert check_shifted([batch_of([3.7e-5, 0], [0, 0])], shift, shift) == pytest.approx(9e-6)


# ------------------------------------------------------------------------ pictures and results.json


def test_draw():
    config = BertConfig(num_hidden_layers=3, hidden_size=12, num_attention_heads=3,
                        intermediate_size=48, heads=[3, 1, 0], ffn=[48, 14, 0])
    assert draw(config).splitlines() == [
        "layer  0  heads ■■■  3/3   ffn ████████████████████████   48/48",
        "layer  1  heads ■··  1/3   ffn ███████·················   14/48",
        "layer  2  heads ···  0/3   ffn ························    0/48",
    ]


# Blocks of 4 × 6 on the 12 × 12 of Q, K and V: 3 rows of 2 blocks. On O they are 6 × 4: 2 rows of
# 3. The 7 dimensions are rows of fc1 and columns of fc2.
def test_mask_rows():
    model = tiny()
    add_masks(model, "hybrid", "4x6")
    set_threshold(model, 0.1)
    a = model.bert.layers[1].attention
    f = model.bert.layers[1].ffn
    a.query.parametrizations.weight[0].owner.scores.data[1] = DEAD
    a.value.parametrizations.weight[0].owner.scores.data[0, 1] = DEAD
    a.out.parametrizations.weight[0].owner.scores.data[1, :2] = DEAD
    f.fc2.parametrizations.weight[0].owner.scores.data[[0, 3]] = DEAD
    assert mask_rows(model) == {
        "0": {
            "query": ["11", "11", "11"],
            "key": ["11", "11", "11"],
            "value": ["11", "11", "11"],
            "out": ["111", "111"],
            "fc1": ["1", "1", "1", "1", "1", "1", "1"],
            "fc2": ["1111111"],
        },
        "1": {
            "query": ["11", "00", "11"],
            "key": ["11", "11", "11"],
            "value": ["10", "11", "11"],
            "out": ["111", "001"],
            "fc1": ["0", "1", "1", "0", "1", "1", "1"],
            "fc2": ["0110111"],
        },
    }


# A layer has 4 · 144 + 2 · 84 = 744 weights. In one a head of O is zero, in the other a head of Q:
# 48 weights each. By the authors' rule a head goes where Q is empty, by ours where O is.
def test_sizes_of_results_json():
    model = without("Q")
    model.bert.layers[0].attention.out.weight.data[:, SECOND] = 0
    assert counted(model) == {
        "parameters": count_parameters(model),
        "density": pytest.approx((2 * 744 - 2 * 48) / (2 * 744)),
        "heads": [2, 3],
        "ffn": [7, 7],
    }
    assert heads_authors_rule(model) == [3, 2]


def squad_of(questions, sha256):
    """A SQuAD of so many questions, about which nothing else is asked here."""
    return Squad(passages=[], questions=[None] * questions, sha256=sha256)


@pytest.mark.parametrize("training, sha256, questions", [
    (squad_of(5, "5eed"), "5eed", 5),
    (None, None, None),
])
def test_results_have_every_key(tmp_path, training, sha256, questions):
    config = Config(data="some/where", device="cpu", precision="fp32", seed=3)
    save_model(tiny(), tmp_path)
    files = {}
    for name in ("config.json", "model.safetensors"):
        files[name] = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    write_results(tmp_path, config, training, squad_of(2, "de5"), f1=87.7, seconds=1.5)
    assert json.loads((tmp_path / "results.json").read_text()) == {
        "data": {
            "name": "where",
            "sha256": {"train": sha256, "dev": "de5"},
            "train_questions": questions,
            "dev_questions": 2,
        },
        "seed": 3,
        "precision": "fp32",
        "weights_sha256": files["model.safetensors"],
        "files_sha256": files,
        "f1": 87.7,
        "seconds": 1.5,
    }
