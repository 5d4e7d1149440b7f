"""Block pruning: fine-tune a network while learning which blocks of its weights it can do without.

The whole method of
    Lagunas, Charlaix, Sanh, Rush: Block Pruning For Faster Transformers, EMNLP 2021,
    built on Sanh, Wolf, Rush: Movement Pruning, NeurIPS 2020,
in one file that imports torch alone and knows nothing of BERT: copy it into your own project.
Reference code: huggingface/nn_pruning at 0cef2b2, cited below as [R:file].

One idea carries everything: a *block* is any r × c tile of a weight matrix. 1 × 1 is movement
pruning, 32 × 32 block pruning, (head size, in) an attention head, (1, in) a row, (out, 1) a
column. Each block has one learned number, its score; matrices may share scores.

    S  scores, one a block                    σ  the sigmoid
    W  a weight, R × C = (out, in)            τ  the threshold that σ(S) is compared with
    r × c  the block                          λ  how hard the penalty pushes scores down
    M(S)  the mask, on the R/r × C/c grid of blocks (`block_mask`) or on the weight (`weight_mask`)

Left out, since the paper's final models do not use them: top-k, L0, magnitude. In comments, `# Paper:` is
the authors' method, `# Note:` our remark, `# Differs:` a deviation.
"""
import math
from typing import Iterator, Mapping, Optional, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

# ---------------------------------------------------------------------------------------- the mask

class StraightThrough(torch.autograd.Function):
    """M(S) = 1[σ(S) > τ] forward ([R:binarizer.py]), the identity backward (Sanh et al. 2020, eq. (2)).

    The step's derivative is 0 nearly everywhere, so it is replaced by 1: what arrives at M goes on to
    S as it is. With W′ = W ⊙ M autograd then gives, summed over the block of a score,

        dL/dS = Σ dL/dW′ ⊙ W        dL/dW = dL/dW′ ⊙ M

    Descent moves W along −dL/dW, so S falls while the block moves toward zero and rises while it
    moves away: "movement". With W, not W′, the score of a pruned block learns on: it can come back.
    """

    @staticmethod
    def forward(ctx, scores: Tensor, threshold: Tensor) -> Tensor:
        return (torch.sigmoid(scores) > threshold).to(scores.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None  # Note: no σ′(S), and no mean over the block: each is another method


class BlockMask(nn.Module):
    """The learned mask of one weight, as a parametrization: weight ↦ weight ⊙ M(S).

    A weight of more dimensions is seen as the matrix `weight.flatten(1)`: a convolution is (out,
    in · kh · kw). Blocks need not divide the matrix: those at its edge are smaller.
    # Differs: the reference asserts exact division, and by default keeps a floor of 0.5 % of the blocks.

    shape: (R, C) of that matrix.      block: (r, c), 1 ≤ r ≤ R and 1 ≤ c ≤ C, else ValueError.
    scores: a parameter to share, one element for each of the ⌈R/r⌉ · ⌈C/c⌉ blocks. Fresh ones start
        at 0, where σ = 0.5 is far above any τ in use: nothing is pruned at first.
    kind: the group that penalty() and density() count this weight in.
    """

    def __init__(self, shape: Sequence[int], block: Sequence[int],
                 scores: Optional[nn.Parameter] = None, kind: str = "dense"):
        super().__init__()
        (R, C), (r, c) = shape, block
        if not (1 <= r <= R and 1 <= c <= C):
            raise ValueError(f"a block of {r}x{c} does not fit a weight of {R}x{C}")
        self.shape, self.block, self.kind = (R, C), (r, c), kind
        self.grid = (math.ceil(R / r), math.ceil(C / c))
        if scores is None:
            scores = nn.Parameter(torch.zeros(self.grid))
        elif scores.numel() != math.prod(self.grid):
            raise ValueError(f"{scores.numel()} shared scores for {self.grid[0]}x{self.grid[1]} blocks")
        self.scores = scores  # Note: load_state_dict(assign=True) and to_empty() would untie shared ones
        self.register_buffer("threshold", torch.zeros(()))  # saved: a reloaded model still prunes

    def block_mask(self) -> Tensor:
        """M(S) on the grid of blocks, (⌈R/r⌉, ⌈C/c⌉)."""
        return StraightThrough.apply(self.scores, self.threshold).view(self.grid)

    def weight_mask(self) -> Tensor:
        """M(S) on the weight, R × C, or of length 1 along a dimension that one block spans.

        A grid [a b] of 2 × 2 blocks on a 2 × 3 weight becomes [a a b]: broadcasting does the rows.
        """
        r, c = (size if blocks > 1 else 1 for size, blocks in zip(self.block, self.grid))
        tiles = self.block_mask()[:, None, :, None].expand(-1, r, -1, c)        # (R/r, r, C/c, c)
        return tiles.reshape(self.grid[0] * r, self.grid[1] * c)[:self.shape[0], :self.shape[1]]

    def forward(self, weight: Tensor) -> Tensor:
        return (weight.flatten(1) * self.weight_mask().to(weight.dtype)).view_as(weight)


class BiasMask(nn.Module):
    """Zeroes the bias of an output with no weight left; no gradient to S ([R:masked_nn.py] bias_mask)."""

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

    From here on `module.weight` is W ⊙ M(S), and W `module.parametrizations.weight.original`. The
    module knows nothing of it: nn.Linear, nn.Conv2d, nn.MultiheadAttention and others will do.

    block: (r, c), tiles of the weight as it is stored.      scores, kind: see BlockMask.
    weight, bias: the names of the two parameters; a bias that is absent or None is skipped.
    output_dim: the dimension of the weight that holds the outputs: 0 in torch (out, in), 1 where
        weights are stored (in, out), as in GPT-2.
    Raises ValueError, with nothing changed, where block, bias or scores do not fit the weight.
    """
    W, b = getattr(module, weight), getattr(module, bias, None)
    if parametrize.is_parametrized(module, weight):
        raise ValueError(f"the {weight} of {type(module).__name__} is parametrized already")
    if W.dim() < 2 or (b is not None and len(b) != W.flatten(1).shape[output_dim]):
        raise ValueError("a weight of two and more dimensions is expected, with its outputs in dimension "
                         f"{output_dim}: {tuple(W.shape)}, bias {None if b is None else tuple(b.shape)}")
    mask = BlockMask(W.flatten(1).shape, block, scores, kind).to(W.device)
    parametrize.register_parametrization(module, weight, mask)
    if b is not None:
        parametrize.register_parametrization(module, bias, BiasMask(mask, output_dim))
    return mask


def mask_dimensions(fc1: nn.Module, fc2: nn.Module, *, kind: str = "dense") -> nn.Parameter:
    """One score for each inner dimension of fc2(act(fc1(x))): a row of fc1 with a column of fc2.

    Paper: the feed-forward layers of Hybrid ([R:modules/masked_nn.py] 1d_alt). Weights are (out, in),
    or (out, in, kh, kw). Returns the scores, (F,) for F inner dimensions. Raises ValueError where
    the outputs of fc1 are not the inputs of fc2.
    """
    F, C = fc1.weight.flatten(1).shape
    R, inputs = fc2.weight.flatten(1).shape
    if fc2.weight.shape[1] != F or parametrize.is_parametrized(fc2, "weight"):
        raise ValueError(f"fc1 has {F} outputs but fc2 {fc2.weight.shape[1]} inputs, or fc2 is masked already")
    scores = nn.Parameter(torch.zeros(F, device=fc1.weight.device))
    mask_weight(fc1, (1, C), scores=scores, kind=kind)
    mask_weight(fc2, (R, inputs // F), scores=scores, kind=kind)
    return scores


# ------------------------------------------------------------------- what a training loop asks for

def masks(model: nn.Module) -> Iterator[BlockMask]:
    """Every BlockMask of the model, in the order of its modules."""
    return (module for module in model.modules() if isinstance(module, BlockMask))


def threshold_schedule(step: int, total: int, start: float, end: float,
                       final: float = 0.1, initial: float = 0.0) -> float:
    """τ(t): `initial` to step `start`, a cubic rise, `final` for the last `end` of `total` steps.

    Paper: Sanh et al. 2020, eq. (5); [R:patch_coordinator.py schedule_threshold], where `start` and
    `end` are multiples of the learning rate's warm-up. The rise is fast at first: 58, 88 and 98 %
    of it are done after a quarter, half and three quarters of its steps. λ follows τ,
    λ(t) = λ · τ(t) / τ_final: nothing is pushed down while nothing can be pruned.
    # Differs: a schedule without a rise is a ValueError; the reference jumps, or trains dense and scores pruned.
    """
    if start + end >= total:
        raise ValueError(f"no step is left for τ to rise: of {total}, the first {start} and the last {end} "
                         "are flat; train longer, or with a shorter warm-up")
    left = 1 - (step - start) / (total - start - end)  # of the rise: 1 and more before it, 0 and less after
    return final + (initial - final) * min(1, max(0, left)) ** 3


def set_threshold(model: nn.Module, threshold: float) -> None:
    """Set τ in every mask of the model. Paper: evaluation is at the final τ, whatever the step."""
    for mask in masks(model):
        mask.threshold.fill_(threshold)


def penalty(model: nn.Module, weights: Optional[Mapping[str, float]] = None) -> Tensor:
    """The penalty R, a scalar, to be added to the loss as λ(t) · R; 0.5 at first, if all λ_kind are 1.

        R = 1/K Σ_kinds λ_kind · 1/N_kind Σ_tensors mean σ(S)

    Paper: a mean over each of the N_kind distinct score tensors of a kind, then over the K kinds
    ([R:patch_coordinator.py regularization_loss]). Its gradient is the ordinary one, and fades as S
    falls. weights: λ_kind, 1 where not given. ValueError for an unknown kind, or without masks.
    """
    by_kind: dict[str, dict[int, Tensor]] = {}
    for mask in masks(model):  # by identity: shared scores count once
        by_kind.setdefault(mask.kind, {})[id(mask.scores)] = mask.scores
    weights = weights or {}
    if not by_kind or set(weights) - set(by_kind):
        raise ValueError(f"the model has masks of the kinds {sorted(by_kind)}, not {sorted(weights)}")
    return sum(weights.get(kind, 1.0) * sum(S.sigmoid().mean() for S in tensors.values()) / len(tensors)
               for kind, tensors in by_kind.items()) / len(by_kind)


def parameter_groups(model: nn.Module, lr: float, score_lr: Optional[float],
                     weight_decay: float = 0.0) -> list[dict]:
    """Optimiser groups: matrices, vectors (biases, norms) and scores, without those that are empty.

    Paper: one schedule and one gradient clip act on all three ([R:patch_coordinator.py
    create_optimizer_groups; sparse_trainer.py]). Decay would pull scores to 0, that is toward being
    kept: 0 is written out, for AdamW's default is 0.01.
    """
    scores = {id(mask.scores): mask.scores for mask in masks(model) if mask.scores.requires_grad}
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
    counts: dict[str, tuple[float, int]] = {}
    for mask in masks(model):
        kept = mask.weight_mask().expand(mask.shape).sum().item()
        for kind in (mask.kind, "all"):
            total = counts.get(kind, (0, 0))
            counts[kind] = total[0] + kept, total[1] + math.prod(mask.shape)
    return {kind: kept / size for kind, (kept, size) in counts.items()}


@torch.no_grad()
def bake(model: nn.Module) -> nn.Module:
    """Fold every mask into its weight, in place: W becomes W ⊙ M(S), scores and masks are gone.

    The same function, in plain modules that torch.save and torch.export take. Returns the model.
    Raises ValueError, with nothing changed, if a masked module has other parametrizations too.
    """
    ours = {module: [isinstance(p, (BlockMask, BiasMask)) for ps in module.parametrizations.values() for p in ps]
            for module in model.modules() if parametrize.is_parametrized(module)}
    masked = [module for module, which in ours.items() if any(which)]
    if not all(all(ours[module]) for module in masked):
        raise ValueError("remove the other parametrizations of the masked modules first")
    for module in masked:
        values = {name: nn.Parameter(getattr(module, name).detach().clone(), ps.original.requires_grad)
                  for name, ps in module.parametrizations.items()}
        # Note: torch's remove_parametrizations() deletes the property from the class it made, and
        # deepcopy shares that class between copies of a model. Going back to the base does not.
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]
        for name, value in values.items():
            module.register_parameter(name, value)
    return model
