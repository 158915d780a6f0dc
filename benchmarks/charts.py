"""The bar charts of README and docs, as SVG; benchmarks/figures.py draws them from the result files.

A chart carries the numbers that it shows in its metadata, so that whether it is up to date can be seen without drawing.
"""

import hashlib
import html
import json
from pathlib import Path

from mfp.bench import results

ROOT = Path(__file__).parent.parent
OURS, THEIRS, DENSE = "#1f77b4", "#b0b0b0", "#d9d9d9"
SHORT = {"torch.cdist loop": "torch.cdist", "torch.ao FPGM pruner": "torch.ao", "Torch-Pruning FPGM importance":
         "Torch-Pruning", "scipy cdist (the authors')": "scipy, as the\nFPGM authors do"}  # fmt: skip
ENGINES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "mfp": "mfp"}


def rows_of(pattern: str, **wanted: object) -> list[dict]:
    """The rows of these result files that have these values."""
    files = sorted((ROOT / "benchmarks/results").glob(pattern))
    found = [row for file in files for row in results.read(file)["rows"] if wanted.items() <= row.items()]
    if not found:
        raise SystemExit(f"a chart shows {wanted}, and no row of benchmarks/results/{pattern} has that")
    return found


def scoring_values() -> list[list]:
    """[who, milliseconds] of scoring all layers of ResNet-50 by the geometric median."""
    found = rows_of("scoring.json", arch="resnet50", job="l2_distance")
    return [[SHORT.get(row["who"], row["who"]), round(1e3 * row["seconds"], 3)] for row in found]


def serving_values() -> list[list]:
    """[engine, dense and compact milliseconds, FLOPs kept] of ResNet-50, batch 8, coupled."""
    found = rows_of("engines-resnet50.json", arch="resnet50", batch=8, residual="coupled")
    return [
        [ENGINES.get(row["engine"], row["engine"]), round(row["dense_ms"], 2), round(row["compact_ms"], 2),
         round(row["flops_kept"], 3)]
        for row in found
    ]  # fmt: skip


def draw_overview(values: dict) -> object:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.9), layout="constrained")
    who, times = zip(*values["scoring"], strict=True)
    bars = left.barh(who, times, color=[OURS, *[THEIRS] * (len(who) - 1)])
    left.bar_label(bars, [f"{time:,.0f} ms" for time in times], padding=3)
    left.set(
        xscale="log",
        title="Score all 26,560 filters of ResNet-50\n(geometric median; log scale)",
        xlim=(10, 4 * max(times)),
    )
    engines, dense, compact, kept = zip(*values["serving"], strict=True)
    places = range(len(engines))
    for offset, heights, colour, label in (-0.2, dense, DENSE, "dense"), (0.2, compact, OURS, "pruned by mfp"):
        drawn = right.barh([place + offset for place in places], heights, 0.38, color=colour, label=label)
        right.bar_label(drawn, [f"{height:,.0f} ms" for height in heights], padding=3)
    right.set(
        title=f"ResNet-50 before and after, batch 8\n({kept[0]:.0%} of the FLOPs left)", xlim=(0, 1.25 * max(dense))
    )
    right.set_yticks(places, engines)
    right.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.4, -0.02), ncols=2)
    for axes in (left, right):
        axes.invert_yaxis()
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, which="both")
        axes.set_xticks([])
        axes.xaxis.set_minor_locator(plt.NullLocator())
    return figure


#: Name of the file under docs/charts/ → the numbers, and how they are drawn.
CHARTS = {"overview": ({"scoring": scoring_values, "serving": serving_values}, draw_overview)}


def path(chart: str) -> Path:
    return ROOT / "docs" / "charts" / f"{chart}.svg"


def values(chart: str) -> dict:
    return {key: read() for key, read in CHARTS[chart][0].items()}


def up_to_date(chart: str) -> bool:
    """Whether the chart shows what the result files have now."""
    return path(chart).exists() and html.escape(described(chart), quote=False) in path(chart).read_text()


def described(chart: str) -> str:
    """The numbers of a chart, and a digest of how it is drawn, so that a change to either shows."""
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    return json.dumps({"values": values(chart), "drawn_by": code})


def draw(chart: str) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "mfp", "svg.fonttype": "path", "font.size": 9}
    figure = CHARTS[chart][1](values(chart))
    path(chart).parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None, "Creator": None, "Description": described(chart)}
    figure.savefig(path(chart), format="svg", metadata=metadata, transparent=False, facecolor="white")
