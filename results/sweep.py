"""The paper's methods on one data set, one after another: `make sweep`, or

    python results/sweep.py --data FOLDER [--init WEIGHTS] [--runs FOLDER] [POINT ...]

A point is METHOD-BLOCK-λ, as in hybrid-32x32-80. All start from one teacher, see the same questions in the same
order and are scored on the same dev questions; each Hybrid is refilled too. Each step is one command of the
project's, so a stopped sweep goes on and a finished step is skipped. What a point leaves of small files is copied
to results/sweep/ as soon as it ends.
"""
import argparse
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Two λ each. The first row was chosen before any was run; the second once the densities of the first were seen (Block
# 32x32 17 %, 8x8 37 %, 1x1 60 %), and not their F1, so that methods overlap; the last for a density at which the
# authors' 1x1 empties heads. Struct's heads have a λ of their own.
POINTS = ("hybrid-32x32-80", "block-32x32-160", "block-8x8-160", "unstructured-1x1-160", "struct-32x32-40",
          "hybrid-32x32-200", "block-32x32-80", "block-8x8-400", "unstructured-1x1-600", "unstructured-1x1-2400")
KEPT = ("results.json", "f1.json", "masks.json", "run.json", "log.jsonl")
LARGEST = 1_000_000     # bytes of a file that is kept: the masks of single weights are larger


def run(script: str, *arguments) -> None:
    print("\npython", script, *arguments, flush=True)
    if code := subprocess.run([sys.executable, ROOT / script, *map(str, arguments)]).returncode:
        sys.exit(code)      # said already; the same command goes on from here


def keep(model: Path, trained: Path) -> None:
    """Copy a model's small files to results/sweep/, with run.json and log.jsonl of the run that trained it."""
    folder = ROOT / "results" / "sweep" / model.name
    folder.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        source = (trained if name in ("run.json", "log.jsonl") else model) / name
        if source.exists() and source.stat().st_size <= LARGEST:
            shutil.copy(source, folder / name)


def measure(data: str, teacher: Path, models: dict[Path, Path]) -> None:
    """Speed against the teacher, taking turns, into the results; what is small of all is kept."""
    run("compact.py", "--data", data, "--compare", *dict.fromkeys([teacher, *models]))
    for model, trained in ({teacher: teacher} | models).items():
        keep(model, trained)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("points", nargs="*", default=POINTS)
    parser.add_argument("--data", required=True)
    parser.add_argument("--init", default="weights/minilm")
    parser.add_argument("--runs", default="runs/sweep", type=Path)
    parser.add_argument("--questions", default=4000, type=int, help="of a point; the teacher sees twice as many")
    parser.add_argument("--dev-questions", default=2000, type=int)
    parser.add_argument("--max-length", default=256, type=int)
    a = parser.parse_args()
    common = ["--data", a.data, "--max-length", a.max_length, "--dev-questions", a.dev_questions]
    teacher = a.runs / "teacher"
    run("train_squad.py", *common, "--init", a.init, "--out", teacher, "--questions", 2 * a.questions, "--epochs", 2)
    everything = {teacher: teacher}     # model folder → the run that trained it
    for point in a.points:
        method, block, weight = point.split("-")
        masked, small, filled = a.runs / point, a.runs / f"{point}-compact", a.runs / f"{point}-filled"
        distilled = [*common, "--teacher", teacher, "--questions", a.questions]
        run("train_squad.py", *distilled, "--init", teacher, "--method", method, "--block", block,
            "--final-lambda", weight, "--out", masked)
        run("compact.py", masked, "--data", a.data, "--out", small)
        new = {small: masked}
        if method == "hybrid":
            run("train_squad.py", *distilled, "--init", small, "--fill", "--out", filled)
            new[filled] = filled
        everything |= new
        measure(a.data, teacher, new)
    measure(a.data, teacher, everything)    # once more, all in one go


if __name__ == "__main__":
    main()
