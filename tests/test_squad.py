"""What train_squad.py must do around its training loop: naive versions, and cases worked by hand.

In order: word pieces, windows and batches; the search for the best span; the official metrics,
those of SQuAD 2.0 too; files in SQuAD's form, the built-in ones among them; masks, loss, filling
and schedules; settings; model folders.

Sizes are small and all different. The vocabulary is made here, so neither weights nor a network are
needed. What asks for the real SQuAD runs where the environment names its folder, as in
SQUAD=data/squad.
"""
import collections
import dataclasses
import inspect
import itertools
import json
import lzma
import math
import os
import random
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import train_squad as ts
from bert import (BertConfig, BertForQuestionAnswering, load_model, load_tokenizer,
                  read_safetensors, save_model)
from blockprune import masks, set_threshold
from train_squad import Config, Features

SQUAD = Path(os.environ.get("SQUAD") or "unset")
WEIGHTS = Path(__file__).parents[1] / "weights/minilm"


def needs(name):
    """Skip a test where $SQUAD has no file of that name, plain or packed."""
    found = list(SQUAD.glob(f"{name}*"))
    return pytest.mark.skipif(not found, reason=f"SQUAD names no folder with {name}")


# A few whole words, and single signs, which may begin a word (a) or go on with one (##a).
SIGNS = list("abcdefghijklmnopqrstuvwxyz0123456789.,?'-שלוםمرحبا")
VOCAB = "[UNK] stone the [PAD] 東 😀 [SEP] [CLS] moon ᄒ ##ᅡ ##ᆫ [MASK] ##ing".split()
VOCAB += SIGNS
VOCAB += ["##" + sign for sign in SIGNS]
UNK = VOCAB.index("[UNK]")
PAD = VOCAB.index("[PAD]")
SEP = VOCAB.index("[SEP]")
CLS = VOCAB.index("[CLS]")

LONG_TEXT = random.Random(3).choices(
    ["moon", "Stoneing", "é", "a.b", "שלום", "東😀", "☃", "\x07"], k=900)
TEXTS = [
    "The stone, the Stone.",
    "Café naïve e\u0301te\u0301 o\u0308",
    "x 😀 moon 🦊🏽\u200d♀️ y",
    "שלום abc مرحبا 12",
    "a\x00b\u200bc\tx\x7f\x1by\u202e z\ufffd\r\nq",
    "東京moon タワー 한 a한",
    "İstanbul ﬁne \u00a0 ß",
    " ".join(LONG_TEXT),
]


def tiny(**changes) -> BertForQuestionAnswering:
    """Random parameters, in eval mode. Two layers, three heads of size 4, 20 inner dimensions."""
    config = dict(vocab_size=len(VOCAB) + 3, hidden_size=12, num_attention_heads=3,
                  num_hidden_layers=2, intermediate_size=20, max_position_embeddings=70)
    config.update(changes)
    model = BertForQuestionAnswering(BertConfig(**config)).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model


def masked(method) -> BertForQuestionAnswering:
    """A tiny model with the masks of a method on it."""
    model = tiny()
    ts.add_masks(model, method, "2x3")
    return model


def squad_of(*rows) -> ts.Squad:
    """Of (passage, question, answer, its offset): q0 on passage 0, q1 on passage 1 and so on."""
    passages = []
    questions = []
    for n, (passage, question, answer, start) in enumerate(rows):
        passages.append(passage)
        questions.append((f"q{n}", question, n, [(answer, start)]))
    return ts.Squad(passages, questions, "")


def write_file(path, tree):
    path.write_text(json.dumps(tree), encoding="utf-8")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model folder: a tiny model and the vocabulary."""
    folder = tmp_path_factory.mktemp("model")
    save_model(tiny(), folder)
    (folder / "vocab.txt").write_text("\n".join(VOCAB), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


# -------------------------------------------------------------------- word pieces, windows, batches


def plain(text):
    """Without accents, control characters and case, as an uncased BERT reads it."""
    kept = ""
    for character in unicodedata.normalize("NFD", text):
        category = unicodedata.category(character)
        is_control = category.startswith("C")
        is_accent = category == "Mn"
        if not is_control and not is_accent and character != "\ufffd":
            kept += character
    return kept.lower()


def test_offsets_slice_back_to_the_word_pieces(tokenizer):
    found = ts.word_pieces(tokenizer, TEXTS)
    assert len(found) == len(TEXTS)
    for text, (ids, characters) in zip(TEXTS, found):
        assert len(ids) > 4
        spans = characters.tolist()
        assert spans == sorted(spans)

        # A character can be several word pieces, as 한 is three: they have one span together.
        word_at = collections.defaultdict(str)
        for piece_id, (begin, end) in zip(ids, spans, strict=True):
            word_at[begin, end] += VOCAB[piece_id].removeprefix("##")

        before = 0              # where the last span ended
        between = ""            # what is in no span
        for (begin, end), word in word_at.items():
            assert before <= begin < end <= len(text)
            assert word in ("[UNK]", plain(text[begin:end]))
            between += text[before:begin]
            before = end
        between += text[before:]
        assert not plain(between).strip()       # nothing to read

    fox = found[2][0]
    assert UNK in fox
    korean = found[5][0]
    assert VOCAB.index("ᄒ") in korean


def test_a_text_of_nothing_has_no_word_pieces(tokenizer):
    found = ts.word_pieces(tokenizer, [*TEXTS, "", " \n"])
    assert len(found) == len(TEXTS) + 2
    for ids, characters in found[len(TEXTS):]:
        assert len(ids) == 0
        assert len(characters) == 0


def test_a_passage_of_100000_characters(tokenizer):
    """Accents, emoji, right-to-left text, control characters: every word piece is in a window."""
    text = " ".join(TEXTS) * 60
    text = text[:100_000]
    assert len(text) == 100_000
    squad = squad_of((text, "moon " * 70, "moon", 0))
    features = Features(squad, tokenizer, Config(), training=False)
    assert features.cut == 1            # a question of 70 word pieces
    ids, characters = features.passages[0]
    assert len(ids) > 20_000

    seen = set()
    for window, (_, asked, first, count, _, _) in enumerate(features.rows.tolist()):
        assert asked == 64
        assert asked + count + 3 <= 384
        seen.update(range(first, first + count))
        # A window's first word piece, one in its middle and its last slice back to the passage.
        for k in (first, first + count // 2, first + count - 1):
            position = k - first + 66           # after [CLS], 64 of the question and [SEP]
            begin, end = characters[k]
            assert features.text(window, position, position) == text[begin:end]
    assert seen == set(range(len(ids)))


def questions_on(tokenizer, texts) -> ts.Squad:
    """Twelve questions on each text, with answers of up to six word pieces.

    Most answers go from one word piece's border to another's; some cut word pieces in two.
    """
    rng = random.Random(7)
    rows = []
    for text, n in itertools.product(texts, range(12)):
        offsets = tokenizer.encode(text, add_special_tokens=False).offsets
        first = rng.randrange(len(offsets))
        last = min(first + rng.randrange(6), len(offsets) - 1)
        begin = offsets[first][0]
        end = offsets[last][1]
        if n > 8 and plain(text[begin + 1:end - 1]).strip():
            begin += 1
            end -= 1
        question = " ".join(rng.choices(["the", "q", "☃", "moons?"], k=rng.randrange(9)))
        rows.append((text, question, text[begin:end], begin))
    return squad_of(*rows)


@dataclasses.dataclass
class Window:
    """What a window should be."""
    ids: list           # [CLS] question [SEP] part of the passage [SEP]
    head: int           # how many of them come before the passage
    count: int          # how many are of the passage
    label: list         # the answer's first and last position; [0, 0] if it is not wholly inside
    answer: str
    on_borders: bool    # whether the answer begins and ends where word pieces do

    def passage(self):
        return self.ids[self.head:self.head + self.count]


def windows_by_loop(tokenizer, question, passage, answer, start, config) -> list[Window]:
    """The windows of one question."""
    asked = tokenizer.encode(question, add_special_tokens=False).ids[:config.max_question]
    encoding = tokenizer.encode(passage, add_special_tokens=False)
    ids = encoding.ids
    end = start + len(answer)
    # The answer's word pieces: all that have a character of it.
    touched = [k for k, (a, b) in enumerate(encoding.offsets) if a < end and b > start]
    begins = [a for a, _ in encoding.offsets]
    ends = [b for _, b in encoding.offsets]
    on_borders = start in begins and end in ends

    head = len(asked) + 2
    windows = []
    first = 0
    while True:
        last = min(first + config.max_length - head - 1, len(ids))
        label = [0, 0]
        if first <= touched[0] and touched[-1] < last:
            label = [head + touched[0] - first, head + touched[-1] - first]
        whole = [CLS, *asked, SEP, *ids[first:last], SEP]
        windows.append(Window(whole, head, last - first, label, answer, on_borders))
        if last == len(ids):
            return windows
        first = last - config.stride


def all_windows_by_loop(tokenizer, squad, config) -> list[Window]:
    windows = []
    for _, question, p, [(answer, start)] in squad.questions:
        windows += windows_by_loop(tokenizer, question, squad.passages[p], answer, start, config)
    return windows


LENGTHS = pytest.mark.parametrize("max_length, stride, max_question",
                                  [(60, 17, 8), (23, 0, 11), (31, 9, 5)])


@LENGTHS
def test_windows_cover_the_passage_and_share_the_stride(
        tokenizer, max_length, stride, max_question):
    config = Config(max_length=max_length, stride=stride, max_question=max_question)
    squad = questions_on(tokenizer, TEXTS)
    features = Features(squad, tokenizer, config, training=True)
    lengths = []
    too_long = 0
    for _, question, p, [(answer, start)] in squad.questions:
        passage = squad.passages[p]
        windows = windows_by_loop(tokenizer, question, passage, answer, start, config)
        # Nothing is lost: without what they share, the parts are the passage again.
        parts = [window.passage() for window in windows]
        joined = list(parts[0])
        for part in parts[1:]:
            joined += part[stride:]
        assert joined == tokenizer.encode(passage, add_special_tokens=False).ids
        for part, following in zip(parts, parts[1:]):
            assert part[len(part) - stride:] == following[:stride]

        lengths += [len(window.ids) for window in windows]
        if len(tokenizer.encode(question, add_special_tokens=False)) > max_question:
            too_long += 1
    assert features.lengths.tolist() == lengths
    assert max(lengths) == max_length
    assert features.skipped == 0
    assert features.cut == too_long
    assert too_long > 0


@LENGTHS
def test_labels_masks_and_padding_of_batches(tokenizer, max_length, stride, max_question):
    config = Config(max_length=max_length, stride=stride, max_question=max_question)
    squad = questions_on(tokenizer, TEXTS)
    features = Features(squad, tokenizer, config, training=True)
    expected = all_windows_by_loop(tokenizer, squad, config)
    assert len(features) == len(expected)

    answers_on_borders = 0
    answers_within = 0
    order = np.random.default_rng(5).permutation(len(features))
    for indices in np.split(order, range(6, len(order), 6)):
        batch = features.batch(indices)
        T = max(len(expected[i].ids) for i in indices)
        for b, i in enumerate(indices):
            window = expected[i]
            head, count, length = window.head, window.count, len(window.ids)
            padding = T - length
            assert batch["ids"][b].tolist() == window.ids + [PAD] * padding
            assert batch["types"][b].tolist() == [0] * head + [1] * (count + 1) + [0] * padding
            assert batch["real"][b].tolist() == [1] * length + [0] * padding
            assert batch["context"][b].tolist() == [0] * head + [1] * count + [0] * (1 + padding)
            assert [batch["start"][b], batch["end"][b]] == window.label

            if window.label == [0, 0]:
                continue
            text = features.text(i, *window.label)
            if window.on_borders:
                answers_on_borders += 1
                assert text == window.answer
            else:
                answers_within += 1
                assert plain(window.answer).strip() in plain(text)
    # Enough of each kind, and enough windows without an answer.
    assert answers_on_borders > 9
    assert answers_within > 9
    assert 60 < answers_on_borders + answers_within < len(features) - 60


def test_what_is_skipped_and_what_has_no_label(tokenizer):
    squad = squad_of(
        ("the moon", "q", "moon", 4),
        ("the moon", "q", "moon", 3),       # not there
        ("a stone", "q", "stone", -5),      # nor there, though Python finds it at −5
        (" ", "q", " ", 0),                 # no word piece in it
        ("", "q", "x", 0),
        ("a stone", "q", "ton", 3),         # inside a word piece
    )
    features = Features(squad, tokenizer, Config(), training=True)
    assert len(features) == 2
    assert features.skipped == 4
    # [CLS] q [SEP] and then the passage: its second word piece is at position 4.
    assert features.text(0, 4, 4) == "moon"
    assert features.text(1, 4, 4) == "stone"

    # To be scored, all are there.
    batch = Features(squad, tokenizer, Config(), training=False).batch(np.arange(6))
    assert not batch["start"].any()
    assert not batch["end"].any()
    assert batch["context"].sum(1).tolist() == [2, 2, 2, 0, 0, 2]
    assert batch["ids"][4].tolist() == [CLS, VOCAB.index("q"), SEP, SEP, PAD, PAD]

    nothing_left = squad_of(("the moon", "q", "sun", 4))
    with pytest.raises(ValueError, match="no question has an answer at its offset"):
        Features(nothing_left, tokenizer, Config(), training=True)


@needs("dev-v1.1.json")
@pytest.mark.skipif(not WEIGHTS.is_dir(), reason="no vocabulary of BERT in weights/minilm")
@pytest.mark.parametrize("part, windows, questions",
                         [("dev", 10_784, 10_570), ("train", 88_524, 87_599)])
def test_windows_of_the_real_squad(part, windows, questions):
    """As many as Hugging Face's run_qa.py makes at 384/128. The one slow test: 15 s."""
    squad = ts.read_squad(SQUAD, f"{part}-v1.1.json")
    features = Features(squad, load_tokenizer(WEIGHTS), Config(), training=True)
    assert len(squad.questions) == questions
    assert len(features) == windows
    assert features.skipped == 0
    assert features.cut == 0

    labelled = 0
    exact = 0
    for i, (q, _, _, _, first, last) in enumerate(features.rows.tolist()):
        if first == 0 and last == 0:
            continue
        _, _, _, answers = squad.questions[q]
        answer, _ = answers[0]
        text = features.text(i, first, last)
        assert answer in text
        labelled += 1
        exact += answer == text
    assert labelled > 0.99 * questions
    assert exact > 0.99 * labelled


def slots(batches, lengths):
    """How many word pieces batches have, padding counted."""
    return sum(len(batch) * lengths[batch].max() for batch in batches)


# 1,234 windows, and so 176 batches of 7 and one of 2. One window is much longer than all others.
WINDOW_LENGTHS = np.append(np.random.default_rng(1).integers(20, 384, 1233), 700)


def test_training_batches_hold_every_window_once():
    lengths = WINDOW_LENGTHS
    batches = ts.training_batches(lengths, 7, 3, 0)
    again = ts.training_batches(lengths, 7, 3, 0)
    next_epoch = ts.training_batches(lengths, 7, 3, 1)
    other_seed = ts.training_batches(lengths, 7, 4, 0)
    for found in (batches, next_epoch, other_seed):
        assert sorted(np.concatenate(found)) == list(range(1234))
        assert sorted(map(len, found)) == [2] + [7] * 176

    # A seed and an epoch always give the same order, another seed or epoch another one.
    assert [batch.tolist() for batch in batches] == [batch.tolist() for batch in again]
    orders = {np.concatenate(found).tobytes() for found in (batches, next_epoch, other_seed)}
    assert len(orders) == 3

    # Windows of like lengths are together: little padding. In order as they come there is much.
    unsorted = np.split(np.arange(1234), range(7, 1234, 7))
    assert slots(batches, lengths) < 1.1 * lengths.sum()
    assert slots(unsorted, lengths) > 1.5 * lengths.sum()
    # Short and long batches take turns.
    longest = [lengths[batch].max() for batch in batches]
    correlation = np.corrcoef(longest[1:], longest[:-1])[0, 1]
    assert abs(correlation) < 0.3


def test_evaluation_batches_fill_their_budget():
    lengths = WINDOW_LENGTHS
    batches = ts.evaluation_batches(lengths, "cpu")
    assert sorted(np.concatenate(batches)) == list(range(1234))
    for batch, following in zip(batches, batches[1:]):
        assert slots([batch], lengths) <= 2048
        assert len(batch) > 1
        # No room was left for the next window.
        assert (len(batch) + 1) * lengths[following[0]] > 2048
    # What is over the budget by itself is alone.
    first = ts.evaluation_batches(np.array([9000, 9000]), "cpu")[0]
    assert first.tolist() == [0]
    assert len(ts.evaluation_batches(lengths, "cuda")) * 20 < len(batches)


# ------------------------------------------------------------------------------ best spans, metrics


def spans_by_loop(start, end, context, longest):
    """Score, i and j of every allowed pair of one window."""
    spans = []
    for i in range(len(start)):
        for j in range(i, min(i + longest, len(end))):
            if context[i] and context[j]:
                spans.append(((start[i] + end[j]).item(), i, j))
    return spans


@pytest.mark.parametrize("longest", [1, 4, 13, 30])
@pytest.mark.parametrize("ties", [False, True])
def test_best_spans_are_the_best_of_all_pairs(longest, ties):
    if ties:
        start, end = torch.randint(-3, 2, (2, 50, 13)).float()
    else:
        start, end = torch.randn(2, 50, 13)
    # From row to row more of the window is passage; nothing is in the first row.
    context = torch.rand(50, 13) < torch.linspace(0, 1, 50)[:, None]
    best, best_i, best_j = ts.best_spans(start, end, context, longest)
    for b in range(50):
        score = best[b].item()
        allowed = spans_by_loop(start[b], end[b], context[b], longest)
        if not allowed:
            assert score == -math.inf
            assert b < 25
            continue
        highest, _, _ = max(allowed)
        assert score == highest
        assert (score, best_i[b].item(), best_j[b].item()) in allowed


def test_predict_takes_the_best_span_of_all_windows(tokenizer):
    squad = questions_on(tokenizer, TEXTS)
    squad.passages[3] = ""
    config = Config(max_length=41, stride=11, max_question=9, max_answer=5, precision="fp32",
                    device="cpu")
    features = Features(squad, tokenizer, config, training=False)
    model = tiny().train()
    found = ts.predict(model, features, config)         # in batches, in eval mode

    # The same, one window at a time and so without padding.
    model.eval()
    best = {}                   # (text, score) by question
    improved = set()            # questions whose best span is not in their first window
    for window, q in enumerate(features.rows[:, 0]):
        batch = features.batch(np.array([window]))
        with torch.no_grad():
            start, end = model(batch["ids"], batch["types"])
        best.setdefault(f"q{q}", ("", -math.inf))
        spans = spans_by_loop(start[0], end[0], batch["context"][0], 5)
        if not spans:
            continue
        score, i, j = max(spans)
        _, score_before = best[f"q{q}"]
        if score > score_before:
            if score_before > -math.inf:
                improved.add(q)
            best[f"q{q}"] = (features.text(window, i, j), score)
    assert len(improved) > 9
    assert set(found) == set(best)
    for question_id, (text, score) in best.items():
        assert found[question_id] == (text, pytest.approx(score, abs=1e-4))
    assert found["q3"] == ("", -math.inf)


def official_words(text):
    """What evaluate-v1.1.py makes of an answer, without regular expressions."""
    kept = [c for c in text.lower() if c not in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"]
    without_articles = ""
    # Runs of letters and digits, and what is between them.
    for _, run in itertools.groupby(kept, str.isalnum):
        run = "".join(run)
        if run in ("a", "an", "the"):
            run = " "
        without_articles += run
    return without_articles.split()


def official_f1(prediction, truth):
    """Of two lists of words, without counters: each word of the truth is found once."""
    rest = list(truth)
    shared = 0
    for word in prediction:
        if word in rest:
            rest.remove(word)
            shared += 1
    if shared == 0:
        return 0
    precision = shared / len(prediction)
    recall = shared / len(truth)
    return 2 * precision * recall / (precision + recall)


def official(predictions, truths):
    """evaluate-v1.1.py in our words: the best over a question's answers, meaned over questions."""
    exact = 0
    f1 = 0
    for question_id, answers in truths.items():
        if question_id not in predictions:      # counts as 0
            continue
        predicted = official_words(predictions[question_id])
        accepted = [official_words(answer) for answer in answers]
        exact += predicted in accepted
        f1 += max(official_f1(predicted, words) for words in accepted)
    return {"exact_match": 100 * exact / len(truths), "f1": 100 * f1 / len(truths)}


@pytest.mark.parametrize("text, normal", [
    ("The  Cat, the\tDOG!", "cat dog"),
    ("a an the", ""),
    ("an-apple a.b", "anapple ab"),
    ("“the ÉTÉ”", "“ été”"),
    ("U.S.A. (1990–91)", "usa 1990–91"),
    ("theatre a1", "theatre a1"),
    ("İ the\u00a0x\u3000y", "i̇ x y"),
    ("a\u0301 b", "\u0301 b"),
    ("the_end $5 a'an", "theend 5 aan"),
])
def test_normalized_answers_by_hand(text, normal):
    assert ts.normalize_answer(text) == normal


def test_metrics_by_hand():
    # Of y x q x and x y z the words x and y are shared: precision 2/4, recall 2/3.
    expected = 2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3)
    assert ts.token_f1("y x q x", "x y z") == pytest.approx(expected)
    assert ts.token_f1("", "the") == 0
    assert ts.token_f1("x x x", "x x") == pytest.approx(0.8)

    truths = {"1": ["the red cat", "cat"], "2": ["a dog"], "3": ["x y z"], "4": ["The!"],
              "5": ["never"]}
    found = {"1": "Cat.", "2": "", "3": "y x q x", "4": "", "other": "never"}
    # 1: the better of two answers. 4: nothing is left of both: exact, and F1 0. 5: no prediction.
    exact_match = 100 * 2 / 5
    f1 = 100 * (1 + 4 / 7) / 5
    assert ts.score(found, truths) == pytest.approx({"exact_match": exact_match, "f1": f1})


def as_file(truths, context="x"):
    """Questions in SQuAD's form, on one passage. truths: the answers by question id."""
    qas = []
    for question_id, texts in truths.items():
        answers = [{"text": text, "answer_start": 0} for text in texts]
        qas.append({"id": question_id, "question": "?", "answers": answers})
    return {"data": [{"paragraphs": [{"context": context, "qas": qas}]}]}


def test_score_is_that_of_the_official_scorer(tmp_path, capsys):
    """On 2,000 questions of random signs and articles, one at a time, and all from a file."""
    rng = random.Random(4)
    parts = list("aAxXy.,-_²’\u00a0\t   ") + ["an", "The", "the", "e\u0301", "é", "İ"]

    def random_text():
        return "".join(rng.choices(parts, k=rng.randrange(9)))

    truths = {}
    found = {}
    for n in range(2000):
        texts = [random_text() for _ in range(rng.randrange(1, 4))]
        truths[str(n)] = texts
        if n != 7:      # which has no prediction
            found[str(n)] = rng.choice([random_text(), texts[0].upper() + ".", texts[-1] + " x"])
    for question_id, texts in truths.items():
        one = {question_id: texts}
        expected = pytest.approx(official(found, one))
        assert ts.score(found, one) == expected, (found.get(question_id), texts)

    write_file(tmp_path / "found.json", found)
    write_file(tmp_path / "dev.json", as_file(truths))
    assert ts.main(["--score", f"{tmp_path}/found.json", f"{tmp_path}/dev.json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == pytest.approx(official(found, truths))
    # Neither all right nor all wrong, and the two measures differ.
    assert printed["exact_match"] > 20
    assert printed["f1"] < 80
    assert printed["exact_match"] != printed["f1"]

    assert ts.main(["--score", "none.json", f"{tmp_path}/dev.json"]) == 2
    assert "none.json" in capsys.readouterr().err


@needs("bert_ensemble_dev_predictions.json")
def test_published_predictions_score_as_published(tmp_path, capsys):
    packed = (SQUAD / "bert_ensemble_dev_predictions.json.xz").read_bytes()
    raw = lzma.decompress(packed)
    (tmp_path / "found.json").write_bytes(raw)
    assert ts.main(["--score", f"{tmp_path}/found.json", f"{SQUAD}/dev-v1.1.json"]) == 0
    published = {"exact_match": 86.206, "f1": 92.196}
    assert json.loads(capsys.readouterr().out) == pytest.approx(published, abs=5e-4)

    truths = ts.read_squad(SQUAD, "dev-v1.1.json").truths()
    found = json.loads(raw)
    for question_id, (exact, f1) in ts.question_scores(found, truths).items():
        expected = official(found, {question_id: truths[question_id]})
        assert {"exact_match": 100 * exact, "f1": 100 * f1} == pytest.approx(expected)


# ----------------------------------------------------------------------- v2: no answer is an answer


def official_v2_pair(prediction, answer):
    """Exact match and F1 of one prediction and one answer, in percent."""
    predicted = official_words(prediction)
    true = official_words(answer)
    if predicted and true:
        # Both scorers agree where words are left on both sides.
        scores = official({"q": prediction}, {"q": [answer]})
        return scores["exact_match"], scores["f1"]
    # No text equals no text alone.
    if predicted == true:
        return 100.0, 100.0
    return 0.0, 0.0


def official_v2(predictions, truths):
    """evaluate-v2.0.py in our words: a question without a prediction is left out."""
    exact = {}
    f1 = {}
    for question_id, answers in truths.items():
        if question_id not in predictions:
            continue
        accepted = [answer for answer in answers if official_words(answer)]
        if not accepted:
            accepted = [""]
        pairs = [official_v2_pair(predictions[question_id], answer) for answer in accepted]
        exact[question_id] = max(pair_exact for pair_exact, _ in pairs)
        f1[question_id] = max(pair_f1 for _, pair_f1 in pairs)

    groups = {
        "": list(exact),
        "HasAns_": [question_id for question_id in exact if truths[question_id]],
        "NoAns_": [question_id for question_id in exact if not truths[question_id]],
    }
    means = {}
    for name, group in groups.items():
        number = max(1, len(group))
        means[f"{name}exact_match"] = sum(exact[question_id] for question_id in group) / number
        means[f"{name}f1"] = sum(f1[question_id] for question_id in group) / number
    return means


def test_metrics_of_v2_by_hand():
    truths = {"1": ["the red cat"], "2": [], "3": ["x"], "4": [], "5": ["a the"], "6": [],
              "7": ["y"]}
    found = {"1": "Cat", "2": "", "3": "", "4": "the dog", "5": "", "6": "The."}
    # 1: F1 2 · 1 · ½ / 1½. 5: an answer of articles alone is none. 6: so is such a prediction.
    # 7: not predicted, left out.
    expected = {
        "exact_match": 100 * 3 / 6, "f1": 100 * (2 / 3 + 3) / 6,
        "HasAns_exact_match": 100 / 3, "HasAns_f1": 100 * (2 / 3 + 1) / 3,
        "NoAns_exact_match": 200 / 3, "NoAns_f1": 200 / 3,
    }
    assert ts.score(found, truths) == pytest.approx(expected)
    assert ts.score(found, truths) == official_v2(found, truths)


def test_unanswerable_questions_aim_at_cls(tokenizer, tmp_path):
    tree = as_file({"yes": ["moon"], "no": []}, "moon stone")
    tree["data"][0]["paragraphs"][0]["qas"][1]["is_impossible"] = True
    write_file(tmp_path / "train-v2.0.json", tree)
    squad = ts.read_squad(tmp_path, ts.file_name("train", v2=True))
    features = Features(squad, tokenizer, Config(), training=True)
    # [CLS] [UNK] [SEP] moon stone [SEP]; the question "?" is one word piece
    assert features.rows[:, 4:].tolist() == [[3, 3], [0, 0]]
    assert features.skipped == 0


class FixedLogits(nn.Module):
    """A model that has these logits to give, whatever it is asked."""

    def __init__(self, start, end):
        super().__init__()
        self.logits = (start, end)

    def forward(self, ids, types, real):
        return self.logits


@pytest.mark.parametrize("threshold, given", [
    (0.0, ["", "moon", ""]),
    (3.5, ["", "moon", "stone"]),
    (-9.0, ["", "", ""]),
])
def test_no_answer_is_given_where_cls_beats_the_best_span(tokenizer, threshold, given):
    """Of the third question [CLS] has 2 + 3, and the best span 1 + 1: 3 less."""
    squad = squad_of(*[("moon stone", "?", "moon", 0)] * 3)
    features = Features(squad, tokenizer, Config(), training=False)
    # Logits of            [CLS] [UNK] [SEP] moon stone [SEP]
    start = torch.tensor([[7.0, 9, 9, 1, 0, 9],
                          [2.0, 9, 9, 4, 0, 9],
                          [2.0, 9, 9, 0, 1, 9]])
    end = torch.tensor([[7.0, 9, 9, 1, 0, 9],
                        [2.0, 9, 9, 1, 0, 9],
                        [3.0, 9, 9, 0, 1, 9]])
    model = FixedLogits(start, end)
    config = Config(v2=True, null_threshold=threshold, precision="fp32", device="cpu")
    found = ts.predict(model, features, config)
    assert list(found.values()) == list(zip(given, (2, 5, 2)))

    config.v2 = False
    found = ts.predict(model, features, config)
    assert [text for text, _ in found.values()] == ["moon", "moon", "stone"]


def test_the_least_null_score_of_a_questions_windows_counts(tokenizer):
    """Two windows: the first is sure that there is nothing, the second finds it, and says so."""
    config = Config(v2=True, max_length=8, stride=2, max_question=1, precision="fp32",
                    device="cpu")
    squad = squad_of(("moon moon moon moon stone stone", "?", "moon", 0))
    features = Features(squad, tokenizer, config, training=False)
    assert features.rows[:, 2:4].tolist() == [[0, 4], [2, 4]]     # 8 − 3 − 1 word pieces a window
    # Logits of             [CLS] [UNK] [SEP] and four word pieces [SEP]
    logits = torch.tensor([[20.0, 0, 0, 0, 0, 0, 0, 0],
                           [1.0, 0, 0, 0, 0, 0, 4, 0]])
    assert ts.predict(FixedLogits(logits, logits), features, config) == {"q0": ("stone", 8)}


@needs("dev-v2.0.json")
def test_the_real_dev_set_of_v2():
    truths = ts.read_squad(SQUAD, ts.file_name("dev", v2=True)).truths()
    assert len(truths) == 11_873
    assert sum(not answers for answers in truths.values()) == 5_945

    # Half of the questions have no answer, so to give none is half right.
    nothing = ts.score(dict.fromkeys(truths, ""), truths)
    assert nothing["NoAns_f1"] == 100
    assert nothing["HasAns_f1"] == 0
    assert nothing["f1"] == pytest.approx(100 * 5_945 / 11_873)

    rng = random.Random(2)
    found = {}
    for question_id, answers in truths.items():
        found[question_id] = rng.choice(["", *answers, "the", "Some " + "".join(answers)])
    assert ts.score(found, truths) == pytest.approx(official_v2(found, truths))


# ---------------------------------------------------------------------------- files in SQuAD's form


def test_plain_and_packed_files(tmp_path):
    tree = as_file({"q0": ["x0", "x"], "q1": ["x1"]})
    tree["data"] += as_file({"last": ["the"]}, "the end")["data"]
    write_file(tmp_path / "plain.json", tree)
    packed = lzma.compress((tmp_path / "plain.json").read_bytes())
    (tmp_path / "packed.json.xz").write_bytes(packed)
    squad = ts.read_squad(tmp_path, "plain.json")
    assert squad == ts.read_squad(tmp_path, "packed.json")
    assert squad.passages == ["x", "the end"]
    assert squad.questions == [
        ("q0", "?", 0, [("x0", 0), ("x", 0)]),
        ("q1", "?", 0, [("x1", 0)]),
        ("last", "?", 1, [("the", 0)]),
    ]
    assert squad.truths() == {"q0": ["x0", "x"], "q1": ["x1"], "last": ["the"]}


def test_a_limit_takes_the_first_of_a_seeded_shuffle(tmp_path):
    write_file(tmp_path / "plain.json", as_file({f"q{n}": [f"x{n}"] for n in range(10)}))
    everything = ts.read_squad(tmp_path, "plain.json").questions

    def questions(limit, seed=5):
        return ts.read_squad(tmp_path, "plain.json", limit, seed).questions

    shuffled = questions(10)
    assert shuffled != everything
    assert sorted(shuffled) == sorted(everything)
    assert questions(99) == shuffled
    # A higher limit has the questions of a lower one, and more.
    for limit in (1, 4, 7):
        assert questions(limit) == shuffled[:limit]
    assert questions(7, seed=6) != questions(7)


IN_PARAGRAPH = r"data\[0\]\.paragraphs\[0\]"


@pytest.mark.parametrize("old, new, message", [
    ('"data"', '"date"', "the file has no 'data' that is a list"),
    ('[{"par', '[3, {"par', r"data\[0\] has no 'paragraphs'"),
    ('"context": "x"', '"context": 7', IN_PARAGRAPH + " has no 'context' that is a str"),
    ('"id": "two"', '"i": 2', IN_PARAGRAPH + r"\.qas\[1\] has no 'id' that is a str"),
    ('"answer_start": 0', '"answer_start": true',
     IN_PARAGRAPH + r"\.qas\[0\]\.answers has no 'answer_start' that is a int"),
    ('"answers": [{', '"answers": [], "more": [{', IN_PARAGRAPH + r"\.qas\[0\] has no answer"),
    ('"qas": [', '"qas": [], "more": [', "no question in it"),
    ("]}]}]}", "]}]}]", "cut off, or not JSON"),
])
def test_a_file_that_is_not_squad_is_refused(tmp_path, old, new, message):
    """With the place of what is wrong. A sound file is changed in one place, from old to new."""
    text = json.dumps(as_file({"one": ["x"], "two": ["x"]}))
    assert old in text
    (tmp_path / "dev.json").write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        ts.read_squad(tmp_path, "dev.json")


def test_a_packed_file_that_is_cut_off_and_a_missing_one_are_refused(tmp_path):
    packed = lzma.compress(json.dumps(as_file({"one": ["x"]})).encode())
    (tmp_path / "cut.json.xz").write_bytes(packed[:-9])
    with pytest.raises(ValueError, match="cut off, or not JSON"):
        ts.read_squad(tmp_path, "cut.json")
    with pytest.raises(FileNotFoundError, match="neither none.json nor none.json.xz"):
        ts.read_squad(tmp_path, "none.json")


@pytest.fixture(scope="module")
def builtin(tmp_path_factory):
    """The built-in corpus, as its training and its dev questions."""
    folder = tmp_path_factory.mktemp("builtin")
    ts.write_builtin(folder)
    train = ts.read_squad(folder, "train-v1.1.json")
    dev = ts.read_squad(folder, "dev-v1.1.json")
    return train, dev


def test_the_built_in_corpus_is_drawn_from_its_seed(builtin):
    assert ts.builtin_corpus(9, 4) == ts.builtin_corpus(9, 4)
    assert ts.builtin_corpus(9, 4) != ts.builtin_corpus(9, 5)
    train, dev = builtin
    assert not set(train.passages) & set(dev.passages)
    # Every id is there once.
    questions = len(train.questions) + len(dev.questions)
    assert questions > 2000
    assert len(train.truths() | dev.truths()) == questions


def test_where_a_statement_stands_tells_nothing(builtin):
    """Of four statements in a passage, each is asked about as often as the others."""
    train, _ = builtin
    places = collections.Counter()
    for _, _, p, [(_, start)] in train.questions:
        statements_before = train.passages[p][:start].count(".")
        places[statements_before] += 1
    assert set(places) == {0, 1, 2, 3}
    for times in places.values():
        assert 450 < times < 600


def statements(passage):
    """What a passage says, as (name, fact) → value."""
    said = {}
    for sentence in passage.removesuffix(".").split(". "):
        for fact in ts.FACTS:
            found = re.fullmatch(r"(\w+ \w+) " + fact.replace("{}", r"(\w+)"), sentence)
            if found:
                name, value = found.groups()
                said[name, fact] = value
    return said


@pytest.mark.parametrize("part", [0, 1], ids=["train", "dev"])
def test_a_built_in_question_needs_both_the_name_and_the_relation(builtin, part):
    squad = builtin[part]
    for _, question, p, [(answer, start)] in squad.questions:
        passage = squad.passages[p]
        said = statements(passage)
        assert len(said) == passage.count(".")
        assert len(set(said.values())) == len(said)         # no two people share a value

        # The question is about one statement, and the answer is that statement's value.
        asked = []
        for name, fact in said:
            form, _ = ts.FACTS[fact]
            if form.format(name) == question:
                asked.append((name, fact))
        assert len(asked) == 1
        assert said[asked[0]] == answer
        assert passage[start:].split(".")[0] == answer

        # Other facts are told of the same person, and the same fact of another person.
        asked_name, asked_fact = asked[0]
        other_facts = [fact for name, fact in said if name == asked_name and fact != asked_fact]
        other_people = [name for name, fact in said if name != asked_name and fact == asked_fact]
        assert other_facts
        assert other_people
        assert len(re.findall(r"\w+|\.", passage)) <= 32


# ------------------------------------------------------------------ masks, loss, filling, schedules


@pytest.mark.parametrize("method, tensors, scores", [
    ("hybrid", 60, 64_512),                 # 12 layers × (4 matrices of 24 × 24, and 3,072)
    ("block", 72, 82_944),                  # 12 × (4 × 24 × 24 + 2 × 24 × 96)
    ("struct", 24, 144 + 36_864),           # 12 × (12 heads, and 3,072)
    ("unstructured", 72, 84_934_656),       # 12 × (4 × 768 × 768 + 2 × 768 × 3,072)
])
def test_distinct_scores_of_bert_base(method, tensors, scores):
    """At 32x32, over 12 layers of six matrices."""
    with torch.device("meta"):  # which holds no numbers
        model = BertForQuestionAnswering(BertConfig())
        ts.add_masks(model, method, "32x32")
    assert len(list(masks(model))) == 12 * 6
    distinct = {id(mask.owner): mask.owner.scores.numel() for mask in masks(model)}
    assert len(distinct) == tensors
    assert sum(distinct.values()) == scores


@pytest.mark.parametrize("method, query, out, fc1, fc2", [
    ("hybrid", (2, 3), (3, 2), (1, 12), (12, 1)),
    ("block", (2, 3), (3, 2), (2, 3), (2, 3)),
    ("struct", (4, 12), (12, 4), (1, 12), (12, 1)),
    ("unstructured", (1, 1), (1, 1), (1, 1), (1, 1)),
])
def test_blocks_of_each_method(method, query, out, fc1, fc2):
    """Of a tiny model at 2x3, and which masks share their scores. key and value are as query."""
    model = masked(method)
    assert len(list(masks(model))) == 2 * 6     # and so none elsewhere
    for layer in model.bert.layers:
        attention, ffn = layer.attention, layer.ffn
        linears = [attention.query, attention.key, attention.value, attention.out, ffn.fc1, ffn.fc2]
        found = [linear.parametrizations.weight[0] for linear in linears]
        assert [mask.block for mask in found] == [query, query, query, out, fc1, fc2]
        assert [mask.kind for mask in found] == ["attention"] * 4 + ["ffn"] * 2

        scores_of_attention = {id(mask.owner) for mask in found[:4]}
        share_a_head = method == "struct"
        assert len(scores_of_attention) == (1 if share_a_head else 4)
        share_a_dimension = found[4].owner is found[5].owner
        assert share_a_dimension == (method in ("hybrid", "struct"))


def test_struct_prunes_a_head_in_all_its_matrices():
    model = masked("struct")
    set_threshold(model, 0.1)
    for layer in model.bert.layers:
        attention = layer.attention
        scores = attention.query.parametrizations.weight[0].scores
        scores.data[1] = -9         # the second of three heads of size 4
        expected = [True] * 4 + [False] * 4 + [True] * 4
        for linear in (attention.query, attention.key, attention.value):
            assert linear.weight.any(dim=1).tolist() == expected
        assert attention.out.weight.any(dim=0).tolist() == expected
        assert attention.value.bias.bool().tolist() == expected


def softmax_by_loop(logits, T):
    powers = [math.exp(logit / T) for logit in logits]
    total = sum(powers)
    return [power / total for power in powers]


def loss_by_loop(student, teacher, real, labels, T):
    """Cross entropy and distillation, position by position, in Python's double precision."""
    ce = 0
    kd = 0
    B = len(real)
    for side in (0, 1):         # where the answer starts, and where it ends
        for b in range(B):
            positions = [t for t in range(len(real[b])) if real[b, t]]
            student_logits = [student[side, b, t].item() for t in positions]
            teacher_logits = [teacher[side, b, t].item() for t in positions]
            # −log of the probability of the label
            label = labels[side, b]
            ce -= math.log(softmax_by_loop(student_logits, 1)[label])
            # T² · Σ p · log(p / q)
            teacher_p = softmax_by_loop(teacher_logits, T)
            student_p = softmax_by_loop(student_logits, T)
            for p, q in zip(teacher_p, student_p):
                kd += T ** 2 * p * math.log(p / q)
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
    expected_ce, expected_kd = loss_by_loop(student, teacher, real, labels, T)
    assert ce.item() == pytest.approx(expected_ce, rel=1e-5)
    assert kd.item() == pytest.approx(expected_kd, rel=1e-5)

    # Real tokens have a gradient, padding has none.
    (ce + kd).backward()
    assert student.grad.isfinite().all()
    assert student.grad[:, real].any()
    assert not student.grad[:, ~real].any()

    # Six columns of padding more, with garbage in them, change nothing.
    def padded(logits):
        garbage = 99 * torch.randn(2, B, 6)
        return tuple(torch.cat([logits, garbage], dim=2))

    no_token = torch.zeros(B, 6, dtype=torch.bool)
    longer = {**batch, "real": torch.cat([real, no_token], dim=1)}
    assert_close(ts.loss_terms(padded(student), padded(teacher), longer, T), (ce, kd))

    # The loss is in fp32, whatever comes; without a teacher there is no distillation.
    ce_of_bf16, none = ts.loss_terms(tuple(student.bfloat16()), None, batch, T)
    assert none.item() == 0
    assert ce_of_bf16.dtype == torch.float32
    assert ce_of_bf16.item() == pytest.approx(ce.item(), rel=0.02)


def test_refill_replaces_zeros_and_nothing_else():
    model = tiny(hidden_size=60, intermediate_size=200)
    query = model.bert.layers[1].attention.query.weight
    key = model.bert.layers[1].attention.key.weight
    fc1 = model.bert.layers[0].ffn.fc1
    with torch.no_grad():
        query += 2
        query[:40] = 0          # 2,400 zeros, and 1,200 numbers about 2
        key.zero_()             # nothing but zeros
        # Zeros here and there.
        fc1.weight[3] = 0
        model.bert.norm.weight[5] = 0
        fc1.bias[7] = 0
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
    # Where all of W is zero, the spread is that of BERT's initializer_range, 0.02.
    assert key.std().item() == pytest.approx(0.01 * 0.02, rel=0.05)


def test_learning_rate_by_step():
    rates = [ts.learning_rate_factor(step, 10, 4) for step in range(10)]
    assert rates == pytest.approx([1/4, 2/4, 3/4, 1, 1, 5/6, 4/6, 3/6, 2/6, 1/6])
    rates = [ts.learning_rate_factor(step, 4, 0) for step in range(4)]
    assert rates == pytest.approx([1, 3/4, 2/4, 1/4])
    # The paper's, where τ becomes final.
    assert ts.learning_rate_factor(56_660, 110_660, 5_400) == pytest.approx(0.513, abs=5e-4)


def paper(**changes) -> Config:
    """The paper's settings for Hybrid, but for some changes."""
    return dataclasses.replace(ts.settle(Config(method="hybrid", preset="paper")), **changes)


def test_the_papers_threshold_by_step():
    """τ rises from one warm-up on to ten warm-ups before the end."""
    config = paper()
    assert ts.plan(config, 88_524) == (110_660, 5_400)
    # At the beginning of the rise, after each quarter of it.
    steps = (5_400, 18_215, 31_030, 43_845, 56_660)
    tau = [ts.threshold_and_lambda(step, config, 110_660, 5_400)[0] for step in steps]
    assert tau == pytest.approx([0, 0.0578, 0.0875, 0.0984, 0.1], abs=5e-5)


def test_the_threshold_of_another_schedule_by_step():
    other = paper(initial_warmup=2, final_warmup=3, threshold=0.2, epochs=0.5, batch=7,
                  warmup_steps=None)
    fast = dataclasses.replace(other, score_lr=9)
    assert ts.plan(fast, 13_990) == (1000, 50)      # half of 1,999 steps, and 5 % of that
    dense = dataclasses.replace(other, method="dense")
    assert ts.plan(dense, 3) == (2, 0)              # two at least
    # τ is flat for two warm-ups, 100 steps, and for three, 150; 475 is half of the way.
    tau = [ts.threshold_and_lambda(step, other, 1000, 50)[0] for step in (0, 100, 475, 851, 999)]
    assert tau == pytest.approx([0, 0, 0.2 * (1 - 1 / 8), 0.2, 0.2])
    # 250 steps, all of them flat.
    too_long = dataclasses.replace(other, warmup_steps=50)
    with pytest.raises(ValueError, match="no step is left"):
        ts.plan(too_long, 250 * 7 * 2)


def test_a_run_too_short_to_prune_is_refused():
    """How far a score can fall is the sum of the scores' learning rates over all steps."""
    def plan(total, **changes):
        config = paper(epochs=1, warmup_steps=total // 20, **changes)
        return ts.plan(config, 16 * total)

    for total, reach in [(120, 0.60), (250, 1.25), (440, 2.20), (590, 2.95)]:
        with pytest.raises(ValueError, match=r"nothing could be pruned.* goes at -2.20") as error:
            plan(total)
        said = re.search(r"-(\d\.\d\d),", str(error.value))[1]
        assert float(said) == pytest.approx(reach, abs=0.02)
    assert plan(610) == (610, 30)
    with pytest.raises(ValueError, match="goes at -4.60"):      # a lower τ is further down
        plan(850, threshold=0.01)


# -------------------------------------------------------------------------------- settings, folders

STAGES = pytest.mark.parametrize("stage", [{}, {"method": "hybrid"}, {"fill": True}],
                                 ids=["dense", "prune", "fill"])


@STAGES
@pytest.mark.parametrize("preset", ["builtin", "small", "paper"])
def test_a_preset_fills_what_its_stage_needs(stage, preset):
    may_stay_none = {"questions", "dev_questions", "warmup_steps"}
    if "method" not in stage:
        may_stay_none |= {"score_lr", "final_lambda"}
    config = Config(preset=preset, **stage)
    settled = ts.settle(config)
    for name, value in vars(settled).items():
        assert value is not None or name in may_stay_none
    # What is given stays, and settle() changes a copy.
    assert ts.settle(dataclasses.replace(config, lr=7)).lr == 7
    assert config == Config(preset=preset, **stage)


@STAGES
def test_the_papers_settings(stage):
    c = ts.settle(Config(preset="paper", **stage))
    assert (c.lr, c.batch, c.initial_warmup, c.final_warmup) == (3e-5, 16, 1, 10)
    assert (c.threshold, c.attention_lambda) == (0.1, 1)
    assert (c.alpha_ce, c.alpha_kd, c.temperature) == (0.1, 0.9, 2)
    assert (c.clip, c.weight_decay, c.attention_dropout) == (1, 0, 0.1)
    assert (c.max_length, c.stride, c.max_answer, c.seed) == (384, 128, 30, 17)
    _, warmup = ts.plan(c, 88_524)
    if "method" in stage:
        assert (c.epochs, warmup) == (20, 5400)
        assert c.score_lr == 1e-2
        assert c.ffn_lambda == 0.25         # the headline model's
    elif "fill" in stage:
        assert (c.epochs, warmup) == (4, 10)
        assert c.score_lr is None
        assert c.ffn_lambda == 1
    else:
        assert (c.epochs, warmup) == (2, 553)
        assert c.score_lr is None
        assert c.ffn_lambda == 1


def test_presets_by_method_and_by_data():
    assert ts.settle(Config(method="struct")).attention_lambda == 0.05
    assert ts.settle(Config(data="x/builtin")).preset == "builtin"
    assert ts.settle(Config(data="x/squad")).preset == "small"


@pytest.mark.parametrize("settings, message", [
    ({"batch": 0}, "--batch 0: it must be over 0"),
    ({"lr": -1.0}, "--lr -1.0"),
    ({"questions": -3}, "--questions -3"),
    ({"weight_decay": -0.1}, "--weight-decay -0.1: it must be 0 or more"),
    ({"epochs": math.nan}, "--epochs nan"),
    ({"lr": math.inf}, "--lr inf"),
    ({"threshold": 0.5}, "--threshold 0.5: it must be under 0.5"),
    ({"block": "4"}, "--block 4"),
    ({"block": "0x4"}, "--block 0x4"),
    ({"max_length": 195}, "--max-length 195"),
    ({"stride": 317}, "--stride 317"),
    ({"fill": True, "method": "block"}, "leave --method out"),
])
def test_what_settle_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        ts.settle(Config(**settings))


def test_the_edge_of_what_settle_takes():
    ts.settle(Config(max_length=196, threshold=0.49, weight_decay=0, warmup_steps=0))


def test_every_setting_is_a_flag_with_its_comment_as_help(capsys):
    with pytest.raises(SystemExit) as end:
        ts.parse(["--help"])
    assert end.value.code == 0
    printed = "".join(capsys.readouterr().out.split())      # without the wrapping
    comments = dict(re.findall(r"^    (\w+): .*#(.*)", inspect.getsource(Config), re.M))
    assert list(comments) == [field.name for field in dataclasses.fields(Config)]
    for name, comment in comments.items():
        flag = "--" + name.replace("_", "-")
        help_text = "".join(comment.split()).replace("%%", "%")
        # Between the two stands the name of a value or {what,it,can,be}, or nothing.
        wanted = flag + r"([A-Z_]+|\{.*?\})?" + re.escape(help_text)
        assert re.search(wanted, printed), name


def test_flags_are_settings():
    flags = "--epochs 0.5 --questions 7 --fill --final-lambda 3 --data d"
    given = ts.parse(flags.split())
    assert given.pop("score") is None
    assert given.pop("ask") is None
    assert Config(**given) == Config(epochs=0.5, questions=7, fill=True, final_lambda=3.0, data="d")


@pytest.mark.parametrize("wrong", ["--no-such 1", "--epoch 1", "--questions 1.5", "--fill yes",
                                   "--method hybird", "--preset big"])
def test_a_wrong_flag_is_refused(capsys, wrong):
    with pytest.raises(SystemExit) as end:
        ts.main(wrong.split())
    assert end.value.code == 2
    value = wrong.split()[-1]
    assert value in capsys.readouterr().err


@pytest.mark.parametrize("method, scores", [
    ("hybrid", 10), ("block", 12), ("struct", 4), ("unstructured", 12)])
def test_a_masked_model_comes_back_from_its_folder(folder, tmp_path, method, scores):
    """scores: how many distinct score tensors two layers have."""
    model = masked(method)
    for mask in masks(model):
        spread = torch.linspace(-2, 2, mask.owner.scores.numel())
        mask.owner.scores.data.copy_(spread.view_as(mask.owner.scores))
    set_threshold(model, 0.4)
    ts.save_pruning(model, tmp_path, folder, method=method, block="2x3", threshold=0.4)

    # The function is the same, and so is that of model.safetensors alone, an ordinary BERT.
    ids = torch.arange(34).view(2, 17)
    expected = torch.stack(model(ids))
    loaded = ts.load_pruning(tmp_path).eval()
    effective = load_model(tmp_path).eval()
    assert torch.equal(torch.stack(loaded(ids)), expected)
    assert torch.equal(torch.stack(effective(ids)), expected)

    # In pruning.safetensors are W and b of each of 12 linears, and each distinct score once.
    saved = read_safetensors(tmp_path / "pruning.safetensors")
    assert len(saved) == 12 + 12 + scores
    assert sum(name.endswith("scores") for name in saved) == scores
    for name, tensor in saved.items():
        assert torch.equal(tensor, model.get_parameter(name))
        assert torch.equal(tensor, loaded.get_parameter(name))

    assert len({id(mask.owner) for mask in masks(loaded)}) == scores
    for mask, loaded_mask in zip(masks(model), masks(loaded), strict=True):
        assert loaded_mask.threshold == mask.threshold
        assert loaded_mask.block == mask.block
        assert 0 < loaded_mask.block_mask().mean() < 1


def test_masks_of_another_size_are_refused(folder, tmp_path):
    ts.save_pruning(masked("hybrid"), tmp_path, folder, method="hybrid", block="2x3",
                    threshold=0.4)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config["pruning"]["method"] = "block"
    config["pruning"]["block"] = "5x5"
    write_file(tmp_path / "config.json", config)
    with pytest.raises(ValueError, match="does not fit"):
        ts.load_pruning(tmp_path)


def test_a_plain_model_comes_back_without_masks(folder):
    assert not list(masks(ts.load_pruning(folder)))


def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path):
    save_model(tiny(do_lower_case=False), tmp_path)
    with pytest.raises(FileNotFoundError, match="vocab.txt is missing"):
        load_tokenizer(tmp_path)

    def write_vocabulary(words):
        (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")

    # The model has embeddings for three words more than VOCAB has, so four are too many.
    write_vocabulary(VOCAB + ["K", "L", "M", "N"])
    said = f"vocab.txt: .*{len(VOCAB) + 4} words for {len(VOCAB) + 3} embeddings"
    with pytest.raises(ValueError, match=said):
        load_tokenizer(tmp_path)
    for token in ("UNK", "PAD", "SEP", "CLS"):
        write_vocabulary([word for word in VOCAB if word != f"[{token}]"])
        with pytest.raises(ValueError, match=f"(?i)vocab.txt: .*{token}"):
            load_tokenizer(tmp_path)
    # And this fits: the model is cased.
    write_vocabulary(VOCAB + ["É"])
    encoding = load_tokenizer(tmp_path).encode("É Moon moon", add_special_tokens=False)
    assert encoding.tokens == ["É", "[UNK]", "moon"]
