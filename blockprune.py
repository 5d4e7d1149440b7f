"""Block pruning: fine-tune a network while learning which blocks of its weights it can do without.

The whole method of
    Lagunas, Charlaix, Sanh, Rush: Block Pruning For Faster Transformers, EMNLP 2021,
    built on Sanh, Wolf, Rush: Movement Pruning, NeurIPS 2020,
in one file. It imports torch alone and knows nothing of BERT: copy it into your own project.
Reference code: huggingface/nn_pruning at 0cef2b2, cited below as [R:file].

SPDX-License-Identifier: MIT
Copyright (c) 2026 The Block Pruning reference contributors. The terms are in LICENSE.

A *block* is any r × c tile of a weight matrix: 1 × 1 is soft movement pruning, 32 × 32 block
pruning, (head size, in) an attention head, (1, in) a row, (out, 1) a column. Each block has one
learned number, its score. This is Hybrid pruning of a transformer; what it adds to fine-tuning is
marked with a +:

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
        layer.heads = len(cut_heads(layer.query, layer.key, layer.value,        # + really removed
                                    layer.out, head_size=64))
        cut_dimensions(layer.fc1, layer.fc2, act)                               # +

Letters:
    W    a weight matrix, R × C = (out, in)      σ    the sigmoid
    S    scores, one per block                   τ    the threshold that σ(S) is compared with
    r×c  the block                               λ    how hard the penalty pushes scores down
    M(S) the mask: on the grid of blocks, (⌈R/r⌉, ⌈C/c⌉), or repeated to the weight's R × C
    H    heads of size D                         F    inner dimensions of a feed-forward layer
    E    hidden size

In comments and docstrings, "Paper:" is the authors' method, "Note:" our remark, "Differs:" where we
deviate, and "Source:" where to look it up. Every function checks what it is given before it changes
anything: after a ValueError the model is as it was. Left out, since the paper's final models do not
use them: top-k, L0 and magnitude masks.
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

    Sketch of the gradient. The derivative of a step is 0 nearly everywhere: nothing would be
    learned. So it is replaced by 1, and the gradient that arrives at M goes on to S unchanged. With
    W′ = W ⊙ M(S),

        dL/dS = Σ over the block of dL/dW′ ⊙ W        (Sanh et al. 2020, eq. (2))
        dL/dW = dL/dW′ ⊙ M

    Gradient descent moves a weight that is kept by −(learning rate) · dL/dW′. Where this shrinks
    |W|, dL/dW′ ⊙ W is positive and S falls; where it grows |W|, S rises: "movement pruning". The
    gradient of S has W in it, not W′. So the score of a pruned block keeps learning, and the block
    can come back. Its weights get no gradient meanwhile.
    Source: [R:modules/binarizer.py].
    """

    @staticmethod
    def forward(scores: Tensor, threshold: Tensor) -> Tensor:
        kept = torch.sigmoid(scores) > threshold
        return kept.to(scores.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        # Paper: the gradient is not multiplied by σ′(S). The sum over a block needs no line here:
        # M is repeated over its block in weight_mask(), and autograd sums what comes back.
        return grad, None

    # torch.func wants apart from forward() what is kept for backward(). Nothing is.
    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    # torch.vmap takes the two functions as they are.
    generate_vmap_rule = True


class BlockMask(nn.Module):
    """The learned mask of one weight, as a torch parametrization: W ↦ W ⊙ M(S).

    A weight of more than two dimensions is seen as the matrix `weight.flatten(1)`; a convolution is
    (out, in · kh · kw). Blocks need not divide the matrix: those at its edge are smaller.
    Differs: the reference asserts exact division. By default it keeps at least 0.5 % of the blocks,
    whatever their scores are; here all may go.

    shape: (R, C) of the matrix.
    block: (r, c) with 1 ≤ r ≤ R and 1 ≤ c ≤ C.
    share: a mask whose scores this one uses too, of the same kind. Either their grids are equal, or
        each is one row or one column of blocks, as many in both.
    kind: the group that penalty() and density() count this weight in.

    `mask.owner.scores` are the scores, a parameter of the owner's grid. A mask that shares has no
    scores of its own. Its owner is the mask it shares with, or the owner of that; any other mask is
    its own owner. Scores and τ stay fp32 (or fp64) in a model of fp16 or bf16.
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
        if share is None:
            owner = self
            # At the start every block is kept: σ(0) is 0.5, far above any τ in use.
            self.scores = nn.Parameter(torch.zeros(self.grid, dtype=_score_dtype()))
        else:
            _check_share(share, self.grid, kind)
            owner = share.owner
        # `self.owner = owner` would register the owner's scores a second time, under this mask.
        self.__dict__["owner"] = owner
        # τ is a buffer: it is saved with the model, so a reloaded model still prunes.
        self.register_buffer("threshold", torch.zeros((), dtype=_score_dtype()))

    def block_mask(self) -> Tensor:
        """M(S) on the grid of blocks, (⌈R/r⌉, ⌈C/c⌉)."""
        scores = _whole(self.owner.scores).to(self.threshold.device)
        mask = StraightThrough.apply(scores, self.threshold)
        # The owner's grid may be (F, 1) where this one is (1, F).
        return mask.view(self.grid)

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
        _check_sharded_alike(self.owner.scores, weight)
        mask = self.weight_mask().to(weight.dtype)
        masked = weight.flatten(1) * mask               # W′ = W ⊙ M(S), (R, C)
        return masked.view_as(weight)

    # model.half() and its like come through here, and would make scores fp16.
    def _apply(self, fn, recurse: bool = True):
        return super()._apply(_at_least_fp32(fn), recurse)

    # load_state_dict(assign=True) may have put in scores of fp16.
    def _load_from_state_dict(self, *args) -> None:
        super()._load_from_state_dict(*args)
        self._apply(lambda tensor: tensor)


class BiasMask(nn.Module):
    """The mask of a bias: an output that has no weight left loses its bias too.

    So a pruned output is 0 in training already. output_dim: the dimension of the weight that holds
    the outputs. Paper: no gradient goes from the bias to the scores ([R:modules/masked_nn.py],
    bias_mask).
    """

    def __init__(self, mask: BlockMask, output_dim: int):
        super().__init__()
        self.__dict__["mask"] = mask    # not registered, as the owner in BlockMask
        self.output_dim = output_dim

    def forward(self, bias: Tensor) -> Tensor:
        outputs = self.mask.shape[self.output_dim]
        outputs_per_block = self.mask.block[self.output_dim]
        # In this row of blocks, is any block left? (Shapes are those of output_dim 0.)
        alive = self.mask.block_mask().detach()             # (⌈R/r⌉, ⌈C/c⌉)
        alive = alive.amax(dim=1 - self.output_dim)         # (⌈R/r⌉,)
        # The same for each output, as in weight_mask().
        alive = alive[:, None].expand(-1, outputs_per_block).reshape(-1)
        alive = alive[:outputs]                             # (R,)
        return bias * alive.to(bias.dtype)


# --------------------------------------------------------------------------------- putting masks on


def mask_weight(module: nn.Module, block: Sequence[int], *, weight: str = "weight",
                bias: str = "bias", output_dim: Optional[int] = None,
                share: Optional[BlockMask] = None, kind: str = "ffn") -> BlockMask:
    """Put a block mask on one weight of a module, and on the bias that goes with it.

    From here on `module.weight` is W ⊙ M(S), and W itself is at
    `module.parametrizations.weight.original`. The module knows nothing of it: any will do that
    reads its weight as an attribute, such as nn.Linear, nn.Conv2d or nn.MultiheadAttention.

    block: (r, c), a tile of the weight as it is stored.
    weight, bias: the names of the two parameters. A bias that is absent or None is skipped, and
        bias="" leaves it without a mask.
    output_dim: the dimension of the weight that holds the outputs: 0 where weights are (out, in),
        as in torch; 1 where they are (in, out), as in GPT-2. It need only be said for a module that
        is not torch's own, with a bias and a square weight: else the length of the bias says it.
    share, kind: see BlockMask.
    """
    _check_maskable(module, weight, bias)
    output_dim = _find_output_dim(module, weight, bias, output_dim)
    W = getattr(module, weight)
    matrix_shape = W.flatten(1).shape       # a convolution is (out, in · kh · kw)
    mask = BlockMask(matrix_shape, block, share, kind).to(W.device)
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

    fc1, fc2: nn.Linear, or convolutions of (out, in, kh, kw).
    gate: of a layer fc2(act(gate(x)) · fc1(x)), as in LLaMA: its row j has the same score.
    Returns the mask of fc1, which owns the scores, (F, 1) for F inner dimensions.
    """
    _check_feed_forward(fc1, fc2, gate)
    F, inputs = fc1.weight.flatten(1).shape
    outputs, columns = fc2.weight.flatten(1).shape
    # A dimension is kept or pruned on both of its sides at once.
    owner = mask_weight(fc1, (1, inputs), kind=kind)                        # a block is a row
    if gate is not None:
        gate_inputs = gate.weight.flatten(1).shape[1]
        mask_weight(gate, (1, gate_inputs), share=owner, kind=kind)
    # A column is as wide as a kernel of fc2: 1 in a linear, kh · kw in a convolution.
    mask_weight(fc2, (outputs, columns // F), share=owner, kind=kind)
    return owner


# -------------------------------------------------------------------- what a training loop asks for


def masks(model: nn.Module) -> Iterator[BlockMask]:
    """Every BlockMask of the model, in the order of its modules."""
    for module in model.modules():
        if isinstance(module, BlockMask):
            yield module


def _owners(model: nn.Module) -> List[BlockMask]:
    """The masks whose scores the model's masks use, each once."""
    each_once = dict.fromkeys(mask.owner for mask in masks(model))
    return list(each_once)


def threshold_schedule(step: int, total: int, flat_start: float, flat_end: float,
                       final: float = 0.1, initial: float = 0.0) -> float:
    """τ of a step, counted from 0: `initial`, then a cubic rise, then `final`.

        progress = (t − flat_start) / (total − flat_start − flat_end), clipped to 0 … 1
        τ(t) = final + (initial − final) · (1 − progress)³

    The rise is fast at first: 58, 88 and 98 % of it are done after a quarter, half and three
    quarters of its steps. λ follows τ, as λ(t) = λ · τ(t) / final.

    total: steps of the run. flat_start, flat_end: how many steps τ is flat at either end.
    Differs: where the flat parts leave no room for the rise there is a ValueError. The reference
    jumps to the final τ, or never leaves the initial one.
    Source: Sanh et al. 2020, eq. (5); [R:patch_coordinator.py], schedule_threshold, where both flat
    parts are multiples of the learning rate's warm-up.
    """
    rising = total - flat_start - flat_end
    if rising <= 1:         # a rise of one step would be a jump
        raise ValueError(f"no step is left for τ to rise: of {total}, the first {flat_start} and "
                         f"the last {flat_end} are flat; train longer, or with a shorter warm-up")
    progress = (step - flat_start) / rising
    progress = min(1, max(0, progress))
    return final + (initial - final) * (1 - progress) ** 3


def set_threshold(model: nn.Module, threshold: float) -> None:
    """Set τ in every mask of the model."""
    for mask in masks(model):
        mask.threshold.fill_(threshold)


def penalty(model: nn.Module, weights: Optional[Mapping[str, float]] = None) -> Tensor:
    """The penalty, a scalar, to be added to the loss as λ(t) · penalty.

        of a kind   1/N Σ over its N owners of mean σ(S)
        penalty     1/K Σ over the K kinds of λ_kind · that

    Three means, one in the other: a large matrix weighs no more than a small one, so that each of
    its many scores is pushed less. Scores that masks share are counted once. The push on one score
    is λ · λ_kind · σ′(S) / (K · N · number of its owner's scores). Therefore λ must be found anew
    for each model. The push fades with σ′ as S falls: so a low score does not sink for ever, and
    its block can come back.

    weights: λ_kind by kind, 1 where not given. If all are 1 the penalty starts at 0.5.
    Source: [R:patch_coordinator.py], regularization_loss; σ is in [R:modules/masked_nn.py].
    """
    owners_by_kind: Dict[str, List[BlockMask]] = {}
    for owner in _owners(model):
        owners_by_kind.setdefault(owner.kind, []).append(owner)
    if not owners_by_kind:
        raise ValueError("the model has no masks")
    if weights is None:
        weights = {}
    # A misspelt kind would change nothing, in silence.
    for kind in weights:
        if kind not in owners_by_kind:
            raise ValueError(f"no mask is of the kind {kind!r}: there are {sorted(owners_by_kind)}")

    # λ_kind · the mean of a kind; and the mean of these.
    total = 0.0
    for kind, owners in owners_by_kind.items():
        # The mean over a kind's owners, each of which is a mean over its blocks.
        kind_mean = sum(_whole(owner.scores).sigmoid().mean() for owner in owners) / len(owners)
        total = total + weights.get(kind, 1.0) * kind_mean
    return total / len(owners_by_kind)


def parameter_groups(model: nn.Module, lr: float, score_lr: Optional[float],
                     weight_decay: float = 0.0) -> List[dict]:
    """Optimiser groups: matrices, vectors (biases and norms) and scores. Empty groups are left out.

    Paper: scores learn at 1e-2, weights at 3e-5; one learning-rate schedule and one gradient clip
    act on all of them ([R:patch_coordinator.py], create_optimizer_groups; [R:sparse_trainer.py]).
    Note: scores must not decay toward 0, that is toward being kept. So their weight_decay of 0 is
    written out: AdamW's default is 0.01.
    What is frozen stays frozen. score_lr: None trains the weights alone.
    """
    all_scores = [owner.scores for owner in _owners(model)]
    scores = [S for S in all_scores if S.requires_grad]
    ids_of_scores = [id(S) for S in all_scores]
    # All other parameters, by their number of dimensions.
    matrices = []
    vectors = []
    for parameter in model.parameters():
        if id(parameter) in ids_of_scores or not parameter.requires_grad:
            continue
        if parameter.dim() > 1:
            matrices.append(parameter)
        else:
            vectors.append(parameter)
    groups = [
        {"params": matrices, "lr": lr, "weight_decay": weight_decay},
        {"params": vectors, "lr": lr, "weight_decay": 0.0},
    ]
    if score_lr is not None:
        groups.append({"params": scores, "lr": score_lr, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


@torch.no_grad()
def density(model: nn.Module) -> Dict[str, float]:
    """The fraction of the masked weights that their masks keep, by kind, and for "all" of them.

    Biases do not count. A weight that a mask keeps counts even where it is zero by itself.
    """
    _check_not_nan(model)
    kept: Dict[str, float] = {}
    size: Dict[str, int] = {}
    for mask in masks(model):
        # Where a block spans a whole dimension the mask has length 1 there: each entry counts R or
        # C times.
        kept_here = mask.weight_mask().expand(mask.shape).sum().item()
        for kind in (mask.kind, "all"):
            kept[kind] = kept.get(kind, 0) + kept_here
            size[kind] = size.get(kind, 0) + math.prod(mask.shape)
    return {kind: kept[kind] / size[kind] for kind in kept}


# ------------------------------------------------------------------------ from masks to zeros: bake


@torch.no_grad()
def bake(model: nn.Module) -> nn.Module:
    """Fold every mask into its weight, in place: W becomes W ⊙ M(S), scores and masks are gone.

    The model computes the same function, in plain modules that torch.save and torch.export take.
    Weights are the same parameters as before: an optimiser goes on with them, and tied weights stay
    tied. Training on lets zeros grow back at once, by the optimiser's momentum alone: cut first, or
    keep the masks and freeze the scores. Under DDP wrap the model again.
    Returns the model. Warns where nothing is pruned.
    """
    masked_modules = _masked_modules(model)
    _check_bakeable(model, masked_modules)
    for module in masked_modules:
        # 1. The values as the module sees them, W ⊙ M(S) and the masked bias, go into W and b.
        #    A tied weight may come here twice: M is 0 or 1, so the second time changes nothing.
        originals = {}
        for name, chain in module.parametrizations.items():
            chain.original.copy_(getattr(module, name))
            originals[name] = chain.original
        # 2. torch has made of nn.Linear a class ParametrizedLinear(nn.Linear), for `weight` as a
        #    property: go back to the base. Note: torch's remove_parametrizations() would take the
        #    property from that class, which copies of a model share: the copies would break.
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]
        # 3. W and b are ordinary parameters of the module again.
        for name, parameter in originals.items():
            module.register_parameter(name, parameter)
    return model


# ------------------------------------------------------------------- from zeros to smaller matrices


@torch.no_grad()
def cut_heads(query: nn.Linear, key: nn.Linear, value: nn.Linear, out: nn.Linear,
              head_size: int) -> List[int]:
    """Remove, in place, the attention heads that add nothing or a constant.

    query, key, value: (H · D, in), baked; a head is D = head_size rows of each, in order.
    out: (E, H · D); the same head is D of its columns. Biases may be None.
    Returns which heads are left, perhaps none. Whoever reshapes by heads must be told how many, and
    what else there is per head must be cut alike, such as ALiBi's slopes or Swin's table. Weights
    and biases are new parameters, for which an optimiser has to be made anew.

        columns of `out` all 0     the head adds nothing
        rows of `value` all 0      its values are bᵥ at every token. Attention weights sum to 1, so
                                   the head's output is bᵥ too: it adds out[:, head] · bᵥ[head]

    The constant goes into the bias of `out`, in fp64. Exact without dropout of attention weights,
    and only where a head's output is a mean of its values, with weights that sum to 1. It is not
    with attention sinks, output gates or relative values, nor in rows where every key is masked. In
    grouped-query attention several heads have one key and value: it cannot be cut here.
    Differs: the reference removes a head as soon as query, key or value is empty. With an empty
    query (its bias is 0 too) or key attention is uniform, but the head still adds the mean of V:
    here it stays.
    """
    _check_heads(query, key, value, out, head_size)
    H = value.out_features // head_size
    V = value.weight.double()                                   # (H · D, in)
    O = out.weight.double()                                     # (E, H · D)
    # A head is needed where both its rows of V and its columns of O have something in them.
    rows_of_head = V.view(H, head_size * V.shape[1])            # (H, D · in)
    columns_of_head = O.view(len(O), H, head_size)              # (E, H, D)
    kept = (rows_of_head != 0).any(dim=1) & (columns_of_head != 0).any(dim=2).any(dim=0)
    kept_rows = kept.repeat_interleave(head_size)               # (H · D,)
    # What the removed heads add is O bᵥ, the same at every token.
    if value.bias is not None:
        constant = O[:, ~kept_rows] @ value.bias.double()[~kept_rows]
        _add_to_bias(out, constant)                             # (E,)
    # The rows of the removed heads go, and their columns of O.
    for linear in (query, key, value):
        _keep_outputs(linear, kept_rows)
    _keep_inputs(out, kept_rows)
    return kept.nonzero().flatten().tolist()


@torch.no_grad()
def cut_dimensions(fc1: nn.Linear, fc2: nn.Linear, act: Callable[[Tensor], Tensor], *,
                   gate: Optional[nn.Linear] = None) -> List[int]:
    """Remove, in place, the inner dimensions of fc2(act(fc1(x))) that add nothing or a constant.

    fc1, fc2: (F, in) and (out, F), baked, with or without biases. act: elementwise.
    Returns which dimensions are left.

        column j of fc2 all 0      the dimension adds nothing
        row j of fc1 all 0         its activation is act(b₁[j]): it adds act(b₁[j]) · fc2[:, j]

    gate: (F, in) of a layer fc2(act(gate(x)) · fc1(x)). Activation j is act(gate(x)ⱼ) · fc1(x)ⱼ:

        both rows j all 0                     the constant act(b_gate[j]) · b₁[j]
        row j and bias j of fc1 all 0         the constant 0, whatever the gate
        row j of gate 0, act(b_gate[j]) 0     the constant 0, whatever fc1

    The constant goes into the bias of fc2, in fp64; where fc2 had none, it gets one.
    """
    _check_dimensions(fc1, fc2, gate)
    _check_act(act, fc1.weight)
    W1 = fc1.weight                                             # (F, in)
    W2 = fc2.weight.double()                                    # (out, F)
    b1 = _bias_or_zeros(fc1)                                    # (F,)
    # A dimension is needed where its activation varies, and its column of W2 has something in it.
    fc1_varies = (W1 != 0).any(dim=1)                           # (F,)
    if gate is None:
        varies = fc1_varies
        activation = act(b1.clone()).double()                   # a copy: act may work in place
    else:
        b_gate = _bias_or_zeros(gate)
        gated = act(b_gate.clone())
        gate_varies = (gate.weight != 0).any(dim=1)
        # A product varies where one of its factors does, unless the other is 0 for certain.
        fc1_is_0 = ~fc1_varies & (b1 == 0)
        gate_is_0 = ~gate_varies & (gated == 0)
        varies = (fc1_varies | gate_varies) & ~fc1_is_0 & ~gate_is_0
        activation = gated.double() * b1.double()
    kept = varies & (W2 != 0).any(dim=0)
    # What the removed dimensions add is W2 act(b₁). Without a bias act(0) may still not be 0.
    constant = W2[:, ~kept] @ activation[~kept]                 # (out,)
    _add_to_bias(fc2, constant)
    # Rows of fc1 and of the gate go, and the columns of fc2 that read them.
    _keep_outputs(fc1, kept)
    if gate is not None:
        _keep_outputs(gate, kept)
    _keep_inputs(fc2, kept)
    return kept.nonzero().flatten().tolist()


def _bias_or_zeros(linear: nn.Linear) -> Tensor:
    """The bias, zeros where there is none."""
    if linear.bias is None:
        return linear.weight.new_zeros(linear.out_features)
    return linear.bias


def _add_to_bias(linear: nn.Linear, constant: Tensor) -> None:
    """Add a constant output, fp64, to the bias; make one where there is none."""
    if not constant.any():
        return
    dtype = linear.weight.dtype
    if linear.bias is not None:
        constant = linear.bias.double() + constant
    linear.bias = nn.Parameter(constant.to(dtype), linear.weight.requires_grad)


def _keep_outputs(linear: nn.Linear, kept: Tensor) -> None:
    """Leave the rows of the weight, and the elements of the bias, where `kept` is true."""
    weight = linear.weight
    linear.weight = nn.Parameter(weight[kept], weight.requires_grad)
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias[kept], linear.bias.requires_grad)
    linear.out_features = len(linear.weight)


def _keep_inputs(linear: nn.Linear, kept: Tensor) -> None:
    """Leave the columns of the weight where `kept` is true."""
    weight = linear.weight
    linear.weight = nn.Parameter(weight[:, kept], weight.requires_grad)
    linear.in_features = linear.weight.shape[1]


# ======================================================================= the method ends here
# Who reads this beside the paper may stop. What follows guards against wrong use that would go
# unnoticed: scores in low precision, shards, masks and cuts that do not fit. Each check comes
# before the first change.

# ------------------------------------------------------------------- guards: precision and shards


def _score_dtype() -> torch.dtype:
    """The dtype of fresh scores: torch's default, or fp32 where that is less exact."""
    return torch.promote_types(torch.float32, torch.get_default_dtype())


def _at_least_fp32(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """fn, which moves or converts a tensor, with fp32 as the least precise result.

    A step under 0.0078 does not move a bf16 score of −2.2: its neighbours are 0.0156 away.
    """
    def exact_fn(tensor: Tensor) -> Tensor:
        converted = fn(tensor)
        # fp16 and bf16 become fp32, on the device that fn moves to.
        if converted.is_floating_point() and converted.element_size() < 4:
            return tensor.to(converted.device, torch.float32)
        return converted
    return exact_fn


def _is_shard(tensor: Tensor) -> bool:
    """Whether it is a DTensor: under FSDP2 each process holds a part of it, except in forward."""
    return hasattr(tensor, "full_tensor")


def _whole(scores: Tensor) -> Tensor:
    """All scores, gathered from the processes where each holds a shard of them."""
    if _is_shard(scores):
        return scores.full_tensor()
    return scores


def _check_sharded_alike(scores: Tensor, weight: Tensor) -> None:
    # The gradient of scores that are gathered in forward would not be that of all processes.
    if _is_shard(scores) and not _is_shard(weight):
        raise ValueError("a mask and the one it shares scores with are in separate groups of "
                         "fully_shard(): put both of their modules into one")


def _check_not_sharded(model: nn.Module) -> None:
    for module in model.modules():
        class_names = [cls.__name__ for cls in type(module).__mro__]
        if "FSDPModule" in class_names:
            raise ValueError("bake() needs whole weights: gather those of a sharded model with "
                             "get_model_state_dict(), with full_state_dict=True, and load them "
                             "into a masked model that is not sharded")


# ----------------------------------------------------------------------- guards: putting masks on

# torch's own modules whose weights are (out, in) for certain, and those of (in, out).
OUT_IN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _check_share(share: BlockMask, grid: Sequence[int], kind: str) -> None:
    if not isinstance(share, BlockMask):
        raise ValueError(f"share takes a mask, as mask_weight() returns it, not {type(share)}")
    theirs = share.owner.grid
    both_are_lines = min(grid) == 1 and min(theirs) == 1
    if grid != theirs and not (both_are_lines and max(grid) == max(theirs)):
        raise ValueError(f"a grid of {grid} blocks cannot share the scores of one of {theirs}")
    if kind != share.kind:
        raise ValueError(f"a mask of the kind {kind!r} cannot share scores of {share.kind!r}")


def _check_maskable(module: nn.Module, weight: str, bias: str) -> None:
    # A parametrization that is there already would be baked with ours, or not at all.
    for name in (weight, bias):
        if parametrize.is_parametrized(module, name):
            raise ValueError(f"the {name} of {type(module).__name__} is parametrized already")
    W = getattr(module, weight)
    if not isinstance(W, nn.Parameter) or not W.is_floating_point() or W.dim() < 2:
        raise ValueError(f"{weight} must be a parameter of two or more dimensions, in floating "
                         f"point")
    b = getattr(module, bias, None)
    if b is not None and not isinstance(b, nn.Parameter):
        raise ValueError(f'{bias} is no parameter: bias="" leaves it without a mask')


def _find_output_dim(module: nn.Module, weight: str, bias: str,
                     output_dim: Optional[int]) -> int:
    """The dimension of the weight that holds the outputs, with which the bias goes."""
    name = type(module).__name__
    W = getattr(module, weight)
    b = getattr(module, bias, None)
    if b is None:
        return 0            # nobody asks
    if isinstance(module, TRANSPOSED):
        raise ValueError(f'no mask is known for the bias of {name}: say bias=""')
    R, C = W.flatten(1).shape
    if output_dim is None:
        if R == C and not isinstance(module, OUT_IN):
            raise ValueError(f"a weight of {R}x{C} does not say where {name} has its outputs: say "
                             f'output_dim=0 or output_dim=1, or bias=""')
        output_dim = 0 if len(b) == R else 1
    if output_dim not in (0, 1) or b.shape != (R, C)[output_dim:output_dim + 1]:
        raise ValueError(f"a bias of {tuple(b.shape)} does not go with the outputs of a weight of "
                         f'{R}x{C}: say output_dim=1 where it is (in, out), or bias=""')
    return output_dim


def _check_feed_forward(fc1: nn.Module, fc2: nn.Module, gate: Optional[nn.Module]) -> None:
    modules = [fc1, fc2] if gate is None else [fc1, fc2, gate]
    if len(set(modules)) < len(modules):
        raise ValueError("fc1, fc2 and gate must be modules of their own")
    for module in modules:
        if not isinstance(module, OUT_IN):
            raise ValueError(f"nn.Linear or a convolution is expected, not "
                             f"{type(module).__name__}: mask_weight() with share= takes others")
        _check_maskable(module, "weight", "bias")
        _find_output_dim(module, "weight", "bias", None)
    F = len(fc1.weight)
    if fc2.weight.shape[1] != F:
        raise ValueError(f"fc1 has {F} outputs but fc2 {fc2.weight.shape[1]} inputs")
    if gate is not None and len(gate.weight) != F:
        raise ValueError(f"fc1 has {F} outputs but the gate {len(gate.weight)}")


# ----------------------------------------------------------------------------------- guards: bake


def _check_not_nan(model: nn.Module) -> None:
    for name, mask in model.named_modules():
        if not isinstance(mask, BlockMask):
            continue
        if _whole(mask.owner.scores).isnan().any() or mask.threshold.isnan():
            raise ValueError(f"scores or threshold are NaN in {name or 'the mask'}: training has "
                             f"diverged, go back to a checkpoint and look at loss and gradients")


def _masked_modules(model: nn.Module) -> List[nn.Module]:
    """The modules with masks, which must be their only parametrizations."""
    masked_modules = []
    for module in model.modules():
        if not parametrize.is_parametrized(module):
            continue
        ours = []
        for chain in module.parametrizations.values():
            for parametrization in chain:
                ours.append(isinstance(parametrization, (BlockMask, BiasMask)))
        if any(ours) and not all(ours):
            raise ValueError("remove the other parametrizations of the masked modules first")
        if all(ours):
            masked_modules.append(module)
    return masked_modules


def _check_bakeable(model: nn.Module, masked_modules: Sequence[nn.Module]) -> None:
    _check_not_sharded(model)
    _check_not_nan(model)
    _check_tied(model, masked_modules)
    all_kept = [bool(mask.block_mask().all()) for mask in masks(model)]
    if all_kept and all(all_kept):
        highest = max(mask.threshold.item() for mask in masks(model))
        lowest = min(owner.scores.min().item() for owner in _owners(model))
        warnings.warn(
            f"nothing is pruned, with τ at most {highest:g} and scores at least {lowest:g}: was "
            f"set_threshold() called, were the masks put on before the optimiser was made, and did "
            f"it get the scores with a rate of about 1e-2, as in parameter_groups()?", stacklevel=4)


def _check_tied(model: nn.Module, masked_modules: Sequence[nn.Module]) -> None:
    """A weight that several modules own must be masked alike in all of them."""
    owners: Dict[Tensor, int] = {}              # how many modules own a parameter
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[parameter] = owners.get(parameter, 0) + 1
    tied: Dict[Tensor, List[Tensor]] = {}       # its masked value in each that masks it
    for module in masked_modules:
        for name, chain in module.parametrizations.items():
            if owners[chain.original] > 1:
                tied.setdefault(chain.original, []).append(getattr(module, name))
    for original, values in tied.items():
        alike = [torch.equal(value, values[0]) for value in values]
        if len(values) < owners[original] or not all(alike):
            everything = model.named_parameters(remove_duplicate=False)
            names = [name for name, parameter in everything if parameter is original]
            raise ValueError(
                f"a masked weight or bias has another owner, which is not masked alike: {names}; "
                f"mask all of them with the same share=mask, or untie those without a mask before "
                f"bake(), with module.weight = nn.Parameter(module.weight.clone()); where it is a "
                f'bias, bias="" in mask_weight() leaves it without a mask')


# -------------------------------------------------------------------------------- guards: cutting


def _check_plain_linears(*linears: nn.Module) -> None:
    for linear in linears:
        if not isinstance(linear, nn.Linear) or parametrize.is_parametrized(linear):
            raise ValueError(f"a plain nn.Linear is expected, of a model that is baked: {linear}")
    if len(set(linears)) < len(linears):
        raise ValueError("each of the linears must be a module of its own")


def _check_heads(query: nn.Linear, key: nn.Linear, value: nn.Linear, out: nn.Linear,
                 head_size: int) -> None:
    _check_plain_linears(query, key, value, out)
    # The same rows of query, key and value are one head, and the same columns of out.
    inner = out.in_features
    for linear in (query, key, value):
        if linear.out_features != inner:
            raise ValueError(f"query, key and value need as many outputs as `out` has inputs, "
                             f"{inner}, which grouped-query attention has not: {linear}")
    if inner % head_size != 0:
        raise ValueError(f"{inner} rows are no whole number of heads of {head_size}")


def _check_dimensions(fc1: nn.Linear, fc2: nn.Linear, gate: Optional[nn.Linear]) -> None:
    linears = [fc1, fc2] if gate is None else [fc1, fc2, gate]
    _check_plain_linears(*linears)
    if fc1.out_features != fc2.in_features:
        raise ValueError(f"as many outputs of fc1 as inputs of fc2 are expected: {fc1}, {fc2}")
    if gate is not None and gate.out_features != fc1.out_features:
        raise ValueError(f"as many outputs of the gate as of fc1 are expected: {gate}, {fc1}")


def _check_act(act: Callable[[Tensor], Tensor], weight: Tensor) -> None:
    """act of many numbers must be act of each by itself: else no dimension can be taken out."""
    numbers = torch.linspace(-3, 6, 256).to(weight)     # so many that dropout is found out
    together = act(numbers.clone())                     # clones, since act may work in place
    fits = together.shape == numbers.shape
    if fits:
        apart = torch.cat([act(number.clone()) for number in numbers.split(1)])
        fits = torch.allclose(together, apart, rtol=1e-2, atol=1e-2, equal_nan=True)
    if not fits:
        raise ValueError("act must work on single numbers, and not at random: softmax, norms, GLU "
                         "and dropout in training cannot be cut")
