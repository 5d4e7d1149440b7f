"""Fine-tune, fine-prune and refill a BERT on SQuAD.

  python train_squad.py --data D --init WEIGHTS --out R/teacher                   dense fine-tuning
  python train_squad.py --data D --init R/teacher --teacher R/teacher --method hybrid --out R/hybrid
  python compact.py R/hybrid --data D --out R/hybrid-compact
  python train_squad.py --data D --init R/hybrid-compact --teacher R/teacher --fill --out R/filled
  python train_squad.py --score PREDICTIONS.json DEV.json         EM and F1 as the official scorers
  python train_squad.py --ask R/filled PASSAGE_FILE QUESTION…     answer your own questions

The method comes first: settings, masks, loss, the training loop, refilling. Then what any
fine-tuning on SQuAD needs: data, answers, scores, run folders, the command line.
Differs: in the paper pruning starts from the pretrained model (--init WEIGHTS). Here the commands
start from the fine-tuned teacher.
After Lagunas et al. 2021 and its code, huggingface/nn_pruning at 0cef2b2, cited as [R:file].

    B batch   T tokens   E hidden size   D head size   S scores   τ threshold   λ weight of penalty
Comments: `# Paper:` is the authors' method, `# Note:` our remark, `# Differs:` a deviation.
"""
import argparse
import collections
import contextlib
import dataclasses
import hashlib
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
from pathlib import Path

import numpy as np
import tokenizers
import torch
from torch.nn import functional

import blockprune
from bert import (BertForQuestionAnswering, folder_sha256, load_model, load_tokenizer, read_json,
                  read_safetensors, reading, replacing, same_tokenizer, save_model, weights_sha256,
                  write_json, write_safetensors)

# ---------------------------------------------------------------------------------------- settings


def setting(default, help_text: str, choices: tuple | None = None):
    """A field of Config: its default, what --help says about it, and the values it may have."""
    return dataclasses.field(default=default, metadata={"help": help_text, "choices": choices})


@dataclasses.dataclass
class Config:
    """Every setting; each is a flag of the command line.

    None stands for what the help has in parentheses. "(preset)": see PRESETS and fill_in().
    """
    data: str = setting("data/squad", "folder of train-v1.1.json and dev-v1.1.json, plain or .xz")
    init: str = setting("weights/minilm", "model folder to start from")
    out: str = setting("runs/dense", "run folder to write")
    teacher: str = setting("", "fine-tuned model folder to distil from (default: none)")
    method: str = setting("dense", "dense, or what is pruned: see add_masks()",
                          ("dense", "hybrid", "block", "struct", "unstructured"))
    block: str = setting("32x32", "r x c of query, key, value; c x r of out")
    fill: bool = setting(False, "refill a compacted model: noise for zeros, then fine-tuning")
    v2: bool = setting(False, "SQuAD 2.0: a question may have no answer")
    null_threshold: float = setting(0.0, "v2: no answer if [CLS] beats the best span by more")
    preset: str = setting("small", "gives the values that are left out; see PRESETS",
                          ("builtin", "small", "paper"))
    questions: int | None = setting(None, "train on the first n of the shuffled questions (all)")
    dev_questions: int | None = setting(None, "the same for the dev questions (all)")
    max_length: int = setting(384, "word pieces per window [R:command_line.py]")
    stride: int = setting(128, "word pieces that windows share [R:command_line.py]")
    max_question: int = setting(64, "word pieces. Differs: longer questions are cut")
    max_answer: int = setting(30, "word pieces [R:qa_xp.py]")
    seed: int = setting(17, "seed of everything random [R:command_line.py]")
    epochs: float | None = setting(None, "paper: 20 of pruning, 4 of filling (preset)")
    batch: int = setting(16, "windows per step; paper: 16")
    lr: float | None = setting(None, "peak learning rate of the weights; paper: 3e-5 (preset)")
    score_lr: float | None = setting(None, "peak learning rate of the scores; paper: 1e-2 (preset)")
    warmup_steps: int | None = setting(
        None, "of the learning rates; paper: 5,400, in a fill 10 (5 %% of the run, in a fill 10)")
    initial_warmup: float = setting(1.0, "τ is 0 for this · warmup_steps [R:command_line.py]")
    final_warmup: float = setting(10.0, "τ is final for this · warmup_steps [R:parameters.json]")
    threshold: float = setting(0.1, "final τ: a block is pruned if σ(S) ≤ τ [R:command_line.py]")
    final_lambda: float | None = setting(None, "λ at the final τ: higher keeps less (preset)")
    attention_lambda: float | None = setting(None, "factor on λ for attention (preset)")
    ffn_lambda: float | None = setting(None, "factor on λ for feed-forward layers (preset)")
    alpha_ce: float = setting(0.1, "weight of cross entropy, with a teacher [R:command_line.py]")
    alpha_kd: float = setting(0.9, "weight of distillation [R:command_line.py]")
    temperature: float = setting(2.0, "temperature of distillation [R:patch_coordinator.py]")
    attention_dropout: float | None = setting(
        None, "dropout of attention weights; paper: 0.1. Differs: 0, for speed on a CPU (preset)")
    weight_decay: float = setting(0.0, "weight decay of matrices; paper: 0")
    clip: float = setting(1.0, "largest norm of all gradients together; paper: 1")
    precision: str | None = setting(None, "of products; paper: fp32 (bf16 where it is fast)",
                                    ("bf16", "fp32"))
    device: str | None = setting(None, "where to compute (a GPU that works, else the CPU)",
                                 ("cpu", "cuda", "mps"))
    log_every: int = setting(20, "steps between two lines of the log")
    checkpoint_every: int = setting(300, "seconds between two checkpoints")


# The settings that depend on the stage of a run: dense fine-tuning, pruning or filling.
# λ does not carry over between models (see blockprune.penalty()), nor between lengths of training.
# Differs: short runs need higher learning rates than the paper's, and on SQuAD a higher λ.
PRESETS = {
    "builtin": {
        "dense": dict(epochs=3, lr=1e-4),
        "prune": dict(epochs=0.75, lr=2e-4, score_lr=0.3, final_lambda=150),
        "fill": dict(epochs=2, lr=2e-4),
    },
    "small": {
        "dense": dict(epochs=3, lr=1e-4),
        "prune": dict(epochs=3, lr=1e-4, score_lr=0.05, final_lambda=80),
        "fill": dict(epochs=2, lr=1e-4),
    },
    "paper": {
        "dense": dict(epochs=2, lr=3e-5),
        "prune": dict(epochs=20, lr=3e-5, score_lr=0.01),
        "fill": dict(epochs=4, lr=3e-5),
    },
}
# Paper: λ of the authors' log, where BERT-base keeps about a quarter of the weights.
PAPER_LAMBDAS = {
    "hybrid": dict(final_lambda=20, ffn_lambda=0.25),       # 20 %, the headline; 26 % refilled
    "block": dict(final_lambda=20),                         # 26 % at 32x32, 22 % at 8x8
    # Their attention has 48 score tensors, four per layer; ours has 12, each for all four matrices.
    # So the mean pushes our one score of a head as hard as their four together: their factor stays.
    "struct": dict(final_lambda=2.5, attention_lambda=0.00156),
    # Their 1x1 runs had one mean over all 72 tensors, 48 of attention and 24 of the feed-forward
    # layers. Ours is half the mean over 48 and half the mean over 24:
    # λ/72 for each tensor is factor · λ/(2 · 48) in attention, and factor · λ/(2 · 24) elsewhere.
    "unstructured": dict(final_lambda=25, attention_lambda=2 * 48 / 72, ffn_lambda=2 * 24 / 72),
}


# --------------------------------------------------------------- the method on BERT: masks and loss


def add_masks(model: BertForQuestionAnswering, method: str, block: str) -> None:
    """Put the masks of one of the paper's methods on a BERT.

    hybrid        blocks in attention, inner dimensions of the feed-forward layers (Paper: Hybrid)
    block         blocks in both (Paper: Block)
    struct        whole heads and inner dimensions (Paper: heads and dims)
    unstructured  single weights (Sanh et al. 2020: soft movement pruning)

    block: "32x32", for hybrid and block. Embeddings, norms and QA head have no masks
    [R:model_structure.py].
    """
    if method not in ("hybrid", "block", "struct", "unstructured"):
        raise ValueError(f"no method {method!r}")
    E = model.config.hidden_size
    D = model.config.head_size
    # The block: one head, one weight, or as given.
    if method == "struct":
        r, c = D, E
    elif method == "unstructured":
        r, c = 1, 1
    else:
        r, c = map(int, block.split("x"))

    for layer in model.bert.layers:
        attention, ffn = layer.attention, layer.ffn
        # Attention: blocks of r × c in (out, in). `out` gets the block transposed, so that its
        # columns line up with the rows of query, key and value that belong to the same head.
        # (A compacted layer may have nothing left: no mask then.)
        if attention.heads > 0:
            query = blockprune.mask_weight(attention.query, (r, c), kind="attention")
            # Differs: Struct has one score per head, shared by its four matrices. The reference
            # scores each matrix apart, and removes a head if Q, K or V is empty: then the output
            # changes.
            share = query if method == "struct" else None
            blockprune.mask_weight(attention.key, (r, c), share=share, kind="attention")
            blockprune.mask_weight(attention.value, (r, c), share=share, kind="attention")
            blockprune.mask_weight(attention.out, (c, r), share=share, kind="attention")

        # Feed-forward: one score per inner dimension, or blocks of r × c in both matrices, as the
        # reference has them.
        if ffn.width > 0:
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
    not depend on the rows beside it. In the reference padding takes part in them.
    """
    def log_softmax(logits):
        # With −∞ the KL would be NaN there; this has probability 0 as well.
        padding = torch.finfo(torch.float32).min
        return logits.masked_fill(~batch["real"], padding).log_softmax(-1)      # (B, T)

    # Cross entropy: where does the answer start, and where does it end?
    ce = 0.0
    for logits, label in zip(student_logits, (batch["start"], batch["end"])):
        ce = ce + functional.nll_loss(log_softmax(logits.float()), label)
    # Distillation: the student's distribution over positions should be the teacher's.
    kd = torch.zeros(())
    if teacher_logits is not None:
        for student, teacher in zip(student_logits, teacher_logits):
            student_log_p = log_softmax(student.float() / temperature)
            teacher_log_p = log_softmax(teacher.float() / temperature)
            kl = functional.kl_div(student_log_p, teacher_log_p, reduction="batchmean",
                                   log_target=True)
            # The square keeps the gradient's size, whatever the temperature is.
            kd = kd + temperature ** 2 * kl
    # Means of start and end.
    return ce / 2, kd / 2


# ------------------------------------------------------------------ the method on BERT: one step


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

    What stands under `if pruning:` is all that pruning adds to this function.
    batch: see Features.batch(). teacher_logits: a pair, each (B, T), or None. total, warmup: steps.
    Returns "loss", whose gradient is wanted, and what it is made of.
    """
    pruning = config.method != "dense"
    # Set τ: from here on every masked linear.weight is read as W ⊙ 1[σ(S) > τ].
    tau = lam = 0.0
    if pruning:
        tau, lam = threshold_and_lambda(step, config, total, warmup)
        blockprune.set_threshold(model, tau)

    # Forward, with the masks in it.
    with autocast(config):
        student_logits = model(batch["ids"], batch["types"], batch["real"])

    # The loss of the task: 0.1 · cross entropy + 0.9 · distillation, or cross entropy alone.
    ce, kd = loss_terms(student_logits, teacher_logits, batch, config.temperature)
    loss = ce
    if teacher_logits is not None:
        loss = config.alpha_ce * ce + config.alpha_kd * kd

    # And the penalty, λ(t) · the mean of σ(S) by kind, which pushes all scores down.
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


# ------------------------------------------------------------------ the method on BERT: the loop


def train(model: BertForQuestionAnswering, teacher: BertForQuestionAnswering | None,
          features: "Features", config: Config) -> float:
    """Fine-tune or, with masks on the model, fine-prune. Goes on from the checkpoint, if any.

    Returns the seconds that the steps took. Raises ValueError if the loss or the gradient is not
    finite where a line is logged or a checkpoint written.
    """
    out = Path(config.out)
    total, warmup = count_steps(config, len(features))
    for layer in model.bert.layers:
        layer.attention.dropout = config.attention_dropout
    model.to(config.device)
    optimizer = make_optimizer(model, config)
    first_step, seconds_before = restore(out, model, optimizer, config.device)

    # The teacher's logits never change: they are computed once, before training.
    all_teacher_logits = None
    if teacher is not None and first_step < total:
        all_teacher_logits = logits_of_teacher(teacher, features, config)      # (windows, 2, T)

    model.train()
    began = saved = time.monotonic()
    steps = range(first_step, total)
    for step, indices in zip(steps, batches_from(first_step, features.lengths, config)):
        batch = features.batch(indices, config.device)
        teacher_logits = None
        if all_teacher_logits is not None:
            T = batch["ids"].shape[1]
            teacher_logits = all_teacher_logits[indices, :, :T].unbind(1)      # (start, end)

        # Forward; backward, straight through the masks to the scores; update.
        terms = step_loss(model, batch, teacher_logits, step, config, total, warmup)
        optimizer.zero_grad()
        terms["loss"].backward()
        norm = update(model, optimizer, step, config, total, warmup)

        # The log, and a checkpoint, from which a stopped run goes on (on a CPU to the same bits).
        done = step + 1
        now = time.monotonic()
        log_now = done % config.log_every == 0 or done == total
        save_now = now - saved > config.checkpoint_every or done == total
        if log_now or save_now:
            stop_if_not_finite(terms["loss"], norm, done, out)
        if log_now:
            speed = (done - first_step) * config.batch / (now - began)
            write_log(out, done, total, terms, model, optimizer, speed, config)
        if save_now:
            seconds = seconds_before + now - began
            save_checkpoint(out, model, optimizer, config.device, done, seconds)
            saved = now

    # Paper: evaluation is at the final τ.
    if config.method != "dense":
        blockprune.set_threshold(model, config.threshold)
    return seconds_before + time.monotonic() - began


def count_steps(config: Config, windows: int) -> tuple[int, int]:
    """The steps of a run, and those of its warm-up."""
    total = round(config.epochs * math.ceil(windows / config.batch))
    if total < 2:
        raise ValueError(f"--epochs {config.epochs} is less than two steps")
    # Paper: 10 steps of warm-up in a fill, and 5,400 of 110,660 in pruning, about 5 %.
    warmup = config.warmup_steps
    if warmup is None:
        warmup = 10 if config.fill else round(0.05 * total)
    return total, min(warmup, total - 1)


def make_optimizer(model: BertForQuestionAnswering, config: Config) -> torch.optim.AdamW:
    """AdamW with a learning rate for weights and one for scores.

    Differs: the reference has transformers' AdamW, with ε before the bias correction. For a
    gradient of 1e-6 its first step is 0.77 times torch's; after 5,400 steps the two are equal.
    """
    groups = blockprune.parameter_groups(model, config.lr, config.score_lr, config.weight_decay)
    # update() scales each group's own peak.
    for group in groups:
        group["peak_lr"] = group["lr"]
    return torch.optim.AdamW(groups, fused=True)


@torch.no_grad()
def logits_of_teacher(teacher: BertForQuestionAnswering, features: "Features",
                      config: Config) -> torch.Tensor:
    """The teacher's start and end logits of every window, (windows, 2, T): 0.3 GB for SQuAD."""
    T = features.lengths.max()
    dtype = teacher.qa_outputs.weight.dtype
    logits = torch.zeros(len(features), 2, T, dtype=dtype, device=config.device)
    teacher.eval().to(config.device)
    with autocast(config):
        for indices in evaluation_batches(features.lengths, config.device):
            batch = features.batch(indices, config.device)
            start, end = teacher(batch["ids"], batch["types"], batch["real"])
            # A batch is as long as its longest window. What is to the right of it stays 0.
            logits[indices, :, :start.shape[1]] = torch.stack([start, end], dim=1).to(dtype)
    teacher.cpu()       # it makes room on the device
    return logits


@torch.no_grad()
def refill(model: BertForQuestionAnswering) -> None:
    """Paper: Hybrid Filled. Exact zeros of a compacted model get small noise, then fine-tuning.

        0  ↦  N(0, 1) · 0.01 · std(W) + mean(W), over the whole tensor W

    Rows of Q and of K that are both 0 get no gradient from Q Kᵀ, and would stay 0 without noise.
    Source: [R:sparse_xp.py], unzero_parameters.
    Differs: where W is all zeros, the std of a fresh weight stands in for std(W), which is 0.
    """
    for name, parameter in model.named_parameters():
        # All tensors but biases, as the reference.
        if name.endswith("bias"):
            continue
        std = model.config.initializer_range
        if parameter.any():
            std = parameter.std()
        # Drawn for the whole tensor, used where it is 0.
        noise = torch.randn_like(parameter) * 0.01 * std + parameter.mean()
        parameter.copy_(torch.where(parameter == 0, noise, parameter))


# ==================================================================================================
# A reader of the paper may stop here. What follows fills in settings, reads and scores SQuAD, and
# looks after run folders: what any fine-tuning needs.
# ==================================================================================================

# ------------------------------------------------------------------------------ settings, filled in


def fill_in(config: Config) -> Config:
    """A copy of the settings, with the preset's values where none was given, and checked."""
    config = dataclasses.replace(config, device=pick_device(config.device))
    values = dict(attention_lambda=1.0, ffn_lambda=1.0, attention_dropout=0.0)
    values["precision"] = "bf16" if multiplies_in_bf16(config.device) else "fp32"
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
    for name, value in values.items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    check_settings(config)
    return config


def check_settings(config: Config) -> None:
    """ValueError for what would be trained in vain."""
    if config.fill and config.method != "dense":
        raise ValueError("--fill trains without masks: leave --method out")
    # Scores start at 0, where σ is 0.5: everything would be pruned at once.
    if config.threshold >= 0.5:
        raise ValueError(f"--threshold {config.threshold}: it must be under 0.5")
    # A window is [CLS] question [SEP] passage [SEP]; the next one has to begin later.
    if config.max_length - 3 - config.max_question <= config.stride:
        raise ValueError(f"--max-length {config.max_length} is too short for --stride "
                         f"{config.stride} and --max-question {config.max_question}")


def check_schedule(config: Config, total: int, warmup: int) -> None:
    """ValueError if nothing could be pruned in so many steps."""
    threshold_and_lambda(0, config, total, warmup)      # raises if τ has no steps to rise in
    # Note: Adam moves a score by about its learning rate per step, so the sum of these bounds how
    # far it can fall from 0. A block is pruned at logit(τ), −2.2 for 0.1. Few are, if the lowest
    # score within reach is less than 0.8 below that.
    lowest = -config.score_lr * sum(learning_rate_factor(t, total, warmup) for t in range(total))
    pruned_at = math.log(config.threshold / (1 - config.threshold))
    needed = pruned_at - 0.8
    if lowest > needed:
        raise ValueError(f"nothing could be pruned: in {total} steps scores fall to about "
                         f"{lowest:.2f}, and a block is pruned at {pruned_at:.2f}. To reach "
                         f"{needed:.2f}, take more --epochs or a higher --score-lr")


# ------------------------------------------------------------------------------------ SQuAD on disk


@dataclasses.dataclass
class Question:
    id: str
    text: str
    passage: int                        # its index in Squad.passages
    answers: list[tuple[str, int]]      # text, and offset in the passage; several in a dev set


@dataclasses.dataclass
class Squad:
    """The questions of a file, and the passages that they are about."""
    passages: list[str]
    questions: list[Question]
    sha256: str = ""                    # of the file, unpacked
    builtin: bool = False               # the made-up corpus of tests/builtin.py

    def truths(self) -> dict[str, list[str]]:
        """The accepted answers of each question, by its id; none where it has no answer (v2)."""
        return {q.id: [text for text, _ in q.answers] for q in self.questions}


def file_name(part: str, v2: bool) -> str:
    return f"{part}-v2.0.json" if v2 else f"{part}-v1.1.json"


def read_squad(folder: str | Path, name: str, limit: int | None = None,
               seed: int = Config.seed) -> Squad:
    """SQuAD's JSON from folder/name or folder/name.xz; with a limit, the first of a seeded shuffle.

    {"data": [{"paragraphs": [{"context": …, "qas": [{"id", "question", "answers"}, …]}, …]}, …]}
    FileNotFoundError if it is not there, ValueError if it is not like that.
    """
    path = Path(folder, name)
    raw = read_bytes(path)
    with reading(path):
        tree = json.loads(raw)
        squad = Squad([], [], hashlib.sha256(raw).hexdigest(), tree.get("version") == "builtin")
        ids = set()
        for article in tree["data"]:
            for paragraph in article["paragraphs"]:
                for qa in paragraph["qas"]:
                    answers = [(a["text"], a["answer_start"]) for a in qa["answers"]]
                    # Some sets number their questions.
                    question = Question(str(qa["id"]), qa["question"], len(squad.passages), answers)
                    if not answers and qa.get("is_impossible") is not True:
                        raise ValueError(f"question {question.id!r} has no answer, and is not "
                                         "marked as impossible")
                    # Scores are by id.
                    if question.id in ids:
                        raise ValueError(f"two questions have the id {question.id!r}")
                    ids.add(question.id)
                    squad.questions.append(question)
                squad.passages.append(paragraph["context"])
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
    if not packed.is_file():
        raise FileNotFoundError(f"{path.parent}: a folder with {path.name} or {packed.name} is "
                                "needed")
    with reading(packed):
        import lzma     # some Pythons are built without it
        return lzma.decompress(packed.read_bytes())


# ----------------------------------------------------------------------------- windows and batches


def word_pieces(tokenizer, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each text: ids, (n,), and the characters [begin, end) that each stands for, (n, 2)."""
    found = []
    # encode_batch() uses all cores. A thousand texts at a time need little memory.
    for first in range(0, len(texts), 1000):
        for encoding in tokenizer.encode_batch(texts[first:first + 1000], add_special_tokens=False):
            ids = np.array(encoding.ids, np.int32)
            characters = np.array(encoding.offsets, np.int32).reshape(-1, 2)
            found.append((ids, characters))
    return found


def answer_span(passage: str, characters: np.ndarray, text: str,
                start: int) -> tuple[int, int] | None:
    """The first and last word piece that touch the answer; None if it is not at its offset."""
    end = start + len(text)
    if start < 0 or not text or passage[start:end] != text:
        return None
    # The first word piece that ends after `start`, and the last one that begins before `end`.
    first = int(np.searchsorted(characters[:, 1], start, side="right"))
    last = int(np.searchsorted(characters[:, 0], end, side="left")) - 1
    if first > last:
        return None
    return first, last


@dataclasses.dataclass(slots=True)
class Window:
    """[CLS] question [SEP] part of the passage [SEP]."""
    question: int           # its index in Squad.questions
    ids: np.ndarray         # (length,)
    passage_begin: int      # the position at which the passage begins
    first: int              # which word piece of the passage stands there
    start: int = 0          # positions of the answer's first and last word piece;
    end: int = 0            # 0, which is [CLS], if the answer is not wholly inside


class Features:
    """The windows of all questions, at most max_length word pieces each.

    A passage that does not fit is seen through windows that share `stride` word pieces, as in
    Hugging Face's run_qa.py.
    windows: a list of Window. lengths: their numbers of word pieces, (N,).
    skipped: training questions left out because their answer is not at its offset.
    cut: questions that are longer than max_question.
    """

    def __init__(self, squad: Squad, tokenizer, config: Config, training: bool):
        self.squad = squad
        self.windows: list[Window] = []
        self.skipped = 0
        self.cut = 0
        self.pad = tokenizer.token_to_id("[PAD]")
        cls = tokenizer.token_to_id("[CLS]")
        sep = tokenizer.token_to_id("[SEP]")
        questions = word_pieces(tokenizer, [question.text for question in squad.questions])
        # With a limit many passages have no question left: they are not tokenised.
        used = {question.passage for question in squad.questions}
        texts = [text if p in used else "" for p, text in enumerate(squad.passages)]
        passages = word_pieces(tokenizer, texts)
        self.characters = [characters for _, characters in passages]

        for q, question in enumerate(squad.questions):
            passage_ids, characters = passages[question.passage]
            # Where is the answer? A question whose answer is not there teaches nothing.
            span = None
            if training and question.answers:
                text, offset = question.answers[0]
                span = answer_span(squad.passages[question.passage], characters, text, offset)
                if span is None:
                    self.skipped += 1
                    continue
            question_ids = questions[q][0]
            if len(question_ids) > config.max_question:
                self.cut += 1
                question_ids = question_ids[:config.max_question]

            # [CLS] and two [SEP] take three places; the passage has the rest.
            head = np.concatenate([[cls], question_ids, [sep]]).astype(np.int32)
            room = config.max_length - len(head) - 1
            step = room - config.stride
            for first in range(0, max(1, len(passage_ids) - config.stride), step):
                part = passage_ids[first:first + room]
                ids = np.concatenate([head, part, np.array([sep], np.int32)])
                window = Window(q, ids, len(head), first)
                # Is the whole answer in this window?
                if span is not None and first <= span[0] and span[1] < first + len(part):
                    window.start = len(head) + span[0] - first
                    window.end = len(head) + span[1] - first
                self.windows.append(window)
        if not self.windows:
            raise ValueError("no question has an answer at its offset")
        self.lengths = np.array([len(window.ids) for window in self.windows])

    def __len__(self) -> int:
        return len(self.windows)

    def batch(self, indices: np.ndarray, device: str = "cpu") -> dict[str, torch.Tensor]:
        """Some windows, padded to the longest.

        ids, types; real: no padding; context: the passage; each (B, T).
        start, end: positions of the answer, each (B,).
        """
        windows = [self.windows[i] for i in indices]
        length = self.lengths[indices][:, None]                                 # (B, 1)
        begin = np.array([window.passage_begin for window in windows])[:, None]
        position = np.arange(length.max())                                      # (T,)
        ids = np.full((len(windows), len(position)), self.pad)                  # (B, T)
        for row, window in zip(ids, windows):
            row[:len(window.ids)] = window.ids
        real = position < length
        arrays = {
            "ids": ids,
            "real": real,
            # Types: 0 up to the first [SEP], then 1; and 0 at padding.
            "types": (real & (position >= begin)).astype(np.int64),
            "context": (position >= begin) & (position < length - 1),
            "start": np.array([window.start for window in windows]),
            "end": np.array([window.end for window in windows]),
        }
        return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}

    def text(self, index: int, start: int, end: int) -> str:
        """The characters of the passage from position `start` to position `end` of a window."""
        window = self.windows[index]
        p = self.squad.questions[window.question].passage
        shift = window.first - window.passage_begin     # from positions to word pieces
        begin = self.characters[p][start + shift, 0]
        return self.squad.passages[p][begin:self.characters[p][end + shift, 1]]


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
    """The indices of the windows of each step from `step` on, epoch after epoch, for ever."""
    steps_per_epoch = math.ceil(len(lengths) / config.batch)
    while True:
        epoch = step // steps_per_epoch
        batches = training_batches(lengths, config.batch, config.seed, epoch)
        for indices in batches[step % steps_per_epoch:]:
            yield indices
            step += 1


def evaluation_batches(lengths: np.ndarray, device: str) -> list[np.ndarray]:
    """All windows in order of length, in batches of at most so many tokens, padding counted."""
    # Note: what a layer makes of 2,048 tokens stays in a CPU's cache.
    most_tokens = 2048
    if device != "cpu":
        most_tokens = 65536
    order = np.argsort(lengths, kind="stable")
    cuts = [0]
    for i in range(1, len(order)):
        # With this window, which is the longest so far, is the batch too large?
        rows = i + 1 - cuts[-1]
        if rows * lengths[order[i]] > most_tokens:
            cuts.append(i)
    return np.split(order, cuts[1:])


# ------------------------------------------------------------------------------ answers and scores


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

    v2: the text is "", no answer, if the least score of [CLS] over the windows is more than
    null_threshold over the best span's.
    """
    model.eval().to(config.device)
    # By question: the best span so far, text and score, and the least score of "no answer".
    best = {}
    null_scores = {}
    for question in features.squad.questions:
        best[question.id] = ("", -math.inf)
        null_scores[question.id] = math.inf
    with autocast(config):
        for indices in evaluation_batches(features.lengths, config.device):
            batch = features.batch(indices, config.device)
            start, end = model(batch["ids"], batch["types"], batch["real"])
            start = start.float()
            end = end.float()
            spans = best_spans(start, end, batch["context"], config.max_answer)
            span_scores, first, last = (column.tolist() for column in spans)
            cls_scores = (start[:, 0] + end[:, 0]).tolist()
            # A question's windows may lie in several batches.
            for b, index in enumerate(indices):
                question = features.squad.questions[features.windows[index].question]
                null_scores[question.id] = min(null_scores[question.id], cls_scores[b])
                if span_scores[b] > best[question.id][1]:
                    best[question.id] = (features.text(index, first[b], last[b]), span_scores[b])
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
    rules are those of evaluate-v2.0.py, else those of evaluate-v1.1.py. They differ in token_f1(),
    and for a question without a prediction: v1.1 counts 0, v2.0 leaves it out.
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
    """Exact match and F1 in percent, the means of question_scores()."""
    scores = question_scores(predictions, truths).values()
    number = max(1, len(scores))
    return {"exact_match": 100 * sum(exact for exact, _ in scores) / number,
            "f1": 100 * sum(f1 for _, f1 in scores) / number}


def evaluate(model: BertForQuestionAnswering, features: Features, config: Config,
             out: str | Path) -> dict[str, float]:
    """EM and F1 on a dev set. Answers go to predictions.json, and each question's F1 to f1.json."""
    truths = features.squad.truths()
    answers = predict(model, features, config)
    predictions = {question_id: text for question_id, (text, _) in answers.items()}
    scores = question_scores(predictions, truths)
    write_json(Path(out, "predictions.json"), predictions)
    write_json(Path(out, "f1.json"), {i: round(f1, 4) for i, (_, f1) in scores.items()})
    return score(predictions, truths)


# ----------------------------------------------------------------------------------------- devices


def pick_device(wanted: str | None) -> str:
    """The device that is asked for; else a GPU that works, else the CPU."""
    if wanted is not None:
        return wanted
    for device in ("cuda", "mps"):
        # A GPU may be there and compute nothing, if it is too old or too new for this torch.
        with contextlib.suppress(RuntimeError, AssertionError):
            torch.ones(2, device=device).sum().item()
            return device
    return "cpu"


def multiplies_in_bf16(device: str) -> bool:
    """Whether bf16 is faster than fp32 there. Differs: the reference is fp32 throughout."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "mps" or not hasattr(torch.cpu, "get_capabilities"):   # there since torch 2.11
        return False
    units = torch.cpu.get_capabilities()
    return bool(units.get("amx_bf16") or units.get("avx512_bf16"))


def autocast(config: Config):
    """Compute products in bf16, if config says so.

    Around a whole loop without gradients, weights are cast once and not for each batch.
    """
    return torch.autocast(config.device, torch.bfloat16, enabled=config.precision == "bf16")


# ------------------------------------------------------------------- run folders: while it trains


def stop_if_not_finite(loss: torch.Tensor, norm: torch.Tensor, step: int, out: Path) -> None:
    if math.isfinite(loss.item()) and math.isfinite(norm.item()):
        return
    raise ValueError(f"{out}: stopped at step {step}: loss {loss.item():.3g}, gradient norm "
                     f"{norm.item():.3g}. The checkpoint, if any, is from an earlier step. Try a "
                     "lower --lr, or --precision fp32")


def write_log(out: Path, step: int, total: int, terms: dict, model, optimizer, speed: float,
              config: Config) -> None:
    """Append a line to log.jsonl, and print its main numbers. terms: see step_loss()."""
    line = {"step": step}
    for name in ("loss", "ce", "kd", "penalty"):
        line[name] = terms[name].item()
    for name in ("threshold", "lambda"):
        line[name] = terms[name]
    line["density"] = blockprune.density(model)
    line["lr"] = optimizer.param_groups[0]["lr"]
    line["examples_per_second"] = speed
    with open(out / "log.jsonl", "a", encoding="utf-8") as log:
        print(json.dumps(line), file=log)
    text = f"{out.name} {step}/{total}  loss {line['loss']:.3f}  ce {line['ce']:.3f}"
    if line["density"]:
        text += f"  τ {line['threshold']:.3f}  density {line['density']['all']:.3f}"
    minutes_left = (total - step) * config.batch / speed / 60
    print(f"{text}  {speed:.1f} examples/s, {minutes_left:.1f} min left", flush=True)


def save_checkpoint(out: Path, model, optimizer, device: str, step: int, seconds: float) -> None:
    """Write checkpoint.pt: all that a run needs to go on to the same bits."""
    # Dropout draws from the generator of the device that the model is on.
    random_states = {"cpu": torch.get_rng_state()}
    if device != "cpu":
        random_states[device] = torch.get_device_module(device).get_rng_state()
    state = {"step": step, "seconds": seconds, "model": model.state_dict(),
             "optimizer": optimizer.state_dict(), "random_states": random_states}
    with replacing(out / "checkpoint.pt") as temporary:
        torch.save(state, temporary)


def restore(out: Path, model, optimizer, device: str) -> tuple[int, float]:
    """Load checkpoint.pt, if there is one, and cut the log back to it. Returns step and seconds."""
    path = out / "checkpoint.pt"
    step = 0
    seconds = 0.0
    if path.exists():
        with reading(path):
            state = torch.load(path, map_location="cpu", weights_only=True)
            step = state["step"]
            seconds = state["seconds"]
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["random_states"]["cpu"])
            if device != "cpu":
                torch.get_device_module(device).set_rng_state(state["random_states"][device])
        print(f"{out}: going on from step {step}")

    # The steps after the checkpoint are done again, and logged again.
    log = out / "log.jsonl"
    if log.exists():
        kept = []
        with reading(log):
            for line in log.read_text(encoding="utf-8").splitlines(keepends=True):
                # A line without an end was being written when the process died.
                if line.endswith("\n") and json.loads(line)["step"] <= step:
                    kept.append(line)
        with replacing(log) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")
    return step, seconds


# --------------------------------------------------------------------- run folders: what they hold


def save_pruning(model: BertForQuestionAnswering, config: Config) -> None:
    """Write a masked model: model.safetensors with W ⊙ M(S), an ordinary BERT with zeros.

    What load_pruning() needs beside it: pruning.safetensors, which has W, b and S under the names
    of named_parameters(), and the key "pruning" of config.json.
    """
    pruning = dict(method=config.method, block=config.block, threshold=config.threshold)
    save_model(model, config.out, tokenizer_from=config.init, pruning=pruning)
    tensors = {name: p for name, p in model.named_parameters() if "parametrizations" in name}
    write_safetensors(tensors, Path(config.out, "pruning.safetensors"))


def load_pruning(folder: str | Path) -> BertForQuestionAnswering:
    """The model of a run folder, with its masks on if it was fine-pruned."""
    model = load_model(folder)
    pruning = read_json(Path(folder, "config.json")).get("pruning")
    if pruning is None:
        return model
    add_masks(model, pruning["method"], pruning["block"])
    blockprune.set_threshold(model, pruning["threshold"])
    path = Path(folder, "pruning.safetensors")
    with reading(path):
        tensors = read_safetensors(path)
        names = [name for name, _ in model.named_parameters() if "parametrizations" in name]
        if sorted(tensors) != sorted(names):
            raise ValueError("its tensors are not those of the model's masks")
        model.load_state_dict(tensors, strict=False)
    return model


def write_results(config: Config, training: Squad | None, dev: Squad, **values) -> None:
    """Write results.json: what the run knows, and `values`. compact.py adds what it counts, times.

    training: None for a model that was not trained here.
    """
    data = dict(name=Path(config.data).name, builtin=dev.builtin, v2=config.v2,
                sha256={"train": training.sha256 if training else None, "dev": dev.sha256},
                train_questions=len(training.questions) if training else None,
                dev_questions=len(dev.questions))
    results = dict(data=data, seed=config.seed, precision=config.precision,
                   weights_sha256=weights_sha256(config.out), **values)
    write_json(Path(config.out, "results.json"), results)


def read_results(folder: Path) -> dict | None:
    """The results.json of a folder; None if there is none that belongs to the weights beside it."""
    path = folder / "results.json"
    if not path.is_file() or not (folder / "model.safetensors").is_file():
        return None
    results = read_json(path)
    if results.get("weights_sha256") != weights_sha256(folder):
        return None
    return results


# -------------------------------------------------------------------- run folders: one run in each

# A run is known by its settings and by the contents of what it starts from. Where that lies may
# change when the run goes on, and so may how often it speaks.
NOT_COMPARED = ("data", "init", "teacher", "out", "preset", "log_every", "checkpoint_every")


@contextlib.contextmanager
def locked(out: Path):
    """Make a run folder, and keep other processes out of it."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:         # on Windows nothing is locked
        yield
        return
    folder = os.open(out, os.O_RDONLY)      # the lock ends with the process, however that ends
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{out}: another process is at work in it") from None
        except OSError:         # a file system without locks
            pass
        yield
    finally:
        os.close(folder)


def is_finished(config: Config, inputs: dict, command: str) -> bool:
    """Whether the run folder holds this run, finished. If it holds nothing yet, write its run.json.

    inputs: the SHA-256 of all that the run starts from, by what it is to the run.
    ValueError if the folder holds something else: nothing is ever written over.
    """
    out = Path(config.out)
    path = out / "run.json"
    if path.is_file():
        before = read_json(path)
        changed = []
        for name, value in vars(config).items():
            was = before["settings"].get(name)
            if was != value and name not in NOT_COMPARED:
                changed.append(f"{name} was {was} and is {value}")
        for name, sha256 in inputs.items():
            if before["inputs"].get(name) != sha256:
                changed.append(f"another {name}")
        if not changed:
            return read_results(out) is not None
        # Another run may have the folder as long as nothing was made in it.
        for name in ("checkpoint.pt", "model.safetensors", "results.json"):
            if (out / name).exists():
                raise ValueError(f"{out} holds another run ({', '.join(changed)}): use another "
                                 "--out, or RUNS= with make")
    elif any(file.suffix != ".tmp" for file in out.iterdir()):
        raise ValueError(f"{out} is not empty, and no run folder: use another --out")
    write_json(path, dict(settings=vars(config), inputs=inputs, command=command,
                          **environment(config.device)))
    return False


def read_run(folder: Path) -> Config | None:
    """The settings of the run in a folder; None if there is no run.json."""
    path = folder / "run.json"
    if not path.is_file():
        return None
    with reading(path):
        return Config(**read_json(path)["settings"])


def environment(device: str) -> dict:
    """What a run runs on: versions, commit, processor."""
    processor = platform.processor()
    if device == "cuda":
        processor = torch.cuda.get_device_name()
    elif hasattr(torch.cpu, "get_capabilities"):
        processor = torch.cpu.get_capabilities().get("cpu_name")
    return dict(commit=git_commit(), threads=torch.get_num_threads(), processor=processor,
                python=platform.python_version(), torch=torch.__version__,
                numpy=np.__version__, tokenizers=tokenizers.__version__)


def git_commit() -> str | None:
    """The commit of this file; None if no git is there to tell, or it does not know the file."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=Path(__file__).parent, check=True,
                              capture_output=True, text=True).stdout.strip()
    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("describe", "--always", "--dirty", "--abbrev=40")
    except (OSError, subprocess.CalledProcessError):
        return None


# ------------------------------------------------------------------------------------ command line


def run(config: Config, command: str) -> None:
    """One run, from settings to results.json: train, save, read back what was saved, score that."""
    out = Path(config.out)
    # A run keeps the precision that it began with, on whatever machine it goes on.
    before = read_run(out)
    if config.precision is None and before is not None:
        config = dataclasses.replace(config, precision=before.precision)
    config = fill_in(config)

    # What it starts from: questions, tokenizer, model and teacher. All is read, and rejected if it
    # does not fit, before the run folder is touched.
    training = read_squad(config.data, file_name("train", config.v2), config.questions, config.seed)
    # The same dev questions whatever the seed.
    dev = read_squad(config.data, file_name("dev", config.v2), config.dev_questions)
    tokenizer = load_tokenizer(config.init)
    torch.manual_seed(config.seed)
    model = load_model(config.init, fresh_head=not config.fill)
    teacher = None
    if config.teacher:
        teacher = load_model(config.teacher)
        if not same_tokenizer(config.init, config.teacher):
            raise ValueError(f"{config.teacher} and {config.init} have different tokenizers")
    for positions in [m.config.max_position_embeddings for m in (model, teacher) if m]:
        if config.max_length > positions:
            raise ValueError(f"--max-length {config.max_length} is over the model's {positions}")
    features = Features(training, tokenizer, config, training=True)
    # Training on from a masked model would drop its masks in silence: its zeros would grow again.
    if "pruning" in read_json(Path(config.init, "config.json")):
        raise ValueError(f"{config.init} still has its masks. Compact it first, with python "
                         f"compact.py {config.init} --data {config.data} --out "
                         f"{config.init}-compact, and start from that")
    if config.fill:
        refill(model)
    total, warmup = count_steps(config, len(features))
    if config.method != "dense":
        check_schedule(config, total, warmup)
        add_masks(model, config.method, config.block)
    inputs = {"train file": training.sha256, "dev file": dev.sha256,
              "init": folder_sha256(config.init),
              "teacher": folder_sha256(config.teacher) if config.teacher else None}

    with locked(out):
        if is_finished(config, inputs, command):
            print(f"{out}: finished before, its results.json is there")
            return
        print(f"{out}: {len(training.questions)} questions of {data_name(config, training)} in "
              f"{len(features)} windows, {config.device}, {config.precision}; "
              f"{features.skipped} skipped (no answer at its offset), "
              f"{features.cut} cut (too long)")
        seconds = train(model, teacher, features, config)
        if config.method == "dense":
            save_model(model, out, config.init)
        else:
            save_pruning(model, config)
        # Note: what is scored is what is on disk, and it is the last step: none is chosen on dev.
        model = load_model(out)
        dev_features = Features(dev, tokenizer, config, training=False)
        scores = evaluate(model, dev_features, config, out)
        write_results(config, training, dev, command=command, **scores, seconds=seconds)
        print(f"{out}: EM {scores['exact_match']:.2f}, F1 {scores['f1']:.2f}, {len(dev.questions)} "
              f"questions of {data_name(config, dev)}")


def data_name(config: Config, squad: Squad) -> str:
    return "the built-in made-up corpus (NOT SQuAD)" if squad.builtin else config.data


def ask(folder: str, passage_file: str, questions: list[str], config: Config) -> None:
    """Print the model's answer to each question about a passage, with the settings of its run."""
    trained = read_run(Path(folder))
    if trained is not None:
        config = dataclasses.replace(trained, device=config.device)
    config = fill_in(config)
    with reading(passage_file):
        passage = Path(passage_file).read_text(encoding="utf-8")
    asked = [Question(str(i), question, 0, []) for i, question in enumerate(questions)]
    features = Features(Squad([passage], asked), load_tokenizer(folder), config, training=False)
    if features.cut > 0:
        print(f"{features.cut} questions are cut after {config.max_question} word pieces",
              file=sys.stderr)
    for text, span_score in predict(load_model(folder), features, config).values():
        print(f"{text or 'no answer'}  (score {span_score:.1f})")


def score_file(predictions_file: str, dev_file: str) -> None:
    """Print EM and F1 of a file of predictions, as the official scorers do."""
    # The file may be named with or without its .xz.
    dev_path = Path(dev_file.removesuffix(".xz"))
    truths = read_squad(dev_path.parent, dev_path.name).truths()
    predictions = read_json(predictions_file)
    missing = len(truths.keys() - predictions.keys())
    if missing > 0:
        print(f"{missing} of {len(truths)} questions have no prediction", file=sys.stderr)
    with reading(predictions_file):
        print(json.dumps(score(predictions, truths)))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    # One flag for each setting.
    for field in dataclasses.fields(Config):
        flag = "--" + field.name.replace("_", "-")
        help_text = field.metadata["help"]
        if field.type is bool:
            parser.add_argument(flag, action="store_true", help=help_text)
            continue
        if field.default not in (None, ""):
            help_text += f" ({field.default})"
        kind = (typing.get_args(field.type) or [field.type])[0]     # of `int | None`, int
        parser.add_argument(flag, type=kind, default=field.default, help=help_text,
                            choices=field.metadata["choices"])
    parser.add_argument("--score", nargs=2, metavar=("PREDICTIONS", "DEV"),
                        help="print EM and F1 of a file")
    parser.add_argument("--ask", nargs="+", metavar=("FOLDER", "PASSAGE_FILE QUESTION"),
                        help="answer questions about a passage")
    if argv is None:
        argv = sys.argv[1:]
    settings = vars(parser.parse_args(argv))
    files = settings.pop("score")
    asked = settings.pop("ask")
    config = Config(**settings)
    if files:
        return exit_status(score_file, *files)
    if asked:
        if len(asked) < 3:
            parser.error("--ask takes a model folder, a file with the passage, and questions")
        return exit_status(ask, asked[0], asked[1], asked[2:], config)
    return exit_status(run, config, shlex.join(["python", "train_squad.py", *argv]))


def exit_status(work, *arguments) -> int:
    """Call work(*arguments). Returns 0; 2 after an error of the user's, 130 if interrupted."""
    # A terminal that cannot show τ shows a ? instead.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        work(*arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it can", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
