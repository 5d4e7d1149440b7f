"""Draws the pictures beside it and writes the README's tables, from the files of the runs in this folder.

    python results/figures.py           (make figure)
    python results/figures.py --check   exit 1 if README.md is not what would be written

A run is a folder of model folders (results.json, run.json, log.jsonl, masks.json), as `make squad` leaves
them under runs/, without the weights.
"""
import ast
import json
import math
import re
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
MODELS = {"teacher": "dense", "hybrid": "Hybrid, masked", "hybrid-compact": "Hybrid, compacted",
          "filled": "Hybrid Filled"}


def read(*parts: str):
    return json.loads(HERE.joinpath(*parts).read_text())


# ------------------------------------------------------------------------------------------ tables


def table(run: str) -> str:
    """One row for each model of a run."""
    lines = ["| model | EM | F1 | encoder linear weights | density | parameters | heads | FLOPs | speed |",
             "|---|---|---|---|---|---|---|---|---|"]
    for name, title in MODELS.items():
        r = read(run, name, "results.json")
        p, speed = r["parameters"], r["speedup"]
        fewer = f"1/{r['flops_ratio']:.2f}" if r["flops_ratio"] else "–"
        lines.append(f"| [{title}](results/{run}/{name}/results.json) | {r['exact_match']:.2f} | {r['f1']:.2f} | "
                     f"{p['linear_nonzero'] / 1e6:.2f} M | {100 * r['density']:.1f} % | {p['total'] / 1e6:.2f} M | "
                     f"{sum(r['heads'])} | {fewer} | {f'{speed:.2f} x' if speed else '–'} |")
    r, c = read(run, "teacher", "results.json"), read(run, "hybrid-compact", "results.json")
    d, settings = r["data"], read(run, "hybrid", "run.json")
    lines += ["", f"{d['name']}: {d['train_questions']:,} training questions, scored on {d['dev_questions']:,}. Speed is of one "
              f"forward pass of {r['batch']} x {r['length']} word pieces in fp32 on {r['device']}, {r['threads']} threads, against "
              f"the dense model in the same process. Training in {r['precision']} on {settings['processor']}, torch "
              f"{settings['torch']}; {sum(read(run, m, 'results.json')['seconds'] for m in MODELS) / 60:.0f} minutes of training and compaction. "
              f"Compaction: F1 {c['f1_masked']:.2f} masked and {c['f1']:.2f} compacted, largest difference of a logit "
              f"{c['max_abs_logit_difference']:.1e}; heads left by the authors' rule: {sum(c['heads_authors_rule'])}."]
    return "\n".join(lines)


PLACES = [  # idea of the paper, file, name
    ("the mask: 1[σ(S) > τ], straight-through", "blockprune.py", "StraightThrough"),
    ("blocks of any shape, shared scores", "blockprune.py", "BlockMask"),
    ("the bias goes with its row", "blockprune.py", "BiasMask"),
    ("FFN dimensions: rows of fc1 with columns of fc2", "blockprune.py", "mask_dimensions"),
    ("cubic schedule of τ, λ follows it", "blockprune.py", "threshold_schedule"),
    ("the penalty λ · mean σ(S), by kind", "blockprune.py", "penalty"),
    ("learning rates of scores and weights", "blockprune.py", "parameter_groups"),
    ("Hybrid, Block, Struct, unstructured", "train_squad.py", "add_masks"),
    ("cross entropy and distillation", "train_squad.py", "loss_terms"),
    ("the loop", "train_squad.py", "train"),
    ("removing heads and dimensions for real", "compact.py", "compact"),
    ("Hybrid Filled: noise for zeros", "train_squad.py", "refill"),
    ("what density and \"74 % smaller\" count", "compact.py", "count_parameters"),
]


def places() -> str:
    """Idea in the paper → function → line."""
    lines = ["| in the paper | here |", "|---|---|"]
    for idea, file, name in PLACES:
        line = next(node.lineno for node in ast.parse((ROOT / file).read_text()).body if getattr(node, "name", "") == name)
        lines.append(f"| {idea} | [`{name}`]({file}#L{line}) {file}:{line} |")
    return "\n".join(lines)


def speed(path: Path) -> str:
    """The rows of a benchmark."""
    b = json.loads(path.read_text())
    lines = ["| what | baseline | ours | ratio | wanted |", "|---|---|---|---|---|"]
    for row in (row for row in b["rows"] if row["ratio"]):
        wanted = f"{'≤' if row['at_most'] else '≥'} {row['wanted']:g}" if row["wanted"] else "–"
        noise = f" ± {50 * row['spread']:.0f} %" if row["spread"] else ""
        base = "–" if row["baseline"] is None else f"{row['baseline']:.4g} {row['unit']}"
        lines.append(f"| {row['goal']}. {row['what']} | {base} | {row['ours']:.4g} {row['unit']} | {row['ratio']:.3g}{noise} | "
                     f"{wanted}{' (missed)' * (row['met'] is False)} |")
    missing = [f"{row['goal']}. {row['what']}" for row in b["rows"] if not row["ratio"]]
    return "\n".join(lines + ["", *missing, f"[{path.name}](results/{path.name}): `{b['command']}` on {b['device']}, {b['threads']} threads, "
                              f"torch {b['torch']}, {b['data']}."])


# ------------------------------------------------------------------------------------------- sweep

METHODS = ("Hybrid 32x32", "Hybrid Filled", "Block 32x32", "Block 8x8", "Unstructured 1x1", "Struct")


def sweep() -> dict[str, list[dict]]:
    """The points that are there, by method and λ: results.json with its folder, λ and each question's F1."""
    points, asked = {method: [] for method in METHODS}, sorted(read("sweep", "teacher", "f1.json"))
    for path in sorted((HERE / "sweep").glob("*-*/results.json")):
        method, block, weight, kind = path.parent.name.split("-")
        title = "Hybrid Filled" if kind == "filled" else "Struct" if method == "struct" else f"{method.title()} {block}"
        f1 = json.loads((path.parent / "f1.json").read_text())
        if sorted(f1) != asked:
            raise ValueError(f"{path.parent} was scored on other questions than the teacher: it is of another sweep")
        points.setdefault(title, []).append(dict(json.loads(path.read_text()), folder=path.parent.name, weight=float(weight),
                                                 questions=np.array([f1[i] for i in asked])))
    return {title: sorted(rows, key=lambda r: r["weight"]) for title, rows in points.items()}


def sweep_table() -> str:
    """One row for each point, the least pruned first."""
    dense = read("sweep", "teacher", "results.json")
    lines = ["| method | λ | F1 | EM | density | heads | speed |", "|---|---|---|---|---|---|---|"]
    for title, r in [("dense", dict(dense, folder="teacher", weight=None))] + [(t, r) for t, rows in sweep().items() for r in rows]:
        lines.append(f"| [{title}](results/sweep/{r['folder']}/results.json) | {r['weight'] or 0:g} | {r['f1']:.2f} | "
                     f"{r['exact_match']:.2f} | {100 * r['density']:.1f} % | {sum(r['heads'])} | {r['speedup']:.2f} x |")
    return "\n".join(lines)


def guide() -> str:
    """λ → density in the authors' log, in a line; ours is in the table of the sweep."""
    rows = read("paper.json")["rows"]
    return "FFN × 1: " + "; ".join(f"{title} " + ", ".join(f"{r[0]:g} → {100 * r[2]:.0f} %" for r in rows[title])
                     for title in METHODS if title != "Hybrid Filled") + " (its attention × 0.00156, 0.00156, 0.05)."


def at(rows: list[dict], key: str, x: float) -> np.ndarray:
    """Each question's F1 at `key` = x, in a line between the two points around it."""
    rows = sorted(rows, key=lambda r: r[key])
    return np.array([np.interp(x, [r[key] for r in rows], f1) for f1 in zip(*(r["questions"] for r in rows))])


def interval(difference: np.ndarray, draws: int = 4000) -> tuple[float, float]:
    """95 % of the means of so many resamples of the questions (paired: the differences are what is drawn)."""
    drawn = np.random.default_rng(0).multinomial(len(difference), np.full(len(difference), 1 / len(difference)), draws)
    return tuple(np.percentile(drawn @ difference / len(difference), [2.5, 97.5]))


def equal(first: list[dict], second: list[dict], key: str) -> tuple[float, np.ndarray] | None:
    """The middle of the range of `key` that both methods' points span, and the difference of F1 there."""
    if min(len(first), len(second)) < 2:
        return None
    low, high = (f(g(r[key] for r in rows) for rows in (first, second)) for f, g in ((max, min), (min, max)))
    middle = (low + high) / 2
    return (middle, 100 * (at(first, key, middle) - at(second, key, middle))) if low < high else None


def verdicts() -> str:
    """The four shapes that the paper claims, held against the sweep."""
    p, lines = sweep(), ["| the authors' result | here | 95 % interval | shown |", "|---|---|---|---|"]
    for claim, first, second, key in (
            ("smaller blocks keep more F1 at equal density", "Unstructured 1x1", "Block 8x8", "density"),
            ("", "Block 8x8", "Block 32x32", "density"), ("", "Unstructured 1x1", "Block 32x32", "density"),
            ("Hybrid beats Block at equal speed", "Hybrid 32x32", "Block 32x32", "speedup")):
        found = equal(p[first], p[second], key)
        where = "" if found is None else f"{100 * found[0]:.0f} % density" if key == "density" else f"{found[0]:.2f} x"
        lines.append(f"| {claim} | {first} against {second}: " + ("their points do not overlap | – | cannot be told |" if found is None else
                     f"{found[1].mean():+.2f} F1 at {where} | {verdict(found[1])} |"))
    masked = {r["weight"]: r for r in p["Hybrid 32x32"]}
    for a in p["Hybrid Filled"]:
        b = masked[a["weight"]]
        gain = 100 * (a["questions"] - b["questions"])
        lines.append(f"| filling gains at equal speed | λ {a['weight']:g}: {gain.mean():+.2f} F1 | {verdict(gain)} |")
    heads, single = sum(read("sweep", "teacher", "results.json")["heads"]), p["Unstructured 1x1"]
    gone = [heads - sum(r["heads"]) for r in single]
    lines.append("| even 1x1 empties some heads: 8 of 144 at 25 % density, 22 at 16 % | "
                 + "; ".join(f"{n} of {heads} at {100 * r['density']:.0f} %" for n, r in zip(gone, single)) + " | – | "
                 + ("yes |" if any(gone) else "no |" if min(r["density"] for r in single) < 0.25 else "cannot be told |"))
    return "\n".join([*lines, "", "The interval is over the dev questions alone, paired (bootstrap); each point is one seed. Equal density or speed is "
                      "read off a line between two points."])


def verdict(difference: np.ndarray) -> str:
    low, high = interval(difference)
    return f"{low:+.2f} to {high:+.2f} | {'yes' if low > 0 else 'no: the opposite' if high < 0 else 'no'}"


def readme(text: str) -> str:
    """README.md with the parts between <!-- name --> and <!-- end --> written again."""
    log = (HERE / "builtin" / "log.txt").read_text().splitlines()[-5:]
    makers = {"places": places(), "sweep": sweep_table(), "guide": guide(), "verdicts": verdicts(),
              "builtin-log": "\n" + "".join(f"    {line}\n" for line in log),
              **{path.stem: speed(path) for path in HERE.glob("bench-*.json")},
              **{path.parent.name: table(path.parent.name) for path in HERE.glob("*/summary.json")}}
    return re.sub(r"(<!-- ([\w-]+) -->\n).*?(<!-- end -->)",
                  lambda m: f"{m[1]}{makers[m[2]]}\n{m[3]}" if m[2] in makers else m[0], text, flags=re.S)


# ---------------------------------------------------------------------------------------- pictures

COLOURS = ("#1f6feb", "#1a7f37", "#bc4c00", "#9a6700", "#8250df", "#57606a")     # read on white and on black
STYLE = ("<style>svg{font:11px sans-serif;background:#fff}text{fill:#333}.k{fill:#1f6feb}.p{fill:#e6e6e6}.h{stroke:#fff}"
         ".a{stroke:#8c959f;fill:none}.g{stroke:#8c959f;stroke-opacity:.3}.t{font-weight:bold}"
         "@media(prefers-color-scheme:dark){svg{background:#0d1117}text{fill:#ccc}.k{fill:#58a6ff}.p{fill:#2d333b}"
         ".h{stroke:#0d1117}}</style>")


def svg(width: float, height: float, parts: list[str]) -> str:
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
            f'{STYLE}{"".join(parts)}</svg>\n')


def ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers from low to high."""
    step = 10 ** math.floor(math.log10((high - low) / 3))
    step *= next(m for m in (5, 2, 1) if (high - low) / (m * step) >= 3)
    return [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def chart(x: float, y: float, title: str, across: str, up: str, series: list[tuple], width=370, height=250) -> str:
    """Axes and series of (name, colour, points, style): "line", "dots" on a line, or "hollow" dots on a dashed one."""
    points = [p for _, _, ps, _ in series for p in ps]
    (x0, x1), (y0, y1) = ((min(v) - 0.05 * (max(v) - min(v) or 1), max(v) + 0.05 * (max(v) - min(v) or 1)) for v in zip(*points))
    left, top, w, h = x + 45, y + 25, width - 60, height - 65
    X, Y = (lambda v: round(left + w * (v - x0) / (x1 - x0), 1)), (lambda v: round(top + h * (y1 - v) / (y1 - y0), 1))
    out = [f'<text class="t" x="{left}" y="{y + 14}">{title}</text><rect class="a" x="{left}" y="{top}" width="{w}" height="{h}"/>',
           f'<text x="{left + w / 2}" y="{top + h + 32}" text-anchor="middle">{across}</text>',
           f'<text transform="translate({x + 10} {top + h / 2}) rotate(-90)" text-anchor="middle">{up}</text>']
    out += [f'<path class="g" d="M{X(v)} {top}v{h}"/><text x="{X(v)}" y="{top + h + 15}" text-anchor="middle">{v:g}</text>'
            for v in (round(v, 10) for v in ticks(x0, x1))]
    out += [f'<path class="g" d="M{left} {Y(v)}h{w}"/><text x="{left - 5}" y="{Y(v) + 4}" text-anchor="end">{v:g}</text>'
            for v in (round(v, 10) for v in ticks(y0, y1))]
    for name, colour, ps, style in series:
        dash = ' stroke-dasharray="2 3" stroke-opacity=".6"' if style == "hollow" else ""
        out.append(f'<path fill="none" stroke="{colour}" stroke-width="1.5"{dash} d="M{" L".join(f"{X(a)} {Y(b)}" for a, b in ps)}">'
                   f'<title>{name}</title></path>')
        if style != "line":
            fill = "none" if style == "hollow" else colour
            out += [f'<circle cx="{X(a)}" cy="{Y(b)}" r="3.5" fill="{fill}" stroke="{colour}"><title>{name}: {a:g}, {b:g}</title></circle>'
                    for a, b in ps]
    return "".join(out)


def legend(x: float, y: float, names: list[tuple]) -> str:
    """A line of (name, colour)."""
    parts = []
    for name, colour in names:
        parts.append(f'<circle cx="{x + 4}" cy="{y - 4}" r="4" fill="{colour}"/><text x="{x + 12}" y="{y}">{name}</text>')
        x += 26 + 6.2 * len(name)
    return "".join(parts)


def curves_picture() -> str:
    """F1 lost against speed-up and against density, a line a method, and the authors' rows as hollow points."""
    paper, ours, dense = read("paper.json"), sweep(), read("sweep", "teacher", "results.json")
    parts = [f'<text class="t" x="10" y="18">F1 lost by pruning on SQuAD v1.1. Solid: MiniLM, {dense["data"]["train_questions"] // 2:,} '
             f'questions, scored on {dense["data"]["dev_questions"]:,}. Hollow: the authors’ BERT-base, all questions</text>',
             legend(50, 38, list(zip(METHODS, COLOURS)))]
    for k, (key, column, across, scale) in enumerate((("speedup", 3, "times the speed of the dense model", 1),
                                                      ("density", 2, "encoder linear weights kept, %", 100))):
        series = [(f"{m} (authors, BERT-base)", c, sorted((scale * r[column], r[1] - paper["dense"]) for r in paper["rows"][m]), "hollow")
                  for m, c in zip(METHODS, COLOURS)]
        series += [(m, c, sorted((scale * r[key], r["f1"] - dense["f1"]) for r in ours[m]), "dots")
                   for m, c in zip(METHODS, COLOURS) if ours[m]]
        parts.append(chart(10 + 420 * k, 50, "", across, "F1 minus that of its own dense model", series, 410, 330))
    return svg(850, 390, parts)


def layers_picture() -> str:
    """Heads and FFN width left, by layer: one model of each method, the most pruned. Hybrid Filled has those of Hybrid."""
    last = {m: rows[-1] for m, rows in sweep().items() if rows and m != "Hybrid Filled"}
    dense, title = read("sweep", "teacher", "results.json"), "Left in each layer of MiniLM, highest λ of each method"
    parts = [legend(50, 20, [(m, c) for m, c in zip(METHODS, COLOURS) if m in last])]
    for k, (key, up) in enumerate((("heads", "heads"), ("ffn", "FFN dimensions"))):
        series = [(f"{m}, λ {r['weight']:g}", c, list(enumerate(r[key])), "dots") for m, c in zip(METHODS, COLOURS)
                  if m in last for r in [last[m]]]
        parts.append(chart(10 + 420 * k, 30, title, "layer", f"{up} left of {dense[key][0]:,}", series, 410, 280))
    return svg(850, 320, parts)


def run_picture(run: str) -> str:
    """τ, λ, density and loss over the steps of a fine-pruning."""
    lines = [json.loads(line) for line in (HERE / run / "hybrid" / "log.jsonl").read_text().splitlines()]
    panels = (("τ, the threshold", {"τ": lambda r: r["threshold"]}), ("λ, the weight of the penalty", {"λ": lambda r: r["lambda"]}),
              ("density: attention (blue), FFN (green)", {k: lambda r, k=k: r["density"].get(k, r["density"].get("dense", 1)) for k in ("attention", "ffn")}),
              ("loss: all (blue), cross entropy (green)", {k: lambda r, k=k: r[k] for k in ("loss", "ce")}))
    parts = [f'<text class="t" x="10" y="18">Fine-pruning, Hybrid 32x32 on MiniLM: {run}</text>']
    for k, (title, values) in enumerate(panels):
        series = [(name, c, [(r["step"], value(r)) for r in lines], "line") for (name, value), c in zip(values.items(), COLOURS)]
        parts.append(chart(10 + 420 * (k % 2), 25 + 225 * (k // 2), title, "step", "", series, 410, 215))
    return svg(850, 480, parts)


def matrix(rows: list[str], x: float, y: float, width: float, height: float) -> str:
    """A mask as one path of kept blocks over a pruned background."""
    h, w = height / len(rows), width / len(rows[0])
    path = "".join(f"M{x + run.start() * w:.2f} {y + i * h:.2f}h{len(run[0]) * w:.2f}v{h:.2f}h{-len(run[0]) * w:.2f}z"
                   for i, row in enumerate(rows) for run in re.finditer("1+", row))
    return f'<rect class="p" x="{x}" y="{y}" width="{width}" height="{height}"/><path class="k" d="{path}"/>'


def masks_picture(run: str) -> str:
    """Every weight matrix of every layer, kept and pruned, heads delimited (cf. figure 1 of the paper)."""
    layers, r = read(run, "hybrid-compact", "masks.json"), read(run, "hybrid", "results.json")
    size, heads = 96, read(run, "teacher", "results.json")["heads"][0]
    parts = [f'<text x="10" y="18">Masks of Hybrid 32x32 on MiniLM, {r["data"]["name"]} ({r["data"]["train_questions"]:,} '
             f'questions): kept (blue) and pruned weights, {100 * r["density"]:.0f} % kept. White lines: heads.</text>']
    for column, name in enumerate(("query", "key", "value", "out", "fc1 (transposed)", "fc2")):
        parts.append(f'<text x="{64 + column * (size + 14) + (column > 4) * 60}" y="40">{name}</text>')
    for i, layer in layers.items():
        y = 50 + int(i) * (size + 12)
        parts.append(f'<text x="10" y="{y + size / 2}">layer {i}</text>')
        for column, name in enumerate(("query", "key", "value", "out")):
            x = 64 + column * (size + 14)
            parts.append(matrix(layer[name], x, y, size, size))
            step = size / heads
            lines = "".join(f"M{x} {y + k * step}h{size}" if name != "out" else f"M{x + k * step} {y}v{size}"
                            for k in range(1, heads))
            parts.append(f'<path class="h" stroke-width="0.7" d="{lines}"/>')
        x = 64 + 4 * (size + 14)
        parts.append(matrix(["".join(layer["fc1"])], x, y, 156, size))
        parts.append(matrix(layer["fc2"], x + 170, y, 156, size))
    height = 60 + len(layers) * (size + 12)
    return svg(850, height, parts)


def main() -> int:
    text = (ROOT / "README.md").read_text()
    if "--check" in sys.argv:
        return int(text != readme(text))
    for path in HERE.glob("*/hybrid-compact/masks.json"):
        run = path.parent.parent.name
        (HERE / f"masks-{run}.svg").write_text(masks_picture(run))
        (HERE / f"run-{run}.svg").write_text(run_picture(run))
    (HERE / "curves.svg").write_text(curves_picture())
    (HERE / "layers.svg").write_text(layers_picture())
    (ROOT / "README.md").write_text(readme(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
