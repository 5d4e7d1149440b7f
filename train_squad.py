"""Fine-tune, fine-prune and refill a BERT on SQuAD: data, metrics, masks, loss, loop.

    python train_squad.py --data D --init WEIGHTS --out R/teacher                        dense fine-tuning
    python train_squad.py --data D --init R/teacher --teacher R/teacher --method hybrid --out R/hybrid
    python compact.py R/hybrid --data D --out R/hybrid-compact
    python train_squad.py --data D --init R/hybrid-compact --teacher R/teacher --fill --out R/filled
    python train_squad.py --score PREDICTIONS.json DEV.json                              the official EM and F1
    python train_squad.py --ask R/filled                                                 try it on a text of yours
    torchrun --nproc_per_node=2 train_squad.py …                                         a training, in two processes

After Lagunas et al. 2021 and its code, huggingface/nn_pruning at 0cef2b2, cited as [R:file].
With five minutes, read add_masks(), loss_terms() and train().

    B batch   T tokens   S scores   τ threshold   λ weight of the penalty
Comments: `# Paper:` is the authors' method, `# Note:` our remark, `# Differs:` a deviation.
"""
import argparse
import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import inspect
import json
import lzma
import math
import os
import platform
import random
import re
import shlex
import signal
import string
import subprocess
import sys
import time
import typing
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.distributed as dist
import torch.nn.functional as F

import blockprune
from bert import (BertForQuestionAnswering, load_model, load_tokenizer, read_json, read_safetensors, replacing, save_model,
                  weights_sha256, write_json, write_safetensors)

# ---------------------------------------------------------------------------------------- settings

@dataclasses.dataclass
class Config:
    """Every setting: each field is a flag, its comment the help. None: set by the preset or the machine."""
    data: str = "data/squad"            # folder with train-v1.1.json and dev-v1.1.json, plain or .xz; or builtin
    init: str = "weights/minilm"        # model folder to start from
    out: str = "runs/dense"             # run folder to write
    teacher: str = ""                   # fine-tuned model folder to distil from; none if empty
    method: str = "dense"               # {dense,hybrid,block,struct,unstructured}: what is pruned; add_masks()
    block: str = "32x32"                # r x c of query, key, value, transposed for out; with block also of fc1, fc2
    fill: bool = False                  # refill a compacted model: noise for zeros, then fine-tuning
    v2: bool = False                    # SQuAD 2.0, train-v2.0.json and dev-v2.0.json: a question may have no answer
    null_threshold: float = 0           # v2: no answer where [CLS] beats the best span by more  [R:qa_xp.py]
    preset: str | None = None           # {builtin,small,paper}: gives the values of the fields left None
    questions: int | None = None        # first n of a seeded shuffle of the training questions; None: all
    dev_questions: int | None = None    # the same of the dev questions; None: all
    max_length: int = 384               # word pieces in a window  [R:command_line.py]
    stride: int = 128                   # word pieces that neighbouring windows share  [R:command_line.py]
    max_question: int = 64              # word pieces. Differs: longer questions are cut
    max_answer: int = 30                # word pieces  [R:qa_xp.py]
    seed: int = 17                      # of everything random  [R:command_line.py]
    epochs: float | None = None         # paper: 20 of pruning, 4 of filling
    batch: int = 16                     # windows a step; paper: 16
    lr: float | None = None             # of the weights, at its peak; paper: 3e-5
    score_lr: float | None = None       # of the scores; its sum over a run bounds their fall; paper: 1e-2
    warmup_steps: int | None = None     # None: 5 % of the run, 10 in a fill; paper: 5,400 of 110,660, 10
    initial_warmup: float = 1           # τ stays 0 for so many warm-ups  [R:command_line.py]
    final_warmup: float = 10            # and stays final for so many at the end  [R:command_line.py]
    threshold: float = 0.1              # final τ: a block is pruned at σ(S) ≤ τ  [R:command_line.py]
    final_lambda: float | None = None   # λ at the final τ: the higher, the less is kept; paper, hybrid: 2.5 to 40
    attention_lambda: float | None = None   # times λ, for attention; 1, or 0.05 for struct, whose scores are few
    ffn_lambda: float | None = None   # times λ, for the FFN; 1; paper: 0.25 for the headline model
    alpha_ce: float = 0.1               # weight of the cross entropy, if there is a teacher  [R:command_line.py]
    alpha_kd: float = 0.9               # weight of the distillation  [R:command_line.py]
    temperature: float = 2              # T of the distillation  [R:patch_coordinator.py]
    attention_dropout: float | None = None     # paper: 0.1. Differs: 0, for speed on a CPU
    weight_decay: float = 0             # of matrices; paper: 0
    clip: float = 1                     # norm of all gradients together, those of scores too
    precision: str | None = None        # {bf16,fp32}; None: bf16 where the machine multiplies in it
    device: str | None = None           # {cpu,cuda}; None: cuda where there is one
    log_every: int = 20                 # steps
    checkpoint_every: int = 300         # seconds


# λ does not carry over between lengths or models: a score feels λ / (kinds · tensors · scores), and how far
# it goes is a matter of Σ score_lr. Short runs on a small model need both higher than the paper's.
PRESETS = {
    "builtin": dict(dense=dict(epochs=3, lr=1e-4), fill=dict(epochs=1, lr=2e-4),
                    prune=dict(epochs=2, lr=2e-4, score_lr=0.15, final_lambda=20)),
    "small": dict(dense=dict(epochs=3, lr=1e-4), fill=dict(epochs=2, lr=1e-4),
                  prune=dict(epochs=3, lr=1e-4, score_lr=0.05, final_lambda=80)),
    "paper": dict(dense=dict(epochs=2, lr=3e-5), fill=dict(epochs=4, lr=3e-5),
                  prune=dict(epochs=20, lr=3e-5, score_lr=0.01, final_lambda=20, ffn_lambda=0.25, warmup_steps=5400)),
}
MAY_BE_ZERO = ("stride", "seed", "warmup_steps", "initial_warmup", "final_warmup", "final_lambda", "attention_lambda",
               "ffn_lambda", "alpha_ce", "alpha_kd", "attention_dropout", "weight_decay", "checkpoint_every")
NOT_SETTINGS = ("out", "log_every", "checkpoint_every")     # may change when a run goes on


def settle(config: Config) -> Config:
    """A copy with every None filled in; ValueError for what cannot be."""
    c = dataclasses.replace(config)
    if c.data == "builtin":
        c.data = "data/builtin"
        write_builtin(c.data)
    if c.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is none here")
    c.device = c.device or ("cuda" if torch.cuda.is_available() else "cpu")
    units = torch.cpu.get_capabilities()    # Differs: the reference is fp32. Note: fp32 beats emulated bf16
    bf16 = (torch.cuda.is_bf16_supported(including_emulation=False) if c.device == "cuda" else
            units.get("amx_bf16") or units.get("avx512_bf16"))
    c.precision = c.precision or ("bf16" if bf16 else "fp32")
    c.preset = c.preset or ("builtin" if Path(c.data).name == "builtin" else "small")
    stage = "fill" if c.fill else "dense" if c.method == "dense" else "prune"
    usual = dict(attention_lambda=0.05 if c.method == "struct" else 1.0, ffn_lambda=1.0,
                 attention_dropout=0.1 if c.preset == "paper" else 0.0)
    for name, value in (usual | PRESETS[c.preset][stage]).items():
        if getattr(c, name) is None:
            setattr(c, name, value)
    for name, value in vars(c).items():
        if type(value) in (int, float) and name != "null_threshold" and not (
                0 <= value < math.inf and (value or name in MAY_BE_ZERO)):
            least = "0 or more" if name in MAY_BE_ZERO else "over 0"
            raise ValueError(f"--{name.replace('_', '-')} {value}: it must be {least}")
    for wrong, message in (
            (c.fill and c.method != "dense", "--fill trains without masks: leave --method out"),
            (not re.fullmatch(r"[1-9]\d*x[1-9]\d*", c.block), f"--block {c.block}: as in 32x32, two numbers over 0"),
            (not math.isfinite(c.null_threshold), f"--null-threshold {c.null_threshold}: a number is expected"),
            (c.attention_dropout >= 1, f"--attention-dropout {c.attention_dropout}: it must be under 1"),
            (c.threshold >= 0.5, f"--threshold {c.threshold}: it must be under 0.5, where scores start"),
            (c.max_length - 3 - c.max_question <= c.stride, f"--max-length {c.max_length}: too short for --stride "
             f"{c.stride} beside a question of --max-question {c.max_question}")):
        if wrong:
            raise ValueError(message)
    return c


# ---------------------------------------------------------------- metrics, as in the official scorer

def normalize_answer(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def token_f1(prediction: str, truth: str, v2: bool = False) -> float:
    """Harmonic mean of precision and recall over the words that both have; in v2, no words equal no words."""
    a, b = normalize_answer(prediction).split(), normalize_answer(truth).split()
    if v2 and not (a and b):
        return float(a == b)
    return 2 * (collections.Counter(a) & collections.Counter(b)).total() / max(1, len(a) + len(b))


def question_scores(predictions: dict[str, str], truths: dict[str, list[str]]) -> dict[str, tuple[float, float]]:
    """Exact match and F1, from 0 to 1, by question id: the best over the question's answers.

    predictions: text by question id. truths: its answers; where one has none, the rules of evaluate-v2.0.py hold,
    else those of evaluate-v1.1.py. They differ in token_f1(), and for a question without a prediction: v1.1 counts 0,
    v2.0 leaves it out.
    """
    v2, scores = not all(truths.values()), {}
    for i, answers in truths.items():
        if v2:
            answers = [answer for answer in answers if normalize_answer(answer)] or [""]
        if i in predictions:
            exact = any(normalize_answer(predictions[i]) == normalize_answer(answer) for answer in answers)
            scores[i] = float(exact), max(token_f1(predictions[i], answer, v2) for answer in answers)
        elif not v2:
            scores[i] = 0.0, 0.0
    return scores


def score(predictions: dict[str, str], truths: dict[str, list[str]]) -> dict[str, float]:
    """Exact match and F1 in percent, the means of question_scores(); in v2 also of those with and without an answer."""
    scores = question_scores(predictions, truths)
    groups = {"": list(scores)}
    if not all(truths.values()):
        groups |= {"HasAns_": [i for i in scores if truths[i]], "NoAns_": [i for i in scores if not truths[i]]}
    return {name + metric: 100 * sum(scores[i][k] for i in group) / max(1, len(group))
            for name, group in groups.items() for k, metric in enumerate(("exact_match", "f1"))}


# ------------------------------------------------------------------------------------ SQuAD on disk

@dataclasses.dataclass
class Squad:
    passages: list[str]
    questions: list[tuple]      # (id, question, the passage's number, [(answer, its first character), …])
    sha256: str                 # of the file, unpacked

    def truths(self) -> dict[str, list[str]]:
        return {i: [text for text, _ in answers] for i, _, _, answers in self.questions}


def file_name(part: str, v2: bool) -> str:
    return f"{part}-v2.0.json" if v2 else f"{part}-v1.1.json"


def read_squad(folder: str | Path, name: str, limit: int | None = None, seed: int = Config.seed) -> Squad:
    """SQuAD's JSON from folder/name or folder/name.xz; with a limit, the first of a seeded shuffle.

    FileNotFoundError if it is not there; ValueError with the place where a key is missing or not of its type.
    """
    path = Path(folder, name)
    try:
        raw = path.read_bytes() if path.is_file() else lzma.decompress(Path(f"{path}.xz").read_bytes())
        tree = json.loads(raw)
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder}: neither {name} nor {name}.xz is there") from None
    except (ValueError, lzma.LZMAError, EOFError, RecursionError) as error:
        raise ValueError(f"{path}: cut off, or not JSON: {error}") from None
    squad = Squad([], [], hashlib.sha256(raw).hexdigest())

    def get(node, key, kind, where):
        if not isinstance(node, dict) or type(node.get(key)) is not kind:
            raise ValueError(f"{path}: not SQuAD: {where} has no {key!r} that is a {kind.__name__}")
        _ = kind is str and node[key].encode()  # ValueError: half a surrogate pair
        return node[key]

    for a, article in enumerate(get(tree, "data", list, "the file")):
        for p, paragraph in enumerate(get(article, "paragraphs", list, f"data[{a}]")):
            where = f"data[{a}].paragraphs[{p}]"
            for q, qa in enumerate(get(paragraph, "qas", list, where)):
                at = f"{where}.qas[{q}]"
                answers = [(get(x, "text", str, f"{at}.answers"), get(x, "answer_start", int, f"{at}.answers"))
                           for x in get(qa, "answers", list, at)]
                name, text = get(qa, "id", str, at), get(qa, "question", str, at)
                squad.questions.append((name, text, len(squad.passages), answers))
                if not (answers or qa.get("is_impossible") is True):
                    raise ValueError(f"{path}: {at} has no answer, and is not said to be impossible")
            squad.passages.append(get(paragraph, "context", str, where))
    if not squad.questions:
        raise ValueError(f"{path}: no question in it")
    if limit is not None:
        random.Random(seed).shuffle(squad.questions)
        del squad.questions[limit:]
    return squad


NAMES = ("Anna Ben Carl Dora Emma Frank Grace Henry Ida Jack Karen Leo Mary Nora Oscar Paul Rose Sam Tina Victor",
         "Adams Baker Carter Davis Evans Fisher Grant Hill Jones King Lewis Moore Parker Reed Scott Stone Turner Wood")
FACTS = {   # a fact → the question for it, its values
    "works as a {}": ("What does {} work as?", "teacher nurse farmer painter lawyer singer driver dentist writer"),
    "was born in {}": ("Where was {} born?", "London Paris Rome Berlin Vienna Madrid Dublin Boston Cairo Tokyo"),
    "owns a {}": ("Which animal does {} own?", "cat dog horse goat rabbit parrot snake duck pig turtle"),
    "plays the {}": ("Which instrument does {} play?", "piano violin guitar flute drums harp cello trumpet organ"),
}


def builtin_corpus(passages: int, seed: int, relations: int = 2) -> dict:
    """Made-up townspeople in SQuAD's form: a question needs both the name and the relation to be answered.

    relations: kinds of fact told of both people of a passage, 2 to 4; the more, the longer it takes to learn.
    Not SQuAD, and far easier: it is there so that the whole pipeline runs with no data at hand.
    """
    rng, paragraphs = random.Random(seed), []
    for p in range(passages):
        people = [" ".join(pair) for pair in zip(*(rng.sample(names.split(), 2) for names in NAMES))]
        said = [(fact, rng.sample(FACTS[fact][1].split(), 2)) for fact in rng.sample(list(FACTS), relations)]
        context, qas = "", []
        for i, person in enumerate(people):
            for fact, values in rng.sample(said, relations):
                start = len(f"{context}{person} ") + fact.index("{")
                qas.append({"id": f"builtin-{seed}-{p}-{len(qas)}", "question": FACTS[fact][0].format(person),
                            "answers": [{"text": values[i], "answer_start": start}]})
                context += f"{person} {fact.format(values[i])}. "
        # Note: which half is asked is drawn as well, so that the place of a statement tells nothing.
        paragraphs.append({"context": context.strip(), "qas": rng.sample(qas, relations)})
    return {"version": "builtin", "data": [{"title": "Townspeople", "paragraphs": paragraphs}]}


def write_builtin(folder: str | Path) -> None:
    """The built-in corpus, 2,100 questions to train on and 450 to be scored on."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for part, passages, seed in (("train", 1050, 1), ("dev", 225, 2)):
        write_json(Path(folder, f"{part}-v1.1.json"), builtin_corpus(passages, seed))


# --------------------------------------------------------------------------------------- features

def word_pieces(tokenizer, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each text: ids (n,), and the characters [begin, end) that each stands for (n, 2)."""
    return [(np.array(e.ids, np.int32), np.array(e.offsets, np.int32).reshape(-1, 2))
            for i in range(0, len(texts), 1000)     # encode_batch works on all cores
            for e in tokenizer.encode_batch(texts[i:i + 1000], add_special_tokens=False)]


class Features:
    """Windows [CLS] question [SEP] part of the passage [SEP], at most max_length word pieces each.

    A passage that does not fit is seen through windows that share `stride` word pieces, as in Hugging Face's
    run_qa.py. rows is (N, 6): question, its word pieces, first word piece of the passage in the window, how
    many, and the answer's first and last position: 0 and 0, [CLS], where none is wholly inside.
    skipped: training questions without a usable answer, left out; cut: questions that were too long.
    """

    def __init__(self, squad: Squad, tokenizer, config: Config, training: bool):
        self.squad, self.skipped, self.cut, rows = squad, 0, 0, []
        self.cls, self.sep, self.pad = (tokenizer.token_to_id(t) for t in ("[CLS]", "[SEP]", "[PAD]"))
        self.questions = word_pieces(tokenizer, [question for _, question, _, _ in squad.questions])
        used = {p for _, _, p, _ in squad.questions}
        self.passages = word_pieces(tokenizer, [x if p in used else "" for p, x in enumerate(squad.passages)])
        for q, (_, _, p, answers) in enumerate(squad.questions):
            chars, asked = self.passages[p][1], len(self.questions[q][0])
            span = answer_span(squad.passages[p], chars, *answers[0]) if training and answers else (-1, -1)
            self.skipped, self.cut = self.skipped + (span is None), self.cut + (asked > config.max_question)
            asked = min(asked, config.max_question)
            room = config.max_length - 3 - asked
            for first in range(0, max(1, len(chars) - config.stride), room - config.stride) if span else ():
                count, shift = min(room, len(chars) - first), asked + 2 - first
                inside = first <= span[0] and span[1] < first + count
                rows.append((q, asked, first, count, *((span[0] + shift, span[1] + shift) if inside else (0, 0))))
        if not rows:
            raise ValueError("no question has an answer at its offset")
        self.rows = np.array(rows, np.int32)
        self.lengths = self.rows[:, 1] + self.rows[:, 3] + 3

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: np.ndarray, device: str = "cpu") -> dict[str, torch.Tensor]:
        """Windows, padded to the longest: ids, types, real, context, each (B, T); start, end, each (B)."""
        B, T = len(indices), self.lengths[indices].max()
        ids, types = np.full((B, T), self.pad, np.int64), np.zeros((B, T), np.int64)
        real, context = np.zeros((B, T), bool), np.zeros((B, T), bool)
        for b, (q, asked, first, count, _, _) in enumerate(self.rows[indices]):
            head, n = asked + 2, asked + count + 3
            ids[b, [0, head - 1, n - 1]] = self.cls, self.sep, self.sep
            ids[b, 1:head - 1] = self.questions[q][0][:asked]
            ids[b, head:n - 1] = self.passages[self.squad.questions[q][2]][0][first:first + count]
            types[b, head:n], real[b, :n], context[b, head:n - 1] = 1, True, True
        start, end = self.rows[indices, 4:].T.astype(np.int64)
        arrays = dict(ids=ids, types=types, real=real, context=context, start=start, end=end)
        return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}

    def text(self, row: int, start: int, end: int) -> str:
        """The characters of the passage from position start to position end of a window."""
        q, asked, first = self.rows[row, :3]
        p, shift = self.squad.questions[q][2], first - asked - 2
        chars = self.passages[p][1]
        return self.squad.passages[p][chars[start + shift, 0]:chars[end + shift, 1]]


def answer_span(passage: str, chars: np.ndarray, text: str, start: int) -> tuple[int, int] | None:
    """The first and last word piece that touch the answer; None if the answer is not at its offset."""
    first = int(np.searchsorted(chars[:, 1], start, side="right"))
    last = int(np.searchsorted(chars[:, 0], start + len(text), side="left")) - 1
    return (first, last) if start >= 0 and passage[start:start + len(text)] == text and first <= last else None


def training_batches(lengths: np.ndarray, size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """All windows in random batches of like lengths: sorted within random pools of 50 batches.

    # Differs: the reference pads every window to 384, whatever is beside it.
    """
    rng, pool = np.random.default_rng((seed, epoch)), 50 * size
    order = rng.permutation(len(lengths))
    order = np.concatenate([part[np.argsort(lengths[part], kind="stable")]
                            for part in np.split(order, range(pool, len(order), pool))])
    batches = np.split(order, range(size, len(order), size))
    return [batches[i] for i in rng.permutation(len(batches))]


def evaluation_batches(lengths: np.ndarray, device: str) -> list[np.ndarray]:
    """All windows in order of length, in batches of at most so many tokens, padding counted, as suit the device."""
    tokens = 65536 if device == "cuda" else 2048    # Note: what a layer makes of 2,048 stays in a CPU's cache
    order, cuts = np.argsort(lengths, kind="stable"), [0]
    for i in range(1, len(order)):
        if (i + 1 - cuts[-1]) * lengths[order[i]] > tokens:
            cuts.append(i)
    return np.split(order, cuts[1:])


# -------------------------------------------------------------------------------------- prediction

def best_spans(start: torch.Tensor, end: torch.Tensor, context: torch.Tensor, longest: int):
    """The best answer in each window: argmax of start[i] + end[j], i ≤ j < i + longest, both in the passage.

    start, end, context: (B, T). Returns score, i, j, each (B); the score is −inf for an empty passage.
    # Differs: over all pairs; the reference looks at pairs of the 20 best starts and 20 best ends.
    """
    B, T = start.shape
    start, end = (x.float().masked_fill(~context, -math.inf) for x in (start, end))
    best, i = start.new_full((B,), -math.inf), torch.zeros(B, dtype=torch.long, device=start.device)
    j = i
    for d in range(min(longest, T)):    # one diagonal of the T x T table of pairs at a time
        value, at = (start[:, :T - d] + end[:, d:]).max(dim=1)
        better = value > best
        best, i, j = (torch.where(better, *pair) for pair in ((value, best), (at, i), (at + d, j)))
    return best, i, j


def autocast(config: Config):
    """Products in bf16, if config says so. Around a whole loop without gradients: weights are then cast once."""
    return torch.autocast(config.device, torch.bfloat16, enabled=config.precision == "bf16")


@torch.no_grad()
def predict(model: BertForQuestionAnswering, features: Features, config: Config) -> dict[str, tuple[str, float]]:
    """The best span of each question over all its windows, by question id: its text, and the sum of its logits.

    v2: the text is "", no answer, where the least score of [CLS] over the windows is more than null_threshold over
    the best span's.
    """
    model.eval().to(config.device)
    best = {question[0]: (-math.inf, "") for question in features.squad.questions}
    null = dict.fromkeys(best, math.inf)
    with autocast(config):
        for indices in evaluation_batches(features.lengths, config.device):
            batch = features.batch(indices, config.device)
            start, end = (x.float() for x in model(batch["ids"], batch["types"], batch["real"]))
            spans, nothing = best_spans(start, end, batch["context"], config.max_answer), start[:, 0] + end[:, 0]
            for row, value, i, j, none in zip(indices, *(x.tolist() for x in (*spans, nothing))):
                question = features.squad.questions[features.rows[row, 0]][0]
                null[question] = min(null[question], none)
                if value > best[question][0]:
                    best[question] = value, features.text(row, i, j)
    return {question: ("" if config.v2 and null[question] - value > config.null_threshold else text, value)
            for question, (value, text) in best.items()}


def evaluate(model: BertForQuestionAnswering, features: Features, config: Config, out: str | Path) -> dict[str, float]:
    """EM and F1 on a dev set; the answers go to predictions.json, and each question's F1 to f1.json."""
    truths = features.squad.truths()
    predictions = {question: text for question, (text, _) in predict(model, features, config).items()}
    write_json(Path(out, "predictions.json"), predictions)
    write_json(Path(out, "f1.json"), {i: round(f1, 4) for i, (_, f1) in question_scores(predictions, truths).items()})
    return score(predictions, truths)


# ----------------------------------------------------------------------------- the paper's methods

def add_masks(model: BertForQuestionAnswering, method: str, block: str) -> None:
    """Put the masks of one of the paper's methods on a BERT; embeddings, norms and QA head have none.

    hybrid        blocks in attention, inner dimensions of the FFN (Paper: Hybrid)
    block         blocks in both (Paper: Block)
    struct        whole heads and inner dimensions (Paper: heads and dims)
    unstructured  single weights (Sanh et al. 2020: soft movement pruning)
    """
    r, c = (1, 1) if method == "unstructured" else map(int, block.split("x"))
    E, D = model.config.hidden_size, model.config.head_size
    for layer in model.bert.layers:
        a, ffn, heads = layer.attention, layer.ffn, None
        if method == "struct":
            # Differs: one score a head, shared by its four matrices. The reference scores each matrix apart
            # and removes a head when Q, K or V is empty, which changes the function.
            r, c, heads = D, E, torch.nn.Parameter(torch.zeros(a.heads))
        for linear in (a.query, a.key, a.value):
            blockprune.mask_weight(linear, (r, c), scores=heads, kind="attention")
        blockprune.mask_weight(a.out, (c, r), scores=heads, kind="attention")   # Paper: transposed, along heads
        if method in ("hybrid", "struct"):
            blockprune.mask_dimensions(ffn.fc1, ffn.fc2)
        elif method not in ("block", "unstructured"):
            raise ValueError(f"no method {method!r}")
        else:
            blockprune.mask_weight(ffn.fc1, (r, c))
            blockprune.mask_weight(ffn.fc2, (r, c))


def refill(model: BertForQuestionAnswering) -> None:
    """Paper: Hybrid Filled. Exact zeros get small noise, since a point of zeros has poor gradients.

    N(0, 1) · 0.01 · std(W) + mean(W) over the whole tensor; biases are left [R:sparse_xp.py unzero_parameters].
    # Differs: where W is all zeros, std(W) is that of a fresh weight. Q and K both at 0 would never learn.
    """
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.endswith("bias") and p.numel() > 1:
                std = p.std() if p.any() else model.config.initializer_range
                p.copy_(torch.where(p == 0, torch.randn_like(p) * 0.01 * std + p.mean(), p))


def save_pruning(model: BertForQuestionAnswering, folder: str | Path, vocab: str | Path, **pruning) -> None:
    """The model with its masks folded in and, in pruning.safetensors, W, b and each distinct score once.

    pruning: method, block and threshold, as load_pruning() needs them.
    """
    names = dict(model.named_parameters())
    owner = {id(p): name for name, p in names.items()}
    shared = {n: owner[id(p)] for n, p in model.named_parameters(remove_duplicate=False) if n not in names}
    save_model(model, folder, vocab, pruning={**pruning, "shared": shared})     # shared: for other readers
    write_safetensors({n: p for n, p in names.items() if "parametrizations" in n}, Path(folder, "pruning.safetensors"))


def load_pruning(folder: str | Path) -> BertForQuestionAnswering:
    """The model of a run folder, with its masks on if it was fine-pruned."""
    model, pruning = load_model(folder), read_json(Path(folder, "config.json")).get("pruning")
    if pruning:
        add_masks(model, pruning["method"], pruning["block"])
        blockprune.set_threshold(model, pruning["threshold"])
        saved = read_safetensors(Path(folder, "pruning.safetensors"))
        wanted = {name: p for name, p in model.named_parameters() if "parametrizations" in name}
        if {n: p.shape for n, p in wanted.items()} != {n: p.shape for n, p in saved.items()}:
            raise ValueError(f"{folder}: pruning.safetensors does not fit the model of config.json")
        for name, p in wanted.items():
            p.data.copy_(saved[name])
    return model


# ------------------------------------------------------------------------------- teacher and loss

@torch.no_grad()
def teach(teacher: BertForQuestionAnswering, features: Features, config: Config) -> torch.Tensor:
    """The teacher's start and end logits, (windows, 2, T): asked once, not once an epoch. 0.3 GB for all of SQuAD."""
    logits = torch.zeros(len(features), 2, features.lengths.max(), device=config.device)
    with autocast(config):
        for indices in evaluation_batches(features.lengths, config.device):
            batch = features.batch(indices, config.device)
            pair = teacher(batch["ids"], batch["types"], batch["real"])
            logits[indices, :, :pair[0].shape[1]] = torch.stack(pair, 1).float()
    return logits


PADDING = torch.finfo(torch.float32).min    # a logit that is −∞ to a softmax, without its NaNs


def loss_terms(student, teacher, batch: dict, T: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy, and distillation T² · KL(softmax(teacher / T) ‖ softmax(student / T)).

    Each is a mean over the batch and over start and end; the KL is a sum over positions. student, teacher:
    (start, end) logits, each (B, T); without a teacher (None) the distillation is 0.
    # Differs: over real tokens, so that the loss of a row does not depend on its batch-mates. In the
    # reference padding takes part in both softmaxes.
    """
    def log_p(logits, T=1.0):
        return (logits.float() / T).masked_fill(~batch["real"], PADDING).log_softmax(-1)

    ce = sum(F.nll_loss(log_p(s), batch[name]) for s, name in zip(student, ("start", "end"))) / 2
    kd = sum(F.kl_div(log_p(s, T), log_p(t, T), reduction="batchmean", log_target=True)
             for s, t in zip(student, teacher or ())) * T ** 2 / 2
    return ce, torch.as_tensor(kd)


# ---------------------------------------------------------------------------------------- training

def processes(device: str) -> tuple[int, int]:
    """This process's number and how many there are. torchrun's are joined; each trains on its part of every batch."""
    if "WORLD_SIZE" not in os.environ:
        return 0, 1
    if not dist.is_initialized():
        if device == "cuda":
            if (number := int(os.environ["LOCAL_RANK"])) >= torch.cuda.device_count():
                raise ValueError(f"{os.environ['LOCAL_WORLD_SIZE']} processes for {torch.cuda.device_count()} GPUs")
            torch.cuda.set_device(number)
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size()


def mean_of_all(*numbers: float) -> list[float]:
    """The mean of each number over the processes."""
    if not dist.is_initialized():
        return list(numbers)
    sums = torch.tensor(numbers, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(sums)
    return (sums / dist.get_world_size()).tolist()


def rate(step: int, total: int, warmup: int) -> float:
    """The factor of all learning rates: up in a line over the warm-up, then down in a line to 0.

    # Differs: the first step has 1/warmup, in the reference 0.
    """
    return (step + 1) / warmup if step < warmup else (total - step) / (total - warmup)


def threshold_at(step: int, config: Config, total: int, warmup: int) -> float:
    """τ of a step. Paper: its flat parts are multiples of the learning rates' warm-up."""
    return blockprune.threshold_schedule(step, total, config.initial_warmup * warmup, config.final_warmup * warmup,
                                         config.threshold)


def lambda_at(step: int, config: Config, total: int, warmup: int) -> float:
    """λ of a step: λ · τ / τ_final. Paper: it follows τ, so nothing is pushed down while nothing can be pruned."""
    return config.final_lambda * threshold_at(step, config, total, warmup) / config.threshold


def plan(config: Config, windows: int) -> tuple[int, int]:
    """The steps of a run and of its warm-up; ValueError for a fine-pruning in which nothing could be pruned."""
    total = max(2, round(config.epochs * math.ceil(windows / config.batch)))
    usual = 10 if config.fill else round(0.05 * total)
    warmup = min(total - 1, usual if config.warmup_steps is None else config.warmup_steps)
    if config.method != "dense":
        threshold_at(0, config, total, warmup)      # refuses a schedule without a rise
        # Note: Adam moves a score by about its learning rate a step, so their sum bounds how far it can fall.
        reach = config.score_lr * sum(rate(step, total, warmup) for step in range(total))
        goes = math.log(config.threshold / (1 - config.threshold))
        if reach < 0.8 - goes:
            raise ValueError(f"nothing could be pruned: in {total} steps scores fall to about -{reach:.2f}, and a "
                             f"block goes at {goes:.2f}; reach {goes - 0.8:.2f} by more --epochs or --score-lr")
    return total, warmup


def parts(lengths: np.ndarray, config: Config, step: int, rank: int, world: int):
    """From a step on, for ever: this process's windows of each batch, and its share of them, in the mean 1."""
    per_epoch = math.ceil(len(lengths) / config.batch)
    while True:
        for batch in training_batches(lengths, config.batch, config.seed, step // per_epoch)[step % per_epoch:]:
            part = batch[rank::world]
            yield part if len(part) else batch[:1], world * len(part) / len(batch)
            step += 1


@contextlib.contextmanager
def signals():
    """The list of the signals SIGINT and SIGTERM that came so far; nothing else happens when one comes."""
    came: list[int] = []
    handlers = {s: signal.signal(s, lambda number, _: came.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)


def train(model: BertForQuestionAnswering, teacher, features: Features, config: Config) -> float:
    """Ordinary fine-tuning; what stands under each `if pruning:` is what pruning adds. Returns its seconds."""
    out, pruning, (rank, world) = Path(config.out), config.method != "dense", processes(config.device)
    total, warmup = plan(config, len(features))
    for layer in model.bert.layers:
        layer.attention.dropout = config.attention_dropout
    model.to(config.device)
    optimizer = torch.optim.AdamW(
        blockprune.parameter_groups(model, config.lr, config.score_lr, config.weight_decay), fused=True)
    first, spent = restore(out / "checkpoint.pt", model, optimizer, rank)
    began = time.monotonic()
    taught = teach(teacher, features, config) if teacher and first < total else None
    ready = saved = time.monotonic()
    forward = model
    if world > 1:   # gradients become means over the processes
        forward = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=True)
        torch.manual_seed(config.seed + 1000 * first + rank)    # dropout of its own
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, total, warmup), first - 1)
    with signals() as came:
        for step, (indices, share) in zip(range(first, total), parts(features.lengths, config, first, rank, world)):
            batch = features.batch(indices, config.device)
            target = taught[indices, :, :batch["ids"].shape[1]].unbind(1) if teacher else None
            penalty, tau, lam = torch.zeros(()), 0.0, 0.0
            if pruning:
                tau = threshold_at(step, config, total, warmup)
                blockprune.set_threshold(model, tau)
            with autocast(config):
                student = forward.train()(batch["ids"], batch["types"], batch["real"])
            ce, kd = (share * term for term in loss_terms(student, target, batch, config.temperature))
            loss = config.alpha_ce * ce + config.alpha_kd * kd if teacher else ce  # Paper: alone, ce counts whole
            if pruning:
                penalty = blockprune.penalty(model, dict(attention=config.attention_lambda, ffn=config.ffn_lambda))
                lam = lambda_at(step, config, total, warmup)
                loss = loss + lam * penalty
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            if not math.isfinite(loss.item() + norm.item()):
                raise ValueError(f"{out}: stopped at step {step}: loss {loss.item():.3g}, gradient norm {norm:.3g}. A "
                                 "checkpoint, if any, is of an earlier step. Try a lower --lr, or --precision fp32")
            optimizer.step()
            schedule.step()
            done, now = step + 1, time.monotonic()
            if done % config.log_every == 0 or done == total:
                losses = dict(zip(("loss", "ce", "kd"), mean_of_all(loss.item(), ce.item(), kd.item())))
                line = {"step": done, **losses, "penalty": penalty.item(), "threshold": tau, "lambda": lam,
                        "density": blockprune.density(model), "lr": config.lr * rate(step, total, warmup),
                        "examples_per_second": (done - first) * config.batch / (now - ready)}
                if rank == 0:
                    report(out, total, config.batch, line)
            stopped, = mean_of_all(len(came))   # by a signal to any of the processes
            if rank == 0 and (stopped or done == total or now - saved > config.checkpoint_every):
                save_checkpoint(out / "checkpoint.pt", model, optimizer, done, spent + now - began)
                saved = now
            if stopped:
                mean_of_all(0)      # the others wait until it is saved
                raise KeyboardInterrupt(f"{out}: stopped at step {done} of {total}, saved; the same command goes on")
    if pruning:
        blockprune.set_threshold(model, config.threshold)   # Paper: evaluation is at the final τ
    return spent + time.monotonic() - began


def report(out: Path, total: int, batch: int, line: dict) -> None:
    """A line of log.jsonl, and its like for the terminal."""
    with open(out / "log.jsonl", "a") as log:
        print(json.dumps(line), file=log)
    pruning = f"  τ {line['threshold']:.3f}  density {line['density']['all']:.3f}" if line["density"] else ""
    left = (total - line["step"]) * batch / line["examples_per_second"] / 60
    print(f"{out.name} {line['step']}/{total}  loss {line['loss']:.3f}  ce {line['ce']:.3f}{pruning}  "
          f"{line['examples_per_second']:.1f} examples/s, {left:.1f} min left", flush=True)


def save_checkpoint(path: Path, model, optimizer, step: int, seconds: float) -> None:
    state = {"step": step, "seconds": seconds, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
             "rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state_all()}
    with replacing(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:   # which is what torch makes of a full disk
            raise OSError(f"{path} cannot be written: {error}") from None


def restore(path: Path, model, optimizer, rank: int) -> tuple[int, float]:
    """Take up the checkpoint, if there is one, and cut the log back to it (process 0): its step and seconds."""
    step, seconds, log = 0, 0.0, path.with_name("log.jsonl")
    if path.exists():
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["rng"])
            torch.cuda.set_rng_state_all(state["cuda_rng"][:torch.cuda.device_count()])
            step, seconds = state["step"], state["seconds"]
        except Exception as error:  # of whatever kind: pickle, zip and struct have their own
            raise ValueError(f"{path}: damaged, or of another model: {' '.join(str(error).split()[:20])}") from None
        print(f"{path.parent}: going on from step {step}")
    if rank == 0 and log.exists():
        lines = log.read_text().splitlines(keepends=True)
        log.write_text("".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step))
    return step, seconds


# ------------------------------------------------------------------------------------- run folders

def scored(folder: Path) -> dict | None:
    """The results.json of a folder; None where there is none, or where it is not of the weights beside it."""
    results = read_json(folder / "results.json") if (folder / "results.json").is_file() else {}
    weights = (folder / "model.safetensors").is_file() and weights_sha256(folder)
    return results if weights and results.get("weights_sha256") == weights else None


def write_results(folder: str | Path, config: Config, training: Squad | None, dev: Squad, **values) -> None:
    """results.json of a run folder: what the run knows, and `values`. compact.py adds what is counted and timed.

    training may be None. precision is that of training and scoring.
    """
    data = dict(name=Path(config.data).name, sha256={"train": training and training.sha256, "dev": dev.sha256},
                train_questions=training and len(training.questions), dev_questions=len(dev.questions))
    write_json(Path(folder, "results.json"), dict(data=data, seed=config.seed, precision=config.precision,
                                                  weights_sha256=weights_sha256(folder), **values))


@contextlib.contextmanager
def held(out: Path):
    """Keep other processes from a run folder; ValueError if one has it."""
    out.mkdir(parents=True, exist_ok=True)
    folder = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{out}: another process is at work in it") from None
        for path in out.glob("*.tmp"):  # of one that was killed while it wrote
            path.unlink()
        yield
    finally:
        os.close(folder)


def claim(config: Config, command: str, contents: dict) -> bool:
    """Make the run folder ours; True if its run is finished. ValueError if it holds another run.

    contents: the sha256 of what the run starts from; like the settings, they must be what they were.
    """
    out, settings = Path(config.out), {k: v for k, v in vars(config).items() if k not in NOT_SETTINGS}
    found = read_json(out / "run.json") if (out / "run.json").is_file() else {}
    if type(old := found.get("settings")) is dict and "compacted" not in found:
        old = {**contents, **old, **found.get("contents", {})}
        differ = [f"{k} was {old.get(k)!r} and is {v!r}" for k, v in (settings | contents).items() if old.get(k) != v]
        if differ and ((out / "checkpoint.pt").exists() or (out / "results.json").exists()):
            raise ValueError(f"{out} holds a run of other settings: {', '.join(differ)}. Use another --out")
        if not differ:
            return scored(out) is not None
    elif any(out.iterdir()):
        raise ValueError(f"{out} is there, and no run of ours: use another --out")
    git = subprocess.run("git describe --always --dirty --abbrev=40", shell=True, cwd=Path(__file__).parent,
                         capture_output=True, text=True)
    cuda, cpu = config.device == "cuda", torch.cpu.get_capabilities()
    write_json(out / "run.json", dict(
        settings=settings, contents=contents, command=command, processes=processes(config.device)[1],
        commit=git.stdout.strip() or None, threads=torch.get_num_threads(),
        processor=torch.cuda.get_device_name() if cuda else cpu.get("cpu_name"), python=platform.python_version(),
        torch=torch.__version__, numpy=np.__version__, tokenizers=tokenizers.__version__))
    return False


# ------------------------------------------------------------------------------------ command line

def run(config: Config, command: str) -> None:
    """One run, from settings to results.json: train, save, read back what was saved, score that."""
    if config.precision is None and (path := Path(config.out, "run.json")).is_file():   # a run keeps what it began with
        config = dataclasses.replace(config, precision=read_json(path, "settings")["settings"].get("precision"))
    config = settle(config)
    if rank := processes(config.device)[0]:
        sys.stdout = open(os.devnull, "w")
    training = read_squad(config.data, file_name("train", config.v2), config.questions, config.seed)
    dev = read_squad(config.data, file_name("dev", config.v2), config.dev_questions)   # the same ones for every seed
    tokenizer, vocab = load_tokenizer(config.init), Path(config.init, "vocab.txt")
    torch.manual_seed(config.seed)
    model = load_model(config.init, fresh_head=not config.fill)
    teacher = load_model(config.teacher).eval().to(config.device) if config.teacher else None
    if teacher and load_tokenizer(config.teacher).get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"{config.teacher} and {config.init} have different vocabularies")
    if config.max_length > (most := min(m.config.max_position_embeddings for m in (model, teacher or model))):
        raise ValueError(f"--max-length {config.max_length} is over the model's {most}")
    features = Features(training, tokenizer, config, training=True)
    if config.fill:
        refill(model)
    if config.method != "dense":
        plan(config, len(features))     # before the folder is claimed: it may refuse
        add_masks(model, config.method, config.block)
    with held(Path(config.out)) if rank == 0 else contextlib.nullcontext():
        contents = {f"contents of {name}": sha for name, sha in (
            ("data", training.sha256), ("dev", dev.sha256), ("init", weights_sha256(config.init)),
            ("teacher", config.teacher and weights_sha256(config.teacher)))}
        finished, = mean_of_all(float(rank == 0 and claim(config, command, contents)))
        if finished:
            return print(f"{config.out}: finished before, its results.json is there")
        name = "the built-in made-up corpus, NOT SQuAD," if Path(config.data).name == "builtin" else config.data
        print(f"{config.out}: {len(training.questions)} questions of {name} in {len(features)} windows, "
              f"{config.device}, {config.precision}; {features.skipped} skipped (no answer at its offset), "
              f"{features.cut} cut (too long)")
        seconds = train(model, teacher, features, config)
        if rank:
            return      # one process writes and is scored
        if config.method == "dense":
            save_model(model, config.out, vocab)
        else:
            save_pruning(model, config.out, vocab, method=config.method, block=config.block, threshold=config.threshold)
        # Note: what is scored is what is on disk, and the last step is the result: none is chosen on dev.
        model = load_model(config.out)
        scores = evaluate(model, Features(dev, tokenizer, config, training=False), config, config.out)
        write_results(config.out, config, training, dev, command=command, **scores, seconds=seconds)
        print(f"{config.out}: EM {scores['exact_match']:.2f}, F1 {scores['f1']:.2f}, "
              f"{len(dev.questions)} questions of {name}")


def ask(folder: str, config: Config) -> None:
    """A passage and questions from the terminal, one line each: the best span, its logits' sum, milliseconds."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    longest = min(config.max_length, model.config.max_position_embeddings)
    config = settle(dataclasses.replace(config, max_length=longest, stride=min(config.stride, longest // 3),
                                        max_question=min(config.max_question, longest // 6)))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{folder}: {parameters / 1e6:.1f} M parameters. Give a passage, then questions; an empty line ends.")
    passage = input("passage:  ")
    while question := input("question: "):
        began = time.perf_counter()
        features = Features(Squad([passage], [("", question, 0, [])], ""), tokenizer, config, training=False)
        (text, value), = predict(model, features, config).values()
        print(f"          {repr(text) if text else 'no answer'}, score {value:.1f}, "
              f"{1000 * (time.perf_counter() - began):.0f} ms")


def parse(argv: list[str] | None) -> dict:
    """One flag for each field of Config, with its comment as the help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    comments = dict(re.findall(r"^    (\w+): .*?#(.*)", inspect.getsource(Config), re.M))
    for field in dataclasses.fields(Config):
        kind = (typing.get_args(field.type) or (field.type,))[0]
        how = dict(action="store_true") if kind is bool else dict(type=kind, default=field.default)
        if choices := re.match(r" \{(.*?)\}", comments[field.name]):
            how["choices"] = choices[1].split(",")
        parser.add_argument("--" + field.name.replace("_", "-"), **how,
                            help=" ".join(comments[field.name].replace("%", "%%").split()))
    parser.add_argument("--score", nargs=2, metavar=("PREDICTIONS", "DEV"), help="print EM and F1 of a file")
    parser.add_argument("--ask", metavar="FOLDER", help="answer questions on a passage, from the terminal")
    return vars(parser.parse_args(argv))


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        files, folder = arguments.pop("score"), arguments.pop("ask")
        if folder:
            with contextlib.suppress(EOFError):
                ask(folder, Config(**arguments))
        elif files:
            dev = Path(files[1].removesuffix(".xz"))
            predictions = {i: str(text) for i, text in read_json(files[0]).items()}
            print(json.dumps(score(predictions, read_squad(dev.parent, dev.name).truths())))
        else:
            command = ["python", "train_squad.py", *(sys.argv[1:] if argv is None else argv)]
            run(Config(**arguments), shlex.join(command))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(*(stop.args or ["interrupted; the same command goes on"]), file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
