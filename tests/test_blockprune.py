"""What blockprune.py must do, said by naive versions and by cases worked by hand.

In order: the mask and its gradients; shared scores; the bias; training; τ, the penalty, optimiser
groups and density; bake, saving and copying; autocast; modules other than nn.Linear; what is refused;
the score counts of BERT-base. Sizes are small and all different: a transposed axis cannot hide.

Letters as in blockprune.py: S scores, W a weight of R × C, r × c the block, M(S) the mask, σ the
sigmoid, τ the threshold. W′ = W ⊙ M, and G = dL/dW′.
"""
import copy
import io
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.testing import assert_close

from blockprune import (BlockMask, StraightThrough, bake, density, mask_dimensions, mask_weight, masks,
                        parameter_groups, penalty, set_threshold, threshold_schedule)

EDGE = math.log(0.1 / 0.9)  # σ(EDGE) = 0.1, the paper's final τ
DEAD = -9.0                 # a score far below it

SHAPES = pytest.mark.parametrize("shape, block", [
    pytest.param((6, 8), (2, 2), id="square"),
    pytest.param((5, 7), (1, 7), id="row"),
    pytest.param((5, 7), (5, 1), id="column"),
    pytest.param((6, 7), (2, 7), id="head"),             # 3 heads of size 2 in query, key or value
    pytest.param((7, 6), (7, 2), id="head of out"),
    pytest.param((3, 5), (1, 1), id="1x1"),
    pytest.param((5, 10), (2, 3), id="ragged"),          # one row and one column are left over
    pytest.param((7, 5), (3, 5), id="ragged rows")])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def scatter(model, threshold=0.4):
    """Spread each mask's scores over −2 … 2 in random order, so that some are dead and some alive."""
    for S in {id(mask.scores): mask.scores for mask in masks(model)}.values():
        S.data.copy_(torch.linspace(-2, 2, S.numel())[torch.randperm(S.numel())].view_as(S))
    set_threshold(model, threshold)
    return model


def block_of(i, j, shape, block):
    """The index of the block that holds W[i, j], counted along the rows of the grid."""
    return i // block[0] * math.ceil(shape[1] / block[1]) + j // block[1]


def mask_by_loop(S, shape, block, threshold=0.4):
    """M(S) from its definition, one weight after another."""
    M = torch.zeros(shape)
    for i in range(shape[0]):
        for j in range(shape[1]):
            score = S.flatten()[block_of(i, j, shape, block)].item()
            M[i, j] = 1 / (1 + math.exp(-score)) > threshold
    return M


def original(layer):
    return layer.parametrizations.weight.original


def small_net():
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 9), nn.GELU(), nn.Linear(9, 3))


def put_masks(net):
    """Hybrid in small: ragged blocks in one linear, shared dimensions in two others."""
    mask_weight(net[0], (2, 3), kind="attention")
    mask_dimensions(net[2], net[4])
    return net


# ------------------------------------------------------------------------- the mask, its gradients


@SHAPES
def test_weight_mask_is_a_double_loop_over_blocks(shape, block):
    mask = scatter(BlockMask(shape, block))
    M, W = mask_by_loop(mask.scores, shape, block), torch.randn(shape)
    assert 0 < M.sum() < M.numel()
    assert torch.equal(mask.weight_mask().expand(shape), M)
    assert torch.equal(mask(W), W * M)


@SHAPES
def test_gradients_are_those_of_the_paper(shape, block):
    """dL/dS = Σ over the block of G ⊙ W, with W and not W′; dL/dW = G ⊙ M."""
    R, C = shape
    layer, plain = (nn.Linear(C, R, bias=False).double() for _ in range(2))
    x, y, W = torch.randn(4, C).double(), torch.randn(4, R).double(), layer.weight.detach().clone()
    mask = mask_weight(layer, block)
    scatter(layer.double())
    M = mask_by_loop(mask.scores, shape, block)
    plain.weight.data = W * M  # W′ as a parameter of its own, so that its gradient is G
    for module in (layer, plain):
        (module(x).tanh() - y).pow(2).sum().backward()
    G, expected = plain.weight.grad, torch.zeros(mask.scores.numel()).double()
    for i in range(R):
        for j in range(C):
            expected[block_of(i, j, shape, block)] += G[i, j] * W[i, j]
    assert_close(mask.scores.grad.flatten(), expected)
    assert_close(original(layer).grad, G * M)
    assert mask.scores.grad[mask.block_mask() == 0].abs().min() > 0  # pruned blocks keep learning


def test_the_step_is_strict_and_its_gradient_the_identity():
    S, half = torch.zeros(2, requires_grad=True), torch.tensor(0.5)  # σ(0) is 0.5 exactly
    assert StraightThrough.apply(S, half).tolist() == [0, 0]
    alive = StraightThrough.apply(S, half.nextafter(torch.tensor(0.0)))
    alive.backward(torch.tensor([3.0, -5.0]))
    assert alive.tolist() == [1, 1] and S.grad.tolist() == [3, -5]


def test_a_block_dies_at_the_logit_of_the_threshold():
    mask = BlockMask((2, 3), (2, 1))
    mask.scores.data = torch.tensor([[EDGE - 1e-6, EDGE + 1e-6, 0]])
    set_threshold(mask, 0.1)
    assert mask.block_mask().tolist() == [[0, 1, 1]]


@pytest.mark.parametrize("threshold", [0, 0.05, 0.1])
def test_nothing_is_pruned_at_the_start(threshold):
    net, x = small_net(), torch.randn(4, 5)
    expected = net(x)
    set_threshold(put_masks(net), threshold)
    assert torch.equal(net(x), expected) and density(net)["all"] == 1


# ---------------------------------------------------------------------- shared scores, and the bias


def test_a_dimension_gets_the_gradients_of_its_row_and_its_column():
    fc1, fc2 = net = nn.ModuleList([nn.Linear(5, 7), nn.Linear(7, 3)])
    S, x = mask_dimensions(fc1, fc2), torch.randn(4, 5).double()
    twin = bake(copy.deepcopy(scatter(net.double())))  # W′ as plain parameters, so that .grad is G
    for first, second in (net, twin):
        second(first(x).tanh()).pow(2).sum().backward()
    G1, G2 = (layer.weight.grad for layer in twin)
    alive = (S.sigmoid() > 0.4).double()
    assert_close(twin[0].weight, original(fc1) * alive[:, None])
    assert_close(twin[1].weight, original(fc2) * alive)
    assert_close(S.grad, (G1 * original(fc1)).sum(1) + (G2 * original(fc2)).sum(0))


def test_a_tied_head_gets_the_gradients_of_its_four_blocks_and_counts_once():
    H, D, E, R = 3, 2, 7, 5  # query, key and value: (H · D, E); out: (R, H · D)
    net = nn.ModuleList([nn.Linear(E, H * D) for _ in range(3)] + [nn.Linear(H * D, R)])
    S, x = mask_weight(net[0], (D, E)).scores, torch.randn(4, E).double()
    for layer, block in zip(net[1:], [(D, E), (D, E), (R, D)]):
        mask_weight(layer, block, scores=S)
    twin = bake(copy.deepcopy(scatter(net.double())))
    for query, key, value, out in (net, twin):
        out(query(x) * key(x) + value(x)).pow(2).sum().backward()
    GW = [plain.weight.grad * original(layer) for plain, layer in zip(twin, net)]
    expected = sum(q.view(H, D, E).sum((1, 2)) for q in GW[:3]) + GW[3].view(R, H, D).sum((0, 2))
    assert_close(S.grad.flatten(), expected)
    assert_close(penalty(net), S.sigmoid().mean())
    assert len(list(net.parameters())) == 4 + 4 + 1  # weights, biases, scores
    assert [p is S for p in parameter_groups(net, 1, 2)[-1]["params"]] == [True]


def test_the_bias_goes_with_its_row():
    layer = nn.Linear(5, 7)
    layer.bias.data = torch.arange(1.0, 8)
    mask = mask_weight(layer, (2, 3))  # 4 × 2 blocks; rows 0-1, 2-3, 4-5, and 6 alone
    set_threshold(layer, 0.1)
    mask.scores.data = torch.tensor([[DEAD, DEAD], [DEAD, 0], [0, 0], [DEAD, DEAD]])
    assert layer.bias.tolist() == [0, 0, 3, 4, 5, 6, 0]
    b = layer.parametrizations.bias.original
    to_scores, to_bias = torch.autograd.grad(layer.bias.sum(), [mask.scores, b], allow_unused=True)
    assert to_scores is None and to_bias.tolist() == [0, 0, 1, 1, 1, 1, 0]


def test_the_bias_goes_with_its_column_where_weights_are_stored_in_out():
    layer = nn.Module()
    layer.weight, layer.bias = nn.Parameter(torch.randn(7, 8)), nn.Parameter(torch.arange(1.0, 9))
    mask = mask_weight(layer, (4, 3), output_dim=1)  # 2 × 3 blocks; columns 0-2, 3-5, 6-7
    set_threshold(layer, 0.1)
    mask.scores.data = torch.tensor([[DEAD, DEAD, DEAD], [DEAD, 0, DEAD]])
    assert layer.bias.tolist() == [0, 0, 0, 4, 5, 6, 0, 0]


def test_the_bias_of_fc2_dies_only_with_the_last_dimension():
    fc1, fc2 = nn.Linear(5, 4), nn.Linear(4, 3)
    S, bias = mask_dimensions(fc1, fc2), fc2.bias.detach().clone()
    set_threshold(nn.ModuleList([fc1, fc2]), 0.1)
    S.data[:3] = DEAD
    assert torch.equal(fc2.bias, bias) and fc1.bias.count_nonzero() == 1
    S.data[3] = DEAD
    assert fc2.bias.count_nonzero() == fc1.bias.count_nonzero() == 0


def test_a_bias_that_is_none_or_absent_is_skipped():
    for layer in (nn.Linear(5, 7, bias=False), nn.Embedding(7, 5)):
        mask_weight(layer, (7, 1)).scores.data[0, 2] = DEAD
        set_threshold(layer, 0.1)
        assert layer.weight.any(0).tolist() == [True, True, False, True, True]
        assert list(layer.parametrizations) == ["weight"]


# ----------------------------------------------------------------------------------------- training


def test_a_dead_block_comes_back_when_its_gradient_asks_for_it():
    """L = (w′₀ − 1)² + (w′₁ − 1)² with W = (1, −1), both dead: G = −2, dL/dS = (−2, 2), dL/dW = 0."""
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, -1.0]])
    mask, path = mask_weight(layer, (1, 1)), []
    mask.scores.data.fill_(-3)
    set_threshold(layer, 0.1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(5):  # S₀ climbs by 0.2 a step until it is over EDGE = −2.197, S₁ sinks
        assert mask.block_mask().tolist() == [[0, 0]]
        optimizer.zero_grad()
        (layer.weight - 1).pow(2).sum().backward()
        optimizer.step()
        path += mask.scores[0].tolist()
    assert path == pytest.approx([-2.8, -3.2, -2.6, -3.4, -2.4, -3.6, -2.2, -3.8, -2.0, -4.0])
    assert layer.weight.tolist() == [[1, 0]] and original(layer).tolist() == [[1, -1]]


@pytest.mark.parametrize("weight_of_penalty", [0.3, 0])
def test_training_finds_the_planted_blocks(weight_of_penalty):
    """Only 4 of the 4 × 5 blocks matter: the student has half their weights, and noise elsewhere.

    The inputs of the last column are zero: no gradient says so, only the penalty prunes its blocks.
    """
    planted = torch.zeros(4, 5)
    planted[[0, 1, 3, 3], [2, 3, 0, 1]] = 1
    useful = planted.repeat_interleave(2, 0).repeat_interleave(3, 1)  # blocks of 2 × 3
    target, x = torch.randn(8, 15) * useful, torch.randn(64, 15)
    x[:, 12:] = 0
    student = nn.Linear(15, 8)
    student.weight.data = target / 2 + torch.randn(8, 15) * (1 - useful)
    mask = mask_weight(student, (2, 3))
    optimizer = torch.optim.Adam(parameter_groups(student, lr=2e-2, score_lr=1e-1))
    for step in range(200):
        threshold = threshold_schedule(step, 200, flat_start=20, flat_end=100)
        set_threshold(student, threshold)
        loss = F.mse_loss(student(x), x @ target.T)
        optimizer.zero_grad()
        (loss + weight_of_penalty * threshold / 0.1 * penalty(student)).backward()
        optimizer.step()
    assert loss < 1e-3
    assert torch.equal(mask.block_mask(), planted) == (weight_of_penalty > 0)
    assert mask.block_mask()[:, 4].all() == (weight_of_penalty == 0)


# ----------------------------------------------------------- τ, the penalty, optimiser groups, density


def test_threshold_is_flat_then_cubic_then_flat():
    tau = [threshold_schedule(step, 150, flat_start=10, flat_end=40) for step in range(151)]
    assert tau[:11] == [0] * 11 and tau[110:] == [0.1] * 41
    assert all(a < b for a, b in zip(tau[10:110], tau[11:111]))
    assert [tau[35], tau[60], tau[85]] == pytest.approx([0.0578, 0.0875, 0.0984], abs=5e-5)
    other = [threshold_schedule(step, 150, 10, 40, final=0.5, initial=0.1) for step in (10, 60, 111)]
    assert other == pytest.approx([0.1, 0.5 - 0.4 / 8, 0.5])


def test_threshold_in_the_squad_run_of_the_paper():
    """20 epochs are 110,660 steps, 5,400 of them warm-up; τ is flat for 1 and for 10 times as many."""
    points = {0: 0, 5_400: 0, 18_215: 0.0578, 31_030: 0.0875, 43_845: 0.0984, 56_660: 0.1, 110_659: 0.1}
    tau = [threshold_schedule(step, 110_660, 5_400, 54_000) for step in points]
    assert tau == pytest.approx(list(points.values()), abs=5e-5)


def test_penalty_by_hand():
    """A mean for each tensor, then for each kind, then over the kinds."""
    net = nn.ModuleDict({"query": nn.Linear(4, 6), "value": nn.Linear(4, 6),
                         "fc1": nn.Linear(4, 5), "fc2": nn.Linear(5, 3), "last": nn.Linear(7, 2)})
    query = mask_weight(net["query"], (3, 4), kind="attention").scores
    value = mask_weight(net["value"], (2, 2), kind="attention").scores
    inner = mask_dimensions(net["fc1"], net["fc2"], kind="ffn")
    last = mask_weight(net["last"], (1, 7), kind="ffn").scores
    assert penalty(net).item() == 0.5 and penalty(net).shape == ()
    query.data = torch.tensor([[0.1], [0.3]]).logit()               # mean 0.2
    value.data = torch.full((3, 2), 0.6).logit()                    # mean 0.6: 0.4 for the kind
    inner.data = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]).logit()    # mean 0.3, once for two masks
    last.data = torch.tensor([[0.6], [0.8]]).logit()                # mean 0.7: 0.5 for the kind
    assert penalty(net).item() == pytest.approx((0.4 + 0.5) / 2)
    assert penalty(net, {"attention": 3}).item() == pytest.approx((3 * 0.4 + 0.5) / 2)
    penalty(net, {"attention": 3, "ffn": 7}).backward()  # λ σ′ / (numel · N · K), with σ′ = σ (1 − σ)
    assert query.grad[0, 0].item() == pytest.approx(3 * 0.1 * 0.9 / (2 * 2 * 2))
    assert value.grad[1, 1].item() == pytest.approx(3 * 0.6 * 0.4 / (6 * 2 * 2))
    assert inner.grad[1].item() == pytest.approx(7 * 0.2 * 0.8 / (5 * 2 * 2))


def test_parameter_groups_hold_each_trainable_parameter_once():
    net = put_masks(small_net())
    net[4].parametrizations.bias.original.requires_grad_(False)
    matrices, vectors, scores = groups = parameter_groups(net, 3e-5, score_lr=1e-2, weight_decay=0.3)
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(3e-5, 0.3), (3e-5, 0), (1e-2, 0)]
    assert list(map(id, matrices["params"])) == [id(original(net[i])) for i in (0, 2, 4)]
    assert set(map(id, scores["params"])) == {id(mask.scores) for mask in masks(net)}
    everything = matrices["params"] + vectors["params"] + scores["params"]
    assert sorted(map(id, everything)) == sorted(id(p) for p in net.parameters() if p.requires_grad)
    optimizer = torch.optim.AdamW(groups)  # whose own default is a decay of 0.01
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0, 0]


def test_density_by_hand():
    net = nn.ModuleDict({"query": nn.Linear(5, 7), "fc1": nn.Linear(5, 4), "fc2": nn.Linear(4, 3)})
    mask = mask_weight(net["query"], (2, 3), kind="attention")
    inner = mask_dimensions(net["fc1"], net["fc2"])
    set_threshold(net, 0.1)
    mask.scores.data[0, 0] = mask.scores.data[3, 1] = DEAD  # 2 × 3 weights, and 1 × 2 in the corner
    inner.data[:3] = DEAD                                   # leaves 5 of 20 and 3 of 12
    assert density(net) == pytest.approx({"attention": 27 / 35, "ffn": 8 / 32, "all": 35 / 67})


# ----------------------------------------------------------------- bake, saving, copying, precision


def names_and_types(net):
    return [name for name, _ in net.named_parameters()], [type(module) for module in net.modules()]


def test_bake_gives_plain_modules_that_compute_the_same():
    net, x = small_net(), torch.randn(4, 5)
    net[2].weight.requires_grad_(False)
    before, dense, pruned = names_and_types(net), net(x), scatter(put_masks(net))(x)
    assert not torch.allclose(dense, pruned)
    assert bake(net) is net and torch.equal(net(x), pruned)
    assert names_and_types(net) == before and list(net.state_dict()) == before[0]
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["2.weight"]
    parameters = list(net.parameters())
    assert all(a is b for a, b in zip(bake(net).parameters(), parameters))  # nothing was left to do


@pytest.mark.parametrize("baked", ["copy", "original"])
def test_baking_a_copy_leaves_the_original_as_it_is_and_the_reverse(baked):
    net, x = scatter(put_masks(small_net())), torch.randn(4, 5)
    twin, pruned = copy.deepcopy(net), net(x).detach()
    plain, masked = (bake(twin), net) if baked == "copy" else (bake(net), twin)
    assert len(list(masks(masked))) == 3 and torch.equal(masked(x), pruned)
    masked(x).sum().backward()
    assert all(p.grad is not None for p in masked.parameters())
    set_threshold(masked, 0.9)  # above σ(2) = 0.88: nothing is kept
    assert density(masked)["all"] == 0 and not torch.allclose(masked(x), pruned)
    assert torch.equal(plain(x), pruned) and torch.equal(put_masks(plain)(x), pruned)  # masked anew


@pytest.mark.parametrize("bias", [True, False])
def test_bake_refuses_a_module_with_a_foreign_parametrization(bias):
    layer = nn.Linear(5, 7, bias=bias)
    mask_weight(layer, (2, 3))
    parametrize.register_parametrization(layer, "weight", nn.Tanh())
    with pytest.raises(ValueError, match="remove the other parametrizations"):
        bake(layer)
    alone = parametrize.register_parametrization(nn.Linear(5, 7), "weight", nn.Tanh())
    assert parametrize.is_parametrized(bake(alone))  # without a mask of ours it is left as it is


def reloaded(net):
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    fresh = put_masks(small_net())
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


@pytest.mark.parametrize("change", [reloaded, copy.deepcopy, nn.Module.double])
def test_threshold_and_sharing_survive(change):
    net, x = scatter(put_masks(small_net())), torch.randn(4, 5)
    pruned, old = net(x).detach(), {id(mask.scores) for mask in masks(net)}
    other = change(net)
    blocks, rows, columns = masks(other)
    assert_close(other(x.to(blocks.scores.dtype)).float(), pruned)
    assert [mask.threshold.item() for mask in (blocks, rows, columns)] == pytest.approx([0.4] * 3)
    assert rows.scores is columns.scores and rows.scores is not blocks.scores
    assert other is net or not {id(mask.scores) for mask in masks(other)} & old  # not with the old net
    assert sum(key.endswith("scores") for key in other.state_dict()) == 3  # once for each of its users


def test_scores_and_masks_stay_fp32_under_autocast():
    layer, x = nn.Linear(6, 4), torch.randn(3, 6)
    mask = mask_weight(layer, (2, 3))
    mask.scores.data[0, 0] = EDGE + 1e-3  # alive; rounded to bf16 it would be −2.203, and dead
    set_threshold(layer, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        y, W, M, R = layer(x), layer.weight, mask.block_mask(), penalty(layer)
        loss = y.float().pow(2).sum() + R
    loss.backward()
    assert y.dtype == torch.bfloat16 and M.all() and W.count_nonzero() == W.numel()
    assert_close(R, mask.scores.sigmoid().mean(), rtol=1e-6, atol=0)
    S = mask.scores
    assert {t.dtype for t in (W, M, R, S, S.grad, original(layer).grad)} == {torch.float32}


# ------------------------------------------------------------------------------------ other modules


def test_a_convolution_is_a_matrix_of_out_by_in_kh_kw():
    conv, x = nn.Conv2d(3, 4, (2, 5)), torch.randn(2, 3, 6, 7)
    W, b = conv.weight.detach().clone(), conv.bias.detach().clone()
    mask = mask_weight(conv, (1, 7))  # of 4 × 30: ragged, and a block may span two inputs
    scatter(conv)
    mask.scores.data[2] = DEAD
    M = mask_by_loop(mask.scores, (4, 30), (1, 7)).view(4, 3, 2, 5)
    assert_close(conv(x), F.conv2d(x, W * M, b * torch.tensor([1, 1, 0, 1])))


def test_a_dimension_of_two_convolutions_is_a_channel():
    conv1, conv2, x = nn.Conv2d(3, 5, (2, 1)), nn.Conv2d(5, 4, (2, 3)), torch.randn(2, 3, 6, 7)
    W1, b1, W2, b2 = (p.detach().clone() for conv in (conv1, conv2) for p in conv.parameters())
    S, keep = mask_dimensions(conv1, conv2), [0, 2, 4]
    set_threshold(nn.ModuleList([conv1, conv2]), 0.1)
    S.data[[1, 3]] = DEAD
    cut = F.conv2d(F.conv2d(x, W1[keep], b1[keep]).relu(), W2[:, keep], b2)
    assert_close(conv2(conv1(x).relu()), cut)


def test_multihead_attention():
    """in_proj holds query, key and value, three heads of size 2 each: prune query 2 and value 1."""
    attention, x = nn.MultiheadAttention(6, 3), torch.randn(4, 5, 6)
    plain = copy.deepcopy(attention)
    mask = mask_weight(attention, (2, 6), weight="in_proj_weight", bias="in_proj_bias")
    set_threshold(attention, 0.1)
    mask.scores.data[[2, 7]] = DEAD
    for row in (4, 5, 14, 15):
        plain.in_proj_weight.data[row] = plain.in_proj_bias.data[row] = 0
    assert_close(attention(x, x, x)[0], plain(x, x, x)[0])
    with torch.no_grad():  # torch's fast path reads the weights in its own way
        assert_close(attention.eval()(x, x, x)[0], plain.eval()(x, x, x)[0])
    assert names_and_types(bake(attention)) == names_and_types(plain)


# ------------------------------------------------------------------- what is refused; known counts


@pytest.mark.parametrize("refused, message", [
    (lambda: mask_weight(nn.Linear(5, 7), (8, 1)), "8x1 does not fit a weight of 7x5"),
    (lambda: mask_weight(nn.Linear(5, 7), (1, 6)), "1x6 does not fit a weight of 7x5"),
    (lambda: mask_weight(nn.Linear(5, 7), (0, 1)), "0x1 does not fit"),
    (lambda: mask_weight(nn.Linear(5, 7), (1, 0)), "1x0 does not fit"),
    (lambda: mask_weight(nn.LayerNorm(5), (1, 1)), "two and more dimensions"),
    (lambda: BlockMask((5, 7), (2, 3), scores=nn.Parameter(torch.zeros(7))), "7 shared scores for 3x3"),
    (lambda: mask_weight(put_masks(small_net())[0], (1, 1)), "parametrized already"),
    (lambda: mask_dimensions(nn.Linear(5, 7), nn.Linear(6, 3)), "fc1 has 7 outputs but fc2 6 inputs"),
    (lambda: penalty(put_masks(small_net()), {"atention": 1.0}), "atention"),
    (lambda: penalty(small_net()), "masks"),
    (lambda: threshold_schedule(0, 100, flat_start=40, flat_end=60), "no step is left"),
    (lambda: threshold_schedule(0, 100, flat_start=40, flat_end=59), "no step is left"),     # a jump is no rise
    (lambda: threshold_schedule(99, 100, flat_start=90, flat_end=60), "no step is left")])
def test_what_is_refused(refused, message):
    with pytest.raises(ValueError, match=message):
        refused()


@pytest.mark.parametrize("block, ffn, tied, tensors, scores", [
    pytest.param((32, 32), "dimensions", False, 48 + 12, 64_512, id="hybrid"),
    pytest.param((32, 32), "blocks", False, 72, 82_944, id="block"),
    pytest.param((64, 768), "dimensions", False, 48 + 12, 37_440, id="struct"),
    pytest.param((64, 768), "dimensions", True, 12 + 12, 144 + 36_864, id="struct, tied")])
def test_score_counts_of_bert_base(block, ffn, tied, tensors, scores):
    """12 layers of query, key, value, out, fc1 and fc2; on the meta device, which holds no numbers."""
    net, linear = nn.ModuleList(), lambda inputs, outputs: nn.Linear(inputs, outputs, device="meta")
    for _ in range(12):
        S, attention = None, [linear(768, 768) for _ in range(4)]
        fc1, fc2 = linear(768, 3072), linear(3072, 768)
        for layer, b in zip(attention, [block] * 3 + [block[::-1]]):  # out: the block transposed
            S = mask_weight(layer, b, scores=S if tied else None).scores
        if ffn == "dimensions":
            mask_dimensions(fc1, fc2)
        else:
            mask_weight(fc1, block)
            mask_weight(fc2, block)
        net.extend([*attention, fc1, fc2])
    numels = [mask.scores.numel() for mask in masks(net)]
    distinct = {id(mask.scores): mask.scores.numel() for mask in masks(net)}
    assert len(numels) == 72 and (len(distinct), sum(distinct.values())) == (tensors, scores)
