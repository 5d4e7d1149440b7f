"""Runs the paper's methods on one data set, one after another (make sweep).

    python results/sweep.py --data FOLDER [--init WEIGHTS] [--runs FOLDER] [POINT ...]

A point is METHOD-BLOCK-λ, as in hybrid-32x32-80. All points start from one teacher, see the same
questions in the same order, and are scored on the same dev questions. Each Hybrid is refilled too.
Each step is a command of the project's: a sweep that was stopped goes on, and a step that is
finished is skipped. At its end it writes results/sweep/results.json and f1.json.
"""
import argparse
import json
import subprocess
import sys
from pathlib import Path

from keep import number_list, read
from moments import ROOT

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


def run(script: str, arguments: list) -> None:
    """Run a command of the project. Where it fails the sweep ends with its exit status."""
    words = [str(argument) for argument in arguments]
    print("\npython", script, " ".join(words), flush=True)
    status = subprocess.run([sys.executable, ROOT / script] + words).returncode
    if status != 0:
        sys.exit(status)        # it has said why; the same sweep goes on from here


def sweep(a: argparse.Namespace) -> None:
    common = ["--data", a.data, "--max-length", 256, "--dev-questions", 2000]
    teacher = a.runs / "teacher"
    run("train_squad.py", common + ["--init", a.init, "--out", teacher,
                                    "--questions", 2 * a.questions, "--epochs", 2])
    distilled = common + ["--teacher", teacher, "--questions", a.questions]
    models = [teacher]
    for point in a.points:
        method, block, weight = point.split("-")
        masked = a.runs / point
        small = a.runs / f"{point}-compact"
        filled = a.runs / f"{point}-filled"
        run("train_squad.py", distilled + ["--init", teacher, "--out", masked, "--block", block,
                                           "--method", method, "--final-lambda", weight])
        run("compact.py", [masked, "--data", a.data, "--out", small])
        models.append(small)
        if method == "hybrid":
            run("train_squad.py", distilled + ["--init", small, "--fill", "--out", filled])
            models.append(filled)
    # All are timed in one process.
    run("compact.py", ["--data", a.data, "--compare"] + models)

    results = []
    of_questions = []
    for model in models:
        found = json.dumps(read(model / "results.json"))
        f1 = number_list(read(model / "f1.json").values())
        results.append(f'"{model.name}": {found}')
        of_questions.append(f'"{model.name}": {f1}')
    for name, lines in (("results", results), ("f1", of_questions)):
        text = "{\n" + ",\n".join(lines) + "\n}\n"
        (ROOT / f"results/sweep/{name}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("points", nargs="*", default=POINTS)
    parser.add_argument("--data", required=True)
    parser.add_argument("--init", default="weights/minilm")
    parser.add_argument("--runs", default="runs/sweep", type=Path)
    parser.add_argument("--questions", default=4000, type=int,
                        help="of a point; the teacher sees twice as many")
    sweep(parser.parse_args())
