"""Runs the paper's methods on one data set, one after another (make sweep).

    python results/sweep.py --data FOLDER [--init WEIGHTS] [--runs FOLDER] [POINT ...]

A point is METHOD-BLOCK-λ, as in hybrid-32x32-80. All points start from one teacher, see the same
questions in the same order, and are scored on the same dev questions. Each Hybrid is refilled too.
Each step is a command of the project's: a sweep that was stopped goes on, and a step that is
finished is skipped. The small files of a point are copied to results/sweep/ as soon as it ends.
"""
import argparse
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

POINTS = [
    # Chosen before any was run.
    "hybrid-32x32-80", "block-32x32-160", "block-8x8-160", "unstructured-1x1-160",
    "struct-32x32-40",
    # Chosen when the densities of the first were seen (Block 32x32 17 %, 8x8 37 %, 1x1 60 %), and
    # not their F1, so that methods overlap. Struct's heads have a λ of their own.
    "hybrid-32x32-200", "block-32x32-80", "block-8x8-400", "unstructured-1x1-600",
    # For a density at which the authors' 1x1 empties heads.
    "unstructured-1x1-2400",
]
OF_MODEL = ("results.json", "f1.json", "masks.json")
OF_TRAINING = ("run.json", "log.jsonl")
LARGEST = 1_000_000     # bytes of a file that is kept: the masks of single weights are larger


def run(script: str, arguments: list) -> None:
    """Run a command of the project. Where it fails the sweep ends with its exit status."""
    words = [str(argument) for argument in arguments]
    print("\npython", script, " ".join(words), flush=True)
    status = subprocess.run([sys.executable, ROOT / script] + words).returncode
    if status != 0:
        sys.exit(status)        # it has said why; the same sweep goes on from here


def copy_small(source: Path, folder: Path) -> None:
    """Copy a file, if it is there and small."""
    if source.exists() and source.stat().st_size <= LARGEST:
        shutil.copy(source, folder / source.name)


def keep(model: Path, trained: Path) -> None:
    """Copy a model's small files to results/sweep/, and those of the run that trained it."""
    folder = ROOT / "results" / "sweep" / model.name
    folder.mkdir(parents=True, exist_ok=True)
    for name in OF_MODEL:
        copy_small(model / name, folder)
    for name in OF_TRAINING:
        copy_small(trained / name, folder)


def measure(data: str, teacher: Path, models: dict[Path, Path]) -> None:
    """Time some models against the teacher, all in one process, and keep the small files of all.

    models: the run that trained each, by the model's folder.
    """
    folders = [teacher]
    folders.extend(models)
    run("compact.py", ["--data", data, "--compare"] + folders)
    keep(teacher, teacher)
    for model, trained in models.items():
        keep(model, trained)


def sweep(a: argparse.Namespace) -> None:
    common = ["--data", a.data, "--max-length", a.max_length, "--dev-questions", a.dev_questions]
    teacher = a.runs / "teacher"
    run("train_squad.py", common + ["--init", a.init, "--out", teacher,
                                    "--questions", 2 * a.questions, "--epochs", 2])
    distilled = common + ["--teacher", teacher, "--questions", a.questions]
    everything = {}     # model folder → the run that trained it
    for point in a.points:
        method, block, weight = point.split("-")
        masked = a.runs / point
        small = a.runs / f"{point}-compact"
        filled = a.runs / f"{point}-filled"
        run("train_squad.py", distilled + ["--init", teacher, "--method", method, "--block", block,
                                           "--final-lambda", weight, "--out", masked])
        run("compact.py", [masked, "--data", a.data, "--out", small])
        of_point = {small: masked}
        if method == "hybrid":
            run("train_squad.py", distilled + ["--init", small, "--fill", "--out", filled])
            of_point[filled] = filled
        everything.update(of_point)
        measure(a.data, teacher, of_point)
    # Once more, all in one go.
    measure(a.data, teacher, everything)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("points", nargs="*", default=POINTS)
    parser.add_argument("--data", required=True)
    parser.add_argument("--init", default="weights/minilm")
    parser.add_argument("--runs", default="runs/sweep", type=Path)
    parser.add_argument("--questions", default=4000, type=int,
                        help="of a point; the teacher sees twice as many")
    parser.add_argument("--dev-questions", default=2000, type=int)
    parser.add_argument("--max-length", default=256, type=int)
    sweep(parser.parse_args())


if __name__ == "__main__":
    main()
