"""Charts for the page of `mfp report`: drawn by matplotlib, as SVG inside HTML, for a light or a dark page."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's palette, which colour-blind people can tell apart; INK becomes the colour of the page's text
INK = "#010203"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", INK, "#999999")
SETTINGS = {
    "svg.fonttype": "none", "svg.hashsalt": "mfp", "font.size": 9, "axes.linewidth": 0.6,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "grid.color": INK, "grid.alpha": 0.12, "lines.linewidth": 1.5, "lines.markersize": 3,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}  # fmt: skip
ROW = 0.22  # inches for a layer, where each has a row

Points = Sequence[tuple[float, float]]
Layout = Literal["constrained"] | None


def colour_of(name: str, names: Iterable[str]) -> str:
    """The colour of a series among the others; variants of one criterion have the same."""
    bases = list(dict.fromkeys(_base(other) for other in names))
    return COLOURS[bases.index(_base(name)) % len(COLOURS)]


def swatch(name: str, names: Iterable[str]) -> str:
    """For a legend in HTML; hollow where the line is dashed."""
    colour = colour_of(name, names).replace(INK, "currentColor")
    return f"<i style='border-color:{colour};background:{colour if name == _base(name) else 'none'}'></i>"


def lines(series: Mapping[str, Points], ringed: Sequence[tuple[float, str]] = (), label: str = "epoch") -> str:
    """Lines over epochs; a pair (epoch, name) puts a ring around that point."""

    def draw(axes: Axes) -> None:
        for name, line in series.items():
            points = [(x, y) for x, y in line if math.isfinite(y)]
            colour, style = colour_of(name, series), "-" if name == _base(name) else "--"
            axes.plot(*zip(*points, strict=True), marker="o", color=colour, linestyle=style) if points else None
            rings = [(x, y) for x, y in points if (x, name) in ringed]
            for x, y in rings:
                axes.plot([x], [y], "o", markersize=9, markerfacecolor="none", color=colour, gid=f"chosen-{x:g}")
        axes.grid(True)
        axes.set_xlabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    if not any(math.isfinite(y) for line in series.values() for _, y in line):
        return "<p>no data</p>"
    return _svg(draw, 5.2, 2.5, f"{', '.join(series)} over {label}s")


def bars(values: Mapping[str, tuple[float, float, str]]) -> str:
    """Horizontal bars, each before its whole: name -> (value, whole, text at its end)."""

    def draw(axes: Axes) -> None:
        names, rows = list(values), range(len(values))
        parts, wholes, texts = zip(*values.values(), strict=True)
        axes.barh(rows, wholes, color=INK, alpha=0.12)
        axes.bar_label(axes.barh(rows, parts, color=COLOURS[0]), [""] * len(names))
        for row, text, end in zip(rows, texts, np.maximum(parts, wholes), strict=True):
            axes.annotate(text, (end, row), (4, 0), textcoords="offset points", va="center")
        axes.set_yticks(rows, names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(0, 1.15 * max(*parts, *wholes))

    return _svg(draw, 7.0, 0.5 + ROW * len(values), f"bars of {len(values)}")


def histogram(values: Sequence[float], cut: float | None, colour: str) -> str:
    """How often each score occurs; a dashed line at the cut."""

    def draw(axes: Axes) -> None:
        axes.hist(values, bins=24, histtype="stepfilled", color=colour)
        axes.set_position((0.13, 0.15, 0.8, 0.8))
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.axvline(cut, color=INK, linestyle="--", linewidth=1) if cut is not None else None

    return _svg(draw, 2.5, 1.5, f"histogram of {len(values)} scores", layout=None)


def sensitivities(added: Mapping[str, Mapping[float, float]], chosen: Mapping[str, float]) -> str:
    """A row a layer: how much the loss rises with the rate at which it alone is pruned, and the rate that it got."""
    rates = sorted({rate for losses in added.values() for rate in losses})
    rises = np.array([[losses.get(rate, math.nan) for rate in rates] for losses in added.values()])
    edges = [0.0, *((a + b) / 2 for a, b in itertools.pairwise(rates)), rates[-1] + 0.075]

    def draw(axes: Axes) -> None:
        finite = rises[np.isfinite(rises)]
        mesh = axes.pcolormesh(
            edges, np.arange(len(added) + 1) - 0.5, rises, cmap="viridis", vmin=0.0, vmax=max([0.01, *finite])
        )
        axes.plot(
            [chosen[layer] for layer in added], range(len(added)), "D", color="w", markeredgecolor=INK, markersize=6
        )
        axes.set_yticks(range(len(added)), list(added))
        axes.set_ylim(len(added) - 0.5, -0.5)
        axes.set_xticks([0.0, *rates])
        axes.set_xlabel("rate")
        axes.figure.colorbar(mesh, ax=axes, label="added loss")

    return _svg(draw, 7.0, 0.9 + ROW * len(added), f"sensitivities of {len(added)} layers")


def _base(name: str) -> str:
    return name.partition(" by ")[0]


def _svg(draw: Callable[[Axes], None], width: float, height: float, label: str, layout: Layout = "constrained") -> str:
    """The drawing without what only a file of its own needs: the page gives fonts, and colour to ink and text."""
    with matplotlib.rc_context(SETTINGS):
        figure = Figure((width, height), layout=layout)
        draw(figure.subplots())
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>| xmlns(:xlink)?=\"[^\"]*\"", "", text, flags=re.DOTALL)
    text = re.sub(r" id=\"\w*?[a-z]_\d+\"| id=\"matplotlib[^\"]*\"", "", text)  # each chart has a figure_1
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = text.replace("xlink:href", "href").replace(INK, "currentColor")
    return text[text.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
