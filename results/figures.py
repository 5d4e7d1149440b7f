"""Writes the tables of README.md and results/README.md, and the pictures, from the runs here.

    python results/figures.py           write all (make figure)
    python results/figures.py --check   exit 1 if one of the two pages is not what would be written

A run is a folder of model folders (results.json, run.json, log.jsonl, f1.json, masks.json), as
`make squad` leaves them under runs/, without the weights. A page has its tables between
<!-- name --> and <!-- end -->.
"""
import ast
import json
import re
import sys
from pathlib import Path

import numpy as np

from pictures import curves_picture, layers_picture, masks_picture, run_picture

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
HEADLINE = ("epochs-10", "hybrid-10")   # the run and the pruned model of README.md's first table
LENGTHS = (("epochs", 3), ("epochs", 6), ("epochs-10", 10))     # a run, and its epochs of pruning


def read(*parts: str):
    return json.loads(HERE.joinpath(*parts).read_text(encoding="utf-8"))


def read_masked(run: str, pruned: str) -> dict:
    """Exact match, F1 and density of a pruned model with its masks on.

    Older runs have them in its own results.json, newer ones in that of its compaction.
    """
    compacted = read(run, f"{pruned}-compact", "results.json")
    density = compacted.get("density_masked")
    if density is None:
        density = read(run, pruned, "results.json")["density"]
    return {"exact_match": compacted["exact_match_masked"], "f1": compacted["f1_masked"],
            "density": density}


def filled_name(pruned: str) -> str:
    if pruned == "hybrid":
        return "filled"
    return f"{pruned}-filled"


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A table, its columns named in the first line."""
    ruler = "|" + "---|" * len(columns)
    lines = ["| " + " | ".join(columns) + " |", ruler]
    for row in rows:
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def percent(share: float) -> str:
    """A share as the tables have it; millions() and times() are the same for sizes and speeds."""
    return f"{100 * share:.1f} %"


def millions(number: float) -> str:
    return f"{number / 1e6:.2f} M"


def times(ratio: float) -> str:
    return f"{ratio:.2f} x"


def link(title: str, *parts: str) -> str:
    return f"[{title}](results/{'/'.join(parts)}/results.json)"


# ---------------------------------------------------------------------------------- tables of a run


def headline() -> str:
    """Dense, pruned and compacted, refilled: what README.md says first."""
    run, pruned = HEADLINE
    models = {
        "dense": "teacher",
        "pruned and compacted": f"{pruned}-compact",
        "refilled": filled_name(pruned),
    }
    columns = ["MiniLM on SQuAD v1.1", "F1", "EM", "weights kept", "parameters", "heads", "speed"]
    rows = []
    for title, name in models.items():
        r = read(run, name, "results.json")
        rows.append([
            link(title, run, name),
            f"{r['f1']:.2f}",
            f"{r['exact_match']:.2f}",
            percent(r["density"]),
            f"{r['parameters']['total'] / 1e6:.1f} M",
            str(sum(r["heads"])),
            times(r["speedup"]),
        ])
    return markdown(columns, rows)


def paper_table() -> str:
    """The authors' headline, in the columns of ours. One EM of theirs is not known: null."""
    columns = ["model", "F1", "EM", "weights kept", "heads", "speed", "differs from ours in"]
    rows = []
    for r in read("paper.json")["headline"]:
        exact_match = "–"
        if r["exact_match"] is not None:
            exact_match = f"{r['exact_match']:g}"
        rows.append([r["model"], f"{r['f1']:g}", exact_match, percent(r["density"]),
                     str(r["heads"]), times(r["speedup"]), r["differs"]])
    return markdown(columns, rows)


def run_table(run: str) -> str:
    """The same with the masked model, and how it was made."""
    columns = ["model", "EM", "F1", "encoder linear weights", "density", "parameters", "heads",
               "FLOPs", "speed"]
    rows = [
        model_row(run, "teacher", "dense"),
        masked_row(run),
        model_row(run, "hybrid-compact", "Hybrid, compacted"),
        model_row(run, "filled", "Hybrid Filled"),
    ]
    return markdown(columns, rows) + "\n\n" + how_it_was_made(run)


def model_row(run: str, name: str, title: str) -> list[str]:
    r = read(run, name, "results.json")
    return [
        link(title, run, name),
        f"{r['exact_match']:.2f}",
        f"{r['f1']:.2f}",
        millions(r["parameters"]["linear_nonzero"]),
        percent(r["density"]),
        millions(r["parameters"]["total"]),
        str(sum(r["heads"])),
        f"1/{r['flops_ratio']:.2f}",
        times(r["speedup"]),
    ]


def masked_row(run: str) -> list[str]:
    """The row of the model with its masks on. It is as large as the dense one, and not timed."""
    sizes = read(run, "teacher", "results.json")["parameters"]
    heads = read(run, "hybrid-compact", "results.json")["heads"]
    masked = read_masked(run, "hybrid")
    return [
        link("Hybrid, masked", run, "hybrid"),
        f"{masked['exact_match']:.2f}",
        f"{masked['f1']:.2f}",
        millions(masked["density"] * sizes["linear_dense"]),
        percent(masked["density"]),
        millions(sizes["total"]),
        str(sum(heads)),
        "–",
        "–",
    ]


def how_it_was_made(run: str) -> str:
    """The data, the machine, the time and the check of the compaction, below the table of a run."""
    dense = read(run, "teacher", "results.json")
    compacted = read(run, "hybrid-compact", "results.json")
    made = read(run, "hybrid", "run.json")
    data = dense["data"]
    seconds = 0
    for name in ("teacher", "hybrid", "hybrid-compact", "filled"):
        seconds += read(run, name, "results.json")["seconds"]
    # Older runs do not say what was allowed.
    allowed = "1e-5 · max(1, the largest logit)"
    if "allowed_logit_difference" in compacted:
        allowed = f"{compacted['allowed_logit_difference']:.1e}"
    lines = [
        f"{data['name']}: {data['train_questions']:,} training questions, scored on "
        f"{data['dev_questions']:,}.",
        f"Speed is of one forward pass of {dense['batch']} x {dense['length']} word pieces in fp32 "
        f"on {dense['device']}, {dense['threads']} threads,",
        "against the dense model in the same process.",
        f"Training in {dense['precision']} on {made['processor']}, torch {made['torch']};",
        f"{seconds / 60:.0f} minutes of training and compaction.",
        f"Compaction: F1 {compacted['f1_masked']:.2f} masked and {compacted['f1']:.2f} compacted;",
        f"largest difference of a logit {compacted['max_abs_logit_difference']:.1e}, allowed is "
        f"{allowed};",
        f"heads left by the authors' rule: {sum(compacted['heads_authors_rule'])}.",
    ]
    return "\n".join(lines)


def epochs_table() -> str:
    """Epochs of pruning → what is kept, and F1 on the way; a row for each length."""
    columns = ["epochs", "λ", "score lr", "non-zero masked", "non-zero refilled", "F1 dense",
               "F1 masked", "F1 compacted", "F1 refilled", "F1 − dense (95 %)", "heads", "speed"]
    rows = [epochs_row(run, epochs) for run, epochs in LENGTHS]
    return markdown(columns, rows)


def epochs_row(run: str, epochs: int) -> list[str]:
    pruned = f"hybrid-{epochs}"
    settings = read(run, pruned, "run.json")["settings"]
    dense = read(run, "teacher", "results.json")
    masked = read_masked(run, pruned)
    compacted = read(run, f"{pruned}-compact", "results.json")
    filled = read(run, f"{pruned}-filled", "results.json")
    return [
        str(epochs),
        f"{settings['final_lambda']:g}",
        f"{settings['score_lr']:g}",
        percent(masked["density"]),
        percent(filled["density"]),
        f"{dense['f1']:.2f}",
        f"{masked['f1']:.2f}",
        f"{compacted['f1']:.2f}",
        link(f"{filled['f1']:.2f}", run, f"{pruned}-filled"),
        gain_over(run, f"{pruned}-filled", "teacher"),
        str(sum(filled["heads"])),
        times(filled["speedup"]),
    ]


def gain_over(run: str, name: str, dense: str) -> str:
    """F1 of a model over that of a dense one, both of a run, with its interval."""
    of_dense = read(run, dense, "f1.json")
    of_model = read(run, name, "f1.json")
    # What each question gains, in percent.
    gain = 100 * np.array([of_model[i] - of_dense[i] for i in sorted(of_dense)])
    low, high = interval(gain)
    return f"{gain.mean():+.2f} ({low:+.2f} to {high:+.2f})"


def longer_table() -> str:
    """The headline against its dense model, before and after that has the filling's epochs too."""
    run, pruned = HEADLINE
    rows = []
    for title, dense in (("2 epochs", "teacher"), ("2 + 4 epochs", "teacher-longer")):
        f1 = read(run, dense, "results.json")["f1"]
        rows.append([link(title, run, dense), f"{f1:.2f}",
                     gain_over(run, filled_name(pruned), dense)])
    return markdown(["dense model", "F1", "F1 refilled − dense (95 %)"], rows)


# ----------------------------------------------------------- tables of the files and of the machine

PLACES = [      # idea of the paper, file, name
    ("the mask 1[σ(S) > τ], straight-through", "blockprune.py", "StraightThrough"),
    ("blocks of any shape, shared scores", "blockprune.py", "BlockMask"),
    ("the bias goes with its row", "blockprune.py", "BiasMask"),
    ("inner dimensions: rows of fc1 with columns of fc2", "blockprune.py", "mask_dimensions"),
    ("the cubic schedule of τ", "blockprune.py", "threshold_schedule"),
    ("the penalty, a mean of σ(S) by kind", "blockprune.py", "penalty"),
    ("learning rates of scores and weights", "blockprune.py", "parameter_groups"),
    ("from masks to zeros", "blockprune.py", "bake"),
    ("removing heads", "blockprune.py", "cut_heads"),
    ("removing inner dimensions", "blockprune.py", "cut_dimensions"),
    ("Hybrid, Block, Struct, unstructured", "train_squad.py", "add_masks"),
    ("cross entropy and distillation", "train_squad.py", "loss_terms"),
    ("λ follows τ", "train_squad.py", "threshold_and_lambda"),
    ("the training loop", "train_squad.py", "train"),
    ("Hybrid Filled: noise for zeros", "train_squad.py", "refill"),
    ("a BERT with what is empty removed", "compact.py", "compact"),
    ("what density and \"74 % smaller\" count", "compact.py", "count_parameters"),
]


def places() -> str:
    """Idea of the paper → function, with its line."""
    rows = []
    for idea, file, name in PLACES:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        for node in tree.body:
            if getattr(node, "name", None) == name:
                rows.append([idea, f"[`{name}`]({file}#L{node.lineno})", file])
    return markdown(["idea", "function", "file"], rows)


def speed(path: Path) -> str:
    """The rows of a benchmark, those that were not measured below."""
    bench = json.loads(path.read_text(encoding="utf-8"))
    rows = []
    not_measured = []
    for row in bench["rows"]:
        title = f"{row['goal']}. {row['what']}"
        if not row["ratio"]:
            not_measured.append(title)
            continue
        baseline = "–"
        if row["baseline"] is not None:
            baseline = f"{row['baseline']:.4g} {row['unit']}"
        ours = f"{row['ours']:.4g} {row['unit']}"
        ratio = f"{row['ratio']:.3g}"
        if row["spread"]:
            ratio += f" ± {50 * row['spread']:.0f} %"
        rows.append([title, baseline, ours, ratio, wanted_of(row)])
    table = markdown(["what", "baseline", "ours", "ratio", "wanted"], rows)
    made = (f"[{path.name}](results/{path.name}): `{bench['command']}` on {bench['device']}, "
            f"{bench['threads']} threads,\ntorch {bench['torch']}, {bench['data']}.")
    return "\n".join([table, ""] + not_measured + [made])


def wanted_of(row: dict) -> str:
    """The goal of a row of the benchmark, and whether it was missed."""
    if not row["wanted"]:
        return "–"
    text = f"≥ {row['wanted']:g}"
    if row["at_most"]:
        text = f"≤ {row['wanted']:g}"
    if row["met"] is False:
        text += " (missed)"
    return text


# ---------------------------------------------------------------------------------------- the sweep

METHODS = ("Hybrid 32x32", "Hybrid Filled", "Block 32x32", "Block 8x8", "Unstructured 1x1",
           "Struct")


def sweep() -> dict[str, list[dict]]:
    """The points that are there, by method, in the order of λ.

    A point is its results.json, with its folder, λ (weight) and each question's F1 (questions).
    """
    asked = sorted(read("sweep", "teacher", "f1.json"))
    points: dict[str, list[dict]] = {method: [] for method in METHODS}
    for path in sorted((HERE / "sweep").glob("*-*/results.json")):
        folder = path.parent.name
        method, block, weight, kind = folder.split("-")
        title = f"{method.title()} {block}"
        if method == "struct":
            title = "Struct"
        if kind == "filled":
            title = "Hybrid Filled"
        f1 = read("sweep", folder, "f1.json")
        if sorted(f1) != asked:
            raise ValueError(f"{path.parent} was scored on other questions than the teacher: it is "
                             "of another sweep")
        point = read("sweep", folder, "results.json")
        point["folder"] = folder
        point["weight"] = float(weight)
        point["questions"] = np.array([f1[i] for i in asked])
        points.setdefault(title, []).append(point)
    for rows in points.values():
        rows.sort(key=lambda point: point["weight"])
    return points


def sweep_table() -> str:
    """One row for each point, the least pruned first."""
    dense = read("sweep", "teacher", "results.json")
    rows = [sweep_row("dense", "teacher", "–", dense)]
    for title, points in sweep().items():
        for point in points:
            rows.append(sweep_row(title, point["folder"], f"{point['weight']:g}", point))
    return markdown(["method", "λ", "F1", "EM", "density", "heads", "speed"], rows)


def sweep_row(title: str, folder: str, weight: str, r: dict) -> list[str]:
    return [
        link(title, "sweep", folder),
        weight,
        f"{r['f1']:.2f}",
        f"{r['exact_match']:.2f}",
        percent(r["density"]),
        str(sum(r["heads"])),
        times(r["speedup"]),
    ]


def guide() -> str:
    """λ → density in the authors' log; ours is in the table of the sweep."""
    of_method = read("paper.json")["rows"]
    notes = {
        "Unstructured 1x1": "another regulariser: one mean over all 72 tensors, biases unmasked",
        "Struct": "scores independent; attention × 0.00156, 0.00156, 0.05",
    }
    rows = []
    for title in METHODS:
        if title == "Hybrid Filled":
            continue
        found = []
        for weight, _, density, _ in of_method[title]:
            found.append(f"{weight:g} → {percent(density)}")
        rows.append([title, ", ".join(found), notes.get(title, "")])
    return markdown(["method", "λ → weights kept (FFN × 1)", "differs from ours"], rows)


# ----------------------------------------------------------------------------------------- verdicts


def interval(difference: np.ndarray, draws: int = 4000) -> tuple[float, float]:
    """The range of 95 % of the means of resamples of the questions.

    A bootstrap, and a paired one: it is the questions' differences that are drawn.
    """
    n = len(difference)
    rng = np.random.default_rng(0)
    times_drawn = rng.multinomial(n, np.full(n, 1 / n), draws)      # (draws, n)
    low, high = np.percentile(times_drawn @ difference / n, [2.5, 97.5])
    return float(low), float(high)


def at(points: list[dict], key: str, x: float) -> np.ndarray:
    """Each question's F1 at `key` = x, on a line between the two points around it."""
    points = sorted(points, key=lambda point: point[key])
    known = [point[key] for point in points]
    of_questions = np.stack([point["questions"] for point in points], axis=1)
    return np.array([np.interp(x, known, f1) for f1 in of_questions])


def equal(first: list[dict], second: list[dict], key: str) -> tuple[float, np.ndarray] | None:
    """The middle of the range of `key` that both methods' points span, and the F1 gained there.

    The gain is the first method's over the second's, in percent, for each question. None where one
    of them has a single point, or they do not overlap.
    """
    if len(first) < 2 or len(second) < 2:
        return None
    of_first = [point[key] for point in first]
    of_second = [point[key] for point in second]
    low = max(min(of_first), min(of_second))
    high = min(max(of_first), max(of_second))
    if low >= high:
        return None
    middle = (low + high) / 2
    return middle, 100 * (at(first, key, middle) - at(second, key, middle))


def verdict(difference: np.ndarray) -> str:
    """The interval, and whether the difference is shown: two cells of a table."""
    low, high = interval(difference)
    shown = "no"
    if low > 0:
        shown = "yes"
    if high < 0:
        shown = "no: the opposite"
    return f"{low:+.2f} to {high:+.2f} | {shown}"


COMPARISONS = [     # the authors' result, first method, second method, what is equal
    ("smaller blocks keep more F1 at equal density", "Unstructured 1x1", "Block 8x8", "density"),
    ("", "Block 8x8", "Block 32x32", "density"),
    ("", "Unstructured 1x1", "Block 32x32", "density"),
    ("Hybrid beats Block at equal speed", "Hybrid 32x32", "Block 32x32", "speedup"),
]


def verdicts() -> str:
    """The shapes that the paper claims, held against the sweep."""
    points = sweep()
    rows = []
    for claim, first, second, key in COMPARISONS:
        found = equal(points[first], points[second], key)
        if found is None:
            rows.append([claim, f"{first} against {second}: their points do not overlap", "–",
                         "cannot be told"])
            continue
        middle, difference = found
        where = f"{middle:.2f} x"
        if key == "density":
            where = f"{100 * middle:.0f} % density"
        rows.append([claim, f"{first} against {second}: {difference.mean():+.2f} F1 at {where}",
                     verdict(difference)])

    unfilled = {point["weight"]: point for point in points["Hybrid 32x32"]}
    for point in points["Hybrid Filled"]:
        gain = 100 * (point["questions"] - unfilled[point["weight"]]["questions"])
        rows.append(["filling gains at equal speed",
                     f"λ {point['weight']:g}: {gain.mean():+.2f} F1", verdict(gain)])

    all_heads = sum(read("sweep", "teacher", "results.json")["heads"])
    emptied = []
    shown = "no"
    for point in points["Unstructured 1x1"]:
        gone = all_heads - sum(point["heads"])
        if gone > 0 and point["density"] >= 0.16:
            shown = "yes"
        elif gone > 0:
            shown = "only at a lower density"
        emptied.append(f"{gone} of {all_heads} at {100 * point['density']:.0f} %")
    rows.append(["even 1x1 empties some heads: 8 of 144 at 25 % density, 22 at 16 %",
                 "; ".join(emptied), "–", shown])
    return markdown(["the authors' result", "here", "95 % interval", "shown"], rows)


# ---------------------------------------------------------------------------------------- the pages


def generated() -> dict[str, str]:
    """The text between <!-- name --> and <!-- end -->, by name.

    Its links are from the top of the tree.
    """
    log = (HERE / "builtin" / "log.txt").read_text(encoding="utf-8").splitlines()
    made = {
        "headline": headline(),
        "paper": paper_table(),
        "epochs": epochs_table(),
        "longer": longer_table(),
        "places": places(),
        "builtin-log": "\n" + "".join(f"    {line}\n" for line in log[-6:]),
        "sweep": sweep_table(),
        "guide": guide(),
        "verdicts": verdicts(),
        "squad-10000": run_table("squad-10000"),
        "builtin": run_table("builtin"),
    }
    for path in HERE.glob("bench-*.json"):
        made[path.stem] = speed(path)
    return made


def page(path: Path, parts: dict[str, str]) -> str:
    """A page with its generated parts written again."""
    def written(found: re.Match) -> str:
        name = found[2]
        if name not in parts:
            return found[0]
        text = parts[name]
        if path.parent == HERE:
            text = text.replace("](results/", "](")
        return f"{found[1]}{text}\n{found[3]}"
    text = path.read_text(encoding="utf-8")
    return re.sub(r"(<!-- ([\w-]+) -->\n).*?(<!-- end -->)", written, text, flags=re.S)


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

    # Pictures of the runs: of the headline, and of those whose pruned model is called hybrid.
    drawn = [HEADLINE]
    for path in HERE.glob("*/hybrid-compact/masks.json"):
        drawn.append((path.parent.parent.name, "hybrid"))
    for run, pruned in drawn:
        (HERE / f"masks-{run}.svg").write_text(masks_picture(run, pruned), encoding="utf-8")
        (HERE / f"run-{run}.svg").write_text(run_picture(run, pruned), encoding="utf-8")

    # Pictures of the sweep.
    points = sweep()
    dense = read("sweep", "teacher", "results.json")
    curves = curves_picture(points, dense, read("paper.json"))
    (HERE / "curves.svg").write_text(curves, encoding="utf-8")
    (HERE / "layers.svg").write_text(layers_picture(points, dense), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
