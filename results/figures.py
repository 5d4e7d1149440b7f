"""Writes the tables of README.md and results/README.md, and the pictures, from the runs here.

    python results/figures.py           write all (make figure)
    python results/figures.py --check   exit 1 if one of the two pages is not what would be written

A run is a folder of model folders, as keep.py leaves them. A page has its tables between
<!-- name --> and <!-- end -->.
"""
import ast
import json
import re
import sys
from pathlib import Path

import numpy as np

import pictures

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

# The README's first table: what a model is, its folder here, the epochs of the trainings behind it,
# and the folder of the model whose F1 it is held against.
CONTROL = "headline/dense-20"
HEADLINE = [
    ("dense: the teacher", "headline/dense-6", "6", CONTROL),
    ("dense: the control, trained longer", CONTROL, "6 + 14", None),
    ("pruned and compacted", "headline/hybrid-10-compact", "6 + 10", CONTROL),
    ("refilled", "headline/hybrid-10-filled", "6 + 10 + 4", CONTROL),
    ("the same shape at random", "headline/random-14", "6 + 10 + 4", CONTROL),
]
# Other choices of what is left, in the same shape.
CHOICES = [
    ("learned: pruned and compacted", "headline/hybrid-10-compact", "6 + 10", "headline/dense-16"),
    ("the largest weights", "headline/magnitude-10", "6 + 10", "headline/dense-16"),
    ("at random", "headline/random-10", "6 + 10", "headline/dense-16"),
]
# Pruned and refilled once more, with another seed.
SEEDS = [
    ("pruned and compacted", "headline/hybrid-10-seed-18-compact", "6 + 10", CONTROL),
    ("refilled", "headline/hybrid-10-seed-18-filled", "6 + 10 + 4", CONTROL),
]
# Other lengths of pruning.
LENGTHS = [
    ("dense, for the next four rows", "epochs/teacher", "2", None),
    ("3 epochs, λ 33, score lr 0.066", "epochs/hybrid-3-compact", "2 + 3", "epochs/teacher"),
    ("… refilled", "epochs/hybrid-3-filled", "2 + 3 + 4", "epochs/teacher"),
    ("6 epochs, λ 30, score lr 0.033", "epochs/hybrid-6-compact", "2 + 6", "epochs/teacher"),
    ("… refilled", "epochs/hybrid-6-filled", "2 + 6 + 4", "epochs/teacher"),
    ("dense, for the last two rows", "epochs-10/teacher", "2", None),
    ("10 epochs, λ 25, score lr 0.02", "epochs-10/hybrid-10-compact", "2 + 10",
     "epochs-10/teacher"),
    ("… refilled", "epochs-10/hybrid-10-filled", "2 + 10 + 4", "epochs-10/teacher"),
]
# The lines of the picture of F1 against epochs: the folders of models, and their epochs in all.
TEACHER = ("headline/dense-6", 6)
LINES = [
    ("pruned, then refilled", pictures.GREEN,
     [TEACHER, ("headline/hybrid-10-compact", 16), ("headline/hybrid-10-filled", 20)]),
    ("dense", pictures.BLUE,
     [("headline/dense-2", 2), TEACHER, ("headline/dense-16", 16), (CONTROL, 20)]),
    ("the same shape at random", "#8250df",
     [("headline/random-10", 16), ("headline/random-14", 20)]),
    ("by magnitude", "#9a6700", [("headline/magnitude-10", 16)]),
]
# The fine-pruning that the pictures of masks and of a run are of.
PRUNED = "headline/hybrid-10"


def read(path: str):
    return json.loads((HERE / path).read_text(encoding="utf-8"))


def results_of(folder: str) -> dict:
    return read(f"{folder}/results.json")


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A table, its columns named in the first line."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def times(ratio: float | None) -> str:
    """A speed-up; a dash where none was measured."""
    if ratio is None:
        return "–"
    return f"{ratio:.2f} x"


def link(title: str, folder: str) -> str:
    return f"[{title}](results/{folder}/results.json)"


# ------------------------------------------------------------------------------------- differences


def interval(difference: np.ndarray) -> tuple[float, float, float]:
    """The mean of the questions' differences, and the ends of its 95 % interval.

    Normal, and paired: both models answer each question.
    """
    mean = difference.mean()
    half = 1.96 * difference.std(ddof=1) / len(difference) ** 0.5
    return float(mean), float(mean - half), float(mean + half)


def gain(folder: str, other: str) -> tuple[float, float, float]:
    """F1 of one model minus that of another, with its interval."""
    # A list of F1 has no question ids, so both must be of the same dev file.
    if dev_file(folder) != dev_file(other):
        raise ValueError(f"{folder} and {other} were scored on different questions")
    return interval(f1_of(folder) - f1_of(other))


def dev_file(folder: str) -> str:
    return results_of(folder)["data"]["sha256"]["dev"]


def f1_of(folder: str) -> np.ndarray:
    """F1 of each question, in percent."""
    return 100 * np.array(read(f"{folder}/f1.json"))


def signed(mean: float, low: float, high: float) -> str:
    return f"{mean:+.2f} ({low:+.2f} to {high:+.2f})".replace("-", "−")


# ------------------------------------------------------------------------------------------ tables


def models_table(of_rows: list[tuple], control_name: str = "control") -> str:
    """A table like the README's first."""
    columns = ["MiniLM on SQuAD v1.1", "epochs", "weights kept", "parameters", "heads",
               "FLOPs", "speed", "F1", f"F1 − {control_name} (95 %, over questions)"]
    rows = []
    for title, folder, epochs, control in of_rows:
        r = results_of(folder)
        difference = "–"
        if control is not None:
            difference = signed(*gain(folder, control))
        total = r["parameters"]["total"] / 1e6
        rows.append([link(title, folder), epochs, percent(r["density"]), f"{total:.1f} M",
                     str(sum(r["heads"])), f"1/{r['flops_ratio']:.2f}", times(r.get("speedup")),
                     f"{r['f1']:.2f}", difference])
    return markdown(columns, rows)


def left_in(folder: str) -> dict[str, list[set[int]]]:
    """The heads and inner dimensions that compaction leaves in each layer.

    Blocks must be as high as a head.
    """
    heads = []
    dimensions = []
    for layer in read(f"{folder}/masks.json").values():
        of_value = {head for head, row in enumerate(layer["value"]) if "1" in row}
        of_out = {head for row in layer["out"] for head, kept in enumerate(row) if kept == "1"}
        heads.append(of_value & of_out)
        dimensions.append({number for number, kept in enumerate(layer["fc1"]) if kept == "1"})
    return {"heads": heads, "inner dimensions": dimensions}


def overlap_table(folder: str, other: str) -> str:
    """How much two models have left, how much of it is the same, and would be if it were drawn."""
    rows = []
    for part, number in (("heads", 12), ("inner dimensions", 1536)):
        pairs = list(zip(left_in(folder)[part], left_in(other)[part]))
        counts = [sum(len(a) for a, _ in pairs), sum(len(b) for _, b in pairs),
                  sum(len(a & b) for a, b in pairs),
                  sum(len(a) * len(b) / number for a, b in pairs)]
        rows.append([part] + [f"{count:,.0f}" for count in counts])
    return markdown(["left in all layers", "seed 17", "seed 18", "both", "both, by chance"], rows)


def paper_table() -> str:
    """The authors' headline."""
    columns = ["model", "epochs", "F1", "EM", "weights kept", "heads", "speed",
               "differs from ours in"]
    rows = []
    for r in read("paper.json")["headline"]:
        rows.append([r["model"], r["epochs"], f"{r['f1']:g}", f"{r['exact_match']:g}",
                     percent(r["density"]), str(r["heads"]), times(r["speedup"]), r["differs"]])
    return markdown(columns, rows)


def speed(path: Path) -> str:
    """The rows of a benchmark, and where it was run."""
    bench = json.loads(path.read_text(encoding="utf-8"))
    rows = []
    for row in bench["rows"]:
        spread = ""
        if row["spread"] > 0:
            spread = f" ± {50 * row['spread']:.0f} %"
        rows.append([row["what"], f"{row['baseline']:.4g} {row['unit']}",
                     f"{row['ours']:.4g} {row['unit']}", f"{row['ratio']:.3g}{spread}"])
    made = (f"[{path.name}](results/{path.name}): `{bench['command']}`\n"
            f"on {bench['device']}, {bench['threads']} threads, torch {bench['torch']}.")
    return markdown(["what", "baseline", "ours", "ratio"], rows) + "\n\n" + made


# ---------------------------------------------------------------------------------------- the sweep


def method_of(point: str) -> str:
    """The method of a point of the sweep, by the name of its model."""
    method, block, _, kind = point.split("-")
    if kind == "filled":
        return "Hybrid Filled"
    if method == "struct":
        return "Struct"
    return f"{method.title()} {block}"


def sweep_table() -> str:
    """One row for each point."""
    rows = []
    for name, r in read("sweep/results.json").items():
        title = "dense"
        weight = "–"
        if name != "teacher":
            title = method_of(name)
            weight = name.split("-")[2]
        rows.append([title, weight, f"{r['f1']:.2f}", f"{r['exact_match']:.2f}",
                     percent(r["density"]), str(sum(r["heads"])), times(r["speedup"])])
    return markdown(["method", "λ", "F1", "EM", "weights kept", "heads", "speed"], rows)


PAIRS = [       # the authors' result, the point that should be better, the one that should be worse
    ("smaller blocks have a higher F1 at about equal density",
     "unstructured-1x1-600-compact", "block-8x8-160-compact"),
    ("", "block-8x8-160-compact", "block-32x32-80-compact"),
    ("Hybrid beats Block, here at a higher speed too",
     "hybrid-32x32-200-compact", "block-32x32-160-compact"),
    ("filling raises F1 at equal speed", "hybrid-32x32-80-filled", "hybrid-32x32-80-compact"),
    ("", "hybrid-32x32-200-filled", "hybrid-32x32-200-compact"),
]


def verdicts() -> str:
    """The paper's claims, and pairs of points of the sweep that test them."""
    results = read("sweep/results.json")
    of_questions = read("sweep/f1.json")
    rows = []
    for claim, better, worse in PAIRS:
        row = [claim]
        for name in (better, worse):
            r = results[name]
            row.append(f"{method_of(name)}: {percent(r['density'])}, {times(r['speedup'])}")
        difference = np.array(of_questions[better]) - np.array(of_questions[worse])
        row.append(signed(*interval(100 * difference)))
        rows.append(row)
    return markdown(["the authors' result", "better", "worse", "difference of F1 (95 %)"], rows)


# ---------------------------------------------------------------------------------------- the pages


def generated() -> dict[str, str]:
    """The text between <!-- name --> and <!-- end -->, by name. Links are from the top."""
    log = (HERE / "builtin/log.txt").read_text(encoding="utf-8").splitlines()
    made = {
        "headline": models_table(HEADLINE),
        "choices": models_table(CHOICES, "dense, 6 + 10 epochs"),
        "seeds": models_table(SEEDS),
        "overlap": overlap_table(f"{PRUNED}-compact", f"{PRUNED}-seed-18-compact"),
        "paper": paper_table(),
        "epochs": models_table(LENGTHS, "its dense model"),
        "builtin-log": "\n" + "".join(f"    {line}\n" for line in log[-6:]),
        "sweep": sweep_table(),
        "verdicts": verdicts(),
    }
    for path in HERE.glob("bench-*.json"):
        made[path.stem] = speed(path)
    return made


def link_to_line(found: re.Match) -> str:
    """A link [`name`](file.py#L1), with the line where the file has the name."""
    name, file = found.groups()
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    lines = {node.name: node.lineno for node in tree.body if hasattr(node, "name")}
    return f"[`{name}`]({file}#L{lines[name]})"


def page(path: Path, parts: dict[str, str]) -> str:
    """A page with its generated parts written again."""
    text = path.read_text(encoding="utf-8")
    for name, part in parts.items():
        if path.parent == HERE:
            part = part.replace("](results/", "](")
        before, mark, rest = text.partition(f"<!-- {name} -->\n")
        if mark:
            _, end, after = rest.partition("<!-- end -->")
            text = before + mark + part + "\n" + end + after
    return re.sub(r"\[`(\w+)`\]\((\w+\.py)#L\d+\)", link_to_line, text)


def drawings() -> dict[str, str]:
    """The pictures, by the names of their files."""
    # F1 against epochs, with the interval of what a model has over the control.
    lines = []
    control = results_of(CONTROL)["f1"]
    for name, colour, models in LINES:
        points = []
        for folder, epochs in models:
            points.append((epochs, results_of(folder)["f1"]))
            if folder != CONTROL:
                _, low, high = gain(folder, CONTROL)
                bar = [(epochs, control + low), (epochs, control + high)]
                lines.append(("95 %", colour, bar, "line"))
        lines.append((name, colour, points, "dots"))
    log = [json.loads(line) for line in (HERE / PRUNED / "log.jsonl").open(encoding="utf-8")]
    kept = 100 * results_of(f"{PRUNED}-compact")["density_masked"]
    title = "Fine-pruning of MiniLM, Hybrid 32x32"
    drawn = {
        "epochs": pictures.epochs_picture(lines),
        "curves": pictures.curves_picture(curve_groups()),
        "run": pictures.run_picture(log, f"{title}: {PRUNED}"),
        "masks": pictures.masks_picture(read(f"{PRUNED}-compact/masks.json"), 12,
                                        f"{title}: {kept:.0f} % kept (blue)"),
    }
    if (HERE / PRUNED / "moments.json").exists():
        moments = read(f"{PRUNED}/moments.json")
        drawn["moments"] = pictures.moments_picture(moments, 12, title)
    return drawn


def curve_groups() -> list[tuple]:
    """The points of the picture of all methods: (speed-up, density in %, F1 lost)."""
    def point(r: dict, dense: float) -> tuple:
        return r["speedup"], 100 * r["density"], r["f1"] - dense

    groups = []
    # The authors' first: ours are drawn over them.
    paper = read("paper.json")
    for method, rows in paper["rows"].items():
        points = [(speedup, 100 * density, f1 - paper["dense"]) for _, f1, density, speedup in rows]
        groups.append((f"{method} (authors)", pictures.COLOURS[method], points, "hollow"))
    points = read("sweep/results.json")
    dense = points.pop("teacher")["f1"]
    for method, colour in pictures.COLOURS.items():
        of_method = [point(r, dense) for name, r in points.items() if method_of(name) == method]
        groups.append((method, colour, of_method, "dots"))
    # Of the first table what is pruned and what is refilled.
    control = results_of(CONTROL)["f1"]
    points = [point(results_of(folder), control) for _, folder, _, _ in HEADLINE[2:4]]
    groups.append(("README’s first table", pictures.RED, points, "dots"))
    return groups


def main() -> int:
    parts = generated()
    pages = {path: page(path, parts) for path in (ROOT / "README.md", HERE / "README.md")}
    if "--check" in sys.argv:
        for path, text in pages.items():
            if path.read_text(encoding="utf-8") != text:
                print(f"{path} is not what would be written: make figure")
                return 1
        return 0
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")
    for name, drawn in drawings().items():
        (HERE / f"{name}.svg").write_text(drawn, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
