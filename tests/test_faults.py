"""What goes wrong around a run, and what the commands make of it.

In order: a run is known by the contents of what it starts from; one process holds a run folder;
what is on disk is checked when it is read; the questions and predictions of others; errors are one
line and output stops no run; kills of the whole chain of commands.

The damage is done by the tests, to a tiny random BERT and the runs that are made from it.
"""
import builtins
import io
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

import compact
import train_squad as ts
from bert import BertConfig, BertForQuestionAnswering, load_model, save_model, write_json

STEPS = "--questions 40 --epochs 3 --lr 1e-3 --log-every 1 --checkpoint-every 0".split()
SHAPE = "--max-length 48 --max-question 16 --stride 8 --precision fp32 --device cpu".split()
PRUNE = "--method hybrid --block 4x6 --score-lr 1 --final-lambda 5 --final-warmup 2".split()
CHAIN = ("teacher", "hybrid", "small", "filled")
ROOT = Path(ts.__file__).resolve().parent
KILLS = 20 if "FUZZ" in os.environ else 3
FLIPS = 500 if "FUZZ" in os.environ else 50


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with data/ and bert/, a random BERT whose vocabulary are the words of the data."""
    home = tmp_path_factory.mktemp("home")
    (home / "data").mkdir()
    text = ""
    for part, passages, seed in (("train", 30, 1), ("dev", 20, 2)):
        path = home / f"data/{part}-v1.1.json"
        write_json(path, ts.builtin_corpus(passages, seed, relations=3))
        text += path.read_text(encoding="utf-8").lower()
    words = "[PAD] [UNK] [CLS] [SEP] [MASK]".split()
    words += sorted(set(re.findall(r"[a-z]+|[^\w\s]", text)))
    config = BertConfig(len(words), hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
                        intermediate_size=40, max_position_embeddings=64, initializer_range=0.1)
    torch.manual_seed(0)
    save_model(BertForQuestionAnswering(config), home / "bert")
    (home / "bert/vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    return home


def commands(home):
    """The steps under `make squad`, in the folder home: for each the program and its arguments."""
    training = ["--data", f"{home}/data", *SHAPE, *STEPS]
    teacher = ["--teacher", f"{home}/teacher"]
    table = [f"{home}/{name}" for name in ("teacher", "small", "filled")]
    return {
        "teacher": (ts, ["--init", f"{home}/bert", "--out", f"{home}/teacher", *training]),
        "hybrid": (ts, ["--init", f"{home}/teacher", *teacher, "--out", f"{home}/hybrid",
                        *training, *PRUNE]),
        "small": (compact, [f"{home}/hybrid", "--data", f"{home}/data", "--out", f"{home}/small"]),
        "filled": (ts, ["--init", f"{home}/small", *teacher, "--out", f"{home}/filled", *training,
                        "--fill"]),
        "table": (compact, ["--compare", *table, "--batch", "2", "--length", "8"]),
    }


def run(home, name, *more):
    """Give one of the commands, with some more flags; its exit status."""
    program, arguments = commands(home)[name]
    return program.main([*arguments, *more])


@pytest.fixture(scope="module")
def made(home):
    """home, with all runs and the table."""
    for name in commands(home):
        assert run(home, name) == 0
    return home


@pytest.fixture
def chain(made, tmp_path):
    """A copy of it, to be damaged."""
    shutil.copytree(made, tmp_path / "home")
    return tmp_path / "home"


def said(capsys):
    """The one line on stderr, which says that it is an error."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def change(path):
    """Change a file, so that it can still be read: a bit, two lines, or a number."""
    raw = path.read_bytes()
    if path.suffix == ".txt":
        lines = raw.splitlines(keepends=True)
        lines[-2:] = reversed(lines[-2:])
        path.write_bytes(b"".join(lines))
    elif path.name == "config.json":
        path.write_bytes(raw.replace(b"1e-12", b"1e-11"))
    elif path.suffix == ".json":
        path.write_bytes(raw + b"\n")
    else:
        path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    assert path.read_bytes() != raw


# ---------------------------------------------------------------- questions and predictions of others


def squad(ids, paragraphs=1):
    """A tree in SQuAD's form, with questions of these ids."""
    tree = {"data": []}
    for n in range(paragraphs):
        qas = []
        for question_id in ids[n::paragraphs]:
            answers = [{"text": "red", "answer_start": 0}]
            qas.append({"id": question_id, "question": "?", "answers": answers})
        tree["data"].append({"paragraphs": [{"context": "red cat", "qas": qas}]})
    return tree


@pytest.mark.parametrize("ids, paragraphs", [(["a", "b", "a"], 1), (["a", "b", "a"], 3),
                                             ([7, 8, 7], 2), ([7, 8, "7"], 3)])
def test_two_questions_of_one_id_are_refused(tmp_path, ids, paragraphs):
    write_json(tmp_path / "dev.json", squad(ids, paragraphs))
    with pytest.raises(ValueError, match=rf"dev.json: data.* has the id '{ids[0]}', as another"):
        ts.read_squad(tmp_path, "dev.json")


def test_a_whole_number_is_an_id_as_its_digits_are(tmp_path, capsys):
    write_json(tmp_path / "dev.json", squad([7, 0, -3, 10 ** 20]))
    write_json(tmp_path / "found.json", {"7": "red", "0": "Red.", "-3": "cat", str(10 ** 20): ""})
    assert list(ts.read_squad(tmp_path, "dev.json").truths()) == ["7", "0", "-3", str(10 ** 20)]
    assert ts.main(["--score", f"{tmp_path}/found.json", f"{tmp_path}/dev.json"]) == 0
    assert json.loads(capsys.readouterr().out)["exact_match"] == 50


@pytest.mark.parametrize("other_id", [True, 1.0, None, ["a"], {}])
def test_an_id_of_another_type_is_refused(tmp_path, other_id):
    write_json(tmp_path / "dev.json", squad([other_id]))
    with pytest.raises(ValueError, match="has no 'id' that is a str"):
        ts.read_squad(tmp_path, "dev.json")


@pytest.mark.parametrize("prediction", [["red"], {"text": "red"}, 7, 1.5, True, None])
def test_a_prediction_that_is_no_text_is_refused(tmp_path, capsys, prediction):
    write_json(tmp_path / "dev.json", squad(["a", "b"]))
    write_json(tmp_path / "found.json", {"a": "red", "b": prediction})
    assert ts.main(["--score", f"{tmp_path}/found.json", f"{tmp_path}/dev.json"]) == 2
    assert "found.json: the prediction of 'b' is no text" in said(capsys)


@pytest.mark.parametrize("v2", [False, True])
def test_questions_without_a_prediction_are_counted_aloud(tmp_path, capsys, v2):
    tree = squad(["a", "b", "c"])
    if v2:
        tree["data"][0]["paragraphs"][0]["qas"][2].update(answers=[], is_impossible=True)
    write_json(tmp_path / "dev.json", tree)
    for predictions, missing in (({"a": "red", "other": "x"}, 2), (dict.fromkeys("abc", "red"), 0)):
        write_json(tmp_path / "found.json", predictions)
        assert ts.main(["--score", f"{tmp_path}/found.json", f"{tmp_path}/dev.json"]) == 0
        printed = capsys.readouterr()
        assert json.loads(printed.out) == ts.score(predictions, ts.read_squad(tmp_path, "dev.json")
                                                   .truths())
        line = f"{missing} of 3 questions have no prediction"
        assert printed.err.splitlines() == [line] * (missing > 0)


def test_a_python_without_lzma_says_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "dev.json.xz").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "lzma", None)
    with pytest.raises(ValueError, match="dev.json.xz: this Python cannot read .xz; unpack it"):
        ts.read_squad(tmp_path, "dev.json")
