"""What train_squad.py computes: naive versions, and cases worked by hand.

What asks for the real SQuAD runs where the environment names its folder, as in SQUAD=data/squad.
"""
import collections
import dataclasses
import itertools
import json
import math
import os
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import builtin
import train_squad as ts
from bert import BertConfig, BertForQuestionAnswering, load_tokenizer, save_model, write_json
from blockprune import density, masks
from tiny import tiny_config
from train_squad import Config, Features, Question, Squad

SQUAD = Path(os.environ.get("SQUAD") or "unset")
REAL_SQUAD = pytest.mark.skipif(not SQUAD.is_dir(), reason="SQUAD names no folder")
WEIGHTS = Path(__file__).parents[1] / "weights/minilm"

# A few whole words, and single signs, which may begin a word (a) or go on with one (##a).
SIGNS = list("abcdefghijklmnopqrstuvwxyz0123456789.,?'-שלום")
VOCAB = "[UNK] stone the [PAD] 東 😀 [SEP] [CLS] moon ᄒ ##ᅡ ##ᆫ [MASK] ##ing".split()
VOCAB += SIGNS
VOCAB += ["##" + sign for sign in SIGNS]
PAD, SEP, CLS = map(VOCAB.index, ["[PAD]", "[SEP]", "[CLS]"])

# Accents, control characters, words written from right to left, a sign of three word pieces, 한.
TEXTS = [
    "The stone, the Stone.",
    "Café naïve e\u0301te\u0301 o\u0308 İstanbul \u00a0 ß",
    "x 😀 moon 🦊🏽\u200d♀️ שלום y",
    "a\x00b\u200bc\tx\x7f\x1by\u202e z\ufffd\r\nq",
    "東京moon タワー 한 a한",
    " ".join(random.Random(3).choices(["moon", "Stoneing", "é", "a.b", "東😀", "☃"], k=900)),
]


def tiny(**changes) -> BertForQuestionAnswering:
    """Random parameters, in eval mode: two layers, three heads of size 8, 40 inner dimensions."""
    model = BertForQuestionAnswering(tiny_config(len(VOCAB) + 3, **changes)).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


def masked(method) -> BertForQuestionAnswering:
    """A tiny model with the masks of a method on it."""
    model = tiny()
    ts.add_masks(model, method, "2x3")
    return model


def squad_of(*rows) -> Squad:
    """Of (passage, question, answer, its offset): q0 on passage 0, q1 on passage 1 and so on."""
    squad = Squad([], [])
    for n, (passage, question, answer, start) in enumerate(rows):
        squad.passages.append(passage)
        squad.questions.append(Question(f"q{n}", question, n, [(answer, start)]))
    return squad


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_model(tiny(), folder)
    (folder / "vocab.txt").write_text("\n".join(VOCAB), encoding="utf-8")
    return load_tokenizer(folder)


# ---------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("stage", [{}, {"method": "hybrid"}, {"fill": True}],
                         ids=["dense", "prune", "fill"])
@pytest.mark.parametrize("preset", ["builtin", "small", "paper"])
def test_a_preset_fills_what_its_stage_needs(stage, preset):
    may_stay_none = {"questions", "dev_questions", "warmup_steps"}
    if "method" not in stage:
        may_stay_none |= {"score_lr", "final_lambda"}
    config = Config(preset=preset, **stage)
    for name, value in vars(ts.fill_in(config)).items():
        assert value is not None or name in may_stay_none
    # What is given stays, and the settings that came in are not changed.
    assert ts.fill_in(dataclasses.replace(config, lr=7.0)).lr == 7
    assert config == Config(preset=preset, **stage)


@pytest.mark.parametrize("stage, epochs, warmup, score_lr", [
    ({}, 2, 553, None), ({"method": "hybrid"}, 20, 5533, 1e-2), ({"fill": True}, 4, 10, None),
], ids=["dense", "prune", "fill"])
def test_the_papers_settings(stage, epochs, warmup, score_lr):
    c = ts.fill_in(Config(preset="paper", **stage))
    assert (c.lr, c.score_lr, c.epochs, c.batch) == (3e-5, score_lr, epochs, 16)
    assert (c.initial_warmup, c.final_warmup, c.threshold) == (1, 10, 0.1)
    assert (c.alpha_ce, c.alpha_kd, c.temperature) == (0.1, 0.9, 2)
    assert (c.clip, c.weight_decay, c.attention_dropout, c.precision) == (1, 0, 0.1, "fp32")
    assert (c.max_length, c.stride, c.max_answer, c.seed) == (384, 128, 30, 17)
    # SQuAD has 88,524 windows, 5,533 batches.
    assert ts.count_steps(c, 88_524) == (epochs * 5533, warmup)


@pytest.mark.parametrize("method, final, attention, ffn", [
    ("hybrid", 20, 1, 0.25), ("block", 20, 1, 1), ("struct", 2.5, 0.00156, 1)])
def test_the_papers_lambdas(method, final, attention, ffn):
    c = ts.fill_in(Config(preset="paper", method=method))
    assert (c.final_lambda, c.attention_lambda, c.ffn_lambda) == (final, attention, ffn)


def test_the_papers_unstructured_penalty_is_one_mean(tokenizer):
    """25 · the mean over all matrices, attention and feed-forward together, of mean σ(S)."""
    model = masked("unstructured")
    config = ts.fill_in(Config(preset="paper", method="unstructured"))
    means = []
    for mask in masks(model):
        mask.scores.data.normal_()
        means.append(mask.scores.sigmoid().mean().item())
    batch = small_features(tokenizer, config).batch(np.arange(3))
    terms = ts.step_loss(model, batch, None, 999, config, 1000, 1)      # at the final τ
    assert (terms["loss"] - terms["ce"]).item() == pytest.approx(25 * np.mean(means), rel=1e-5)


def test_what_is_set_where_nothing_is_given(monkeypatch):
    # A head's score feels a large part of the penalty.
    assert ts.fill_in(Config(method="struct")).attention_lambda == 0.05
    for fast, precision in [(True, "bf16"), (False, "fp32")]:
        monkeypatch.setattr(ts, "multiplies_in_bf16", lambda device: fast)
        # bf16 where it is fast, but not in the paper's settings.
        assert ts.fill_in(Config()).precision == precision
        assert ts.fill_in(Config(preset="paper")).precision == "fp32"


@pytest.mark.parametrize("settings, message", [
    ({"threshold": 0.5}, "--threshold 0.5: it must be under 0.5"),
    ({"max_length": 195}, "--max-length 195 is too short for --stride 128"),
    ({"fill": True, "method": "block"}, "leave --method out"),
], ids=lambda value: str(value)[:14])
def test_settings_that_would_train_in_vain_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ts.fill_in(Config(**settings))
    # At the edge they are taken.
    ts.fill_in(Config(max_length=196, threshold=0.49))


# --------------------------------------------------------------------------- masks, loss, schedules


METHODS = ["hybrid", "block", "struct", "unstructured"]


@pytest.mark.parametrize("method, tensors, scores", [
    ("hybrid", 60, 64_512),                 # 12 layers × (4 matrices of 24 × 24, and 3,072)
    ("block", 72, 82_944),                  # 12 × (4 × 24 × 24 + 2 × 24 × 96)
    ("struct", 24, 144 + 36_864),           # 12 × (12 heads, and 3,072)
    ("unstructured", 72, 84_934_656),       # 12 × (4 × 768 × 768 + 2 × 768 × 3,072)
], ids=METHODS)
def test_scores_of_bert_base(method, tensors, scores):
    """At 32x32, over 12 layers of six matrices."""
    with torch.device("meta"):  # which holds no numbers
        model = BertForQuestionAnswering(BertConfig())
        ts.add_masks(model, method, "32x32")
    assert len(list(masks(model))) == 12 * 6
    sizes = {mask.owner: mask.owner.scores.numel() for mask in masks(model)}
    assert len(sizes) == tensors
    assert sum(sizes.values()) == scores


@pytest.mark.parametrize("method, query, out, fc1, fc2", [
    ("hybrid", (2, 3), (3, 2), (1, 24), (24, 1)),
    ("block", (2, 3), (3, 2), (2, 3), (2, 3)),
    ("struct", (8, 24), (24, 8), (1, 24), (24, 1)),
    ("unstructured", (1, 1), (1, 1), (1, 1), (1, 1)),
], ids=METHODS)
def test_blocks_of_each_method(method, query, out, fc1, fc2):
    """Of a tiny model at 2x3, and which masks share their scores. key and value are as query."""
    for layer in masked(method).bert.layers:
        attention, ffn = layer.attention, layer.ffn
        linears = [attention.query, attention.key, attention.value, attention.out, ffn.fc1, ffn.fc2]
        found = [linear.parametrizations.weight[0] for linear in linears]
        assert [mask.block for mask in found] == [query, query, query, out, fc1, fc2]
        assert [mask.kind for mask in found] == ["attention"] * 4 + ["ffn"] * 2
        owners_in_attention = {mask.owner for mask in found[:4]}
        assert len(owners_in_attention) == (1 if method == "struct" else 4)
        shares_a_dimension = found[4].owner is found[5].owner
        assert shares_a_dimension == (method in ("hybrid", "struct"))
    with pytest.raises(ValueError, match="no method 'dense'"):
        ts.add_masks(tiny(), "dense", "2x3")


@pytest.mark.parametrize("method", METHODS)
def test_a_compacted_model_with_an_empty_layer_is_masked(method):
    model = tiny(heads=[0, 2], ffn=[6, 0])
    ts.add_masks(model, method, "2x3")
    first, second = model.bert.layers
    modules = [first.attention, first.ffn, second.attention, second.ffn]
    assert [len(list(masks(module))) for module in modules] == [0, 2, 4, 0]


def loss_by_loop(student, teacher, real, labels, T):
    """Cross entropy and distillation, position by position. Logits are (2, B, T): start and end."""
    def probabilities(logits, T):
        powers = [(logit / T).exp() for logit in logits]
        return [power / sum(powers) for power in powers]

    ce = 0
    kd = 0
    B = len(real)
    for side, b in itertools.product((0, 1), range(B)):
        positions = [t for t in range(len(real[b])) if real[b, t]]
        student_logits = [student[side, b, t] for t in positions]
        teacher_logits = [teacher[side, b, t] for t in positions]
        # −log of the probability of the label
        ce -= probabilities(student_logits, 1)[labels[side, b]].log()
        # T² · Σ p · log(p / q)
        teacher_p = probabilities(teacher_logits, T)
        student_p = probabilities(student_logits, T)
        for p, q in zip(teacher_p, student_p):
            kd += T ** 2 * p * (p / q).log()
    # A mean over the batch, and of start and end.
    return ce / B / 2, kd / B / 2


def test_loss_is_a_loop_over_real_tokens():
    B, width, T = 5, 11, 3
    student = (3 * torch.randn(2, B, width)).requires_grad_()
    teacher = 3 * torch.randn(2, B, width)
    lengths = torch.tensor([11, 4, 7, 1, 10])
    real = torch.arange(width) < lengths[:, None]
    labels = torch.tensor([[0, 3, 6, 0, 2],
                           [10, 3, 2, 0, 9]])
    batch = dict(real=real, start=labels[0], end=labels[1])
    ce, kd = ts.loss_terms(tuple(student), tuple(teacher), batch, T)
    expected = loss_by_loop(student.detach().double(), teacher.double(), real, labels, T)
    assert_close((ce.double(), kd.double()), expected, rtol=1e-5, atol=0)
    # Real tokens have a gradient, padding has none.
    (ce + kd).backward()
    assert student.grad.isfinite().all()
    assert student.grad[:, real].any()
    assert not student.grad[:, ~real].any()

    # The loss is in fp32, whatever comes; without a teacher there is no distillation.
    ce_of_bf16, none = ts.loss_terms(tuple(student.bfloat16()), None, batch, T)
    assert none.item() == 0
    assert ce_of_bf16.dtype == torch.float32
    assert ce_of_bf16.item() == pytest.approx(ce.item(), rel=0.02)


def test_the_learning_rate_by_step():
    rates = [ts.learning_rate_factor(step, 10, 4) for step in range(10)]
    assert rates == pytest.approx([1/4, 2/4, 3/4, 1, 1, 5/6, 4/6, 3/6, 2/6, 1/6])
    rates = [ts.learning_rate_factor(step, 4, 0) for step in range(4)]
    assert rates == pytest.approx([1, 3/4, 2/4, 1/4])


PAPER = ts.fill_in(Config(method="hybrid", preset="paper"))


@pytest.mark.parametrize("changes, windows, steps", [
    (dict(epochs=0.5, batch=7), 13_990, (1000, 50)),            # half of 1,999; 5 % of that
    (dict(epochs=1, warmup_steps=3), 160, (10, 3)),
    (dict(epochs=1, warmup_steps=30), 160, (10, 9)),            # the last step is after it
    (dict(epochs=2, fill=True), 960, (120, 10)),
    (dict(epochs=2), 1, (2, 0)),
], ids=["share", "given", "too-long", "fill", "shortest"])
def test_steps_of_a_run_and_of_its_warmup(changes, windows, steps):
    assert ts.count_steps(dataclasses.replace(PAPER, **changes), windows) == steps
    with pytest.raises(ValueError, match="--epochs 0.1 is less than two steps"):
        ts.count_steps(dataclasses.replace(PAPER, epochs=0.1), 160)


def test_a_run_too_short_to_prune_is_refused():
    """How far a score can fall is the sum of the scores' learning rates over all steps."""
    # 0.01 · (half of 20 · 21 / 20 + half of 380 · 381 / 380), or so, of 400 steps
    with pytest.raises(ValueError, match="in 400 steps scores fall to about -2.01, .* at -2.20"):
        ts.check_schedule(PAPER, 400, 20)
    with pytest.raises(ValueError, match="To reach -3.00"):
        ts.check_schedule(PAPER, 594, 29)
    ts.check_schedule(PAPER, 600, 30)
    with pytest.raises(ValueError, match="pruned at -4.60"):    # a lower τ is further down
        ts.check_schedule(dataclasses.replace(PAPER, threshold=0.01), 850, 42)
    with pytest.raises(ValueError, match="no step is left"):
        ts.check_schedule(dataclasses.replace(PAPER, score_lr=9.0), 110, 10)


# ---------------------------------------------------------------------------------------- training


def small_features(tokenizer, config) -> Features:
    """Windows of several lengths, some of which have no answer in them."""
    return Features(squad_of(
        ("the moon is a stone", "what is it?", "stone", 14),
        ("no", "a b c?", "no", 0),
        ("a stone, the moon, 1 2 3 4 5 6 7 8 9 0 a b c d e f g", "the moon?", "moon", 13),
        ("moon stone moon", "", "moon stone", 0),
    ), tokenizer, config, training=True)


def small_config(out, **changes) -> Config:
    """Settings of a few steps, none of them at its default."""
    settings = dict(out=str(out), max_length=20, stride=4, max_question=6, seed=5, epochs=4.0,
                    batch=2, lr=0.01, score_lr=0.8, warmup_steps=2, initial_warmup=1.0,
                    final_warmup=0.25, threshold=0.2, final_lambda=40.0, attention_lambda=0.7,
                    ffn_lambda=0.4, alpha_ce=0.3, alpha_kd=0.6, temperature=3.0, weight_decay=0.5,
                    attention_dropout=0.0, clip=0.6, precision="fp32", device="cpu", log_every=1)
    return Config(**{**settings, **changes})


def train_by_loop(model, teacher, features, c) -> list[dict]:
    """What train() should do, with the second half of each step written out. Returns log lines."""
    scores = {mask.owner.scores for mask in masks(model)}
    weights = [p for p in model.parameters() if p not in scores]
    matrices = [p for p in weights if p.dim() > 1]
    vectors = [p for p in weights if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": c.weight_decay},
                                   {"params": vectors}, {"params": list(scores)}], weight_decay=0)
    batches = []
    for epoch in range(int(c.epochs)):
        batches += ts.training_batches(features.lengths, c.batch, c.seed, epoch)
    total = len(batches)
    lines = []
    for step, indices in enumerate(batches):
        batch = features.batch(indices)
        teacher_logits = None
        if teacher is not None:
            logits = teacher(batch["ids"], batch["types"], batch["real"])
            teacher_logits = [start_or_end.detach() for start_or_end in logits]
        terms = ts.step_loss(model, batch, teacher_logits, step, c, total, c.warmup_steps)
        optimizer.zero_grad()
        terms["loss"].backward()

        # All gradients are clipped together. The rates rise for the warm-up and then fall to 0.
        torch.nn.utils.clip_grad_norm_(model.parameters(), c.clip)
        factor = min((step + 1) / c.warmup_steps, (total - step) / (total - c.warmup_steps))
        for group, peak in zip(optimizer.param_groups, (c.lr, c.lr, c.score_lr)):
            group["lr"] = factor * peak
        line = {name: float(torch.as_tensor(value).detach()) for name, value in terms.items()}
        lines.append({**line, "step": step + 1, "lr": factor * c.lr})
        optimizer.step()
    return lines


@pytest.mark.parametrize("method, distil", [
    ("dense", False), ("dense", True), ("hybrid", True), ("struct", False)],
    ids=["dense", "dense-distilled", "hybrid-distilled", "struct"])
def test_a_training_is_a_loop_of_steps(tokenizer, tmp_path, method, distil):
    """In fp64, which the logits of the teacher have to have too."""
    torch.set_default_dtype(torch.float64)
    config = small_config(tmp_path, method=method)
    features = small_features(tokenizer, config)
    model = tiny(hidden_dropout_prob=0.0)
    teacher = tiny(hidden_dropout_prob=0.5) if distil else None
    if method != "dense":
        ts.add_masks(model, method, "4x6")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = train_by_loop(model, teacher, features, config)
    parameters = [p.clone() for p in model.parameters()]
    model.load_state_dict(before)
    if distil:
        teacher.train()         # its dropout does not act even so
    assert ts.train(model, teacher, features, config) > 0

    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(lines) == len(expected) == 12
    for line, expected_line in zip(lines, expected):
        del line["examples_per_second"], line["density"]
        assert line == pytest.approx(expected_line, rel=1e-6)
        # The loss of the run's own settings.
        loss = 0.3 * line["ce"] + 0.6 * line["kd"] if distil else line["ce"]
        assert line["loss"] == pytest.approx(loss + line["lambda"] * line["penalty"])
    for p, expected_p in zip(model.parameters(), parameters, strict=True):
        assert_close(p, expected_p, rtol=1e-6, atol=1e-8)
    # At the end τ is final, though it was not in the last step; and something was pruned.
    for mask in masks(model):
        assert lines[-1]["threshold"] < mask.threshold.item() == config.threshold
    if method != "dense":
        assert 0 < density(model)["all"] < 1


@pytest.mark.parametrize("precision, dtype", [("bf16", torch.bfloat16), ("fp32", torch.float32)],
                         ids=["bf16", "fp32"])
def test_products_have_the_runs_precision(tokenizer, tmp_path, precision, dtype):
    """And dropout acts on the student, in training, with the run's probability."""
    config = small_config(tmp_path, method="hybrid", precision=precision, attention_dropout=0.3)
    features = small_features(tokenizer, config)

    def watch(model) -> set:
        seen = set()
        attention = model.bert.layers[1].attention
        attention.query.register_forward_hook(lambda module, inputs, output: seen.add(
            (output.dtype, attention.training, attention.dropout)))
        return seen

    student = masked("hybrid")
    teacher = tiny()
    of_student = watch(student)
    of_teacher = watch(teacher)
    ts.train(student, teacher, features, config)
    assert of_student == {(dtype, True, 0.3)}
    assert of_teacher == {(dtype, False, 0.1)}
    assert {p.dtype for p in student.parameters()} == {torch.float32}       # and scores
    ts.predict(student, features, config)
    assert of_student == {(dtype, True, 0.3), (dtype, False, 0.3)}


def test_a_loss_that_is_no_number_stops_the_run():
    ts.stop_if_not_finite(torch.tensor(1.0), torch.tensor(1.0), 7, Path("R"))
    for loss, norm in [(math.nan, 1.0), (1.0, math.inf)]:
        with pytest.raises(ValueError, match="stopped at step 7: loss .*, gradient norm .*"):
            ts.stop_if_not_finite(torch.tensor(loss), torch.tensor(norm), 7, Path("R"))


def test_refill_replaces_zeros_and_nothing_else():
    model = tiny(hidden_size=60, num_hidden_layers=4, heads=[3, 3, 0, 1], ffn=[40, 40, 9, 0])
    query = model.bert.layers[1].attention.query.weight
    key = model.bert.layers[1].attention.key.weight
    with torch.no_grad():
        query += 2
        query[:40] = 0          # 2,400 zeros, and 1,200 numbers about 2
        key.zero_()             # nothing but zeros
        # Zeros here and there.
        model.bert.norm.weight[5] = 0
        model.bert.layers[0].ffn.fc1.bias[7] = 0
        model.qa_outputs.bias[1] = 0
    before = {name: p.clone() for name, p in model.named_parameters()}
    ts.refill(model)
    for name, p in model.named_parameters():
        was_zero = before[name] == 0
        assert torch.equal(p[~was_zero], before[name][~was_zero])
        # Only biases keep their zeros.
        if name.endswith("bias"):
            assert torch.equal(p == 0, was_zero)
        else:
            assert p.all()

    # The noise is N(0, 1) · 0.01 · std(W) + mean(W).
    old = before["bert.layers.1.attention.query.weight"]
    noise = (query[:40] - old.mean()) / (0.01 * old.std())
    assert abs(noise.mean()) < 0.1
    assert 0.95 < noise.std() < 1.05
    # Where all of W is zero, the spread is that of a fresh weight, initializer_range.
    assert key.std().item() == pytest.approx(0.01 * 0.1, rel=0.05)


# -------------------------------------------------------------------- word pieces, windows, batches


def test_word_pieces_of_many_texts_are_those_of_each(tokenizer):
    texts = [*TEXTS, *["moon"] * 1000, "a stone", ""]   # more than the tokenizer gets at a time
    for text, (ids, characters) in zip(texts, ts.word_pieces(tokenizer, texts), strict=True):
        encoding = tokenizer.encode(text, add_special_tokens=False)
        assert ids.tolist() == encoding.ids
        assert characters.tolist() == [list(span) for span in encoding.offsets]


def questions_on(texts) -> Squad:
    """Twelve questions on each text. Answers begin and end anywhere, in word pieces too."""
    rng = random.Random(7)
    rows = []
    for text, _ in itertools.product(texts, range(12)):
        begin = rng.randrange(len(text))
        answer = text[begin:begin + rng.randrange(1, 20)]
        question = " ".join(rng.choices(["the", "q", "☃", "moons?"], k=rng.randrange(9)))
        rows.append((text, question, answer, begin))
    return squad_of(*rows)


def windows_by_loop(tokenizer, squad, question, config) -> list[tuple]:
    """The windows of one question: head, part of the passage, where the answer is in it, its text.

    There are none if no word piece has a character of the answer.
    """
    text = squad.passages[question.passage]
    passage = tokenizer.encode(text, add_special_tokens=False)
    asked = tokenizer.encode(question.text, add_special_tokens=False).ids[:config.max_question]
    head = [CLS, *asked, SEP]
    answer, start = question.answers[0]
    touched = []
    for k, (begin, end) in enumerate(passage.offsets):
        if begin < start + len(answer) and end > start:
            touched.append(k)
    if not touched:
        return []
    answer = text[passage.offsets[touched[0]][0]:passage.offsets[touched[-1]][1]]
    windows = []
    first = 0
    while True:
        last = min(first + config.max_length - len(head) - 1, len(passage.ids))
        label = (0, 0)
        if first <= touched[0] and touched[-1] < last:
            label = (len(head) + touched[0] - first, len(head) + touched[-1] - first)
        windows.append((head, passage.ids[first:last], label, answer))
        if last == len(passage.ids):
            return windows
        first = last - config.stride


@pytest.mark.parametrize("max_length, stride, max_question",
                         [(60, 17, 8), (23, 0, 11), (31, 9, 5)])
def test_labels_masks_and_padding_of_batches(tokenizer, max_length, stride, max_question):
    config = Config(max_length=max_length, stride=stride, max_question=max_question)
    squad = questions_on(TEXTS)
    features = Features(squad, tokenizer, config, training=True)
    expected = []
    skipped = 0
    cut = 0
    for question in squad.questions:
        windows = windows_by_loop(tokenizer, squad, question, config)
        expected += windows
        if not windows:
            skipped += 1
        elif len(tokenizer.encode(question.text, add_special_tokens=False)) > max_question:
            cut += 1
    assert (len(features), features.skipped, features.cut) == (len(expected), skipped, cut)

    labelled = 0
    order = np.random.default_rng(5).permutation(len(features))
    for indices in np.split(order, range(6, len(order), 6)):
        batch = features.batch(indices)
        T = max(features.lengths[indices])
        for b, i in enumerate(indices):
            head, part, label, answer = expected[i]
            H = len(head)
            P = len(part)
            padding = T - H - P - 1
            assert features.lengths[i] == H + P + 1 <= max_length
            assert batch["ids"][b].tolist() == [*head, *part, SEP] + [PAD] * padding
            assert batch["types"][b].tolist() == [0] * H + [1] * (P + 1) + [0] * padding
            assert batch["real"][b].tolist() == [1] * (H + P + 1) + [0] * padding
            assert batch["context"][b].tolist() == [0] * H + [1] * P + [0] * (1 + padding)
            assert (batch["start"][b], batch["end"][b]) == label
            if label != (0, 0):
                labelled += 1
                assert features.text(i, *label) == answer
    # Enough windows with an answer, and without.
    assert skipped > 0
    assert cut > 0
    assert 60 < labelled < len(features) - 60


def test_an_answer_that_is_not_at_its_offset_is_skipped(tokenizer):
    squad = squad_of(
        ("the moon", "q", "moon", 4),
        ("the moon", "q", "moon", 3),       # not there
        ("a stone", "q", "stone", -5),      # nor there, though Python finds it at −5
        ("the moon", "q", "", 5),           # not the word that it is in
        (" ", "q", " ", 0),                 # no word piece in it
        ("", "q", "x", 0),
        ("a stone", "q", "ton", 3),         # inside a word piece
    )
    squad.questions[0].answers.append(("the", 0))       # of several answers the first is learnt
    squad.questions.append(Question("q7", "q", 0, []))  # v2: no answer
    features = Features(squad, tokenizer, Config(), training=True)
    assert features.skipped == 5
    # [CLS] q [SEP] and then the passage: its second word piece is at position 4.
    labels = [(window.question, window.start, window.end) for window in features.windows]
    assert labels == [(0, 4, 4), (6, 4, 4), (7, 0, 0)]
    # To be scored, all are there.
    batch = Features(squad, tokenizer, Config(), training=False).batch(np.arange(7))
    assert not batch["start"].any()
    assert batch["context"].sum(1).tolist() == [2, 2, 2, 2, 0, 0, 2]
    assert batch["ids"][5].tolist() == [CLS, VOCAB.index("q"), SEP, SEP, PAD, PAD]

    nothing_left = squad_of(("the moon", "q", "sun", 4))
    with pytest.raises(ValueError, match="no question has an answer at its offset"):
        Features(nothing_left, tokenizer, Config(), training=True)


@REAL_SQUAD
@pytest.mark.skipif(not WEIGHTS.is_dir(), reason="no vocabulary of BERT in weights/minilm")
@pytest.mark.parametrize("part, windows, questions",
                         [("dev", 10_784, 10_570), ("train", 88_524, 87_599)])
def test_windows_of_the_real_squad(part, windows, questions):
    """As many as Hugging Face's run_qa.py makes at 384/128."""
    squad = ts.read_squad(SQUAD, f"{part}-v1.1.json")
    features = Features(squad, load_tokenizer(WEIGHTS), Config(), training=True)
    assert (len(squad.questions), len(features)) == (questions, windows)
    assert (features.skipped, features.cut) == (0, 0)


# 1,234 windows, and so 176 batches of 7 and one of 2. One window is much longer than all others.
WINDOW_LENGTHS = np.append(np.random.default_rng(1).integers(20, 384, 1233), 700)


def test_training_batches_hold_every_window_once():
    batches = ts.training_batches(WINDOW_LENGTHS, 7, 3, 0)
    # Another epoch or seed has another order.
    next_epoch = ts.training_batches(WINDOW_LENGTHS, 7, 3, 1)
    other_seed = ts.training_batches(WINDOW_LENGTHS, 7, 4, 0)
    for found in (batches, next_epoch, other_seed):
        assert sorted(np.concatenate(found)) == list(range(1234))
        assert sorted(map(len, found)) == [2] + [7] * 176
    orders = {np.concatenate(found).tobytes() for found in (batches, next_epoch, other_seed)}
    assert len(orders) == 3
    # Windows of like lengths are together: little padding. Short and long batches take turns.
    longest = [WINDOW_LENGTHS[batch].max() for batch in batches]
    assert np.dot(longest, [len(batch) for batch in batches]) < 1.1 * WINDOW_LENGTHS.sum()
    assert abs(np.corrcoef(longest[1:], longest[:-1])[0, 1]) < 0.3
    # A run that goes on from step 180 is at the fourth batch of its second epoch.
    going_on = ts.batches_from(180, WINDOW_LENGTHS, Config(batch=7, seed=3))
    assert np.array_equal(next(going_on), next_epoch[3])


def test_evaluation_batches_fill_their_budget():
    batches = ts.evaluation_batches(WINDOW_LENGTHS, "cpu")
    assert sorted(np.concatenate(batches)) == list(range(1234))
    for batch, following in zip(batches, batches[1:]):
        assert len(batch) * WINDOW_LENGTHS[batch].max() <= 2048
        # No room was left for the next window.
        assert (len(batch) + 1) * WINDOW_LENGTHS[following[0]] > 2048
    # What is over the budget by itself is alone.
    assert len(ts.evaluation_batches(np.array([9000, 9000]), "cpu")) == 2
    assert len(ts.evaluation_batches(WINDOW_LENGTHS, "cuda")) * 20 < len(batches)


# ------------------------------------------------------------------------------- answers and scores


def spans_by_loop(start, end, context, longest):
    """Score, i and j of every allowed pair of one window."""
    spans = []
    for i in range(len(start)):
        for j in range(i, min(i + longest, len(end))):
            if context[i] and context[j]:
                spans.append(((start[i] + end[j]).item(), i, j))
    return spans


@pytest.mark.parametrize("longest", [1, 4, 13, 30])
def test_best_spans_are_the_best_of_all_pairs(longest):
    start, end = torch.randint(-6, 6, (2, 50, 13)).float()      # there are ties
    # From row to row more of the window is passage; nothing is in the first row.
    context = torch.rand(50, 13) < torch.linspace(0, 1, 50)[:, None]
    best, best_i, best_j = ts.best_spans(start, end, context, longest)
    assert best[0] == -math.inf
    for b in range(1, 50):
        span = (best[b].item(), best_i[b].item(), best_j[b].item())
        allowed = spans_by_loop(start[b], end[b], context[b], longest)
        if allowed:
            assert span in allowed
            assert span[0] == max(allowed)[0]


def test_padding_changes_neither_loss_nor_answers(tokenizer):
    config = small_config("R")
    features = small_features(tokenizer, config)
    model = tiny()
    losses = []
    best = {}                   # the best span's score by question
    for i, window in enumerate(features.windows):
        alone = features.batch(np.array([i]))
        start, end = model(alone["ids"], alone["types"])
        losses.append(ts.loss_terms((start, end), None, alone, 1)[0].item())
        spans = spans_by_loop(start[0], end[0], alone["context"][0], config.max_answer)
        question_id = f"q{window.question}"
        best[question_id] = max(best.get(question_id, -math.inf), max(spans)[0])
    terms = ts.step_loss(model, features.batch(np.arange(len(features))), None, 0, config, 9, 2)
    assert terms["loss"].item() == pytest.approx(np.mean(losses), rel=1e-5)
    found = ts.predict(model, features, config)
    span_scores = {key: span_score for key, (_, span_score) in found.items()}
    assert span_scores == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("v2, threshold, texts", [
    (False, 0.0, ["moon", "moon", "stone", "stone"]),
    (True, 2.5, ["", "moon", "", "stone"]),
    (True, 3.0, ["", "moon", "stone", "stone"]),
    (True, -9.0, ["", "", "", ""]),
], ids=["v1", "2.5", "3", "-9"])
def test_the_best_span_of_all_windows_is_the_answer(tokenizer, v2, threshold, texts):
    """Or none, in v2, where [CLS] beats it: of the third question it has 2 + 3 against 1 + 1.

    The last question has three windows. The first and the last are sure that nothing is there.
    """
    config = Config(v2=v2, null_threshold=threshold, max_length=8, stride=2, max_question=1,
                    max_answer=3, precision="fp32", device="cpu")
    rows = [("moon stone", "?", "", 0)] * 3 + [("moon moon moon moon a stone the the", "?", "", 0)]
    features = Features(squad_of(*rows, ("", "?", "", 0)), tokenizer, config, training=False)
    assert [window.first for window in features.windows] == [0, 0, 0, 0, 2, 4, 0]
    # Logits, the shortest window first: of the empty passage, [CLS] [UNK] [SEP] [SEP], of the
    # first three, [CLS] [UNK] [SEP] moon stone [SEP], and of those with four word pieces.
    start = torch.tensor([[0.0, 9, 9, 9, 9, 9, 9, 9],
                          [7.0, 9, 9, 1, 0, 9, 9, 9],
                          [2.0, 9, 9, 4, 0, 9, 9, 9],
                          [2.0, 9, 9, 0, 1, 9, 9, 9],
                          [20.0, 9, 9, 0, 0, 0, 0, 9],
                          [1.0, 9, 9, 5, 0, 0, 4, 9],       # 5 + 4, but of four word pieces
                          [20.0, 9, 9, 0, 0, 0, 0, 9]])
    end = start.clone()
    end[2, 3] = 1
    end[3, 0] = 3
    end[5, 3] = 0
    model = nn.Module()
    model.forward = lambda ids, types, real: (start, end)
    found = ts.predict(model, features, config)
    assert list(found.values()) == list(zip([*texts, ""], (2, 5, 2, 8, -math.inf)))


@pytest.mark.parametrize("text, normal", [
    ("The  Cat, the\tDOG!", "cat dog"),
    ("an-apple a.b", "anapple ab"),
    ("“the ÉTÉ”", "“ été”"),
    ("U.S.A. (1990–91)", "usa 1990–91"),
    ("an theatre a1", "theatre a1"),
    ("İ the\u00a0x\u3000y", "i̇ x y"),
    ("a\u0301 b", "\u0301 b"),
    ("the_end $5 a'an", "theend 5 aan"),
])
def test_normalized_answers(text, normal):
    assert ts.normalize_answer(text) == normal


V1 = {"1": ["the red cat", "cat"], "2": ["a dog"], "3": ["x y z"], "4": ["x x"], "5": ["The!"],
      "6": ["never"]}
# 1: the better of two answers. 3: x and y are shared, precision 2/4 and recall 2/3, so 4/7. 4: a
# word counts as often as both have it, 4/5. 5: exact, though F1 is 0. 6: not predicted, 0.
V1_FOUND = {"1": "Cat.", "2": "", "3": "y x q x", "4": "x x x", "5": "", "other": "never"}
V2 = {"1": ["the red cat"], "2": [], "3": ["x"], "4": [], "5": ["a the"], "6": [], "7": ["y"]}
# 1: F1 2/3. 5: an answer of articles alone is none. 6: so is such a prediction. 7: left out.
V2_FOUND = {"1": "Cat", "2": "", "3": "", "4": "the dog", "5": "", "6": "The."}


@pytest.mark.parametrize("truths, found, exact, f1", [
    (V1, V1_FOUND, 2 / 6, (1 + 4 / 7 + 4 / 5) / 6),
    (V2, V2_FOUND, 3 / 6, (2 / 3 + 3) / 6),
], ids=["v1.1", "v2"])
def test_scores_of_a_file(tmp_path, capsys, truths, found, exact, f1):
    write_json(tmp_path / "found.json", found)
    write_json(tmp_path / "dev.json", as_file(truths))
    assert ts.main(["--score", f"{tmp_path}/found.json", f"{tmp_path}/dev.json.xz"]) == 0
    printed = capsys.readouterr()
    scores = json.loads(printed.out)
    assert scores == pytest.approx({"exact_match": 100 * exact, "f1": 100 * f1})
    assert printed.err == f"1 of {len(truths)} questions have no prediction\n"


def as_file(truths, context="x", **changes):
    """Questions in SQuAD's form, on one passage. truths: the answers by question id."""
    qas = []
    for question_id, texts in truths.items():
        answers = [{"text": text, "answer_start": 0} for text in texts]
        qas.append({"id": question_id, "question": "?", "answers": answers,
                    "is_impossible": not texts})
    return {"data": [{"paragraphs": [{"context": context, "qas": qas}]}], **changes}


@REAL_SQUAD
def test_published_predictions_score_as_published(tmp_path, capsys):
    lzma = pytest.importorskip("lzma")
    packed = (SQUAD / "bert_ensemble_dev_predictions.json.xz").read_bytes()
    (tmp_path / "found.json").write_bytes(lzma.decompress(packed))
    assert ts.main(["--score", f"{tmp_path}/found.json", f"{SQUAD}/dev-v1.1.json"]) == 0
    published = {"exact_match": 86.206, "f1": 92.196}
    assert json.loads(capsys.readouterr().out) == pytest.approx(published, abs=5e-4)


# ------------------------------------------------------- files in SQuAD's form, the built-in corpus


def test_plain_and_packed_files(tmp_path):
    lzma = pytest.importorskip("lzma")          # some Pythons are built without it
    tree = as_file({"q0": ["x0", "x"], "q1": []})
    tree["data"] += as_file({7: ["the"]}, "the end")["data"]
    write_json(tmp_path / "plain.json", tree)
    packed = lzma.compress((tmp_path / "plain.json").read_bytes())
    (tmp_path / "packed.json.xz").write_bytes(packed)
    squad = ts.read_squad(tmp_path, "plain.json")
    assert squad == ts.read_squad(tmp_path, "packed.json")
    assert squad.passages == ["x", "the end"]
    assert squad.questions[0] == Question("q0", "?", 0, [("x0", 0), ("x", 0)])
    assert squad.questions[2] == Question("7", "?", 1, [("the", 0)])
    assert squad.truths() == {"q0": ["x0", "x"], "q1": [], "7": ["the"]}


def test_a_limit_takes_the_first_of_a_seeded_shuffle(tmp_path):
    write_json(tmp_path / "dev.json", as_file({f"q{n}": [f"x{n}"] for n in range(10)}))

    def ids(limit, seed=5):
        squad = ts.read_squad(tmp_path, "dev.json", limit, seed)
        return [question.id for question in squad.questions]

    shuffled = ids(10)
    assert sorted(shuffled) == ids(None) != shuffled
    # A higher limit has the questions of a lower one, and more.
    assert [ids(limit) for limit in (1, 4, 99)] == [shuffled[:1], shuffled[:4], shuffled]
    assert ids(7, seed=6) != ids(7)


@pytest.mark.parametrize("old, new, message", [
    ('"data"', '"date"', "'data'"),
    ('"id": "two"', '"id": "one"', "two questions have the id 'one'"),
    ('"answers": [{', '"answers": [], "more": [{', "'one' has no answer"),
    ("]}]}]", "]}]", "delimiter"),
], ids=["key", "same-id", "no-answer", "cut-off"])
def test_a_file_that_is_not_squad_is_refused(tmp_path, old, new, message):
    """A sound file is changed in one place, from old to new."""
    path = tmp_path / "dev.json"
    text = json.dumps(as_file({"one": ["x"], "two": ["x"]}))
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: .*{message}"):
        ts.read_squad(tmp_path, "dev.json")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The built-in corpus as its script writes it: training and dev questions."""
    folder = tmp_path_factory.mktemp("corpus")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["builtin.py", str(folder)])
        builtin.main()
    return [ts.read_squad(folder, name) for name in ("train-v1.1.json", "dev-v1.1.json")]


def test_the_built_in_corpus_is_known_by_its_file(corpus, tmp_path):
    """And not by the name of its folder."""
    train, dev = corpus
    assert ts.data_name(Config(), train) == "the built-in made-up corpus (NOT SQuAD)"
    write_json(tmp_path / "dev.json", as_file({"one": ["x"]}, version="1.1"))
    assert ts.data_name(Config(data="builtin"), ts.read_squad(tmp_path, "dev.json")) == "builtin"

    assert (len(train.questions), len(dev.questions)) == (2800, 450)
    assert not set(train.passages) & set(dev.passages)


@pytest.mark.parametrize("part", [0, 1], ids=["train", "dev"])
def test_a_built_in_question_needs_both_person_and_relation(corpus, part):
    squad = corpus[part]
    places = collections.Counter()
    for question in squad.questions:
        passage = squad.passages[question.passage]
        # Who is told about, and what? A pronoun is the person named last.
        told = []               # (person, fact, value) of each sentence
        for sentence, fact in itertools.product(passage[:-1].split(". "), builtin.FACTS):
            pattern = r"(She|He|\w+ \w+) " + fact.replace("{}", r"(\w+)")
            found = re.fullmatch(pattern, sentence)
            if found:
                person = found[1] if " " in found[1] else told[-1][0]
                told.append((person, fact, found[2]))
        asked = [row for row in told if builtin.FACTS[row[1]][0].format(row[0]) == question.text]
        [(person, fact, value)] = asked
        answer, start = question.answers[0]
        assert answer == value == passage[start:].split(".")[0]
        places[passage[:start].count(".")] += 1
        # Other facts are told of the same person, and the same fact of one other. All differ.
        assert [row[0] == person for row in told].count(True) == 2
        assert [row[1] == fact for row in told].count(True) == 2
        assert len({row[2] for row in told}) == 4
    # Each of the four sentences is asked about as often: its place tells nothing.
    for place in range(4):
        assert places[place] / len(squad.questions) == pytest.approx(0.25, abs=0.05)
