"""Draws the pictures of results/ as SVG text. figures.py writes them to files (make figure).

x and y are pixels from the left and from the top: y grows downwards. A function returns the text of
what it draws. A series of a chart is (name, colour, points, style), with the styles
    "line"      a line alone
    "dots"      a line with a dot on each point
    "hollow"    a dashed line with a hollow dot on each point
"""
import math
import re

BLUE = "#1f6feb"
GREEN = "#1a7f37"
RED = "#cf222e"
COLOURS = {     # by method, read on white and on black
    "Hybrid 32x32": BLUE,
    "Hybrid Filled": GREEN,
    "Block 32x32": "#bc4c00",
    "Block 8x8": "#9a6700",
    "Unstructured 1x1": "#8250df",
    "Struct": "#57606a",
}
# .k is what is kept of a matrix, .p what is pruned, .h the lines between heads; .a is the frame of
# a chart, .g its grid.
STYLE = """<style>
svg{font:11px sans-serif;background:#fff}text{fill:#333}
.k{stroke:#1f6feb}.p{fill:#dfe3e8}.h{stroke:#fff}
.a{stroke:#8c959f;fill:none}.g{stroke:#8c959f;stroke-opacity:.3}
@media(prefers-color-scheme:dark){
svg{background:#0d1117}text{fill:#ccc}.k{stroke:#58a6ff}.p{fill:#484f58}.h{stroke:#0d1117}
}</style>"""


def svg(width: float, height: float, drawn: str) -> str:
    """A whole picture."""
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{STYLE}{drawn}</svg>\n'


def text(x: float, y: float, words: str, anchor: str = "start") -> str:
    """Words on the line y. They begin at x, or end there ("end"), or lie around it ("middle")."""
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{words}</text>'


def legend(x: float, y: float, colours: dict[str, str]) -> str:
    """Dots with their names, in one line."""
    drawn = ""
    for name, colour in colours.items():
        drawn += f'<circle cx="{x}" cy="{y - 4}" r="4" fill="{colour}"/>'
        drawn += text(x + 8, y, name)
        x += 26 + 6.2 * len(name)       # a letter is about 6 pixels wide
    return drawn


# ----------------------------------------------------------------------------------------- charts


def with_margins(values: list[float]) -> tuple[float, float]:
    """The range of some numbers, with 5 % more at either end."""
    low = min(values)
    high = max(values)
    margin = 0.05 * (high - low)
    return low - margin, high + margin


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
    # 0.3, not 0.30000000000000004.
    return [round(n * step, 10) for n in range(first, last + 1)]


def chart(x: float, y: float, x_name: str, y_name: str, series: list[tuple], width: float = 410,
          height: float = 205, from_zero: bool = False) -> str:
    """Axes with some series in them. x, y, width, height: with the names of the axes.

    from_zero: the upright axis begins at 0.
    """
    points = []
    for _, _, of_series, _ in series:
        points += of_series
    left, right = with_margins([a for a, _ in points])
    lowest, highest = with_margins([b for _, b in points])
    if from_zero:
        lowest = 0
    # The frame: the numbers and names of the axes stand on its left and below it.
    frame_x = x + 45
    frame_width = width - 60
    frame_height = height - 40
    bottom = y + frame_height

    def across(a: float) -> float:
        return round(frame_x + frame_width * (a - left) / (right - left), 1)

    def up(b: float) -> float:
        return round(bottom - frame_height * (b - lowest) / (highest - lowest), 1)

    drawn = (f'<rect class="a" x="{frame_x}" y="{y}" width="{frame_width}" '
             f'height="{frame_height}"/>')
    # A line for each tick, with its number.
    for a in ticks(left, right):
        drawn += f'<path class="g" d="M{across(a)} {y}v{frame_height}"/>'
        drawn += text(across(a), bottom + 15, f"{a:g}", "middle")
    for b in ticks(lowest, highest):
        drawn += f'<path class="g" d="M{frame_x} {up(b)}h{frame_width}"/>'
        drawn += text(frame_x - 5, up(b) + 4, f"{b:g}", "end")
    # The names of the axes. The upright one's is turned to be read upwards.
    drawn += text(frame_x + frame_width / 2, bottom + 32, x_name, "middle")
    turned = text(0, 0, y_name, "middle")
    place = f"translate({x + 10} {y + frame_height / 2}) rotate(-90)"
    drawn += f'<g transform="{place}">{turned}</g>'

    for name, colour, of_series, style in series:
        places = [(across(a), up(b)) for a, b in of_series]
        drawn += curve(places, name, colour, style)
    return drawn


def curve(places: list[tuple], name: str, colour: str, style: str) -> str:
    """One series. A browser shows its name under the pointer."""
    dash = ""
    fill = colour
    if style == "hollow":
        dash = 'stroke-dasharray="2 3" stroke-opacity=".6"'
        fill = "none"
    corners = " L".join(f"{x} {y}" for x, y in places)
    drawn = (f'<g stroke="{colour}"><title>{name}</title>'
             f'<path fill="none" stroke-width="1.5" {dash} d="M{corners}"/>')
    if style != "line":
        for x, y in places:
            drawn += f'<circle cx="{x}" cy="{y}" r="3.5" fill="{fill}"/>'
    return drawn + "</g>"


def epochs_picture(lines: list[tuple], bars: list[tuple]) -> str:
    """F1 against epochs. lines: (name, colour, points); bars: (colour, epochs, lowest, highest)."""
    series = []
    colours = {}
    for name, colour, points in lines:
        series.append((name, colour, points, "dots"))
        colours[name] = colour
    # A bar is an upright line through its point.
    for colour, epochs, low, high in bars:
        series.append(("95 %", colour, [(epochs, low), (epochs, high)], "line"))
    title = ("F1 on SQuAD v1.1 against epochs of training in all. "
             "Bars: 95 % of the difference from the control")
    drawn = text(10, 18, title) + legend(55, 38, colours)
    drawn += chart(10, 50, "epochs", "F1", series, 620, 275)
    return svg(640, 330, drawn)


def curves_picture(groups: list[tuple]) -> str:
    """F1 lost against speed-up and against density, in two charts.

    groups: (name, colour, points, style), with points (speed-up, density in %, F1 lost).
    """
    title = ("F1 lost by pruning. Dots: MiniLM, 4,000 questions; its dense model: 8,000. Hollow: "
             "the authors’ BERT-base")
    dots = {name: colour for name, colour, _, style in groups if style == "dots"}
    drawn = text(10, 18, title) + legend(55, 38, dots)
    names = ("times the speed of the dense model", "encoder linear weights kept, %")
    for column, x_name in enumerate(names):
        series = []
        for name, colour, points, style in groups:
            pairs = [(point[column], point[2]) for point in points]
            series.append((name, colour, sorted(pairs), style))
        drawn += chart(10 + 420 * column, 50, x_name, "F1 minus that of its dense model",
                       series, height=305)
    return svg(850, 360, drawn)


def run_picture(log: list[dict], title: str) -> str:
    """τ, density and loss over the steps of a fine-pruning, from the lines of its log."""
    curves = {name: [] for name in ("threshold", "attention", "ffn", "ce", "kd", "loss")}
    for line in log:
        values = line | line["density"]
        for name, points in curves.items():
            points.append((line["step"], values[name]))

    def series(name: str, colour: str) -> tuple:
        return name, colour, curves[name], "line"

    losses = [series("ce", GREEN), series("kd", RED), series("loss", BLUE)]
    densities = [series("attention", BLUE), series("ffn", GREEN)]
    drawn = text(10, 18, title)
    drawn += text(55, 42, "τ, the threshold")
    drawn += chart(10, 50, "step", "", [series("threshold", BLUE)], from_zero=True)
    drawn += text(475, 42, "density: attention (blue), FFN (green)")
    drawn += chart(430, 50, "step", "", densities, from_zero=True)
    drawn += text(55, 272, "loss (blue) = 0.1 · cross entropy (green) + 0.9 · distillation (red) "
                           "+ λ · τ/0.1 · penalty")
    drawn += chart(10, 280, "step", "", losses, width=830, from_zero=True)
    return svg(850, 490, drawn)


# ------------------------------------------------------------------------------------------ masks


def as_rows(mask: list[str] | str) -> list[str]:
    """The rows of a mask, strings of 0 and 1. A single column of blocks lies down as one row."""
    if len(mask[0]) == 1:
        return ["".join(mask)]
    return mask


def matrix(rows: list[str], x: float, y: float, width: float, height: float) -> str:
    """A mask, kept blocks over a pruned background. rows: strings of 0 and 1, where 1 is kept."""
    path = ""
    for i, row in enumerate(rows):
        # Kept blocks that are side by side are one thick line. A block is a unit wide and high.
        for kept in re.finditer("1+", row):
            path += f"M{kept.start()} {i}h{len(kept[0])}"
    across = width / len(rows[0])
    down = height / len(rows)
    place = f"translate({x} {y}) scale({across:.5g} {down:.5g}) translate(0 .5)"
    background = f'<rect class="p" x="{x}" y="{y}" width="{width}" height="{height}"/>'
    return f'{background}<path class="k" transform="{place}" d="{path}"/>'


def attention(layer: dict, places: dict, size: float, heads: int) -> str:
    """Query, key, value and out of a layer, each where `places` says, and lines between heads."""
    drawn = ""
    for name, (x, y) in places.items():
        drawn += matrix(layer[name], x, y, size, size)
        path = ""
        for head in range(1, heads):
            at = round(head * size / heads, 2)
            # Heads are rows of query, key and value, and columns of out.
            if name == "out":
                path += f"M{x + at} {y}v{size}"
            else:
                path += f"M{x} {y + at}h{size}"
        drawn += f'<path class="h" stroke-width="0.6" d="{path}"/>'
    return drawn


def masks_picture(layers: dict[str, dict], heads: int, title: str) -> str:
    """Every weight matrix of every layer, kept and pruned, with the heads, as the paper's figure 1.

    layers: masks.json. heads: those of a layer of the dense model.
    """
    columns = {"query": 64, "key": 174, "value": 284, "out": 394}
    ffn_columns = {"fc1": 504, "fc2": 674}
    drawn = text(10, 18, title)
    for name, x in (columns | ffn_columns).items():
        drawn += text(x, 40, name.replace("fc1", "fc1 (transposed)"))
    for i, layer in layers.items():
        y = 50 + 108 * int(i)
        drawn += text(10, y + 48, f"layer {i}")
        places = {name: (x, y) for name, x in columns.items()}
        drawn += attention(layer, places, 96, heads)
        # Inner dimensions are rows of fc1: transposed, they stand above their columns of fc2.
        for name, x in ffn_columns.items():
            drawn += matrix(as_rows(layer[name]), x, y, 156, 96)
    return svg(850, 60 + 108 * len(layers), drawn)


def moments_picture(moments: list[dict], heads: int, title: str) -> str:
    """The masks of a run at some moments, side by side.

    Inner dimensions are too many to be seen one by one: a bar is the share that is kept.
    """
    title += ". In each layer query and key over value and out; bars: inner dimensions kept"
    drawn = text(10, 18, title)
    for column, moment in enumerate(moments):
        x = 10 + 140 * column
        y = 30
        for layer in moment["masks"].values():
            places = {"query": (x, y), "key": (x + 50, y),
                      "value": (x, y + 50), "out": (x + 50, y + 50)}
            drawn += attention(layer, places, 48, heads)
            # A bar, filled from below.
            inner = "".join(layer["fc1"])
            share = inner.count("1") / len(inner)
            drawn += f'<rect class="p" x="{x + 102}" y="{y}" width="16" height="98"/>'
            drawn += (f'<path class="k" stroke-width="16" d="M{x + 110} {y + 98}'
                      f'v{-98 * share:.1f}"/>')
            y += 104
        kept = 100 * moment["density"]["all"]
        words = [f"step {moment['step']:,}", f"τ {moment['threshold']:.3f}", f"{kept:.0f} % kept",
                 f"{sum(moment['heads'])} heads"]
        for line, word in enumerate(words):
            drawn += text(x, y + 10 + 15 * line, word)
    return svg(10 + 140 * len(moments), y + 65, drawn)
