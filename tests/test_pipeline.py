"""The whole pipeline, through its command lines: train_squad.main(argv) and compact.main(argv).

In order: the chain of `make squad` and what it leaves on disk; the other methods; SQuAD 2.0; two
processes; questions from the terminal; what results.json is of; runs that were broken off, which go
on to the same bits; what is refused, in one line and with nothing lost, as run folders, flags,
training files, model folders, compactions and tables; importing.

The model is a tiny random BERT whose vocabulary is the words of a small made-up corpus. Kills and
damage of the whole chain are in test_faults.py.
"""
import contextlib
import hashlib
import io
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import compact
import train_squad as ts
from bert import (HF_NAMES, BertConfig, BertForQuestionAnswering, read_safetensors, save_model,
                  write_json, write_safetensors)

ROOT = Path(ts.__file__).resolve().parent

# Sizes of the model: E hidden size, F width of a feed-forward layer. DEV: how many dev questions.
E = 24
F = 40
DEV = 120

COMMON = ("--max-length 48 --max-question 16 --stride 8 --precision fp32 --device cpu "
          "--log-every 1").split()
# The pruning of the chain; and a training of 12 steps, with what makes pruning fast enough for it.
HYBRID = ("--method hybrid --block 4x6 --epochs 5 --lr 1e-3 --score-lr 0.2 --final-lambda 2 "
          "--final-warmup 4").split()
SHORT = "--questions 40 --epochs 3 --lr 1e-3".split()
FAST_PRUNING = "--score-lr 1 --final-lambda 5 --final-warmup 2".split()
SHORT_HYBRID = SHORT + FAST_PRUNING + "--method hybrid --block 4x6".split()

CHAIN = ("teacher", "hybrid", "small", "filled")


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def sha256(raw):
    return hashlib.sha256(raw).hexdigest()


def write_bert(folder, words):
    """Write a model folder: a random BERT with this vocabulary."""
    torch.manual_seed(0)
    config = BertConfig(len(words), hidden_size=E, num_hidden_layers=2, num_attention_heads=3,
                        intermediate_size=F, max_position_embeddings=64, initializer_range=0.1)
    save_model(BertForQuestionAnswering(config), folder)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with data/, bert/ and other/: a BERT with one word more in its vocabulary."""
    home = tmp_path_factory.mktemp("home")
    (home / "data").mkdir()
    text = ""
    for part, passages, seed in (("train", 100, 1), ("dev", 40, 2)):
        path = home / f"data/{part}-v1.1.json"
        write_json(path, ts.builtin_corpus(passages, seed, relations=3))
        text += path.read_text(encoding="utf-8").lower()
    words = "[PAD] [UNK] [CLS] [SEP] [MASK]".split()
    words += sorted(set(re.findall(r"[a-z]+|[^\w\s]", text)))
    write_bert(home / "bert", words)
    write_bert(home / "other", words + ["more"])
    return home


def run_training(home, out, flags, init="bert", teacher=None):
    """Train on home/data; the exit status. Folders are in home, or wherever a whole path says."""
    arguments = ["--data", str(home / "data"), "--init", str(home / init)]
    arguments += ["--out", str(home / out)]
    if teacher is not None:
        arguments += ["--teacher", str(home / teacher)]
    return ts.main(arguments + COMMON + flags)


def run_compaction(folder, out, flags=()):
    """Compact a run folder into another; the exit status."""
    return compact.main([str(folder), "--out", str(out)] + list(flags))


def run_table(folders, flags=()):
    """Print the table of some run folders; the exit status."""
    arguments = ["--compare"] + [str(folder) for folder in folders]
    return compact.main(arguments + ["--batch", "2", "--length", "48"] + list(flags))


@pytest.fixture(scope="module")
def chain(home):
    """home, with the runs of `make squad` in it, and the table in table.txt."""
    filling = "--fill --epochs 2 --lr 1e-3".split()
    assert run_training(home, "teacher", "--epochs 10 --lr 3e-3".split()) == 0
    assert run_training(home, "hybrid", HYBRID, init="teacher", teacher="teacher") == 0
    assert run_compaction(home / "hybrid", home / "small") == 0
    assert run_training(home, "filled", filling, init="small", teacher="teacher") == 0
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert run_table([home / name for name in CHAIN]) == 0
    (home / "table.txt").write_text(printed.getvalue(), encoding="utf-8")
    return home


def log(folder):
    """The lines of log.jsonl, without what depends on the machine's speed."""
    lines = []
    for text in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        del line["examples_per_second"]
        lines.append(line)
    return lines


def dev_questions(home):
    """(passage, question) for each question of the dev file."""
    found = []
    for paragraph in read(home / "data/dev-v1.1.json")["data"][0]["paragraphs"]:
        for question in paragraph["qas"]:
            found.append((paragraph["context"], question))
    return found


def matrices(folder):
    """The encoder's matrices, by their names in model.safetensors."""
    found = {}
    for name, tensor in read_safetensors(folder / "model.safetensors").items():
        if ".encoder." in name and tensor.dim() == 2:
            found[name] = tensor
    return found


def snapshot(folder):
    """What every file in a folder holds, and when it was written."""
    files = {}
    for path in folder.rglob("*"):
        if path.is_file():
            files[path] = (path.stat().st_mtime_ns, path.read_bytes())
    return files


def said(capsys):
    """The one line on stderr."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def error(capsys):
    """The one line on stderr, which says that it is an error."""
    line = said(capsys)
    assert line.startswith("error: ")
    return line


def at_step(monkeypatch, number, change):
    """Let change(ce) take the place of the cross entropy, in the `number`th step from now."""
    steps = []
    real_loss_terms = ts.loss_terms

    def loss_terms(*arguments):
        steps.append("a step")
        ce, kd = real_loss_terms(*arguments)
        if len(steps) == number:
            ce = change(ce)
        return ce, kd

    monkeypatch.setattr(ts, "loss_terms", loss_terms)


def interrupt(ce):
    """What Ctrl-C does."""
    os.kill(os.getpid(), signal.SIGINT)
    return ce


# --------------------------------------------------------------------------------------- the chain

FILES_OF_A_MODEL = {"config.json", "model.safetensors", "vocab.txt", "run.json", "results.json",
                    "predictions.json", "f1.json"}
FILES_OF_A_TRAINING = FILES_OF_A_MODEL | {"log.jsonl", "checkpoint.pt"}


@pytest.mark.parametrize("name, files", [
    ("teacher", FILES_OF_A_TRAINING),
    ("hybrid", FILES_OF_A_TRAINING | {"pruning.safetensors"}),
    ("small", FILES_OF_A_MODEL | {"masks.json"}),
    ("filled", FILES_OF_A_TRAINING),
])
def test_every_folder_holds_its_files_and_no_temporary_ones(chain, name, files):
    assert {path.name for path in (chain / name).iterdir()} == files


KEYS_OF_RESULTS = set("""
    exact_match f1 parameters density heads heads_authors_rule ffn latency_ms speedup flops_ratio
    batch length device threads precision data seed command seconds weights_sha256 files_sha256
    """.split())
KEYS_OF_A_COMPACTION = {"exact_match_masked", "f1_masked", "density_masked",
                        "max_abs_logit_difference", "allowed_logit_difference"}


@pytest.mark.parametrize("name", CHAIN)
def test_every_result_has_its_keys(chain, name):
    keys = KEYS_OF_RESULTS
    if name == "small":
        keys = keys | KEYS_OF_A_COMPACTION
    results = read(chain / name / "results.json")
    assert set(results) == keys
    assert f"/{name}" in results["command"]
    assert results["seconds"] > 0


@pytest.mark.parametrize("name", CHAIN)
def test_every_result_says_what_it_was_scored_on(chain, name):
    data = read(chain / name / "results.json")["data"]
    assert data["name"] == "data"
    assert data["dev_questions"] == DEV
    assert data["sha256"]["dev"] == sha256((chain / "data/dev-v1.1.json").read_bytes())


@pytest.mark.parametrize("name", CHAIN)
def test_every_result_counts_the_weights_on_disk(chain, name):
    results = read(chain / name / "results.json")
    elements = 0
    nonzero = 0
    for matrix in matrices(chain / name).values():
        elements += matrix.numel()
        nonzero += int(matrix.count_nonzero())
    parameters = results["parameters"]
    assert parameters["linear"] == elements
    assert parameters["linear_nonzero"] == nonzero
    assert parameters["bytes"] == 4 * parameters["total"]
    # Density is of the dense model: in each of two layers four E × E, and two between E and F.
    dense = 2 * (4 * E * E + 2 * E * F)
    assert parameters["linear_dense"] == dense
    assert results["density"] == nonzero / dense


def test_run_json_has_the_settings(chain):
    settings = read(chain / "hybrid/run.json")["settings"]
    assert settings["final_lambda"] == 2
    assert settings["seed"] == 17
    assert settings["method"] == "hybrid"


BLOCKS = [
    # a matrix; where it is; its blocks
    ("query", "attention", (4, 6)),
    ("key", "attention", (4, 6)),
    ("value", "attention", (4, 6)),
    ("out", "attention", (6, 4)),
    ("fc1", "ffn", (1, E)),
    ("fc2", "ffn", (E, 1)),
]


@pytest.mark.parametrize("name, part, block", BLOCKS)
def test_model_safetensors_is_the_pruned_function(chain, name, part, block):
    """W′ = W ⊙ M: W from pruning.safetensors, M from masks.json, W′ from model.safetensors."""
    effective = matrices(chain / "hybrid")
    saved = read_safetensors(chain / "hybrid/pruning.safetensors")
    place = f"bert.layers.{{}}.{part}.{name}"
    r, c = block
    masks = read(chain / "small/masks.json")
    for layer in ("0", "1"):
        # Each digit of the file is a block of M.
        rows = []
        for text in masks[layer][name]:
            rows.append([int(digit) for digit in text])
        M = torch.tensor(rows).repeat_interleave(r, dim=0).repeat_interleave(c, dim=1)
        W = saved[place.format(layer) + ".parametrizations.weight.original"]
        pruned = effective["bert." + HF_NAMES[place].format(layer) + ".weight"]
        assert torch.equal(pruned, W * M)
        assert W.all()
        assert 0 < M.sum() < M.numel()


def results_of(chain):
    """The four results.json of the chain."""
    return [read(chain / name / "results.json") for name in CHAIN]


def test_the_teacher_has_learnt_something_and_is_dense(chain):
    teacher = read(chain / "teacher/results.json")
    assert teacher["f1"] > 12       # a guess among the words of a passage gives 3
    assert teacher["heads"] == [3, 3]
    assert teacher["ffn"] == [F, F]
    assert teacher["density"] == 1


def test_pruning_removes_weights_and_compaction_heads_and_dimensions(chain):
    teacher, masked, small, filled = results_of(chain)
    last_line = log(chain / "hybrid")[-1]
    assert masked["density"] == pytest.approx(last_line["density"]["all"])
    assert masked["density"] < 0.6
    config = read(chain / "small/config.json")
    assert sum(config["heads"]) < 6
    assert sum(config["ffn"]) < 2 * F
    for results in (masked, small, filled):
        assert results["heads"] == config["heads"]
        assert results["ffn"] == config["ffn"]


def test_compaction_keeps_the_function(chain):
    teacher, masked, small, filled = results_of(chain)
    assert small["f1_masked"] == masked["f1"]
    assert abs(small["f1"] - masked["f1"]) <= 100 / DEV     # a tie may turn
    assert 0 <= small["max_abs_logit_difference"] < 1e-4


def test_compaction_leaves_zeros_and_the_fill_leaves_none(chain):
    teacher, masked, small, filled = [results["parameters"] for results in results_of(chain)]
    assert small["linear"] < masked["linear"]
    assert small["linear_nonzero"] < small["linear"]
    # A head that goes for its empty V may take blocks of Q and K with it.
    assert small["linear_nonzero"] <= masked["linear_nonzero"]
    assert filled["linear"] == small["linear"]
    assert filled["linear_nonzero"] == filled["linear"]


def test_the_log_of_a_fine_pruning_has_a_line_a_step(chain):
    lines = log(chain / "hybrid")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert len(lines) > 100
    keys = set("step loss ce kd penalty threshold lambda lr density".split())
    for line in lines:
        assert set(line) == keys


def test_the_log_of_a_fine_pruning_adds_up(chain):
    lines = log(chain / "hybrid")
    total = len(lines)
    warmup = round(0.05 * total)
    for line in lines:
        assert line["lambda"] == pytest.approx(2 * line["threshold"] / 0.1)     # λ follows τ
        loss = 0.1 * line["ce"] + 0.9 * line["kd"] + line["lambda"] * line["penalty"]
        assert line["loss"] == pytest.approx(loss, rel=1e-4)
        # The learning rate is that of this step, and steps are counted from 0.
        factor = ts.learning_rate_factor(line["step"] - 1, total, warmup)
        assert line["lr"] == pytest.approx(1e-3 * factor)


def test_in_a_fine_pruning_the_threshold_rises_from_0_to_its_final_value(chain):
    lines = log(chain / "hybrid")
    tau = [line["threshold"] for line in lines]
    assert tau == sorted(tau)
    assert tau[0] == 0
    assert 0 < tau[len(tau) // 3] < 0.1
    assert tau[-1] == 0.1
    # All scores begin at 0, where σ is a half, and nothing is pruned.
    assert lines[0]["penalty"] == 0.5
    assert lines[0]["density"]["all"] == 1


def test_the_table_has_a_row_for_each_folder(chain):
    rows = {}
    for line in (chain / "table.txt").read_text(encoding="utf-8").splitlines():
        words = line.split()
        if words and words[0] in CHAIN:
            rows[words[0]] = words
    assert list(rows) == list(CHAIN)
    for name in CHAIN:
        results = read(chain / name / "results.json")
        assert f"{results['exact_match']:.2f}" in rows[name]
        assert f"{results['f1']:.2f}" in rows[name]
        assert f"{results['density']:.3f}" in rows[name]
        assert f"{sum(results['heads'])}/6" in rows[name]
        assert f"{results['flops_ratio']:.2f}x" in rows[name]
        assert f"{results['speedup']:.2f}x" in rows[name]


def test_the_table_is_in_summary_json_as_well(chain):
    summary = read(chain / "summary.json")
    assert [entry.pop("model") for entry in summary] == list(CHAIN)
    for name, entry in zip(CHAIN, summary):
        assert entry == read(chain / name / "results.json")


def test_speed_is_held_against_the_first_folder(chain):
    teacher, masked, small, filled = results_of(chain)
    for results in (teacher, masked, small, filled):
        assert results["batch"] == 2
        assert results["length"] == 48
        milliseconds = results["latency_ms"] * results["speedup"]
        assert milliseconds == pytest.approx(teacher["latency_ms"])
    # A masked model is as large as before.
    assert teacher["flops_ratio"] == 1
    assert masked["flops_ratio"] == 1
    assert small["flops_ratio"] > 1
    assert filled["flops_ratio"] > 1


def test_a_finished_run_is_left_as_it_is(chain, capsys):
    before = snapshot(chain / "hybrid")
    assert run_training(chain, "hybrid", HYBRID, init="teacher", teacher="teacher") == 0
    assert "finished" in capsys.readouterr().out
    assert snapshot(chain / "hybrid") == before


# ------------------------------------------------------------------------------- the other methods

OTHER_METHODS = [
    # a method; how many blocks down and across in value, out and fc1
    ("block", (5, 4), (4, 5), (8, 4)),      # 5 x 7 leaves ragged edges
    ("struct", (3, 1), (1, 3), (F, 1)),
    ("unstructured", (E, E), (E, E), (F, E)),
]
METHODS = [method for method, _, _, _ in OTHER_METHODS]


@pytest.fixture(scope="module")
def other_methods(chain, tmp_path_factory):
    """A folder with a run and a compaction of each method, as in block and block-small."""
    folder = tmp_path_factory.mktemp("methods")
    for method in METHODS:
        flags = SHORT + FAST_PRUNING + ["--method", method, "--block", "5x7"]
        run = folder / method
        assert run_training(chain, run, flags, init="teacher", teacher="teacher") == 0
        assert run_compaction(run, folder / f"{method}-small") == 0
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_other_methods_prune_and_their_compaction_keeps_the_function(other_methods, method):
    results = read(other_methods / f"{method}-small/results.json")
    assert 0 < results["density"] < 0.9
    assert results["max_abs_logit_difference"] < 1e-4
    assert abs(results["f1"] - results["f1_masked"]) <= 100 / DEV


@pytest.mark.parametrize("method, value, out, fc1", OTHER_METHODS)
def test_masks_json_has_the_blocks_of_the_method(other_methods, method, value, out, fc1):
    masks = read(other_methods / f"{method}-small/masks.json")
    for layer in ("0", "1"):
        for name, blocks in (("value", value), ("out", out), ("fc1", fc1)):
            rows = masks[layer][name]
            assert (len(rows), len(rows[0])) == blocks


def test_struct_removes_a_head_from_all_its_matrices(other_methods):
    masks = read(other_methods / "struct-small/masks.json")
    for of_layer in masks.values():
        heads = "".join(of_layer["value"])      # a digit a row, and a row a head
        assert "".join(of_layer["query"]) == heads
        assert "".join(of_layer["key"]) == heads
        assert of_layer["out"] == [heads]       # one row, and a digit a head


@pytest.mark.parametrize("method", METHODS)
def test_a_finished_compaction_is_left_as_it_is(other_methods, capsys, method):
    before = snapshot(other_methods)
    assert run_compaction(other_methods / method, other_methods / f"{method}-small") == 0
    assert "finished before" in capsys.readouterr().out
    assert snapshot(other_methods) == before


def test_a_compaction_scored_on_other_questions_is_another_one(other_methods, tmp_path, capsys):
    run = other_methods / "block"
    other = ["--dev-questions", "7"]
    assert run_compaction(run, other_methods / "block-small", other) == 2
    assert "dev_questions was None and is 7" in error(capsys)
    assert run_compaction(run, tmp_path / "small", other) == 0
    assert read(tmp_path / "small/results.json")["data"]["dev_questions"] == 7


# --------------------------------------------------------------------------------------- SQuAD 2.0


@pytest.fixture(scope="module")
def v2(chain, tmp_path_factory):
    """A folder with data of which a third has no answer, and two models scored on it.

    run is trained on it; of-v1 is the compaction of the teacher, which knows of no such questions.
    """
    folder = tmp_path_factory.mktemp("v2")
    for part in ("train", "dev"):
        tree = read(chain / f"data/{part}-v1.1.json")
        for paragraph in tree["data"][0]["paragraphs"]:
            paragraph["qas"][1].update(answers=[], is_impossible=True)
        write_json(folder / f"{part}-v2.0.json", tree)
    flags = ["--data", str(folder), "--v2"]
    training = flags + "--epochs 4 --lr 3e-3".split()
    assert run_training(chain, folder / "run", training, init="teacher") == 0
    assert run_compaction(chain / "teacher", folder / "of-v1", flags) == 0
    return folder


@pytest.mark.parametrize("name", ["run", "of-v1"])
def test_f1_is_the_mean_of_questions_with_and_without_an_answer(v2, name):
    results = read(v2 / name / "results.json")
    mean = (2 * results["HasAns_f1"] + results["NoAns_f1"]) / 3
    assert results["f1"] == pytest.approx(mean)
    assert results["data"]["dev_questions"] == DEV


def test_v2_teaches_a_model_not_to_answer(v2):
    learnt = read(v2 / "run/results.json")
    told = read(v2 / "of-v1/results.json")
    assert learnt["NoAns_f1"] > told["NoAns_f1"]
    assert told["HasAns_f1"] > 10
    predictions = read(v2 / "run/predictions.json")
    assert list(predictions.values()).count("") > 3


def test_a_table_of_v2_is_held_against_its_dev_set(v2):
    assert run_table([v2 / "run", v2 / "of-v1"], ["--data", str(v2), "--v2"]) == 0


def test_v2_predictions_score_the_same_from_their_file(v2, capsys):
    capsys.readouterr()
    assert ts.main(["--score", f"{v2}/run/predictions.json", f"{v2}/dev-v2.0.json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["NoAns_f1"] == read(v2 / "run/results.json")["NoAns_f1"]


def test_f1_json_has_the_f1_of_every_question(v2):
    f1 = read(v2 / "run/f1.json")
    assert len(f1) == DEV
    mean = sum(f1.values()) / DEV
    assert mean == pytest.approx(read(v2 / "run/results.json")["f1"] / 100, abs=1e-4)


# ----------------------------------------------------------------------------------- two processes


def test_two_processes_follow_the_curve_of_one(chain, tmp_path, monkeypatch):
    """Half of each batch each, from the checkpoint that one process left."""
    # Without dropout, so that both see the same model. The last batch of an epoch is one window.
    shutil.copytree(chain / "teacher", tmp_path / "bert")
    config = read(tmp_path / "bert/config.json")
    config["hidden_dropout_prob"] = 0.0
    write_json(tmp_path / "bert/config.json", config)
    flags = FAST_PRUNING + "--method hybrid --block 4x6 --lr 1e-3".split()
    flags += "--questions 44 --epochs 5".split()
    bert = tmp_path / "bert"
    assert run_training(chain, tmp_path / "one", flags, init=bert, teacher="teacher") == 0

    # One process begins, and is interrupted in its second step. Two of torchrun's go on.
    with monkeypatch.context() as patch:
        at_step(patch, 2, interrupt)
        begun = flags + ["--checkpoint-every", "0"]
        assert run_training(chain, tmp_path / "two", begun, init=bert, teacher="teacher") == 130
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [f"{ROOT}/train_squad.py", "--data", f"{chain}/data", "--init", str(bert)]
    command += ["--teacher", f"{chain}/teacher", "--out", f"{tmp_path}/two"]
    done = subprocess.run(command + COMMON + flags, env={**os.environ, "OMP_NUM_THREADS": "1"},
                          capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    # One of them speaks.
    assert done.stdout.count("going on from step 1") == 1
    assert done.stdout.count("two 25/25") == 1
    assert (tmp_path / "two/results.json").exists()

    one = log(tmp_path / "one")
    two = log(tmp_path / "two")
    steps = list(range(1, 26))
    assert [line["step"] for line in one] == steps
    assert [line["step"] for line in two] == steps
    for a, b in zip(one, two):
        for key in ("loss", "ce", "kd", "penalty"):
            assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-4), (a, b)
        assert b["threshold"] == a["threshold"]
        assert b["density"]["all"] == pytest.approx(a["density"]["all"], abs=0.01)
    expected = matrices(tmp_path / "one")
    for name, tensor in matrices(tmp_path / "two").items():
        assert (tensor - expected[name]).abs().mean() < 1e-4


# ---------------------------------------------------------------------- questions from the terminal


def ask(monkeypatch, capsys, folder, typed, flags=()):
    """Ask a model, with these lines typed in; what it prints after its first line."""
    lines = iter(typed)
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    capsys.readouterr()
    assert ts.main(["--ask", str(folder), "--precision", "fp32"] + list(flags)) == 0
    return capsys.readouterr().out.splitlines()[1:]


def test_questions_from_the_terminal_are_answered_out_of_the_passage(chain, monkeypatch, capsys):
    passage, question = dev_questions(chain)[0]
    typed = [passage, question["question"], "what " * 70, ""]       # the second one is cut
    printed = ask(monkeypatch, capsys, chain / "small", typed)
    assert len(printed) == 2
    answers = []
    for line in printed:
        answer = re.fullmatch(r" +'(.*)', score -?[\d.]+, \d+ ms", line)[1]
        assert answer in passage
        answers.append(answer)
    # The same as the run gave to that question.
    assert answers[0] == read(chain / "small/predictions.json")[question["id"]]


def test_a_null_threshold_far_below_every_score_gives_no_answer(chain, monkeypatch, capsys):
    passage, question = dev_questions(chain)[0]
    typed = [passage, question["question"], ""]
    [given] = ask(monkeypatch, capsys, chain / "small", typed)
    flags = ["--v2", "--null-threshold=-1000"]
    [refused] = ask(monkeypatch, capsys, chain / "small", typed, flags)
    # The score is that of the best span in both.
    score = re.fullmatch(r" +'.*', score (-?[\d.]+), \d+ ms", given)[1]
    assert re.fullmatch(r" +no answer, score (-?[\d.]+), \d+ ms", refused)[1] == score


def test_the_end_of_the_input_ends_it(chain, monkeypatch, capsys):
    def end_of_file(prompt):
        raise EOFError

    monkeypatch.setattr("builtins.input", end_of_file)
    assert ts.main(["--ask", f"{chain}/small", "--precision", "fp32"]) == 0


def test_to_ask_no_model_is_an_error_of_one_line(chain, capsys):
    capsys.readouterr()
    assert ts.main(["--ask", f"{chain}/bert/nowhere"]) == 2
    assert "no model folder" in error(capsys)


# ------------------------------------------------------------------------- what results.json is of


def test_the_score_is_that_of_the_predictions(chain):
    results = read(chain / "teacher/results.json")
    predictions = read(chain / "teacher/predictions.json")
    truths = {}
    exact = 0
    for _, question in dev_questions(chain):
        texts = [answer["text"] for answer in question["answers"]]
        truths[question["id"]] = texts
        if predictions[question["id"]] in texts:        # no article and no comma is in them
            exact += 1
    assert set(predictions) == set(truths)
    assert results["exact_match"] == pytest.approx(100 * exact / DEV)
    score = ts.score(predictions, truths)
    assert score == {"exact_match": results["exact_match"], "f1": results["f1"]}


def test_predictions_score_the_same_from_their_file(chain, capsys):
    files = [f"{chain}/teacher/predictions.json", f"{chain}/data/dev-v1.1.json"]
    capsys.readouterr()
    assert ts.main(["--score"] + files) == 0
    results = read(chain / "teacher/results.json")
    printed = json.loads(capsys.readouterr().out)
    assert printed == {"exact_match": results["exact_match"], "f1": results["f1"]}


def test_what_is_scored_is_what_was_saved(home, tmp_path, monkeypatch):
    """With a QA head of zeros in the file all spans are equal: the first word of a passage wins."""
    def save_without_head(model, folder, *rest, **more):
        save_model(model, folder, *rest, **more)
        path = Path(folder, "model.safetensors")
        tensors = read_safetensors(path)
        for name in tensors:
            if name.startswith("qa_outputs"):
                tensors[name] = torch.zeros_like(tensors[name])
        write_safetensors(tensors, path)

    monkeypatch.setattr(ts, "save_model", save_without_head)
    flags = SHORT + ["--max-length", "64"]      # a window holds a whole passage
    assert run_training(home, tmp_path / "run", flags) == 0
    first_words = {}
    for passage, question in dev_questions(home):
        first_words[question["id"]] = passage.split()[0]
    assert read(tmp_path / "run/predictions.json") == first_words
    assert read(tmp_path / "run/results.json")["f1"] == 0


# ------------------------------------------------------------------------ runs that were broken off

STAGES = {
    # a stage: the model it starts from, its teacher, its flags
    "dense": ("bert", None, SHORT),
    "prune": ("teacher", "teacher", SHORT_HYBRID),
    "fill": ("small", "teacher", SHORT + ["--fill"]),
}
OFTEN = ["--checkpoint-every", "0"]     # after every step


def train_stage(chain, out, stage, more=()):
    """A short run of a stage; the exit status."""
    init, teacher, flags = STAGES[stage]
    return run_training(chain, out, flags + list(more), init=init, teacher=teacher)


@pytest.fixture(scope="module")
def unbroken(chain):
    """The folders of whole runs, by their stage."""
    folders = {}
    for stage in STAGES:
        folders[stage] = chain / f"unbroken-{stage}"
        assert train_stage(chain, folders[stage], stage) == 0
    return folders


def bits(folder):
    """What a run makes, and makes again to the bit."""
    found = {"log": log(folder)}
    paths = list(folder.glob("*.safetensors"))
    paths += [folder / "config.json", folder / "predictions.json"]
    for path in paths:
        found[path.name] = sha256(path.read_bytes())
    return found


def assert_broken_off(run, step):
    """The run has the checkpoint of that step, no results, and nothing half-written."""
    assert torch.load(run / "checkpoint.pt", weights_only=True)["step"] == step
    assert not (run / "results.json").exists()
    assert not list(run.glob("*.tmp"))


@pytest.mark.parametrize("stage, step", [
    ("dense", 5),
    ("prune", 5),
    ("fill", 12),       # the last one
])
def test_an_interrupted_run_goes_on_to_the_same_bits(chain, unbroken, tmp_path, monkeypatch,
                                                     capsys, stage, step):
    run = tmp_path / "run"
    capsys.readouterr()
    with monkeypatch.context() as patch:
        at_step(patch, step, interrupt)
        assert train_stage(chain, run, stage, OFTEN) == 130
    assert said(capsys).startswith("interrupted; the same command goes on")
    assert_broken_off(run, step - 1)
    torch.rand(3)       # random numbers that are drawn in between do not matter
    assert train_stage(chain, run, stage) == 0
    assert bits(run) == bits(unbroken[stage])


def not_a_number(ce):
    return ce * math.nan


def test_a_run_stopped_by_a_loss_of_nan_goes_on_to_the_same_bits(chain, unbroken, tmp_path,
                                                                 monkeypatch, capsys):
    run = tmp_path / "run"
    capsys.readouterr()
    with monkeypatch.context() as patch:
        at_step(patch, 5, not_a_number)
        assert train_stage(chain, run, "prune", OFTEN) == 2
    assert re.search("loss.* nan", error(capsys))
    assert_broken_off(run, 4)
    torch.rand(3)
    assert train_stage(chain, run, "prune") == 0
    assert bits(run) == bits(unbroken["prune"])


def test_a_run_whose_disk_fills_up_goes_on_to_the_same_bits(chain, unbroken, tmp_path, monkeypatch,
                                                            capsys):
    """The fifth checkpoint is cut off. The fourth is kept."""
    saved = []

    def save_until_full(state, path, real_save=torch.save):
        real_save(state, path)
        saved.append(path)
        if len(saved) == 5:
            os.truncate(path, 100)
            raise OSError(28, "No space left on device")

    run = tmp_path / "run"
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save_until_full)
        assert train_stage(chain, run, "fill", OFTEN) == 2
    assert "No space left" in error(capsys)
    assert_broken_off(run, 4)
    # The log's last line is cut off as well.
    with open(run / "log.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 5, "lo')
    torch.rand(3)
    assert train_stage(chain, run, "fill") == 0
    assert bits(run) == bits(unbroken["fill"])


@contextlib.contextmanager
def no_file_beyond(size):
    """Let the system refuse to write files of more bytes, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name, message", [
    ("run.json", "File too large"),
    ("checkpoint.pt", "checkpoint.pt cannot be written"),
])
def test_a_file_that_the_system_refuses_is_one_line_and_the_run_goes_on(chain, unbroken, tmp_path,
                                                                        capsys, name, message):
    run = tmp_path / "run"
    size = (unbroken["prune"] / name).stat().st_size
    capsys.readouterr()
    with no_file_beyond(size - 9):
        status = train_stage(chain, run, "prune")
    assert status == 2
    assert message in error(capsys)
    assert not list(run.glob("*.tmp"))
    assert train_stage(chain, run, "prune") == 0
    assert bits(run) == bits(unbroken["prune"])


def test_a_run_broken_off_after_its_last_step_is_scored_without_training(chain, unbroken, tmp_path,
                                                                         monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(ts, "predict", interrupted)
        assert train_stage(chain, run, "prune") == 130
    # It is as if it had taken 1,000 seconds until then.
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    state["seconds"] += 1000
    torch.save(state, run / "checkpoint.pt")
    # Whoever trains now is interrupted.
    monkeypatch.setattr(ts, "loss_terms", interrupted)
    assert train_stage(chain, run, "prune") == 0
    assert bits(run) == bits(unbroken["prune"])
    assert read(run / "results.json")["seconds"] > 1000     # those of all its parts


def test_a_seed_gives_the_same_bits_and_another_one_others(chain, unbroken, tmp_path):
    for seed in ("17", "18"):
        assert train_stage(chain, tmp_path / seed, "prune", ["--seed", seed]) == 0
    assert bits(tmp_path / "17") == bits(unbroken["prune"])
    others = bits(tmp_path / "18")
    for name, made in bits(unbroken["prune"]).items():
        if name != "config.json":
            assert others[name] != made, name


@pytest.mark.parametrize("wrong", ["another shape", "cut off"])
def test_a_checkpoint_that_does_not_fit_is_refused_and_kept(home, tmp_path, monkeypatch, capsys,
                                                            wrong):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(patch, 5, interrupt)
        assert run_training(home, run, SHORT + OFTEN) == 130
    path = run / "checkpoint.pt"
    if wrong == "another shape":
        state = torch.load(path, weights_only=True)
        state["model"]["bert.layers.1.ffn.fc1.weight"] = torch.zeros(F + 1, E)
        torch.save(state, path)
    else:
        os.truncate(path, path.stat().st_size // 2)
    before = snapshot(tmp_path)
    capsys.readouterr()
    assert run_training(home, run, SHORT) == 2
    assert "checkpoint.pt" in error(capsys)
    assert snapshot(tmp_path) == before


# -------------------------------------------------------------------------------------- run folders


def test_a_run_of_other_settings_is_left_alone_and_they_are_named(chain, capsys):
    before = snapshot(chain / "teacher")
    other = "--epochs 10 --lr 5e-3 --seed 3 --log-every 7".split()
    capsys.readouterr()
    assert run_training(chain, "teacher", other) == 2
    line = error(capsys)
    assert "seed was 17 and is 3" in line
    assert "lr was 0.003 and is 0.005" in line
    assert line.count(" was ") == 2     # how often a run speaks is not compared
    assert snapshot(chain / "teacher") == before


@pytest.fixture
def others(chain, tmp_path):
    """A folder with copies of a model, of two runs, and a file."""
    for name in ("bert", "teacher", "hybrid"):
        shutil.copytree(chain / name, tmp_path / name)
    shutil.copy(chain / "table.txt", tmp_path / "file")
    return tmp_path


WHAT_IS_THERE = [
    "bert",         # a model folder that is no run
    "teacher",      # another run
    "hybrid",       # another run, and the one that is to be compacted
    "file",
]


@pytest.mark.parametrize("out", WHAT_IS_THERE)
def test_a_training_leaves_alone_what_is_not_its_own(chain, others, capsys, out):
    before = snapshot(others)
    capsys.readouterr()
    assert run_training(chain, others / out, ["--seed", "5"]) == 2
    assert f"{others}/{out}" in error(capsys)
    assert snapshot(others) == before


@pytest.mark.parametrize("out", WHAT_IS_THERE)
def test_a_compaction_leaves_alone_what_is_not_its_own(others, capsys, out):
    before = snapshot(others)
    capsys.readouterr()
    assert run_compaction(others / "hybrid", others / out) == 2
    assert f"{others}/{out}" in error(capsys)
    assert snapshot(others) == before


def test_in_a_new_folder_that_another_process_holds_nothing_is_written(home, tmp_path, capsys):
    run = tmp_path / "run"
    capsys.readouterr()
    with ts.held(run):
        assert run_training(home, run, SHORT) == 2
    assert "another process is at work" in error(capsys)
    assert not list(run.iterdir())
    assert run_training(home, run, SHORT) == 0


def test_a_folder_may_have_an_odd_name(home, tmp_path):
    run = tmp_path / "an \"odd\" folder's $name"
    assert run_training(home, run, SHORT) == 0
    assert run_compaction(run, f"{run} compact") == 0


def test_results_of_other_weights_are_seen_and_made_again(chain, tmp_path, capsys):
    """By the SHA-256 of the weights, not by a clock."""
    assert train_stage(chain, tmp_path / "run", "dense") == 0
    assert run_compaction(tmp_path / "run", tmp_path / "small") == 0
    results = read(tmp_path / "run/results.json")
    weights = tmp_path / "run/model.safetensors"
    good = weights.read_bytes()
    assert results["weights_sha256"] == sha256(good)

    # With a bit changed there is no table of them.
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    capsys.readouterr()
    assert run_table([tmp_path / "run"]) == 2
    assert "not of the weights" in error(capsys)
    # The same command writes and scores them again, and the compaction is still of them.
    assert train_stage(chain, tmp_path / "run", "dense") == 0
    assert "finished before" not in capsys.readouterr().out
    assert weights.read_bytes() == good
    assert read(tmp_path / "run/results.json")["f1"] == results["f1"]
    assert run_compaction(tmp_path / "run", tmp_path / "small") == 0
    assert "finished before" in capsys.readouterr().out


def test_a_compaction_does_not_ask_what_its_run_was_trained_on(chain, tmp_path, capsys):
    shutil.copytree(chain / "bert", tmp_path / "bert")
    shutil.copytree(chain / "data", tmp_path / "data")
    run = tmp_path / "run"
    small = tmp_path / "small"
    flags = SHORT + ["--data", f"{tmp_path}/data"]
    assert run_training(chain, run, flags, init=tmp_path / "bert") == 0
    assert run_compaction(run, small) == 0

    for name in ("bert/model.safetensors", "data/train-v1.1.json"):
        path = tmp_path / name
        before = path.read_bytes()
        path.write_bytes(b"x" + before)
        capsys.readouterr()
        assert run_compaction(run, small) == 0
        assert "finished before" in capsys.readouterr().out
        path.write_bytes(before)
    # With the old contents back, the training is finished as well.
    assert run_training(chain, run, flags, init=tmp_path / "bert") == 0
    assert "finished before" in capsys.readouterr().out


def test_a_run_keeps_the_precision_that_it_began_with(chain, tmp_path, monkeypatch, capsys):
    """Begun where there are bf16 units, gone on with where there are none."""
    precision = COMMON.index("--precision")
    flags = COMMON[:precision] + COMMON[precision + 2:] + SHORT

    def train_by_itself(name, units):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": units})
        capsys.readouterr()
        arguments = ["--data", f"{chain}/data", "--init", f"{chain}/bert"]
        assert ts.main(arguments + ["--out", f"{tmp_path}/{name}"] + flags) == 0
        return read(tmp_path / name / "run.json")["settings"]["precision"]

    assert train_by_itself("begun", units=True) == "bf16"
    assert train_by_itself("begun", units=False) == "bf16"
    assert "finished before" in capsys.readouterr().out
    assert train_by_itself("another", units=False) == "fp32"


def test_all_seeds_are_scored_on_the_same_dev_questions(chain, tmp_path):
    asked = []
    for seed in ("17", "18"):
        flags = SHORT + ["--seed", seed, "--dev-questions", "7"]
        assert run_training(chain, tmp_path / seed, flags) == 0
        asked.append(list(read(tmp_path / seed / "predictions.json")))
    assert len(asked[0]) == 7
    assert asked[0] == asked[1]


# --------------------------------------------------------------------------- what is refused: flags


def assert_second_try_works(home, run):
    """A training with other flags takes the folder in which the first one was refused."""
    assert run_training(home, run, SHORT + ["--epochs", "0.1"]) == 0
    assert (run / "results.json").exists()


REFUSED = [
    # flags, after those of a short training; what is said of them
    ("--method block --score-lr 1 --final-warmup 2 --block 48x4", "48x4 does not fit"),
    ("--method block --score-lr 1 --block 4", "--block 4: "),
    ("--method block --score-lr 1 --block 0x4", "--block 0x4"),
    ("--method hybrid --score-lr 1 --initial-warmup 9", "no step is left"),
    ("--method hybrid --score-lr 0.01 --final-warmup 2",
     r"nothing could be pruned.* 12 steps.* -0\.0\d"),
    ("--method hybrid --final-lambda -1", "--final-lambda -1.0: it must be 0 or more"),
    ("--method hybrid --fill", "--fill "),
    ("--epochs 0", "--epochs 0.0: it must be over 0"),
    ("--questions 0", "--questions 0: it must be over 0"),
    ("--threshold 0.5", "--threshold 0.5"),
    ("--lr nan", "--lr nan"),
    ("--lr 1e30", "run: .*step 1.*loss.* nan"),
    ("--max-length 80", "--max-length 80 is over the model.s 64"),
    ("--max-length 24", "--max-length 24: .*--stride 8"),
    ("--v2 --null-threshold inf", "--null-threshold inf"),
    ("--v2", "neither train-v2.0.json nor"),
    ("--data {home}/bert/config.json", "Not a directory.*config.json"),
    ("--data {home}/nowhere", "nowhere: neither train-v1.1.json nor train-v1.1.json.xz"),
    ("--init {home}/bert/config.json", "config.json: no model folder"),
    ("--init {home}/nowhere", "nowhere: no model folder"),
    ("--teacher {home}/nowhere", "nowhere: no model folder"),
    ("--teacher {home}/other", "different tokenizers"),
]


@pytest.mark.parametrize("flags, message", REFUSED)
def test_what_is_refused_and_a_second_try(home, tmp_path, capsys, flags, message):
    run = tmp_path / "run"
    assert run_training(home, run, SHORT + flags.format(home=home).split()) == 2
    assert re.search(message, error(capsys))
    assert_second_try_works(home, run)


@pytest.mark.parametrize("flags, named", [
    ("--lamda 3", "--lamda"),
    ("--epoch 3", "--epoch"),       # no abbreviation is guessed at
    ("--method magnitude", "--method"),
    ("--fill yes", "yes"),
])
def test_an_unknown_flag_is_refused(home, tmp_path, capsys, flags, named):
    with pytest.raises(SystemExit, match="2"):
        run_training(home, tmp_path / "run", flags.split())
    assert named in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------ what is refused: training files


def no_paragraph(paragraphs):
    paragraphs.clear()


def no_context(paragraphs):
    del paragraphs[3]["context"]


def answers_that_are_text(paragraphs):
    paragraphs[3]["qas"][1]["answers"] = "x"


def no_answer(paragraphs):
    paragraphs[3]["qas"][1]["answers"] = []


def answers_that_are_not_there(paragraphs):
    for paragraph in paragraphs:
        paragraph["context"] = "-"


@pytest.mark.parametrize("change, message", [
    (no_paragraph, "no question in it"),
    (no_context, r"data\[0\].paragraphs\[3\] has no 'context'"),
    (answers_that_are_text,
     r"data\[0\].paragraphs\[3\].qas\[1\] has no 'answers' that is a list"),
    (no_answer, r"\.qas\[1\] has no answer"),
    (answers_that_are_not_there, "no question has an answer at its offset"),
])
def test_a_training_file_that_is_not_squad_is_refused(home, tmp_path, capsys, change, message):
    shutil.copytree(home / "data", tmp_path / "data")
    tree = read(home / "data/train-v1.1.json")
    change(tree["data"][0]["paragraphs"])
    write_json(tmp_path / "data/train-v1.1.json", tree)
    run = tmp_path / "run"
    assert run_training(home, run, SHORT + ["--data", f"{tmp_path}/data"]) == 2
    assert re.search(message, error(capsys))
    assert_second_try_works(home, run)


def test_a_training_file_that_is_cut_off_is_refused(home, tmp_path, capsys):
    shutil.copytree(home / "data", tmp_path / "data")
    path = tmp_path / "data/train-v1.1.json"
    path.write_bytes(path.read_bytes()[:-9])
    run = tmp_path / "run"
    assert run_training(home, run, SHORT + ["--data", f"{tmp_path}/data"]) == 2
    assert "data/train-v1.1.json: cut off, or not JSON" in error(capsys)
    assert_second_try_works(home, run)


def test_odd_answers_passages_and_questions_are_counted_and_said(home, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    for part in ("train", "dev"):
        tree = read(home / f"data/{part}-v1.1.json")
        paragraphs = tree["data"][0]["paragraphs"]
        paragraphs[0]["qas"][0]["answers"][0]["answer_start"] += 1
        paragraphs[1]["qas"][0]["question"] = "Where was " * 30
        paragraphs[2]["context"] = ""
        write_json(tmp_path / f"data/{part}-v1.1.json", tree)
    flags = ["--epochs", "0.1", "--data", f"{tmp_path}/data"]
    assert run_training(home, tmp_path / "run", flags) == 0
    # The moved answer and the three of the empty passage are left out, the long question is cut.
    counts = "4 skipped (no answer at its offset), 1 cut (too long)"
    assert counts in capsys.readouterr().out
    # All of the dev file, which was changed last, are scored. An empty passage answers nothing.
    predictions = read(tmp_path / "run/predictions.json")
    assert len(predictions) == DEV
    for question in paragraphs[2]["qas"]:
        assert predictions[question["id"]] == ""


# ------------------------------------------------------------------- what is refused: model folders


@pytest.fixture
def bad(home, tmp_path, monkeypatch):
    """A copy of the model folder, to be damaged. Code in a file of it would run in tmp_path."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(home / "bert", tmp_path / "bad")
    return tmp_path / "bad"


def assert_refused(home, bad, capsys, message):
    """In one line, as --init and as --teacher. No run folder is made, and no code is run."""
    run = bad.parent / "run"
    assert run_training(home, run, SHORT, init=bad) == 2
    assert re.search(message, error(capsys))
    assert run_training(home, run, SHORT, teacher=bad) == 2
    assert re.search(message, error(capsys))
    assert not run.exists()
    assert not (bad.parent / "owned").exists()      # see Evil


CONFIGS = [
    # a key of config.json; its value, where ... is none; what is said of it
    ("hidden_size", ..., "hidden_size missing"),
    ("hidden_size", 25, "num_attention_heads"),
    ("vocab_size", "40", "vocab_size"),
    ("heads", [3, 3, 3], "heads is"),
    ("model_type", "gpt2", "not a BERT"),
    ("intermediate_size", 41, "by config.json"),
    ("num_hidden_layers", 1, "not known here"),
]


@pytest.mark.parametrize("key, value, message", CONFIGS)
def test_a_model_of_another_config_is_refused(home, bad, capsys, key, value, message):
    config = read(bad / "config.json")
    config[key] = value
    if value is ...:
        del config[key]
    write_json(bad / "config.json", config)
    assert_refused(home, bad, capsys, message)


LIES = [
    # what a header of safetensors says of the first tensor; what is said of that
    ("data_offsets", [-8, 0], "not a sound"),
    ("data_offsets", [0, 2 ** 62], "not a sound"),
    ("data_offsets", [4, 8], "not a sound"),        # two tensors would overlap
    ("dtype", "F16", "not a sound"),
    ("dtype", "Q4", "data of type 'Q4'"),
    ("shape", [2 ** 40, 2 ** 40], "not a sound"),
]


@pytest.mark.parametrize("key, value, message", LIES)
def test_weights_whose_header_lies_are_refused(home, bad, capsys, key, value, message):
    path = bad / "model.safetensors"
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:8 + size])
    names = [name for name in header if name != "__metadata__"]
    header[names[0]][key] = value
    lying = json.dumps(header).encode()
    path.write_bytes(len(lying).to_bytes(8, "little") + lying + raw[8 + size:])
    assert_refused(home, bad, capsys, message)


class Evil:
    """Read by pickle, it makes a folder."""
    def __reduce__(self):
        return os.mkdir, ("owned",)


def no_folder(bad):
    shutil.rmtree(bad)


def config_cut_off(bad):
    path = bad / "config.json"
    path.write_bytes(path.read_bytes()[:-5])


def config_that_is_a_list(bad):
    (bad / "config.json").write_bytes(b"[]")


def no_vocabulary(bad):
    (bad / "vocab.txt").unlink()


def vocabulary_with_a_word_more(bad):
    path = bad / "vocab.txt"
    path.write_bytes(path.read_bytes() + b"more\n")


def vocabulary_without_unk(bad):
    path = bad / "vocab.txt"
    path.write_bytes(path.read_bytes().replace(b"[UNK]", b"x"))


def vocabulary_that_is_no_text(bad):
    path = bad / "vocab.txt"
    path.write_bytes(b"\xff\xfe" + path.read_bytes())


def no_weights(bad):
    (bad / "model.safetensors").unlink()


def empty_weights(bad):
    (bad / "model.safetensors").write_bytes(b"")


def weights_cut_off(bad):
    path = bad / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def header_of_2_to_the_63_bytes(bad):
    path = bad / "model.safetensors"
    path.write_bytes((2 ** 63).to_bytes(8, "little") + path.read_bytes()[8:])


def pickle_in_place_of_weights(bad):
    (bad / "model.safetensors").write_bytes(pickle.dumps(Evil()))


def pickle_that_runs_code(bad):
    (bad / "model.safetensors").unlink()
    torch.save({"bert.pooler.dense.bias": Evil()}, bad / "pytorch_model.bin")


@pytest.mark.parametrize("damage, message", [
    (no_folder, "no model folder"),
    (config_cut_off, "config.json: not JSON"),
    (config_that_is_a_list, "config.json: a JSON object"),
    (no_vocabulary, "vocab.txt is missing"),
    (vocabulary_with_a_word_more, "vocab.txt: .* words for .* embeddings"),
    (vocabulary_without_unk, "vocab.txt"),
    (vocabulary_that_is_no_text, "vocab.txt"),
    (no_weights, "no model.safetensors"),
    (empty_weights, "model.safetensors: not a sound"),
    (weights_cut_off, "model.safetensors: not a sound"),
    (header_of_2_to_the_63_bytes, "cut off"),
    (pickle_in_place_of_weights, "not a sound safetensors"),
    (pickle_that_runs_code, "pytorch_model.bin: not a file of tensors alone"),
])
def test_a_damaged_model_folder_is_refused(home, bad, capsys, damage, message):
    damage(bad)
    assert_refused(home, bad, capsys, message)


# ---------------------------------------------------------- what is refused: compactions and tables


def test_a_compaction_that_changes_the_function_writes_no_model(chain, tmp_path, monkeypatch,
                                                                capsys):
    def wrong(model, right=compact.compact):
        small = right(model)
        small.qa_outputs.weight.data[0, 5] += 1e-2
        return small

    monkeypatch.setattr(compact, "compact", wrong)
    capsys.readouterr()
    assert run_compaction(chain / "hybrid", tmp_path / "small") == 2
    assert "differs" in error(capsys)
    assert [path.name for path in (tmp_path / "small").iterdir()] == ["run.json"]


def test_a_table_of_more_positions_than_a_model_has_is_refused(chain, capsys):
    before = snapshot(chain)
    capsys.readouterr()
    assert run_table([chain / "teacher"], ["--length", "65"]) == 2
    assert "64 positions" in error(capsys)
    assert snapshot(chain) == before


def test_a_table_of_a_folder_without_results_is_refused(chain, capsys):
    before = snapshot(chain)
    capsys.readouterr()
    assert run_table([chain / "teacher", chain / "bert"]) == 2
    assert "bert/results.json" in error(capsys)
    assert snapshot(chain) == before


def test_a_table_of_another_dev_set_is_refused(chain, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)     # the built-in corpus is written under data/
    before = snapshot(chain)
    capsys.readouterr()
    assert run_table([chain / "teacher"], ["--data", "builtin"]) == 2
    assert "same dev questions" in error(capsys)
    assert snapshot(chain) == before


# ---------------------------------------------------------------------------------------- importing

IMPORT_ALL = """
import random, signal, torch

def state():
    generators = (torch.get_rng_state().tolist(), random.getstate())
    return generators, signal.getsignal(signal.SIGINT), torch.get_num_threads()

before = state()
import blockprune, bert, compact, train_squad
assert state() == before
"""


def test_importing_prints_nothing_and_changes_nothing(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # -B: no compiled files either.
    done = subprocess.run([sys.executable, "-B", "-c", IMPORT_ALL], cwd=tmp_path, env=environment,
                          capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == ""
    assert not list(tmp_path.iterdir())
