"""Draws the pictures of results/ as SVG text. figures.py writes them to files (make figure).

    curves_picture()    F1 against speed and density, all methods beside the authors' models
    layers_picture()    what each method leaves in each layer
    run_picture()       τ, λ, density and loss over the steps of a fine-pruning
    masks_picture()     every weight matrix of a model, kept and pruned

x and y are pixels from the left and from the top: y grows downwards. A drawing function returns the
text of what it draws.

A series of a chart is (name, colour, points, style). The style is
    "line"      a line alone
    "dots"      a line with a dot on each point
    "hollow"    a dashed line with a hollow dot on each point
"""
import dataclasses
import json
import math
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent

BLUE = "#1f6feb"
GREEN = "#1a7f37"
COLOURS = {     # by method, read on white and on black
    "Hybrid 32x32": BLUE,
    "Hybrid Filled": GREEN,
    "Block 32x32": "#bc4c00",
    "Block 8x8": "#9a6700",
    "Unstructured 1x1": "#8250df",
    "Struct": "#57606a",
}
STYLE = (
    "<style>"
    "svg{font:11px sans-serif;background:#fff}"
    "text{fill:#333}"
    ".k{fill:#1f6feb}"                                  # what is kept of a matrix
    ".p{fill:#e6e6e6}"                                  # what is pruned
    ".h{stroke:#fff}"                                   # between heads
    ".a{stroke:#8c959f;fill:none}"                      # the frame of a chart
    ".g{stroke:#8c959f;stroke-opacity:.3}"              # its grid
    ".t{font-weight:bold}"                              # titles
    "@media(prefers-color-scheme:dark){"
    "svg{background:#0d1117}"
    "text{fill:#ccc}"
    ".k{fill:#58a6ff}"
    ".p{fill:#2d333b}"
    ".h{stroke:#0d1117}"
    "}</style>"
)


# ------------------------------------------------------------------------------ what is drawn from


def read(*parts: str):
    return json.loads(HERE.joinpath(*parts).read_text(encoding="utf-8"))


def read_log(run: str, name: str) -> list[dict]:
    """The lines of a model's log.jsonl. Older runs call the kind "ffn" of the masks "dense"."""
    lines = []
    for text in (HERE / run / name / "log.jsonl").read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        density = line["density"]
        if "dense" in density:
            density["ffn"] = density.pop("dense")
        lines.append(line)
    return lines


def masked_density(run: str, pruned: str) -> float:
    """The density of a pruned model with its masks on: older runs have it beside that model."""
    compacted = read(run, f"{pruned}-compact", "results.json")
    if "density_masked" in compacted:
        return compacted["density_masked"]
    return read(run, pruned, "results.json")["density"]


# ---------------------------------------------------------------------------------- pieces of SVG


def svg(width: float, height: float, parts: list[str]) -> str:
    """A whole picture."""
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    drawn = "".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{STYLE}{drawn}</svg>\n'


def text(x: float, y: float, words: str, anchor: str = "") -> str:
    """Words on the line y. They begin at x; anchor: "middle" or "end" is there instead."""
    if anchor:
        anchor = f' text-anchor="{anchor}"'
    return f'<text x="{x}" y="{y}"{anchor}>{words}</text>'


def heading(x: float, y: float, words: str) -> str:
    return f'<text class="t" x="{x}" y="{y}">{words}</text>'


def legend(x: float, y: float, colours: dict[str, str]) -> str:
    """Dots with their names, in one line."""
    parts = []
    for name, colour in colours.items():
        parts.append(f'<circle cx="{x + 4}" cy="{y - 4}" r="4" fill="{colour}"/>')
        parts.append(text(x + 12, y, name))
        x += 26 + 6.2 * len(name)       # a letter is about 6 pixels wide
    return "".join(parts)


# ----------------------------------------------------------------------------------------- charts


@dataclasses.dataclass
class Axes:
    """The frame of a chart in pixels, and the numbers that it spans from end to end."""
    left: float
    top: float
    width: float
    height: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        low, high = self.x_range
        return round(self.left + self.width * (value - low) / (high - low), 1)

    def y(self, value: float) -> float:
        # The highest number is at the top, where pixels are counted from.
        low, high = self.y_range
        return round(self.top + self.height * (high - value) / (high - low), 1)


def with_margins(values: list[float]) -> tuple[float, float]:
    """The range of some numbers, with 5 % more at either end."""
    low = min(values)
    high = max(values)
    extent = high - low
    if extent == 0:
        extent = 1
    return low - 0.05 * extent, high + 0.05 * extent


def ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers from low to high."""
    # Of 5, 2 and 1 times a power of ten, the largest step that fits in three times.
    power = 10 ** math.floor(math.log10((high - low) / 3))
    step = power
    for factor in (2, 5):
        if (high - low) / (factor * power) >= 3:
            step = factor * power
    # The multiples of the step in the range. It may end on one that rounding has moved outside.
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


def chart(x: float, y: float, title: str, x_name: str, y_name: str, series: list[tuple],
          width: float = 370, height: float = 250) -> str:
    """Axes with some series in them. x, y, width, height: with the names of the axes."""
    xs = []
    ys = []
    for _, _, points, _ in series:
        for a, b in points:
            xs.append(a)
            ys.append(b)
    # Room for the numbers and the names of the axes: 45 on the left, 15 on the right, 25 above, and
    # 40 below.
    axes = Axes(x + 45, y + 25, width - 60, height - 65, with_margins(xs), with_margins(ys))
    parts = [heading(axes.left, y + 14, title), frame(axes)]
    parts.append(text(axes.left + axes.width / 2, axes.top + axes.height + 32, x_name, "middle"))
    # The name of the other axis is turned to be read upwards.
    place = f"translate({x + 10} {axes.top + axes.height / 2}) rotate(-90)"
    parts.append(f'<text transform="{place}" text-anchor="middle">{y_name}</text>')
    parts.append(grid(axes))
    for name, colour, points, style in series:
        parts.append(curve(axes, name, colour, points, style))
    return "".join(parts)


def frame(axes: Axes) -> str:
    return (f'<rect class="a" x="{axes.left}" y="{axes.top}" '
            f'width="{axes.width}" height="{axes.height}"/>')


def grid(axes: Axes) -> str:
    """A line for each tick, with its number below the frame or on its left."""
    parts = []
    bottom = axes.top + axes.height
    for value in ticks(*axes.x_range):
        value = round(value, 10)        # 0.3, not 0.30000000000000004
        x = axes.x(value)
        parts.append(f'<path class="g" d="M{x} {axes.top}v{axes.height}"/>')
        parts.append(text(x, bottom + 15, f"{value:g}", "middle"))
    for value in ticks(*axes.y_range):
        value = round(value, 10)
        y = axes.y(value)
        parts.append(f'<path class="g" d="M{axes.left} {y}h{axes.width}"/>')
        parts.append(text(axes.left - 5, y + 4, f"{value:g}", "end"))
    return "".join(parts)


def curve(axes: Axes, name: str, colour: str, points: list[tuple], style: str) -> str:
    """One series. A browser shows its name, and a dot's numbers, under the pointer."""
    dash = ""
    fill = colour
    if style == "hollow":
        dash = ' stroke-dasharray="2 3" stroke-opacity=".6"'
        fill = "none"
    corners = " L".join(f"{axes.x(a)} {axes.y(b)}" for a, b in points)
    parts = [f'<path fill="none" stroke="{colour}" stroke-width="1.5"{dash} d="M{corners}">',
             f"<title>{name}</title></path>"]
    if style == "line":
        return "".join(parts)
    for a, b in points:
        parts.append(f'<circle cx="{axes.x(a)}" cy="{axes.y(b)}" r="3.5" fill="{fill}" '
                     f'stroke="{colour}"><title>{name}: {a:g}, {b:g}</title></circle>')
    return "".join(parts)


# ------------------------------------------------------------------------------------ of the sweep


def curves_picture(sweep: dict[str, list[dict]], dense: dict, paper: dict) -> str:
    """F1 lost against speed-up and against density: a line a method, the authors' dashed.

    sweep: the points of each method, by its name. dense: the results of the sweep's teacher.
    paper: paper.json.
    """
    # The teacher saw twice as many questions as a point does.
    questions = dense["data"]["train_questions"] // 2
    title = (f"F1 lost by pruning on SQuAD v1.1. Solid: MiniLM, {questions:,} questions, "
             f"scored on {dense['data']['dev_questions']:,}. "
             "Hollow: the authors’ BERT-base, all questions")
    parts = [heading(10, 18, title), legend(50, 38, COLOURS)]
    y_name = "F1 minus that of its own dense model"
    series = series_of_curves(sweep, dense, paper, "speedup", scale=1)
    parts.append(chart(10, 50, "", "times the speed of the dense model", y_name, series, 410, 330))
    series = series_of_curves(sweep, dense, paper, "density", scale=100)
    parts.append(chart(430, 50, "", "encoder linear weights kept, %", y_name, series, 410, 330))
    return svg(850, 390, parts)


def series_of_curves(sweep: dict[str, list[dict]], dense: dict, paper: dict, key: str,
                     scale: float) -> list[tuple]:
    """The series of one of the two charts: scale · key across, the F1 that is lost upwards."""
    series = []
    # The authors' first: ours are drawn over them.
    x_column = paper["columns"].index(key)
    f1_column = paper["columns"].index("f1")
    for method, colour in COLOURS.items():
        points = []
        for row in paper["rows"][method]:
            points.append((scale * row[x_column], row[f1_column] - paper["dense"]))
        series.append((f"{method} (authors, BERT-base)", colour, sorted(points), "hollow"))
    for method, colour in COLOURS.items():
        points = [(scale * point[key], point["f1"] - dense["f1"]) for point in sweep[method]]
        if points:
            series.append((method, colour, sorted(points), "dots"))
    return series


def layers_picture(sweep: dict[str, list[dict]], dense: dict) -> str:
    """Heads and inner dimensions left, by layer: the most pruned model of each method."""
    most_pruned = {}
    for method in COLOURS:
        # A filled model has the heads and dimensions that it was filled from.
        if sweep[method] and method != "Hybrid Filled":
            most_pruned[method] = sweep[method][-1]
    parts = [legend(50, 20, {method: COLOURS[method] for method in most_pruned})]
    parts.append(layers_chart(10, most_pruned, dense, "heads", "heads"))
    parts.append(layers_chart(430, most_pruned, dense, "ffn", "FFN dimensions"))
    return svg(850, 320, parts)


def layers_chart(x: float, most_pruned: dict[str, dict], dense: dict, key: str, what: str) -> str:
    series = []
    for method, point in most_pruned.items():
        by_layer = list(enumerate(point[key]))
        series.append((f"{method}, λ {point['weight']:g}", COLOURS[method], by_layer, "dots"))
    title = "Left in each layer of MiniLM, highest λ of each method"
    return chart(x, 30, title, "layer", f"{what} left of {dense[key][0]:,}", series, 410, 280)


# --------------------------------------------------------------------------------------- of a run


def run_picture(run: str, pruned: str = "hybrid") -> str:
    """τ, λ, density and loss over the steps of a fine-pruning.

    pruned: the folder of the run that has the log of the pruning.
    """
    lines = read_log(run, pruned)

    def line_chart(x: float, y: float, title: str, values_by_name: dict[str, list[float]]) -> str:
        # One curve is blue, of two the second is green.
        series = []
        for (name, values), colour in zip(values_by_name.items(), (BLUE, GREEN)):
            points = [(line["step"], value) for line, value in zip(lines, values)]
            series.append((name, colour, points, "line"))
        return chart(x, y, title, "step", "", series, 410, 215)

    name = run
    if pruned != "hybrid":
        name = f"{run}/{pruned}"
    # Two charts above, two below.
    return svg(850, 480, [
        heading(10, 18, f"Fine-pruning, Hybrid 32x32 on MiniLM: {name}"),
        line_chart(10, 25, "τ, the threshold",
                   {"τ": [line["threshold"] for line in lines]}),
        line_chart(430, 25, "λ, the weight of the penalty",
                   {"λ": [line["lambda"] for line in lines]}),
        line_chart(10, 250, "density: attention (blue), FFN (green)",
                   {"attention": [line["density"]["attention"] for line in lines],
                    "ffn": [line["density"]["ffn"] for line in lines]}),
        line_chart(430, 250, "loss: all (blue), cross entropy (green)",
                   {"loss": [line["loss"] for line in lines],
                    "ce": [line["ce"] for line in lines]}),
    ])


def matrix(rows: list[str], x: float, y: float, width: float, height: float) -> str:
    """A mask, kept blocks over a pruned background. rows: strings of 0 and 1, where 1 is kept."""
    block_height = height / len(rows)
    block_width = width / len(rows[0])
    path = ""
    for i, row in enumerate(rows):
        # Kept blocks that are side by side are one rectangle: right, down, left, and closed.
        for kept in re.finditer("1+", row):
            left = x + kept.start() * block_width
            top = y + i * block_height
            length = len(kept[0]) * block_width
            path += f"M{left:.2f} {top:.2f}h{length:.2f}v{block_height:.2f}h{-length:.2f}z"
    background = f'<rect class="p" x="{x}" y="{y}" width="{width}" height="{height}"/>'
    return f'{background}<path class="k" d="{path}"/>'


def head_lines(x: float, y: float, size: float, heads: int, upright: bool) -> str:
    """The lines between the heads of a square matrix, upright where they are its columns."""
    path = ""
    for head in range(1, heads):
        at = head * (size / heads)
        if upright:
            path += f"M{x + at} {y}v{size}"
        else:
            path += f"M{x} {y + at}h{size}"
    return f'<path class="h" stroke-width="0.7" d="{path}"/>'


# In pixels: an attention matrix, the same with its margin, an FFN matrix, and where each begins.
SIZE = 96
COLUMN = SIZE + 14
FFN_WIDTH = 156
MATRICES = {"query": 64, "key": 64 + COLUMN, "value": 64 + 2 * COLUMN, "out": 64 + 3 * COLUMN,
            "fc1": 64 + 4 * COLUMN, "fc2": 64 + 4 * COLUMN + FFN_WIDTH + 14}


def masks_picture(run: str, pruned: str = "hybrid") -> str:
    """Every weight matrix of every layer, kept and pruned, with the heads, as the paper's figure 1.

    pruned: the folder of the run that has the pruned model; its masks are those that the compaction
    beside it wrote down.
    """
    layers = read(run, f"{pruned}-compact", "masks.json")
    heads = read(run, "teacher", "results.json")["heads"][0]
    data = read(run, pruned, "results.json")["data"]
    kept = 100 * masked_density(run, pruned)
    title = (f"Masks of Hybrid 32x32 on MiniLM, {data['name']} ({data['train_questions']:,} "
             f"questions): kept (blue) and pruned weights, {kept:.0f} % kept. White lines: heads.")
    parts = [text(10, 18, title)]
    for name, x in MATRICES.items():
        if name == "fc1":
            name = "fc1 (transposed)"
        parts.append(text(x, 40, name))
    for i, layer in layers.items():
        y = 50 + int(i) * (SIZE + 12)
        parts.append(text(10, y + SIZE / 2, f"layer {i}"))
        parts.append(layer_masks(layer, y, heads))
    return svg(850, 60 + len(layers) * (SIZE + 12), parts)


def layer_masks(layer: dict[str, list[str]], y: float, heads: int) -> str:
    """The six matrices of a layer, side by side."""
    parts = []
    for name in ("query", "key", "value", "out"):
        x = MATRICES[name]
        parts.append(matrix(layer[name], x, y, SIZE, SIZE))
        # Heads are rows of query, key and value, and columns of out.
        parts.append(head_lines(x, y, SIZE, heads, upright=name == "out"))
    # Inner dimensions are rows of fc1, a block each: transposed, they stand above the columns of
    # fc2 that belong to them.
    parts.append(matrix(["".join(layer["fc1"])], MATRICES["fc1"], y, FFN_WIDTH, SIZE))
    parts.append(matrix(layer["fc2"], MATRICES["fc2"], y, FFN_WIDTH, SIZE))
    return "".join(parts)
