"""Block pruning: fine-tune a network while learning which blocks of its weights it can do without.

The whole method of
    Lagunas, Charlaix, Sanh, Rush: Block Pruning For Faster Transformers, EMNLP 2021,
    built on Sanh, Wolf, Rush: Movement Pruning, NeurIPS 2020,
in one file that imports torch alone and knows nothing of BERT: copy it into your own project.
Reference code: huggingface/nn_pruning at 0cef2b2, cited below as [R:file].

One idea carries everything in the paper: a *block* is any r × c tile of a weight matrix. 1 × 1 is
movement pruning, 32 × 32 is block pruning, (head size, in) is an attention head, (1, in) is a row
and (out, 1) a column. Each block has one learned number, its score; matrices may share scores.

    S  scores, one a block                    σ  the sigmoid
    W  a weight, R × C = (out, in)            τ  the threshold that σ(S) is compared with
    r × c  the block                          λ  how hard the penalty pushes scores down
    M(S)  the mask, on the R/r × C/c grid of blocks (`block_mask`) or on the weight (`weight_mask`)

Left out, because the paper's final models do not use them: top-k, L0 and magnitude masks.
Comments: `# Paper:` is the authors' method, `# Note:` our remark, `# Differs:` a deviation.
"""
import math
from typing import Iterator, Mapping, Optional, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

# ---------------------------------------------------------------------------------------- the mask


class StraightThrough(torch.autograd.Function):
    """M(S) = 1[σ(S) > τ] forward, the identity backward (Sanh et al. 2020, eq. (2); [R:binarizer.py]).

    The step has a zero derivative nearly everywhere, so its gradient is replaced by 1: what arrives
    at M goes to S as it is. With W′ = W ⊙ M, autograd then gives, summed over the block of a score,

        dL/dS = Σ dL/dW′ ⊙ W        dL/dW = dL/dW′ ⊙ M

    A gradient step on W is −dL/dW, so dL/dS > 0 (S falls) when the weights of the block move toward
    zero, and dL/dS < 0 (S rises) when they move away: hence "movement". The sum uses W, not W′, so
    the score of a pruned block keeps learning, and the block can come back.
    """

    @staticmethod
    def forward(ctx, scores: Tensor, threshold: Tensor) -> Tensor:
        return (torch.sigmoid(scores) > threshold).to(scores.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        # Note: no σ′(S) here and no mean over the block. With either, it would be another method.
        return grad, None


class BlockMask(nn.Module):
    """The learned mask of one weight, as a parametrization: weight ↦ weight ⊙ M(S).

    A weight of more than two dimensions is seen as the matrix `weight.flatten(1)`: a convolution is
    (out, in · kh · kw). Blocks need not divide the matrix: those at its edge are smaller.
    # Differs: [R:masked_nn.py] asserts exact division, and keeps a floor of 0.5 % of the blocks.

    shape: (R, C) of that matrix.      block: (r, c), 1 ≤ r ≤ R and 1 ≤ c ≤ C, else ValueError.
    scores: a parameter to share, with one element for each of the ⌈R/r⌉ · ⌈C/c⌉ blocks; fresh ones
        start at 0, where σ = 0.5 is far above any τ in use, so that nothing is pruned at first.
    kind: the group that penalty() and density() count this weight in.
    """

    def __init__(self, shape: Sequence[int], block: Sequence[int],
                 scores: Optional[nn.Parameter] = None, kind: str = "dense"):
        super().__init__()
        (R, C), (r, c) = shape, block
        if not (1 <= r <= R and 1 <= c <= C):
            raise ValueError(f"a block of {r}x{c} does not fit a weight of {R}x{C}: "
                             f"use 1 to {R} rows and 1 to {C} columns")
        self.shape, self.block, self.kind = (R, C), (r, c), kind
        self.grid = (math.ceil(R / r), math.ceil(C / c))
        if scores is None:
            scores = nn.Parameter(torch.zeros(self.grid))
        elif scores.numel() != math.prod(self.grid):
            raise ValueError(f"{scores.numel()} shared scores for {self.grid[0]}x{self.grid[1]} "
                             f"blocks of {r}x{c}: their numbers must agree")
        self.scores = scores
        # A buffer, so that τ is saved: a reloaded model still prunes.
        self.register_buffer("threshold", torch.zeros(()))

    def block_mask(self) -> Tensor:
        """M(S) on the grid of blocks, (⌈R/r⌉, ⌈C/c⌉)."""
        return StraightThrough.apply(self.scores, self.threshold).view(self.grid)

    def weight_mask(self) -> Tensor:
        """M(S) on the weight, R × C, or of length 1 along a dimension that one block spans.

        The grid [a b] with 2 × 2 blocks on a 2 × 3 weight becomes [a a b]: spanning the two rows
        is left to broadcasting, and the last block is one column wide.
        """
        mask = self.block_mask()
        for dim in (0, 1):
            if self.grid[dim] > 1:
                mask = mask.repeat_interleave(self.block[dim], dim).narrow(dim, 0, self.shape[dim])
        return mask

    def forward(self, weight: Tensor) -> Tensor:
        return (weight.flatten(1) * self.weight_mask().to(weight.dtype)).view_as(weight)


class BiasMask(nn.Module):
    """Zeroes the biases of outputs that have no weight left (`bias_mask` of [R:masked_nn.py]).

    Boolean: no gradient reaches the scores through the bias.
    """

    def __init__(self, mask: BlockMask, output_dim: int):
        super().__init__()
        self._mask = (mask,)  # Note: in a tuple, so that the scores are not registered twice
        self.output_dim = output_dim

    def forward(self, bias: Tensor) -> Tensor:
        mask, dim = self._mask[0], self.output_dim
        alive = mask.block_mask().detach().amax(1 - dim).repeat_interleave(mask.block[dim])
        return bias * alive[:mask.shape[dim]].to(bias.dtype)


# ------------------------------------------------------------------------------- putting masks on


def mask_weight(module: nn.Module, block: Sequence[int], *, weight: str = "weight",
                bias: str = "bias", output_dim: int = 0, scores: Optional[nn.Parameter] = None,
                kind: str = "dense") -> BlockMask:
    """Put a block mask on one weight of a module, and on the bias that goes with it.

    From here on `module.weight` is W ⊙ M(S); W itself is `module.parametrizations.weight.original`.
    The module knows nothing of it: nn.Linear, nn.Conv2d, nn.MultiheadAttention, any will do.

    block: (r, c), tiles of the weight as it is stored.
    weight, bias: the names of the two parameters; a bias that is absent or None is skipped.
    output_dim: the dimension of the weight that holds the outputs: 0 in torch (out, in), 1 where
        weights are stored (in, out), as in GPT-2.
    scores: the scores of another mask, to share them.      kind: see BlockMask.
    Raises ValueError where the block does not fit, or the weight has a parametrization already.
    """
    W, b = getattr(module, weight), getattr(module, bias, None)
    if parametrize.is_parametrized(module, weight):
        raise ValueError(f"the {weight} of {type(module).__name__} is parametrized already")
    if W.dim() < 2:
        raise ValueError(f"only weights of two and more dimensions have blocks, not {tuple(W.shape)}")
    mask = BlockMask(W.flatten(1).shape, block, scores, kind).to(W.device)
    parametrize.register_parametrization(module, weight, mask)
    if b is not None:
        parametrize.register_parametrization(module, bias, BiasMask(mask, output_dim))
    return mask


def mask_dimensions(fc1: nn.Module, fc2: nn.Module, *, kind: str = "dense") -> nn.Parameter:
    """One score for each inner dimension of fc2(act(fc1(x))): a row of fc1 with a column of fc2.

    Paper: the feed-forward layers of Hybrid (`1d_alt` of [R:model_structure.py]). Weights are
    (out, in), or (out, in, kh, kw). Returns the shared scores, (F,) for F inner dimensions.
    Raises ValueError where the outputs of fc1 do not match the inputs of fc2.
    """
    F, C = fc1.weight.flatten(1).shape
    R, inputs = fc2.weight.flatten(1).shape
    if fc2.weight.shape[1] != F:
        raise ValueError(f"fc1 has {F} outputs but fc2 {fc2.weight.shape[1]} inputs")
    scores = nn.Parameter(torch.zeros(F, device=fc1.weight.device))
    mask_weight(fc1, (1, C), scores=scores, kind=kind)
    mask_weight(fc2, (R, inputs // F), scores=scores, kind=kind)
    return scores


# ------------------------------------------------------------------- what a training loop asks for


def masks(model: nn.Module) -> Iterator[BlockMask]:
    """Every BlockMask of the model, in the order of its modules."""
    return (module for module in model.modules() if isinstance(module, BlockMask))


def threshold_schedule(step: int, total: int, start: int, end: int,
                       final: float = 0.1, initial: float = 0.0) -> float:
    """τ(t): flat for `start` steps, a cubic rise, flat at `final` for the last `end` of `total` steps.

    Paper: Sanh et al. 2020, eq. (5); [R:patch_coordinator.py schedule_threshold], where `start` and
    `end` are multiples of the learning rate's warm-up. The rise is fast at first: τ is at 58, 87
    and 98 % of its way after a quarter, half and three quarters of it. λ follows τ:
    λ(t) = λ · τ(t) / τ_final, so that nothing is pushed down while nothing can be pruned.
    """
    if start + end >= total:
        raise ValueError(f"no step is left for the threshold to rise: {start} flat steps at the start "
                         f"and {end} at the end, of {total}: train longer, or shorten the flat parts")
    if step <= start:
        return initial
    if step > total - end:
        return final
    left = 1 - (step - start) / (total - start - end)
    return final + (initial - final) * left ** 3


def set_threshold(model: nn.Module, threshold: float) -> None:
    """Set τ in every mask of the model."""
    for mask in masks(model):
        mask.threshold.fill_(threshold)


def penalty(model: nn.Module, weights: Optional[Mapping[str, float]] = None) -> Tensor:
    """The penalty R, to be added to the loss as λ(t) · R; 0.5 at the start, a scalar.

        R = 1/K Σ_kinds λ_kind · 1/N_kind Σ_tensors mean σ(S)

    Paper: a mean over each of the N_kind distinct score tensors of a kind, then over the K kinds
    ([R:patch_coordinator.py regularization_loss]). Its gradient is the ordinary one, λ·σ′(S) over
    numel·N·K, and fades as S falls. weights: λ_kind by kind, 1 where none is given; an unknown
    kind raises ValueError, as does a model without masks.
    """
    by_kind: dict[str, dict[int, Tensor]] = {}
    for mask in masks(model):  # by identity: shared scores count once
        by_kind.setdefault(mask.kind, {})[id(mask.scores)] = mask.scores
    weights = weights or {}
    if not by_kind or set(weights) - set(by_kind):
        raise ValueError(f"the model has masks of the kinds {sorted(by_kind)}, not {sorted(weights)}")
    return sum(weights.get(kind, 1.0) * sum(S.sigmoid().mean() for S in scores.values()) / len(scores)
               for kind, scores in by_kind.items()) / len(by_kind)


def parameter_groups(model: nn.Module, lr: float, score_lr: float,
                     weight_decay: float = 0.0) -> list[dict]:
    """Optimiser groups: matrices, vectors (biases and norms: no decay), scores (own rate, no decay).

    Paper: one schedule and one gradient clip act on all three ([R:sparse_trainer.py]). A weight
    decay on scores would push each toward σ = 0.5, that is toward being kept: 0 is written out,
    because torch.optim.AdamW would otherwise use 0.01.
    """
    scores = {id(mask.scores): mask.scores for mask in masks(model)}
    others = [p for p in model.parameters() if id(p) not in scores and p.requires_grad]
    groups = [{"params": [p for p in others if p.dim() > 1], "lr": lr, "weight_decay": weight_decay},
              {"params": [p for p in others if p.dim() <= 1], "lr": lr, "weight_decay": 0.0},
              {"params": list(scores.values()), "lr": score_lr, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


@torch.no_grad()
def density(model: nn.Module) -> dict[str, float]:
    """The fraction of weights kept, of the masked weights only, by kind and for "all" of them.

    Biases do not count. Weights that a mask keeps count even where they are zero by themselves.
    """
    kept: dict[str, float] = {}
    size: dict[str, int] = {}
    for mask in masks(model):
        for kind in (mask.kind, "all"):
            kept[kind] = kept.get(kind, 0) + mask.weight_mask().expand(mask.shape).sum().item()
            size[kind] = size.get(kind, 0) + math.prod(mask.shape)
    return {kind: kept[kind] / size[kind] for kind in kept}


@torch.no_grad()
def bake(model: nn.Module) -> nn.Module:
    """Fold every mask into its weight, in place: W becomes W ⊙ M(S), scores and masks are gone.

    The same function, in plain modules that torch.save and torch.export take. Returns the model.
    Raises ValueError for a module that has other parametrizations beside ours.
    """
    for module in list(model.modules()):
        if not parametrize.is_parametrized(module):
            continue
        lists = dict(module.parametrizations.items())
        ours = [all(isinstance(p, (BlockMask, BiasMask)) for p in ps) for ps in lists.values()]
        if not all(ours):
            if any(ours):
                raise ValueError(f"remove the other parametrizations of {type(module).__name__} first")
            continue
        values = {name: nn.Parameter(getattr(module, name).detach().clone(), ps.original.requires_grad)
                  for name, ps in lists.items()}
        # Note: torch's remove_parametrizations() deletes the property from the class it generated,
        # which deepcopy shares between copies of a model. Going back to the base class does not.
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]
        for name, value in values.items():
            module.register_parameter(name, value)
    return model
