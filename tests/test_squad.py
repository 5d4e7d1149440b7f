"""What train_squad.py must do around its training loop, said by naive versions and by cases worked by hand.

In order: word pieces, windows and batches; the search for the best span; the official metrics; files in
SQuAD's form, the built-in ones among them; masks, loss, filling and schedules; settings; model folders.
Sizes are small and all different. The vocabulary is made here, so neither weights nor a network are needed.
What asks for the real SQuAD runs where the environment names its folder, as in SQUAD=data/squad.
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

import compact
import train_squad as ts
from bert import BertConfig, BertForQuestionAnswering, load_model, load_tokenizer, read_safetensors, save_model
from blockprune import masks, set_threshold
from train_squad import Config, Features

SQUAD, WEIGHTS = Path(os.environ.get("SQUAD") or "unset"), Path(__file__).parents[1] / "weights/minilm"


def needs(name):
    return pytest.mark.skipif(not list(SQUAD.glob(f"{name}*")), reason=f"SQUAD names no folder with {name}")


SIGNS = "abcdefghijklmnopqrstuvwxyz0123456789.,?'-שלוםمرحبا"
VOCAB = [*"[UNK] stone the [PAD] 東 😀 [SEP] [CLS] moon ᄒ ##ᅡ ##ᆫ [MASK] ##ing".split(), *SIGNS, *("##" + s for s in SIGNS)]
UNK, PAD, SEP, CLS = (VOCAB.index(token) for token in ("[UNK]", "[PAD]", "[SEP]", "[CLS]"))
TEXTS = ["The stone, the Stone.", "Café naïve e\u0301te\u0301 o\u0308", "x 😀 moon 🦊🏽\u200d♀️ y", "שלום abc مرحبا 12",
         "a\x00b\u200bc\tx\x7f\x1by\u202e z\ufffd\r\nq", "東京moon タワー 한 a한", "İstanbul ﬁne \u00a0 ß",
         " ".join(random.Random(3).choices(["moon", "Stoneing", "é", "a.b", "שלום", "東😀", "☃", "\x07"], k=900))]


def tiny(**changes) -> BertForQuestionAnswering:
    """In eval mode, every parameter random. Two layers, three heads of size 4, 20 inner dimensions."""
    config = dict(vocab_size=len(VOCAB) + 3, hidden_size=12, num_attention_heads=3, num_hidden_layers=2,
                  intermediate_size=20, max_position_embeddings=70)
    model = BertForQuestionAnswering(BertConfig(**{**config, **changes})).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model


def squad_of(*rows) -> ts.Squad:
    """Of (passage, question, answer, its offset)."""
    return ts.Squad([row[0] for row in rows], [(f"q{n}", row[1], n, [row[2:]]) for n, row in enumerate(rows)], "")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model folder: a tiny model and the vocabulary."""
    folder = tmp_path_factory.mktemp("model")
    save_model(tiny(), folder)
    (folder / "vocab.txt").write_text("\n".join(VOCAB))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


# ------------------------------------------------------------------------ word pieces, windows, batches


def plain(text):
    """Without accents, control characters and case, as an uncased BERT reads it."""
    kinds = [(c, unicodedata.category(c)) for c in unicodedata.normalize("NFD", text)]
    return "".join(c for c, kind in kinds if kind[0] != "C" and kind != "Mn" and c != "\ufffd").lower()


def test_offsets_slice_back_to_the_word_pieces(tokenizer):
    texts = ts.word_pieces(tokenizer, [*TEXTS, "", " \n"])
    for i, text in enumerate(TEXTS):
        pieces, left, at = [(VOCAB[id].removeprefix("##"), *span) for id, span in zip(*texts[i])], "", 0
        for (begin, end), same in itertools.groupby(pieces, lambda piece: piece[1:]):  # 한 alone is three pieces
            assert at <= begin < end <= len(text)
            assert "".join(piece[0] for piece in same) in ("[UNK]", plain(text[begin:end]))
            left, at = left + text[at:begin], end
        assert len(pieces) > 4 and not plain(left + text[at:]).strip()     # nothing to read is between pieces
    assert VOCAB.index("ᄒ") in texts[5][0] and UNK in texts[2][0]
    assert [len(x) for i in (0, 1) for x in texts[len(TEXTS) + i]] == [0] * 4


def test_a_passage_of_100000_characters(tokenizer):
    """Accents, emoji, right-to-left text and control characters: every word piece is in a window, and slices back."""
    text = (" ".join(TEXTS) * 60)[:100_000]
    features = Features(squad_of((text, "moon " * 70, "moon", 0)), tokenizer, Config(), training=False)
    (ids, chars), seen = features.passages[0], set()
    for row, (_, asked, first, count, _, _) in enumerate(features.rows.tolist()):
        assert asked == 64 and asked + count + 3 <= 384
        seen |= set(range(first, first + count))
        for k in (first, first + count // 2, first + count - 1):
            assert features.text(row, k - first + 66, k - first + 66) == text[chars[k, 0]:chars[k, 1]]
    assert seen == set(range(len(ids))) and features.cut == 1 and len(ids) > 20_000 and len(text) == 100_000


def questions_on(tokenizer, texts) -> ts.Squad:
    """Answers from one word piece's border to another's, and some that cut word pieces in two."""
    rng, rows = random.Random(7), []
    for text, n in itertools.product(texts, range(12)):
        spans = tokenizer.encode(text, add_special_tokens=False).offsets
        first = rng.randrange(len(spans))
        begin, end = spans[first][0], spans[min(first + rng.randrange(6), len(spans) - 1)][1]
        if n > 8 and plain(text[begin + 1:end - 1]).strip():
            begin, end = begin + 1, end - 1
        question = " ".join(rng.choices(["the", "q", "☃", "moons?"], k=rng.randrange(9)))
        rows.append((text, question, text[begin:end], begin))
    return squad_of(*rows)


def windows_by_loop(asked, passage, spans, answer, start, config):
    """Of one question: (ids, where the passage begins, word pieces of it, first and last of the answer)."""
    asked, end = asked[:config.max_question], -1
    head = len(asked) + 2
    touched = [k for k, (a, b) in enumerate(spans) if a < start + len(answer) and b > start]
    while end < len(passage):
        first = max(0, end - config.stride)
        end = min(first + config.max_length - head - 1, len(passage))
        inside = first <= touched[0] and touched[-1] < end
        yield ([CLS, *asked, SEP, *passage[first:end], SEP], head, end - first,
               [head + touched[0] - first, head + touched[-1] - first] if inside else [0, 0])


@pytest.mark.parametrize("max_length, stride, max_question", [(60, 17, 8), (23, 0, 11), (31, 9, 5)])
def test_windows_labels_masks_and_padding(tokenizer, max_length, stride, max_question):
    config = Config(max_length=max_length, stride=stride, max_question=max_question)
    squad = questions_on(tokenizer, TEXTS)
    features, expected, held, cut = Features(squad, tokenizer, config, training=True), [], [0, 0], 0
    for _, question, p, [(answer, start)] in squad.questions:
        asked, passage = (tokenizer.encode(text, add_special_tokens=False) for text in (question, squad.passages[p]))
        rows = list(windows_by_loop(asked.ids, passage.ids, passage.offsets, answer, start, config))
        parts = [ids[head:head + n] for ids, head, n, _ in rows]
        assert parts[0] + [id for part in parts[1:] for id in part[stride:]] == passage.ids    # nothing is lost
        assert all(a[len(a) - stride:] == b[:stride] for a, b in zip(parts, parts[1:]))
        begins, ends = zip(*passage.offsets)
        expected += [(answer, start in begins and start + len(answer) in ends, *row) for row in rows]
        cut += len(asked) > max_question
    assert features.lengths.tolist() == [len(row[2]) for row in expected] and max(features.lengths) == max_length
    assert features.skipped == 0 and features.cut == cut > 0
    order = np.random.default_rng(5).permutation(len(features))
    for indices in np.split(order, range(6, len(order), 6)):
        batch = {name: tensor.tolist() for name, tensor in features.batch(indices).items()}
        for b, i in enumerate(indices):
            answer, on_borders, ids, head, n, label = expected[i]
            pad = [0] * (max(len(expected[k][2]) for k in indices) - len(ids))
            assert batch["ids"][b] == ids + [PAD] * len(pad)
            assert batch["types"][b] == [0] * head + [1] * (n + 1) + pad
            assert batch["real"][b] == [1] * len(ids) + pad
            assert batch["context"][b] == [0] * head + [1] * n + [0] + pad
            assert [batch["start"][b], batch["end"][b]] == label
            if label != [0, 0]:
                held[on_borders], text = held[on_borders] + 1, features.text(i, *label)
                assert text == answer if on_borders else plain(answer).strip() in plain(text)
    assert min(held) > 9 and 60 < sum(held) < len(features) - 60


def test_what_is_skipped_and_what_has_no_label(tokenizer):
    squad = squad_of(("the moon", "q", "moon", 4), ("the moon", "q", "moon", 3), ("a stone", "q", "stone", -5),
                       (" ", "q", " ", 0), ("", "q", "x", 0), ("a stone", "q", "ton", 3))
    features = Features(squad, tokenizer, Config(), training=True)
    assert (len(features), features.skipped, features.text(0, 4, 4), features.text(1, 4, 4)) == (2, 4, "moon", "stone")
    batch = Features(squad, tokenizer, Config(), training=False).batch(np.arange(6))   # to be scored: all are there
    assert not batch["start"].any() and not batch["end"].any()
    assert batch["context"].sum(1).tolist() == [2, 2, 2, 0, 0, 2]
    assert batch["ids"][4].tolist() == [CLS, VOCAB.index("q"), SEP, SEP, PAD, PAD]
    with pytest.raises(ValueError, match="no question has an answer at its offset"):
        Features(squad_of(("the moon", "q", "sun", 4)), tokenizer, Config(), training=True)


@needs("dev-v1.1.json")
@pytest.mark.skipif(not WEIGHTS.is_dir(), reason="no vocabulary of BERT in weights/minilm")
@pytest.mark.parametrize("part, windows, questions", [("dev", 10_784, 10_570), ("train", 88_524, 87_599)])
def test_windows_of_the_real_squad(part, windows, questions):
    """As many as Hugging Face's run_qa.py makes at 384/128. The one slow test: 15 s."""
    squad = ts.read_squad(SQUAD, f"{part}-v1.1.json")
    features = Features(squad, load_tokenizer(WEIGHTS), Config(), training=True)
    assert (len(squad.questions), len(features), features.skipped, features.cut) == (questions, windows, 0, 0)
    pairs = [(squad.questions[q][3][0][0], features.text(i, *label))
             for i, (q, _, _, _, *label) in enumerate(features.rows.tolist()) if any(label)]
    assert all(answer in text for answer, text in pairs) and len(pairs) > 0.99 * questions
    assert sum(answer == text for answer, text in pairs) > 0.99 * len(pairs)


def test_batches_hold_every_window_once():
    lengths = np.append(np.random.default_rng(1).integers(20, 384, 1233), 700)
    slots = lambda batches: sum(len(batch) * lengths[batch].max() for batch in batches)
    one, again, next_epoch, other = (ts.training_batches(lengths, 7, *key) for key in [(3, 0), (3, 0), (3, 1), (4, 0)])
    scored = ts.evaluation_batches(lengths, "cpu")
    for batches in (one, next_epoch, other, scored):
        assert sorted(np.concatenate(batches)) == list(range(1234))
        assert batches is scored or sorted(map(len, batches)) == [2] + [7] * 176
    assert [batch.tolist() for batch in one] == [batch.tolist() for batch in again]
    assert len({np.concatenate(batches).tobytes() for batches in (one, next_epoch, other)}) == 3
    assert slots(one) < 1.1 * lengths.sum() and slots(np.split(np.arange(1234), range(7, 1234, 7))) > 1.5 * lengths.sum()
    longest = [lengths[batch].max() for batch in one]
    assert abs(np.corrcoef(longest[1:], longest[:-1])[0, 1]) < 0.3     # short and long ones take turns
    assert max(slots([batch]) for batch in scored[:-1]) <= 2048 and all(len(batch) > 1 for batch in scored[:-1])
    assert all((len(a) + 1) * lengths[b[0]] > 2048 for a, b in zip(scored, scored[1:]))    # no room was left
    assert ts.evaluation_batches(np.array([9000, 9000]), "cpu")[0].tolist() == [0]      # over the budget alone
    assert len(ts.evaluation_batches(lengths, "cuda")) * 20 < len(scored)


# ------------------------------------------------------------------------------ best spans, metrics


def spans_by_loop(start, end, context, longest):
    """Score, i and j of every allowed pair of one window."""
    return [((start[i] + end[j]).item(), i, j) for i in range(len(start))
            for j in range(i, min(i + longest, len(end))) if context[i] and context[j]]


@pytest.mark.parametrize("longest", [1, 4, 13, 30])
@pytest.mark.parametrize("ties", [False, True])
def test_best_spans_are_the_best_of_all_pairs(longest, ties):
    start, end = torch.randint(-3, 2, (2, 50, 13)).float() if ties else torch.randn(2, 50, 13)
    context = torch.rand(50, 13) < torch.linspace(0, 1, 50)[:, None]     # nothing in the first row
    for b, found in enumerate(zip(*(x.tolist() for x in ts.best_spans(start, end, context, longest)))):
        pairs = spans_by_loop(start[b], end[b], context[b], longest)
        assert found in pairs and found[0] == max(pairs)[0] if pairs else found[0] == -math.inf and b < 25


def test_predict_takes_the_best_span_of_all_windows(tokenizer):
    squad = questions_on(tokenizer, TEXTS)
    squad.passages[3] = ""
    config = Config(max_length=41, stride=11, max_question=9, max_answer=5, precision="fp32", device="cpu")
    features, model = Features(squad, tokenizer, config, training=False), tiny()
    found, best, improved = ts.predict(model.train(), features, config), {}, set()     # in batches, in eval mode
    for row, q in enumerate(features.rows[:, 0]):   # one window at a time, so without padding
        batch = features.batch(np.array([row]))
        logits = torch.stack(model.eval()(batch["ids"], batch["types"]))[:, 0].detach()
        value, i, j = max(spans_by_loop(*logits, batch["context"][0], 5), default=(-math.inf, 0, 0))
        improved |= {q} if value > best.get(q, (value,))[0] else set()
        best[q] = max(best.get(q, (-math.inf, "")), (value, features.text(row, i, j) if i else ""))
    assert found == {f"q{q}": (text, pytest.approx(value, abs=1e-4)) for q, (value, text) in best.items()}
    assert found["q3"] == ("", -math.inf) and len(improved) > 9


def official(predictions, truths):
    """evaluate-v1.1.py in our words, without regular expressions and counters."""
    def words(text):
        kept = [c for c in text.lower() if c not in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"]
        runs = ["".join(run) for _, run in itertools.groupby(kept, str.isalnum)]
        return "".join(" " if run in ("a", "an", "the") else run for run in runs).split()

    def f1(prediction, truth):
        rest = list(truth)
        same = sum(word in rest and not rest.remove(word) for word in prediction)
        precision, recall = (same / len(side) if side else 0 for side in (prediction, truth))
        return 2 * precision * recall / (precision + recall) if same else 0

    pairs = [[(words(predictions[i]), words(answer)) for answer in answers]
             for i, answers in truths.items() if i in predictions]
    return {"exact_match": 100 * sum(max(a == b for a, b in pair) for pair in pairs) / len(truths),
            "f1": 100 * sum(max(f1(a, b) for a, b in pair) for pair in pairs) / len(truths)}


def test_metrics_by_hand():
    for text, normal in [("The  Cat, the\tDOG!", "cat dog"), ("a an the", ""), ("an-apple a.b", "anapple ab"),
                         ("“the ÉTÉ”", "“ été”"), ("U.S.A. (1990–91)", "usa 1990–91"), ("theatre a1", "theatre a1"),
                         ("İ the\u00a0x\u3000y", "i̇ x y"), ("a\u0301 b", "\u0301 b"), ("the_end $5 a'an", "theend 5 aan")]:
        assert ts.normalize_answer(text) == normal
    assert ts.token_f1("y x q x", "x y z") == pytest.approx(2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3))
    assert ts.token_f1("", "the") == 0 and ts.token_f1("x x x", "x x") == pytest.approx(0.8)
    truths = {"1": ["the red cat", "cat"], "2": ["a dog"], "3": ["x y z"], "4": ["The!"], "5": ["never"]}
    found = {"1": "Cat.", "2": "", "3": "y x q x", "4": "", "other": "never"}
    # 1: the better of two answers; 4: nothing is left of both: exact, and F1 0; 5: no prediction
    assert ts.score(found, truths) == pytest.approx({"exact_match": 100 * 2 / 5, "f1": 100 * (1 + 4 / 7) / 5})


def as_file(truths, context="x"):
    qas = [dict(id=i, question="?", answers=[dict(text=text, answer_start=0) for text in texts])
           for i, texts in truths.items()]
    return {"data": [{"paragraphs": [{"context": context, "qas": qas}]}]}


def test_score_is_that_of_the_official_scorer(tmp_path, capsys):
    rng, parts = random.Random(4), [*"aAxXy.,-_²’\u00a0\t   ", "an", "The", "the", "e\u0301", "é", "İ"]
    text = lambda: "".join(rng.choices(parts, k=rng.randrange(9)))
    truths = {str(i): [text() for _ in range(rng.randrange(1, 4))] for i in range(2000)}
    found = {i: rng.choice([text(), texts[0].upper() + ".", texts[-1] + " x"]) for i, texts in truths.items() if i != "7"}
    for i in truths:
        assert ts.score(found, {i: truths[i]}) == pytest.approx(official(found, {i: truths[i]})), (found.get(i), truths[i])
    files = [str(tmp_path / name) for name in ("found.json", "dev.json")]
    for file, content in zip(files, (found, as_file(truths))):
        Path(file).write_text(json.dumps(content))
    assert ts.main(["--score", *files]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == pytest.approx(official(found, truths)) and 20 < printed["exact_match"] != printed["f1"] < 80
    assert ts.main(["--score", "none.json", files[1]]) == 2 and "none.json" in capsys.readouterr().err


@needs("bert_ensemble_dev_predictions.json")
def test_published_predictions_score_as_published(tmp_path, capsys):
    packed = (SQUAD / "bert_ensemble_dev_predictions.json.xz").read_bytes()
    (tmp_path / "found.json").write_bytes(lzma.decompress(packed))
    assert ts.main(["--score", f"{tmp_path}/found.json", f"{SQUAD}/dev-v1.1.json"]) == 0
    assert json.loads(capsys.readouterr().out) == pytest.approx({"exact_match": 86.206, "f1": 92.196}, abs=5e-4)
    truths, found = ts.read_squad(SQUAD, "dev-v1.1.json").truths(), json.loads((tmp_path / "found.json").read_bytes())
    for i, (exact, f1) in ts.question_scores(found, truths).items():
        assert official(found, {i: truths[i]}) == pytest.approx({"exact_match": 100 * exact, "f1": 100 * f1})


# ---------------------------------------------------------------------------- v2: no answer is an answer


def official_v2(predictions, truths):
    """evaluate-v2.0.py in our words: no text equals no text alone, and a question without a prediction is left out."""
    def one(i, answer):     # both scorers agree where words are left on both sides
        if ts.normalize_answer(predictions[i]) and ts.normalize_answer(answer):
            return tuple(official({"q": predictions[i]}, {"q": [answer]}).values())
        return (100.0 * (ts.normalize_answer(predictions[i]) == ts.normalize_answer(answer)),) * 2
    rows = {i: [max(column) for column in zip(*(one(i, answer) for answer in [a for a in answers if ts.normalize_answer(a)] or [""]))]
            for i, answers in truths.items() if i in predictions}
    groups = {"": rows, "HasAns_": [i for i in rows if truths[i]], "NoAns_": [i for i in rows if not truths[i]]}
    return {name + key: sum(rows[i][k] for i in group) / max(1, len(group))
            for name, group in groups.items() for k, key in enumerate(("exact_match", "f1"))}


def test_metrics_of_v2_by_hand():
    truths = {"1": ["the red cat"], "2": [], "3": ["x"], "4": [], "5": ["a the"], "6": [], "7": ["y"]}
    found = {"1": "Cat", "2": "", "3": "", "4": "the dog", "5": "", "6": "The."}
    # 1: F1 2 · 1 · ½ / 1½; 5: an answer of articles alone is none; 6: so is such a prediction; 7: not predicted, left out
    assert ts.score(found, truths) == official_v2(found, truths) == pytest.approx({
        "exact_match": 100 * 3 / 6, "f1": 100 * (2 / 3 + 3) / 6, "HasAns_exact_match": 100 / 3, "HasAns_f1": 100 * (2 / 3 + 1) / 3,
        "NoAns_exact_match": 200 / 3, "NoAns_f1": 200 / 3})


def test_unanswerable_questions_aim_at_cls(tokenizer, tmp_path):
    tree = as_file({"yes": ["moon"], "no": []}, "moon stone")
    tree["data"][0]["paragraphs"][0]["qas"][1]["is_impossible"] = True
    (tmp_path / "train-v2.0.json").write_text(json.dumps(tree))
    squad = ts.read_squad(tmp_path, ts.file_name("train", True))
    features = Features(squad, tokenizer, Config(), training=True)
    # [CLS] [UNK] [SEP] moon stone [SEP]; the question "?" is one word piece
    assert features.rows[:, 4:].tolist() == [[3, 3], [0, 0]] and features.skipped == 0


@pytest.mark.parametrize("threshold, given", [(0.0, ["", "moon", ""]), (3.5, ["", "moon", "stone"]), (-9.0, ["", "", ""])])
def test_no_answer_is_given_where_cls_beats_the_best_span(tokenizer, threshold, given):
    """Logits of [CLS] [UNK] [SEP] moon stone [SEP]: in row 2 [CLS] has 2 + 3, the best span 1 + 1: 3 less."""
    features = Features(squad_of(*[("moon stone", "?", "moon", 0)] * 3), tokenizer, Config(), training=False)
    start = torch.tensor([[7.0, 9, 9, 1, 0, 9], [2, 9, 9, 4, 0, 9], [2, 9, 9, 0, 1, 9]])
    end = torch.tensor([[7.0, 9, 9, 1, 0, 9], [2, 9, 9, 1, 0, 9], [3, 9, 9, 0, 1, 9]])

    class Model(nn.Module):
        def forward(self, ids, types, real):
            return start, end
    config = Config(v2=True, null_threshold=threshold, precision="fp32", device="cpu")
    assert list(ts.predict(Model(), features, config).values()) == list(zip(given, (2, 5, 2)))
    config.v2 = False
    assert [text for text, _ in ts.predict(Model(), features, config).values()] == ["moon", "moon", "stone"]


def test_the_least_null_score_of_a_questions_windows_counts(tokenizer):
    """Two windows: the first is sure that there is nothing, the second finds it, and says so."""
    features = Features(squad_of(("moon " * 4 + "stone " * 2, "?", "moon", 0)), tokenizer,
                        Config(max_length=8, stride=2, max_question=1), training=False)
    assert features.rows[:, 2:4].tolist() == [[0, 4], [2, 4]]     # 8 − 3 − 1 word pieces a window

    class Model(nn.Module):
        def forward(self, ids, types, real):
            null = torch.tensor([[20.0], [1]])
            return (torch.cat([null, torch.zeros(2, 5), torch.tensor([[0.0], [4]]), torch.zeros(2, 1)], 1),) * 2
    config = Config(v2=True, max_length=8, stride=2, max_question=1, precision="fp32", device="cpu")
    assert ts.predict(Model(), features, config) == {"q0": ("stone", 8)}


@needs("dev-v2.0.json")
def test_the_real_dev_set_of_v2():
    squad, rng = ts.read_squad(SQUAD, ts.file_name("dev", True)), random.Random(2)
    truths = squad.truths()
    assert len(truths) == 11_873 and sum(not answers for answers in truths.values()) == 5_945
    nothing = ts.score(dict.fromkeys(truths, ""), truths)
    assert nothing["NoAns_f1"] == 100 and nothing["HasAns_f1"] == 0 and nothing["f1"] == pytest.approx(100 * 5_945 / 11_873)
    found = {i: rng.choice(["", *answers, "the", "Some " + "".join(answers)]) for i, answers in truths.items()}
    assert ts.score(found, truths) == pytest.approx(official_v2(found, truths))


# ----------------------------------------------------------------------------- files in SQuAD's form


def test_plain_and_packed_files_and_limits(tmp_path):
    tree = as_file({f"q{n}": [f"x{n}", "x"] for n in range(9)})
    tree["data"] += as_file({"last": ["the"]}, "the end")["data"]
    (tmp_path / "plain.json").write_text(json.dumps(tree))
    (tmp_path / "packed.json.xz").write_bytes(lzma.compress((tmp_path / "plain.json").read_bytes()))
    squad = ts.read_squad(tmp_path, "plain.json")
    assert squad == ts.read_squad(tmp_path, "packed.json") and squad.passages == ["x", "the end"]
    assert squad.questions[8:] == [("q8", "?", 0, [("x8", 0), ("x", 0)]), ("last", "?", 1, [("the", 0)])]
    assert squad.truths()["q3"] == ["x3", "x"] and len(squad.truths()) == 10
    some = [ts.read_squad(tmp_path, "plain.json", n, seed=5).questions for n in (1, 4, 7, 10, 99)]
    assert [len(part) for part in some] == [1, 4, 7, 10, 10] and sorted(some[3]) == sorted(squad.questions) != some[3]
    assert all(longer[:len(part)] == part for part, longer in zip(some, some[1:]))
    assert ts.read_squad(tmp_path, "plain.json", 7, seed=6).questions != some[2]


def test_files_that_are_not_squad_are_refused(tmp_path):
    text, inside = json.dumps(as_file({"one": ["x"], "two": ["x"]})), r"data\[0\]\.paragraphs\[0\]"
    for old, new, message in [
            ('"data"', '"date"', "the file has no 'data' that is a list"), ('[{"par', '[3, {"par', r"data\[0\] has no 'paragraphs'"),
            ('"context": "x"', '"context": 7', inside + " has no 'context' that is a str"),
            ('"id": "two"', '"i": 2', inside + r"\.qas\[1\] has no 'id' that is a str"),
            ('"answer_start": 0', '"answer_start": true', inside + r"\.qas\[0\]\.answers has no 'answer_start' that is a int"),
            ('"answers": [{', '"answers": [], "more": [{', inside + r"\.qas\[0\] has no answer"),
            ('"qas": [', '"qas": [], "more": [', "no question in it"), ("]}]}]}", "]}]}]", "cut off, or not JSON")]:
        (tmp_path / "dev.json").write_text(text.replace(old, new, 1))
        with pytest.raises(ValueError, match=message):
            ts.read_squad(tmp_path, "dev.json")
    (tmp_path / "cut.json.xz").write_bytes(lzma.compress(text.encode())[:-9])
    with pytest.raises(ValueError, match="cut off, or not JSON"):
        ts.read_squad(tmp_path, "cut.json")
    with pytest.raises(FileNotFoundError, match="neither none.json nor none.json.xz"):
        ts.read_squad(tmp_path, "none.json")


def test_the_built_in_corpus_needs_both_the_name_and_the_relation(tmp_path):
    ts.write_builtin(tmp_path)
    train, dev = (ts.read_squad(tmp_path, f"{part}-v1.1.json") for part in ("train", "dev"))
    assert ts.builtin_corpus(9, 4) == ts.builtin_corpus(9, 4) != ts.builtin_corpus(9, 5)
    assert len(train.truths() | dev.truths()) == len(train.questions) + len(dev.questions) > 2000   # ids are unique
    assert not set(train.passages) & set(dev.passages)
    places = collections.Counter(train.passages[p][:start].count(".") for _, _, p, [(_, start)] in train.questions)
    assert set(places) == {0, 1, 2, 3} and all(450 < n < 600 for n in places.values())   # where it stands tells nothing
    for passages, (_, question, p, [(answer, start)]) in ((s.passages, q) for s in (train, dev) for q in s.questions):
        matches = [(re.fullmatch(r"(\w+ \w+) " + fact.replace("{}", r"(\w+)"), sentence), fact)
                   for sentence in passages[p].removesuffix(".").split(". ") for fact in ts.FACTS]
        said = {(found[1], fact): found[2] for found, fact in matches if found}
        assert len(said) == passages[p].count(".") == len(set(said.values()))      # no two people share a value
        [(name, fact)] = [key for key in said if ts.FACTS[key[1]][0].format(key[0]) == question]
        assert said[name, fact] == answer == passages[p][start:].split(".")[0]
        assert any(n == name and f != fact for n, f in said) and any(n != name and f == fact for n, f in said)
        assert len(re.findall(r"\w+|\.", passages[p])) <= 32


# -------------------------------------------------------------------- masks, loss, filling, schedules


@pytest.mark.parametrize("method, query, out, fc1, fc2, tensors, scores", [
    ("hybrid", (2, 3), (3, 2), (1, 12), (12, 1), 60, 64_512), ("block", (2, 3), (3, 2), (2, 3), (2, 3), 72, 82_944),
    ("struct", (4, 12), (12, 4), (1, 12), (12, 1), 24, 144 + 36_864),
    ("unstructured", (1, 1), (1, 1), (1, 1), (1, 1), 72, 84_934_656)])
def test_masks_of_each_method(method, query, out, fc1, fc2, tensors, scores):
    """The blocks of a small model, and the number of distinct scores of BERT-base at 32x32."""
    with torch.device("meta"):  # which holds no numbers
        ts.add_masks(base := BertForQuestionAnswering(BertConfig()), method, "32x32")
    distinct = {id(mask.scores): mask.scores.numel() for mask in masks(base)}
    assert (len(distinct), sum(distinct.values()), len(list(masks(base)))) == (tensors, scores, 12 * 6)
    ts.add_masks(model := tiny(), method, "2x3")
    set_threshold(model, 0.1)
    for layer in model.bert.layers:
        a, ffn = layer.attention, layer.ffn
        found = [linear.parametrizations.weight[0] for linear in (a.query, a.key, a.value, a.out, ffn.fc1, ffn.fc2)]
        assert [mask.block for mask in found] == [query, query, query, out, fc1, fc2]
        assert [mask.kind for mask in found] == ["attention"] * 4 + ["ffn"] * 2
        assert len({id(mask.scores) for mask in found[:4]}) == (1 if method == "struct" else 4)
        assert (found[4].scores is found[5].scores) == (method in ("hybrid", "struct"))
        if method == "struct":
            found[0].scores.data[1] = -9    # the second of three heads of size 4
            for rows in (a.query.weight, a.key.weight, a.value.weight, a.out.weight.T, a.value.bias[:, None]):
                assert rows.any(1).tolist() == [True] * 4 + [False] * 4 + [True] * 4
    assert len(list(masks(model))) == 2 * 6     # and so none elsewhere


def loss_by_loop(student, teacher, real, labels, T):
    """Cross entropy and distillation, position by position, in Python's double precision."""
    softmax, ce, kd = lambda z, T: [math.exp(v / T) / sum(math.exp(u / T) for u in z) for v in z], 0, 0
    for z, y, label in zip(student, teacher, labels):
        for b in range(len(z)):
            s, t = ([v.item() for v, r in zip(logits[b], real[b]) if r] for logits in (z, y))
            ce -= math.log(softmax(s, 1)[label[b]])
            kd += T ** 2 * sum(p * math.log(p / q) for p, q in zip(softmax(t, T), softmax(s, T)))
    return ce / len(real) / 2, kd / len(real) / 2   # a mean over the batch, and of the start's and the end's


def test_loss_is_a_loop_over_real_tokens():
    B, width, T = 5, 11, 3
    student, teacher = (3 * torch.randn(2, B, width) for _ in range(2))
    student.requires_grad_()
    real = torch.arange(width) < torch.tensor([11, 4, 7, 1, 10])[:, None]
    labels = torch.tensor([[0, 3, 6, 0, 2], [10, 3, 2, 0, 9]])
    batch = dict(real=real, start=labels[0], end=labels[1])
    ce, kd = ts.loss_terms(tuple(student), tuple(teacher), batch, T)
    assert [ce.item(), kd.item()] == pytest.approx(loss_by_loop(student, teacher, real, labels, T), rel=1e-5)
    (ce + kd).backward()
    assert student.grad.isfinite().all() and not student.grad[:, ~real].any() and student.grad[:, real].any()
    pad = lambda x: tuple(torch.cat([x, 99 * torch.randn(2, B, 6)], 2))     # garbage at the padding
    longer = {**batch, "real": torch.cat([real, torch.zeros(B, 6, dtype=torch.bool)], 1)}
    assert_close(ts.loss_terms(pad(student), pad(teacher), longer, T), (ce, kd))
    alone, none = ts.loss_terms(tuple(student.bfloat16()), None, batch, T)      # in fp32, whatever comes
    assert none.item() == 0 and alone.item() == pytest.approx(ce.item(), rel=0.02) and alone.dtype == torch.float32


def test_refill_replaces_zeros_and_nothing_else():
    model = tiny(hidden_size=60, intermediate_size=200)
    w, ffn = model.bert.layers[1].attention.query.weight, model.bert.layers[0].ffn
    empty = model.bert.layers[1].attention.key.weight
    with torch.no_grad():
        w += 2
        empty.zero_()
        w[:40] = ffn.fc1.weight[3] = model.bert.norm.weight[5] = ffn.fc1.bias[7] = model.qa_outputs.bias[1] = 0
    before = {name: p.clone() for name, p in model.named_parameters()}
    ts.refill(model)
    for name, p in model.named_parameters():
        zero = before[name] == 0
        assert torch.equal(p[~zero], before[name][~zero])
        assert torch.equal(p == 0, zero & name.endswith("bias"))
    old = before["bert.layers.1.attention.query.weight"]    # 2,400 zeros and 1,200 numbers about 2
    noise = (w[:40] - old.mean()) / (0.01 * old.std())
    assert abs(noise.mean()) < 0.1 and 0.95 < noise.std() < 1.05
    assert empty.std().item() == pytest.approx(0.01 * 0.02, rel=0.05)       # of BERT's initializer_range


def test_learning_rate_and_threshold_by_step():
    assert [ts.learning_rate_factor(step, 10, 4) for step in range(10)] == pytest.approx([1/4, 2/4, 3/4, 1, 1, 5/6, 4/6, 3/6, 2/6, 1/6])
    assert [ts.learning_rate_factor(step, 4, 0) for step in range(4)] == pytest.approx([1, 3/4, 2/4, 1/4])
    assert ts.learning_rate_factor(56_660, 110_660, 5_400) == pytest.approx(0.513, abs=5e-4)   # the paper's, where τ becomes final
    paper = ts.settle(Config(method="hybrid", preset="paper"))
    assert ts.plan(paper, 88_524) == (110_660, 5_400)
    tau = [ts.threshold_at(step, paper, 110_660, 5_400) for step in (5_400, 18_215, 31_030, 43_845, 56_660)]
    assert tau == pytest.approx([0, 0.0578, 0.0875, 0.0984, 0.1], abs=5e-5)
    other = dataclasses.replace(paper, initial_warmup=2, final_warmup=3, threshold=0.2, epochs=0.5, batch=7, warmup_steps=None)
    assert ts.plan(dataclasses.replace(other, score_lr=9), 13_990) == (1000, 50)    # half of 1,999 steps
    assert ts.plan(dataclasses.replace(other, method="dense"), 3) == (2, 0)         # two at least
    tau = [ts.threshold_at(step, other, 1000, 50) for step in (0, 100, 475, 851, 999)]  # flat for 100 steps and for 150
    assert tau == pytest.approx([0, 0, 0.2 * (1 - 1 / 8), 0.2, 0.2])
    with pytest.raises(ValueError, match="no step is left"):
        ts.plan(dataclasses.replace(other, warmup_steps=50), 250 * 7 * 2)

    def steps(total, **changes):
        return ts.plan(dataclasses.replace(paper, epochs=1, warmup_steps=total // 20, **changes), 16 * total)

    for total, reach in [(120, 0.60), (250, 1.25), (440, 2.20), (590, 2.95)]:  # Σ of the scores' learning rate
        with pytest.raises(ValueError, match=r"nothing could be pruned.* goes at -2.20") as error:
            steps(total)
        assert float(re.search(r"-(\d\.\d\d),", str(error.value))[1]) == pytest.approx(reach, abs=0.02)
    assert steps(610) == (610, 30)
    with pytest.raises(ValueError, match="goes at -4.60"):  # a lower τ is further down
        steps(850, threshold=0.01)


# ---------------------------------------------------------------------------------- settings, folders


@pytest.mark.parametrize("stage", [{}, {"method": "hybrid"}, {"fill": True}], ids=["dense", "prune", "fill"])
def test_a_preset_fills_what_its_stage_needs(stage):
    may_stay = {"questions", "dev_questions", "warmup_steps"} | (set() if "method" in stage else {"score_lr", "final_lambda"})
    for preset in ("builtin", "small", "paper"):
        config = Config(preset=preset, **stage)
        assert {name for name, value in vars(ts.settle(config)).items() if value is None} <= may_stay
        assert ts.settle(dataclasses.replace(config, lr=7)).lr == 7 and config == Config(preset=preset, **stage)
    c = ts.settle(Config(preset="paper", **stage))
    assert (c.epochs, ts.plan(c, 88_524)[1]) == {"method": (20, 5400), "fill": (4, 10)}.get(*stage or [0], (2, 553))
    assert (c.lr, c.batch, c.initial_warmup, c.final_warmup, c.threshold, c.attention_lambda) == (3e-5, 16, 1, 10, 0.1, 1)
    assert (c.alpha_ce, c.alpha_kd, c.temperature, c.clip, c.weight_decay, c.attention_dropout) == (0.1, 0.9, 2, 1, 0, 0.1)
    assert (c.max_length, c.stride, c.max_answer, c.seed, c.score_lr or 1e-2) == (384, 128, 30, 17, 1e-2)
    assert c.ffn_lambda == (0.25 if "method" in stage else 1)     # the headline model's
    assert "method" not in stage or ts.settle(Config(method="struct")).attention_lambda == 0.05
    assert [ts.settle(Config(data=data)).preset for data in ("x/builtin", "x/squad")] == ["builtin", "small"]


def test_what_settle_refuses():
    for settings, message in [
            (dict(batch=0), "--batch 0: it must be over 0"), (dict(lr=-1.0), "--lr -1.0"), (dict(questions=-3), "--questions -3"),
            (dict(weight_decay=-0.1), "--weight-decay -0.1: it must be 0 or more"), (dict(epochs=math.nan), "--epochs nan"),
            (dict(lr=math.inf), "--lr inf"), (dict(threshold=0.5), "--threshold 0.5: it must be under 0.5"),
            (dict(block="4"), "--block 4"), (dict(block="0x4"), "--block 0x4"), (dict(max_length=195), "--max-length 195"),
            (dict(stride=317), "--stride 317"), (dict(fill=True, method="block"), "leave --method out")]:
        with pytest.raises(ValueError, match=message):
            ts.settle(Config(**settings))
    ts.settle(Config(max_length=196, threshold=0.49, weight_decay=0, warmup_steps=0))   # the edge of what it takes


def test_every_setting_is_a_flag_with_its_comment_as_help(capsys):
    comments = dict(re.findall(r"^    (\w+): .*#(.*)", inspect.getsource(Config), re.M))
    with pytest.raises(SystemExit) as end:
        ts.parse(["--help"])
    printed = "".join(capsys.readouterr().out.split())  # without the wrapping
    assert end.value.code == 0 and list(comments) == [field.name for field in dataclasses.fields(Config)]
    for name, comment in comments.items():
        wanted = "--" + name.replace("_", "-") + r"([A-Z_]+|\{.*?\})?" + re.escape("".join(comment.split()).replace("%%", "%"))
        assert re.search(wanted, printed), name
    given = ts.parse("--epochs 0.5 --questions 7 --fill --final-lambda 3 --data d".split())
    assert given.pop("score") is None and given.pop("ask") is None
    assert Config(**given) == Config(epochs=0.5, questions=7, fill=True, final_lambda=3.0, data="d")
    for wrong in ("--no-such 1", "--epoch 1", "--questions 1.5", "--fill yes", "--method hybird", "--preset big"):
        with pytest.raises(SystemExit) as end:
            ts.main(wrong.split())
        assert end.value.code == 2 and wrong.split()[-1] in capsys.readouterr().err


@pytest.mark.parametrize("method, scores", [("hybrid", 10), ("block", 12), ("struct", 4), ("unstructured", 12)])
def test_a_masked_model_comes_back_from_its_folder(folder, tmp_path, method, scores):
    ts.add_masks(model := tiny(), method, "2x3")
    for mask in masks(model):
        mask.scores.data.copy_(torch.linspace(-2, 2, mask.scores.numel()).view_as(mask.scores))
    set_threshold(model, 0.4)
    ts.save_pruning(model, tmp_path, folder, method=method, block="2x3", threshold=0.4)
    other, saved = ts.load_pruning(tmp_path).eval(), read_safetensors(tmp_path / "pruning.safetensors")
    ids = torch.arange(34).view(2, 17)
    for found in (other, load_model(tmp_path).eval()):  # model.safetensors alone holds the effective weights
        assert torch.equal(torch.stack(found(ids)), torch.stack(model(ids)))
    assert sum(name.endswith("scores") for name in saved) == scores == len({id(mask.scores) for mask in masks(other)})
    assert len(saved) == 12 + 12 + scores   # W and b of every linear, each distinct score once
    for name, p in saved.items():
        assert torch.equal(p, model.get_parameter(name)) and torch.equal(p, other.get_parameter(name))
    for a, b in zip(masks(model), masks(other), strict=True):
        assert b.threshold == a.threshold and b.block == a.block and 0 < b.block_mask().mean() < 1
    config = json.loads((tmp_path / "config.json").read_text())
    assert len(config["pruning"]["shared"]) == 12 - scores
    config["pruning"].update(method="block", block="5x5")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="does not fit"):
        ts.load_pruning(tmp_path)
    assert not list(masks(ts.load_pruning(folder)))    # a plain model has none


def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path):
    save_model(tiny(do_lower_case=False), tmp_path)
    with pytest.raises(FileNotFoundError, match="vocab.txt is missing"):
        load_tokenizer(tmp_path)
    without = {token: [word for word in VOCAB if word != token] for token in ("[UNK]", "[PAD]", "[SEP]", "[CLS]")}
    for name, words in {f"{len(VOCAB) + 4} words for {len(VOCAB) + 3} embeddings": [*VOCAB, *"KLMN"], **without}.items():
        (tmp_path / "vocab.txt").write_text("\n".join(words))
        with pytest.raises(ValueError, match=f"(?i)vocab.txt: .*{name.strip('[]')}"):
            load_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join([*VOCAB, "É"]))   # and this fits: it is cased
    assert load_tokenizer(tmp_path).encode("É Moon moon", add_special_tokens=False).tokens == ["É", "[UNK]", "moon"]
