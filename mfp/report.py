"""`mfp report RUN`: one self-contained HTML page about a run, with charts as inline SVG; no scripts, no network."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mfp.atomic import write_atomically
from mfp.errors import MfpError

# Okabe and Ito's palette, which colour-blind people can tell apart
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
WIDTH, HEIGHT = 520, 260
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 12, 40

Points = Sequence[tuple[float, float]]

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 1120px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; } th, td { padding: .25em .8em; text-align: right; border-bottom: 1px solid #eee; }
th:first-child, td:first-child { text-align: left; } .charts { display: flex; flex-wrap: wrap; gap: 16px; }
figure { margin: 0; } figcaption { font-weight: 600; } svg { font: 11px system-ui, sans-serif; }
.legend span { margin-right: 1em; white-space: nowrap; } .legend i { display: inline-block; width: 10px; height: 10px; }
"""


def write_report(run: str | Path, output: str | Path | None = None) -> Path:
    """Writes the page about a run; one that is still going on gets what there is so far.

    >>> write_report("runs/resnet20-digits")
    PosixPath('runs/resnet20-digits/report.html')

    Args:
        run: the run directory of `mfp prune`.
        output: the file to write; report.html in the run directory if not given.
    Raises:
        MfpError: no run there, or its files cannot be read.
    """
    run = Path(run)
    output = Path(output) if output else run / "report.html"
    page = _page(_Run(run))
    write_atomically(output, page.encode())
    return output


class _Run:
    """What the files of a run directory say."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = self._json("config.json")
        if self.config is None:
            raise MfpError(f"{directory} is not the directory of a run: it has no config.json")
        self.result = self._json("result.json")
        self.rates = self._json("rates.json")
        self.dense, self.pruned = (self._epochs(kind) for kind in ("dense", "pruned"))
        if not self.pruned and not self.dense:
            raise MfpError(f"{directory} holds no finished epoch yet: wait for the first one")
        self.points = [row for row in self.pruned if row.get("criterion")]
        self.layers, self.scores = self._scores()

    def _json(self, name: str) -> Any:
        try:
            return json.loads((self.directory / name).read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise MfpError(f"cannot read {self.directory / name}: {error}") from error

    def _epochs(self, kind: str) -> list[dict[str, str]]:
        path = self.directory / kind / "epochs.csv"
        if not path.exists():
            return []
        with path.open(newline="") as file:
            return list(csv.DictReader(file))

    def _scores(self) -> tuple[dict[str, list[int]], dict[str, list[float]]]:
        path = self.directory / "pruned" / "scores.safetensors"
        if not path.exists():
            return {}, {}
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                layers = json.loads(file.metadata()["layers"])
                return layers, {name: file.get_tensor(name).tolist() for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise MfpError(f"cannot read {path}: {error}") from error

    def column(self, kind: str, name: str) -> list[tuple[float, float]]:
        rows = self.dense if kind == "dense" else self.pruned
        return [(int(row["epoch"]) + 1, float(row[name])) for row in rows if row.get(name)]


def _page(run: _Run) -> str:
    name = f"{run.config['arch']} on {run.config['data']}"
    sections = [
        _summary(run),
        _training(run),
        _choices(run),
        _rates(run),
        _distributions(run),
        _kept(run),
        _settings(run),
    ]
    pruned = f"{100 * run.config['rate']:g} %" if run.rates is None else "rates that suit the layers"
    return (
        f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>mfp: {escape(name)}</title>"
        f"<link rel='icon' href='data:,'><style>{STYLE}</style></head><body><h1>{escape(name)}: "
        f"pruned by {pruned}</h1>\n" + "\n".join(filter(None, sections)) + "\n</body></html>\n"
    )


# ---- sections


def _summary(run: _Run) -> str:
    if run.result is None:
        return "<p>The run is not finished: this page shows what there is so far.</p>"
    kinds = ("dense", "masked", "compact")
    rows = [
        ("test accuracy, top-1 %", "top1", "{:.2f}"), ("test accuracy, top-5 %", "top5", "{:.2f}"),
        ("test loss", "loss", "{:.4f}"),
        ("FLOPs (multiply-adds)", "flops", "{:,}"), ("parameters", "parameters", "{:,}"),
        ("ms per image", "milliseconds", "{:.3f}"),
    ]  # fmt: skip
    table = [[title, *(form.format(run.result[k][key]) if key in run.result[k] else "-" for k in kinds)]
             for title, key, form in rows]  # fmt: skip
    bars = [(title, run.result["compact"][key] / run.result["dense"][key])
            for title, key in (("FLOPs", "flops"), ("parameters", "parameters"), ("time", "milliseconds"))]  # fmt: skip
    text = (
        f"<p>Largest difference between masked and compact outputs: {run.result['difference']:.1e} of the largest "
        f"output. Times are per image in batches of {run.result['timing_batch']}, BatchNorm folded in both.</p>"
    )
    return "<h2>What was gained</h2>" + _table(["", *kinds], table) + text + _charts([
        _figure("left after pruning, % of the dense network", _bars([(t, 100 * v, 100) for t, v in bars], "%")),
    ])  # fmt: skip


def _training(run: _Run) -> str:
    def both(column: str) -> dict[str, Points]:
        return {kind: run.column(kind, column) for kind in ("dense", "pruned")}

    images = "validation images" if run.config.get("validation") else "test images"
    return "<h2>Training</h2>" + _charts([
        _figure(f"accuracy on the {images}, top-1 %", _lines(both("top1")), ("dense", "pruned")),
        _figure(f"loss on the {images}", _lines(both("loss")), ("dense", "pruned")),
        _figure("loss in training", _lines(both("train_loss")), ("dense", "pruned")),
        _figure("learning rate", _lines({"rate": run.column("pruned", "lr") or run.column("dense", "lr")})),
    ])  # fmt: skip


def _choices(run: _Run) -> str:
    if not run.points:
        return ""
    criteria = run.config["criteria"]
    distances: dict[str, list[tuple[float, float]]] = {name: [] for name in criteria}
    won = []
    for row in run.points:
        epoch = int(row["epoch"]) + 1
        for name in criteria:
            if row.get(f"neighbour_{name}") and row.get("attribute_before"):
                distances[name].append((epoch, abs(float(row[f"neighbour_{name}"]) - float(row["attribute_before"]))))
        others = sorted(points[-1][1] for name, points in distances.items() if points and name != row["criterion"])
        own = distances.get(row["criterion"])
        margin = f"{others[0] - own[-1][1]:.3g}" if own and others else "-"
        values = [f"{float(row[key]):.5g}" if row.get(key) else "-" for key in ("attribute_before", "attribute_after")]
        won.append([str(epoch), row["criterion"], *values, margin, f"{float(row['churn']):.2f}"])
    attribute = escape(run.points[0]["attribute"])
    header = [
        "epoch",
        "criterion chosen",
        f"{attribute} before",
        f"{attribute} after",
        "closer than the next by",
        "churn",
    ]
    marks = [(int(row["epoch"]) + 1, row["criterion"]) for row in run.points]
    churn = {"churn": run.column("pruned", "churn")}
    return "<h2>Which criterion was chosen, and by how much</h2>" + _charts([
        _figure(f"distance of each neighbour's {attribute}; ringed: chosen", _lines(distances, marks), criteria),
        _figure("churn: share of the pruned filters that were kept before", _lines(churn)),
    ]) + _table(header, won)  # fmt: skip


def _rates(run: _Run) -> str:
    if run.rates is None:
        return ""
    rates, whole = run.rates["layer_rates"], run.rates["sensitivities"]["loss"]
    curves = {
        layer: [(0.0, whole), *((float(rate), loss) for rate, loss in losses.items() if math.isfinite(loss))]
        for layer, losses in run.rates["sensitivities"]["losses"].items()
    }
    right, top = (max(values) for values in zip(*(point for curve in curves.values() for point in curve), strict=True))
    left = f"{run.rates['reached'] / run.rates['dense']:.1%} of the {escape(run.rates['what'])} are left"
    text = (
        "<p>Calibrated loss when that layer alone is pruned, against the rate, all on one scale; the line marks the "
        f"rate that was chosen. With these rates {left}.</p>"
    )
    figures = [
        _figure(f"{layer}: {rates[layer]:g}", _curve(curve, rates[layer], right, top))
        for layer, curve in curves.items()
    ]
    return "<h2>How sensitive the layers are, and their rates</h2>" + text + _charts(figures)


def _distributions(run: _Run) -> str:
    shown = [name for name in ("l2_norm", "l2_distance") if name in run.scores] or list(run.scores)[:2]
    if not shown:
        return ""
    figures = []
    for layer, (offset, count) in run.layers.items():
        for name in shown:
            values = sorted(run.scores[name][offset : offset + count])
            rate = run.config["rate"] if run.rates is None else run.rates["layer_rates"][layer]
            pruned = count - run.result["kept"][layer][0] if run.result else int(count * rate)
            colour = COLOURS[list(run.scores).index(name) % len(COLOURS)]
            figures.append(_figure(f"{layer}: {name}", _histogram(values, pruned, colour)))
    text = "<p>Scores of all filters right before the last pruning; the criterion prunes those left of the line.</p>"
    return f"<h2>Scores per layer ({', '.join(shown)})</h2>{text}" + _charts(figures)


def _kept(run: _Run) -> str:
    if run.result is None:
        return ""
    bars = [(layer, kept, total) for layer, (kept, total) in run.result["kept"].items()]
    return "<h2>Filters kept per layer</h2>" + _charts([_figure("kept, of all", _bars(bars, "", show_total=True))])


def _settings(run: _Run) -> str:
    rows = [[name, json.dumps(value)] for name, value in run.config.items()]
    return (
        "<h2>Settings</h2><details><summary>all settings of the run</summary>" + _table(["", ""], rows) + "</details>"
    )


# ---- HTML and SVG


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _charts(figures: Iterable[str]) -> str:
    return f"<div class='charts'>{''.join(figures)}</div>"


def _figure(title: str, chart: str, legend: Sequence[str] = ()) -> str:
    entries = "".join(
        f"<span><i style='background:{COLOURS[i % len(COLOURS)]}'></i> {escape(name)}</span>"
        for i, name in enumerate(legend)
    )
    return f"<figure><figcaption>{escape(title)}</figcaption><div class='legend'>{entries}</div>{chart}</figure>"


def _lines(series: Mapping[str, Points], marks: Sequence[tuple[float, str]] = ()) -> str:
    """Lines over epochs; a mark is a ring around the point of a series at an epoch."""
    points = [point for line in series.values() for point in line if math.isfinite(point[1])]
    if not points:
        return "<p>no data</p>"
    xs, ys = zip(*points, strict=True)
    axes = _Axes(min(xs), max(xs), min(0.0, *ys) if min(ys) < 0.3 * max(ys) else min(ys), max(ys))
    parts = []
    for number, (name, line) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        finite = [(axes.x(x), axes.y(y)) for x, y in line if math.isfinite(y)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in finite)
        parts.append(f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='1.8'/>")
        parts += [f"<circle cx='{x:.1f}' cy='{y:.1f}' r='2.2' fill='{colour}'/>" for x, y in finite]
        ring = f"r='6' fill='none' stroke='{colour}' stroke-width='2'"
        parts += [f"<circle cx='{axes.x(x):.1f}' cy='{axes.y(y):.1f}' {ring}/>" for x, y in line if (x, name) in marks]
    return axes.svg("".join(parts), "epoch")


def _curve(points: Points, mark: float, right: float, top: float) -> str:
    """A small line with a dashed one upright."""
    axes = _Axes(0.0, right, min(y for _, y in points), top, 240, 150)
    path = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in points)
    line = f"<polyline points='{path}' fill='none' stroke='{COLOURS[0]}' stroke-width='1.8'/>"
    return axes.svg(line + _upright(axes, mark), "")


def _upright(axes: _Axes, value: float) -> str:
    place = f"x1='{axes.x(value):.1f}' x2='{axes.x(value):.1f}' y1='{TOP}' y2='{axes.height - BOTTOM}'"
    return f"<line {place} stroke='#000' stroke-dasharray='4 3'/>"


def _histogram(values: Sequence[float], pruned: int, colour: str, bins: int = 24) -> str:
    low, high = values[0], values[-1]
    width = (high - low) / bins or 1.0
    counts = [0] * bins
    for value in values:
        counts[min(int((value - low) / width), bins - 1)] += 1
    axes = _Axes(low, low + width * bins, 0, max(counts), 240, 150)
    step = axes.x(low + width) - axes.x(low)
    parts = [
        f"<rect x='{axes.x(low + i * width):.1f}' y='{axes.y(count):.1f}' width='{max(step - 1, 0.5):.1f}' "
        f"height='{axes.y(0) - axes.y(count):.1f}' fill='{colour}'/>"
        for i, count in enumerate(counts)
        if count
    ]
    if 0 < pruned < len(values):
        parts.append(_upright(axes, (values[pruned - 1] + values[pruned]) / 2))
    return axes.svg("".join(parts), "")


def _bars(bars: Sequence[tuple[str, float, float]], unit: str, show_total: bool = False) -> str:
    """Horizontal bars: (name, value, whole)."""
    left, row, full = 210, 20, 480
    largest = max(total for _, _, total in bars)
    parts = []
    for number, (name, value, total) in enumerate(bars):
        y = 6 + number * row
        text = f"{value:g} of {total:g}" if show_total else f"{value:.1f} {unit}"
        parts.append(
            f"<text x='{left - 8}' y='{y + 11}' text-anchor='end'>{escape(name)}</text>"
            f"<rect x='{left}' y='{y}' width='{full * total / largest:.1f}' height='14' fill='#e5e5e5'/>"
            f"<rect x='{left}' y='{y}' width='{full * min(value / largest, 1.2):.1f}' height='14' fill='{COLOURS[0]}'/>"
            f"<text x='{left + full * max(value, total) / largest + 8:.1f}' y='{y + 11}'>{text}</text>"
        )
    width, height = left + full + 110, 12 + row * len(bars)
    return f"<svg width='{width}' height='{height}' viewBox='0 0 {width} {height}' role='img'>{''.join(parts)}</svg>"


class _Axes:
    """Two linear axes with round ticks, around whatever is drawn between them."""

    def __init__(
        self, x_low: float, x_high: float, y_low: float, y_high: float, width: int = WIDTH, height: int = HEIGHT
    ) -> None:
        self.width, self.height = width, height
        self.x_low, self.x_high = x_low, x_high if x_high > x_low else x_low + 1
        self.y_low, self.y_high = y_low, y_high if y_high > y_low else y_low + 1

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return self.height - BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (self.height - TOP - BOTTOM)

    def svg(self, content: str, x_label: str) -> str:
        bottom, right = self.height - BOTTOM, self.width - RIGHT
        parts = []
        for tick in _ticks(self.y_low, self.y_high, self.height // 45):
            y = self.y(tick)
            parts.append(f"<line x1='{LEFT}' x2='{right}' y1='{y:.1f}' y2='{y:.1f}' stroke='#e8e8e8'/>")
            parts.append(f"<text x='{LEFT - 6}' y='{y + 4:.1f}' text-anchor='end'>{tick:g}</text>")
        for tick in _ticks(self.x_low, self.x_high, self.width // 70, whole=x_label == "epoch"):
            parts.append(f"<text x='{self.x(tick):.1f}' y='{bottom + 16}' text-anchor='middle'>{tick:g}</text>")
        parts.append(f"<line x1='{LEFT}' x2='{right}' y1='{bottom}' y2='{bottom}' stroke='#888'/>")
        parts.append(f"<text x='{(LEFT + right) / 2}' y='{self.height - 6}' text-anchor='middle'>{x_label}</text>")
        size = f"width='{self.width}' height='{self.height}' viewBox='0 0 {self.width} {self.height}'"
        return f"<svg {size} role='img'>{''.join(parts)}{content}</svg>"


def _ticks(low: float, high: float, wanted: int, whole: bool = False) -> list[float]:
    """About `wanted` round numbers from low to high."""
    rough = (high - low) / max(wanted, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    step = max(step, 1.0) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]
