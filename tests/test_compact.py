"""compact.py: compaction keeps the function, and the numbers beside it are true.

    E hidden size   H heads   D head size   F width of a feed-forward layer   T tokens
    Q, K, V, O the weights of query, key, value and out; W1, W2 those of fc1 and fc2
"""
import copy
import dataclasses
import math
import os
import random
from types import SimpleNamespace

import pytest
import torch
from numpy import s_
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import compact as compact_py
from bert import (ACTIVATIONS, BertConfig, BertForQuestionAnswering, hf_tensors, load_model,
                  save_model)
from blockprune import bake, masks, set_threshold
from compact import (benchmark, check, compact, count_parameters, draw, flops, mask_rows, size_of,
                     write_masks)
from tiny import read, tiny_config
from train_squad import Config, Squad, add_masks, write_results

# Some random masks prune nothing, which bake() warns about.
pytestmark = pytest.mark.filterwarnings("ignore:nothing is pruned")

CASES = int(os.environ.get("FUZZ", 40))     # random models
DEAD = -9.0                                 # a score that is pruned at τ = 0.1

# All different: 2 layers, H 3, D 4, F 7, E 12, 19 words, T at most 9, 5 types.
TINY = tiny_config(19, hidden_size=12, intermediate_size=7, max_position_embeddings=9,
                   type_vocab_size=5)
# One head and five dimensions in the first layer, nothing in the second.
UNEVEN = dataclasses.replace(TINY, heads=[1, 0], ffn=[5, 0])
# The paper's headline model, on BERT-base.
HEADLINE = BertConfig(heads=[4, 4, 6, 7, 7, 5, 6, 7, 5, 5, 5, 3],
                      ffn=[552, 717, 795, 789, 833, 792, 620, 466, 283, 112, 96, 238])


def scrambled(config) -> BertForQuestionAnswering:
    """In eval mode; every parameter random, gains and biases too, and large enough to be seen."""
    model = BertForQuestionAnswering(config).eval()
    for name, parameter in model.named_parameters():
        mean = 1.0 if name.endswith("norm.weight") else 0.0
        nn.init.normal_(parameter, mean=mean, std=0.5)
    return model


def tiny() -> BertForQuestionAnswering:
    torch.manual_seed(0)
    return scrambled(TINY)


def random_inputs(config, rows=3, T=8):
    """ids, types, and which tokens are real: from 1 to T of each row, then comes padding."""
    ids = torch.randint(config.vocab_size, (rows, T))
    types = torch.randint(config.type_vocab_size, (rows, T))
    lengths = torch.randint(1, T + 1, (rows, 1))
    real = torch.arange(T) < lengths
    return ids, types, real


@torch.no_grad()
def logits(model, inputs):
    """The function that is kept: start and end logits at the real tokens, (2, number of them)."""
    _, _, real = inputs
    start, end = model(*inputs)
    return torch.stack([start[real], end[real]])


def assert_same(found, expected, tolerance=1e-12):
    """The tolerance is relative where the numbers are larger than 1."""
    allowed = tolerance * max(1, expected.abs().max())
    assert (found - expected).abs().max() <= allowed


def assert_bit_equal(tensors, others):
    """Of two dictionaries: the same names, shapes, types and values."""
    torch.testing.assert_close(tensors, others, rtol=0, atol=0)


# ----------------------------------------------------------------------------------- random models


def random_case(seed):
    """A model of random shape with the masks of a random method, and inputs for it.

    Bands of its rows and columns are empty: some are pruned together with their biases, others are
    zero beside biases that stay. So some heads, dimensions and whole layers are empty, and some of
    them are so in one of their matrices alone.
    """
    rng = random.Random(seed)
    torch.manual_seed(seed)
    model = random_model(rng, layers=1 + seed % 3)
    # The linears that may be pruned.
    linears = [module for module in model.bert.layers.modules() if isinstance(module, nn.Linear)]
    for linear in linears:
        if rng.random() < 0.3:
            fill_random_band(rng, linear.weight.data, rng.randint(0, 1), 0.0)

    method = rng.choice(["dense", "hybrid", "block", "struct", "unstructured"])
    if method != "dense":
        # The block must fit all matrices that are there.
        sizes = [size for linear in linears for size in linear.weight.shape if size > 0]
        r, c = rng.randint(1, min(sizes)), rng.randint(1, min(sizes))
        add_masks(model, method, f"{r}x{c}")
        set_threshold(model, 0.1)
    for mask in masks(model):
        nn.init.normal_(mask.owner.scores, std=2)
        if rng.random() < 0.5:
            scores = mask.owner.scores.data.view(mask.grid)
            fill_random_band(rng, scores, 0, DEAD)
            fill_random_band(rng, scores, 1, DEAD)
    return model, random_inputs(model.config, rows=rng.randint(1, 4), T=rng.randint(1, 9))


def random_model(rng, layers):
    """Half of the layers have all their heads, and half have all their dimensions."""
    E = rng.randint(6, 20)
    F = rng.randint(1, 11)
    H = rng.choice([n for n in range(1, E + 1) if E % n == 0])
    heads = [rng.choice([H, rng.randint(0, H)]) for _ in range(layers)]
    widths = [rng.choice([F, rng.randint(0, F)]) for _ in range(layers)]
    return scrambled(BertConfig(
        vocab_size=23, hidden_size=E, num_hidden_layers=layers, num_attention_heads=H,
        intermediate_size=F, hidden_act=rng.choice(list(ACTIVATIONS)), max_position_embeddings=9,
        type_vocab_size=3, heads=heads, ffn=widths))


def fill_random_band(rng, matrix, dim, value):
    """Put the value into some rows that lie side by side (dim 0), or some columns (dim 1)."""
    size = matrix.shape[dim]
    first, last = sorted([rng.randint(0, size), rng.randint(0, size)])
    matrix.narrow(dim, first, last - first).fill_(value)


SEEDS = pytest.mark.parametrize("seed", range(CASES))


@SEEDS
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)],
                         ids=["fp32", "fp64"])
def test_masked_baked_and_compacted_are_one_function(seed, dtype, tolerance):
    model, inputs = random_case(seed)
    model = model.to(dtype)
    expected = logits(model, inputs)
    baked = bake(copy.deepcopy(model))
    assert_same(logits(baked, inputs), expected, tolerance)
    small = compact(model)
    assert_same(logits(small, inputs), expected, tolerance)
    assert {parameter.dtype for parameter in small.parameters()} == {dtype}
    # There is nothing left to cut.
    assert_bit_equal(hf_tensors(compact(small)), hf_tensors(small))


@SEEDS
def test_a_compacted_model_is_saved_and_loaded(seed, tmp_path):
    model, inputs = random_case(seed)
    small = compact(model)
    save_model(small, tmp_path)
    loaded = load_model(tmp_path).eval()
    assert_bit_equal(hf_tensors(loaded), hf_tensors(small))
    assert_same(logits(loaded, inputs), logits(model, inputs), 1e-5)


@SEEDS
def test_what_is_needed_is_left(seed):
    """A head or dimension is needed if it has weights on both its sides."""
    model, _ = random_case(seed)
    D = model.config.head_size
    heads, widths = [], []
    for layer in model.bert.layers:
        V, O = layer.attention.value.weight, layer.attention.out.weight
        firsts = range(0, len(V), D)
        heads.append(sum(bool(V[i:i + D].any() and O[:, i:i + D].any()) for i in firsts))
        W1, W2 = layer.ffn.fc1.weight, layer.ffn.fc2.weight
        widths.append(sum(bool(W1[j].any() and W2[:, j].any()) for j in range(len(W1))))
    # The rest of the configuration is kept.
    assert compact(model).config == dataclasses.replace(model.config, heads=heads, ffn=widths)


# ----------------------------------------------------------------------- each reason to cut, alone

SECOND = s_[4:8]        # the second head's rows of Q, K and V

REASONS = {     # what is zero in the second layer; what is left there of 3 heads and 7 dimensions
    "nothing": ({}, 3, 7),
    "all biases": (dict(bQ=s_[:], bK=s_[:], bV=s_[:], bO=s_[:], b1=s_[:], b2=s_[:]), 3, 7),
    # Of one head. With an empty Q or K attention is uniform, but the head still adds a mean of V.
    "V": (dict(V=SECOND), 2, 7),
    "V and its bias": (dict(V=SECOND, bV=SECOND), 2, 7),
    "O": (dict(O=s_[:, 4:8]), 2, 7),
    "Q": (dict(Q=SECOND), 3, 7),
    "K": (dict(K=SECOND), 3, 7),
    "half of Q and K": (dict(Q=s_[4:6], K=s_[6:8]), 3, 7),
    "half of V": (dict(V=s_[4:6], bV=s_[4:6]), 3, 7),
    "half of V, other half of O": (dict(V=s_[4:6], O=s_[:, 6:8]), 3, 7),
    # Of several heads.
    "halves of two heads of V": (dict(V=s_[2:6]), 3, 7),
    "V of a head, O of another": (dict(V=s_[0:4], O=s_[:, 8:12]), 1, 7),
    "Q, K and their biases": (dict(Q=s_[:], K=s_[:], bQ=s_[:], bK=s_[:]), 3, 7),
    "all of V": (dict(V=s_[:]), 0, 7),
    "all of O": (dict(O=s_[:]), 0, 7),
    # Of the feed-forward layer.
    "row of fc1": (dict(W1=s_[2]), 3, 6),
    "row of fc1 and its bias": (dict(W1=s_[2], b1=s_[2]), 3, 6),
    "half a row of fc1": (dict(W1=s_[2, :6]), 3, 7),
    "column of fc2": (dict(W2=s_[:, 2]), 3, 6),
    "row of fc1, another column of fc2": (dict(W1=s_[0], W2=s_[:, 5]), 3, 5),
    "fc1": (dict(W1=s_[:]), 3, 0),
    "fc2": (dict(W2=s_[:]), 3, 0),
    # Of both.
    "the other sides": (dict(O=s_[5], W1=s_[:, 2], W2=s_[2]), 3, 7),
    "all weights": (dict(Q=s_[:], K=s_[:], V=s_[:], O=s_[:], W1=s_[:], W2=s_[:]), 0, 0),
}


def without(reason):
    """A tiny model in fp64, in whose second layer the weights that the reason names are zero."""
    model = tiny().double()
    a, f = model.bert.layers[1].attention, model.bert.layers[1].ffn
    linears = {"Q": a.query, "K": a.key, "V": a.value, "O": a.out, "1": f.fc1, "2": f.fc2}
    zero, _, _ = REASONS[reason]
    for name, index in zero.items():
        linear = linears[name[-1]]
        tensor = linear.bias if name.startswith("b") else linear.weight
        tensor.data[index] = 0
    return model


@pytest.mark.parametrize("reason", REASONS)
def test_each_reason_alone(reason):
    _, heads, width = REASONS[reason]
    model = without(reason)
    inputs = random_inputs(model.config)
    small = compact(model)
    assert small.config.heads == [3, heads]
    assert small.config.ffn == [7, width]
    assert_same(logits(small, inputs), logits(model, inputs))
    if heads == 3 and width == 7:
        assert_bit_equal(hf_tensors(small), hf_tensors(model))


def test_constants_are_folded_in_fp64_and_rounded_once():
    """Into the bias of out goes O bᵥ, into that of fc2 W2 act(b₁). Python's numbers are fp64."""
    model = tiny()
    a = model.bert.layers[1].attention
    f = model.bert.layers[1].ffn
    a.value.weight.data[SECOND] = 0
    f.fc1.weight.data[[2, 5]] = 0
    small = compact(model).bert.layers[1]

    def folded(linear, constants, places):
        W = linear.weight.tolist()
        sums = linear.bias.tolist()
        for e in range(len(sums)):
            sums[e] = math.fsum([sums[e]] + [W[e][j] * constants[j] for j in places])
        return torch.tensor(sums)

    assert torch.equal(small.attention.out.bias, folded(a.out, a.value.bias.tolist(), [4, 5, 6, 7]))
    assert torch.equal(small.ffn.fc2.bias, folded(f.fc2, f.act(f.fc1.bias).tolist(), [2, 5]))


@pytest.mark.parametrize("value", [-0.0, 1e-45, math.inf, math.nan])     # 1e-45: fp32's smallest
@pytest.mark.parametrize("side", ["V and fc1", "O and fc2"])
def test_empty_means_equal_to_zero(side, value):
    model = tiny()
    a = model.bert.layers[1].attention
    f = model.bert.layers[1].ffn
    if side == "V and fc1":
        of_heads, of_dimensions = a.value.weight.data, f.fc1.weight.data
    else:
        of_heads, of_dimensions = a.out.weight.data.T, f.fc2.weight.data.T
    # A head and a dimension are empty, but for one value.
    of_heads[SECOND] = 0
    of_heads[5, 3] = value
    of_dimensions[2] = 0
    of_dimensions[2, 3] = value
    left = [2, 6] if value == 0 else [3, 7]
    assert [size_of(model)["heads"][1], size_of(model)["ffn"][1]] == left


# ---------------------------------------------------------------------- what else compaction keeps


@pytest.mark.parametrize("training", [True, False])
def test_the_masked_model_is_left_as_it_is(training):
    model = tiny().train(training)
    add_masks(model, "hybrid", "4x3")
    set_threshold(model, 0.1)
    for mask in masks(model):
        mask.owner.scores.data.flatten()[::2] = DEAD
    before = copy.deepcopy(model.state_dict())
    small = compact(model)
    assert len(list(masks(small))) == 0
    assert {module.training for module in small.modules()} == {training}
    # Nor do the two share memory.
    for parameter in small.parameters():
        parameter.data.fill_(DEAD)
    assert_bit_equal(model.state_dict(), before)
    assert len(list(masks(model))) == 2 * 6


# ---------------------------------------------------------------------------------- what is counted


def of_ones(config):
    """A model without memory: every parameter is a single 1, seen as if it had the full shape."""
    with torch.device("meta"):
        model = BertForQuestionAnswering(config)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            ones = torch.ones(()).expand(parameter.shape)
            setattr(module, name, nn.Parameter(ones))
    return model


BASE_REST = (30_522 + 512 + 2 + 2) * 768 + 2 * 768 + 2      # embeddings with a norm; QA head


@pytest.mark.parametrize("config, linear, total", [
    (BertConfig(), 84_934_656, 108_893_186),
    (HEADLINE, 22_248_960, 46_161_559),
], ids=["BERT-base", "headline"])
def test_parameters_are_those_of_the_paper(config, linear, total):
    assert count_parameters(of_ones(config)) == {
        "linear": linear,
        "linear_nonzero": linear,
        "linear_dense": 84_934_656,
        "encoder": total - BASE_REST,
        "total": total,
        "bytes": 4 * total,
    }


def test_masked_weights_count_as_zero_and_scores_not_at_all():
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
    # Bytes are those of fp32 in whatever precision the model is.
    assert count_parameters(model.double()) == {**dense, "linear_nonzero": left}


def test_density_counts_all_zeros_and_heads_only_empty_ones():
    """A head of O is 0 in one layer, a head of Q in the other: 4 · 12 of 744 weights each."""
    model = without("Q")
    model.bert.layers[0].attention.out.weight.data[:, SECOND] = 0
    assert size_of(model) == dict(parameters=count_parameters(model), density=(744 - 48) / 744,
                                  heads=[2, 3], ffn=[7, 7])
    # Density is relative to the dense model. Of the head of O, the rest is gone too.
    assert size_of(compact(model))["density"] == (2 * 744 - 5 * 48) / (2 * 744)


NO_FFN = dataclasses.replace(TINY, heads=[2, 3], ffn=[0, 6])


@pytest.mark.parametrize("config", [TINY, UNEVEN, NO_FFN], ids=["dense", "uneven", "no ffn"])
def test_flops_are_those_that_torch_counts(config):
    model = BertForQuestionAnswering(config)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(1, 8, dtype=torch.long))
    assert flops(config, 8) == counter.get_total_flops()


def test_flops_of_the_papers_headline_model():
    assert round(flops(BertConfig(), 384) / flops(HEADLINE, 384), 2) == 3.62


# ----------------------------------------------------------------------------------- the benchmark


def test_models_take_turns_of_two_passes(monkeypatch):
    """The second pass of a turn counts, and the first turn warms up."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("time.perf_counter", lambda: clock.now)
    passes = []     # the model and the ids

    class TimedModel(nn.Module):
        config = SimpleNamespace(vocab_size=7)

        def __init__(self, milliseconds):
            super().__init__()
            self.milliseconds = milliseconds

        def forward(self, ids):
            assert not self.training
            assert not torch.is_grad_enabled()
            clock.now += self.milliseconds.pop(0) / 1000
            passes.append((self, ids))

    model = TimedModel([900, 80, 99, 5, 99, 7, 99, 6])
    other = TimedModel([700, 60, 88, 2, 88, 1, 88, 4])
    times, other_times = benchmark([model, other], 2, 50, repeats=3)
    assert times == pytest.approx([5, 7, 6])
    assert other_times == pytest.approx([2, 1, 4])
    assert [who for who, _ in passes] == [model, model, other, other] * 4
    _, first_ids = passes[0]
    assert first_ids.shape == (2, 50)
    assert set(first_ids.flatten().tolist()) == {0, 1, 2, 3, 4, 5, 6}
    for _, ids in passes:
        assert torch.equal(ids, first_ids)


# --------------------------------------------------------------------------------------- the check

CPU = Config(device="cpu")


@dataclasses.dataclass
class Windows:
    """In place of Features: N windows, of which each tensor has a row."""
    ids: torch.Tensor
    types: torch.Tensor
    real: torch.Tensor
    asked: list = dataclasses.field(default_factory=list)

    def __len__(self):
        return len(self.ids)

    def batch(self, indices, device):
        self.asked += indices.tolist()
        return {"ids": self.ids[indices], "types": self.types[indices], "real": self.real[indices]}


class Given(torch.nn.Module):
    """A model whose start and end logits, (B, 2, T), are its first input, or its second."""

    def __init__(self, which):
        super().__init__()
        self.which = which

    def forward(self, *inputs):
        return inputs[self.which].unbind(1)


def check_logits(first, second, real=None):
    """check() of two models that give these logits: start and end of N windows, (N, 2, T) each."""
    if real is None:
        real = torch.ones(len(first), first.shape[2], dtype=torch.bool)
    return check(Given(0), Given(1), Windows(first, second, real), CPU)


def hundred_windows():
    """Four batches; the largest logit is 3."""
    return torch.tensor([[[0, 1], [3, 0]]] * 100).double()


def test_a_compacted_model_passes_and_another_bias_does_not():
    model = without("V of a head, O of another")
    small = compact(model)
    inputs = random_inputs(model.config)
    windows = Windows(*inputs)
    allowed = float(1e-5 * max(1, logits(model, inputs).abs().max()))
    number, worst, _ = check(model, small, windows, CPU)
    assert number == 3
    assert worst < 1e-12
    # A little less than what is allowed, and a little more.
    small.qa_outputs.bias.data[1] += 0.9 * allowed
    found = check(model, small, windows, CPU)
    assert found == pytest.approx((3, 0.9 * allowed, allowed))
    small.qa_outputs.bias.data[1] += 0.2 * allowed
    with pytest.raises(ValueError, match=f"is {1.1 * allowed:.2e}, where {allowed:.2e}"):
        check(model, small, windows, CPU)


def test_256_random_windows_are_compared():
    zeros = torch.zeros(500, 2, 2)
    asked = []
    for seed in (1, 1, 2):
        windows = Windows(zeros, zeros, zeros[:, 0] == 0)
        config = Config(device="cpu", seed=seed)
        assert check(Given(0), Given(1), windows, config) == (256, 0, 1e-5)
        assert len(windows.asked) == len(set(windows.asked)) == 256
        asked.append(set(windows.asked))
    assert asked[0] == asked[1] != asked[2]
    assert asked[0] != set(range(256))


@pytest.mark.parametrize("place", range(0, 100, 9))
@pytest.mark.parametrize("side, token", [(0, 1), (1, 0)], ids=["start", "end"])
def test_the_largest_difference_and_logit_are_of_all(place, side, token):
    first = hundred_windows()
    second = first.clone()
    second[place, side, token] += 3.9e-4
    with pytest.raises(ValueError, match="is 3.90e-04, where 3.00e-05 is allowed"):
        check_logits(first, second)
    # The largest logit is −40 now: 1e-5 · 40 is allowed in all windows.
    for tensor in (first, second):
        tensor[50, 1, 0] -= 43
    assert check_logits(first, second) == pytest.approx((100, 3.9e-4, 4e-4))
    second[place, side, token] -= 8e-4
    with pytest.raises(ValueError, match="is 4.10e-04, where 4.00e-04"):
        check_logits(first, second)


def test_a_largest_logit_under_1_counts_as_1():
    first = hundred_windows() / 30
    assert check_logits(first, first + 9e-6) == pytest.approx((100, 9e-6, 1e-5))
    with pytest.raises(ValueError, match="is 1.10e-05, where 1.00e-05"):
        check_logits(first, first + 1.1e-5)


@pytest.mark.parametrize("padding", [9e9, math.nan])
def test_padding_is_not_compared(padding):
    first = hundred_windows()
    second = first.clone()
    second[:, :, 1] = padding
    real = torch.tensor([[True, False]] * 100)
    assert check_logits(first, second, real)[1] == check_logits(second, first, real)[1] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_never_agree(bad):
    good = hundred_windows()
    hole = good.clone()
    hole[50, 0, 1] = bad
    for first, second in [(good, hole), (hole, good), (hole, hole)]:
        with pytest.raises(ValueError, match="differs"):
            check_logits(first, second)


def test_rounding_in_fp32_is_no_difference():
    """The last norm's outputs add up to 0: 10,000 more on each weight after it is only rounding."""
    model = without("V of a head, O of another").float()
    norm = model.bert.layers[-1].ffn_norm
    norm.weight.data.fill_(1)
    norm.bias.data.zero_()
    model.qa_outputs.weight.data += 1e4
    small = compact(model)
    inputs = random_inputs(model.config)
    _, worst, allowed = check(model, small, Windows(*inputs), CPU)
    assert worst < allowed / 10
    assert (logits(model, inputs) - logits(small, inputs)).abs().max() > 10 * allowed


# ---------------------------------------------------------------------- masks, pictures, the table


def test_heads_and_widths_are_drawn():
    config = BertConfig(num_hidden_layers=3, hidden_size=12, num_attention_heads=3,
                        intermediate_size=48, heads=[3, 1, 0], ffn=[48, 15, 0])
    assert draw(config).splitlines() == [
        "layer  0  heads ■■■  3/3   ffn ████████████████████████   48/48",
        "layer  1  heads ■··  1/3   ffn ████████················   15/48",
        "layer  2  heads ···  0/3   ffn ························    0/48",
    ]


# Blocks of 4 × 6 on the 12 × 12 of Q, K and V: 3 rows of 2 blocks. On O they are 6 × 4: 2 rows of
# 3. The 7 dimensions are rows of fc1 and columns of fc2.
def test_masks_json_has_the_rows_of_every_grid(tmp_path):
    model = tiny()
    add_masks(model, "hybrid", "4x6")
    set_threshold(model, 0.1)
    a = model.bert.layers[1].attention
    a.query.parametrizations.weight[0].scores.data[1] = DEAD
    a.value.parametrizations.weight[0].scores.data[0, 1] = DEAD
    a.out.parametrizations.weight[0].scores.data[1, :2] = DEAD
    mask = model.bert.layers[1].ffn.fc2.parametrizations.weight[0]
    mask.owner.scores.data[[0, 3]] = DEAD
    rows = mask_rows(model)
    assert list(rows) == [0, 1]
    assert rows[0]["query"] == ["11", "11", "11"]
    assert rows[1] == {
        "query": ["11", "00", "11"],
        "key": ["11", "11", "11"],
        "value": ["10", "11", "11"],
        "out": ["111", "001"],
        "fc1": ["0", "1", "1", "0", "1", "1", "1"],
        "fc2": ["0110111"],
    }
    # Each matrix has a line of its own in the file.
    path = tmp_path / "masks.json"
    write_masks(model, path)
    assert read(path) == {"0": rows[0], "1": rows[1]}
    assert '  "value": ["10", "11", "11"],' in path.read_text().splitlines()


def test_the_table_has_the_median_of_the_times(tmp_path, monkeypatch):
    folders = [str(tmp_path / "dense"), str(tmp_path / "small")]
    for folder, model in zip(folders, (tiny(), scrambled(UNEVEN))):
        save_model(model, folder)
        write_results(Config(out=folder), None, Squad([], []), exact_match=50.0, f1=60.0)
    monkeypatch.setattr(compact_py, "benchmark", lambda *_, **__: [[9.0, 1, 6], [2.0, 30, 3]])
    assert compact_py.main(["--compare", *folders, "--length", "8", "--device", "cpu"]) == 0
    dense, small = read(tmp_path / "summary.json")
    assert (dense["latency_ms"], dense["speedup"], dense["flops_ratio"]) == (6, 1, 1)
    assert (small["latency_ms"], small["speedup"]) == (3, 2)
    assert small["flops_ratio"] == flops(TINY, 8) / flops(UNEVEN, 8)
    # The same numbers are in the folder of each model.
    assert small == {"model": "small", **read(tmp_path / "small" / "results.json")}
