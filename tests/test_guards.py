"""blockprune.py in other people's training code: it does what they expect, or says why not.

In order: torch.func; the precision of scores; what is never learned; which act may be cut; shared
scores in checkpoints; layers with a gate; weights stored (in, out); tied weights; heads cut by
hand; shards. Letters as in blockprune.py.
"""
import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from blockprune import (BlockMask, bake, cut_dimensions, cut_heads, density, mask_dimensions,
                        mask_weight, masks, parameter_groups, penalty, set_threshold)

DEAD = -9.0     # a score far below every τ


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def scatter(model, threshold=0.4):
    """Spread each mask's scores over −2 … 2 in random order: some are dead then, some alive."""
    for S in {id(mask.scores): mask.scores for mask in masks(model)}.values():
        values = torch.linspace(-2, 2, S.numel())
        order = torch.randperm(S.numel())
        S.data.copy_(values[order].view_as(S))
    set_threshold(model, threshold)
    return model


# --------------------------------------------------------------------------------------- torch.func


def masked_net():
    net = nn.Sequential(
        nn.Linear(5, 7),
        nn.Tanh(),
        nn.Linear(7, 9),
        nn.GELU(),
        nn.Linear(9, 3),
    )
    mask_weight(net[0], (2, 3), kind="attention")
    mask_dimensions(net[2], net[4])
    return scatter(net)


def loss_of(net, parameters, x):
    return torch.func.functional_call(net, parameters, (x,)).pow(2).sum()


def test_func_grad_is_backward():
    net = masked_net()
    x = torch.randn(4, 5)
    net(x).pow(2).sum().backward()
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    grads = torch.func.grad(lambda p: loss_of(net, p, x))(parameters)
    for name, p in net.named_parameters():
        assert_close(grads[name], p.grad)


def test_vmap_of_grad_gives_each_sample_its_own_gradient():
    net = masked_net()
    x = torch.randn(4, 5)
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    grad = torch.func.grad(lambda p, row: loss_of(net, p, row))
    each = torch.func.vmap(grad, in_dims=(None, 0))(parameters, x)
    for i in range(len(x)):
        alone = grad(parameters, x[i])
        for name in parameters:
            assert_close(each[name][i], alone[name])


def test_vmap_over_scores_is_a_loop_over_masks():
    mask = BlockMask((5, 7), (2, 3))
    set_threshold(mask, 0.4)
    many = torch.randn(6, 3, 3)
    weight = torch.randn(5, 7)
    run = lambda S: torch.func.functional_call(mask, {"scores": S}, (weight,))
    expected = torch.stack([run(S) for S in many])
    assert torch.equal(torch.func.vmap(run)(many), expected)


# ------------------------------------------------------------------------- the precision of scores


def bf16_before(net):
    put_two_kinds(net.to(torch.bfloat16))


def bf16_after(net):
    put_two_kinds(net)
    net.to(torch.bfloat16)


def half_after(net):
    put_two_kinds(net)
    net.half()


def device_and_dtype_at_once(net):
    put_two_kinds(net)
    net.to("cpu", torch.bfloat16)


def type_after(net):
    put_two_kinds(net)
    net.type(torch.float16)


def bf16_by_default(net):
    torch.set_default_dtype(torch.bfloat16)
    try:
        put_two_kinds(net.to(torch.bfloat16))
    finally:
        torch.set_default_dtype(torch.float32)


def put_two_kinds(net):
    mask_weight(net[0], (2, 3), kind="attention")
    mask_dimensions(net[1], net[2])


@pytest.mark.parametrize("change", [bf16_before, bf16_after, half_after, device_and_dtype_at_once,
                                    type_after, bf16_by_default])
def test_scores_and_threshold_are_fp32_in_a_model_of_half_precision(change):
    net = nn.Sequential(
        nn.Linear(5, 7),
        nn.Linear(7, 9),
        nn.Linear(9, 3),
    )
    change(net)
    set_threshold(net, 0.1)
    blocks, rows, columns = masks(net)
    assert net[0].weight.dtype in (torch.bfloat16, torch.float16)
    assert rows.scores is columns.scores
    for mask in (blocks, rows, columns):
        assert mask.scores.dtype == torch.float32
        assert torch.equal(mask.threshold, torch.tensor(0.1))
    # A step of 1e-3 at −2 is lost in bf16: its neighbours there are 0.0156 away.
    optimizer = torch.optim.Adam(parameter_groups(net, lr=0.0, score_lr=1e-3))
    rows.scores.data.fill_(-2)
    for _ in range(10):
        optimizer.zero_grad()
        penalty(net).backward()
        optimizer.step()
    assert_close(rows.scores, torch.full((9,), -2.01))
    dtype = net[0].weight.dtype
    x = torch.randn(4, 5, dtype=dtype)
    assert net(x).dtype == dtype


def test_half_precision_moves_scores_to_the_device_and_keeps_their_gradients():
    mask = BlockMask((4, 6), (2, 3))
    mask.scores.grad = torch.full((2, 2), 1 + 2.0 ** -20)
    mask.half()
    assert torch.equal(mask.scores.grad, torch.full((2, 2), 1 + 2.0 ** -20))
    mask.to("meta", torch.bfloat16)
    assert mask.scores.device.type == mask.threshold.device.type == "meta"
    assert mask.scores.dtype == mask.threshold.dtype == torch.float32


def test_scores_may_be_fp64():
    mask = BlockMask((4, 6), (2, 3)).double()
    assert mask.scores.dtype == mask.threshold.dtype == torch.float64
    assert mask.float().scores.dtype == torch.float32


def test_given_scores_of_half_precision_are_refused():
    scores = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="scores of torch.bfloat16"):
        BlockMask((4, 6), (2, 3), scores)


# --------------------------------------------------------------------------- what is never learned


def test_parameter_groups_refuse_where_every_score_is_frozen():
    net = masked_net()
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    net[4].parametrizations.bias.original.requires_grad_(True)
    with pytest.raises(ValueError, match="every score is frozen.*requires_grad"):
        parameter_groups(net, 3e-5, score_lr=1e-2)
    # Without a rate for scores it is meant so: the pruned weights stay at zero while others learn.
    [group] = parameter_groups(net, 3e-5, score_lr=None)
    assert group["lr"] == 3e-5
    # Some may be frozen, and a model may have no masks.
    net[0].parametrizations.weight[0].scores.requires_grad_(True)
    assert parameter_groups(net, 3e-5, score_lr=1e-2)[-1]["lr"] == 1e-2
    frozen = nn.Linear(5, 7).requires_grad_(False)
    assert parameter_groups(frozen, 3e-5, score_lr=1e-2) == []


@pytest.mark.parametrize("what", ["scores", "threshold"])
@pytest.mark.parametrize("function", [density, bake])
def test_nan_is_no_pruned_block(function, what):
    net = masked_net()
    mask = net[0].parametrizations.weight[0]
    getattr(mask, what).data.view(-1)[0] = torch.nan
    with pytest.raises(ValueError, match="NaN.*0.parametrizations.weight.0"):
        function(net)
    assert len(list(masks(net))) == 3       # bake left all as it was


def test_infinite_scores_are_kept_or_pruned():
    layer = nn.Linear(3, 1)
    mask = mask_weight(layer, (1, 1))
    mask.scores.data = torch.tensor([[torch.inf, -torch.inf, 0.0]])
    set_threshold(layer, 0.1)
    assert density(layer)["all"] == pytest.approx(2 / 3)
    assert (bake(layer).weight != 0).tolist() == [[True, False, True]]


def test_bake_warns_where_nothing_was_learned():
    # τ was never set: no score, however low, can be pruned.
    net = masked_net()
    set_threshold(net, 0)
    with pytest.warns(UserWarning, match="τ from 0 to 0.*set_threshold.*optimiser"):
        bake(net)
    # The optimiser does not know the scores: they are where they started.
    layer = nn.Linear(5, 7)
    mask_weight(layer, (1, 1))
    set_threshold(layer, 0.1)
    with pytest.warns(UserWarning, match="scores from 0 to 0"):
        bake(copy.deepcopy(layer))
    # A score rate of 3e-5 moves them, but not to where a block goes.
    layer.parametrizations.weight[0].scores.data.fill_(-0.02)
    with pytest.warns(UserWarning, match="scores from -0.02 to -0.02"):
        bake(layer)


def test_bake_warns_of_nothing_else():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bake(masked_net())
        bake(nn.Linear(5, 7))
        with torch.device("meta"):      # which holds no numbers to look at
            bake(masked_net())


# ------------------------------------------------------------------- cutting: which act is allowed


@pytest.mark.parametrize("act", [
    pytest.param(lambda x: x.softmax(-1), id="softmax"),
    pytest.param(nn.LayerNorm(9), id="LayerNorm"),
    pytest.param(F.glu, id="GLU"),
    pytest.param(lambda x: x - x.mean(-1, keepdim=True), id="minus the mean"),
    pytest.param(lambda x: x.cumsum(-1), id="cumsum"),
    pytest.param(lambda x: x.flip(-1), id="flip"),
    pytest.param(lambda x: x / x.abs().max(), id="by the largest"),
    pytest.param(nn.PReLU(9, init=0.5), id="PReLU of 9 channels")])
def test_cut_dimensions_refuses_an_act_that_mixes_dimensions(act):
    fc1 = nn.Linear(5, 9)
    fc2 = nn.Linear(9, 3)
    fc1.weight.data[[2, 5]] = 0
    before = copy.deepcopy(fc1.state_dict())
    with pytest.raises(ValueError, match="act.*single numbers"):
        cut_dimensions(fc1, fc2, act)
    assert fc1.out_features == 9 and torch.equal(fc1.weight, before["weight"])


@pytest.mark.parametrize("act", [
    F.gelu, F.relu, torch.tanh, nn.SiLU(), nn.PReLU().double(), nn.Identity(), nn.ELU(inplace=True),
    lambda x: F.gelu(x, approximate="tanh")])
@pytest.mark.parametrize("width", [1, 2, 9])
def test_cut_dimensions_takes_an_act_of_single_numbers(act, width):
    fc1 = nn.Linear(5, width).double()
    fc2 = nn.Linear(width, 3).double()
    x = torch.randn(4, 5).double()
    fc1.weight.data[0] = 0
    expected = fc2(act(fc1(x)))
    assert cut_dimensions(fc1, fc2, act) == width - 1
    assert_close(fc2(act(fc1(x))), expected, rtol=0, atol=1e-12)


# -------------------------------------------------------------------- shared scores in checkpoints


def tied_net():
    """Scores shared by hand by a fresh mask and a given one, and by mask_dimensions."""
    net = nn.ModuleList([
        nn.Linear(6, 4),
        nn.Linear(6, 4),
        nn.Linear(5, 7),
        nn.Linear(7, 3),
    ])
    first = mask_weight(net[0], (2, 6))
    mask_weight(net[1], (2, 6), scores=first.scores)
    mask_dimensions(net[2], net[3])
    return net


def test_no_two_entries_of_a_checkpoint_share_memory():
    net = scatter(tied_net())
    state = net.state_dict()
    assert sum(name.endswith("scores") for name in state) == 4
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)
    for name, tensor in state.items():
        if name.endswith("threshold"):
            assert torch.equal(tensor, torch.tensor(0.4))
        else:
            assert torch.equal(tensor, net.get_parameter(name))


def test_a_strict_load_keeps_shared_scores_tied():
    net = scatter(tied_net())
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    fresh = tied_net()
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    a, b, rows, columns = masks(fresh)
    assert a.scores is b.scores and rows.scores is columns.scores
    for mask, other in zip(masks(net), masks(fresh)):
        assert torch.equal(mask.scores, other.scores)
    twin = copy.deepcopy(fresh).state_dict()
    assert len({tensor.data_ptr() for tensor in twin.values()}) == len(twin)


# ------------------------------------------------------------------------------ layers with a gate


class Gated(nn.Module):
    """down(act(gate(x)) · up(x)), as in LLaMA and T5 1.1."""

    def __init__(self, act, bias):
        super().__init__()
        self.up = nn.Linear(5, 9, bias=bias)
        self.gate = nn.Linear(5, 9, bias=bias)
        self.down = nn.Linear(9, 3, bias=bias)
        self.act = act

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("act", [F.silu, F.relu, torch.sigmoid])
def test_a_masked_gated_layer_is_cut_exactly(act, bias):
    layer = Gated(act, bias).double()
    x = torch.randn(4, 5).double()
    scores = mask_dimensions(layer.up, layer.down, gate=layer.gate)
    assert [mask.scores is scores for mask in masks(layer)] == [True] * 3
    assert scores.shape == (9,) and len(list(masks(layer))) == 3
    set_threshold(layer, 0.1)
    scores.data[[1, 4, 8]] = DEAD
    expected = layer(x)
    bake(layer)
    assert torch.equal(layer(x), expected)
    assert cut_dimensions(layer.up, layer.down, layer.act, gate=layer.gate) == 6
    sizes = (layer.up.out_features, layer.gate.out_features, layer.down.in_features)
    assert sizes == (6, 6, 6)
    assert_close(layer(x), expected, rtol=0, atol=1e-12)


def test_what_of_a_gated_layer_is_a_constant():
    layer = Gated(F.relu, bias=True).double()
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
    rows = up.weight[4:].clone()
    expected = layer(x)
    assert cut_dimensions(up, down, F.relu, gate=gate) == 5
    assert torch.equal(up.weight, rows)
    assert_close(layer(x), expected, rtol=0, atol=1e-12)


def test_a_gate_that_does_not_fit_is_refused_with_nothing_changed():
    up, down = nn.Linear(5, 9), nn.Linear(9, 3)
    with pytest.raises(ValueError, match="gate"):
        mask_dimensions(up, down, gate=nn.Linear(5, 8))
    masked = nn.Linear(5, 9)
    mask_weight(masked, (1, 1))
    with pytest.raises(ValueError, match="parametrized"):
        mask_dimensions(up, down, gate=masked)
    assert not list(masks(nn.ModuleList([up, down])))
    with pytest.raises(ValueError, match="gate"):
        cut_dimensions(up, down, F.silu, gate=nn.Linear(5, 8))
    assert up.out_features == 9


# --------------------------------------------------------------- weights that are stored (in, out)


class Conv1D(nn.Module):
    """As in transformers: the weight is (in, out)."""

    def __init__(self, outputs, inputs, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.ones(outputs)) if bias else None


class Child(Conv1D):
    pass


@pytest.mark.parametrize("module", [nn.ConvTranspose1d(8, 8, 1), nn.ConvTranspose2d(8, 8, 3),
                                    nn.ConvTranspose3d(8, 8, 1), nn.ConvTranspose2d(8, 5, 3),
                                    Conv1D(8, 8), Child(8, 8), Conv1D(8, 6)])
def test_a_weight_stored_in_out_is_refused_unless_it_is_said(module):
    module = copy.deepcopy(module)
    with pytest.raises(ValueError, match='output_dim=1.*bias=""'):
        mask_weight(module, (1, 1))
    assert not list(masks(module))
    mask_weight(module, (1, 1), bias="")
    assert list(module.parametrizations) == ["weight"]


@pytest.mark.parametrize("module", [nn.ConvTranspose1d(8, 8, 1), Conv1D(8, 8), Conv1D(8, 6)])
def test_output_dim_1_goes_with_a_weight_stored_in_out(module):
    module = copy.deepcopy(module)
    mask = mask_weight(module, (2, 2), output_dim=1)
    set_threshold(module, 0.1)
    mask.scores.data[:, 0] = DEAD
    assert (module.bias != 0).tolist() == [False] * 2 + [True] * 6


def test_a_transposed_convolution_with_a_kernel_is_told_the_way_out():
    with pytest.raises(ValueError, match='bias=""'):
        mask_weight(nn.ConvTranspose2d(8, 5, 3), (1, 1), output_dim=1)


def test_without_a_bias_there_is_nothing_to_refuse():
    for module in (nn.ConvTranspose2d(8, 8, 3, bias=False), Conv1D(8, 8, bias=False)):
        mask_weight(module, (1, 1))
    # What is stored (out, in) is left alone, whatever its name resembles.
    mask_weight(nn.Conv1d(8, 8, 1), (1, 1))
    # 0 may be said, where a class named Conv1D is somebody else's.
    mask_weight(Conv1D(8, 8), (1, 1), output_dim=0)


def test_mask_dimensions_refuses_weights_stored_in_out():
    """Their sizes fit by chance: (8, 12) and (12, 8), with 12 inner dimensions, as in GPT-2."""
    with pytest.raises(ValueError, match="Conv1D.*in, out"):
        mask_dimensions(Conv1D(12, 8, bias=False), Conv1D(8, 12, bias=False))
    conv = nn.Conv2d(3, 8, 1)
    with pytest.raises(ValueError, match="ConvTranspose2d.*in, out"):
        mask_dimensions(conv, nn.ConvTranspose2d(8, 8, 1, bias=False))
    assert not list(masks(conv))
    with pytest.raises(ValueError, match="output_dim=1"):
        mask_weight(nn.ConvTranspose2d(8, 8, 1), (1, 1), output_dim=0)


# ------------------------------------------------------------------------------------ tied weights


def tied_lm():
    net = nn.ModuleDict({
        "embedding": nn.Embedding(9, 5),
        "head": nn.Linear(5, 9, bias=False),
    })
    net["head"].weight = net["embedding"].weight
    return net


def test_bake_refuses_to_untie_a_weight():
    net = tied_lm()
    mask_weight(net["head"], (1, 5))
    scatter(net)
    with pytest.raises(ValueError, match="another owner.*head.*scores="):
        bake(net)
    assert len(list(masks(net))) == 1
    # The way out that it names: a copy of its own for the other owner.
    net["embedding"].weight = nn.Parameter(net["embedding"].weight.clone())
    bake(net)
    rows_of_head = net["head"].weight.any(dim=1)
    rows_of_embedding = net["embedding"].weight.any(dim=1)
    assert rows_of_head.sum() < 9
    assert rows_of_embedding.sum() == 9


def test_tied_weights_masked_alike_are_one_parameter_afterwards():
    net = tied_lm()
    mask = mask_weight(net["head"], (1, 5))
    mask_weight(net["embedding"], (1, 5), scores=mask.scores)
    scatter(net)
    expected = net["head"].weight.clone()
    bake(net)
    assert net["head"].weight is net["embedding"].weight
    assert torch.equal(net["head"].weight, expected) and not expected.all()


def test_tied_weights_masked_otherwise_are_refused():
    net = tied_lm()
    mask_weight(net["head"], (1, 5))
    mask_weight(net["embedding"], (1, 5))
    scatter(net)
    with pytest.raises(ValueError, match="another owner"):
        bake(net)


def test_a_tied_bias_is_refused_and_may_go_without_a_mask():
    def net_with_a_tied_bias():
        net = nn.ModuleDict({"head": nn.Linear(5, 9), "other": nn.Linear(5, 9)})
        net["other"].bias = net["head"].bias
        return net

    net = net_with_a_tied_bias()
    mask_weight(net["head"], (1, 5))
    with pytest.raises(ValueError, match='head.*other.*bias=""'):
        bake(scatter(net))
    # The way out that it names.
    net = net_with_a_tied_bias()
    mask_weight(net["head"], (1, 5), bias="")
    bake(scatter(net))
    assert net["head"].bias is net["other"].bias
    assert not net["head"].weight.all()


def test_a_module_that_is_used_twice_has_one_owner():
    layer = nn.Linear(5, 5)
    mask_weight(layer, (1, 1))
    net = scatter(nn.Sequential(layer, nn.Tanh(), layer))
    bake(net)
    assert net[0] is net[2] and not net[0].weight.all()


# -------------------------------------------------------------------- heads of four plain linears


def attend(x, query, key, value, out, heads):
    """Attention as anyone writes it, whose heads are equal slices of rows; x: (B, T, E)."""
    def split(y):
        return y.view(len(x), x.shape[1], heads, 2).transpose(1, 2)     # (B, H, T, 2)
    Q = split(query(x))
    K = split(key(x))
    V = split(value(x))
    mixed = F.scaled_dot_product_attention(Q, K, V).transpose(1, 2)     # (B, T, H, 2)
    return out(mixed.flatten(2))


@pytest.mark.parametrize("bias", [True, False])
def test_heads_of_four_plain_linears_are_cut_exactly(bias):
    """Five heads of size 2: one without values, one that nobody reads, three that stay."""
    query = nn.Linear(7, 10, bias=bias).double()
    key = nn.Linear(7, 10, bias=bias).double()
    value = nn.Linear(7, 10, bias=bias).double()
    out = nn.Linear(10, 4, bias=bias).double()
    x = torch.randn(3, 6, 7).double()
    value.weight.data[2:4] = 0          # head 1: its values are their bias, at every token
    out.weight.data[:, 6:8] = 0         # head 3
    key.weight.data[0:2] = 0            # head 0: uniform attention still adds a mean: it stays
    out.weight.data[:, 8:9] = 0         # head 4: half of it is left, it stays
    expected = attend(x, query, key, value, out, heads=5)
    rows = query.weight[[0, 1, 4, 5, 8, 9]].clone()
    assert cut_heads(query, key, value, out, head_size=2) == 3
    assert torch.equal(query.weight, rows)
    for linear in (query, key, value):
        assert linear.out_features == len(linear.weight) == 6
    assert out.in_features == out.weight.shape[1] == 6
    assert_close(attend(x, query, key, value, out, heads=3), expected, rtol=0, atol=1e-12)
    assert (out.bias is not None) == bias


def test_a_constant_of_heads_makes_a_bias_where_out_had_none():
    query = nn.Linear(7, 4).double()
    key = nn.Linear(7, 4).double()
    value = nn.Linear(7, 4).double()
    out = nn.Linear(4, 3, bias=False).double()
    x = torch.randn(3, 6, 7).double()
    value.weight.data[0:2] = 0
    constant = out.weight[:, 0:2] @ value.bias[0:2]
    expected = attend(x, query, key, value, out, heads=2)
    assert cut_heads(query, key, value, out, head_size=2) == 1
    assert_close(out.bias, constant)
    assert_close(attend(x, query, key, value, out, heads=1), expected, rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------- shards


class Shard(torch.Tensor):
    """The scores as FSDP2 leaves them on one of two ranks: a half of them, and a way to all."""

    whole: torch.Tensor

    def full_tensor(self):
        return self.whole


def test_density_and_penalty_are_of_the_full_tensor():
    layer = nn.Linear(4, 6)
    mask = mask_weight(layer, (2, 4))
    set_threshold(layer, 0.1)
    whole = torch.tensor([[DEAD], [1.0], [2.0]], requires_grad=True)
    shard = torch.zeros(1, 1).as_subclass(Shard)
    shard.whole = whole
    del mask.scores
    mask.scores = shard
    assert density(layer)["all"] == pytest.approx(2 / 3)
    assert_close(penalty(layer), whole.sigmoid().mean())
    penalty(layer).backward()
    # Of the mean of three σ(S): σ′ = σ (1 − σ), divided by three.
    sigma = whole.detach().sigmoid()
    assert_close(whole.grad, sigma * (1 - sigma) / 3)
