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
from bert import (BertConfig, BertForQuestionAnswering, load_model, load_tokenizer, save_model,
                  write_json)

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


def assert_same(a, b):
    """The same files with the same bytes, but for clocks, paths and versions."""
    files = {path.relative_to(b) for path in b.rglob("*") if path.is_file()}
    assert {path.relative_to(a) for path in a.rglob("*") if path.is_file()} == files
    for file in files:
        if file.name in ("run.json", "checkpoint.pt", "summary.json"):
            continue
        if file.name == "results.json":
            assert result(a / file) == result(b / file)
        elif file.name == "log.jsonl":
            assert log(a / file) == log(b / file)
        else:
            assert (a / file).read_bytes() == (b / file).read_bytes(), file


def result(path):
    """results.json without clocks, paths, and what the table adds."""
    results = read(path)
    keys = ("exact_match", "f1", "f1_masked", "max_abs_logit_difference", "data", "files_sha256")
    return {key: results.get(key) for key in keys}


def log(path):
    """The lines of a log, without the clock."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        del line["examples_per_second"]
        lines.append(line)
    return lines


# ------------------------------------------------------------ a run is known by what it starts from

FILES_OF_A_RUN = [
    # a run; a file that it starts from; what that is to the run
    ("teacher", "data/train-v1.1.json", "contents of data"),
    ("teacher", "data/dev-v1.1.json", "contents of dev"),
    ("teacher", "bert/config.json", "contents of init/config.json"),
    ("teacher", "bert/vocab.txt", "contents of init/vocab.txt"),
    ("teacher", "bert/model.safetensors", "contents of init/model.safetensors"),
    ("filled", "small/config.json", "contents of init/config.json"),
    ("filled", "teacher/config.json", "contents of teacher/config.json"),
    ("filled", "teacher/model.safetensors", "contents of teacher/model.safetensors"),
    ("small", "data/dev-v1.1.json", "contents of dev"),
    ("small", "hybrid/config.json", "contents of run/config.json"),
    ("small", "hybrid/vocab.txt", "contents of run/vocab.txt"),
    ("small", "hybrid/pruning.safetensors", "contents of run/pruning.safetensors"),
]


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("name, file, what", FILES_OF_A_RUN)
def test_a_run_is_refused_where_a_file_that_it_starts_from_has_changed(chain, capsys, name, file,
                                                                       what, finished):
    if not finished:
        (chain / name / "results.json").unlink()
    change(chain / file)
    if file.startswith("hybrid"):
        score_again(chain / "hybrid")
    before = snapshot(chain)
    capsys.readouterr()
    assert run(chain, name) == 2
    line = said(capsys)
    assert f"{name} holds a run of other settings: {what} was " in line and line.count(" was ") == 1
    assert snapshot(chain) == before


def score_again(folder):
    """Let results.json be of the files as they are now."""
    results = read(folder / "results.json")
    results["files_sha256"] = ts.folder_sha256(folder)
    write_json(folder / "results.json", results)


def test_a_run_is_refused_where_a_tokenizer_json_has_been_added(chain, capsys):
    load_tokenizer(chain / "bert").save(str(chain / "bert/tokenizer.json"))
    capsys.readouterr()
    assert run(chain, "teacher") == 2
    assert "contents of init/tokenizer.json was None and is " in said(capsys)


@pytest.mark.parametrize("name", CHAIN)
@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "vocab.txt", "results.json"])
def test_what_a_finished_run_has_lost_is_made_again(chain, made, name, file):
    (chain / name / file).unlink()
    assert run(chain, name) == 0
    assert_same(chain / name, made / name)


def test_another_teacher_or_none_is_another_run(chain, capsys):
    for more in (["--teacher", f"{chain}/hybrid"], ["--teacher", ""]):
        capsys.readouterr()
        assert run(chain, "filled", *more) == 2
        assert "contents of teacher/model.safetensors was " in said(capsys)


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("name", CHAIN)
def test_a_run_goes_on_wherever_it_and_its_files_are(made, tmp_path, monkeypatch, capsys, name,
                                                     finished):
    """Moved, by a path from where one is, by a link, and with a slash more."""
    shutil.copytree(made, tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to("elsewhere")
    if not finished:
        (tmp_path / "elsewhere" / name / "results.json").unlink()
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert run("link", name, "--data", "elsewhere/data/") == 0
    assert ("finished before" in capsys.readouterr().out) == finished
    assert_same(tmp_path / "elsewhere" / name, made / name)


def test_a_preset_is_what_it_sets(chain, capsys):
    """The same values under the name of a preset are the same run, other values are another one."""
    capsys.readouterr()
    assert run(chain, "teacher", "--preset", "builtin") == 0
    assert "finished before" in capsys.readouterr().out
    assert run(chain, "teacher", "--preset", "paper") == 2
    assert "attention_dropout was 0.0 and is 0.1" in said(capsys)


def as_before_v2(found):
    del found["settings"]["v2"]
    del found["settings"]["null_threshold"]


def with_the_old_names(found):
    settings = found["settings"]
    settings["dense_lambda"] = settings.pop("ffn_lambda")
    for name in ("out", "log_every", "checkpoint_every"):
        del settings[name]


def with_weights_alone(found):
    contents = found["contents"]
    older = {name: contents[name] for name in ("contents of data", "contents of dev")}
    for part in ("init", "teacher"):
        # It was "" for no teacher.
        older[f"contents of {part}"] = contents[f"contents of {part}/model.safetensors"] or ""
    found["contents"] = older


def with_no_contents(found):
    del found["contents"]


@pytest.mark.parametrize("older", [as_before_v2, with_the_old_names, with_weights_alone,
                                   with_no_contents])
@pytest.mark.parametrize("name, init", [("teacher", "bert"), ("filled", "small")])
def test_a_run_of_an_older_version_is_gone_on_with(chain, capsys, name, init, older):
    found = read(chain / name / "run.json")
    older(found)
    write_json(chain / name / "run.json", found)
    results = read(chain / name / "results.json")
    del results["files_sha256"]
    write_json(chain / name / "results.json", results)
    capsys.readouterr()
    assert run(chain, name) == 0 and "finished before" in capsys.readouterr().out
    assert run(chain, name, "--ffn-lambda", "0.5") == 2
    assert "ffn_lambda was 1.0 and is 0.5" in said(capsys)
    # What it did write down is still compared.
    change(chain / init / "model.safetensors")
    assert run(chain, name) == (0 if older is with_no_contents else 2)
    printed = "".join(capsys.readouterr())
    if older is with_no_contents:
        assert "finished before" in printed
    else:
        assert "contents of init/model.safetensors was " in printed


def test_a_run_of_an_older_version_is_compacted(chain):
    found = read(chain / "hybrid/run.json")
    with_the_old_names(found)
    with_weights_alone(found)
    write_json(chain / "hybrid/run.json", found)
    shutil.rmtree(chain / "small")
    assert run(chain, "small") == 0
    assert read(chain / "small/run.json")["settings"]["ffn_lambda"] == 1


OF_OTHERS = {   # what is in run.json; what is said of it
    "text": ("nothing", "run.json: not JSON"),
    "a list": ("[1]", "run.json: a JSON object"),
    "no settings": ("{}", "no run of ours"),
    "settings that are a list": ('{"settings": [1]}', "no run of ours"),
    "contents that are text": ('{"settings": {}, "contents": "x"}', "no run of ours"),
    "a setting of another type": ('{"settings": {"seed": "x"}}', "run.json: seed cannot be 'x'"),
    "a setting that is no choice": ('{"settings": {"preset": "x"}}', "preset cannot be 'x'"),
    "unknown settings": ('{"settings": {"x": 1}}', "of another version, with a setting 'x'"),
}


@pytest.mark.parametrize("what", OF_OTHERS)
def test_a_run_json_that_is_not_ours_is_refused(chain, capsys, what):
    """By the run of that folder, and by the compaction of it."""
    raw, message = OF_OTHERS[what]
    (chain / "hybrid/run.json").write_text(raw, encoding="utf-8")
    before = snapshot(chain)
    for name in ("hybrid", "small"):
        capsys.readouterr()
        assert run(chain, name) == 2
        assert message in said(capsys) and snapshot(chain) == before


@pytest.mark.parametrize("name, folder", [("teacher", "small"), ("small", "teacher")])
def test_a_training_takes_no_compaction_for_its_own(chain, capsys, name, folder):
    """Nor a compaction a training, even where nothing was made yet."""
    for path in (chain / folder).iterdir():
        if path.name != "run.json":
            path.unlink()
    before = snapshot(chain)
    capsys.readouterr()
    program, arguments = commands(chain)[name]
    # The compacted run is as it was scored, but its compaction goes elsewhere.
    assert program.main([*arguments, "--out", f"{chain}/{folder}"]) == 2
    assert f"{folder} is there, and no run of ours" in said(capsys) and snapshot(chain) == before


# ----------------------------------------------------------------------- one process holds a folder


@pytest.mark.parametrize("name", CHAIN)
def test_a_folder_at_work_is_refused(chain, capsys, name):
    """To a training, to a compaction, and to the table, which writes to results.json."""
    asked = [name, "table"]
    if name == "hybrid":
        asked = [name]      # it is not in the table
    capsys.readouterr()
    with ts.held(chain / name):
        half = chain / name / "results.json.77.tmp"
        half.write_text("of the one at work", encoding="utf-8")
        for command in asked:
            assert run(chain, command) == 2
            assert f"{name}: another process is at work in it" in said(capsys) and half.exists()
    assert run(chain, name) == 0 and not list(chain.rglob("*.tmp"))


class Killed(BaseException):
    """Nothing catches it."""


def kill_at(monkeypatch, number):
    """Stop before the `number`th renaming from now, and leave what a SIGKILL leaves there."""
    renamed = []

    def replace(temporary, path, rename=os.replace):
        if len(renamed) == number:
            raise Killed
        renamed.append(path)
        rename(temporary, path)

    monkeypatch.setattr(os, "replace", replace)
    # Nor is anything cleared up.
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)


@pytest.mark.parametrize("name, renamings", [("small", 10), ("table", 4)])
def test_a_compaction_or_table_killed_before_any_renaming_is_finished_by_the_same_command(
        made, tmp_path, monkeypatch, name, renamings):
    for number in range(renamings):
        home = tmp_path / str(number)
        shutil.copytree(made, home)
        if name == "small":
            shutil.rmtree(home / "small")
        with monkeypatch.context() as patch:
            kill_at(patch, number)
            with pytest.raises(Killed):
                run(home, name)
        assert list(home.rglob("*.tmp"))
        assert run(home, name) == 0
        # The table itself is beside the folders.
        assert not list(home.rglob("*/*.tmp"))
        assert_same(home / "small", made / "small")


def test_all_renamings_were_tried(chain, monkeypatch):
    shutil.rmtree(chain / "small")
    for name, renamings in (("small", 10), ("table", 4)):
        with monkeypatch.context() as patch:
            kill_at(patch, renamings)
            assert run(chain, name) == 0


def test_a_compaction_into_one_of_another_run_is_refused_also_half_way(chain, capsys):
    (chain / "small/results.json").unlink()
    before = snapshot(chain)
    capsys.readouterr()
    arguments = [f"{chain}/teacher", "--data", f"{chain}/data", "--out", f"{chain}/small"]
    assert compact.main(arguments) == 2
    assert "small holds a run of other settings: " in said(capsys) and snapshot(chain) == before


def test_where_there_is_no_fcntl_there_is_no_lock(home, tmp_path, monkeypatch):
    """As on Windows."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with ts.held(tmp_path / "run"):
        assert run(home, "teacher", "--out", f"{tmp_path}/run") == 0


# ------------------------------------------------------- what is on disk is checked when it is read


def places_in_zip(path):
    """Where its local headers, its data and its central directory are, byte for byte."""
    headers = []
    data = []
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            # A local header is 30 bytes, of which the last four are the lengths of two more fields.
            begin = entry.header_offset
            fixed = path.read_bytes()[begin:begin + 30]
            lengths = int.from_bytes(fixed[26:28], "little") + int.from_bytes(fixed[28:], "little")
            end = begin + 30 + lengths
            headers += range(begin, end)
            data += range(end, end + entry.file_size)
        directory = range(archive.start_dir, path.stat().st_size)
    return {"local headers": headers, "data": data, "central directory": directory}


@pytest.mark.parametrize("part", ["local headers", "data", "central directory"])
def test_a_flipped_bit_in_a_checkpoint_is_seen_or_changes_nothing(made, tmp_path, part):
    """Some bits of a zip are read by nobody: dates, padding."""
    whole = made / "teacher/checkpoint.pt"
    raw = whole.read_bytes()
    expected = torch.load(whole, weights_only=True)
    places = places_in_zip(whole)[part]
    config = ts.settle(ts.Config(device="cpu", data=str(made / "data")))
    model = load_model(made / "bert")
    optimizer = ts.prepare(model, config)
    path = tmp_path / "checkpoint.pt"
    rng = random.Random(part)
    refused = 0
    for _ in range(FLIPS):
        place = rng.choice(places)
        flipped = bytearray(raw)
        flipped[place] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            step, seconds = ts.restore(path, model, optimizer, "cpu", 99)
        except ValueError as error:
            assert str(error).startswith(f"{path}: damaged, or of another model: ")
            refused += 1
            continue
        assert (step, seconds) == (expected["step"], expected["seconds"])
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, expected["model"][name])
    assert refused > 0
    if part == "data":
        assert refused == FLIPS


OTHER_VALUES = [("step", "x"), ("step", True), ("step", 1.0), ("step", -1), ("step", 10 ** 9),
                ("step", None), ("seconds", "x"), ("seconds", None), ("seconds", math.nan),
                ("seconds", -1.0), ("model", {}), ("model", 3), ("optimizer", {}),
                ("optimizer", "x"), ("random_states", {}), ("random_states", {"cpu": "x"})]


@pytest.mark.parametrize("key, value", OTHER_VALUES)
def test_a_checkpoint_with_other_values_is_refused(chain, capsys, key, value):
    (chain / "teacher/results.json").unlink()
    path = chain / "teacher/checkpoint.pt"
    state = torch.load(path, weights_only=True)
    state[key] = value
    torch.save(state, path)
    before = snapshot(chain)
    capsys.readouterr()
    assert run(chain, "teacher") == 2
    assert "teacher/checkpoint.pt: damaged, or of another model" in said(capsys)
    assert snapshot(chain) == before


@pytest.mark.parametrize("line", ["x", "[1]", '{"loss": 1}', '{"step": "x"}', "\xff"])
def test_a_broken_log_is_named(chain, capsys, line):
    (chain / "teacher/results.json").unlink()
    path = chain / "teacher/log.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = line.encode("latin-1") + b"\n"
    path.write_bytes(b"".join(lines))
    before = snapshot(chain)
    capsys.readouterr()
    assert run(chain, "teacher") == 2
    assert "teacher/log.jsonl: not the log of a run: " in said(capsys) and snapshot(chain) == before


@pytest.mark.parametrize("file", ["model.safetensors", "pruning.safetensors", "config.json",
                                  "vocab.txt", "results.json", "no results.json"])
def test_a_run_that_is_not_as_it_was_scored_is_not_compacted(chain, capsys, file):
    shutil.rmtree(chain / "small")
    if file == "results.json":
        (chain / "hybrid" / file).write_text("{}", encoding="utf-8")
    elif file == "no results.json":
        (chain / "hybrid/results.json").unlink()
    else:
        change(chain / "hybrid" / file)
    capsys.readouterr()
    assert run(chain, "small") == 2
    assert "hybrid/results.json is missing or not of the weights beside it" in said(capsys)
    assert not (chain / "small").exists()
    # The same command as before scores again what it has made.
    assert run(chain, "hybrid") == 0 and run(chain, "small") == 0


OF_AN_OLDER_VERSION = {
    "no weights_sha256": lambda results: results.pop("weights_sha256"),
    "no f1": lambda results: results.pop("f1"),
    "no data": lambda results: results.pop("data"),
    "data by its name": lambda results: results.update(data="squad"),
    "data without a sha256": lambda results: results["data"].pop("sha256"),
}


@pytest.mark.parametrize("what", [*OF_AN_OLDER_VERSION, "not JSON"])
def test_a_table_of_results_of_an_older_version_is_refused(chain, capsys, what):
    path = chain / "small/results.json"
    if what == "not JSON":
        path.write_text("{", encoding="utf-8")
    else:
        results = read(path)
        OF_AN_OLDER_VERSION[what](results)
        write_json(path, results)
    before = snapshot(chain)
    capsys.readouterr()
    assert run(chain, "table") == 2
    assert "small/results.json is missing or not of the weights beside it" in said(capsys)
    assert snapshot(chain) == before


# -------------------------------------------------------------- questions and predictions of others


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


# --------------------------------------------------------- errors are one line, output stops no run


def stopped(error):
    """A function that raises this."""
    def stop(*_, **__):
        raise error
    return stop


@pytest.mark.parametrize("name, where", [("teacher", "loss_terms"), ("hybrid", "predict"),
                                         ("small", "best_spans"), ("table", "read_squad")])
@pytest.mark.parametrize("error, status, message", [
    (KeyboardInterrupt(), 130, "interrupted; the same command goes on"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate"), 2,
     "error: the GPU is full; a smaller --batch or --max-length needs less: CUDA out of memory"),
])
def test_an_interruption_and_a_full_gpu_are_one_line(chain, monkeypatch, capsys, name, where, error,
                                                     status, message):
    more = []
    if name == "table":
        more = ["--data", f"{chain}/data"]
    else:
        shutil.rmtree(chain / name)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(ts, where, stopped(error))
        assert run(chain, name, *more) == status
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(message)
    assert not list(chain.rglob("*.tmp")) and run(chain, name, *more) == 0


def test_a_full_gpu_is_not_blamed_on_the_checkpoint(chain, monkeypatch, capsys):
    (chain / "teacher/results.json").unlink()
    monkeypatch.setattr(torch, "load", stopped(torch.OutOfMemoryError("CUDA out of memory")))
    capsys.readouterr()
    assert run(chain, "teacher") == 2 and "the GPU is full" in said(capsys)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("flag", ["--init", "--teacher"])
def test_weights_that_are_no_numbers_are_named(home, tmp_path, capsys, flag, value):
    model = load_model(home / "bert")
    model.bert.layers[1].ffn.fc1.weight.data[3, 5] = value
    save_model(model, tmp_path / "bad")
    shutil.copy(home / "bert/vocab.txt", tmp_path / "bad")
    capsys.readouterr()
    assert run(home, "teacher", "--out", f"{tmp_path}/run", flag, f"{tmp_path}/bad") == 2
    name = "encoder.layer.1.intermediate.dense.weight"
    assert f"bad/model.safetensors: {name} has values that are not finite" in said(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name, file", [
    ("teacher", "run.json"), ("teacher", "log.jsonl"), ("teacher", "checkpoint.pt"),
    ("teacher", "model.safetensors"), ("teacher", "results.json"),
    ("hybrid", "pruning.safetensors"),
    ("small", "run.json"), ("small", "masks.json"), ("small", "results.json"),
    ("table", "teacher/results.json"), ("table", "summary.json"),
])
def test_on_a_full_disk_the_file_is_named(chain, monkeypatch, capsys, name, file):
    """All but this one file can be written."""
    if name == "table":
        path = chain / file
    else:
        path = chain / name / file
        shutil.rmtree(chain / name)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        fill_disk_for(patch, path)
        assert run(chain, name) == 2
    line = said(capsys)
    assert f"{path} cannot be written: " in line and "No space left on device" in line
    assert not list(chain.rglob("*.tmp")) and run(chain, name) == 0


def fill_disk_for(monkeypatch, path):
    """Let what is opened to write one file be full."""
    def open_full(name, mode="r", *rest, real_open=open, **more):
        if str(name).startswith(str(path)) and mode[0] in "wa":
            raise OSError(28, "No space left on device")
        return real_open(name, mode, *rest, **more)

    def save_full(state, name, real_save=torch.save):
        if str(name).startswith(str(path)):
            raise RuntimeError("PytorchStreamWriter: No space left on device")
        real_save(state, name)

    monkeypatch.setattr(builtins, "open", open_full)
    monkeypatch.setattr(io, "open", open_full)      # which Path.write_text() calls
    monkeypatch.setattr(torch, "save", save_full)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_a_terminal_that_cannot_show_it_stops_no_run(chain, monkeypatch, encoding):
    """τ in the log, ■ in the drawing, λ in the help."""
    shown = io.BytesIO()
    for name in ("stdout", "stderr"):
        stream = io.TextIOWrapper(shown, encoding, errors="strict", write_through=True)
        monkeypatch.setattr(sys, name, stream)
    for program in (ts, compact):
        with pytest.raises(SystemExit, match="0"):
            program.main(["--help"])
    for name in ("hybrid", "small"):
        shutil.rmtree(chain / name)
        assert run(chain, name) == 0
    text = shown.getvalue().decode(encoding)
    assert "? at the final ?" in text and "? 0.100  density" in text and "heads ?" in text


def test_the_random_state_of_a_device_is_saved_where_the_run_is_on_it(home, tmp_path, monkeypatch):
    class Gpu:
        """A device module, as torch.cuda is one."""
        state = torch.arange(3)
        restored = None

        def get_rng_state(self):
            return self.state

        def set_rng_state(self, state):
            self.restored = state

    gpu = Gpu()
    monkeypatch.setattr(torch, "get_device_module", {"cuda": gpu}.__getitem__)
    config = ts.settle(ts.Config(device="cpu", data=str(home / "data")))
    model = load_model(home / "bert")
    optimizer = ts.prepare(model, config)
    for device in ("cpu", "cuda"):
        path = tmp_path / device
        ts.save_checkpoint(path, model, optimizer, device, 3, 0.5)
        assert set(torch.load(path, weights_only=True)["random_states"]) == {"cpu", device}
        assert ts.restore(path, model, optimizer, device, 4) == (3, 0.5)
    assert torch.equal(gpu.restored, gpu.state)


# ------------------------------------------------------------------------- kills of the whole chain

# All commands in one process, so that torch is imported once.
ALL_COMMANDS = """
import json, sys
import compact, train_squad
for program, arguments in json.loads(sys.argv[1]):
    status = {"train_squad": train_squad, "compact": compact}[program].main(arguments)
    if status != 0:
        sys.exit(status)
"""


def chain_in_a_child(home):
    """Start all commands, in an interpreter of their own and on a terminal without τ."""
    listed = [(program.__name__, arguments) for program, arguments in commands(home).values()]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict", "PYTHONUNBUFFERED": "1",
                   "OMP_NUM_THREADS": "1"}       # as in this process, for the same bits
    return subprocess.Popen([sys.executable, "-c", ALL_COMMANDS, json.dumps(listed)], cwd=ROOT,
                            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.fixture
def start(home, tmp_path):
    """A folder with what the chain starts from."""
    for name in ("data", "bert"):
        shutil.copytree(home / name, tmp_path / name)
    return tmp_path


@pytest.fixture(scope="module")
def lines_of_the_chain(home, made, tmp_path_factory):
    """How many lines the commands print where nobody kills them; they make the same as here."""
    folder = tmp_path_factory.mktemp("whole")
    for name in ("data", "bert"):
        shutil.copytree(home / name, folder / name)
    child = chain_in_a_child(folder)
    output = child.communicate()[0].decode("ascii")
    assert child.returncode == 0, output
    assert_same(folder, made)
    return len(output.splitlines())


@pytest.mark.parametrize("trial", range(KILLS))
def test_a_chain_killed_at_a_random_moment_ends_in_the_same_bytes(start, made, lines_of_the_chain,
                                                                  trial):
    # The moment: some while after one of the lines.
    line = random.randrange(lines_of_the_chain)
    pause = random.random() * 0.05
    child = chain_in_a_child(start)
    for _ in range(line):
        child.stdout.readline()
    time.sleep(pause)
    child.kill()
    child.communicate()
    left = sorted(str(path.relative_to(start)) for path in start.rglob("*"))
    for name in commands(start):
        assert run(start, name) == 0, (name, line, pause, left)
    # A table is beside the runs, in what may be any folder: nobody clears up there.
    for path in start.glob("summary.json.*.tmp"):
        path.unlink()
    assert_same(start, made)
