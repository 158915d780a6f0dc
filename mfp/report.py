"""`mfp report RUN`: one self-contained HTML page about a run, with charts as inline SVG; no scripts, no network."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mfp import charts
from mfp.atomic import write_atomically
from mfp.errors import MfpError

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 1120px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; overflow-wrap: anywhere; } h2 { font-size: 1.15em; margin-top: 2em; }
h2, th, td { border-bottom: 1px solid #8884; } .table { overflow-x: auto; }
table { border-collapse: collapse; } th, td { padding: .25em .8em; text-align: right; }
th:first-child, td:first-child { text-align: left; } .charts { display: flex; flex-wrap: wrap; gap: 16px; }
figure { margin: 0; max-width: 100%; } figcaption { font-weight: 600; } svg { max-width: 100%; height: auto; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
.legend { max-width: 510px; } .legend span { margin-right: 1em; white-space: nowrap; }
.legend i { display: inline-block; width: 6px; height: 6px; border: 2px solid; }
@media (prefers-color-scheme: dark) { body { color: #e4e4e4; background: #16181c; } }
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

    @property
    def marks(self) -> list[tuple[float, str]]:
        """(epoch, candidate chosen) of every pruning point."""
        return [(int(row["epoch"]) + 1, row["criterion"]) for row in self.points]

    def candidates(self, prefix: str) -> list[str]:
        """Those of which the table of epochs has a column."""
        names = self.points[0] if self.points else ()
        return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]

    def column(self, kind: str, name: str) -> list[tuple[float, float]]:
        rows = self.dense if kind == "dense" else self.pruned
        return [(int(row["epoch"]) + 1, float(row[name])) for row in rows if row.get(name)]


def _page(run: _Run) -> str:
    name = f"{run.config['arch']} on {run.config['data']}"
    sections = [
        _summary(run),
        _training(run),
        _choices(run),
        _hindsight(run),
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
    left = {title: 100 * run.result["compact"][key] / run.result["dense"][key]
            for title, key in (("FLOPs", "flops"), ("parameters", "parameters"), ("time", "milliseconds"))}  # fmt: skip
    text = (
        f"<p>Largest difference between masked and compact outputs: {run.result['difference']:.1e} of the largest "
        f"output. Times are per image in batches of {run.result['timing_batch']}, BatchNorm folded in both.</p>"
    )
    chart = charts.bars({title: (share, 100, f"{share:.1f} %") for title, share in left.items()})
    return "<h2>What was gained</h2>" + _table(["", *kinds], table) + text + _charts([
        _figure("left after pruning, % of the dense network", chart),
    ])  # fmt: skip


def _training(run: _Run) -> str:
    def both(column: str) -> dict[str, charts.Points]:
        return {kind: run.column(kind, column) for kind in ("dense", "pruned")}

    images = "validation images" if run.config.get("validation") else "test images"
    return "<h2>Training</h2>" + _charts([
        _figure(f"accuracy on the {images}, top-1 %", charts.lines(both("top1")), ("dense", "pruned")),
        _figure(f"loss on the {images}", charts.lines(both("loss")), ("dense", "pruned")),
        _figure("loss in training", charts.lines(both("train_loss")), ("dense", "pruned")),
        _figure("learning rate", charts.lines({"rate": run.column("pruned", "lr") or run.column("dense", "lr")})),
    ])  # fmt: skip


def _choices(run: _Run) -> str:
    if not run.points:
        return ""
    distances: dict[str, list[tuple[float, float]]] = {name: [] for name in run.candidates("neighbour_")}
    won = []
    for row in run.points:
        epoch = int(row["epoch"]) + 1
        for name, points in distances.items():
            if row.get(f"neighbour_{name}") and row.get("attribute_before"):
                points.append((epoch, abs(float(row[f"neighbour_{name}"]) - float(row["attribute_before"]))))
        others = sorted(points[-1][1] for name, points in distances.items() if points and name != row["criterion"])
        own = distances.get(row["criterion"])
        margin = f"{others[0] - own[-1][1]:.3g}" if own and others else "-"
        values = [f"{float(row[key]):.5g}" if row.get(key) else "-" for key in ("attribute_before", "attribute_after")]
        won.append([str(epoch), row["criterion"], *values, margin, f"{float(row['churn']):.2f}"])
    attribute = run.points[0]["attribute"]
    header = ["epoch", "criterion chosen", f"{attribute} before", f"{attribute} after", "closer than the next by",
              "churn"]  # fmt: skip
    title = f"distance of each neighbour's {attribute}; ringed: chosen"
    return "<h2>Which criterion was chosen, and by how much</h2>" + _charts([
        _figure(title, charts.lines(distances, run.marks), list(distances)),
        _figure("churn: share of the pruned filters that were kept before",
                charts.lines({"churn": run.column("pruned", "churn")})),
    ]) + _table(header, won)  # fmt: skip


def _hindsight(run: _Run) -> str:
    names = run.candidates("hindsight_")
    if not names:
        return ""
    accuracies = {name: run.column("pruned", f"hindsight_{name}") for name in names}
    columns = {
        "behind the best": run.column("pruned", "regret"),
        "ahead of the mean": run.column("pruned", "ahead_of_mean"),
    }
    mean = {name: sum(value for _, value in points) / len(points) for name, points in columns.items()}
    text = (
        "<p>Accuracy of each candidate's network on held-out images, which had no say in the choice. Over "
        f"{len(run.points)} pruning points the choice was {mean['behind the best']:.2f} points behind the best "
        f"candidate (its regret) and {mean['ahead of the mean']:.2f} ahead of the mean of all.</p>"
    )
    last = run.points[-1]
    rows = [
        [name + (" (chosen)" if name == last["criterion"] else ""), f"{float(last[f'neighbour_{name}']):.5g}",
         f"{float(last[f'hindsight_{name}']):.2f}"] for name in names
    ]  # fmt: skip
    header = [f"last pruning point, epoch {int(last['epoch']) + 1}", last["attribute"], "top-1 %"]
    return "<h2>What each criterion alone would have given: regret</h2>" + text + _charts([
        _figure("accuracy right after pruning, top-1 %; ringed: chosen", charts.lines(accuracies, run.marks), names),
        _figure("the choice, points of accuracy", charts.lines(columns), list(columns)),
    ]) + _table(header, rows)  # fmt: skip


def _rates(run: _Run) -> str:
    if run.rates is None:
        return ""
    rates, whole = run.rates["layer_rates"], run.rates["sensitivities"]["loss"]
    added = {
        layer: {float(rate): loss - whole if math.isfinite(loss) else math.nan for rate, loss in losses.items()}
        for layer, losses in run.rates["sensitivities"]["losses"].items()
    }
    left = f"{run.rates['reached'] / run.rates['dense']:.1%} of the {escape(run.rates['what'])} are left"
    text = (
        "<p>How much the calibrated loss rises when a layer alone is pruned at a rate; diamonds are the rates that "
        f"were chosen. With these rates {left}.</p>"
    )
    figure = _figure("added loss by layer and rate", charts.sensitivities(added, rates))
    table = _table(["layer", "rate"], [[layer, f"{rates[layer]:g}"] for layer in added])
    details = f"<details><summary>the rates as numbers</summary>{table}</details>"
    return "<h2>How sensitive the layers are, and their rates</h2>" + text + _charts([figure]) + details


def _distributions(run: _Run) -> str:
    if not run.scores:
        return ""
    chosen = run.points[-1]["criterion"].partition(" by ")[0] if run.points else ""
    name = chosen if chosen in run.scores else next(iter(run.scores))
    colour, figures = charts.colour_of(name, run.scores), []
    for layer, (offset, count) in run.layers.items():
        values = sorted(run.scores[name][offset : offset + count])
        rate = run.config["rate"] if run.rates is None else run.rates["layer_rates"][layer]
        pruned = count - run.result["kept"][layer][0] if run.result else int(count * rate)
        cut = (values[pruned - 1] + values[pruned]) / 2 if 0 < pruned < count else None
        figures.append(_figure(layer, charts.histogram(values, cut, colour)))
    text = "<p>Scores of all filters right before the last pruning; those left of the line go.</p>"
    return f"<h2>Scores per layer: {escape(name)}</h2>{text}" + _charts(figures)


def _kept(run: _Run) -> str:
    if run.result is None:
        return ""
    chart = charts.bars(
        {layer: (kept, total, f"{kept} of {total}") for layer, (kept, total) in run.result["kept"].items()}
    )
    return "<h2>Filters kept per layer</h2>" + _charts([_figure("kept, of all", chart)])


def _settings(run: _Run) -> str:
    rows = [[name, json.dumps(value)] for name, value in run.config.items()]
    return (
        "<h2>Settings</h2><details><summary>all settings of the run</summary>" + _table(["", ""], rows) + "</details>"
    )


# ---- HTML


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class='table'><table><tr>{head}</tr>{body}</table></div>"


def _charts(figures: Iterable[str]) -> str:
    return f"<div class='charts'>{''.join(figures)}</div>"


def _figure(title: str, chart: str, legend: Sequence[str] = ()) -> str:
    entries = "".join(f"<span>{charts.swatch(name, legend)} {escape(name)}</span>" for name in legend)
    return f"<figure><figcaption>{escape(title)}</figcaption><div class='legend'>{entries}</div>{chart}</figure>"
