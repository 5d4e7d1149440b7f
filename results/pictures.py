"""Draws the pictures of results/ as SVG text. figures.py writes them to files (make figure).

x and y are pixels from the left and from the top: y grows downwards. A function draws from (0, 0)
on and returns the text of what it draws; at() moves it to its place. A series of a chart is
(name, colour, points, style), with the styles
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


def svg(width: float, height: float, title: str, drawn: str) -> str:
    """A whole picture."""
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    drawn = text(10, 18, title) + drawn
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{STYLE}{drawn}</svg>\n'


def at(x: float, y: float, drawn: str) -> str:
    return f'<g transform="translate({x} {y})">{drawn}</g>'


def text(x: float, y: float, words: str, anchor: str = "start") -> str:
    """Words on the line y. They begin at x, or end there ("end"), or lie around it ("middle")."""
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{words}</text>'


def legend(colours: dict[str, str]) -> str:
    """Dots with their names, in one line."""
    drawn = ""
    x = 55
    for name, colour in colours.items():
        drawn += f'<circle cx="{x}" cy="34" r="4" fill="{colour}"/>'
        drawn += text(x + 8, 38, name)
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
    third = (high - low) / 3
    power = 10 ** math.floor(math.log10(third))
    step = power
    for factor in (2, 5):
        if factor * power <= third:
            step = factor * power
    first = math.ceil(low / step)
    last = math.floor(high / step)
    # 0.3, not 0.30000000000000004.
    return [round(n * step, 10) for n in range(first, last + 1)]


def chart(x_name: str, y_name: str, series: list[tuple], width: float = 350, height: float = 165,
          from_zero: bool = False) -> str:
    """Axes with some series in them. Numbers and names stand on the left of the frame and below it.

    from_zero: the upright axis begins at 0.
    """
    points = []
    for _, _, of_series, _ in series:
        points += of_series
    left, right = with_margins([a for a, _ in points])
    lowest, highest = with_margins([b for _, b in points])
    if from_zero:
        lowest = 0

    def across(a: float) -> float:
        return round(width * (a - left) / (right - left), 1)

    def up(b: float) -> float:
        return round(height * (highest - b) / (highest - lowest), 1)

    # The frame, and a line for each tick with its number.
    drawn = f'<rect class="a" width="{width}" height="{height}"/>'
    for a in ticks(left, right):
        x = across(a)
        drawn += f'<path class="g" d="M{x} 0v{height}"/>'
        drawn += text(x, height + 15, f"{a:g}", "middle")
    for b in ticks(lowest, highest):
        y = up(b)
        drawn += f'<path class="g" d="M0 {y}h{width}"/>'
        drawn += text(-5, y + 4, f"{b:g}", "end")
    # The names of the axes. The upright one's is turned to be read upwards.
    drawn += text(width / 2, height + 32, x_name, "middle")
    turned = text(0, 0, y_name, "middle")
    drawn += at(-35, height / 2, f'<g transform="rotate(-90)">{turned}</g>')
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
    drawn = f'<path fill="none" stroke-width="1.5" {dash} d="M{corners}"/>'
    if style != "line":
        for x, y in places:
            drawn += f'<circle cx="{x}" cy="{y}" r="3.5" fill="{fill}"/>'
    return f'<g stroke="{colour}"><title>{name}</title>{drawn}</g>'


def epochs_picture(series: list[tuple]) -> str:
    """F1 against epochs of training: lines of models with dots, and a line alone for each bar."""
    colours = {name: colour for name, colour, _, style in series if style == "dots"}
    title = ("F1 on SQuAD v1.1 against epochs of training in all. "
             "Bars: 95 % interval of F1 − control")
    drawn = legend(colours) + at(55, 50, chart("epochs", "F1", series, 560, 235))
    return svg(640, 330, title, drawn)


def curves_picture(groups: list[tuple]) -> str:
    """F1 lost against speed-up and against density, in two charts.

    groups: (name, colour, points, style), with points (speed-up, density in %, F1 lost).
    """
    title = ("F1 lost by pruning. Dots: MiniLM, 4,000 questions (dense: 8,000; red: 10,000). "
             "Hollow: the authors’ BERT-base")
    drawn = legend({name: colour for name, colour, _, style in groups if style == "dots"})
    names = ("times the speed of the dense model", "weights kept, %")
    for column, x_name in enumerate(names):
        series = []
        for name, colour, points, style in groups:
            pairs = sorted((point[column], point[2]) for point in points)
            series.append((name, colour, pairs, style))
        one = chart(x_name, "F1 minus that of its dense model", series, height=265)
        drawn += at(55 + 420 * column, 50, one)
    return svg(850, 360, title, drawn)


def run_picture(log: list[dict], title: str) -> str:
    """τ, density and loss over the steps of a fine-pruning, from the lines of its log."""
    def series(name: str, colour: str) -> tuple:
        points = []
        for line in log:
            values = line | line["density"]
            points.append((line["step"], values[name]))
        return name, colour, points, "line"

    tau = [series("threshold", BLUE)]
    density = [series("attention", BLUE), series("ffn", GREEN)]
    losses = [series("ce", GREEN), series("kd", RED), series("loss", BLUE)]
    drawn = text(55, 42, "τ, the threshold")
    drawn += at(55, 50, chart("step", "", tau, from_zero=True))
    drawn += text(475, 42, "density: attention (blue), FFN (green)")
    drawn += at(475, 50, chart("step", "", density, from_zero=True))
    drawn += text(55, 272, "loss (blue) = 0.1 · cross entropy (green) + 0.9 · distillation (red) "
                           "+ λ · τ/0.1 · penalty")
    drawn += at(55, 280, chart("step", "", losses, width=770, from_zero=True))
    return svg(850, 490, title, drawn)


# ------------------------------------------------------------------------------------------ masks


def matrix(rows: list[str], width: float, height: float) -> str:
    """A mask, kept blocks over a pruned background. rows: strings of 0 and 1, where 1 is kept."""
    path = ""
    for i, row in enumerate(rows):
        # Kept blocks side by side are one thick line. A block is a unit wide and a unit high.
        for kept in re.finditer("1+", row):
            length = len(kept[0])
            path += f"M{kept.start()} {i}h{length}"
    across = width / len(rows[0])
    down = height / len(rows)
    place = f"scale({across:.5g} {down:.5g}) translate(0 .5)"
    return (f'<rect class="p" width="{width}" height="{height}"/>'
            f'<path class="k" transform="{place}" d="{path}"/>')


def attention(layer: dict, places: dict, size: float, heads: int) -> str:
    """Query, key, value and out of a layer, each where `places` says, and lines between heads."""
    drawn = ""
    for name, (x, y) in places.items():
        lines = ""
        for head in range(1, heads):
            edge = round(head * size / heads, 2)
            # Heads are rows of query, key and value, and columns of out.
            if name == "out":
                lines += f"M{edge} 0v{size}"
            else:
                lines += f"M0 {edge}h{size}"
        lines = f'<path class="h" stroke-width="0.6" d="{lines}"/>'
        drawn += at(x, y, matrix(layer[name], size, size) + lines)
    return drawn


def masks_picture(layers: dict[str, dict], heads: int, title: str) -> str:
    """Every weight matrix of every layer, kept and pruned, with the heads, as the paper's figure 1.

    layers: masks.json. heads: those of a layer of the dense model.
    """
    places = {"query": (64, 0), "key": (174, 0), "value": (284, 0), "out": (394, 0)}
    drawn = text(504, 40, "fc1 (transposed)")
    drawn += text(674, 40, "fc2")
    for name, (x, _) in places.items():
        drawn += text(x, 40, name)
    y = 50
    for i, layer in layers.items():
        row = text(10, 48, f"layer {i}")
        row += attention(layer, places, 96, heads)
        # Inner dimensions are rows of fc1, one block each, and columns of fc2.
        fc1 = "".join(layer["fc1"])
        row += at(504, 0, matrix([fc1], 156, 96))
        row += at(674, 0, matrix(layer["fc2"], 156, 96))
        drawn += at(0, y, row)
        y += 108
    return svg(850, y + 10, title, drawn)


def moments_picture(moments: list[dict], heads: int, title: str) -> str:
    """The masks of a run at some moments, side by side.

    Inner dimensions are too many to be seen one by one: a bar is the share that is kept.
    """
    title += ". In each layer query and key over value and out; bars: inner dimensions kept"
    places = {"query": (0, 0), "key": (50, 0), "value": (0, 50), "out": (50, 50)}
    drawn = ""
    x = 10
    for moment in moments:
        column = ""
        y = 30
        for layer in moment["masks"].values():
            fc1 = "".join(layer["fc1"])
            kept = 98 * fc1.count("1") / len(fc1)
            bar = '<rect class="p" width="16" height="98"/>'
            bar += f'<path class="k" stroke-width="16" d="M8 98v{-kept:.1f}"/>'
            column += at(0, y, attention(layer, places, 48, heads) + at(102, 0, bar))
            y += 104
        density = 100 * moment["density"]["all"]
        heads_left = sum(moment["heads"])
        column += text(0, y + 10, f"step {moment['step']:,}")
        column += text(0, y + 25, f"τ {moment['threshold']:.3f}")
        column += text(0, y + 40, f"{density:.0f} % kept")
        column += text(0, y + 55, f"{heads_left} heads")
        drawn += at(x, 0, column)
        x += 140
    return svg(x, y + 65, title, drawn)
