"""The whole pipeline, through the command lines of train_squad.py and compact.py, on a tiny BERT.

In order: the runs of `make squad` and what they leave on disk; other methods; SQuAD 2.0; questions
and scores; runs that were interrupted or killed, which go on to the same bits; what a run folder
rejects; what is recorded; wrong flags and files.
"""
import contextlib
import hashlib
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
import types
from pathlib import Path

import pytest
import torch

import blockprune
import compact
import train_squad as ts
from bert import HF_NAMES, folder_sha256, read_safetensors, write_json, write_safetensors
from tiny import (CHAIN, COMMON, SHORT, SHORT_HYBRID, bits, read, read_log, run_chain,
                  run_compaction, run_step, run_table, run_training, snapshot, write_home)

ROOT = Path(ts.__file__).resolve().parent
KILLS = int(os.environ.get("FUZZ", 20)) // 20       # of the whole chain

# Sizes of the model: E hidden size, F width of a feed-forward layer. DEV: number of dev questions.
E = 24
F = 40
DEV = 120


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A folder with data, bert, the runs of `make squad`, and in output.txt what they print."""
    home = tmp_path_factory.mktemp("chain")
    write_home(home)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run_chain(home)
        assert run_table([home / name for name in CHAIN]) == 0
    (home / "output.txt").write_text(printed.getvalue(), encoding="utf-8")
    return home


@pytest.fixture
def copy(chain, tmp_path):
    """A copy of it, to be changed."""
    shutil.copytree(chain, tmp_path / "copy")
    return tmp_path / "copy"


def error(capsys):
    """The one line on stderr, which begins with "error: "."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def change(path):
    """Change a file so that it can still be read: a bit, two lines, or a blank."""
    raw = path.read_bytes()
    if path.suffix == ".txt":
        lines = raw.splitlines(keepends=True)
        path.write_bytes(b"".join([*lines[:-2], lines[-1], lines[-2]]))
    elif path.suffix == ".json":
        path.write_bytes(raw + b"\n")
    else:
        path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def matrices(folder):
    """The encoder's matrices, by their names in model.safetensors."""
    tensors = read_safetensors(folder / "model.safetensors")
    return {name: tensor for name, tensor in tensors.items()
            if ".encoder." in name and tensor.dim() == 2}


def dev_questions(home):
    """(passage, question) for each question of the dev file."""
    paragraphs = read(home / "data/dev-v1.1.json")["data"][0]["paragraphs"]
    return [(paragraph["context"], qa) for paragraph in paragraphs for qa in paragraph["qas"]]


# --------------------------------------------------------------------------------------- the chain

MODEL_FILES = {"config.json", "model.safetensors", "vocab.txt", "run.json", "results.json",
               "predictions.json", "f1.json"}
TRAINING_FILES = MODEL_FILES | {"log.jsonl", "checkpoint.pt"}
RESULTS = set("""
    exact_match f1 seconds data seed precision command weights_sha256 parameters density heads ffn
    latency_ms speedup flops_ratio batch length device threads
    """.split())
COMPACTION_RESULTS = RESULTS | {"exact_match_masked", "f1_masked", "density_masked",
                                "max_abs_logit_difference", "allowed_logit_difference"}


@pytest.mark.parametrize("name, files, keys", [
    ("teacher", TRAINING_FILES, RESULTS),
    ("hybrid", TRAINING_FILES | {"pruning.safetensors"}, RESULTS),
    ("small", MODEL_FILES | {"masks.json"}, COMPACTION_RESULTS),
    ("filled", TRAINING_FILES, RESULTS),
], ids=CHAIN)
def test_a_run_leaves_these_files_and_results(chain, name, files, keys):
    run = chain / name
    assert {path.name for path in run.iterdir()} == files
    results = read(run / "results.json")
    assert set(results) == keys
    assert f"/{name}" in results["command"]
    assert (results["seed"], results["precision"]) == (17, "fp32")
    # A result belongs to the weights beside it.
    assert results["weights_sha256"] == sha256(run / "model.safetensors")
    nonzero = sum(int(matrix.count_nonzero()) for matrix in matrices(run).values())
    assert results["parameters"]["linear"] == sum(W.numel() for W in matrices(run).values())
    assert results["parameters"]["linear_nonzero"] == nonzero
    # Density is relative to the dense model: 2 layers of four E × E and two E × F.
    assert results["density"] == nonzero / (2 * (4 * E * E + 2 * E * F))


def test_results_json_names_its_data(chain):
    train, dev = [sha256(chain / f"data/{part}-v1.1.json") for part in ("train", "dev")]
    data = {"name": "data", "builtin": True, "v2": False, "train_questions": 300,
            "dev_questions": DEV, "sha256": {"train": train, "dev": dev}}
    for name in ("teacher", "hybrid", "filled"):
        assert read(chain / name / "results.json")["data"] == data
    # A compaction is not trained.
    data.update(train_questions=None, sha256={"train": None, "dev": dev})
    assert read(chain / "small/results.json")["data"] == data


def test_run_json_has_settings_inputs_and_versions(chain):
    run = read(chain / "hybrid/run.json")
    assert set(run) == {"settings", "inputs", "command", "commit", "threads", "processor", "python",
                        "torch", "numpy", "tokenizers"}
    assert run["settings"] == vars(ts.read_run(chain / "hybrid"))
    assert run["settings"]["final_lambda"] == 2
    assert run["torch"] == torch.__version__
    train, dev = [sha256(chain / f"data/{part}-v1.1.json") for part in ("train", "dev")]
    teacher = folder_sha256(chain / "teacher")
    assert run["inputs"] == {"train file": train, "dev file": dev, "init": teacher,
                             "teacher": teacher}
    assert read(chain / "teacher/run.json")["inputs"]["teacher"] is None
    assert read(chain / "small/run.json")["inputs"] == {"run": folder_sha256(chain / "hybrid"),
                                                        "dev file": dev}


def test_model_safetensors_is_w_times_mask(chain):
    """W′ = W ⊙ M: W′ from model.safetensors, W from pruning.safetensors, M from masks.json."""
    effective = matrices(chain / "hybrid")
    saved = read_safetensors(chain / "hybrid/pruning.safetensors")
    blocks = {"attention.query": (4, 6), "attention.key": (4, 6), "attention.value": (4, 6),
              "attention.out": (6, 4), "ffn.fc1": (1, E), "ffn.fc2": (E, 1)}
    kept = 0        # a whole matrix may be empty
    for name, (r, c) in blocks.items():
        place = f"bert.layers.{{}}.{name}"
        for layer, rows in read(chain / "small/masks.json").items():
            # A digit of the file is a block of M.
            digits = [list(map(int, row)) for row in rows[name.split(".")[1]]]
            grid = torch.tensor(digits)
            M = grid.repeat_interleave(r, dim=0).repeat_interleave(c, dim=1)
            W = saved[place.format(layer) + ".parametrizations.weight.original"]
            hf_name = "bert." + HF_NAMES[place].format(layer) + ".weight"
            assert torch.equal(effective[hf_name], W * M)
            assert not M.all()
            kept += M.sum()
    assert kept > 0


def test_compaction_removes_heads_and_keeps_the_function(chain):
    teacher, masked, small, filled = [read(chain / name / "results.json") for name in CHAIN]
    assert teacher["f1"] > 12       # a guess among the words of a passage gives 3
    assert (teacher["heads"], teacher["ffn"], teacher["density"]) == ([3, 3], [F, F], 1)
    assert masked["density"] == small["density_masked"] < 0.6
    assert masked["density"] == pytest.approx(read_log(chain / "hybrid")[-1]["density"]["all"])
    config = read(chain / "small/config.json")
    assert sum(config["heads"]) < 6 and sum(config["ffn"]) < F
    for results in (masked, small, filled):
        assert (results["heads"], results["ffn"]) == (config["heads"], config["ffn"])
    assert small["f1_masked"] == masked["f1"]
    assert small["exact_match_masked"] == masked["exact_match"]
    assert abs(small["f1"] - masked["f1"]) <= 100 / DEV     # a tie may turn
    assert 0 < small["max_abs_logit_difference"] <= small["allowed_logit_difference"] < 1e-3
    # A fill leaves no zeros.
    assert small["parameters"]["linear_nonzero"] < small["parameters"]["linear"]
    assert filled["parameters"]["linear_nonzero"] == small["parameters"]["linear"]


def test_the_log_of_fine_pruning_adds_up(chain):
    lines = read_log(chain / "hybrid")
    assert [line["step"] for line in lines] == list(range(1, 116))     # 5 epochs of 23
    for line in lines:
        assert set(line) == set("step loss ce kd penalty threshold lambda lr density".split())
        assert line["lambda"] == pytest.approx(2 * line["threshold"] / 0.1)     # λ follows τ
        loss = 0.1 * line["ce"] + 0.9 * line["kd"] + line["lambda"] * line["penalty"]
        assert line["loss"] == pytest.approx(loss, rel=1e-4)
    # τ rises from 0 to 0.1. Scores begin at 0, where σ is 1/2 and nothing is pruned.
    tau = [line["threshold"] for line in lines]
    assert tau == sorted(tau)
    assert 0 == tau[0] < tau[50] < tau[-1] == 0.1
    assert (lines[0]["penalty"], lines[0]["density"]["all"]) == (0.5, 1)


def test_the_table_and_summary_json_are_results_json(chain):
    output = (chain / "output.txt").read_text(encoding="utf-8")
    summary = read(chain / "summary.json")
    assert [row.pop("model") for row in summary] == list(CHAIN)
    for name, row in zip(CHAIN, summary):
        results = read(chain / name / "results.json")
        assert row == results
        assert re.search(rf"^{name} +{results['exact_match']:.2f} +{results['f1']:.2f} .* "
                         rf"{results['density']:.3f} .* {sum(results['heads'])}/6 .* "
                         rf"{results['speedup']:.2f}x$", output, re.MULTILINE)
        # Speed is relative to the first folder.
        assert (row["batch"], row["length"], row["device"], row["threads"]) == (2, 48, "cpu", 1)
        assert row["latency_ms"] * row["speedup"] == pytest.approx(summary[0]["latency_ms"])
    # A masked model is as large as before.
    assert [row["flops_ratio"] > 1 for row in summary] == [False, False, True, True]


# ------------------------------------------------------------------------------- the other methods


@pytest.mark.parametrize("method", ["block", "struct", "unstructured"])
def test_other_methods_prune_and_compact(chain, tmp_path, method):
    flags = [*SHORT_HYBRID, "--method", method, "--block", "5x7"]       # with ragged edges
    assert run_training(chain, tmp_path / "run", flags, init="teacher", teacher="teacher") == 0
    assert run_compaction(tmp_path / "run", tmp_path / "small") == 0
    results = read(tmp_path / "small/results.json")
    assert 0 < results["density"] < 0.9
    assert abs(results["f1"] - results["f1_masked"]) <= 100 / DEV


# --------------------------------------------------------------------------------------- SQuAD 2.0


@pytest.fixture(scope="module")
def v2(chain, tmp_path_factory):
    """A folder with data of which a third has no answer, and a run on it."""
    folder = tmp_path_factory.mktemp("v2")
    for part in ("train", "dev"):
        tree = read(chain / f"data/{part}-v1.1.json")
        for paragraph in tree["data"][0]["paragraphs"]:
            paragraph["qas"][1].update(answers=[], is_impossible=True)
        write_json(folder / f"{part}-v2.0.json", tree)
    flags = "--v2 --null-threshold -0.1 --epochs 1 --lr 3e-3".split()
    assert run_training(chain, folder / "run", ["--data", str(folder), *flags], init="teacher") == 0
    return folder


def test_v2_holds_without_its_flag(v2, chain, tmp_path, capsys):
    """In a compaction of the run, in its table, in --score and in --ask."""
    predictions = read(v2 / "run/predictions.json")
    assert 3 < list(predictions.values()).count("") < DEV
    assert run_compaction(v2 / "run", tmp_path / "small") == 0
    assert read(tmp_path / "small/predictions.json") == predictions
    assert run_table([v2 / "run", tmp_path / "small"], ["--data", str(v2)]) == 0
    capsys.readouterr()
    assert ts.main(["--score", f"{v2}/run/predictions.json", f"{v2}/dev-v2.0.json"]) == 0
    assert json.loads(capsys.readouterr().out)["f1"] == read(v2 / "run/results.json")["f1"]
    # The first question that was not answered.
    for passage, question in dev_questions(chain):
        if predictions[question["id"]] == "":
            break
    (tmp_path / "passage").write_text(passage, encoding="utf-8")
    for run in (v2 / "run", tmp_path / "small"):
        assert ts.main(["--ask", str(run), f"{tmp_path}/passage", question["question"]]) == 0
        assert capsys.readouterr().out.startswith("no answer")


def test_a_model_of_v1_can_be_scored_on_v2(chain, v2, tmp_path):
    assert run_compaction(chain / "teacher", tmp_path / "out", ["--data", str(v2), "--v2"]) == 0
    data = read(tmp_path / "out/results.json")["data"]
    assert data["v2"] is True
    assert data["sha256"]["dev"] == read(v2 / "run/results.json")["data"]["sha256"]["dev"]


# ----------------------------------------------------------------------------- questions and scores


def test_ask_answers_as_the_run_did_and_says_what_is_cut(chain, tmp_path, capsys):
    passage, question = dev_questions(chain)[0]
    (tmp_path / "passage").write_text(passage, encoding="utf-8")
    asked = [f"{chain}/small", f"{tmp_path}/passage", question["question"], "what " * 70]
    assert ts.main(["--ask", *asked]) == 0
    printed = capsys.readouterr()
    answers = [line.split("  (score ")[0] for line in printed.out.splitlines()]
    assert answers[0] == read(chain / "small/predictions.json")[question["id"]]
    assert len(answers) == 2 and answers[1] in passage
    assert printed.err == "1 questions are cut after 16 word pieces\n"


def test_ask_takes_a_bert_folder_without_run_json(chain, tmp_path, capsys):
    (tmp_path / "passage").write_text("Anna Adams owns a cat.", encoding="utf-8")
    asked = ["--ask", f"{chain}/bert", f"{tmp_path}/passage", "Which animal does Anna Adams own?"]
    assert ts.main(asked) == 0
    assert ts.main([*asked, "--v2", "--null-threshold=-1000"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    # The score is the best span's in both.
    assert second == "no answer  (score" + first.split("  (score")[1]


@pytest.mark.parametrize("folder, passage, message", [
    ("small", "latin-1", "latin-1: 'utf-8' codec can't decode"),
    ("small", "nowhere", "nowhere"),
    ("nowhere", "output.txt", "nowhere/config.json"),
], ids=["latin-1", "no passage", "no model"])
def test_ask_names_the_file_that_it_cannot_read(copy, capsys, folder, passage, message):
    (copy / "latin-1").write_bytes("Müller owns a cat.".encode("latin-1"))
    assert ts.main(["--ask", f"{copy}/{folder}", f"{copy}/{passage}", "who?"]) == 2
    assert message in error(capsys)


def test_score_gives_what_results_json_has(chain, capsys):
    results = read(chain / "teacher/results.json")
    dev_file = f"{chain}/data/dev-v1.1.json"
    assert ts.main(["--score", f"{chain}/teacher/predictions.json", dev_file]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores == {"exact_match": results["exact_match"], "f1": results["f1"]}
    mean_f1 = sum(read(chain / "teacher/f1.json").values()) / DEV
    assert mean_f1 == pytest.approx(results["f1"] / 100, abs=1e-4)


def test_what_is_scored_is_what_was_saved(chain, tmp_path, monkeypatch):
    scored = []

    def evaluate(model, *rest, real=ts.evaluate):
        scored.append(model)
        return real(model, *rest)

    monkeypatch.setattr(ts, "evaluate", evaluate)
    assert run_training(chain, tmp_path / "run", SHORT_HYBRID) == 0
    assert len(scored) == 1
    assert not any(blockprune.masks(scored[0]))     # the model on disk has none


def test_a_bert_without_qa_head_is_trained_and_not_filled(copy, capsys):
    for name in ("bert", "small"):
        path = copy / name / "model.safetensors"
        tensors = read_safetensors(path)
        del tensors["qa_outputs.weight"], tensors["qa_outputs.bias"]
        write_safetensors(tensors, path)
    assert run_training(copy, "run", SHORT) == 0
    assert "fresh: ['qa_outputs.bias', 'qa_outputs.weight']" in capsys.readouterr().out
    assert run_training(copy, "fill", [*SHORT, "--fill"], init="small") == 2
    assert "missing ['qa_outputs.bias', 'qa_outputs.weight']" in error(capsys)


def test_answers_at_a_wrong_offset_are_scored_and_not_learnt(copy, capsys):
    for part in ("train", "dev"):
        path = copy / f"data/{part}-v1.1.json"
        tree = read(path)
        question = tree["data"][0]["paragraphs"][0]["qas"][0]
        question["answers"][0]["answer_start"] += 1
        write_json(path, tree)
    assert run_training(copy, "run", ["--epochs", "0.1"]) == 0
    assert "1 skipped (no answer at its offset), 0 cut (too long)" in capsys.readouterr().out
    assert read(copy / "run/predictions.json")[question["id"]] != ""


# -------------------------------------------------------------------------- interrupted and killed

STAGES = {
    # a stage: the model it starts from, its teacher, its flags
    "dense": ("bert", None, SHORT),
    "prune": ("teacher", "teacher", [*SHORT_HYBRID, "--attention-dropout", "0.1"]),
    "fill": ("small", "teacher", [*SHORT, "--fill"]),
}
OFTEN = ["--checkpoint-every", "0"]     # after every step


def train_stage(home, out, stage, flags=()):
    """A short run of a stage, 12 steps; the exit status."""
    init, teacher, stage_flags = STAGES[stage]
    return run_training(home, out, [*stage_flags, *flags], init=init, teacher=teacher)


@pytest.fixture(scope="module")
def whole(chain):
    """What uninterrupted runs make, by stage: those in chain/dense, chain/prune, chain/fill."""
    for stage in STAGES:
        assert train_stage(chain, chain / stage, stage) == 0
    return {stage: bits(chain / stage) for stage in STAGES}


def at_step(monkeypatch, number, change_terms):
    """Call change_terms(terms) in this step, after the forward pass. Steps count from 1."""
    def step_loss(*arguments, real=ts.step_loss):
        terms = real(*arguments)
        if arguments[3] + 1 == number:
            change_terms(terms)
        return terms

    monkeypatch.setattr(ts, "step_loss", step_loss)


def interrupt(*_, **__):
    raise KeyboardInterrupt


def step_of_checkpoint(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)["step"]


@pytest.mark.parametrize("stage, step", [("dense", 5), ("prune", 5), ("prune", 9), ("fill", 12)])
def test_an_interrupted_run_goes_on_to_the_same_bits(chain, whole, tmp_path, monkeypatch, capsys,
                                                     stage, step):
    run = tmp_path / "run"
    capsys.readouterr()
    with monkeypatch.context() as patch:
        at_step(patch, step, interrupt)
        assert train_stage(chain, run, stage, OFTEN) == 130
    assert capsys.readouterr().err == "interrupted; the same command goes on where it can\n"
    assert step_of_checkpoint(run) == step - 1
    # The log may be ahead of the checkpoint, and its last line cut off.
    with open(run / "log.jsonl", "a", encoding="utf-8") as file:
        file.write(f'{{"step": {step}}}\n{{"step": {step + 1}, "lo')
    torch.rand(3)       # random numbers that are drawn in between do not matter
    assert train_stage(chain, run, stage) == 0
    assert f"going on from step {step - 1}" in capsys.readouterr().out
    assert bits(run) == whole[stage]


def nan_loss(terms):
    terms["loss"] = terms["loss"] * math.nan


@pytest.mark.parametrize("flags", [[*OFTEN, "--log-every", "99"], ["--log-every", "5"]],
                         ids=["checkpoint", "log"])
def test_nan_stops_a_run_before_checkpoint_and_log(chain, whole, tmp_path, monkeypatch, capsys,
                                                   flags):
    run = tmp_path / "run"
    capsys.readouterr()
    with monkeypatch.context() as patch:
        at_step(patch, 5, nan_loss)
        assert train_stage(chain, run, "prune", flags) == 2
    assert "stopped at step 5: loss nan" in error(capsys)
    assert not (run / "log.jsonl").exists()
    if "--checkpoint-every" in flags:
        assert step_of_checkpoint(run) == 4
    else:
        assert not (run / "checkpoint.pt").exists()
    assert train_stage(chain, run, "prune") == 0
    assert bits(run)["model.safetensors"] == whole["prune"]["model.safetensors"]


class Killed(BaseException):
    """Nothing catches it."""


def kill_before(monkeypatch, name, times):
    """Stop where a file of this name is about to be put in place, for the `times`th time."""
    calls = []

    def replace(temporary, path, real=os.replace):
        if Path(path).name == name:
            calls.append(path)
            if len(calls) == times:
                raise Killed
        real(temporary, path)

    monkeypatch.setattr(os, "replace", replace)


@pytest.mark.parametrize("stage", ["training", "compaction"])
def test_killed_before_any_file_it_ends_in_the_same_bits(chain, whole, tmp_path, monkeypatch,
                                                         stage):
    run = tmp_path / "run"
    whole_run = chain / ("prune" if stage == "training" else "small")

    def start():
        if stage == "training":
            return train_stage(chain, run, "prune", OFTEN)
        return run_compaction(chain / "hybrid", run)

    # Once before each file. run.json is the first, and the second attempt goes on in its folder.
    names = sorted(path.name for path in whole_run.iterdir())
    names.remove("run.json")
    for name in ["run.json", *names]:
        for times in (1, 4) if name == "checkpoint.pt" else (1,):
            with monkeypatch.context() as patch, pytest.raises(Killed):
                kill_before(patch, name, times)
                start()
            assert not (run / "results.json").exists()
    assert start() == 0
    assert bits(run) == bits(whole_run)
    assert not list(run.glob("*.tmp"))


@pytest.mark.parametrize("trial", range(KILLS))
def test_a_chain_killed_at_random_ends_in_the_same_bits(chain, tmp_path, trial):
    for name in ("data", "bert"):
        shutil.copytree(chain / name, tmp_path / name)
    # All runs in a process of their own, with a checkpoint after every step.
    code = "import sys, pathlib, tiny; tiny.COMMON += sys.argv[2:]; "
    code += "tiny.run_chain(pathlib.Path(sys.argv[1]))"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests", "PYTHONUNBUFFERED": "1",
                   "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), *OFTEN], env=environment,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    # The moment: shortly after one of the lines that it prints.
    lines = (chain / "output.txt").read_text(encoding="utf-8").splitlines()
    number = random.randrange(len(lines))
    for _ in range(number):
        child.stdout.readline()
    time.sleep(random.random() * 0.05)
    child.kill()
    child.communicate()
    run_chain(tmp_path)
    for name in CHAIN:
        assert bits(tmp_path / name) == bits(chain / name), (name, number)


def test_without_results_json_it_is_scored_and_not_trained(copy, monkeypatch):
    # As if the steps had taken 1,000 seconds more.
    state = torch.load(copy / "hybrid/checkpoint.pt", weights_only=True)
    state["seconds"] += 1000
    torch.save(state, copy / "hybrid/checkpoint.pt")
    monkeypatch.setattr(ts, "step_loss", interrupt)     # a training step would end the run
    for name in CHAIN:
        before = bits(copy / name)
        (copy / name / "results.json").unlink()
        assert run_step(copy, name) == 0
        assert bits(copy / name) == before
    assert read(copy / "hybrid/results.json")["seconds"] > 1000


def test_a_checkpoint_has_the_random_state_of_its_device(tmp_path, monkeypatch):
    restored = []
    gpu = types.SimpleNamespace(get_rng_state=lambda: 77, set_rng_state=restored.append)
    monkeypatch.setattr(torch, "get_device_module", {"cuda": gpu}.__getitem__)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    ts.save_checkpoint(tmp_path, model, optimizer, "cuda", 3, 0.5)
    assert ts.restore(tmp_path, model, optimizer, "cuda") == (3, 0.5)
    assert restored == [77]


# -------------------------------------------------------------------------------------- run folders


def test_a_finished_run_is_left_as_it_is_wherever_it_lies(copy, monkeypatch, capsys):
    (copy / "hybrid/checkpoint.pt").unlink()        # it may be deleted
    before = snapshot(copy)
    # A path from where one is, through a link; other log lines; the same values by another preset.
    (copy.parent / "link").symlink_to("copy")
    monkeypatch.chdir(copy.parent)
    capsys.readouterr()
    for name in CHAIN:
        flags = [] if name == "small" else "--log-every 7 --preset builtin".split()
        assert run_step(Path("link"), name, ["--data", "copy/data/", *flags]) == 0
        assert f"{name}: finished before" in capsys.readouterr().out
    assert snapshot(copy) == before


@pytest.mark.parametrize("name, changed, message", [
    ("hybrid", "--seed=3 --lr=5e-3", "seed was 17 and is 3, lr was 0.001 and is 0.005"),
    ("small", "--dev-questions=7", "dev_questions was None and is 7"),
    ("filled", "--teacher=", "another teacher"),
    ("teacher", "data/train-v1.1.json", "another train file"),
    ("teacher", "data/dev-v1.1.json", "another dev file"),
    ("teacher", "bert/vocab.txt", "another init"),
    ("teacher", "bert/model.safetensors", "another init"),
    ("filled", "teacher/config.json", "another teacher"),
    ("small", "hybrid/pruning.safetensors", "another run"),
    ("small", "data/dev-v1.1.json", "another dev file"),
])
def test_other_settings_and_inputs_are_rejected_by_name(copy, capsys, name, changed, message):
    flags = changed.split()
    if not changed.startswith("--"):
        flags = []
        change(copy / changed)
    before = snapshot(copy)
    assert run_step(copy, name, flags) == 2
    assert error(capsys) == (f"error: {copy}/{name} holds another run ({message}): use another "
                             "--out, or RUNS= with make")
    assert snapshot(copy) == before


@pytest.mark.parametrize("left", ["results.json", "checkpoint.pt", "model.safetensors", None])
def test_a_folder_is_taken_only_if_nothing_was_made_in_it(copy, capsys, left):
    folder = copy / "teacher"
    for name in ("results.json", "checkpoint.pt", "model.safetensors"):
        if name != left:
            (folder / name).unlink()
    if left is not None:
        assert train_stage(copy, folder, "dense") == 2
        assert "teacher holds another run" in error(capsys)
    else:
        assert train_stage(copy, folder, "dense") == 0
        assert [line["step"] for line in read_log(folder)] == list(range(1, 13))
        assert read(folder / "run.json")["settings"]["epochs"] == 3


@pytest.mark.parametrize("out, message", [
    ("bert", "bert is not empty, and no run folder: use another --out"),
    ("output.txt", "File exists"),
    ("output.txt/run", "output.txt/run"),
    ("hybrid", "hybrid holds another run"),
    ("small", "small holds another run"),
])
def test_nothing_is_written_into_folders_of_others(copy, capsys, out, message):
    before = snapshot(copy)
    assert train_stage(copy, copy / out, "dense") == 2
    assert message in error(capsys)
    # A compaction, of hybrid into itself and of the teacher.
    folder = "hybrid" if out == "hybrid" else "teacher"
    assert run_compaction(copy / folder, copy / out) == 2
    assert message in error(capsys)
    assert snapshot(copy) == before


def test_a_second_process_is_rejected(copy, capsys):
    shutil.rmtree(copy / "filled")
    for name in ("filled", "small"):
        with ts.locked(copy / name):
            before = snapshot(copy)
            assert run_step(copy, name) == 2
            assert f"{name}: another process is at work in it" in error(capsys)
            assert snapshot(copy) == before
    with ts.locked(copy / "small"):
        assert run_table([copy / "small"]) == 2     # it writes to results.json
    assert "another process" in error(capsys)
    assert run_step(copy, "filled") == 0


@pytest.mark.parametrize("system", ["Windows", "no locks"])
def test_where_nothing_can_be_locked_nothing_is(chain, tmp_path, monkeypatch, system):
    def flock(*_):
        raise OSError(38, "Function not implemented")

    if system == "Windows":
        monkeypatch.setitem(sys.modules, "fcntl", None)
    else:
        monkeypatch.setattr("fcntl.flock", flock)
    assert train_stage(chain, tmp_path / "run", "dense") == 0


def test_results_of_other_weights_count_as_none(copy, capsys):
    before = bits(copy / "hybrid")
    change(copy / "hybrid/model.safetensors")
    assert run_table([copy / "hybrid"]) == 2
    assert run_compaction(copy / "hybrid", copy / "new") == 2
    for line in capsys.readouterr().err.splitlines():
        assert line == (f"error: {copy}/hybrid: no results.json that belongs to its weights. Rerun "
                        "the command that made this folder")
    assert not (copy / "new").exists()
    # The same command writes and scores the weights again.
    assert run_step(copy, "hybrid") == 0
    assert bits(copy / "hybrid") == before
    assert run_step(copy, "small") == 0
    assert "small: finished before" in capsys.readouterr().out


def test_a_bert_folder_without_run_json_is_compacted(copy, capsys):
    flags = ["--data", f"{copy}/data"]
    (copy / "teacher/results.json").unlink()
    assert run_compaction(copy / "teacher", copy / "new", flags) == 2      # not finished
    assert "Rerun the command" in error(capsys)
    (copy / "teacher/run.json").unlink()
    assert run_compaction(copy / "teacher", copy / "new", flags) == 0
    results = read(copy / "new/results.json")
    assert results["f1"] == results["f1_masked"] > 12
    assert not (copy / "new/masks.json").exists()
    assert ts.read_run(copy / "new").max_length == ts.Config().max_length


def test_masks_that_are_not_the_models_are_rejected(copy, capsys):
    path = copy / "hybrid/pruning.safetensors"
    tensors = read_safetensors(path)
    tensors.pop("bert.layers.1.attention.key.parametrizations.weight.0.scores")
    write_safetensors(tensors, path)
    assert run_compaction(copy / "hybrid", copy / "new") == 2
    assert "its tensors are not those of the model's masks" in error(capsys)


# --------------------------------------------------------------------------------- what is recorded


def test_a_run_keeps_its_precision(chain, tmp_path, monkeypatch, capsys):
    """It begins where bf16 is fast, and goes on where it is not."""
    place = COMMON.index("--precision")
    flags = [*COMMON[:place], *COMMON[place + 2:], *SHORT]

    def precision_of(name, units):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units, raising=False)
        assert ts.main([*flags, "--data", f"{chain}/data", "--init", f"{chain}/bert", "--out",
                        f"{tmp_path}/{name}"]) == 0
        return read(tmp_path / name / "results.json")["precision"]

    assert precision_of("run", units={"avx512_bf16": True}) == "bf16"
    capsys.readouterr()
    assert precision_of("run", units={}) == "bf16"
    assert "finished before" in capsys.readouterr().out
    assert precision_of("another", units={}) == "fp32"


def test_seeds_differ_in_training_questions_not_in_dev(chain, tmp_path, monkeypatch):
    read_questions = []

    def read_squad(*arguments, real=ts.read_squad):
        squad = real(*arguments)
        read_questions.append([question.id for question in squad.questions])
        return squad

    monkeypatch.setattr(ts, "read_squad", read_squad)
    for seed in ("17", "18"):
        flags = [*SHORT, "--seed", seed, "--dev-questions", "7"]
        assert run_training(chain, tmp_path / seed, flags) == 0
    train, dev, other_train, other_dev = read_questions
    assert train != other_train and len(train) == 40
    assert dev == other_dev and len(dev) == 7


def test_without_git_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ts.environment("cpu")["commit"] is None


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not there")
def test_the_commit_is_that_of_the_file(tmp_path, monkeypatch):
    def git(*words):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)

    file = tmp_path / "train_squad.py"
    file.write_text("1", encoding="utf-8")
    monkeypatch.setattr(ts, "__file__", str(file))
    # A repository around the file that does not have it, as around an installed package.
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "first")
    assert ts.git_commit() is None
    git("add", file.name)
    git("commit", "-q", "-m", "second")
    assert ts.git_commit() == git("rev-parse", "HEAD").stdout.strip()
    file.write_text("2", encoding="utf-8")
    assert ts.git_commit().endswith("-dirty")


def test_a_terminal_that_cannot_show_it_stops_no_run(chain, tmp_path, monkeypatch):
    """It cannot show τ in the log and ■ in the drawing."""
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "ascii", write_through=True))
    assert train_stage(chain, tmp_path / "run", "prune") == 0
    assert run_compaction(tmp_path / "run", tmp_path / "small") == 0
    assert b"? 0.100  density" in shown.getvalue() and b"heads ?" in shown.getvalue()


# ---------------------------------------------------------------------------- wrong flags and files


@pytest.mark.parametrize("flags, message", [
    ("--data {home}/nowhere", "nowhere: a folder with train-v1.1.json or"),
    ("--v2", "a folder with train-v2.0.json or train-v2.0.json.xz is needed"),
    ("--teacher {home}/nowhere", "nowhere: no model.safetensors"),
    ("--teacher {other}", "bert have different tokenizers"),
    ("--max-length 80", "--max-length 80 is over the model's 64"),
    ("--epochs 0.1", "--epochs 0.1 is less than two steps"),
    ("--method hybrid --score-lr 0.01 --final-warmup 2", "nothing could be pruned: in 12 steps"),
    ("--fill --init {home}/hybrid", "hybrid still has its masks. Compact it first, with python "
     "compact.py {home}/hybrid --data {home}/data --out {home}/hybrid-compact, and start from "
     "that"),
    ("--init {home}/hybrid", "hybrid still has its masks. Compact it first"),
    ("--init {home}/hybrid --method hybrid", "hybrid still has its masks. Compact it first"),
], ids=lambda text: text.split(" {")[0])
def test_an_impossible_run_is_rejected_before_its_folder(chain, tmp_path, capsys, flags, message):
    shutil.copytree(chain / "bert", tmp_path / "other")
    change(tmp_path / "other/vocab.txt")
    places = {"home": chain, "other": tmp_path / "other"}
    flags = flags.format(**places).split()
    assert run_training(chain, tmp_path / "run", [*SHORT, *flags]) == 2
    assert message.format(**places) in error(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("program, flags, named", [
    (ts, "--lamda 3", "--lamda"),
    (ts, "--epoch 3", "--epoch"),       # no abbreviation is guessed at
    (ts, "--method magnitude", "--method"),
    (ts, "--ask folder passage", "--ask takes a model folder, a file with the passage"),
    (compact, "folder", "--out"),
])
def test_a_wrong_command_line_is_rejected(capsys, program, flags, named):
    with pytest.raises(SystemExit, match="2"):
        program.main(flags.split())
    assert named in capsys.readouterr().err


class Evil:
    """Read by pickle, it makes a folder."""
    def __reduce__(self):
        return os.mkdir, ("made-by-code",)


@pytest.mark.parametrize("file", ["teacher/checkpoint.pt", "bert/model.safetensors"])
def test_a_pickle_runs_no_code_and_is_kept(copy, monkeypatch, capsys, file):
    monkeypatch.chdir(copy)
    (copy / "teacher/results.json").unlink()
    torch.save({"step": Evil()}, copy / file)
    before = snapshot(copy)
    assert run_step(copy, "teacher") == 2
    assert f"{file}: " in error(capsys)
    assert snapshot(copy) == before
    assert not (copy / "made-by-code").exists()


def test_a_compaction_that_is_another_function_is_not_written(chain, tmp_path, monkeypatch, capsys):
    def wrong(model, right=compact.compact):
        small = right(model)
        small.qa_outputs.weight.data[0, 5] += 1e-2
        return small

    monkeypatch.setattr(compact, "compact", wrong)
    assert run_compaction(chain / "hybrid", tmp_path / "small") == 2
    assert "the compacted model differs" in error(capsys)
    assert [path.name for path in (tmp_path / "small").iterdir()] == ["run.json"]


def test_a_table_of_other_dev_questions_is_rejected(copy, v2, capsys):
    assert run_table([copy / "teacher", v2 / "run"]) == 2
    assert "the models were not scored on the same dev questions" in error(capsys)
    change(copy / "data/dev-v1.1.json")
    assert run_table([copy / "teacher"], ["--data", f"{copy}/data"]) == 2
    assert "the same dev questions" in error(capsys)
