"""Fine-tune, fine-prune and refill a BERT on SQuAD.

  python train_squad.py --data D --init WEIGHTS --out R/teacher                   dense fine-tuning
  python train_squad.py --data D --init R/teacher --teacher R/teacher --method hybrid --out R/hybrid
  python compact.py R/hybrid --data D --out R/hybrid-compact
  python train_squad.py --data D --init R/hybrid-compact --teacher R/teacher --fill --out R/filled
  python train_squad.py --score PREDICTIONS.json DEV.json         EM and F1 as the official scorers
  python train_squad.py --ask R/filled                            a passage and questions of yours
  torchrun --nproc_per_node=2 train_squad.py …                    a training, in two processes

In this order: settings; the method on BERT, which is masks, loss, schedules, loop and refilling;
then what any fine-tuning needs: presets, data, answers, run folders, command line; and the built-in
corpus. Differs: in the paper pruning starts from the pretrained model (--init WEIGHTS); at small
scale it does better from the teacher.
After Lagunas et al. 2021 and its code, huggingface/nn_pruning at 0cef2b2, cited as [R:file].

    B batch   T tokens   E hidden size   D head size   S scores   τ threshold   λ weight of penalty
Comments: `# Paper:` is the authors' method, `# Note:` our remark, `# Differs:` a deviation.
"""
import argparse
import collections
import contextlib
import dataclasses
import functools
import gc
import hashlib
import inspect
import json
import math
import os
import platform
import random
import re
import shlex
import string
import subprocess
import sys
import time
import typing
import zipfile
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.distributed as dist
import torch.nn.functional as F

import blockprune
from bert import (BertForQuestionAnswering, folder_sha256, load_model, load_tokenizer, read_json,
                  read_safetensors, replacing, same_tokenizer, save_model, weights_sha256,
                  write_json, write_safetensors)

# ---------------------------------------------------------------------------------------- settings


@dataclasses.dataclass
class Config:
    """Every setting. A field is a flag, its comment the help.

    None: settle() fills it in, where the comment does not say otherwise.
    """
    data: str = "data/squad"            # folder of train-v1.1.json, dev-v1.1.json; or builtin
    init: str = "weights/minilm"        # model folder to start from
    out: str = "runs/dense"             # run folder to write
    teacher: str = ""                   # fine-tuned model folder to distil from; none if empty
    method: str = "dense"               # {dense,hybrid,block,struct,unstructured}: see add_masks()
    block: str = "32x32"                # r x c of query, key, value; c x r of out; see add_masks()
    fill: bool = False                  # refill a compacted model: noise for zeros, fine-tuning
    v2: bool = False                    # SQuAD 2.0: a question may have no answer
    null_threshold: float = 0           # v2: no answer where [CLS] beats the best span by more
    preset: str | None = None           # {builtin,small,paper}: gives the values that are left out
    questions: int | None = None        # first n of the shuffled training questions; None: all
    dev_questions: int | None = None    # the same of the dev questions; None: all
    max_length: int = 384               # word pieces in a window [R:command_line.py]
    stride: int = 128                   # word pieces that windows share [R:command_line.py]
    max_question: int = 64              # word pieces. Differs: longer questions are cut
    max_answer: int = 30                # word pieces [R:qa_xp.py]
    seed: int = 17                      # of everything random [R:command_line.py]
    epochs: float | None = None         # paper: 20 of pruning, 4 of filling
    batch: int = 16                     # windows a step; paper: 16
    lr: float | None = None             # of the weights, at its peak; paper: 3e-5
    score_lr: float | None = None       # of the scores, at its peak; paper: 1e-2
    warmup_steps: int | None = None     # None: 5 % of the run, 10 in a fill; paper: 5,400, 10
    initial_warmup: float = 1           # τ is 0 for this · warmup_steps [R:command_line.py]
    final_warmup: float = 10            # and final for this · warmup_steps [R:parameters.json]
    threshold: float = 0.1              # final τ: a block is pruned at σ(S) ≤ τ [R:command_line.py]
    final_lambda: float | None = None   # λ at the final τ: the higher, the less is kept
    attention_lambda: float | None = None   # factor on λ for attention; None: the preset's
    ffn_lambda: float | None = None     # the same for the feed-forward layers
    alpha_ce: float = 0.1               # of the cross entropy, with a teacher [R:command_line.py]
    alpha_kd: float = 0.9               # of the distillation [R:command_line.py]
    temperature: float = 2              # of the distillation [R:patch_coordinator.py]
    attention_dropout: float | None = None  # paper: 0.1. Differs: 0, for speed on a CPU
    weight_decay: float = 0             # of matrices; paper: 0
    clip: float = 1                     # largest norm of all gradients together; paper: 1
    precision: str | None = None        # {bf16,fp32}; None: bf16 where it is fast; paper: fp32
    device: str | None = None           # {cpu,cuda,mps}; None: a GPU that works, else the CPU
    log_every: int = 20                 # steps
    checkpoint_every: int = 300         # seconds


# --------------------------------------------------------------- the method on BERT: masks and loss


def add_masks(model: BertForQuestionAnswering, method: str, block: str) -> None:
    """Put the masks of one of the paper's methods on a BERT.

    hybrid        blocks in attention, inner dimensions of the feed-forward layers (Paper: Hybrid)
    block         blocks in both (Paper: Block)
    struct        whole heads and inner dimensions (Paper: heads and dims)
    unstructured  single weights (Sanh et al. 2020: soft movement pruning)

    block: "32x32", for hybrid and block. Embeddings, norms and QA head have no masks
    [R:model_structure.py]. Raises ValueError for another method.
    """
    if method not in ("hybrid", "block", "struct", "unstructured"):
        raise ValueError(f"no method {method!r}")
    E = model.config.hidden_size
    D = model.config.head_size
    for layer in model.bert.layers:
        attention, ffn = layer.attention, layer.ffn

        # Attention: blocks of r × c in (out, in). `out` gets the block transposed, so that its
        # columns line up with the rows of query, key and value that belong to the same head.
        if method == "struct":
            # Differs: one score a head, shared by its four matrices. The reference scores each
            # apart and removes a head when Q, K or V is empty, which changes the function.
            r, c = D, E
        elif method == "unstructured":
            r, c = 1, 1
        else:
            r, c = map(int, block.split("x"))
        query_mask = blockprune.mask_weight(attention.query, (r, c), kind="attention")
        shared = query_mask if method == "struct" else None
        for linear in (attention.key, attention.value):
            blockprune.mask_weight(linear, (r, c), share=shared, kind="attention")
        blockprune.mask_weight(attention.out, (c, r), share=shared, kind="attention")

        # Feed-forward: one score for each inner dimension, or blocks of r × c in both matrices.
        if method in ("hybrid", "struct"):
            blockprune.mask_dimensions(ffn.fc1, ffn.fc2, kind="ffn")
        else:
            blockprune.mask_weight(ffn.fc1, (r, c), kind="ffn")
            blockprune.mask_weight(ffn.fc2, (r, c), kind="ffn")


def loss_terms(student_logits, teacher_logits, batch: dict,
               temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy, and distillation.

        temperature² · KL(softmax(teacher / temperature) ‖ softmax(student / temperature))

    Both are means over the batch and over start and end; the KL is a sum over positions.
    student_logits, teacher_logits: pairs (start, end), each (B, T). Without a teacher (None) the
    distillation is 0. Differs: all softmaxes are over real tokens alone, so that a row's loss does
    not depend on its batch-mates. In the reference padding takes part in them.
    """
    def log_softmax(logits):
        # −∞ would make 0 · ∞, a NaN, of the KL; this has probability 0 as well.
        padding = torch.finfo(torch.float32).min
        return logits.masked_fill(~batch["real"], padding).log_softmax(-1)      # (B, T)

    # Cross entropy: where does the answer start, and where does it end?
    ce = 0.0
    for logits, label in zip(student_logits, (batch["start"], batch["end"])):
        ce = ce + F.nll_loss(log_softmax(logits.float()), label)
    # Distillation: the student's distribution over positions should be the teacher's.
    kd = torch.zeros(())
    if teacher_logits is not None:
        for student, teacher in zip(student_logits, teacher_logits):
            student_log_p = log_softmax(student.float() / temperature)
            teacher_log_p = log_softmax(teacher.float() / temperature)
            kd = kd + F.kl_div(student_log_p, teacher_log_p, reduction="batchmean", log_target=True)
    # Means of start and end. The square keeps the gradient's size whatever the temperature is.
    return ce / 2, kd * temperature ** 2 / 2


# -------------------------------------------------------------- the method on BERT: schedules, loop


def learning_rate_factor(step: int, total: int, warmup: int) -> float:
    """All learning rates: up in a line over the warm-up, then down in a line to 0.

    Differs: the reference's first step is at rate 0. Ours is 1/warmup higher at every warm-up step
    and peaks one step earlier; after the warm-up the two are equal.
    """
    if step < warmup:
        return (step + 1) / warmup
    return (total - step) / (total - warmup)


def threshold_and_lambda(step: int, config: Config, total: int, warmup: int) -> tuple[float, float]:
    """τ and λ of a step. Paper: τ is flat for multiples of the warm-up, and λ follows τ.

    Note: so the penalty pushes nothing down while nothing can be pruned yet.
    """
    flat_start = config.initial_warmup * warmup
    flat_end = config.final_warmup * warmup
    tau = blockprune.threshold_schedule(step, total, flat_start, flat_end, final=config.threshold)
    return tau, config.final_lambda * tau / config.threshold


def step_loss(model: BertForQuestionAnswering, batch: dict, teacher_logits, step: int,
              config: Config, total: int, warmup: int) -> dict:
    """The first half of a training step: from setting τ to the loss with all its terms.

    What stands under `if pruning:` is all that pruning adds to fine-tuning.
    batch: see Features.batch(). teacher_logits: a pair, each (B, T), or None. total, warmup: steps.
    Returns "loss", whose gradient is wanted, and what it is made of.
    """
    pruning = config.method != "dense"
    # Set τ: from here on every masked linear.weight is read as W ⊙ 1[σ(S) > τ].
    tau = lam = 0.0
    if pruning:
        tau, lam = threshold_and_lambda(step, config, total, warmup)
        blockprune.set_threshold(model, tau)

    # Forward. The masks act in here, though no line of the model mentions them: see mask_weight().
    with autocast(config):
        student_logits = model(batch["ids"], batch["types"], batch["real"])

    # The loss of the task: 0.1 · cross entropy + 0.9 · distillation, or cross entropy alone.
    ce, kd = loss_terms(student_logits, teacher_logits, batch, config.temperature)
    loss = ce
    if teacher_logits is not None:
        loss = config.alpha_ce * ce + config.alpha_kd * kd

    # And the penalty, λ · mean σ(S), which pushes all scores down.
    penalty = torch.zeros(())
    if pruning:
        factors = {"attention": config.attention_lambda, "ffn": config.ffn_lambda}
        penalty = blockprune.penalty(model, factors)
        loss = loss + lam * penalty
    return {"loss": loss, "ce": ce, "kd": kd, "penalty": penalty, "threshold": tau, "lambda": lam}


def update(model: BertForQuestionAnswering, optimizer: torch.optim.Optimizer, step: int,
           config: Config, total: int, warmup: int) -> torch.Tensor:
    """The second half of a step: from the gradients to new weights and scores.

    Returns the norm of the gradients before they were clipped.
    """
    # Paper: one clip, and one schedule of the rate, for weights and scores together.
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * learning_rate_factor(step, total, warmup)
    optimizer.step()
    return norm


def train(model: BertForQuestionAnswering, teacher: BertForQuestionAnswering | None,
          features: "Features", config: Config) -> float:
    """Fine-tune or, with masks on the model, fine-prune.

    Goes on from the checkpoint in the run folder, if there is one. Returns the seconds it took,
    with those of earlier parts of the run. Raises ValueError where the loss is no longer a number.
    """
    out = Path(config.out)
    rank, world = processes(config.device)
    # How many steps there are, and where to resume.
    total, warmup = plan(config, len(features))
    optimizer = prepare(model, config)
    first_step, seconds = restore(out / "checkpoint.pt", model, optimizer, config.device, total)

    # The teacher is in eval mode, its logits never change: it is asked about every window once.
    began = time.monotonic()
    all_teacher_logits = None
    if teacher is not None and first_step < total:
        all_teacher_logits = ask_teacher(teacher, features, config)     # (windows, 2, T)
    # Under torchrun each process has a part of every batch, and gradients are means over them.
    parallel_model = model
    if world > 1:
        parallel_model = distribute(model)
        torch.manual_seed(config.seed + 1000 * first_step + rank)   # dropout of its own
    model.train()
    loop_began = saved = time.monotonic()

    steps = range(first_step, total)
    for step, windows in zip(steps, batches_from(first_step, features.lengths, config)):
        windows = part_of(windows, rank, world)
        batch = features.batch(windows, config.device)

        teacher_logits = None
        if all_teacher_logits is not None:
            T = batch["ids"].shape[1]
            teacher_logits = all_teacher_logits[windows, :, :T].unbind(1)   # (start, end), (B, T)

        # Forward; backward, straight through the masks to the scores; update.
        terms = step_loss(parallel_model, batch, teacher_logits, step, config, total, warmup)
        optimizer.zero_grad()
        terms["loss"].backward()
        norm = update(model, optimizer, step, config, total, warmup)
        stop_if_not_finite(terms["loss"], norm, step, out)

        # The log, and a checkpoint: from there a stopped run goes on (on a CPU to the same bits).
        done = step + 1
        now = time.monotonic()
        if done % config.log_every == 0 or done == total:
            speed = (done - first_step) * config.batch / (now - loop_began)
            line = {"step": done}
            for name in ("loss", "ce", "kd", "penalty"):
                line[name] = terms[name].item()
            line["threshold"] = terms["threshold"]
            line["lambda"] = terms["lambda"]
            line["density"] = blockprune.density(model)
            line["lr"] = optimizer.param_groups[0]["lr"]
            line["examples_per_second"] = speed
            report(out, line, total, config)
        if rank == 0 and (done == total or now - saved > config.checkpoint_every):
            save_checkpoint(out / "checkpoint.pt", model, optimizer, config.device, done,
                            seconds + now - began)
            saved = now

    # Paper: evaluation is at the final τ, whatever the step.
    if config.method != "dense":
        blockprune.set_threshold(model, config.threshold)
    return seconds + time.monotonic() - began


def prepare(model: BertForQuestionAnswering, config: Config) -> torch.optim.AdamW:
    """Move the model to its device, and make its optimiser.

    Differs: the reference has transformers' AdamW, with ε before the bias correction. Where a
    gradient is 1e-6 its first step is 0.77 of torch's; after 5,400 steps the two are equal.
    """
    for layer in model.bert.layers:
        layer.attention.dropout = config.attention_dropout
    model.to(config.device)
    groups = blockprune.parameter_groups(model, config.lr, config.score_lr, config.weight_decay)
    # Weights and scores have a learning rate each; the schedule scales both alike.
    for group in groups:
        group["peak_lr"] = group["lr"]
    return torch.optim.AdamW(groups, fused=True)


def plan(config: Config, windows: int) -> tuple[int, int]:
    """The steps of a run and of its warm-up. ValueError for a fine-pruning that cannot prune."""
    total = max(2, round(config.epochs * math.ceil(windows / config.batch)))
    # Paper: 10 steps of warm-up for a fill, and 5,400 of 110,660, that is 5 %, for pruning.
    warmup = config.warmup_steps
    if warmup is None and config.fill:
        warmup = 10
    if warmup is None:
        warmup = round(0.05 * total)
    warmup = min(warmup, total - 1)
    if config.method == "dense":
        return total, warmup

    # A schedule in which τ cannot rise is refused here, before anything is trained.
    threshold_and_lambda(0, config, total, warmup)
    # Note: Adam moves a score by about its learning rate a step, so the sum of these bounds how far
    # it can fall from 0. A block is pruned at logit(τ), −2.2 for 0.1. Few are, if the lowest score
    # within reach is less than 0.8 below that.
    lowest = -config.score_lr * sum(learning_rate_factor(t, total, warmup) for t in range(total))
    pruned_at = math.log(config.threshold / (1 - config.threshold))
    needed = pruned_at - 0.8
    if lowest > needed:
        raise ValueError(f"nothing could be pruned: in {total} steps scores fall to about "
                         f"{lowest:.2f}, and a block goes at {pruned_at:.2f}; reach "
                         f"{needed:.2f} with more --epochs or a higher --score-lr")
    return total, warmup


def stop_if_not_finite(loss: torch.Tensor, norm: torch.Tensor, step: int, out: Path) -> None:
    if math.isfinite(loss.item()) and math.isfinite(norm.item()):
        return
    raise ValueError(f"{out}: stopped at step {step}: loss {loss.item():.3g}, gradient norm "
                     f"{norm:.3g}. A checkpoint, if any, is of an earlier step. Try a lower --lr, "
                     "or --precision fp32")


@torch.no_grad()
def ask_teacher(teacher: BertForQuestionAnswering, features: "Features",
                config: Config) -> torch.Tensor:
    """The teacher's start and end logits of every window, (windows, 2, T): 0.3 GB for all of SQuAD.

    Afterwards the teacher makes room on the device.
    """
    T = features.lengths.max()
    logits = torch.zeros(len(features), 2, T, device=config.device)
    teacher.eval().to(config.device)
    with autocast(config):
        for windows in evaluation_batches(features.lengths, config.device):
            batch = features.batch(windows, config.device)
            start, end = teacher(batch["ids"], batch["types"], batch["real"])
            # A batch is as long as its longest window. What is to the right of it stays 0.
            logits[windows, :, :start.shape[1]] = torch.stack([start, end], dim=1).float()
    teacher.cpu()
    return logits


@torch.no_grad()
def refill(model: BertForQuestionAnswering) -> None:
    """Paper: Hybrid Filled. Exact zeros of a compacted model get small noise, then fine-tuning.

        0  ↦  N(0, 1) · 0.01 · std(W) + mean(W), over the whole tensor W

    Where both factors of a product are 0, as in Q Kᵀ, neither gets a gradient: noise ends that.
    Source: [R:sparse_xp.py], unzero_parameters.
    Differs: where W is all zeros, the std of a fresh weight stands in for std(W), which is 0.
    """
    for name, parameter in model.named_parameters():
        # Biases stay as they are, and so does a tensor of one element or none: it has no std.
        if name.endswith("bias") or parameter.numel() <= 1:
            continue
        std = model.config.initializer_range
        if parameter.any():
            std = parameter.std()
        # Drawn for the whole tensor, used where it is 0.
        noise = torch.randn_like(parameter) * 0.01 * std + parameter.mean()
        parameter.copy_(torch.where(parameter == 0, noise, parameter))


# ----------------------------------------------------------------------------- settings, filled in

# λ does not carry over between models (see blockprune.penalty()), nor between lengths of training.
# Short runs need a higher learning rate of the scores than the paper's, and on SQuAD a higher λ.
PRESETS = {
    "builtin": {
        "dense": dict(epochs=3, lr=1e-4),
        "prune": dict(epochs=2, lr=2e-4, score_lr=0.15, final_lambda=20),
        "fill": dict(epochs=1, lr=2e-4),
    },
    "small": {
        "dense": dict(epochs=3, lr=1e-4),
        "prune": dict(epochs=3, lr=1e-4, score_lr=0.05, final_lambda=80),
        "fill": dict(epochs=2, lr=1e-4),
    },
    "paper": {
        "dense": dict(epochs=2, lr=3e-5),
        "prune": dict(epochs=20, lr=3e-5, score_lr=0.01, warmup_steps=5400),
        "fill": dict(epochs=4, lr=3e-5),
    },
}
# Paper: λ of the authors' log, where BERT-base keeps about a quarter of the weights.
PAPER_LAMBDAS = {
    "hybrid": dict(final_lambda=20, ffn_lambda=0.25),       # 20 %, the headline; 26 % refilled
    "block": dict(final_lambda=20),                         # 26 % at 32x32, 22 % at 8x8
    # One score a head stands here for four of theirs, and is pushed as hard as the four together.
    "struct": dict(final_lambda=2.5, attention_lambda=0.00156),
    # Their 1x1 runs had one mean over all 72 tensors; ours has two, over 48 and over 24.
    "unstructured": dict(final_lambda=25, attention_lambda=96 / 72, ffn_lambda=48 / 72),
}
BUILTIN = "data/builtin"        # where the built-in corpus is written
MAY_BE_ZERO = ("stride", "seed", "warmup_steps", "initial_warmup", "final_warmup", "final_lambda",
               "attention_lambda", "ffn_lambda", "alpha_ce", "alpha_kd", "attention_dropout",
               "weight_decay", "checkpoint_every")


def settle(config: Config) -> Config:
    """A copy with every None filled in. ValueError, naming the flag, for what cannot be."""
    c = dataclasses.replace(config)
    if c.data == "builtin":
        c.data = BUILTIN
        write_builtin(c.data)
    c.device = pick_device(c.device)
    # The corpus that is made up is easy: it needs few steps.
    if c.preset is None:
        c.preset = "builtin" if is_builtin(c.data) else "small"

    # Whatever was not asked for comes from the preset, and the precision from the machine.
    values = preset_values(c)
    if values["precision"] is None:
        values["precision"] = "bf16" if multiplies_in_bf16(c.device) else "fp32"
    for name, value in values.items():
        if getattr(c, name) is None:
            setattr(c, name, value)
    check_settings(c)
    return c


def preset_values(config: Config) -> dict:
    """What the preset has for the stage of a run: dense fine-tuning, pruning or filling."""
    values = dict(attention_lambda=1.0, ffn_lambda=1.0, attention_dropout=0.0, precision=None)
    # A model has few heads, so that each head's score feels a large part of the penalty.
    if config.method == "struct":
        values["attention_lambda"] = 0.05
    if config.preset == "paper":
        values.update(attention_dropout=0.1, precision="fp32")
        values.update(PAPER_LAMBDAS.get(config.method, {}))
    # Epochs and learning rates are those of the stage.
    stage = "prune"
    if config.fill:
        stage = "fill"
    elif config.method == "dense":
        stage = "dense"
    values.update(PRESETS[config.preset][stage])
    return values


def check_settings(c: Config) -> None:
    """ValueError, naming the flag, for a setting that is out of its range."""
    # Numbers are finite and positive, and some of them may be 0.
    for name, value in vars(c).items():
        if type(value) not in (int, float):
            continue
        flag = "--" + name.replace("_", "-")        # as it is given
        if not math.isfinite(value):
            raise ValueError(f"{flag} {value}: a number is expected")
        if name in MAY_BE_ZERO and value < 0:
            raise ValueError(f"{flag} {value}: it must be 0 or more")
        if name not in MAY_BE_ZERO and name != "null_threshold" and value <= 0:
            raise ValueError(f"{flag} {value}: it must be over 0")
    # What does not go together, or is not of the right form.
    if c.fill and c.method != "dense":
        raise ValueError("--fill trains without masks: leave --method out")
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", c.block):
        raise ValueError(f"--block {c.block}: as in 32x32, two numbers over 0")
    if c.attention_dropout >= 1:
        raise ValueError(f"--attention-dropout {c.attention_dropout}: it must be under 1")
    if c.threshold >= 0.5:      # at 0.5 everything would be pruned at once
        raise ValueError(f"--threshold {c.threshold}: it must be under 0.5, where scores start")
    # A window is [CLS] question [SEP] passage [SEP]; the next one has to begin later.
    if c.max_length - 3 - c.max_question <= c.stride:
        raise ValueError(f"--max-length {c.max_length}: too short for --stride {c.stride} beside a "
                         f"question of --max-question {c.max_question}")


# ------------------------------------------------------------------------------------ SQuAD on disk


@dataclasses.dataclass
class Squad:
    """The questions of a file, on the passages that they are about."""
    passages: list[str]
    questions: list[tuple]      # (id, question, number of the passage, [(answer, its offset), …])
    sha256: str                 # of the file, unpacked

    def truths(self) -> dict[str, list[str]]:
        """The accepted answers of each question, by its id; none where it has no answer (v2)."""
        truths = {}
        for question_id, _, _, answers in self.questions:
            truths[question_id] = [text for text, _ in answers]
        return truths


def file_name(part: str, v2: bool) -> str:
    return f"{part}-v2.0.json" if v2 else f"{part}-v1.1.json"


def read_squad(folder: str | Path, name: str, limit: int | None = None,
               seed: int = Config.seed) -> Squad:
    """SQuAD's JSON from folder/name or folder/name.xz; with a limit, the first of a seeded shuffle.

    FileNotFoundError if it is not there. ValueError, with the place, where it is not as SQuAD is.
    """
    path = Path(folder, name)
    raw = read_bytes(path)
    # Lists in lists that never end are a RecursionError.
    try:
        tree = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cut off, or not JSON: {error}") from None
    squad = Squad([], [], hashlib.sha256(raw).hexdigest())
    ids = set()

    def get(node, key, kind, where):
        """node[key], which must be there and of that type."""
        if not isinstance(node, dict) or type(node.get(key)) is not kind:
            raise ValueError(f"{path}: not SQuAD: {where} has no {key!r} that is a {kind.__name__}")
        value = node[key]
        if kind is str:
            value.encode()      # ValueError where half a surrogate pair is in it
        return value

    # {"data": [{"paragraphs": [{"context": …, "qas": [{"id", "question", "answers"}, …]}, …]}, …]}
    for a, article in enumerate(get(tree, "data", list, "the file")):
        for p, paragraph in enumerate(get(article, "paragraphs", list, f"data[{a}]")):
            where = f"data[{a}].paragraphs[{p}]"
            for q, qa in enumerate(get(paragraph, "qas", list, where)):
                where_asked = f"{where}.qas[{q}]"
                # Its answers, each with its offset in the passage. Dev questions have several.
                answers = []
                for answer in get(qa, "answers", list, where_asked):
                    text = get(answer, "text", str, f"{where_asked}.answers")
                    start = get(answer, "answer_start", int, f"{where_asked}.answers")
                    answers.append((text, start))
                if not answers and qa.get("is_impossible") is not True:
                    raise ValueError(f"{path}: {where_asked} has no answer, and is not said to be "
                                     "impossible")
                # Some sets number their questions. Scores are by id, so each has its own.
                if type(qa.get("id")) is int:
                    qa["id"] = str(qa["id"])
                question_id = get(qa, "id", str, where_asked)
                if question_id in ids:
                    raise ValueError(f"{path}: {where_asked} has the id {question_id!r}, as another"
                                     " question has")
                ids.add(question_id)
                question = get(qa, "question", str, where_asked)
                squad.questions.append((question_id, question, len(squad.passages), answers))
            squad.passages.append(get(paragraph, "context", str, where))
    if not squad.questions:
        raise ValueError(f"{path}: no question in it")
    # A smaller limit takes the first of those that a larger one takes.
    if limit is not None:
        random.Random(seed).shuffle(squad.questions)
        del squad.questions[limit:]
    return squad


def read_bytes(path: Path) -> bytes:
    """A file, or what is in the .xz beside it."""
    if path.is_file():
        return path.read_bytes()
    packed = Path(f"{path}.xz")
    try:
        raw = packed.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.parent}: neither {path.name} nor {path.name}.xz is "
                                "there") from None
    # Some Pythons are built without lzma: they can do all but this.
    try:
        import lzma
    except ImportError:
        raise ValueError(f"{packed}: this Python cannot read .xz; unpack it with xz -d") from None
    try:
        return lzma.decompress(raw)
    except (lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path}: cut off, or not JSON: {error}") from None


# ----------------------------------------------------------------------------- windows, and batches


def word_pieces(tokenizer, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each text: ids, (n,), and the characters [begin, end) that each stands for, (n, 2)."""
    found = []
    # encode_batch() works on all cores. A thousand texts at a time need little memory.
    for first in range(0, len(texts), 1000):
        for encoding in tokenizer.encode_batch(texts[first:first + 1000], add_special_tokens=False):
            ids = np.array(encoding.ids, np.int32)
            characters = np.array(encoding.offsets, np.int32).reshape(-1, 2)
            found.append((ids, characters))
    return found


def answer_span(passage: str, characters: np.ndarray, text: str,
                start: int) -> tuple[int, int] | None:
    """The first and last word piece that touch the answer; None where it is not at its offset."""
    end = start + len(text)
    if start < 0 or passage[start:end] != text:
        return None
    # The first word piece that ends after `start`, and the last one that begins before `end`.
    first = int(np.searchsorted(characters[:, 1], start, side="right"))
    last = int(np.searchsorted(characters[:, 0], end, side="left")) - 1
    if first > last:
        return None
    return first, last


class Features:
    """Windows [CLS] question [SEP] part of the passage [SEP], at most max_length word pieces each.

    A passage that does not fit is seen through windows that share `stride` word pieces, as in
    Hugging Face's run_qa.py. rows: (N, 6), for each window
        the question; how many word pieces it has;
        the passage's first word piece in the window; how many of them are in it;
        the answer's first and last position; 0 and 0, that is [CLS], where none is wholly inside.
    skipped: training questions without a usable answer, left out. cut: questions that are too long.
    """

    def __init__(self, squad: Squad, tokenizer, config: Config, training: bool):
        self.squad = squad
        self.skipped = 0
        self.cut = 0
        self.cls = tokenizer.token_to_id("[CLS]")
        self.sep = tokenizer.token_to_id("[SEP]")
        self.pad = tokenizer.token_to_id("[PAD]")
        self.questions = word_pieces(tokenizer, [question for _, question, _, _ in squad.questions])
        # With a limit many passages have no question left: they are not tokenised.
        used = {p for _, _, p, _ in squad.questions}
        texts = [text if p in used else "" for p, text in enumerate(squad.passages)]
        self.passages = word_pieces(tokenizer, texts)

        rows = []
        for q, (_, _, p, answers) in enumerate(squad.questions):
            characters = self.passages[p][1]
            # Where is the answer? To train on a question whose answer is not there makes no sense.
            span = None
            if training and answers:
                span = answer_span(squad.passages[p], characters, *answers[0])
                if span is None:
                    self.skipped += 1
                    continue
            # How many word pieces of the question are used?
            asked = len(self.questions[q][0])
            if asked > config.max_question:
                self.cut += 1
                asked = config.max_question
            rows += self.windows(q, asked, len(characters), span, config)
        if not rows:
            raise ValueError("no question has an answer at its offset")
        self.rows = np.array(rows, np.int32)
        self.lengths = self.rows[:, 1] + self.rows[:, 3] + 3

    @staticmethod
    def windows(q: int, asked: int, pieces: int, span: tuple[int, int] | None,
                config: Config) -> list:
        """The rows of one question of `asked` word pieces, on a passage of `pieces`."""
        # [CLS] and two [SEP] take three places; the passage has the rest.
        room = config.max_length - 3 - asked
        rows = []
        for first in range(0, max(1, pieces - config.stride), room - config.stride):
            count = min(room, pieces - first)
            # Is the whole answer in this window? If not, the window's label is [CLS].
            start = end = 0
            if span is not None and first <= span[0] and span[1] < first + count:
                shift = asked + 2 - first       # from word pieces of the passage to positions
                start = span[0] + shift
                end = span[1] + shift
            rows.append((q, asked, first, count, start, end))
        return rows

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, windows: np.ndarray, device: str = "cpu") -> dict[str, torch.Tensor]:
        """Windows, padded to the longest.

        ids, types; real, where there is no padding; context, where the passage is: each (B, T).
        start, end: positions of the answer, each (B,).
        """
        B = len(windows)
        T = self.lengths[windows].max()
        ids = np.full((B, T), self.pad, np.int64)
        types = np.zeros((B, T), np.int64)
        real = np.zeros((B, T), bool)
        context = np.zeros((B, T), bool)
        # [CLS] question [SEP] passage [SEP] padding. Types: 0 up to the first [SEP], then 1.
        for b, (q, asked, first, count, _, _) in enumerate(self.rows[windows]):
            passage = asked + 2                 # where it begins
            length = asked + count + 3
            p = self.squad.questions[q][2]
            ids[b, [0, asked + 1, length - 1]] = self.cls, self.sep, self.sep
            ids[b, 1:asked + 1] = self.questions[q][0][:asked]
            ids[b, passage:length - 1] = self.passages[p][0][first:first + count]
            types[b, passage:length] = 1
            real[b, :length] = True
            context[b, passage:length - 1] = True
        start = self.rows[windows, 4].astype(np.int64)
        end = self.rows[windows, 5].astype(np.int64)
        arrays = dict(ids=ids, types=types, real=real, context=context, start=start, end=end)
        return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}

    def text(self, window: int, start: int, end: int) -> str:
        """The characters of the passage from position `start` to position `end` of a window."""
        q, asked, first = self.rows[window, :3]
        p = self.squad.questions[q][2]
        characters = self.passages[p][1]
        shift = first - asked - 2               # from positions to word pieces of the passage
        return self.squad.passages[p][characters[start + shift, 0]:characters[end + shift, 1]]


def training_batches(lengths: np.ndarray, size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """All windows in random batches of like lengths: sorted within random pools of 50 batches.

    Differs: the reference pads every window to 384, whatever is beside it.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))
    # Within a pool windows are sorted by length, so that neighbours need little padding.
    sorted_pools = []
    for pool in np.split(order, range(50 * size, len(order), 50 * size)):
        by_length = np.argsort(lengths[pool], kind="stable")
        sorted_pools.append(pool[by_length])
    # Neighbours make a batch, and batches come in random order.
    order = np.concatenate(sorted_pools)
    batches = np.split(order, range(size, len(order), size))
    return [batches[i] for i in rng.permutation(len(batches))]


def batches_from(step: int, lengths: np.ndarray, config: Config) -> typing.Iterator[np.ndarray]:
    """The windows of each step from `step` on, epoch after epoch, for ever."""
    steps_an_epoch = math.ceil(len(lengths) / config.batch)
    while True:
        epoch = step // steps_an_epoch
        of_epoch = training_batches(lengths, config.batch, config.seed, epoch)
        for windows in of_epoch[step % steps_an_epoch:]:
            yield windows
            step += 1


def evaluation_batches(lengths: np.ndarray, device: str) -> list[np.ndarray]:
    """All windows in order of length, in batches of at most so many tokens, padding counted."""
    # Note: what a layer makes of 2,048 tokens stays in a CPU's cache.
    tokens = 2048
    if device != "cpu":
        tokens = 65536
    order = np.argsort(lengths, kind="stable")
    cuts = [0]
    for i in range(1, len(order)):
        # With this window, which is the longest so far, is the batch too large?
        rows = i + 1 - cuts[-1]
        if rows * lengths[order[i]] > tokens:
            cuts.append(i)
    return np.split(order, cuts[1:])


# ------------------------------------------------------------------------------ answers, and scores


def best_spans(start: torch.Tensor, end: torch.Tensor, context: torch.Tensor, longest: int):
    """The best span of each window: argmax of start[i] + end[j] with i ≤ j < i + longest.

    start, end: logits, (B, T). context: where the passage is, (B, T): spans lie within it. Returns
    the span's score, i and j, each (B,); the score is −∞ where there is no passage.
    Differs: over all pairs; the reference looks at pairs of the 20 best starts and 20 best ends.
    """
    B, T = start.shape
    start = start.float().masked_fill(~context, -math.inf)
    end = end.float().masked_fill(~context, -math.inf)
    best = start.new_full((B,), -math.inf)
    best_i = torch.zeros(B, dtype=torch.long, device=start.device)
    best_j = best_i
    # One diagonal of the T × T table of pairs at a time: the spans of d + 1 word pieces.
    for d in range(min(longest, T)):
        span_scores = start[:, :T - d] + end[:, d:]         # (B, T − d)
        span_score, i = span_scores.max(dim=1)
        better = span_score > best
        best = torch.where(better, span_score, best)
        best_i = torch.where(better, i, best_i)
        best_j = torch.where(better, i + d, best_j)
    return best, best_i, best_j


@torch.no_grad()
def predict(model: BertForQuestionAnswering, features: Features,
            config: Config) -> dict[str, tuple[str, float]]:
    """The best span of each question over all its windows, by question id: its text and score.

    v2: the text is "", no answer, where the least score of [CLS] over the windows is more than
    null_threshold over the best span's.
    """
    model.eval().to(config.device)
    # By question: the best span so far, text and score, and the least score of "no answer".
    best = {}
    null_scores = {}
    for question_id, _, _, _ in features.squad.questions:
        best[question_id] = ("", -math.inf)
        null_scores[question_id] = math.inf
    with autocast(config):
        for windows in evaluation_batches(features.lengths, config.device):
            batch = features.batch(windows, config.device)
            start, end = model(batch["ids"], batch["types"], batch["real"])
            start = start.float()
            end = end.float()
            spans = best_spans(start, end, batch["context"], config.max_answer)
            span_scores, first, last = (column.tolist() for column in spans)
            cls_scores = (start[:, 0] + end[:, 0]).tolist()
            # A question's windows may lie in several batches.
            for b, window in enumerate(windows):
                q = features.rows[window, 0]
                question_id = features.squad.questions[q][0]
                null_scores[question_id] = min(null_scores[question_id], cls_scores[b])
                if span_scores[b] > best[question_id][1]:
                    best[question_id] = (features.text(window, first[b], last[b]), span_scores[b])
    if config.v2:
        for question_id, (_, span_score) in best.items():
            if null_scores[question_id] - span_score > config.null_threshold:
                best[question_id] = ("", span_score)
    return best


def normalize_answer(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces: as the official scorer."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    text = re.sub(r"\b(a|an|the)\b", " ", text)
    return " ".join(text.split())


def token_f1(prediction: str, truth: str, v2: bool = False) -> float:
    """Harmonic mean of precision and recall over the words that both have; v2: none equals none."""
    predicted = normalize_answer(prediction).split()
    true = normalize_answer(truth).split()
    if v2 and not (predicted and true):
        return float(predicted == true)
    # A word that stands twice in both counts twice. 2 P R / (P + R) is 2 shared / (both together).
    shared = collections.Counter(predicted) & collections.Counter(true)
    return 2 * shared.total() / max(1, len(predicted) + len(true))


def question_scores(predictions: dict[str, str],
                    truths: dict[str, list[str]]) -> dict[str, tuple[float, float]]:
    """Exact match and F1, from 0 to 1, by question id: the best over the question's answers.

    predictions: text by question id. truths: the accepted answers; if any question has none, the
    rules of evaluate-v2.0.py hold, else those of evaluate-v1.1.py. They differ in token_f1(), and
    for a question without a prediction: v1.1 counts 0, v2.0 leaves it out.
    """
    v2 = not all(truths.values())
    scores = {}
    for question_id, answers in truths.items():
        if question_id not in predictions:
            if not v2:
                scores[question_id] = (0.0, 0.0)
            continue
        prediction = predictions[question_id]
        # v2: an answer of which normalisation leaves nothing does not count; if none is left, the
        # right answer is none.
        if v2:
            answers = [answer for answer in answers if normalize_answer(answer)] or [""]
        exact = any(normalize_answer(prediction) == normalize_answer(answer) for answer in answers)
        f1 = max(token_f1(prediction, answer, v2) for answer in answers)
        scores[question_id] = (float(exact), f1)
    return scores


def score(predictions: dict[str, str], truths: dict[str, list[str]]) -> dict[str, float]:
    """Exact match and F1 in percent, the means of question_scores().

    In v2 also those of the questions with an answer (HasAns_) and of those without (NoAns_).
    """
    scores = question_scores(predictions, truths)
    groups = {"": list(scores)}
    if not all(truths.values()):
        groups["HasAns_"] = [question_id for question_id in scores if truths[question_id]]
        groups["NoAns_"] = [question_id for question_id in scores if not truths[question_id]]
    means = {}
    for prefix, group in groups.items():
        number = max(1, len(group))
        means[f"{prefix}exact_match"] = 100 * sum(scores[i][0] for i in group) / number
        means[f"{prefix}f1"] = 100 * sum(scores[i][1] for i in group) / number
    return means


def evaluate(model: BertForQuestionAnswering, features: Features, config: Config,
             out: str | Path) -> dict[str, float]:
    """EM and F1 on a dev set. Answers go to predictions.json, and each question's F1 to f1.json."""
    truths = features.squad.truths()
    predictions = {}
    for question_id, (text, _) in predict(model, features, config).items():
        predictions[question_id] = text
    f1 = {}
    for question_id, (_, value) in question_scores(predictions, truths).items():
        f1[question_id] = round(value, 4)
    write_json(Path(out, "predictions.json"), predictions)
    write_json(Path(out, "f1.json"), f1)
    return score(predictions, truths)


# ---------------------------------------------------------------------------- devices and processes


def pick_device(wanted: str | None) -> str:
    """The device that is asked for, or else a GPU that works, or else the CPU."""
    if wanted is None:
        for device in ("cuda", "mps"):
            if device_works(device):
                return device
        return "cpu"
    if not device_works(wanted):
        raise ValueError(f"--device {wanted}: there is none here that works")
    return wanted


def device_works(device: str) -> bool:
    """Whether there is such a device, and this torch has kernels for it."""
    if device == "cpu":
        return True
    if device == "cuda" and not torch.cuda.is_available():
        return False
    if device == "mps" and not torch.backends.mps.is_available():
        return False
    # A GPU that is too old or too new for this torch is there, but computes nothing.
    try:
        torch.ones(2, device=device).sum().item()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        print(f"a {device} device is there, but this torch cannot use it: {reason}")
        return False
    return True


def multiplies_in_bf16(device: str) -> bool:
    """Whether bf16 is faster than fp32 there. Differs: the reference is fp32 throughout."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "mps" or not hasattr(torch.cpu, "get_capabilities"):   # there from torch 2.11 on
        return False
    units = torch.cpu.get_capabilities()
    return bool(units.get("amx_bf16") or units.get("avx512_bf16"))


def autocast(config: Config):
    """Compute products in bf16, if config says so.

    Around a whole loop without gradients, weights are cast once and not for each batch.
    """
    return torch.autocast(config.device, torch.bfloat16, enabled=config.precision == "bf16")


def processes(device: str) -> tuple[int, int]:
    """This process's number and how many there are: torchrun's, joined here, or else 0 and 1."""
    if "WORLD_SIZE" not in os.environ:
        return 0, 1
    if not dist.is_initialized():
        if device == "mps":
            raise ValueError("torchrun has no way to join processes on mps: use --device cpu")
        backend = "gloo"
        if device == "cuda":
            backend = "nccl"
            number = int(os.environ["LOCAL_RANK"])
            if number >= torch.cuda.device_count():
                raise ValueError(f"{os.environ['LOCAL_WORLD_SIZE']} processes for "
                                 f"{torch.cuda.device_count()} GPUs")
            torch.cuda.set_device(number)
        dist.init_process_group(backend)
    return dist.get_rank(), dist.get_world_size()


def distribute(model: BertForQuestionAnswering) -> torch.nn.Module:
    """The model, with gradients that become means over the processes."""
    return torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False,
                                                     find_unused_parameters=True)


def part_of(windows: np.ndarray, rank: int, world: int) -> np.ndarray:
    """This process's part of a batch. An epoch's last one is filled up with its first windows."""
    parts = math.ceil(len(windows) / world)
    return np.resize(windows, parts * world)[rank::world]


def mean_over_processes(numbers: list[float]) -> list[float]:
    """The mean of each number over torchrun's processes."""
    if not dist.is_initialized():
        return numbers
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    sums = torch.tensor(numbers, device=device)
    dist.all_reduce(sums)
    return (sums / dist.get_world_size()).tolist()


# ------------------------------------------------------------------------- run folders: checkpoints


def report(out: Path, line: dict, total: int, config: Config) -> None:
    """Append a line to log.jsonl, and print its main numbers. Losses: means over processes."""
    # Every process has to take part in the mean; one of them writes.
    names = ("loss", "ce", "kd")
    means = mean_over_processes([line[name] for name in names])
    line.update(zip(names, means))
    if processes(config.device)[0] > 0:
        return
    path = out / "log.jsonl"
    try:
        with open(path, "a", encoding="utf-8") as log:
            print(json.dumps(line), file=log)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error}") from None
    text = f"{out.name} {line['step']}/{total}  loss {line['loss']:.3f}  ce {line['ce']:.3f}"
    if line["density"]:
        text += f"  τ {line['threshold']:.3f}  density {line['density']['all']:.3f}"
    speed = line["examples_per_second"]
    minutes_left = (total - line["step"]) * config.batch / speed / 60
    print(f"{text}  {speed:.1f} examples/s, {minutes_left:.1f} min left", flush=True)


def save_checkpoint(path: Path, model, optimizer, device: str, step: int, seconds: float) -> None:
    """All that a run needs to go on to the same bits, under a temporary name until it is whole."""
    # Dropout draws from the generator of the device that the model is on.
    random_states = {"cpu": torch.get_rng_state()}
    if device != "cpu":
        random_states[device] = torch.get_device_module(device).get_rng_state()
    state = {"step": step, "seconds": seconds, "model": model.state_dict(),
             "optimizer": optimizer.state_dict(), "random_states": random_states}
    with replacing(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:       # which is what torch makes of a full disk
            raise OSError(str(error)) from None


def restore(path: Path, model, optimizer, device: str, total: int) -> tuple[int, float]:
    """Take up the checkpoint, if there is one, and cut the log back to it. Its step and seconds."""
    step = 0
    seconds = 0.0
    if path.exists():
        try:
            # torch does not compare the checksums of its archives; zipfile does.
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise ValueError(f"{damaged} is not what was written")
            # All of it is looked at before a word of it is believed.
            state = torch.load(path, map_location="cpu", weights_only=True)
            step = state["step"]
            seconds = state["seconds"]
            if type(step) is not int or not 0 <= step <= total:
                raise ValueError(f"step {step!r} of {total}")
            if type(seconds) is not float or not 0 <= seconds < math.inf:
                raise ValueError(f"{seconds!r} seconds")
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["random_states"]["cpu"])
            if device in state["random_states"] and device != "cpu":
                torch.get_device_module(device).set_rng_state(state["random_states"][device])
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:      # of whatever kind: pickle, zip and struct have their own
            reason = " ".join(str(error).split()[:20])
            raise ValueError(f"{path}: damaged, or of another model: {reason}") from None
        print(f"{path.parent}: going on from step {step}")
    if processes(device)[0] == 0:
        cut_log(path.with_name("log.jsonl"), step)
    return step, seconds


def cut_log(path: Path, step: int) -> None:
    """Leave the lines of log.jsonl up to a step: what came after it is done again."""
    if not path.exists():
        return
    kept = []
    # A line without an end was being written when the process died.
    try:
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not the log of a run: {error}") from None
    with replacing(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


# ----------------------------------------------------------------- run folders: pruning and results


def save_pruning(model: BertForQuestionAnswering, folder: str | Path, tokenizer_from: str | Path,
                 method: str, block: str, threshold: float) -> None:
    """Save a masked model: with its masks folded in, and W, b and the owners' scores apart.

    model.safetensors is an ordinary BERT with zeros. pruning.safetensors and the key "pruning" of
    config.json are what load_pruning() needs beside it.
    """
    # W ⊙ M(S) as an ordinary model, for everybody; W, b and S beside it, to go on pruning.
    pruning = dict(method=method, block=block, threshold=threshold)
    save_model(model, folder, tokenizer_from, pruning=pruning)
    of_masks = {name: p for name, p in model.named_parameters() if "parametrizations" in name}
    write_safetensors(of_masks, Path(folder, "pruning.safetensors"))


def load_pruning(folder: str | Path) -> BertForQuestionAnswering:
    """The model of a run folder, with its masks on if it was fine-pruned."""
    model = load_model(folder)
    pruning = read_json(Path(folder, "config.json")).get("pruning")
    if not pruning:
        return model
    add_masks(model, pruning["method"], pruning["block"])
    blockprune.set_threshold(model, pruning["threshold"])
    # Every W, b and S of the masks is in the file, of its shape, and nothing else is.
    saved = read_safetensors(Path(folder, "pruning.safetensors"))
    of_masks = {name: p for name, p in model.named_parameters() if "parametrizations" in name}
    saved_shapes = {name: tensor.shape for name, tensor in saved.items()}
    shapes = {name: parameter.shape for name, parameter in of_masks.items()}
    if saved_shapes != shapes:
        raise ValueError(f"{folder}: pruning.safetensors does not fit the model of config.json")
    for name, parameter in of_masks.items():
        parameter.data.copy_(saved[name])
    return model


def write_results(folder: str | Path, config: Config, training: Squad | None, dev: Squad,
                  **values) -> None:
    """Write results.json: what the run knows, and `values`. compact.py adds what it counts, times.

    training: None for a model that was not trained here.
    """
    of_data = {"train": None, "dev": dev.sha256}
    train_questions = None
    if training is not None:
        of_data["train"] = training.sha256
        train_questions = len(training.questions)
    data = dict(name=Path(config.data).name, sha256=of_data, train_questions=train_questions,
                dev_questions=len(dev.questions))
    # By these scored() sees whether the model beside the results is still the one they are of.
    results = dict(data=data, seed=config.seed, precision=config.precision,
                   weights_sha256=weights_sha256(folder), files_sha256=folder_sha256(folder),
                   **values)
    write_json(Path(folder, "results.json"), results)


def scored(folder: Path) -> dict | None:
    """The results.json of a folder; None where there is none that is of the files beside it."""
    for name in ("results.json", "model.safetensors"):
        if not (folder / name).is_file():
            return None
    try:
        results = read_json(folder / "results.json")
    except ValueError:
        return None
    if not results.keys() >= {"exact_match", "f1", "weights_sha256", "data"}:
        return None
    data = results["data"]
    if not isinstance(data, dict) or not isinstance(data.get("sha256"), dict):
        return None
    if results["weights_sha256"] != weights_sha256(folder):
        return None
    # Results of older versions say of the weights alone what they were.
    there = folder_sha256(folder)
    if results.get("files_sha256", there) != there:
        return None
    return results


# ---------------------------------------------------------------------- run folders: whose they are

# A run is known by its settings and by the contents of what it starts from. Where that lies may
# change when it goes on, and so may how often it speaks; all that a preset sets is a setting.
NOT_COMPARED = ("data", "init", "teacher", "out", "preset", "log_every", "checkpoint_every")


def contents_of(part: str, folder: str | Path) -> dict[str, str | None]:
    """folder_sha256() as run.json has it, None for no folder."""
    sha256 = None
    if folder:
        sha256 = folder_sha256(folder)
    return {f"contents of {part}": sha256}


@contextlib.contextmanager
def held(out: Path):
    """Keep other processes from a run folder; ValueError if one has it."""
    out.mkdir(parents=True, exist_ok=True)
    # Windows has no fcntl: there is no lock there.
    try:
        import fcntl
    except ImportError:
        yield
        return
    # The lock is on the folder itself, and goes with the process, however that ends.
    folder = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{out}: another process is at work in it") from None
        yield
    finally:
        os.close(folder)


def half_written(folder: Path) -> set[Path]:
    """What bert.replacing() leaves where its process is killed."""
    return set(folder.glob("*.tmp"))


def claim(config: Config, contents: dict, command: str, compacted: Path | None = None) -> bool:
    """Make the run folder ours; True if its run is finished. ValueError if it holds another run.

    contents: the SHA-256 of all that the run starts from, by what it is to the run.
    compacted: the folder, where the run is a compaction.
    """
    # Is it a folder of ours, of the same kind? What a killed process left half-written is nothing.
    out = Path(config.out)
    found = read_run(out)
    ours = found is not None and ("compacted" in found) == (compacted is not None)
    if not ours and set(out.iterdir()) != half_written(out):
        raise ValueError(f"{out} is there, and no run of ours: use another --out")
    for path in half_written(out):
        path.unlink()

    if ours:
        # Is it the same run? What an older one did not write down counts as unchanged.
        before = {**found["settings"], **found["contents"]}
        changed = []
        for name, value in {**vars(config), **contents}.items():
            was = before.get(name, value)
            if was != value and name not in NOT_COMPARED:
                changed.append(f"{name} was {was!r} and is {value!r}")
        if not changed:
            return scored(out) is not None
        # Another one may have the folder as long as nothing was made in it.
        for name in ("checkpoint.pt", "model.safetensors", "results.json"):
            if (out / name).exists():
                raise ValueError(f"{out} holds a run of other settings: {', '.join(changed)}. Use "
                                 "another --out")

    # It is a new run, or the same one before anything came of it.
    run_json = dict(settings=vars(config), contents=contents, command=command,
                    processes=processes(config.device)[1], **surroundings(config.device))
    if compacted is not None:
        run_json["compacted"] = str(compacted)
    write_json(out / "run.json", run_json)
    return False


def read_run(folder: Path) -> dict | None:
    """The run.json of a folder, with every setting of today's; None where there is none of ours."""
    path = folder / "run.json"
    if not path.is_file():
        return None
    found = read_json(path)
    settings = found.get("settings")
    contents = found.setdefault("contents", {})
    if not isinstance(settings, dict) or not isinstance(contents, dict):
        return None

    # Runs of older versions: other names, fewer settings.
    if "dense_lambda" in settings:
        settings["ffn_lambda"] = settings.pop("dense_lambda")
    settings = {**vars(Config()), **settings}
    found["settings"] = settings

    # What no flag could have set was written by somebody else.
    kinds = {field.name: kinds_of(field) for field in dataclasses.fields(Config)}
    for name, value in settings.items():
        if name not in kinds:
            raise ValueError(f"{path}: of another version, with a setting {name!r}")
        allowed = choices_of(name)
        if type(value) not in kinds[name] or (allowed and value not in (None, *allowed)):
            raise ValueError(f"{path}: {name} cannot be {value!r}")
    return found


def surroundings(device: str) -> dict:
    """What a run ran on: versions, commit, processor."""
    git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"],
                         cwd=Path(__file__).parent, capture_output=True, text=True)
    processor = platform.processor()
    if device == "cuda":
        processor = torch.cuda.get_device_name()
    elif hasattr(torch.cpu, "get_capabilities"):
        processor = torch.cpu.get_capabilities().get("cpu_name")
    return dict(commit=git.stdout.strip() or None, threads=torch.get_num_threads(),
                processor=processor, python=platform.python_version(), torch=torch.__version__,
                numpy=np.__version__, tokenizers=tokenizers.__version__)


# ------------------------------------------------------------------------------------ command line


def run(config: Config, command: str) -> None:
    """One run, from settings to results.json: train, save, read back what was saved, score that."""
    out = Path(config.out)
    before = read_run(out)
    if config.precision is None and before is not None:
        # A run keeps the precision that it began with, whatever machine it goes on on.
        config = dataclasses.replace(config, precision=before["settings"]["precision"])
    config = settle(config)
    rank, world = processes(config.device)
    if config.batch % world != 0:
        raise ValueError(f"--batch {config.batch} cannot be divided among {world} processes")
    if rank > 0:
        sys.stdout = open(os.devnull, "w")

    # What it starts from: questions, tokenizer, model and teacher. All is read, and refused where
    # it does not fit, before the run folder is touched.
    training = read_squad(config.data, file_name("train", config.v2), config.questions, config.seed)
    # Scored on the same dev questions whatever the seed.
    dev = read_squad(config.data, file_name("dev", config.v2), config.dev_questions)
    tokenizer = load_tokenizer(config.init)
    torch.manual_seed(config.seed)
    model = load_model(config.init, fresh_head=not config.fill)
    teacher = None
    if config.teacher:
        teacher = load_model(config.teacher)
        if not same_tokenizer(config.init, config.teacher):
            raise ValueError(f"{config.teacher} and {config.init} have different tokenizers")
    check_length(config, model, teacher)
    features = Features(training, tokenizer, config, training=True)
    if config.fill:
        refill(model)
    if config.method != "dense":
        plan(config, len(features))     # which refuses a run too short to prune anything
        add_masks(model, config.method, config.block)

    # Is the folder free, or ours, or finished? The contents tell one run from another.
    contents = {"contents of data": training.sha256, "contents of dev": dev.sha256,
                **contents_of("init", config.init), **contents_of("teacher", config.teacher)}

    # One process writes and is scored; torchrun's others only train.
    with held(out) if rank == 0 else contextlib.nullcontext():
        finished = False
        if rank == 0:
            finished = claim(config, contents, command)
        if mean_over_processes([float(finished)])[0] > 0:
            print(f"{out}: finished before, its results.json is there")
            return
        print(f"{out}: {len(training.questions)} questions of {data_name(config)} in "
              f"{len(features)} windows, {config.device}, {config.precision}; "
              f"{features.skipped} skipped (no answer at its offset), "
              f"{features.cut} cut (too long)")

        # Train, save, read back, score.
        seconds = train(model, teacher, features, config)
        if rank > 0:
            return
        if config.method == "dense":
            save_model(model, out, config.init)
        else:
            save_pruning(model, out, config.init, config.method, config.block, config.threshold)
        # Note: what is scored is what is on disk, and it is the last step: none is chosen on dev.
        model = load_model(out)
        dev_features = Features(dev, tokenizer, config, training=False)
        scores = evaluate(model, dev_features, config, out)
        write_results(out, config, training, dev, command=command, **scores, seconds=seconds)
        print(f"{out}: EM {scores['exact_match']:.2f}, F1 {scores['f1']:.2f}, {len(dev.questions)} "
              f"questions of {data_name(config)}")


def check_length(config: Config, model: BertForQuestionAnswering,
                 teacher: BertForQuestionAnswering | None) -> None:
    most = model.config.max_position_embeddings
    if teacher is not None:
        most = min(most, teacher.config.max_position_embeddings)
    if config.max_length > most:
        raise ValueError(f"--max-length {config.max_length} is over the model's {most}")


def data_name(config: Config) -> str:
    """The data, as runs speak of it."""
    if is_builtin(config.data):
        return "the built-in made-up corpus, NOT SQuAD,"
    return config.data


def ask(folder: str, config: Config) -> None:
    """Answer questions from the terminal, a line each: the best span, its score, its time."""
    model = load_model(folder)
    tokenizer = load_tokenizer(folder)
    # Windows as long as the model takes, with a third of it shared and a sixth for the question.
    longest = min(config.max_length, model.config.max_position_embeddings)
    config = settle(dataclasses.replace(
        config, max_length=longest, stride=min(config.stride, longest // 3),
        max_question=min(config.max_question, longest // 6)))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{folder}: {parameters / 1e6:.1f} M parameters. Give a passage, then questions; an "
          "empty line ends.")
    passage = line_from_terminal("passage:  ")
    while True:
        question = line_from_terminal("question: ")
        if not question:
            return
        began = time.perf_counter()
        squad = Squad([passage], [("asked", question, 0, [])], "")
        features = Features(squad, tokenizer, config, training=False)
        text, span_score = predict(model, features, config)["asked"]
        answer = repr(text) if text else "no answer"
        milliseconds = 1000 * (time.perf_counter() - began)
        print(f"          {answer}, score {span_score:.1f}, {milliseconds:.0f} ms")


def line_from_terminal(prompt: str) -> str:
    """A line; where there are no more, an empty one."""
    try:
        return input(prompt)
    except EOFError:
        return ""


def score_file(predictions_file: str, dev_file: str) -> None:
    """Print EM and F1 of a file of predictions, as the official scorers do."""
    # The file may be named with or without its .xz.
    dev_path = Path(dev_file.removesuffix(".xz"))
    truths = read_squad(dev_path.parent, dev_path.name).truths()
    predictions = read_json(predictions_file)
    for question_id, text in predictions.items():
        if type(text) is not str:
            raise ValueError(f"{predictions_file}: the prediction of {question_id!r} is no text")
    missing = len(set(truths) - set(predictions))
    if missing > 0:
        print(f"{missing} of {len(truths)} questions have no prediction", file=sys.stderr)
    print(json.dumps(score(predictions, truths)))


def kinds_of(field: dataclasses.Field) -> tuple[type, ...]:
    """The types that a setting may have: of `int | None` int and NoneType, of float an int too."""
    kinds = typing.get_args(field.type) or (field.type,)
    if float in kinds:
        kinds = (*kinds, int)
    return kinds


@functools.cache
def comments() -> dict[str, str]:
    """What Config says of each setting."""
    return dict(re.findall(r"^    (\w+): .*?# *(.*)", inspect.getsource(Config), re.M))


def choices_of(name: str) -> list[str] | None:
    """The words that a setting may be, where its comment has them in braces."""
    in_braces = re.match(r"\{(.*?)\}", comments()[name])
    if in_braces is None:
        return None
    return in_braces[1].split(",")


def parse(argv: list[str] | None) -> dict:
    """One flag for each field of Config, with its comment as the help."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(Config):
        flag = "--" + field.name.replace("_", "-")
        help_text = comments()[field.name].replace("%", "%%")
        kind = kinds_of(field)[0]
        if kind is bool:
            parser.add_argument(flag, action="store_true", help=help_text)
            continue
        parser.add_argument(flag, type=kind, default=field.default, choices=choices_of(field.name),
                            help=help_text)
    parser.add_argument("--score", nargs=2, metavar=("PREDICTIONS", "DEV"),
                        help="print EM and F1 of a file")
    parser.add_argument("--ask", metavar="FOLDER",
                        help="answer questions on a passage, from the terminal")
    return vars(parser.parse_args(argv))


def main(argv: list[str] | None = None) -> int:
    forgiving_output()
    if argv is None:
        argv = sys.argv[1:]
    arguments = parse(argv)
    files = arguments.pop("score")
    folder = arguments.pop("ask")
    config = Config(**arguments)
    if folder:
        return exit_status(ask, folder, config)
    if files:
        return exit_status(score_file, *files)
    return exit_status(run, config, shlex.join(["python", "train_squad.py", *argv]))


def exit_status(work, *arguments) -> int:
    """Call work(*arguments). 0; 2 for what is refused, in one line; 130 when interrupted."""
    try:
        work(*arguments)
    except torch.cuda.OutOfMemoryError as error:
        print(f"error: the GPU is full; a smaller --batch or --max-length needs less: "
              f"{str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it can", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            # The model that torchrun's processes shared is in a circle of references, and keeps the
            # group's threads at work. Where one is still there when Python ends, it aborts.
            gc.collect()
            dist.destroy_process_group()
    return 0


def forgiving_output() -> None:
    """A terminal that cannot show τ shows a ? instead, and stops no run."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


# ------------------------------------------------------------------------------ the built-in corpus
# Made-up townspeople in SQuAD's form, so that the whole pipeline runs where SQuAD cannot be had.

FIRST_NAMES = ("Anna Ben Carl Dora Emma Frank Grace Henry Ida Jack "
               "Karen Leo Mary Nora Oscar Paul Rose Sam Tina Victor")
LAST_NAMES = ("Adams Baker Carter Davis Evans Fisher Grant Hill Jones King "
              "Lewis Moore Parker Reed Scott Stone Turner Wood")
FACTS = {   # a fact → the question for it, its values
    "works as a {}": ("What does {} work as?",
                      "teacher nurse farmer painter lawyer singer driver dentist writer"),
    "was born in {}": ("Where was {} born?",
                       "London Paris Rome Berlin Vienna Madrid Dublin Boston Cairo Tokyo"),
    "owns a {}": ("Which animal does {} own?",
                  "cat dog horse goat rabbit parrot snake duck pig turtle"),
    "plays the {}": ("Which instrument does {} play?",
                     "piano violin guitar flute drums harp cello trumpet organ"),
}


def is_builtin(data: str) -> bool:
    return Path(data).name == Path(BUILTIN).name


def builtin_corpus(passages: int, seed: int, relations: int = 2) -> dict:
    """Passages about two people: a question needs both the name and the relation to be answered.

    relations: kinds of fact told of both people of a passage, 2 to 4; the more, the longer it takes
    to learn. Not SQuAD, and far easier.
    """
    rng = random.Random(seed)
    paragraphs = []
    for p in range(passages):
        # Two people, no name of one being a name of the other.
        first_names = rng.sample(FIRST_NAMES.split(), 2)
        last_names = rng.sample(LAST_NAMES.split(), 2)
        people = [f"{first} {last}" for first, last in zip(first_names, last_names)]
        # Facts of both of them, with different values.
        told = []
        for fact in rng.sample(list(FACTS), relations):
            values = rng.sample(FACTS[fact][1].split(), 2)      # one for each of the two people
            told.append((fact, values))
        # A sentence for each person and fact, and a question about it.
        context = ""
        qas = []
        for i, person in enumerate(people):
            for fact, values in rng.sample(told, relations):
                start = len(f"{context}{person} ") + fact.index("{")
                qas.append({"id": f"builtin-{seed}-{p}-{len(qas)}",
                            "question": FACTS[fact][0].format(person),
                            "answers": [{"text": values[i], "answer_start": start}]})
                context += f"{person} {fact.format(values[i])}. "
        # Which half is asked is drawn as well, so that the place of a statement tells nothing.
        paragraphs.append({"context": context.strip(), "qas": rng.sample(qas, relations)})
    return {"version": "builtin", "data": [{"title": "Townspeople", "paragraphs": paragraphs}]}


def write_builtin(folder: str | Path) -> None:
    """Write the built-in corpus: 2,100 questions to train on and 450 to be scored on."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_json(Path(folder, "train-v1.1.json"), builtin_corpus(1050, seed=1))
    write_json(Path(folder, "dev-v1.1.json"), builtin_corpus(225, seed=2))


if __name__ == "__main__":
    sys.exit(main())
