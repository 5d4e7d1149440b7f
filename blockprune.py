"""Block pruning: fine-tune a network while learning which blocks of its weights it can do without.

The whole method of
    Lagunas, Charlaix, Sanh, Rush: Block Pruning For Faster Transformers, EMNLP 2021,
    built on Sanh, Wolf, Rush: Movement Pruning, NeurIPS 2020,
in one file. It imports torch alone and knows nothing of BERT: copy it into your own project.
Reference code: huggingface/nn_pruning at 0cef2b2, cited below as [R:file].

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
        layer.heads = cut_heads(layer.query, layer.key, layer.value,            # + really removed
                                layer.out, head_size=64)
        cut_dimensions(layer.fc1, layer.fc2, act)                               # +

Letters:
    W    a weight matrix, R × C = (out, in)      σ    the sigmoid
    S    scores, one per block                   τ    the threshold that σ(S) is compared with
    r×c  the block                               λ    how hard the penalty pushes scores down
    M(S) the mask: on the grid of blocks, (⌈R/r⌉, ⌈C/c⌉), or repeated to the weight's R × C
    H    heads of size D                         F    inner dimensions of a feed-forward layer
    E    hidden size

In comments and docstrings, "Paper:" is the authors' method, "Note:" our remark, "Differs:" where we
deviate, and "Source:" where to look it up. Left out, since the paper's final models do not use
them: top-k, L0 and magnitude masks.
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
    1, and the gradient that arrives at M goes on to S unchanged. With W′ = W ⊙ M(S),

        dL/dS = Σ over the block of dL/dW′ ⊙ W        (Sanh et al. 2020, eq. (2))
        dL/dW = dL/dW′ ⊙ M

    Descent moves W by −dL/dW′. Where this step shrinks |W|, dL/dW′ ⊙ W is positive and S falls;
    where it grows |W|, S rises: "movement pruning". The gradient of S has W in it, not W′. So the
    score of a pruned block keeps learning, and the block can come back (its weights get no gradient
    meanwhile).
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
    scores: a parameter to share with other masks, with one element for each of the ⌈R/r⌉ · ⌈C/c⌉
        blocks. Fresh scores are 0, where σ is 0.5 and far above any τ in use: all blocks are kept.
        Scores and τ stay fp32 (or fp64) in a model of fp16 or bf16.
    kind: the group that penalty() and density() count this weight in.
    Raises ValueError where block or scores do not fit.
    """

    def __init__(self, shape: Sequence[int], block: Sequence[int],
                 scores: Optional[nn.Parameter] = None, kind: str = "ffn"):
        super().__init__()
        R, C = shape
        r, c = block
        if not (1 <= r <= R and 1 <= c <= C):
            raise ValueError(f"a block of {r}x{c} does not fit a weight of {R}x{C}")
        rows = math.ceil(R / r)
        columns = math.ceil(C / c)
        self.shape = (R, C)
        self.block = (r, c)
        self.grid = (rows, columns)
        self.kind = kind
        self.scores_are_given = scores is not None
        # At the start every block is kept: σ(0) is 0.5.
        if scores is None:
            scores = nn.Parameter(torch.zeros(rows, columns, dtype=_score_dtype()))
        _check_scores(scores, self.grid)
        self.scores = scores
        # τ is a buffer: it is saved with the model, so a reloaded model still prunes.
        self.register_buffer("threshold", torch.zeros((), dtype=_score_dtype()))

    def block_mask(self) -> Tensor:
        """M(S) on the grid of blocks, (⌈R/r⌉, ⌈C/c⌉)."""
        # Scores that rows and columns share are (F,): they become (F, 1) or (1, F) here.
        scores = _unsharded(self.scores)
        return StraightThrough.apply(scores, self.threshold).view(self.grid)

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
        mask = self.weight_mask().to(weight.dtype)
        masked = weight.flatten(1) * mask               # W′ = W ⊙ M(S), (R, C)
        return masked.view_as(weight)

    # A guard: model.half() and its like come through here, and would make scores fp16.
    def _apply(self, fn, recurse: bool = True):
        return super()._apply(_at_least_fp32(fn), recurse)

    # A guard: safetensors refuses tensors that share memory, as shared scores do. We save a copy.
    def _save_to_state_dict(self, destination, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.scores_are_given and not keep_vars:
            destination[prefix + "scores"] = destination[prefix + "scores"].clone()


class BiasMask(nn.Module):
    """The mask of a bias: an output that has no weight left loses its bias too.

    So a pruned output is 0 in training already. output_dim: the dimension of the weight that holds
    the outputs. Paper: no gradient goes from the bias to the scores ([R:modules/masked_nn.py],
    bias_mask).
    """

    def __init__(self, mask: BlockMask, output_dim: int):
        super().__init__()
        self._mask = (mask,)    # in a tuple, so that torch does not register its scores twice
        self.output_dim = output_dim

    def forward(self, bias: Tensor) -> Tensor:
        mask = self._mask[0]
        outputs = mask.shape[self.output_dim]
        outputs_per_block = mask.block[self.output_dim]
        # In this row of blocks, is any block left? (Shapes are those of output_dim 0.)
        alive = mask.block_mask().detach()                  # (⌈R/r⌉, ⌈C/c⌉)
        alive = alive.amax(dim=1 - self.output_dim)         # (⌈R/r⌉,)
        # The same for each output, as in weight_mask().
        alive = alive[:, None].expand(-1, outputs_per_block).reshape(-1)
        alive = alive[:outputs]                             # (R,)
        return bias * alive.to(bias.dtype)


# --------------------------------------------------------------------------------- putting masks on


def mask_weight(module: nn.Module, block: Sequence[int], *, weight: str = "weight",
                bias: str = "bias", output_dim: Optional[int] = None,
                scores: Optional[nn.Parameter] = None, kind: str = "ffn") -> BlockMask:
    """Put a block mask on one weight of a module, and on the bias that goes with it.

    From here on `module.weight` is W ⊙ M(S), and W itself is at
    `module.parametrizations.weight.original`. The module knows nothing of it: any will do that
    reads its weight as an attribute, such as nn.Linear, nn.Conv2d or nn.MultiheadAttention.

    block: (r, c), a tile of the weight as it is stored.
    weight, bias: the names of the two parameters. A bias that is absent or None is skipped, and
        bias="" leaves it without a mask.
    output_dim: the dimension of the weight that holds the outputs: 0 where weights are (out, in),
        as in torch; 1 where they are (in, out), as in GPT-2. By default 0, and an error where a
        module with a bias is known to store (in, out).
    scores, kind: see BlockMask.
    Returns the mask. Raises ValueError, with nothing changed, where something does not fit.
    """
    W = getattr(module, weight)
    b = getattr(module, bias, None)
    _check_maskable(module, weight, bias, output_dim)
    output_dim = output_dim or 0
    matrix_shape = W.flatten(1).shape       # a convolution is (out, in · kh · kw)
    mask = BlockMask(matrix_shape, block, scores, kind).to(W.device)
    # torch calls the mask whenever module.weight is read, in the forward pass or elsewhere.
    parametrize.register_parametrization(module, weight, mask)
    if b is not None:
        parametrize.register_parametrization(module, bias, BiasMask(mask, output_dim))
    return mask


def mask_dimensions(fc1: nn.Module, fc2: nn.Module, *, gate: Optional[nn.Module] = None,
                    kind: str = "ffn") -> nn.Parameter:
    """One score for each inner dimension of fc2(act(fc1(x))): row j of fc1 with column j of fc2.

    Paper: the feed-forward layers of Hybrid ([R:modules/masked_nn.py], 1d_alt). The gradient of a
    score is the sum over all that it masks: row j of dL/dW₁′ ⊙ W₁ and column j of dL/dW₂′ ⊙ W₂.

    fc1, fc2: weights of (out, in), or convolutions of (out, in, kh, kw).
    gate: of a layer fc2(act(gate(x)) · fc1(x)), as in LLaMA: its row j has the same score.
    Returns the scores, (F,) for F inner dimensions. Raises ValueError, with nothing changed, where
    the outputs of fc1 or gate are not the inputs of fc2, where one of them is masked already, or is
    known to store (in, out).
    """
    _check_feed_forward(fc1, fc2, gate)
    F, inputs = fc1.weight.flatten(1).shape
    outputs, columns = fc2.weight.flatten(1).shape
    scores = nn.Parameter(torch.zeros(F, device=fc1.weight.device, dtype=_score_dtype()))
    # A dimension is kept or pruned on both of its sides at once.
    mask_weight(fc1, (1, inputs), scores=scores, kind=kind)                 # a block is a row
    if gate is not None:
        gate_inputs = gate.weight.flatten(1).shape[1]
        mask_weight(gate, (1, gate_inputs), scores=scores, kind=kind)
    # A column is as wide as a kernel of fc2: 1 in a linear, kh · kw in a convolution.
    mask_weight(fc2, (outputs, columns // F), scores=scores, kind=kind)
    return scores


# -------------------------------------------------------------------- what a training loop asks for


def masks(model: nn.Module) -> Iterator[BlockMask]:
    """Every BlockMask of the model, in the order of its modules."""
    for module in model.modules():
        if isinstance(module, BlockMask):
            yield module


def threshold_schedule(step: int, total: int, flat_start: float, flat_end: float,
                       final: float = 0.1, initial: float = 0.0) -> float:
    """τ of a step, counted from 0: `initial`, then a cubic rise, then `final`.

        progress = (t − flat_start) / (total − flat_start − flat_end), clipped to 0 … 1
        τ(t) = final + (initial − final) · (1 − progress)³

    The rise is fast at first: 58, 88 and 98 % of it are done after a quarter, half and three
    quarters of its steps. λ follows τ, as λ(t) = λ · τ(t) / final.

    total: steps of the run. flat_start, flat_end: how many steps τ is flat at either end.
    Source: Sanh et al. 2020, eq. (5); [R:patch_coordinator.py], schedule_threshold, where both flat
    parts are multiples of the learning rate's warm-up.
    Raises ValueError where the flat parts leave no room for the rise. Differs: the reference then
    jumps to the final τ, or never leaves the initial one.
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

        of a kind   1/N Σ over its N score tensors of mean σ(S)
        penalty     1/K Σ over the K kinds of λ_kind · that

    Three means, one in the other: a large matrix weighs no more than a small one, so that each of
    its many scores is pushed less. Scores that masks of a kind share are one tensor, counted once.
    The push on one score is λ · λ_kind · σ′(S) / (K · N · number of its tensor's scores). Therefore
    λ must be found anew for each model. The push fades with σ′ as S falls: so a low score does not
    sink for ever, and its block can come back.

    weights: λ_kind by kind, 1 where not given. If all are 1 the penalty starts at 0.5.
    Source: [R:patch_coordinator.py], regularization_loss; σ is in [R:modules/masked_nn.py].
    Raises ValueError for a kind that the model does not have, or for a model without masks.
    """
    # By identity, so that scores which masks share are there once.
    scores_by_kind: Dict[str, Dict[int, Tensor]] = {}
    for mask in masks(model):
        tensors = scores_by_kind.setdefault(mask.kind, {})
        tensors[id(mask.scores)] = mask.scores
    if not scores_by_kind:
        raise ValueError("the model has no masks")
    if weights is None:
        weights = {}
    # A misspelt kind would change nothing, in silence.
    for kind in weights:
        if kind not in scores_by_kind:
            raise ValueError(f"no mask is of the kind {kind!r}: there are {sorted(scores_by_kind)}")

    # λ_kind · the mean of a kind; and the mean of these.
    total = 0.0
    for kind, tensors in scores_by_kind.items():
        # The mean over a kind's score tensors, each of which is a mean over its blocks.
        kind_mean = sum(_unsharded(S).sigmoid().mean() for S in tensors.values()) / len(tensors)
        total = total + weights.get(kind, 1.0) * kind_mean
    return total / len(scores_by_kind)


def parameter_groups(model: nn.Module, lr: float, score_lr: Optional[float],
                     weight_decay: float = 0.0) -> List[dict]:
    """Optimiser groups: matrices, vectors (biases and norms) and scores. Empty groups are left out.

    Paper: scores learn at 1e-2, weights at 3e-5; one learning-rate schedule and one gradient clip
    act on all of them ([R:patch_coordinator.py], create_optimizer_groups; [R:sparse_trainer.py]).
    Note: scores must not decay toward 0, that is toward being kept. So their weight_decay of 0 is
    written out: AdamW's default is 0.01.
    score_lr: None trains the weights alone; otherwise ValueError where every score is frozen.
    """
    if score_lr is not None:
        _check_some_scores_learn(model)
    # By identity, as in penalty(). What is frozen stays frozen.
    scores = {}
    for mask in masks(model):
        if mask.scores.requires_grad:
            scores[id(mask.scores)] = mask.scores
    # All other parameters, by their number of dimensions.
    matrices = []
    vectors = []
    for parameter in model.parameters():
        if id(parameter) in scores or not parameter.requires_grad:
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
        groups.append({"params": list(scores.values()), "lr": score_lr, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


@torch.no_grad()
def density(model: nn.Module) -> Dict[str, float]:
    """The fraction of the masked weights that their masks keep, by kind, and for "all" of them.

    Biases do not count. A weight that a mask keeps counts even where it is zero by itself.
    Raises ValueError where scores or τ are NaN.
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
    Returns the model. Raises ValueError, with nothing changed, where a masked module has other
    parametrizations too, where scores or τ are NaN, or where a masked weight is tied to one that
    is not masked alike. Weights that are tied and masked alike stay tied. Warns where pruning looks
    unintended.
    """
    # All is checked before anything is changed.
    _check_not_nan(model)
    masked_modules = []
    for module in model.modules():
        if not parametrize.is_parametrized(module):
            continue
        # Are its parametrizations masks of ours? weight_norm and its like are not.
        ours = []
        for chain in module.parametrizations.values():
            for parametrization in chain:
                ours.append(isinstance(parametrization, (BlockMask, BiasMask)))
        if any(ours) and not all(ours):
            raise ValueError("remove the other parametrizations of the masked modules first")
        if all(ours):
            masked_modules.append(module)
    _check_tied(model, masked_modules)
    _warn_if_nothing_is_pruned(model)

    baked: Dict[Tensor, nn.Parameter] = {}      # W → W ⊙ M(S): tied modules share both
    for module in masked_modules:
        # 1. Read the values as the module sees them: W ⊙ M(S), and the masked bias.
        values = {}
        for name, chain in module.parametrizations.items():
            W = chain.original
            if W not in baked:
                value = getattr(module, name).detach().clone()
                baked[W] = nn.Parameter(value, requires_grad=W.requires_grad)
            values[name] = baked[W]
        # 2. Go back to the plain class. Note: torch's remove_parametrizations() deletes a property
        #    of the class it made, which copies of a model share: the copies would break.
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]
        # 3. Put the values in, as ordinary parameters.
        for name, value in values.items():
            module.register_parameter(name, value)
    return model


# ------------------------------------------------------------------- from zeros to smaller matrices


@torch.no_grad()
def cut_heads(query: nn.Linear, key: nn.Linear, value: nn.Linear, out: nn.Linear,
              head_size: int) -> int:
    """Remove, in place, the attention heads that add nothing or a constant.

    query, key, value: (H · D, in), baked; a head is D = head_size rows of each, in order.
    out: (E, H · D); the same head is D of its columns. Biases may be None.
    Returns how many heads are left, 0 included: whoever reshapes by heads must be told. Weights and
    biases are new parameters, for which an optimiser has to be made anew.

        columns of `out` all 0     the head adds nothing
        rows of `value` all 0      its values are bᵥ at every token. Attention weights sum to 1, so
                                   the head's output is bᵥ too: it adds out[:, head] · bᵥ[head]

    The constant goes into the bias of `out`, in fp64. Exact without dropout of attention weights.
    Differs: the reference removes a head as soon as query, key or value is empty. With an empty
    query (its bias is 0 too) or key attention is uniform, but the head still adds the mean of V:
    here it stays.
    Raises ValueError where the linears are not plain, or do not fit each other.
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
    return int(kept.sum())


@torch.no_grad()
def cut_dimensions(fc1: nn.Linear, fc2: nn.Linear, act: Callable[[Tensor], Tensor], *,
                   gate: Optional[nn.Linear] = None) -> int:
    """Remove, in place, the inner dimensions of fc2(act(fc1(x))) that add nothing or a constant.

    fc1, fc2: (F, in) and (out, F), baked, with or without biases. act: elementwise.
    Returns how many dimensions are left.

        column j of fc2 all 0      the dimension adds nothing
        row j of fc1 all 0         its activation is act(b₁[j]): it adds act(b₁[j]) · fc2[:, j]

    gate: (F, in) of a layer fc2(act(gate(x)) · fc1(x)). Activation j is act(gate(x)ⱼ) · fc1(x)ⱼ:

        both rows j all 0                     the constant act(b_gate[j]) · b₁[j]
        row j and bias j of fc1 all 0         the constant 0, whatever the gate
        row j of gate 0, act(b_gate[j]) 0     the constant 0, whatever fc1

    The constant goes into the bias of fc2, in fp64; where fc2 had none, it gets one.
    Raises ValueError where the linears are not plain, fc2 does not take what fc1 gives, or act
    mixes dimensions, as softmax and LayerNorm do.
    """
    _check_dimensions(fc1, fc2, gate)
    _check_act(act, fc1.weight.device)
    W1 = fc1.weight.double()                                    # (F, in)
    W2 = fc2.weight.double()                                    # (out, F)
    b1 = _bias_or_zeros(fc1)                                    # (F,)
    # A dimension is needed where its activation varies, and its column of W2 has something in it.
    fc1_varies = (W1 != 0).any(dim=1)                           # (F,)
    varies = fc1_varies
    # A product varies where one of its factors does, unless the other is 0 for certain.
    if gate is not None:
        b_gate = _bias_or_zeros(gate)
        gate_varies = (gate.weight != 0).any(dim=1)
        fc1_is_0 = ~fc1_varies & (b1 == 0)
        gate_is_0 = ~gate_varies & (act(b_gate.clone()) == 0)   # a copy: act may work in place
        varies = (fc1_varies | gate_varies) & ~fc1_is_0 & ~gate_is_0
    kept = varies & (W2 != 0).any(dim=0)
    # What the removed dimensions add is W2 act(b₁). Without a bias act(0) may still not be 0.
    if gate is None:
        activation = act(b1[~kept])
    else:
        activation = act(b_gate[~kept]) * b1[~kept]
    constant = W2[:, ~kept] @ activation                        # (out,)
    _add_to_bias(fc2, constant)
    # Rows of fc1 and of the gate go, and the columns of fc2 that read them.
    _keep_outputs(fc1, kept)
    if gate is not None:
        _keep_outputs(gate, kept)
    _keep_inputs(fc2, kept)
    return int(kept.sum())


def _bias_or_zeros(linear: nn.Linear) -> Tensor:
    """The bias in fp64, zeros where there is none."""
    if linear.bias is None:
        return linear.weight.new_zeros(linear.out_features, dtype=torch.float64)
    return linear.bias.double()


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


# ------------------------------------------------------------------------------------------- guards
# Against misuse, with a sentence that says what is wrong. They are no part of the method.


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


def _unsharded(scores: Tensor) -> Tensor:
    """All scores, where each process holds a shard of them only, as a DTensor under FSDP2."""
    if hasattr(scores, "full_tensor"):
        return scores.full_tensor()
    return scores


def _check_scores(scores: Tensor, grid: Sequence[int]) -> None:
    rows, columns = grid
    if scores.numel() != rows * columns:
        raise ValueError(f"{scores.numel()} shared scores for {rows}x{columns} blocks")
    if scores.element_size() < 4:
        raise ValueError(f"scores of {scores.dtype} lose the small steps: torch.float32 is needed")


TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _stores_in_out(module: nn.Module, W: Tensor) -> bool:
    """Whether the weight is known to be (in, out): a transposed convolution's, GPT-2's Conv1D's."""
    if isinstance(module, TRANSPOSED):
        return True
    class_names = [cls.__name__ for cls in type(module).__mro__]
    return "Conv1D" in class_names and W.dim() == 2


def _check_output_dim(module: nn.Module, W: Tensor, output_dim: Optional[int]) -> None:
    # An explicit 0 is accepted for a class that is merely named Conv1D.
    if isinstance(module, TRANSPOSED):
        wrong = output_dim != 1
    else:
        wrong = output_dim is None
    if wrong and _stores_in_out(module, W):
        raise ValueError(f"the weight of {type(module).__name__} is (in, out): say output_dim=1, "
                         f'or bias="" to leave the bias without a mask')


def _check_maskable(module: nn.Module, weight: str, bias: str, output_dim: Optional[int]) -> None:
    # Can this weight have a mask?
    W = getattr(module, weight)
    b = getattr(module, bias, None)
    if parametrize.is_parametrized(module, weight):
        raise ValueError(f"the {weight} of {type(module).__name__} is parametrized already")
    if W.dim() < 2:
        raise ValueError(f"a weight of two and more dimensions is expected, not {tuple(W.shape)}")
    if b is None:
        return
    # Does the bias go with the dimension that is said to hold the outputs?
    _check_output_dim(module, W, output_dim)
    output_dim = output_dim or 0
    if len(b) != W.flatten(1).shape[output_dim]:
        raise ValueError(f"a weight of {tuple(W.shape)} with its outputs in dimension {output_dim} "
                         f"does not go with a bias of {tuple(b.shape)}: say output_dim=1 where "
                         f'weights are (in, out), or bias="" to leave the bias without a mask')


def _check_feed_forward(fc1: nn.Module, fc2: nn.Module, gate: Optional[nn.Module]) -> None:
    for module in (fc1, fc2, gate):
        if module is not None and _stores_in_out(module, module.weight):
            raise ValueError(f"the weight of {type(module).__name__} is (in, out), not (out, in)")
    F = len(fc1.weight)
    if fc2.weight.shape[1] != F:
        raise ValueError(f"fc1 has {F} outputs but fc2 {fc2.weight.shape[1]} inputs")
    if parametrize.is_parametrized(fc1, "weight") or parametrize.is_parametrized(fc2, "weight"):
        raise ValueError("fc1 or fc2 is parametrized already")
    if gate is not None:
        _check_gate(gate, F)


def _check_some_scores_learn(model: nn.Module) -> None:
    learning = [mask.scores.requires_grad for mask in masks(model)]
    if learning and not any(learning):
        raise ValueError("every score is frozen, nothing would be pruned: set requires_grad of "
                         "mask.scores for masks(model), or score_lr=None to train weights alone")


def _check_not_nan(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if not isinstance(module, BlockMask) or module.scores.is_meta:
            continue
        if module.scores.isnan().any() or module.threshold.isnan():
            raise ValueError(f"scores or threshold are NaN in {name or 'the mask'}: training has "
                             f"diverged, go back to a checkpoint and look at loss and gradients")


def _check_tied(model: nn.Module, masked_modules: Sequence[nn.Module]) -> None:
    """A weight that several modules own must be masked alike in all of them."""
    # How many modules own each parameter?
    owners: Dict[Tensor, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[parameter] = owners.get(parameter, 0) + 1
    tied: Dict[Tensor, List[Tensor]] = {}       # original → its masked value in each owner
    for module in masked_modules:
        for name, chain in module.parametrizations.items():
            if owners[chain.original] > 1:
                tied.setdefault(chain.original, []).append(getattr(module, name))
    # Alike is: the same values come out of every mask.
    for original, values in tied.items():
        alike = [torch.equal(value, values[0]) for value in values]
        if len(values) < owners[original] or not all(alike):
            everything = model.named_parameters(remove_duplicate=False)
            names = [name for name, parameter in everything if parameter is original]
            raise ValueError(
                f"a masked weight or bias has another owner, which is not masked alike: {names}; "
                f"mask all of them with the same scores=mask.scores, or untie those without a mask "
                f"before bake(), with module.weight = nn.Parameter(module.weight.clone()); where "
                f'it is a bias, bias="" in mask_weight() leaves it without a mask')


def _warn_if_nothing_is_pruned(model: nn.Module) -> None:
    thresholds = []
    lowest = []
    highest = []
    pruned = False
    for mask in masks(model):
        # On the meta device there are no numbers to look at.
        if mask.scores.is_meta:
            return
        thresholds.append(mask.threshold.item())
        lowest.append(mask.scores.min().item())
        highest.append(mask.scores.max().item())
        pruned = pruned or not mask.block_mask().all()
    if not thresholds:
        return
    # Training never reached the masks if all scores, or a τ, are still 0, where they start.
    untouched = min(lowest) == max(highest) == 0
    if min(thresholds) == 0 or untouched or not pruned:
        warnings.warn(
            f"nothing, or not what was meant, is pruned, with τ from {min(thresholds):g} to "
            f"{max(thresholds):g} and scores from {min(lowest):g} to {max(highest):g}: was "
            f"set_threshold() called, were the masks put on before the optimiser was made, and did "
            f"it get the scores with a rate of about 1e-2, as in parameter_groups()?", stacklevel=4)


def _check_plain_linears(*linears: nn.Module) -> None:
    for linear in linears:
        if not isinstance(linear, nn.Linear) or parametrize.is_parametrized(linear):
            raise ValueError(f"a plain nn.Linear is expected, of a model that is baked: {linear}")


def _check_heads(query: nn.Linear, key: nn.Linear, value: nn.Linear, out: nn.Linear,
                 head_size: int) -> None:
    _check_plain_linears(query, key, value, out)
    # The same rows of query, key and value are one head, and the same columns of out.
    inner = out.in_features
    for linear in (query, key, value):
        if linear.out_features != inner:
            raise ValueError(f"as many outputs as `out` has inputs, {inner}, are expected: "
                             f"{linear}")
    if inner % head_size != 0:
        raise ValueError(f"{inner} rows are no whole number of heads of {head_size}")


def _check_dimensions(fc1: nn.Linear, fc2: nn.Linear, gate: Optional[nn.Linear]) -> None:
    _check_plain_linears(fc1, fc2)
    if fc1.out_features != fc2.in_features:
        raise ValueError(f"as many outputs of fc1 as inputs of fc2 are expected: {fc1}, {fc2}")
    if gate is not None:
        _check_plain_linears(gate)
        _check_gate(gate, fc1.out_features)


def _check_gate(gate: nn.Module, F: int) -> None:
    if len(gate.weight) != F:
        raise ValueError(f"the gate has {len(gate.weight)} outputs, but fc1 has {F}")
    if parametrize.is_parametrized(gate, "weight"):
        raise ValueError("the gate is parametrized already")


def _check_act(act: Callable[[Tensor], Tensor], device: torch.device) -> None:
    """act of some numbers must be act of each by itself: else no dimension can be taken out."""
    values = torch.tensor([-3, -1.5, -0.5, 0, 0.25, 1, 2, 6], dtype=torch.float64, device=device)
    # Eight numbers at once, and each by itself: is it the same?
    try:
        together = act(values.clone())      # a clone, since act may work in place
        apart = torch.stack([act(value.clone().view(1)) for value in values])
        fits = together.shape == values.shape and apart.shape == (len(values), 1)
        fits = fits and torch.allclose(together, apart[:, 0], rtol=1e-4, atol=1e-6, equal_nan=True)
    except Exception as error:      # whatever act raises where it is given another number of values
        raise ValueError(f"act does not take single numbers of fp64: {error}") from error
    if not fits:
        raise ValueError("act is expected to work on single numbers, but act of eight numbers is "
                         "not act of each: softmax, norms, GLU and dropout in training cannot be "
                         "cut")
