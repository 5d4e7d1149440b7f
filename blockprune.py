"""Block pruning: fine-tune a network while learning which blocks of its weights it can do without.

The whole method of
    Lagunas, Charlaix, Sanh, Rush: Block Pruning For Faster Transformers, EMNLP 2021,
    built on Sanh, Wolf, Rush: Movement Pruning, NeurIPS 2020,
in one file. It imports torch alone and knows nothing of BERT: copy it into your own project.
Reference code: huggingface/nn_pruning at 0cef2b2, cited below as [R:file].

SPDX-License-Identifier: MIT
Copyright (c) 2026 The Block Pruning reference contributors, see LICENSE.

A *block* is any r × c tile of a weight matrix: 1 × 1 is soft movement pruning, 32 × 32 block
pruning, (head size, in) a head's rows of Q, K or V, (1, in) a row, (out, 1) a column. Each block
has one learned number, its score. Hybrid pruning adds to fine-tuning what is marked +:

    for layer in model.layers:
        for linear in (layer.query, layer.key, layer.value, layer.out):         # + blocks
            mask_weight(linear, (32, 32), kind="attention")                     # +
        mask_dimensions(layer.fc1, layer.fc2)                                   # + inner dimensions
    optimizer = AdamW(parameter_groups(model, lr=3e-5, score_lr=1e-2))          # + scores' own rate
    for step, batch in enumerate(batches):          # warmup: steps of the learning rate's warm-up
        tau = threshold_schedule(step, total, flat_start=warmup, flat_end=10 * warmup)      # +
        set_threshold(model, tau)                                               # +
        loss = task_loss(model, batch)
        loss = loss + final_lambda * tau / 0.1 * penalty(model)                 # + 0.1: the final τ
        loss.backward(); optimizer.step(); optimizer.zero_grad()
    bake(model)                                                                 # + W becomes W ⊙ M
    for layer in model.layers:                                                  # + what is empty is
        cut_heads(layer.query, layer.key, layer.value, layer.out, head_size=64) # + really removed
        cut_dimensions(layer.fc1, layer.fc2, act)                               # +

    W    a weight matrix, R × C = (out, in)      σ    the sigmoid
    S    scores, one per block                   τ    the threshold that σ(S) is compared with
    r×c  the block                               λ    how hard the penalty pushes scores down
    M(S) the mask: on the grid of blocks, (⌈R/r⌉, ⌈C/c⌉), or repeated to the weight's R × C
    H    heads of size D     E  hidden size      F    inner dimensions of a feed-forward layer

"Paper:" is the authors' method, "Note:" our remark, "Differs:" where we deviate. All checks come
before the first change: after a ValueError the model is as it was. Left out, since the paper's
final models do not use them: top-k, L0 and magnitude masks.
"""
import math
import warnings
from typing import Callable, Dict, Iterator, List, Mapping, Optional, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

# ---------------------------------------------------------------------------------------- the mask


class StraightThrough(torch.autograd.Function):
    """M(S) = 1[σ(S) > τ] forward, the identity backward.

    The derivative of a step is 0 nearly everywhere: nothing would be learned. So it is replaced by
    1 ([R:modules/binarizer.py]). Sketch of the gradient, with W′ = W ⊙ M(S):

        dL/dS = Σ over the block of dL/dW′ ⊙ W        (Sanh et al. 2020, eq. (2))
        dL/dW = dL/dW′ ⊙ M

    A step changes a kept weight by −(learning rate) · dL/dW′. Where this shrinks |W|, dL/dW′ ⊙ W is
    positive and S falls; where it grows |W|, S rises: "movement pruning". Pruned weights get no
    gradient, but their score does, since its gradient has W, not W′: the block can come back.
    """

    @staticmethod
    def forward(ctx, scores: Tensor, threshold: Tensor) -> Tensor:
        kept = torch.sigmoid(scores) > threshold
        return kept.to(scores.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        # Paper: the gradient is not multiplied by σ′(S). The sum over a block needs no line here:
        # M is repeated over its block in weight_mask(), and autograd sums what comes back.
        return grad, None


class BlockMask(nn.Module):
    """The learned mask of one weight, as a torch parametrization: W ↦ W ⊙ M(S).

    shape: (R, C). A weight of more than two dimensions is seen as the matrix `weight.flatten(1)`.
    block: (r, c). Blocks at the edge of the matrix may be smaller. Differs: the reference asserts
        exact division, and by default keeps at least 0.5 % of the blocks; here all may go.
    share: a mask of the same kind whose scores this one uses too. Their grids are equal, or both
        are one row or column of as many blocks: (H, 1) and (1, H).
    kind: the group that penalty() and density() count this weight in.

    The scores are `mask.owner.scores`, a parameter with the owner's grid. A mask that shares has no
    scores itself; any other is its own owner. Scores and τ stay fp32 in a model of fp16 or bf16.
    """

    def __init__(self, shape: Sequence[int], block: Sequence[int],
                 share: Optional["BlockMask"] = None, kind: str = "ffn"):
        super().__init__()
        R, C = shape
        r, c = block
        if not (1 <= r <= R and 1 <= c <= C):
            raise ValueError(f"a block of {r}x{c} does not fit a weight of {R}x{C}")
        self.shape = (R, C)
        self.block = (r, c)
        self.grid = (math.ceil(R / r), math.ceil(C / c))
        self.kind = kind
        dtype = torch.promote_types(torch.float32, torch.get_default_dtype())
        # τ is a buffer: it is saved with the model, so a reloaded model still prunes.
        self.register_buffer("threshold", torch.zeros((), dtype=dtype))
        if share is None:
            owner = self
            # At the start every block is kept: σ(0) is 0.5, far above any τ in use.
            self.scores = nn.Parameter(torch.zeros(self.grid, dtype=dtype))
        else:
            _check_share(share, self.grid, kind)
            owner = share.owner
        # `self.owner = owner` would register the owner's scores here for a second time.
        self.__dict__["owner"] = owner

    def block_mask(self) -> Tensor:
        """M(S) on the grid of blocks, (⌈R/r⌉, ⌈C/c⌉)."""
        scores = _whole(self.owner.scores)
        mask = StraightThrough.apply(scores, self.threshold)
        return mask.view(self.grid)         # the owner's may be (F, 1) where this is (1, F)

    def weight_mask(self) -> Tensor:
        """M(S) on the weight, R × C, or of length 1 along a dimension that one block spans.

        Blocks of 2 × 2 on a weight of 3 × 4 have a grid of 2 × 2, here [[p, q], [s, t]]:

            p p q q
            p p q q
            s s t t         the fourth row is cut off, since the weight has three
        """
        R, C = self.shape
        rows, columns = self.grid
        # What one block spans is not repeated: broadcasting does it.
        r = self.block[0] if rows > 1 else 1
        c = self.block[1] if columns > 1 else 1
        mask = self.block_mask()[:, None, :, None]      # (rows, 1, columns, 1)
        mask = mask.expand(rows, r, columns, c)         # (rows, r, columns, c)
        mask = mask.reshape(rows * r, columns * c)      # each entry fills its r × c tile
        return mask[:R, :C]

    def forward(self, weight: Tensor) -> Tensor:
        _check_same_group(self.owner.scores, weight)
        mask = self.weight_mask().to(weight.dtype)
        masked = weight.flatten(1) * mask               # W′ = W ⊙ M(S), (R, C)
        return masked.view_as(weight)

    # model.half(), model.to(…) and their like come through here, and would make scores fp16. A step
    # under 0.0078 does not move a bf16 score of −2.2: its neighbours are 0.0156 away.
    def _apply(self, fn, recurse: bool = True):
        def at_least_fp32(tensor: Tensor) -> Tensor:
            converted = fn(tensor)
            if converted.is_floating_point() and converted.element_size() < 4:
                return tensor.to(converted.device, torch.float32)
            return converted
        return super()._apply(at_least_fp32, recurse)


class BiasMask(nn.Module):
    """The mask of a bias: an output that has no weight left loses its bias too, and so is 0.

    output_dim: the dimension of the weight that holds the outputs.
    """

    def __init__(self, mask: BlockMask, output_dim: int):
        super().__init__()
        self.__dict__["mask"] = mask        # not registered, as the owner in BlockMask
        self.output_dim = output_dim

    def forward(self, bias: Tensor) -> Tensor:
        # An output is alive if any of its weights is kept.
        # Paper: no gradient goes from the bias to the scores ([R:modules/masked_nn.py], bias_mask).
        mask = self.mask.weight_mask().detach()             # (R or 1, C or 1)
        alive = mask.amax(dim=1 - self.output_dim)          # an entry per output, or one for all
        return bias * alive.to(bias.dtype)


# --------------------------------------------------------------------------------- putting masks on


def mask_weight(module: nn.Module, block: Sequence[int], *, weight: str = "weight",
                bias: str = "bias", output_dim: Optional[int] = None,
                share: Optional[BlockMask] = None, kind: str = "ffn") -> BlockMask:
    """Put a block mask on one weight of a module, and on the bias that goes with it.

    From here on `module.weight` is W ⊙ M(S), and W is at `module.parametrizations.weight.original`.
    Any module will do that reads its weight as an attribute: nn.Linear, nn.MultiheadAttention.

    block, share, kind: see BlockMask. A block is a tile of the weight as it is stored.
    weight, bias: the names of the two parameters; bias="" leaves the bias without a mask.
    output_dim: the dimension of the weight that holds the outputs, 1 where weights are (in, out),
        as in GPT-2. By default it follows from the length of the bias; it has to be given for a
        square weight of a class that is not torch's own.
    """
    output_dim = _check_maskable(module, weight, bias, output_dim)
    W = getattr(module, weight)
    mask = BlockMask(W.flatten(1).shape, block, share, kind).to(W.device)
    # torch calls the mask whenever module.weight is read, in the forward pass or elsewhere.
    parametrize.register_parametrization(module, weight, mask)
    if getattr(module, bias, None) is not None:
        parametrize.register_parametrization(module, bias, BiasMask(mask, output_dim))
    return mask


def mask_dimensions(fc1: nn.Module, fc2: nn.Module, *, gate: Optional[nn.Module] = None,
                    kind: str = "ffn") -> BlockMask:
    """One score for each inner dimension of fc2(act(fc1(x))): row j of fc1 with column j of fc2.

    Paper: the feed-forward layers of Hybrid ([R:modules/masked_nn.py], 1d_alt). The gradient of a
    score is the sum over all that it masks: row j of dL/dW₁′ ⊙ W₁ and column j of dL/dW₂′ ⊙ W₂.

    fc1, fc2: linears or convolutions. gate: of a layer fc2(act(gate(x)) · fc1(x)), as in LLaMA; its
    row j has the same score. Returns the mask of fc1, which owns the scores, (F, 1).
    """
    gates = [] if gate is None else [gate]
    _check_layers([fc1] + gates, fc2, OUT_IN)
    for layer in [fc1, fc2] + gates:
        _check_maskable(layer, "weight", "bias", None)
    # A block of fc1 is a row: all that one output reads.
    owner = mask_weight(fc1, (1, fc1.weight[0].numel()), kind=kind)
    for layer in gates:
        mask_weight(layer, (1, layer.weight[0].numel()), share=owner, kind=kind)
    # A block of fc2 is a column, as wide as a kernel: 1 in a linear, kh · kw in a convolution.
    column = (len(fc2.weight), fc2.weight[0, 0].numel())
    mask_weight(fc2, column, share=owner, kind=kind)
    return owner


# -------------------------------------------------------------------- what a training loop asks for


def masks(model: nn.Module) -> Iterator[BlockMask]:
    """Every BlockMask of the model, in the order of its modules."""
    return (module for module in model.modules() if isinstance(module, BlockMask))


def _owners(model: nn.Module) -> List[BlockMask]:
    """The masks whose scores the model's masks use, each once, in the same order."""
    return list(dict.fromkeys(mask.owner for mask in masks(model)))


def threshold_schedule(step: int, total: int, flat_start: float, flat_end: float,
                       final: float = 0.1, initial: float = 0.0) -> float:
    """τ of a step, counted from 0: `initial`, then a cubic rise, then `final`.

        progress = (t − flat_start) / (total − flat_start − flat_end), clipped to 0 … 1
        τ(t) = final + (initial − final) · (1 − progress)³

    (Sanh et al. 2020, eq. (5); [R:patch_coordinator.py], schedule_threshold.) λ follows τ, as
    λ(t) = λ · τ(t) / final. flat_start, flat_end: for how many of the `total` steps τ is flat at
    either end; in the paper, multiples of the learning rate's warm-up. Differs: if no steps are
    left for the rise, the reference jumps to the final τ, or never leaves the initial one; here
    this is a ValueError.
    """
    rising = total - flat_start - flat_end
    if rising <= 1:         # a rise of one step would be a jump
        raise ValueError(f"no step is left for τ to rise: of {total} steps the first {flat_start} "
                         f"and the last {flat_end} are flat")
    progress = (step - flat_start) / rising
    progress = min(1, max(0, progress))
    return final + (initial - final) * (1 - progress) ** 3


def set_threshold(model: nn.Module, threshold: float) -> None:
    """Set τ in every mask of the model."""
    for mask in masks(model):
        mask.threshold.fill_(threshold)


def penalty(model: nn.Module, weights: Optional[Mapping[str, float]] = None) -> Tensor:
    """The penalty, a scalar, to be added to the loss as λ(t) · penalty.

        mean of a kind     1/N Σ mean σ(S), over the N score tensors of the kind
        penalty            1/K Σ λ_kind · mean of the kind, over the K kinds

    ([R:patch_coordinator.py], regularization_loss; σ is in [R:modules/masked_nn.py].) So a large
    matrix weighs no more than a small one, and λ must be found anew for each model: the push on one
    score is λ · λ_kind · σ′(S) / (K · N · number of scores in its tensor).
    weights: λ_kind by kind, 1 where not given. If all are 1 the penalty starts at 0.5.
    """
    owners_by_kind: Dict[str, List[BlockMask]] = {}
    for owner in _owners(model):
        owners_by_kind.setdefault(owner.kind, []).append(owner)
    if weights is None:
        weights = {}
    # A misspelt kind would change nothing, in silence.
    for kind in weights:
        if kind not in owners_by_kind:
            raise ValueError(f"no mask is of the kind {kind!r}: there are {sorted(owners_by_kind)}")

    total = 0.0
    for kind, owners in owners_by_kind.items():
        # The mean over a kind's score tensors, each of which is a mean over its blocks.
        kind_mean = sum(_whole(owner.scores).sigmoid().mean() for owner in owners) / len(owners)
        total = total + weights.get(kind, 1.0) * kind_mean
    return total / len(owners_by_kind)


def parameter_groups(model: nn.Module, lr: float, score_lr: Optional[float],
                     weight_decay: float = 0.0) -> List[dict]:
    """Optimiser groups: matrices, vectors (biases and norms) and scores. Empty groups are left out.

    Paper: scores learn at 1e-2, weights at 3e-5; one learning-rate schedule and one gradient clip
    act on all of them ([R:patch_coordinator.py], create_optimizer_groups; [R:sparse_trainer.py]).
    Note: scores must not decay toward 0, that is toward being kept. So their weight_decay of 0 is
    written out: AdamW's default is 0.01. score_lr: may be None if the model has no masks.
    """
    matrices = {"params": [], "lr": lr, "weight_decay": weight_decay}
    vectors = {"params": [], "lr": lr, "weight_decay": 0.0}
    scores = {"params": [], "lr": score_lr, "weight_decay": 0.0}
    ids_of_scores = {id(owner.scores) for owner in _owners(model)}
    for parameter in model.parameters():
        if id(parameter) in ids_of_scores:
            group = scores
        elif parameter.dim() > 1:
            group = matrices
        else:
            group = vectors
        # What is frozen stays frozen.
        if parameter.requires_grad:
            group["params"].append(parameter)
    return [group for group in (matrices, vectors, scores) if group["params"]]


@torch.no_grad()
def density(model: nn.Module) -> Dict[str, float]:
    """The fraction of the masked weights that their masks keep, by kind, and for "all" of them.

    Biases do not count. A weight that a mask keeps counts even where it is zero by itself.
    """
    _check_not_nan(model)
    kept: Dict[str, float] = {}
    size: Dict[str, int] = {}
    for mask in masks(model):
        # expand: where one block spans a dimension, the mask has length 1 there.
        kept_here = mask.weight_mask().expand(mask.shape).sum().item()
        for kind in (mask.kind, "all"):
            kept[kind] = kept.get(kind, 0) + kept_here
            size[kind] = size.get(kind, 0) + math.prod(mask.shape)
    return {kind: kept[kind] / size[kind] for kind in kept}


# ------------------------------------------------- from masks to zeros, and on to smaller matrices


@torch.no_grad()
def bake(model: nn.Module) -> nn.Module:
    """Fold every mask into its weight, in place: W becomes W ⊙ M(S), scores and masks are gone.

    The model computes the same function, in plain modules with the same parameters. Training on
    lets zeros grow back at once, by the optimiser's momentum alone: cut first, or do not bake, and
    freeze the scores. Under DDP wrap the model again. Bake and save whole models: the state_dict of
    a part lacks the scores of an owner outside it. Warns if nothing is pruned.
    """
    for module in _check_bakeable(model):
        # 1. What the module sees, W ⊙ M(S) and the masked bias, goes into W and b themselves. A
        #    tied weight may come here twice: M is 0 or 1, so the second time changes nothing.
        originals = {}
        for name, chain in module.parametrizations.items():
            chain.original.copy_(getattr(module, name))
            originals[name] = chain.original
        # 2. torch made nn.Linear a ParametrizedLinear(nn.Linear): go back to the base. Note:
        #    remove_parametrizations() would edit that class, which copies of the model share.
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]
        # 3. W and b are ordinary parameters of the module again.
        for name, parameter in originals.items():
            module.register_parameter(name, parameter)
    return model


@torch.no_grad()
def cut_heads(query: nn.Linear, key: nn.Linear, value: nn.Linear, out: nn.Linear,
              head_size: int) -> List[int]:
    """Remove, in place, the attention heads that add nothing or a constant. Returns those left.

    query, key, value: (H · D, in), baked; a head is D = head_size rows of each, in order.
    out: (E, H · D); the same head is D of its columns.

        columns of `out` all 0     the head adds nothing
        rows of `value` all 0      its values are bᵥ at every token. Attention weights sum to 1, so
                                   the head's output is bᵥ too: it adds out[:, head] · bᵥ[head]
                                   (0 if a BiasMask has masked bᵥ)

    The constant goes into the bias of `out`. This is exact only if attention weights sum to 1 (not
    with dropout of attention, sinks, or rows with every key masked) and if a head's output is
    attention · V alone (no relative values, no output gates). Not for grouped-query attention.
    Cut other per-head state, such as ALiBi's slopes or Swin's table, to the heads returned, and
    make the optimiser anew: weights and biases are new parameters.
    Differs: the reference removes a head as soon as query, key or value is empty. With an empty
    query or key the head still adds the mean of V: here it stays.
    """
    _check_layers([query, key, value], out, nn.Linear)
    H = value.out_features // head_size
    # A head is needed if both its rows of `value` and its columns of `out` have a weight left.
    rows_of_head = value.weight.view(H, head_size * value.in_features)      # (H, D · in)
    columns_of_head = out.weight.view(out.out_features, H, head_size)       # (E, H, D)
    kept_by_value = (rows_of_head != 0).any(dim=1)                          # (H,)
    kept_by_out = (columns_of_head != 0).any(dim=2).any(dim=0)              # (H,)
    kept = kept_by_value & kept_by_out
    # The rows and columns of the others go. If a head's rows of V are empty, `out` reads bᵥ there;
    # if its columns of `out` are empty, what it reads there is multiplied by 0.
    kept_rows = kept.repeat_interleave(head_size)                           # (H · D,)
    _remove([query, key, value], out, kept_rows, constant=_bias_or_zeros(value))
    return kept.nonzero().flatten().tolist()


@torch.no_grad()
def cut_dimensions(fc1: nn.Linear, fc2: nn.Linear, act: Callable[[Tensor], Tensor], *,
                   gate: Optional[nn.Linear] = None) -> List[int]:
    """Remove, in place, the inner dimensions of fc2(act(fc1(x))) that add nothing or a constant.

    fc1, fc2: (F, in) and (out, F), baked. act: elementwise. Returns which dimensions are left.

        column j of fc2 all 0      the dimension adds nothing
        row j of fc1 all 0         its activation is act(b₁[j]): it adds act(b₁[j]) · fc2[:, j]

    gate: of a layer fc2(act(gate(x)) · fc1(x)), where this product has to be a constant.
    """
    gates = [] if gate is None else [gate]
    _check_layers([fc1] + gates, fc2, nn.Linear)
    _check_act(act, fc1.weight)
    b1 = _bias_or_zeros(fc1)                                    # (F,)
    fc1_varies = (fc1.weight != 0).any(dim=1)                   # (F,)
    if gate is None:
        varies = fc1_varies
        constant = act(b1.clone())                              # a clone: act may work in place
    else:
        opened = act(_bias_or_zeros(gate).clone())
        gate_varies = (gate.weight != 0).any(dim=1)
        # A product varies where one of its factors does, unless the other is 0 for certain.
        fc1_is_0 = ~fc1_varies & (b1 == 0)
        gate_is_0 = ~gate_varies & (opened == 0)
        varies = (fc1_varies | gate_varies) & ~fc1_is_0 & ~gate_is_0
        constant = opened.double() * b1.double()
    # A dimension is needed where its activation varies, and its column of fc2 has something in it.
    kept = varies & (fc2.weight != 0).any(dim=0)
    _remove([fc1] + gates, fc2, kept, constant)
    return kept.nonzero().flatten().tolist()


def _bias_or_zeros(linear: nn.Linear) -> Tensor:
    if linear.bias is None:
        return linear.weight.new_zeros(linear.out_features)
    return linear.bias


def _remove(before: Sequence[nn.Linear], after: nn.Linear, kept: Tensor, constant: Tensor) -> None:
    """Remove the dimensions between `before` and `after` where `kept` is false."""
    # bias of `after`  ←  bias + W[:, removed] · constant, in fp64. A missing bias is created.
    W = after.weight
    added = W.double()[:, ~kept] @ constant.double()[~kept]     # (out,)
    if added.any():
        bias = _bias_or_zeros(after).double() + added
        trained = W if after.bias is None else after.bias       # what is frozen stays frozen
        after.bias = nn.Parameter(bias.to(W.dtype), trained.requires_grad)
    # The columns of `after` go, and the rows of `before` with their biases.
    after.weight = nn.Parameter(W[:, kept], W.requires_grad)
    after.in_features = after.weight.shape[1]
    for linear in before:
        W, b = linear.weight, linear.bias
        linear.weight = nn.Parameter(W[kept], W.requires_grad)
        if b is not None:
            linear.bias = nn.Parameter(b[kept], b.requires_grad)
        linear.out_features = len(linear.weight)


# ============================================ a reader of the paper may stop here: guards follow
# They keep those who use this from wrong numbers that would go unnoticed.


def _whole(scores: Tensor) -> Tensor:
    """All scores. Under FSDP2 each process holds a shard of them, as a DTensor, until forward."""
    if hasattr(scores, "full_tensor"):
        return scores.full_tensor()
    return scores


def _check_same_group(scores: Tensor, weight: Tensor) -> None:
    # Scores that are gathered in forward itself would not get the gradients of all processes.
    if hasattr(scores, "full_tensor") and not hasattr(weight, "full_tensor"):
        raise ValueError("masks that share scores must not be in separate groups of fully_shard()")


def _check_share(share: BlockMask, grid: Sequence[int], kind: str) -> None:
    if kind != share.kind:
        raise ValueError(f"share takes a mask of the same kind, {kind!r}: {share}")
    theirs = share.owner.grid
    both_are_lines = min(grid) == min(theirs) == 1 and max(grid) == max(theirs)
    if grid != theirs and not both_are_lines:
        raise ValueError(f"{grid} blocks cannot share the scores of {theirs}")


# Modules of torch whose weights are (out, in).
OUT_IN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _check_maskable(module: nn.Module, weight: str, bias: str,
                    output_dim: Optional[int]) -> int:
    """The dimension of the weight that holds the outputs, if weight and bias can have masks."""
    for name in (weight, bias):
        if parametrize.is_parametrized(module, name):
            raise ValueError(f"the {name} of {type(module).__name__} is parametrized already")
    W = getattr(module, weight)
    b = getattr(module, bias, None)
    if not isinstance(W, nn.Parameter) or not W.is_floating_point() or W.dim() < 2:
        raise ValueError(f"{weight} must be a floating-point parameter of two or more dimensions")
    # Without a bias it does not matter.
    if b is None:
        return 0
    # The columns of a transposed convolution are outputs with their kernels, for one group.
    if not isinstance(b, nn.Parameter) or isinstance(module, nn.modules.conv._ConvTransposeNd):
        raise ValueError(f'the {bias} of {type(module).__name__} can have no mask: say bias=""')
    matrix_shape = W.flatten(1).shape
    if output_dim is None:
        R, C = matrix_shape
        if R == C and not isinstance(module, OUT_IN):
            raise ValueError("a square weight may be (out, in) or (in, out): say output_dim=0 or 1")
        output_dim = 0 if len(b) == R else 1
    if b.dim() != 1 or len(b) != matrix_shape[output_dim]:
        raise ValueError(f"a bias of {tuple(b.shape)} does not go with dimension {output_dim} of "
                         f'a weight of {tuple(matrix_shape)}: say output_dim, or bias=""')
    return output_dim


def _check_not_nan(model: nn.Module) -> None:
    for mask in masks(model):
        if _whole(mask.owner.scores).isnan().any() or mask.threshold.isnan():
            raise ValueError("scores or threshold are NaN: go back to an earlier checkpoint")


def _check_bakeable(model: nn.Module) -> List[nn.Module]:
    """The modules with masks, if all of the model's masks can be baked."""
    masked_modules = []
    for module in model.modules():
        # Under FSDP2, which gives modules this method, what is written into weights is lost.
        if hasattr(module, "unshard"):
            raise ValueError("fully_shard() has the weights: load get_model_state_dict(model, "
                             "options=StateDictOptions(full_state_dict=True)) into a masked model")
        if not parametrize.is_parametrized(module):
            continue
        # weight_norm and its like are not ours, and would be lost.
        ours = []
        for chain in module.parametrizations.values():
            ours += [isinstance(mask, (BlockMask, BiasMask)) for mask in chain]
        if any(ours) and not all(ours):
            raise ValueError("remove the other parametrizations of the masked modules first")
        if all(ours):
            masked_modules.append(module)
    _check_not_nan(model)
    _check_tied(model)
    if masked_modules and all(mask.block_mask().all() for mask in masks(model)):
        warnings.warn("nothing is pruned: was set_threshold() called, were the masks put on before "
                      "the optimiser was made, and do the scores have a rate of about 1e-2, as in "
                      "parameter_groups()?", stacklevel=4)
    return masked_modules


def _check_tied(model: nn.Module) -> None:
    """All modules that own a weight must see the same values, masked or not."""
    owners: Dict[Tensor, List[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, []).append(module)
    for parameter, modules in owners.items():
        if len(modules) == 1:
            continue
        # What does each of them see? A parametrization list gives what its mask makes of W.
        values = []
        for module in modules:
            masked = isinstance(module, parametrize.ParametrizationList)
            values.append(module() if masked else parameter)
        if not all(torch.equal(value, values[0]) for value in values):
            names = [n for n, p in model.named_parameters(remove_duplicate=False) if p is parameter]
            raise ValueError(f"tied weights or biases must be masked alike, with share=, or not at "
                             f'all (bias="" for a bias): {names}')


def _check_layers(before: Sequence[nn.Module], after: nn.Module, classes) -> None:
    """Plain layers are expected; the outputs of each of `before` are the inputs of `after`."""
    for layer in [*before, after]:
        if not isinstance(layer, classes) or parametrize.is_parametrized(layer):
            raise ValueError(f"a plain layer of torch is expected, without masks: {layer}")
    for layer in before:
        if len(layer.weight) != after.weight.shape[1]:
            raise ValueError(f"as many outputs as {after} has inputs are expected, which is not so "
                             f"in grouped-query attention: {layer}")


def _check_act(act: Callable[[Tensor], Tensor], weight: Tensor) -> None:
    """act of many numbers must be act of each by itself: else no dimension can be taken out."""
    numbers = torch.linspace(-3, 6, 256).to(weight)     # so many that dropout is found out
    together = act(numbers.clone())                     # clones, since act may work in place
    apart = torch.cat([act(number.clone()) for number in numbers.split(1)])
    fits = together.shape == apart.shape == numbers.shape
    if not fits or not torch.allclose(together, apart, rtol=1e-2, atol=1e-2, equal_nan=True):
        raise ValueError("act must work on single numbers, and not at random: softmax, norms, GLU "
                         "and dropout in training cannot be cut")
