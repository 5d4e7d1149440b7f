"""What blockprune.py must do, said by naive versions and by cases worked by hand.

In its order: the mask; putting masks on; what a training loop asks for; baking; cutting; and what
else people have around it: torch.compile, low precision, checkpoints, two processes.
Sizes are small and all different: a transposed axis cannot hide.

Letters as in blockprune.py: S scores, W a weight of R × C, r × c the block, M the mask on the
weight, σ the sigmoid, τ the threshold, H heads of size D. W′ = W ⊙ M, and G = dL/dW′.
"""
import copy
import io
import math
import os
import warnings

import pytest
import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.testing import assert_close

from blockprune import (BlockMask, bake, cut_dimensions, cut_heads, density, mask_dimensions,
                        mask_weight, masks, parameter_groups, penalty, set_threshold,
                        threshold_schedule)

EDGE = math.log(0.1 / 0.9)      # σ(EDGE) = 0.1, the paper's final τ
DEAD = -9.0                     # a score far below it


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def masked_net():
    """Hybrid in small: blocks in the first linear, shared dimensions in the two others."""
    net = nn.Sequential(
        nn.Linear(5, 7),
        nn.LayerNorm(7),
        nn.Linear(7, 9),
        nn.GELU(),
        nn.Linear(9, 3),
    )
    mask_weight(net[0], (2, 3), kind="attention")       # ragged: 4 × 2 blocks on 7 × 5
    mask_dimensions(net[2], net[4], kind="ffn")
    return net


def scatter(model, threshold=0.4):
    """Spread each mask's scores over −2 … 2 in random order: some are dead and some alive."""
    for mask in masks(model):
        if mask.owner is mask:
            S = mask.scores
            order = torch.randperm(S.numel())
            S.data.copy_(torch.linspace(-2, 2, S.numel())[order].view_as(S))
    set_threshold(model, threshold)
    return model


def original(layer):
    """W, where layer.weight is W′."""
    return layer.parametrizations.weight.original


def ids(parameters):
    return [id(parameter) for parameter in parameters]


# ---------------------------------------------------------------------------------------- the mask

SHAPES = pytest.mark.parametrize("shape, block", [
    pytest.param((6, 8), (2, 2), id="square"),
    pytest.param((5, 7), (1, 7), id="row"),
    pytest.param((5, 7), (5, 1), id="column"),
    pytest.param((6, 7), (2, 7), id="head"),            # 3 heads of size 2 in query, key or value
    pytest.param((7, 6), (7, 2), id="head of out"),
    pytest.param((3, 5), (1, 1), id="1x1"),
    pytest.param((5, 10), (2, 3), id="ragged"),         # one row and one column are left over
])


def block_of(i, j, shape, block):
    """The index of the block that holds W[i, j], counted along the rows of the grid."""
    r, c = block
    blocks_in_a_row = math.ceil(shape[1] / c)
    return i // r * blocks_in_a_row + j // c


def mask_by_loop(S, shape, block, threshold=0.4):
    """M from its definition, one weight after another."""
    S = S.flatten()
    M = torch.zeros(shape)
    for i in range(shape[0]):
        for j in range(shape[1]):
            score = S[block_of(i, j, shape, block)].item()
            sigmoid = 1 / (1 + math.exp(-score))
            M[i, j] = sigmoid > threshold
    return M


@SHAPES
def test_a_masked_weight_is_w_times_m(shape, block):
    mask = scatter(BlockMask(shape, block))
    W = torch.randn(shape)
    M = mask_by_loop(mask.scores, shape, block)
    assert 0 < M.sum() < M.numel()
    assert torch.equal(mask.weight_mask().expand(shape), M)
    assert torch.equal(mask(W), W * M)


def test_a_block_dies_at_the_logit_of_the_threshold():
    mask = BlockMask((2, 3), (2, 1))
    mask.scores.data = torch.tensor([[EDGE - 1e-6, EDGE + 1e-6, 0]])
    set_threshold(mask, 0.1)
    assert mask.block_mask().tolist() == [[0, 1, 1]]
    # Strictly: σ(0) is 0.5 exactly, and not over 0.5.
    set_threshold(mask, 0.5)
    assert mask.block_mask().tolist() == [[0, 0, 0]]


def test_fresh_scores_keep_everything():
    net = masked_net()
    for threshold in (0, 0.1):
        set_threshold(net, threshold)
        assert density(net) == {"attention": 1, "ffn": 1, "all": 1}
    # The penalty starts at σ(0).
    assert penalty(net).item() == 0.5


@SHAPES
def test_gradients_are_those_of_the_paper(shape, block):
    R, C = shape
    layer = nn.Linear(C, R, bias=False)
    mask = mask_weight(layer, block)
    scatter(layer.double())
    W = original(layer).detach()
    M = mask_by_loop(mask.scores, shape, block)
    # W′ as a parameter of its own, whose gradient is G.
    plain = nn.Linear(C, R, bias=False)
    plain.weight.data = W * M
    x = torch.randn(4, C).double()
    y = torch.randn(4, R).double()
    for module in (layer, plain):
        loss = (module(x).tanh() - y).pow(2).sum()
        loss.backward()
    G = plain.weight.grad

    sums = torch.zeros(mask.scores.numel()).double()
    for i in range(R):
        for j in range(C):
            sums[block_of(i, j, shape, block)] += G[i, j] * W[i, j]
    assert_close(mask.scores.grad.flatten(), sums)
    assert_close(original(layer).grad, G * M)
    # Pruned blocks keep learning.
    assert mask.scores.grad[mask.block_mask() == 0].abs().min() > 0


def test_no_gradient_goes_from_a_bias_to_the_scores():
    layer = nn.Linear(5, 3)
    mask = mask_weight(layer, (1, 5))
    set_threshold(layer, 0.1)
    mask.scores.data = torch.tensor([[0], [DEAD], [0]])
    b = layer.parametrizations.bias.original
    inputs = [mask.scores, b]
    to_scores, to_bias = torch.autograd.grad(layer.bias.sum(), inputs, allow_unused=True)
    assert to_scores is None
    assert to_bias.tolist() == [1, 0, 1]


class Foreign(nn.Module):
    """A layer that is not torch's: nobody knows whether its weight is (out, in) or (in, out)."""

    def __init__(self, weight, bias=None):
        super().__init__()
        self.bias = bias
        if isinstance(weight, nn.Parameter):
            self.weight = weight
        else:
            self.register_buffer("weight", weight)


def ones(*shape):
    return nn.Parameter(torch.ones(*shape))


@pytest.mark.parametrize("rows, columns, output_dim, expected", [
    pytest.param(7, 8, None, [0, 0, 0, 4, 5, 6, 0, 0], id="in, out"),
    pytest.param(8, 8, 1, [0, 0, 0, 4, 5, 6, 0, 0], id="square, in, out"),
    pytest.param(8, 7, None, [0, 0, 0, 0, 5, 6, 7, 8], id="out, in"),
    pytest.param(8, 8, 0, [0, 0, 0, 0, 5, 6, 7, 8], id="square, out, in"),
])
def test_a_bias_goes_with_the_dimension_of_its_outputs(rows, columns, output_dim, expected):
    # 2 × 3 blocks. Their columns hold 0-2, 3-5 and 6-7 of the weight, their rows 0-3 and 4-7.
    layer = Foreign(ones(rows, columns), nn.Parameter(torch.arange(1.0, 9)))
    mask = mask_weight(layer, (4, 3), output_dim=output_dim)
    set_threshold(layer, 0.1)
    mask.scores.data = torch.tensor([[DEAD, DEAD, DEAD], [DEAD, 0, DEAD]])
    assert layer.bias.tolist() == expected


# --------------------------------------------------------------------------------- putting masks on


@pytest.mark.parametrize("groups, columns", [(1, 60), (2, 30)])
def test_a_convolution_is_a_matrix_of_out_by_in_kh_kw(groups, columns):
    conv = nn.Conv2d(6, 4, (2, 5), groups=groups)
    W = conv.weight.detach().clone()
    b = conv.bias.detach().clone()
    x = torch.randn(2, 6, 6, 7)
    mask = mask_weight(conv, (1, 7))        # ragged, and a block may span two inputs
    scatter(conv)
    mask.scores.data[2] = DEAD
    M = mask_by_loop(mask.scores, (4, columns), (1, 7)).view_as(W)
    alive = torch.tensor([1, 1, 0, 1])
    assert_close(conv(x), F.conv2d(x, W * M, b * alive, groups=groups))


def test_multihead_attention_reads_masked_weights_and_is_baked():
    # Three heads of size 2. in_proj has the rows of query, key and value one under the other: nine
    # blocks of two rows, of which those of query 2 and value 1 go.
    attention = nn.MultiheadAttention(6, 3)
    nn.init.normal_(attention.in_proj_bias)
    plain = copy.deepcopy(attention)
    mask = mask_weight(attention, (2, 6), weight="in_proj_weight", bias="in_proj_bias")
    set_threshold(attention, 0.1)
    for block in (2, 7):
        mask.scores.data[block] = DEAD
        plain.in_proj_weight.data[2 * block:2 * block + 2] = 0
        plain.in_proj_bias.data[2 * block:2 * block + 2] = 0
    x = torch.randn(4, 5, 6)
    assert_close(attention(x, x, x)[0], plain(x, x, x)[0])
    attention.eval()
    with torch.no_grad():       # there is a fast path, which reads the weights otherwise
        assert_close(attention(x, x, x)[0], plain.eval()(x, x, x)[0])
    bake(attention)
    assert type(attention) is nn.MultiheadAttention
    for name, value in plain.state_dict().items():
        assert torch.equal(attention.state_dict()[name], value)


def masked_heads():
    """Query, key, value and out of three heads of size 2. One score a head, for all four."""
    H, D, E, R = 3, 2, 7, 5
    net = nn.ModuleList([
        nn.Linear(E, H * D),
        nn.Linear(E, H * D),
        nn.Linear(E, H * D),
        nn.Linear(H * D, R),
    ])
    owner = mask_weight(net[0], (D, E))
    sharer = mask_weight(net[1], (D, E), share=owner)
    mask_weight(net[2], (D, E), share=sharer)       # a sharer's owner is that of the first
    mask_weight(net[3], (R, D), share=owner)
    return net, owner


def test_a_head_gets_the_gradients_of_its_four_blocks():
    net, owner = masked_heads()
    scatter(net.double())
    plain = bake(copy.deepcopy(net))        # each W′ is a parameter, whose .grad is G
    x = torch.randn(4, 7).double()
    for query, key, value, out in (net, plain):
        loss = out(query(x) * key(x) + value(x)).pow(2).sum()
        loss.backward()

    expected = torch.zeros(3, 1).double()
    for h in range(3):
        head = slice(2 * h, 2 * h + 2)
        for n in range(3):                                      # query, key, value: rows
            GW = plain[n].weight.grad * original(net[n])
            expected[h] += GW[head].sum()
        GW = plain[3].weight.grad * original(net[3])
        expected[h] += GW[:, head].sum()                        # out: columns
    assert_close(owner.scores.grad, expected)


def test_shared_scores_are_one_parameter_of_the_first_mask():
    net, owner = masked_heads()
    assert [mask.owner is owner for mask in masks(net)] == [True] * 4
    assert [mask.grid for mask in masks(net)] == [(3, 1), (3, 1), (3, 1), (1, 3)]
    name = "0.parametrizations.weight.0.scores"
    assert [key for key in net.state_dict() if "scores" in key] == [name]
    everything = dict(net.named_parameters(remove_duplicate=False))
    assert len(everything) == 4 + 4 + 1                         # weights, biases, scores
    assert everything[name] is owner.scores


def test_a_dimension_is_a_row_of_fc1_and_a_column_of_fc2():
    fc1 = nn.Linear(5, 3)
    fc2 = nn.Linear(3, 4)
    bias = fc2.bias.detach().clone()
    S = mask_dimensions(fc1, fc2).scores
    S.data = torch.tensor([[0], [DEAD], [0]])
    set_threshold(nn.ModuleList([fc1, fc2]), 0.1)
    alive = torch.tensor([1.0, 0, 1])
    assert torch.equal(fc1.weight, original(fc1) * alive.view(3, 1))
    assert torch.equal(fc1.bias, fc1.parametrizations.bias.original * alive)
    assert torch.equal(fc2.weight, original(fc2) * alive)
    # The bias of fc2 dies only with the last dimension.
    assert torch.equal(fc2.bias, bias)
    S.data.fill_(DEAD)
    assert fc2.bias.count_nonzero() == 0


def test_a_dimension_of_two_convolutions_is_a_channel():
    conv1 = nn.Conv2d(3, 5, (2, 1))
    conv2 = nn.Conv2d(5, 4, (2, 3))
    keep = [0, 2, 4]
    x = torch.randn(2, 3, 6, 7)
    inner = F.conv2d(x, conv1.weight[keep], conv1.bias[keep]).relu()
    cut = F.conv2d(inner, conv2.weight[:, keep], conv2.bias)
    S = mask_dimensions(conv1, conv2).scores
    set_threshold(nn.ModuleList([conv1, conv2]), 0.1)
    S.data[[1, 3]] = DEAD
    assert_close(conv2(conv1(x).relu()), cut)


def masked_linear():
    layer = nn.Linear(5, 7)
    mask_weight(layer, (2, 3))
    return layer


def with_foreign_parametrization(name):
    layer = nn.Linear(5, 7)
    parametrize.register_parametrization(layer, name, nn.Tanh())
    return layer


@pytest.mark.parametrize("make, block, output_dim, message", [
    pytest.param(lambda: nn.Linear(5, 7), (8, 1), None, "8x1 does not fit", id="high"),
    pytest.param(lambda: nn.Linear(5, 7), (0, 1), None, "0x1 does not fit", id="0x1"),
    pytest.param(lambda: nn.LayerNorm(5), (1, 1), None, "dimensions", id="vector"),
    pytest.param(lambda: Foreign(torch.ones(7, 5)), (1, 1), None, "must be a", id="buffer"),
    pytest.param(lambda: Foreign(nn.Parameter(torch.ones(7, 5, dtype=torch.int8), False)), (1, 1),
                 None, "floating", id="integers"),
    pytest.param(masked_linear, (1, 1), None, "parametrized already", id="twice"),
    pytest.param(lambda: with_foreign_parametrization("bias"), (1, 1), None, "parametrized already",
                 id="parametrized bias"),
    pytest.param(lambda: Foreign(ones(7, 5), True), (1, 1), None, 'bias=""', id="bias is a bool"),
    pytest.param(lambda: Foreign(ones(5, 5), ones(5)), (1, 1), None, "output_dim=", id="square"),
    pytest.param(lambda: Foreign(ones(4, 4), ones(4, 4)), (1, 1), 0, "does not go", id="bias 4x4"),
    pytest.param(lambda: nn.Linear(5, 7), (1, 1), 1, "does not go", id="wrong output_dim"),
    pytest.param(lambda: nn.ConvTranspose2d(16, 16, 4, stride=2, groups=16), (1, 1), 1, 'bias=""',
                 id="transposed"),
])
def test_what_cannot_be_masked_is_refused(make, block, output_dim, message):
    module = make()
    before = dict(module.named_parameters())
    with pytest.raises(ValueError, match=message):
        mask_weight(module, block, output_dim=output_dim)
    assert dict(module.named_parameters()).keys() == before.keys()
    if message == 'bias=""':
        mask_weight(module, block, bias="")
        assert list(module.parametrizations) == ["weight"]


@pytest.mark.parametrize("shape, block, kind", [
    pytest.param((6, 2), (2, 2), "ffn", id="3x1"),
    pytest.param((4, 6), (2, 2), "ffn", id="transposed"),
    pytest.param((6, 4), (2, 2), "attention", id="another kind"),
])
def test_masks_that_do_not_fit_share_no_scores(shape, block, kind):
    mask = BlockMask((6, 4), (2, 2))        # 3 × 2 blocks
    with pytest.raises(ValueError, match="share"):
        BlockMask(shape, block, share=mask, kind=kind)


def bias_of_two(linear):
    linear.bias = ones(2)
    return linear


@pytest.mark.parametrize("fc2, gate, message", [
    pytest.param(nn.Linear(6, 3), None, "as many outputs", id="sizes"),
    pytest.param(nn.Linear(7, 3), nn.Linear(5, 8), "as many outputs", id="gate"),
    pytest.param(nn.Linear(7, 3), masked_linear(), "without masks", id="masked gate"),
    pytest.param(bias_of_two(nn.Linear(7, 3)), None, "does not go", id="bias of fc2"),
    pytest.param(Foreign(ones(3, 7)), None, "plain layer", id="not torch's"),
    pytest.param(nn.ConvTranspose2d(7, 7, 1, bias=False), None, "plain layer", id="transposed"),
])
def test_dimensions_that_do_not_fit_are_refused(fc2, gate, message):
    fc1 = nn.Linear(5, 7)
    with pytest.raises(ValueError, match=message):
        mask_dimensions(fc1, fc2, gate=gate)
    assert not list(masks(nn.ModuleList([fc1, fc2])))


# -------------------------------------------------------------------- what a training loop asks for


# Of 150 steps the first 10 and the last 40 are flat, so τ rises for 100; how much of it is left?
@pytest.mark.parametrize("step, left", [
    (0, 1), (10, 1), (35, 0.75), (60, 0.5), (85, 0.25), (110, 0), (150, 0)])
def test_the_threshold_is_cubic_between_two_flat_parts(step, left):
    tau = threshold_schedule(step, 150, flat_start=10, flat_end=40)
    assert tau == pytest.approx(0.1 * (1 - left ** 3))
    tau = threshold_schedule(step, 150, 10, 40, final=0.5, initial=0.1)
    assert tau == pytest.approx(0.5 - 0.4 * left ** 3)


@pytest.mark.parametrize("step, flat_start, flat_end", [(0, 40, 60), (99, 90, 60), (0, 40, 59)])
def test_the_threshold_must_have_steps_to_rise(step, flat_start, flat_end):
    # In the last case it has one: a jump is no rise.
    with pytest.raises(ValueError, match="no step is left"):
        threshold_schedule(step, 100, flat_start, flat_end)


def net_with_four_owners():
    """Two kinds with two owners each; σ(S) are round numbers.

        attention    query   [0.1, 0.3]                   mean 0.2
                     value   [0.6] · 6                    mean 0.6     mean of both 0.4
        ffn          inner   [0.1, 0.2, 0.3, 0.4, 0.5]    mean 0.3
                     last    [0.6, 0.8]                   mean 0.7     mean of both 0.5
    """
    query = nn.Linear(4, 6)
    value = nn.Linear(4, 6)
    fc1 = nn.Linear(4, 5)
    fc2 = nn.Linear(5, 3)
    last = nn.Linear(7, 2)
    net = nn.ModuleList([query, value, fc1, fc2, last])
    mask_weight(query, (3, 4), kind="attention").scores.data = torch.tensor([[0.1], [0.3]]).logit()
    mask_weight(value, (2, 2), kind="attention").scores.data = torch.full((3, 2), 0.6).logit()
    # Two masks, but one owner.
    inner = torch.tensor([[0.1], [0.2], [0.3], [0.4], [0.5]])
    mask_dimensions(fc1, fc2, kind="ffn").scores.data = inner.logit()
    mask_weight(last, (1, 7), kind="ffn").scores.data = torch.tensor([[0.6], [0.8]]).logit()
    return net


def test_the_penalty_by_hand():
    net = net_with_four_owners()
    assert penalty(net).item() == pytest.approx((0.4 + 0.5) / 2)
    assert penalty(net, {"attention": 3}).item() == pytest.approx((3 * 0.4 + 0.5) / 2)
    with pytest.raises(ValueError, match="atention"):
        penalty(net, {"atention": 1.0})


def test_groups_are_matrices_vectors_and_scores():
    net = masked_net()
    matrices, vectors, scores = parameter_groups(net, 3e-5, score_lr=1e-2, weight_decay=0.3)
    weights = [original(net[0]), original(net[2]), original(net[4])]
    assert ids(matrices["params"]) == ids(weights)
    assert len(vectors["params"]) == 3 + 2                      # biases; gain and bias of the norm
    assert ids(scores["params"]) == [id(mask.scores) for mask in masks(net) if mask.owner is mask]
    # Scores have a rate of their own and no decay. AdamW's own default is a decay of 0.01.
    optimizer = torch.optim.AdamW([matrices, vectors, scores])
    assert [group["lr"] for group in optimizer.param_groups] == [3e-5, 3e-5, 1e-2]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0, 0]


def test_groups_leave_out_what_is_frozen():
    net = masked_net()
    bias = net[4].parametrizations.bias.original
    scores = net[0].parametrizations.weight[0].scores
    bias.requires_grad_(False)
    scores.requires_grad_(False)
    grouped = []
    for group in parameter_groups(net, 3e-5, score_lr=1e-2):
        grouped += ids(group["params"])
    trainable = set(ids(net.parameters())) - {id(bias), id(scores)}
    assert sorted(grouped) == sorted(trainable)


def test_density_by_hand():
    query = nn.Linear(5, 7)
    fc1 = nn.Linear(5, 4)
    fc2 = nn.Linear(4, 3)
    net = nn.ModuleList([query, fc1, fc2])
    mask = mask_weight(query, (2, 3), kind="attention")
    inner = mask_dimensions(fc1, fc2, kind="ffn")
    set_threshold(net, 0.1)
    # 35 weights of attention, of which go a block of 2 × 3 and, in the corner, one of 1 × 2.
    mask.scores.data[0, 0] = DEAD
    mask.scores.data[3, 1] = DEAD
    # 20 + 12 weights of the feed-forward layer. One of four dimensions stays, of 5 + 3 weights.
    inner.scores.data[:3] = DEAD
    assert density(net) == pytest.approx({"attention": 27 / 35, "ffn": 8 / 32, "all": 35 / 67})


# ------------------------------------------------------------------------ from masks to zeros: bake


def test_a_baked_model_is_plain_and_computes_the_same():
    net = scatter(masked_net())
    x = torch.randn(4, 5)
    masked = net(x)
    W = original(net[0]).detach().clone()
    M = mask_by_loop(next(masks(net)).scores, (7, 5), (2, 3))
    assert 0 < M.sum() < M.numel()
    assert bake(net) is net
    assert torch.equal(net(x), masked)
    assert torch.equal(net[0].weight, W * M)
    assert [type(net[n]) for n in (0, 2, 4)] == [nn.Linear] * 3
    assert [key for key in net.state_dict() if key.startswith("0")] == ["0.weight", "0.bias"]
    # Baked again it stays what it is, and it can be masked anew.
    before = ids(net.parameters())
    assert ids(bake(net).parameters()) == before
    mask_weight(net[0], (1, 1))
    assert torch.equal(net(x), masked)


def test_an_optimiser_made_before_bake_trains_the_weights():
    net = scatter(masked_net())
    x = torch.randn(4, 5)
    W = original(net[0])
    net[2].parametrizations.weight.original.requires_grad_(False)
    optimizer = torch.optim.Adam(parameter_groups(net, lr=1e-2, score_lr=1e-2))
    bake(net)
    before = copy.deepcopy(net)
    net(x).pow(2).sum().backward()
    optimizer.step()
    assert net[0].weight is W
    for name in ("0.weight", "0.bias", "4.weight", "4.bias"):
        assert not torch.equal(net.get_parameter(name), before.get_parameter(name))
    assert torch.equal(net[2].weight, before[2].weight)         # what was frozen stays frozen


@pytest.mark.parametrize("which", ["copy", "original"])
def test_of_two_copies_one_is_baked_and_the_other_stays_masked(which):
    net = scatter(masked_net())
    twin = copy.deepcopy(net)
    x = torch.randn(4, 5)
    pruned = net(x).detach()
    plain, masked = (twin, net) if which == "copy" else (net, twin)
    bake(plain)
    assert len(list(masks(masked))) == 3
    assert torch.equal(masked(x), pruned)
    masked(x).sum().backward()
    assert all(p.grad is not None for p in masked.parameters())

    # A τ above σ(2) = 0.88 empties the one, and the other does not know of it.
    set_threshold(masked, 0.9)
    assert density(masked)["all"] == 0
    assert not torch.allclose(masked(x), pruned)
    assert torch.equal(plain(x), pruned)


def test_bake_refuses_other_parametrizations_of_a_masked_module():
    layer = masked_linear()
    parametrize.register_parametrization(layer, "weight", nn.Tanh())
    with pytest.raises(ValueError, match="remove the other parametrizations"):
        bake(layer)
    # Those of other modules are left alone.
    layer = bake(with_foreign_parametrization("weight"))
    assert parametrize.is_parametrized(layer)


@pytest.mark.parametrize("what", ["scores", "threshold"])
@pytest.mark.parametrize("function", [density, bake])
def test_nan_is_no_pruned_block(function, what):
    net = scatter(masked_net())
    mask = net[0].parametrizations.weight[0]
    getattr(mask, what).data.view(-1)[0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        function(net)
    assert len(list(masks(net))) == 3       # bake left all as it was


def test_bake_warns_where_nothing_is_pruned():
    # τ was never set: no score, however low, can be pruned.
    net = scatter(masked_net(), threshold=0)
    with pytest.warns(UserWarning, match="set_threshold.*optimiser"):
        bake(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bake(scatter(masked_net()))
        bake(nn.Linear(5, 7))


def tied_net(name):
    net = nn.ModuleList([nn.Linear(5, 9), nn.Linear(5, 9)])
    setattr(net[1], name, getattr(net[0], name))
    return net


def test_tied_weights_masked_alike_stay_tied():
    net = tied_net("weight")
    mask = mask_weight(net[0], (1, 5))
    mask_weight(net[1], (1, 5), share=mask)
    expected = scatter(net)[0].weight.clone()
    bake(net)
    assert net[0].weight is net[1].weight
    assert torch.equal(net[0].weight, expected)
    assert not expected.all()


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("both", [False, True], ids=["one mask", "two masks"])
def test_tied_weights_must_be_masked_alike(name, both):
    net = tied_net(name)
    mask_weight(net[0], (1, 5))
    if both:
        mask_weight(net[1], (1, 5))
    scatter(net)
    with pytest.raises(ValueError, match='tied.*share=.*bias=""'):
        bake(net)
    assert len(list(masks(net))) == 1 + both


# ------------------------------------------------------------------- from zeros to smaller matrices


def linear_of(weight, bias):
    weight = torch.tensor(weight)
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight.data = weight
    linear.bias.data = torch.tensor(bias)
    return linear


def attend(x, query, key, value, out, slopes):
    """Attention as anyone writes it, with a bias per head and distance; x: (B, T, E)."""
    T = x.shape[1]
    def split(y):
        return y.view(len(x), T, len(slopes), 2).transpose(1, 2)        # (B, H, T, 2)
    distance = (torch.arange(T) - torch.arange(T).view(T, 1)).abs()     # (T, T)
    bias = -slopes.view(-1, 1, 1) * distance                            # (H, T, T)
    mixed = F.scaled_dot_product_attention(split(query(x)), split(key(x)), split(value(x)), bias)
    return out(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("bias", [True, False])
def test_heads_of_four_plain_linears_are_cut_exactly(bias):
    query, key, value = (nn.Linear(7, 10, bias=bias).double() for _ in range(3))
    out = nn.Linear(10, 4, bias=False).double()
    slopes = torch.rand(5).double()
    x = torch.randn(3, 6, 7).double()
    query.weight.data[0:2] = 0          # head 0: even without a query it adds a mean: it stays
    value.weight.data[2:4] = 0          # head 1: its values are their bias, at every token
    out.weight.data[:, 6:8] = 0         # head 3: nobody reads it
    out.weight.data[:, 8:9] = 0         # head 4: half of it is left, it stays
    expected = attend(x, query, key, value, out, slopes)
    rows = query.weight[[0, 1, 4, 5, 8, 9]].clone()
    left = cut_heads(query, key, value, out, head_size=2)
    assert left == [0, 2, 4]
    assert torch.equal(query.weight, rows)
    assert [linear.out_features for linear in (query, key, value)] == [6, 6, 6]
    assert out.in_features == out.weight.shape[1] == 6
    # What else is per head is cut by what is left.
    assert_close(attend(x, query, key, value, out, slopes[left]), expected, rtol=0, atol=1e-12)
    assert (out.bias is not None) == bias       # for the constant it gets one


@pytest.mark.parametrize("outputs, head_size, error", [
    pytest.param(4, 2, "grouped-query", id="grouped-query attention"),
    pytest.param(6, 4, "shape", id="no whole number of heads"),
])
def test_heads_that_cannot_be_cut_are_refused(outputs, head_size, error):
    query = nn.Linear(5, 6)
    key = nn.Linear(5, outputs)
    value = nn.Linear(5, outputs)
    out = nn.Linear(6, 5)
    value.weight.data[:2] = 0
    with pytest.raises((ValueError, RuntimeError), match=error):
        cut_heads(query, key, value, out, head_size)
    assert [len(linear.weight) for linear in (query, value, out)] == [6, outputs, 5]


def test_dimensions_are_cut_by_hand():
    # Dimension 0: the row of fc1 is 0, so that it adds relu(6) · (10, 20) = (60, 120).
    # Dimension 1: its row is 0 as well, and it adds relu(−7) = 0.
    # Dimension 2 stays.
    # Dimension 3: the column of fc2 is 0, so that it adds nothing.
    fc1 = linear_of([[0.0, 0], [0, 0], [1, 2], [3, 4]], [6.0, -7, 5, 8])
    fc2 = linear_of([[10.0, 30, 1, 0], [20, 40, 2, 0]], [100.0, 200])

    assert cut_dimensions(fc1, fc2, torch.relu) == [2]
    assert fc1.weight.tolist() == [[1, 2]]
    assert fc1.bias.tolist() == [5]
    assert fc2.weight.tolist() == [[1], [2]]
    assert fc2.bias.tolist() == [160, 320]
    assert [fc1.out_features, fc2.in_features] == [1, 1]


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_what_is_frozen_stays_frozen_when_it_is_cut(trained):
    fc1 = linear_of([[0.0, 0], [1, 2]], [5.0, 6])
    fc2 = linear_of([[1.0, 10]], [100.0])
    for linear in (fc1, fc2):
        linear.weight.requires_grad_(trained == "weight")
        linear.bias.requires_grad_(trained == "bias")
    cut_dimensions(fc1, fc2, torch.relu)
    for linear in (fc1, fc2):
        assert linear.weight.requires_grad == (trained == "weight")
        assert linear.bias.requires_grad == (trained == "bias")


def test_a_layer_may_lose_all_its_dimensions():
    fc1 = linear_of([[0.0, 0], [0, 0]], [5.0, 6])
    fc2 = linear_of([[1.0, 10]], [100.0])
    # 100 + 5 · 1 + 6 · 10, whatever the input is; and once more, with nothing left to cut.
    for _ in range(2):
        assert cut_dimensions(fc1, fc2, torch.relu) == []
        assert fc2(fc1(torch.randn(3, 2)).relu()).tolist() == [[165], [165], [165]]


class Gated(nn.Module):
    """down(act(gate(x)) · up(x)), as in LLaMA and T5 1.1."""

    def __init__(self, act, bias=True):
        super().__init__()
        self.up = nn.Linear(5, 9, bias=bias)
        self.gate = nn.Linear(5, 9, bias=bias)
        self.down = nn.Linear(9, 3, bias=bias)
        self.act = act

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("bias", [True, False])
def test_a_masked_gated_layer_is_cut_exactly(bias):
    layer = Gated(torch.sigmoid, bias).double()
    x = torch.randn(4, 5).double()
    owner = mask_dimensions(layer.up, layer.down, gate=layer.gate)
    set_threshold(layer, 0.1)
    owner.scores.data[[1, 4, 8]] = DEAD
    expected = layer(x)
    bake(layer)
    assert torch.equal(layer(x), expected)
    left = cut_dimensions(layer.up, layer.down, layer.act, gate=layer.gate)
    assert left == [0, 2, 3, 5, 6, 7]
    assert_close(layer(x), expected, rtol=0, atol=1e-12)


def test_dimensions_of_a_gated_layer_that_are_constant_go():
    layer = Gated(F.relu).double()
    x = torch.randn(50, 5).double()
    up, gate, down = layer.up, layer.gate, layer.down
    for linear in (up, gate):
        linear.bias.data = torch.rand(9).double() + 0.5
    # Gone:
    up.weight.data[0] = gate.weight.data[0] = 0     # the constant relu(bg) · bu
    up.weight.data[1] = up.bias.data[1] = 0         # nothing goes up
    gate.weight.data[2] = 0
    gate.bias.data[2] = -1                          # relu(−1) is 0: the gate is always closed
    down.weight.data[:, 3] = 0                      # nobody reads it
    # Not gone:
    up.weight.data[4] = 0                           # the constant bu, but times the gate
    gate.weight.data[5] = 0                         # the constant relu(bg), but times up
    up.bias.data[6] = gate.bias.data[6] = 0         # only biases are 0
    expected = layer(x)
    assert cut_dimensions(up, down, F.relu, gate=gate) == [4, 5, 6, 7, 8]
    assert_close(layer(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", [nn.GELU(), nn.Tanh(), nn.PReLU(), nn.ELU(inplace=True),
                                 nn.Dropout(0.5).eval()])
def test_an_act_is_cut_in_the_precision_of_the_model(act, dtype):
    act.to(dtype)
    fc1 = nn.Linear(5, 4).to(dtype)
    fc2 = nn.Linear(4, 3).to(dtype)
    x = torch.randn(6, 5).to(dtype)
    fc1.weight.data[[0, 2]] = 0
    fc1.bias.data.fill_(-0.5)
    expected = fc2(act(fc1(x)))
    assert cut_dimensions(fc1, fc2, act) == [1, 3]
    assert fc1.bias.tolist() == [-0.5, -0.5]        # an act in place has not come near it
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    assert_close(fc2(act(fc1(x))), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("act", [
    pytest.param(lambda x: x.softmax(-1), id="softmax"),
    pytest.param(nn.LayerNorm(9), id="LayerNorm"),
    pytest.param(F.glu, id="GLU"),
    pytest.param(lambda x: x - x.mean(-1, keepdim=True), id="minus the mean"),
    pytest.param(lambda x: x / x.abs().max(), id="by the largest"),
    pytest.param(nn.Dropout(0.1), id="dropout in training"),
])
def test_an_act_that_mixes_dimensions_or_is_random_is_not_cut(act):
    fc1 = nn.Linear(5, 9)
    fc2 = nn.Linear(9, 3)
    fc1.weight.data[[2, 5]] = 0
    with pytest.raises((ValueError, RuntimeError)):
        cut_dimensions(fc1, fc2, act)
    assert len(fc1.weight) == fc2.weight.shape[1] == 9


def test_what_is_masked_is_not_cut():
    with pytest.raises(ValueError, match="without masks"):
        cut_dimensions(masked_linear(), nn.Linear(7, 3), F.relu)


# --------------------------------------------------------------- copies, checkpoints, other devices


def reloaded(net):
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    fresh = masked_net()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


def assigned(net):
    fresh = masked_net()
    fresh.load_state_dict(copy.deepcopy(net.state_dict()), assign=True)
    return fresh


def from_meta(net):
    with torch.device("meta"):      # which holds no numbers
        fresh = masked_net()
    fresh.to_empty(device="cpu")
    fresh.load_state_dict(net.state_dict())
    return fresh


def averaged(net):
    """A moving average writes into what state_dict() gives, as partial loading does."""
    average = masked_net()
    for name, value in average.state_dict().items():
        value.copy_(net.state_dict()[name])
    return average


@pytest.mark.parametrize("change", [reloaded, assigned, from_meta, averaged, copy.deepcopy,
                                    nn.Module.double])
def test_a_changed_model_prunes_and_trains_as_before(change):
    net = scatter(masked_net())
    x = torch.randn(4, 5)
    expected = net(x).detach()
    kept = density(net)
    assert 0.2 < kept["ffn"] < 0.8
    other = change(net)
    dtype = other[2].weight.dtype
    assert_close(other(x.to(dtype)).float(), expected)
    assert density(other) == kept

    # Rows and columns still have one score each: that of the model itself.
    blocks, rows, columns = masks(other)
    assert columns.owner is rows.owner is rows
    assert rows.scores is other.get_parameter("2.parametrizations.weight.0.scores")
    set_threshold(other, 0.1)
    rows.scores.data[4] = DEAD
    assert not other[2].weight[4].any()
    assert not other[4].weight[:, 4].any()
    if other is not net:        # and the first model does not know of it
        assert torch.equal(net(x), expected)


# ------------------------------------------------------------------------------------ low precision


def test_masks_and_their_gradients_are_fp32_under_autocast():
    layer = nn.Linear(6, 4)
    x = torch.randn(3, 6)
    mask = mask_weight(layer, (2, 3))
    # This block is alive. With its score rounded to bf16, which is −2.203, it would be dead.
    mask.scores.data[0, 0] = EDGE + 1e-3
    set_threshold(layer, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        R = penalty(layer)
        assert y.dtype == torch.bfloat16
        assert layer.weight.dtype == mask.block_mask().dtype == torch.float32
        assert mask.block_mask().all()
    assert_close(R, mask.scores.sigmoid().mean(), rtol=1e-6, atol=0)
    (y.float().pow(2).sum() + R).backward()
    assert mask.scores.grad.dtype == original(layer).grad.dtype == torch.float32


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("before, after", [
    pytest.param(lambda net: net.bfloat16(), lambda net: net, id="before"),
    pytest.param(lambda net: net, lambda net: net.to(torch.bfloat16), id="to"),
    pytest.param(lambda net: net, lambda net: net.half(), id="half"),
    pytest.param(lambda net: net, lambda net: net.type(torch.float16), id="type"),
])
def test_scores_and_threshold_are_fp32_in_half_precision(before, after, default):
    net = before(nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)))
    torch.set_default_dtype(default)
    mask_dimensions(*net)
    torch.set_default_dtype(torch.float32)
    after(net)
    set_threshold(net, 0.1)
    rows, columns = masks(net)
    assert net(torch.randn(4, 5).to(net[0].weight.dtype)).element_size() == 2
    assert rows.scores.dtype == torch.float32
    assert rows.threshold == columns.threshold == torch.tensor(0.1)
    # A step of 1e-3 at −2 is lost in bf16: its neighbours there are 0.0156 away.
    optimizer = torch.optim.Adam(parameter_groups(net, lr=0.0, score_lr=1e-3))
    rows.scores.data.fill_(-2)
    penalty(net).backward()
    optimizer.step()
    assert_close(rows.scores, torch.full((7, 1), -2.001))


# ----------------------------------------------------------------------------------- torch.compile


def test_compile_makes_one_graph_whatever_the_threshold_is():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    net = scatter(masked_net())
    x = torch.randn(4, 5)
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    for threshold in (0.2, 0.4, 0.6):
        set_threshold(net, threshold)
        assert_close(compiled(x), net(x))
    assert len(graphs) == 1


# ------------------------------------------------------------------------------------ two processes


def train(net, x, y):
    """15 steps, in which some scores fall below the final threshold."""
    optimizer = torch.optim.Adam(parameter_groups(net, lr=1e-2, score_lr=0.4))
    for step in range(15):
        set_threshold(net, threshold_schedule(step, 15, flat_start=2, flat_end=5))
        loss = (net(x) - y).pow(2).mean() + 0.5 * penalty(net)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    set_threshold(net, 0.1)


def one_of_two_processes(rank, folder):
    """Train under DDP and under FSDP2, each process on half of the rows."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    x, y = torch.load(f"{folder}/data.pt")

    torch.manual_seed(0)
    net = masked_net()
    train(nn.parallel.DistributedDataParallel(net), x[rank::2], y[rank::2])
    ddp = net.state_dict()

    # A layer in a group of its own, as people do it, and the rest in another.
    torch.manual_seed(0)
    layer = fully_shard(masked_net())
    net = fully_shard(nn.Sequential(layer))
    train(net, x[rank::2], y[rank::2])
    kept = density(net)
    fsdp = get_model_state_dict(layer, options=StateDictOptions(full_state_dict=True))

    # A masked linear that is sharded by itself: bake() leaves it as it is.
    net = masked_net()
    fully_shard(net[0])
    expected = net(x)
    with pytest.raises(ValueError, match="get_model_state_dict"):
        bake(net)
    assert torch.equal(net(x), expected)
    # Rows and columns that share their scores are sharded apart.
    net = masked_net()
    for layer in (net[2], net[4], net):
        fully_shard(layer)
    with pytest.raises(ValueError, match="separate groups of fully_shard"):
        net(x)

    if rank == 0:
        torch.save((ddp, fsdp, kept), f"{folder}/found.pt")
    # When both are done, end the process at once: torch's own clean-up of a process group
    # aborts now and then ("terminate called without an active exception").
    distributed.barrier()
    os._exit(0)


def test_two_processes_prune_as_one(tmp_path):
    if not hasattr(pytest.importorskip("torch.distributed.fsdp"), "fully_shard"):
        pytest.skip("no fully_shard in this torch")
    x = torch.randn(16, 5)
    y = torch.randn(16, 3)
    torch.save((x, y), tmp_path / "data.pt")
    torch.multiprocessing.spawn(one_of_two_processes, args=(str(tmp_path),), nprocs=2)
    ddp, fsdp, kept = torch.load(tmp_path / "found.pt")

    torch.manual_seed(0)
    net = masked_net()
    train(net, x, y)
    assert 0.2 < density(net)["all"] < 0.9
    assert kept == density(net)
    for name, expected in net.state_dict().items():
        assert_close(ddp[name], expected, rtol=1e-4, atol=1e-4)
        assert_close(fsdp[name], expected, rtol=1e-4, atol=1e-4)
