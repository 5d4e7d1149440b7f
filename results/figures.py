"""Draws the pictures beside it and writes the README's tables, from the files of the runs in this folder.

    python results/figures.py           (make figure)
    python results/figures.py --check   exit 1 if README.md is not what would be written

A run is a folder of model folders (results.json, run.json, log.jsonl, masks.json), as `make squad` leaves
them under runs/, without the weights.
"""
import ast
import json
import re
import sys
from pathlib import Path

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
    for row in b["rows"]:
        wanted = f"{'≤' if row['at_most'] else '≥'} {row['wanted']:g}" if row["wanted"] else "–"
        noise = f" ± {50 * row['spread']:.0f} %" if row["spread"] else ""
        base, ours = ("–" if row[key] is None else f"{row[key]:.4g} {row['unit']}" for key in ("baseline", "ours"))
        ratio = "–" if row["ratio"] is None else f"{row['ratio']:.3g}{noise}"
        lines.append(f"| {row['goal']}. {row['what']} | {base} | {ours} | {ratio} | {wanted}{' (missed)' * (row['met'] is False)} |")
    return "\n".join(lines + ["", f"[{path.name}](results/{path.name}): `{b['command']}` on {b['device']}, {b['threads']} threads, "
                              f"torch {b['torch']}, {b['data']}."])


def readme(text: str) -> str:
    """README.md with the parts between <!-- name --> and <!-- end --> written again."""
    log = (HERE / "builtin" / "log.txt").read_text().splitlines()[-5:]
    makers = {"places": places(), "builtin-log": "\n" + "".join(f"    {line}\n" for line in log),
              **{path.stem: speed(path) for path in HERE.glob("bench-*.json")},
              **{path.parent.name: table(path.parent.name) for path in HERE.glob("*/summary.json")}}
    return re.sub(r"(<!-- ([\w-]+) -->\n).*?(<!-- end -->)",
                  lambda m: f"{m[1]}{makers[m[2]]}\n{m[3]}" if m[2] in makers else m[0], text, flags=re.S)


# ---------------------------------------------------------------------------------------- pictures

STYLE = ("<style>svg{font:11px sans-serif;background:#fff}text{fill:#333}.k{fill:#1f6feb}.p{fill:#e6e6e6}.h{stroke:#fff}"
         "@media(prefers-color-scheme:dark){svg{background:#0d1117}text{fill:#ccc}.k{fill:#58a6ff}.p{fill:#2d333b}"
         ".h{stroke:#0d1117}}</style>")


def runs_of(row: str):
    """(start, length) of each run of 1s."""
    return [(m.start(), len(m[0])) for m in re.finditer("1+", row)]


def matrix(rows: list[str], x: float, y: float, width: float, height: float) -> str:
    """A mask as one path of kept blocks over a pruned background."""
    h, w = height / len(rows), width / len(rows[0])
    path = "".join(f"M{x + a * w:.2f} {y + i * h:.2f}h{n * w:.2f}v{h:.2f}h{-n * w:.2f}z"
                   for i, row in enumerate(rows) for a, n in runs_of(row))
    return f'<rect class="p" x="{x}" y="{y}" width="{width}" height="{height}"/><path class="k" d="{path}"/>'


def masks_picture(run: str) -> str:
    """Every weight matrix of every layer, kept and pruned, heads delimited (cf. figure 1 of the paper)."""
    layers, r = read(run, "hybrid-compact", "masks.json"), read(run, "hybrid", "results.json")
    size, heads = 96, 12
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
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 850 {height}" width="850" height="{height}">{STYLE}'
            + "".join(parts) + "</svg>\n")


def main() -> int:
    text = (ROOT / "README.md").read_text()
    if "--check" in sys.argv:
        return int(text != readme(text))
    for path in HERE.glob("*/hybrid-compact/masks.json"):
        run = path.parent.parent.name
        (HERE / f"masks-{run}.svg").write_text(masks_picture(run))
    (ROOT / "README.md").write_text(readme(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
