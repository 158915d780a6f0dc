"""`mfp bench --layers`: where a serving form's time goes, layer by layer, and what OpenVINO takes for the same ones."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import mfp
from mfp.bench.engines import MULTIPLE, SIZE
from mfp.bench.measure import Limits
from mfp.bench.results import machine
from mfp.capture import exported_program
from mfp.errors import MfpError
from mfp.export import FORMATS, prepare
from mfp.export.engines import environment, installed
from mfp.serving.network import ServingNetwork, record
from mfp.train.models import build_model

CALLS = 30
OTHERS = "OpenVINO's other operators"
CONVOLUTIONS = ("Convolution", "GroupConvolution")  # as OpenVINO calls them


def measure(
    arch: str, rate: float, batches: Sequence[int], console: Console, residual: str = "index"
) -> dict[str, Any]:
    """Each layer of a network whose filters were pruned at ``rate`` (0: dense)."""
    torch.manual_seed(0)
    model, image = build_model(arch, 1000).eval(), torch.randn(1, 3, SIZE, SIZE)
    if rate:
        plan = mfp.FilterPlan.from_model(model, rate, residual=residual, channel_multiple=MULTIPLE)
        mfp.prune_filters_(plan, "l2_norm")
    serving = mfp.compact(model, image, fold_bn=True)
    limits, rows = Limits.measure(), []
    for batch in batches:
        console.print(f"{arch}, batch {batch} ...", style="dim")
        ours = time_layers(serving, image.repeat(batch, 1, 1, 1))
        theirs = openvino_times(model, image, batch) if installed("openvino") else []
        convolutions = [time for kind, time in theirs if kind in CONVOLUTIONS]
        convs = [row for row in ours if row["convolution"]]
        if len(convolutions) == len(convs):  # the same layers, in the same order
            for row, milliseconds in zip(convs, convolutions, strict=True):
                row["openvino_ms"] = milliseconds
            rest = sum(time for kind, time in theirs if kind not in CONVOLUTIONS)
            ours.append({"layer": OTHERS, "ms": 0.0, "gmacs": 0.0, "convolution": "", "openvino_ms": rest})
        rows += [{"arch": arch, "batch": batch, **row} for row in ours]
    return {"rate": rate, "residual": residual, "gmacs_at_most": limits.fmas / 1e9, "rows": rows}


@torch.no_grad()
def time_layers(serving: ServingNetwork, x: torch.Tensor) -> list[dict[str, Any]]:
    """A row for each node of the graph: milliseconds (the median of some calls) and multiply-adds."""
    from mfp import _C  # type: ignore[attr-defined]  # the compiled part

    for _ in range(2):
        serving(x)
    recording = record(serving, [x], _C.Memory())[1]
    if recording.tape is None:
        raise MfpError(f"{type(serving).__name__} cannot be replayed: its layers have no times of their own")
    runs = [recording.tape.seconds([x]) for _ in range(CALLS + 3)][3:]
    times: dict[str, float] = {}
    for name, seconds in zip(recording.steps, zip(*runs, strict=True), strict=True):
        times[name] = times.get(name, 0.0) + 1000 * statistics.median(seconds)
    counter = Counter(serving)
    counter.run(x)
    return [
        {"layer": name, "ms": ms, "gmacs": counter.macs.get(name, 0) / 1e6 / ms,
         "convolution": counter.convs.get(name, "")}
        for name, ms in times.items()
    ]  # fmt: skip


class Counter(torch.fx.Interpreter):
    """Counts the multiply-adds of convs and linear layers: their positions times their weights."""

    def __init__(self, network: torch.fx.GraphModule) -> None:
        super().__init__(network)
        self.macs: dict[str, int] = {}
        self.convs: dict[str, str] = {}  # what they are: "3x3 on 14x14"

    def run_node(self, node: torch.fx.Node) -> Any:
        result = super().run_node(node)
        layer = self.module.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(layer, nn.Conv2d):
            self.macs[node.name] = result[:, 0].numel() * layer.weight.numel()
            grouped = ", groups" if layer.groups > 1 else ""
            kernel, image = ("x".join(map(str, size)) for size in (layer.kernel_size, result.shape[2:]))
            self.convs[node.name] = f"{kernel} on {image}{grouped}"
        elif isinstance(layer, nn.Linear):
            self.macs[node.name] = result[..., 0].numel() * layer.weight.numel()
        return result


def openvino_times(model: nn.Module, image: torch.Tensor, batch: int) -> list[tuple[str, float]]:
    """(what it is, milliseconds) of each operator of the exported network, in the order in which they run."""
    with tempfile.TemporaryDirectory() as directory:
        network, arguments, _ = prepare(model, image)
        program, _ = exported_program(network, arguments)
        file = FORMATS[".xml"].write(program, Path(directory) / "network.xml")[0]
        inputs = Path(directory) / "inputs.npz"
        np.savez(inputs, x=image.numpy())
        script = Path(__file__).with_name("openvino_profile.py")
        command = [sys.executable, script, file, inputs, batch, torch.get_num_threads(), CALLS]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment())
    if done.returncode:
        raise MfpError(f"OpenVINO cannot run {model.__class__.__name__}: {done.stderr.strip().splitlines()[-1]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return [(kind, time / 1000) for _, kind, time in found]


def print_table(report: dict[str, Any], console: Console) -> None:
    """The layers of each batch, those that take longest first."""
    for batch in dict.fromkeys(row["batch"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["batch"] == batch]
        total, macs = sum(row["ms"] for row in rows), sum(row["ms"] * row["gmacs"] for row in rows)
        form = f"rate {report['rate']}, {report['residual']}"
        table = Table(title=f"{rows[0]['arch']}, {form}, batch {batch}, {SIZE} x {SIZE}")
        table.add_column("layer")
        for column in ("ms", "GMAC/s", "of the peak", "OpenVINO, ms"):
            table.add_column(column, justify="right")
        for row in sorted(rows, key=lambda row: -row["ms"]):
            theirs = f"{row['openvino_ms']:.3f}" if "openvino_ms" in row else ""
            share = f"{row['gmacs'] / report['gmacs_at_most']:.0%}" if row["gmacs"] else ""
            table.add_row(
                row["layer"], f"{row['ms']:.3f}", f"{row['gmacs']:.0f}" if row["gmacs"] else "", share, theirs
            )
        table.add_section()
        theirs = f"{sum(row.get('openvino_ms', 0) for row in rows):.3f}"
        gmacs = macs / total
        table.add_row("all", f"{total:.3f}", f"{gmacs:.0f}", f"{gmacs / report['gmacs_at_most']:.0%}", theirs)
        console.print(table)
    console.print(
        f"{machine()}. Medians of {CALLS} calls; the peak: {report['gmacs_at_most']:.0f} GMAC/s of multiply-adds in "
        "registers, measured now. By Winograd's algorithm a layer can exceed it. OpenVINO's time is that of the "
        "exported layer, whose joins are plain additions."
    )
