"""What blockprune.py must do, said by naive versions and by cases worked by hand.

In its order: the mask; putting masks on; what a training loop asks for; from masks to zeros; from
zeros to smaller matrices; what is refused. Sizes are small and all different: a transposed axis
cannot hide.

Letters as in blockprune.py: S scores, W a weight of R × C, r × c the block, M the mask on the
weight, σ the sigmoid, τ the threshold, H heads of size D. W′ = W ⊙ M, and G = dL/dW′.
"""
import copy
import io
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.testing import assert_close

from blockprune import (BlockMask, StraightThrough, bake, cut_dimensions, cut_heads, density,
                        mask_dimensions, mask_weight, masks, parameter_groups, penalty,
                        set_threshold, threshold_schedule)

EDGE = math.log(0.1 / 0.9)      # σ(EDGE) = 0.1, the paper's final τ
DEAD = -9.0                     # a score far below it


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def small_net():
    return nn.Sequential(
        nn.Linear(5, 7),
        nn.LayerNorm(7),
        nn.Linear(7, 9),
        nn.GELU(),
        nn.Linear(9, 3),
    )


def put_masks(net):
    """Hybrid in small: blocks in the first linear, shared dimensions in the two others."""
    mask_weight(net[0], (2, 3), kind="attention")       # ragged: 4 × 2 blocks on 7 × 5
    mask_dimensions(net[2], net[4], kind="ffn")
    return net


def scatter(model, threshold=0.4):
    """Spread each mask's scores over −2 … 2 in random order: some are dead and some alive."""
    distinct = {id(mask.scores): mask.scores for mask in masks(model)}
    for S in distinct.values():
        order = torch.randperm(S.numel())
        S.data.copy_(torch.linspace(-2, 2, S.numel())[order].view_as(S))
    set_threshold(model, threshold)
    return model


def masked_net():
    return scatter(put_masks(small_net()))


def original(layer):
    """W, where layer.weight is W′."""
    return layer.parametrizations.weight.original


def plain_copy(net):
    """A copy in which each W′ is a plain parameter. After backward(), its .grad is G."""
    return bake(copy.deepcopy(net))


# ---------------------------------------------------------------------------------------- the mask

SHAPES = pytest.mark.parametrize("shape, block", [
    pytest.param((6, 8), (2, 2), id="square"),
    pytest.param((5, 7), (1, 7), id="row"),
    pytest.param((5, 7), (5, 1), id="column"),
    pytest.param((6, 7), (2, 7), id="head"),            # 3 heads of size 2 in query, key or value
    pytest.param((7, 6), (7, 2), id="head of out"),
    pytest.param((3, 5), (1, 1), id="1x1"),
    pytest.param((5, 10), (2, 3), id="ragged"),         # one row and one column are left over
    pytest.param((7, 5), (3, 5), id="ragged rows"),
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


def test_a_mask_by_hand():
    mask = BlockMask((3, 4), (2, 2))
    set_threshold(mask, 0.1)
    mask.scores.data = torch.tensor([[0, DEAD], [DEAD, 0]])
    assert mask.block_mask().tolist() == [[1, 0], [0, 1]]
    # Each entry of that fills 2 × 2 weights. A fourth row is cut off, since the weight has three.
    assert mask.weight_mask().tolist() == [
        [1, 1, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 1, 1],
    ]


@SHAPES
def test_a_mask_is_a_double_loop_over_the_weight(shape, block):
    mask = scatter(BlockMask(shape, block))
    M = mask_by_loop(mask.scores, shape, block)
    assert 0 < M.sum() < M.numel()
    assert torch.equal(mask.weight_mask().expand(shape), M)


@SHAPES
def test_a_masked_weight_is_w_times_m(shape, block):
    mask = scatter(BlockMask(shape, block))
    W = torch.randn(shape)
    M = mask_by_loop(mask.scores, shape, block)
    assert torch.equal(mask(W), W * M)


def test_the_step_is_strict():
    S = torch.zeros(2)                      # σ(0) is 0.5 exactly
    half = torch.tensor(0.5)
    just_below = half.nextafter(torch.tensor(0.0))
    assert StraightThrough.apply(S, half).tolist() == [0, 0]
    assert StraightThrough.apply(S, just_below).tolist() == [1, 1]


def test_a_block_dies_at_the_logit_of_the_threshold():
    mask = BlockMask((2, 3), (2, 1))
    mask.scores.data = torch.tensor([[EDGE - 1e-6, EDGE + 1e-6, 0]])
    set_threshold(mask, 0.1)
    assert mask.block_mask().tolist() == [[0, 1, 1]]


@pytest.mark.parametrize("threshold", [0, 0.05, 0.1])
def test_fresh_scores_keep_everything(threshold):
    net = small_net()
    x = torch.randn(4, 5)
    expected = net(x)
    put_masks(net)
    set_threshold(net, threshold)
    assert torch.equal(net(x), expected)
    assert density(net)["all"] == 1


# Its gradients: straight through the step, with W and not W′.


def test_the_gradient_of_the_step_is_the_identity():
    S = torch.tensor([3.0, -3.0], requires_grad=True)
    M = StraightThrough.apply(S, torch.tensor(0.4))
    assert M.tolist() == [1, 0]
    M.backward(torch.tensor([3.0, -5.0]))
    assert S.grad.tolist() == [3, -5]


def test_gradients_by_hand():
    # W = (1, 2 | 3, 4) in two blocks, of which the second is pruned. L = x · W′, so that G is x,
    # (10, 20 | 30, 40).
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, 2, 3, 4]])
    mask = mask_weight(layer, (1, 2))
    mask.scores.data = torch.tensor([[0, DEAD]])
    set_threshold(layer, 0.1)
    L = layer(torch.tensor([10.0, 20, 30, 40]))
    assert L.item() == 10 * 1 + 20 * 2
    L.backward()
    # dL/dS sums G ⊙ W over a block, pruned or not. dL/dW is G where W is kept.
    assert mask.scores.grad.tolist() == [[10 * 1 + 20 * 2, 30 * 3 + 40 * 4]]
    assert original(layer).grad.tolist() == [[10, 20, 0, 0]]


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


# The bias goes with its output.


def test_a_bias_goes_with_its_row():
    # 4 × 2 blocks; their rows hold outputs 0-1, 2-3, 4-5, and 6 alone.
    layer = nn.Linear(5, 7)
    layer.bias.data = torch.arange(1.0, 8)
    mask = mask_weight(layer, (2, 3))
    set_threshold(layer, 0.1)
    mask.scores.data = torch.tensor([[DEAD, DEAD], [DEAD, 0], [0, 0], [DEAD, DEAD]])
    assert layer.bias.tolist() == [0, 0, 3, 4, 5, 6, 0]


def test_a_bias_goes_with_its_column_where_weights_are_in_out():
    # 2 × 3 blocks; their columns hold outputs 0-2, 3-5 and 6-7.
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.randn(7, 8))
    layer.bias = nn.Parameter(torch.arange(1.0, 9))
    mask = mask_weight(layer, (4, 3), output_dim=1)
    set_threshold(layer, 0.1)
    mask.scores.data = torch.tensor([[DEAD, DEAD, DEAD], [DEAD, 0, DEAD]])
    assert layer.bias.tolist() == [0, 0, 0, 4, 5, 6, 0, 0]


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


def test_a_bias_that_is_none_is_skipped():
    layer = nn.Linear(5, 7, bias=False)
    mask_weight(layer, (2, 3))
    assert list(layer.parametrizations) == ["weight"]


def test_a_module_need_not_have_a_bias():
    layer = nn.Embedding(7, 5)
    mask = mask_weight(layer, (7, 1))
    mask.scores.data[0, 2] = DEAD
    set_threshold(layer, 0.1)
    assert layer.weight.any(dim=0).tolist() == [True, True, False, True, True]


# Saved, copied and converted; in lower precision.


def reloaded(net):
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    fresh = put_masks(small_net())
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


CHANGES = pytest.mark.parametrize("change", [reloaded, copy.deepcopy, nn.Module.double])


@CHANGES
def test_a_changed_model_prunes_as_before(change):
    net = masked_net()
    x = torch.randn(4, 5)
    pruned = net(x).detach()
    other = change(net)
    dtype = next(masks(other)).scores.dtype
    assert_close(other(x.to(dtype)).float(), pruned)
    for mask in masks(other):
        assert mask.threshold.item() == pytest.approx(0.4)


@CHANGES
def test_shared_scores_stay_shared(change):
    other = change(masked_net())
    blocks, rows, columns = masks(other)
    assert rows.scores is columns.scores
    assert rows.scores is not blocks.scores
    # A checkpoint has them once for each of their users.
    entries = [key for key in other.state_dict() if key.endswith("scores")]
    assert len(entries) == 3


@pytest.mark.parametrize("change", [reloaded, copy.deepcopy])
def test_a_copy_shares_no_scores_with_the_model(change):
    net = masked_net()
    scores = {id(mask.scores) for mask in masks(net)}
    scores_of_copy = {id(mask.scores) for mask in masks(change(net))}
    assert not scores & scores_of_copy


def test_a_mask_is_fp32_under_autocast():
    layer = nn.Linear(6, 4)
    x = torch.randn(3, 6)
    mask = mask_weight(layer, (2, 3))
    # This block is alive. With its score rounded to bf16, which is −2.203, it would be dead.
    mask.scores.data[0, 0] = EDGE + 1e-3
    set_threshold(layer, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        assert layer.weight.dtype == torch.float32
        assert mask.block_mask().dtype == torch.float32
        assert mask.block_mask().all()


def test_gradients_are_fp32_under_autocast():
    layer = nn.Linear(6, 4)
    x = torch.randn(3, 6)
    mask = mask_weight(layer, (2, 3))
    with torch.autocast("cpu", torch.bfloat16):
        loss = layer(x).float().pow(2).sum() + penalty(layer)
    loss.backward()
    assert mask.scores.grad.dtype == torch.float32
    assert original(layer).grad.dtype == torch.float32


def test_the_penalty_is_fp32_under_autocast():
    layer = nn.Linear(6, 4)
    mask = mask_weight(layer, (2, 3))
    mask.scores.data[0, 0] = EDGE + 1e-3
    with torch.autocast("cpu", torch.bfloat16):
        value = penalty(layer)
    assert_close(value, mask.scores.sigmoid().mean(), rtol=1e-6, atol=0)


# --------------------------------------------------------------------------------- putting masks on


def test_a_convolution_is_a_matrix_of_out_by_in_kh_kw():
    conv = nn.Conv2d(3, 4, (2, 5))
    W = conv.weight.detach().clone()
    b = conv.bias.detach().clone()
    x = torch.randn(2, 3, 6, 7)
    # Blocks of 1 × 7 on 4 × 30: ragged, and a block may span two inputs.
    mask = mask_weight(conv, (1, 7))
    scatter(conv)
    mask.scores.data[2] = DEAD
    M = mask_by_loop(mask.scores, (4, 30), (1, 7)).view(4, 3, 2, 5)
    alive = torch.tensor([1, 1, 0, 1])
    assert_close(conv(x), nn.functional.conv2d(x, W * M, b * alive))


def masked_multihead_attention():
    """Three heads of size 2, with query 2 and value 1 pruned, and its like with zeros in place."""
    attention = nn.MultiheadAttention(6, 3)
    nn.init.normal_(attention.in_proj_bias)
    plain = copy.deepcopy(attention)
    # in_proj has the rows of query, key and value one under the other: nine blocks of two rows.
    mask = mask_weight(attention, (2, 6), weight="in_proj_weight", bias="in_proj_bias")
    set_threshold(attention, 0.1)
    for block in (2, 7):
        mask.scores.data[block] = DEAD
        plain.in_proj_weight.data[2 * block:2 * block + 2] = 0
        plain.in_proj_bias.data[2 * block:2 * block + 2] = 0
    return attention, plain


def test_multihead_attention_reads_masked_weights():
    attention, plain = masked_multihead_attention()
    x = torch.randn(4, 5, 6)
    assert_close(attention(x, x, x)[0], plain(x, x, x)[0])


@torch.no_grad()
def test_the_fast_path_of_multihead_attention_reads_masked_weights():
    attention, plain = masked_multihead_attention()
    attention.eval()
    plain.eval()
    x = torch.randn(4, 5, 6)
    assert_close(attention(x, x, x)[0], plain(x, x, x)[0])


def test_multihead_attention_is_baked():
    attention, plain = masked_multihead_attention()
    bake(attention)
    assert names_and_types(attention) == names_and_types(plain)
    assert torch.equal(attention.in_proj_weight, plain.in_proj_weight)
    assert torch.equal(attention.in_proj_bias, plain.in_proj_bias)


# Shared scores.


def masked_heads():
    """Query, key, value and out of three heads of size 2. One score a head, for all four."""
    H, D, E, R = 3, 2, 7, 5
    query = nn.Linear(E, H * D)
    key = nn.Linear(E, H * D)
    value = nn.Linear(E, H * D)
    out = nn.Linear(H * D, R)
    S = mask_weight(query, (D, E)).scores
    mask_weight(key, (D, E), scores=S)
    mask_weight(value, (D, E), scores=S)
    mask_weight(out, (R, D), scores=S)
    net = nn.ModuleList([query, key, value, out])
    return net, S


def test_a_head_gets_the_gradients_of_its_four_blocks():
    net, S = masked_heads()
    scatter(net.double())
    plain = plain_copy(net)
    x = torch.randn(4, 7).double()
    for query, key, value, out in (net, plain):
        loss = out(query(x) * key(x) + value(x)).pow(2).sum()
        loss.backward()

    expected = torch.zeros(3).double()
    for h in range(3):
        head = slice(2 * h, 2 * h + 2)
        for n in range(3):                                      # query, key, value: rows
            GW = plain[n].weight.grad * original(net[n])
            expected[h] += GW[head].sum()
        GW = plain[3].weight.grad * original(net[3])
        expected[h] += GW[:, head].sum()                        # out: columns
    assert_close(S.grad.flatten(), expected)


def test_shared_scores_are_one_parameter():
    net, S = masked_heads()
    assert len(list(net.parameters())) == 4 + 4 + 1             # weights, biases, scores
    scores = parameter_groups(net, 1, 2)[-1]["params"]
    assert len(scores) == 1
    assert scores[0] is S


def test_a_dimension_is_a_row_of_fc1_and_a_column_of_fc2():
    fc1 = nn.Linear(5, 3)
    fc2 = nn.Linear(3, 4)
    S = mask_dimensions(fc1, fc2)
    S.data = torch.tensor([0, DEAD, 0])
    set_threshold(nn.ModuleList([fc1, fc2]), 0.1)
    alive = torch.tensor([1.0, 0, 1])
    assert torch.equal(fc1.weight, original(fc1) * alive.view(3, 1))
    assert torch.equal(fc1.bias, fc1.parametrizations.bias.original * alive)
    assert torch.equal(fc2.weight, original(fc2) * alive)


def test_a_dimension_gets_the_gradients_of_its_row_and_its_column():
    fc1 = nn.Linear(5, 7)
    fc2 = nn.Linear(7, 3)
    S = mask_dimensions(fc1, fc2)
    net = nn.Sequential(fc1, nn.Tanh(), fc2).double()
    scatter(net)
    plain = plain_copy(net)
    x = torch.randn(4, 5).double()
    for module in (net, plain):
        loss = module(x).pow(2).sum()
        loss.backward()
    rows = (plain[0].weight.grad * original(fc1)).sum(dim=1)
    columns = (plain[2].weight.grad * original(fc2)).sum(dim=0)
    assert_close(S.grad, rows + columns)


def test_the_bias_of_fc2_dies_only_with_the_last_dimension():
    fc1 = nn.Linear(5, 4)
    fc2 = nn.Linear(4, 3)
    bias = fc2.bias.detach().clone()
    S = mask_dimensions(fc1, fc2)
    set_threshold(nn.ModuleList([fc1, fc2]), 0.1)
    S.data[:3] = DEAD
    assert torch.equal(fc2.bias, bias)
    S.data[3] = DEAD
    assert fc2.bias.count_nonzero() == 0


def test_a_dimension_of_two_convolutions_is_a_channel():
    conv1 = nn.Conv2d(3, 5, (2, 1))
    conv2 = nn.Conv2d(5, 4, (2, 3))
    keep = [0, 2, 4]
    W1 = conv1.weight.detach()[keep]
    b1 = conv1.bias.detach()[keep]
    W2 = conv2.weight.detach()[:, keep]
    b2 = conv2.bias.detach().clone()
    x = torch.randn(2, 3, 6, 7)
    cut = nn.functional.conv2d(x, W1, b1).relu()
    cut = nn.functional.conv2d(cut, W2, b2)

    S = mask_dimensions(conv1, conv2)
    set_threshold(nn.ModuleList([conv1, conv2]), 0.1)
    S.data[[1, 3]] = DEAD
    assert_close(conv2(conv1(x).relu()), cut)


def masked_bert_base(block, dimensions, tied):
    """12 layers of query, key, value, out, fc1 and fc2, on the meta device: shapes, no numbers."""
    net = nn.ModuleList()
    for _ in range(12):
        attention = [nn.Linear(768, 768, device="meta") for _ in range(4)]
        fc1 = nn.Linear(768, 3072, device="meta")
        fc2 = nn.Linear(3072, 768, device="meta")
        r, c = block
        S = None
        for layer, block_here in zip(attention, [(r, c), (r, c), (r, c), (c, r)]):
            mask = mask_weight(layer, block_here, scores=S)
            if tied:
                S = mask.scores
        if dimensions:
            mask_dimensions(fc1, fc2)
        else:
            mask_weight(fc1, block)
            mask_weight(fc2, block)
        net.extend(attention)
        net.append(fc1)
        net.append(fc2)
    return net


# 32 × 32: 24 · 24 blocks in 768 × 768, 96 · 24 in 3072 × 768.     64 × 768: 12 heads in a matrix.
#
#     hybrid          12 · (4 · 24 · 24 + 3072)            = 64,512
#     block           12 · (4 · 24 · 24 + 2 · 96 · 24)     = 82,944
#     struct          12 · (4 · 12 + 3072)                 = 37,440
#     struct, tied    12 · (12 + 3072)                     = 37,008
@pytest.mark.parametrize("block, dimensions, tied, tensors, scores", [
    pytest.param((32, 32), True, False, 12 * 5, 64_512, id="hybrid"),
    pytest.param((32, 32), False, False, 12 * 6, 82_944, id="block"),
    pytest.param((64, 768), True, False, 12 * 5, 37_440, id="struct"),
    pytest.param((64, 768), True, True, 12 * 2, 37_008, id="struct, tied"),
])
def test_score_counts_of_bert_base(block, dimensions, tied, tensors, scores):
    net = masked_bert_base(block, dimensions, tied)
    assert len(list(masks(net))) == 72
    distinct = {id(mask.scores): mask.scores.numel() for mask in masks(net)}
    assert len(distinct) == tensors
    assert sum(distinct.values()) == scores


# -------------------------------------------------------------------- what a training loop asks for


def test_masks_come_in_the_order_of_modules():
    net = put_masks(small_net())
    blocks, rows, columns = masks(net)
    assert blocks.block == (2, 3)
    assert rows.block == (1, 7)
    assert columns.block == (3, 1)


# The schedule of τ. Of 150 steps the first 10 and the last 40 are flat, so it rises for 100.


def tau_at(step):
    return threshold_schedule(step, 150, flat_start=10, flat_end=40)


def test_the_threshold_is_flat_at_either_end():
    for step in range(11):
        assert tau_at(step) == 0
    for step in range(110, 151):
        assert tau_at(step) == 0.1


def test_the_threshold_rises_in_between():
    for step in range(10, 110):
        assert tau_at(step) < tau_at(step + 1)


def test_the_threshold_is_cubic():
    # After a quarter, a half and three quarters of the rise.
    assert tau_at(35) == pytest.approx(0.1 * (1 - 0.75 ** 3))
    assert tau_at(60) == pytest.approx(0.1 * (1 - 0.5 ** 3))
    assert tau_at(85) == pytest.approx(0.1 * (1 - 0.25 ** 3))


def test_the_threshold_goes_from_any_value_to_any_other():
    def tau(step):
        return threshold_schedule(step, 150, 10, 40, final=0.5, initial=0.1)
    assert tau(10) == pytest.approx(0.1)
    assert tau(60) == pytest.approx(0.5 - 0.4 / 8)
    assert tau(111) == pytest.approx(0.5)


# 20 epochs are 110,660 steps, 5,400 of them warm-up; τ is flat for 1 and for 10 times as many.
@pytest.mark.parametrize("step, tau", [
    (0, 0),
    (5_400, 0),
    (18_215, 0.0578),
    (31_030, 0.0875),
    (43_845, 0.0984),
    (56_660, 0.1),
    (110_659, 0.1),
])
def test_the_threshold_in_the_squad_run_of_the_paper(step, tau):
    assert threshold_schedule(step, 110_660, 5_400, 54_000) == pytest.approx(tau, abs=5e-5)


def test_set_threshold_reaches_every_mask():
    net = put_masks(small_net())
    set_threshold(net, 0.25)
    assert [mask.threshold.item() for mask in masks(net)] == [0.25, 0.25, 0.25]


# The penalty: a mean for each score tensor, then for each kind, then over the kinds.


def net_with_four_score_tensors():
    """Two kinds with two score tensors each; σ(S) are round numbers.

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
    scores = {
        "query": mask_weight(query, (3, 4), kind="attention").scores,
        "value": mask_weight(value, (2, 2), kind="attention").scores,
        "inner": mask_dimensions(fc1, fc2, kind="ffn"),         # two masks, but one tensor
        "last": mask_weight(last, (1, 7), kind="ffn").scores,
    }
    scores["query"].data = torch.tensor([[0.1], [0.3]]).logit()
    scores["value"].data = torch.full((3, 2), 0.6).logit()
    scores["inner"].data = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]).logit()
    scores["last"].data = torch.tensor([[0.6], [0.8]]).logit()
    return nn.ModuleList([query, value, fc1, fc2, last]), scores


def test_the_penalty_starts_at_one_half():
    value = penalty(put_masks(small_net()))
    assert value.shape == ()
    assert value.item() == 0.5


def test_the_penalty_by_hand():
    net, _ = net_with_four_score_tensors()
    assert penalty(net).item() == pytest.approx((0.4 + 0.5) / 2)


def test_the_penalty_with_a_weight_for_one_kind():
    net, _ = net_with_four_score_tensors()
    weighted = penalty(net, {"attention": 3})
    assert weighted.item() == pytest.approx((3 * 0.4 + 0.5) / 2)


def test_the_gradient_of_the_penalty_by_hand():
    net, scores = net_with_four_score_tensors()
    penalty(net, {"attention": 3, "ffn": 7}).backward()
    # λ_kind · σ′ / (scores of the tensor · tensors of the kind · kinds), with σ′ = σ (1 − σ).
    query = scores["query"].grad[0, 0].item()
    value = scores["value"].grad[1, 1].item()
    inner = scores["inner"].grad[1].item()
    assert query == pytest.approx(3 * 0.1 * 0.9 / (2 * 2 * 2))
    assert value == pytest.approx(3 * 0.6 * 0.4 / (6 * 2 * 2))
    assert inner == pytest.approx(7 * 0.2 * 0.8 / (5 * 2 * 2))


def test_shared_scores_count_once_in_the_penalty():
    # Four masks share S, a fifth has scores of its own: two tensors of one kind.
    net, S = masked_heads()
    other = nn.Linear(4, 2)
    own = mask_weight(other, (1, 4)).scores
    net.append(other)
    scatter(net)
    S.data.add_(1)
    expected = (S.sigmoid().mean() + own.sigmoid().mean()) / 2
    assert_close(penalty(net), expected)


# Optimiser groups.


def ids(parameters):
    return [id(parameter) for parameter in parameters]


def test_groups_are_matrices_vectors_and_scores():
    net = put_masks(small_net())
    matrices, vectors, scores = parameter_groups(net, 3e-5, score_lr=1e-2)
    weights = [original(net[0]), original(net[2]), original(net[4])]
    assert ids(matrices["params"]) == ids(weights)
    assert len(vectors["params"]) == 3 + 2                      # biases; gain and bias of the norm
    assert all(vector.dim() == 1 for vector in vectors["params"])
    assert set(ids(scores["params"])) == {id(mask.scores) for mask in masks(net)}


def test_groups_hold_each_trainable_parameter_once():
    net = put_masks(small_net())
    frozen = net[4].parametrizations.bias.original
    frozen.requires_grad_(False)
    grouped = []
    for group in parameter_groups(net, 3e-5, score_lr=1e-2):
        grouped += ids(group["params"])
    trainable = set(ids(net.parameters())) - {id(frozen)}
    assert sorted(grouped) == sorted(trainable)


def test_scores_have_a_rate_of_their_own_and_no_decay():
    net = put_masks(small_net())
    groups = parameter_groups(net, 3e-5, score_lr=1e-2, weight_decay=0.3)
    assert [group["lr"] for group in groups] == [3e-5, 3e-5, 1e-2]
    # AdamW's own default is a decay of 0.01.
    optimizer = torch.optim.AdamW(groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0, 0]


# What is kept.


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
    inner.data[:3] = DEAD
    assert density(net) == pytest.approx({"attention": 27 / 35, "ffn": 8 / 32, "all": 35 / 67})


# Whole trainings.


def test_a_dead_block_comes_back_when_its_gradient_asks_for_it():
    # L = (w′₀ − 1)² + (w′₁ − 1)² with W = (1, −1), both dead: G = (−2, −2), dL/dS = (−2, 2) and
    # dL/dW = 0. At a rate of 0.1, S₀ climbs by 0.2 a step until it is over EDGE = −2.197; S₁ sinks.
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, -1.0]])
    mask = mask_weight(layer, (1, 1))
    mask.scores.data.fill_(-3)
    set_threshold(layer, 0.1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    path = []
    for _ in range(5):
        assert mask.block_mask().tolist() == [[0, 0]]
        loss = (layer.weight - 1).pow(2).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        path.append(mask.scores[0].tolist())
    assert path == [
        pytest.approx([-2.8, -3.2]),
        pytest.approx([-2.6, -3.4]),
        pytest.approx([-2.4, -3.6]),
        pytest.approx([-2.2, -3.8]),
        pytest.approx([-2.0, -4.0]),
    ]
    assert layer.weight.tolist() == [[1, 0]]
    assert original(layer).tolist() == [[1, -1]]


PLANTED = torch.tensor([
    [0.0, 0, 1, 0, 0],
    [0.0, 0, 0, 1, 0],
    [0.0, 0, 0, 0, 0],
    [1.0, 1, 0, 0, 0],
])


def train_a_student(final_lambda):
    """The block mask and the loss after 200 steps. In the target only the planted blocks are not 0.

    The student starts with half of their weights, and with noise elsewhere. The inputs of the last
    column of blocks are 0: its weights do not touch the loss.
    """
    useful = PLANTED.repeat_interleave(2, 0).repeat_interleave(3, 1)        # (8, 15)
    target = torch.randn(8, 15) * useful
    x = torch.randn(64, 15)
    x[:, 12:] = 0
    student = nn.Linear(15, 8)
    student.weight.data = target / 2 + torch.randn(8, 15) * (1 - useful)
    mask = mask_weight(student, (2, 3))
    optimizer = torch.optim.Adam(parameter_groups(student, lr=2e-2, score_lr=1e-1))
    for step in range(200):
        tau = threshold_schedule(step, 200, flat_start=20, flat_end=100)
        set_threshold(student, tau)
        loss = nn.functional.mse_loss(student(x), x @ target.T)
        objective = loss + final_lambda * tau / 0.1 * penalty(student)
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()
    return mask.block_mask(), loss.item()


def test_training_finds_the_planted_blocks():
    found, loss = train_a_student(final_lambda=0.3)
    assert torch.equal(found, PLANTED)
    assert loss < 1e-3


def test_without_a_penalty_what_does_not_touch_the_loss_stays():
    found, loss = train_a_student(final_lambda=0)
    assert found[:, 4].all()
    assert loss < 1e-3


# ------------------------------------------------------------------------ from masks to zeros: bake


def names_and_types(net):
    names = [name for name, _ in net.named_parameters()]
    types = [type(module) for module in net.modules()]
    return names, types


def test_a_baked_model_computes_the_same():
    net = masked_net()
    x = torch.randn(4, 5)
    masked = net(x)
    assert bake(net) is net
    assert torch.equal(net(x), masked)


def test_baked_weights_are_w_times_m():
    net = masked_net()
    mask = next(masks(net))
    W = original(net[0]).detach().clone()
    M = mask_by_loop(mask.scores, (7, 5), (2, 3))
    assert 0 < M.sum() < M.numel()
    bake(net)
    assert torch.equal(net[0].weight, W * M)


def test_a_baked_model_is_of_plain_modules():
    net = small_net()
    before = names_and_types(net)
    bake(scatter(put_masks(net)))
    assert names_and_types(net) == before
    assert list(net.state_dict()) == before[0]


def test_what_is_frozen_stays_frozen():
    net = small_net()
    net[2].weight.requires_grad_(False)
    bake(scatter(put_masks(net)))
    frozen = [name for name, p in net.named_parameters() if not p.requires_grad]
    assert frozen == ["2.weight"]


def test_baking_twice_changes_nothing():
    net = bake(masked_net())
    parameters = ids(net.parameters())
    bake(net)
    assert ids(net.parameters()) == parameters


def test_a_baked_model_can_be_masked_anew():
    net = bake(masked_net())
    x = torch.randn(4, 5)
    baked = net(x)
    put_masks(net)
    assert len(list(masks(net))) == 3
    assert torch.equal(net(x), baked)


@pytest.mark.parametrize("which", ["copy", "original"])
def test_of_two_copies_one_is_baked_and_the_other_stays_masked(which):
    net = masked_net()
    twin = copy.deepcopy(net)
    x = torch.randn(4, 5)
    pruned = net(x).detach()
    if which == "copy":
        plain = bake(twin)
        masked = net
    else:
        plain = bake(net)
        masked = twin
    assert len(list(masks(masked))) == 3
    assert torch.equal(masked(x), pruned)
    masked(x).sum().backward()
    assert all(p.grad is not None for p in masked.parameters())

    # A τ above σ(2) = 0.88 empties the one, and the other does not know of it.
    set_threshold(masked, 0.9)
    assert density(masked)["all"] == 0
    assert not torch.allclose(masked(x), pruned)
    assert torch.equal(plain(x), pruned)


@pytest.mark.parametrize("bias", [True, False])
def test_bake_refuses_a_masked_weight_with_a_foreign_parametrization(bias):
    layer = nn.Linear(5, 7, bias=bias)
    mask_weight(layer, (2, 3))
    parametrize.register_parametrization(layer, "weight", nn.Tanh())
    with pytest.raises(ValueError, match="remove the other parametrizations"):
        bake(layer)


def test_bake_leaves_a_foreign_parametrization_alone():
    layer = nn.Linear(5, 7)
    parametrize.register_parametrization(layer, "weight", nn.Tanh())
    bake(layer)
    assert parametrize.is_parametrized(layer)


# ------------------------------------------------------------------- from zeros to smaller matrices


def linear_of(weight, bias):
    weight = torch.tensor(weight)
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight.data = weight
    linear.bias.data = torch.tensor(bias)
    return linear


def test_heads_are_cut_by_hand():
    # Three heads of size 2. Head 0 has one row of value left, so it stays.
    # Head 1: the rows of value are 0. Its values are the biases, and it adds 10 · 6 + 20 · 7 = 200.
    # Head 2: the columns of out are 0, so that it adds nothing.
    query = nn.Linear(1, 6)
    key = nn.Linear(1, 6)
    value = linear_of([[1.0], [0], [0], [0], [3], [4]], [4.0, 5, 6, 7, 8, 9])
    out = linear_of([[1.0, 2, 10, 20, 0, 0]], [100.0])
    rows = query.weight.tolist()

    assert cut_heads(query, key, value, out, head_size=2) == 1
    assert query.weight.tolist() == rows[:2]
    assert key.weight.shape == (2, 1)
    assert value.weight.tolist() == [[1], [0]]
    assert value.bias.tolist() == [4, 5]
    assert out.weight.tolist() == [[1, 2]]
    assert out.bias.tolist() == [300]
    assert [query.out_features, value.out_features, out.in_features] == [2, 2, 2]


def test_a_head_with_an_empty_query_stays():
    """Its attention is uniform, and so it still adds the mean of V."""
    query = nn.Linear(3, 4)
    key = nn.Linear(3, 4)
    value = nn.Linear(3, 4)
    out = nn.Linear(4, 5)
    query.weight.data[2:] = 0
    assert cut_heads(query, key, value, out, head_size=2) == 2
    assert query.weight.shape == (4, 3)


def test_dimensions_are_cut_by_hand():
    # Dimension 0 stays.
    # Dimension 1: the row of fc1 is 0, so that it adds relu(6) · (10, 20) = (60, 120).
    # Dimension 2: its row is 0 as well, and it adds relu(−7) = 0.
    # Dimension 3: the column of fc2 is 0, so that it adds nothing.
    fc1 = linear_of([[1.0, 2], [0, 0], [0, 0], [3, 4]], [5.0, 6, -7, 8])
    fc2 = linear_of([[1.0, 10, 30, 0], [2, 20, 40, 0]], [100.0, 200])

    assert cut_dimensions(fc1, fc2, torch.relu) == 1
    assert fc1.weight.tolist() == [[1, 2]]
    assert fc1.bias.tolist() == [5]
    assert fc2.weight.tolist() == [[1], [2]]
    assert fc2.bias.tolist() == [160, 320]
    assert [fc1.out_features, fc2.in_features] == [1, 1]


def test_a_layer_may_lose_all_its_dimensions():
    fc1 = linear_of([[0.0, 0], [0, 0]], [5.0, 6])
    fc2 = linear_of([[1.0, 10]], [100.0])
    assert cut_dimensions(fc1, fc2, torch.relu) == 0
    # 100 + 5 · 1 + 6 · 10, whatever the input is.
    x = torch.randn(3, 2)
    assert fc2(fc1(x).relu()).tolist() == [[165], [165], [165]]


# --------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("block, message", [
    ((8, 1), "8x1 does not fit a weight of 7x5"),
    ((1, 6), "1x6 does not fit a weight of 7x5"),
    ((0, 1), "0x1 does not fit"),
    ((1, 0), "1x0 does not fit"),
])
def test_a_block_must_fit_the_weight(block, message):
    layer = nn.Linear(5, 7)
    with pytest.raises(ValueError, match=message):
        mask_weight(layer, block)
    assert not parametrize.is_parametrized(layer)


def test_a_weight_must_have_two_dimensions():
    with pytest.raises(ValueError, match="two and more dimensions"):
        mask_weight(nn.LayerNorm(5), (1, 1))


def test_a_weight_is_masked_once():
    layer = nn.Linear(5, 7)
    mask_weight(layer, (2, 3))
    with pytest.raises(ValueError, match="parametrized already"):
        mask_weight(layer, (1, 1))


def test_shared_scores_must_be_as_many_as_blocks():
    scores = nn.Parameter(torch.zeros(7))
    with pytest.raises(ValueError, match="7 shared scores for 3x3"):
        BlockMask((5, 7), (2, 3), scores=scores)


def test_fc2_must_take_what_fc1_gives():
    fc1 = nn.Linear(5, 7)
    fc2 = nn.Linear(6, 3)
    with pytest.raises(ValueError, match="fc1 has 7 outputs but fc2 6 inputs"):
        mask_dimensions(fc1, fc2)
    assert not parametrize.is_parametrized(fc1)
    assert not parametrize.is_parametrized(fc2)


def test_the_penalty_needs_masks():
    with pytest.raises(ValueError, match="no masks"):
        penalty(small_net())


def test_the_penalty_knows_its_kinds():
    with pytest.raises(ValueError, match="atention"):
        penalty(put_masks(small_net()), {"atention": 1.0})


@pytest.mark.parametrize("step, flat_start, flat_end", [
    (0, 40, 60),
    (0, 40, 59),        # one step: a jump is no rise
    (99, 90, 60),
])
def test_the_threshold_must_have_steps_to_rise(step, flat_start, flat_end):
    with pytest.raises(ValueError, match="no step is left"):
        threshold_schedule(step, 100, flat_start, flat_end)
