"""`mfp bench --compact`: whether the time of a compact network falls as its FLOPs do."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

import mfp
from mfp.bench.measure import machine
from mfp.train.evaluation import milliseconds_per_image
from mfp.train.models import build_model

NETWORKS = ("resnet18", "resnet34", "resnet50", "resnet101")
MULTIPLES = (16, 8, 1)
LARGEST_DIFFERENCE = 1e-4  # of the largest output; a network that computes something else is not timed


def measure(archs: Sequence[str], rate: float, batches: Sequence[int], console: Console) -> dict[str, Any]:
    """Times dense and compact networks in serving form, in one run, after comparing their outputs."""
    rows = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("compact networks", total=len(archs) * len(batches))
        for arch, batch in itertools.product(archs, batches):
            rows += _measure_network(arch, rate, batch)
            progress.advance(task)
    return {"machine": machine(), "rate": rate, "rows": rows}


def _measure_network(arch: str, rate: float, batch: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    dense = build_model(arch, 1000).eval()
    images = torch.randn(batch, 3, 224, 224)
    networks: dict[str, nn.Module] = {"dense": mfp.compact(dense, images[:1], fold_bn=True)}
    saved = {}
    for multiple in MULTIPLES:
        masked = copy.deepcopy(dense)
        mfp.prune_filters_(mfp.FilterPlan.from_model(masked, rate, channel_multiple=multiple), "l2_distance")
        small = mfp.compact(masked, images[:1], fold_bn=True)
        with torch.inference_mode():
            expected = masked(images[:1])
            difference = float((small(images[:1]) - expected).abs().max() / expected.abs().max())
        if not difference < LARGEST_DIFFERENCE:
            raise mfp.MfpError(f"{arch}: the compact network's outputs differ by {difference:.1e}; not timed")
        networks[str(multiple)], saved[str(multiple)] = small, small.report.flops_saved
    with torch.inference_mode():
        times = milliseconds_per_image(networks, images, seconds=max(1.5, math.sqrt(batch)))
    rows = []
    for name in map(str, MULTIPLES):
        time_saved = 1 - times[name] / times["dense"]
        rows.append(
            {
                "arch": arch,
                "batch": batch,
                "channel_multiple": int(name),
                "dense_ms": batch * times["dense"],
                "compact_ms": batch * times[name],
                "flops_saved": saved[name],
                "time_saved": time_saved,
                "ratio": time_saved / saved[name],
            }
        )
    return rows


def print_table(report: dict[str, Any], console: Console) -> None:
    """The rows, and what they were measured on."""
    table = Table(
        title=f"compact networks at rate {report['rate']}, 224 x 224, against dense ones with BatchNorm folded"
    )
    for column in (
        "network",
        "batch",
        "channels in multiples of",
        "dense, ms",
        "compact, ms",
        "FLOPs saved",
        "time saved",
    ):
        table.add_column(column, justify="left" if column == "network" else "right")
    table.add_column("time / FLOPs", justify="right")
    for row in report["rows"]:
        table.add_row(
            row["arch"],
            str(row["batch"]),
            str(row["channel_multiple"]),
            f"{row['dense_ms']:.1f}",
            f"{row['compact_ms']:.1f}",
            f"{row['flops_saved']:.1%}",
            f"{row['time_saved']:.1%}",
            f"{row['ratio']:.2f}",
        )
    console.print(table)
    about = ", ".join(str(value) for value in report["machine"].values())
    console.print(f"{about}. Each network in its faster memory format; best of repeated runs, taken in turns.")
