"""`mfp bench --layers`: where a serving form's time goes, layer by layer, and what engines take for the same ones."""

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
from mfp.export.engines import ENGINES, environment, installed
from mfp.serving.network import ServingNetwork, record
from mfp.train.models import build_model

CALLS = 30
NAMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}  # those that are profiled


def measure(
    arch: str, rate: float, batches: Sequence[int], console: Console, residual: str = "index"
) -> dict[str, Any]:
    """Each layer of the dense network and of the one whose filters were pruned at ``rate`` (0: the dense one alone)."""
    limits, rows = Limits.measure(), []
    for batch in batches:
        for form in ("dense", residual) if rate else ("dense",):
            console.print(f"{arch}, {form}, batch {batch} ...", style="dim")
            rows += [{"arch": arch, "batch": batch, "form": form, **row} for row in _measure(arch, rate, form, batch)]
    return {"rate": rate, "gmacs_at_most": limits.fmas / 1e9, "rows": rows}


def _measure(arch: str, rate: float, form: str, batch: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    model, image = build_model(arch, 1000).eval(), torch.randn(1, 3, SIZE, SIZE)
    if form != "dense":
        plan = mfp.FilterPlan.from_model(model, rate, residual=form, channel_multiple=MULTIPLE)
        mfp.prune_filters_(plan, "l2_norm")
    rows = time_layers(mfp.compact(model, image, fold_bn=True), image.repeat(batch, 1, 1, 1))
    for engine in filter(installed, NAMES):
        rows += _beside(rows, engine, engine_times(engine, model, image, batch))
    return rows


def _beside(rows: list[dict[str, Any]], engine: str, times: list[tuple[str, str, float]]) -> list[dict[str, Any]]:
    """Writes an engine's times into the rows of the same convs; returns rows for its other operators, by kind."""
    convs = [row for row in rows if row["convolution"]]
    others: dict[str, float] = {}
    for operator, convolution, milliseconds in times:
        same = next((row for row in convs if row["convolution"] == convolution), None)
        if same is None:
            others[operator] = others.get(operator, 0.0) + milliseconds
        else:
            same[engine] = milliseconds
            convs.remove(same)
    return [
        {"layer": f"{NAMES[engine]}: {operator}", "ms": 0.0, "gmacs": 0.0, "convolution": "", engine: milliseconds}
        for operator, milliseconds in others.items()
    ]


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


def engine_times(engine: str, model: nn.Module, image: torch.Tensor, batch: int) -> list[tuple[str, str, float]]:
    """(operator, which conv, milliseconds) of all that an engine runs of the exported network, in its order."""
    with tempfile.TemporaryDirectory() as directory:
        network, arguments, _ = prepare(model, image)
        program, _ = exported_program(network, arguments)
        suffix = ENGINES[engine].suffix
        file = FORMATS[suffix].write(program, Path(directory) / f"network{suffix}")[0]
        inputs = Path(directory) / "inputs.npz"
        np.savez(inputs, x=image.numpy())
        script = Path(__file__).with_name("engine_profile.py")
        command = [sys.executable, script, engine, file, inputs, batch, torch.get_num_threads(), CALLS]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment())
    if done.returncode:
        raise MfpError(f"{engine} cannot run {model.__class__.__name__}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def print_table(report: dict[str, Any], console: Console) -> None:
    """The layers of each batch and form, those that take longest first."""
    for batch, form in dict.fromkeys((row["batch"], row["form"]) for row in report["rows"]):
        rows = [row for row in report["rows"] if (row["batch"], row["form"]) == (batch, form)]
        total, macs = sum(row["ms"] for row in rows), sum(row["ms"] * row["gmacs"] for row in rows)
        engines = [engine for engine in NAMES if any(engine in row for row in rows)]
        about = form if form == "dense" else f"rate {report['rate']}, {form}"
        table = Table(title=f"{rows[0]['arch']}, {about}, batch {batch}, {SIZE} x {SIZE}")
        table.add_column("layer")
        for column in ("ms", "GMAC/s", "of the peak", *(f"{NAMES[engine]}, ms" for engine in engines)):
            table.add_column(column, justify="right")
        for row in sorted(rows, key=lambda row: -row["ms"]):
            theirs = [f"{row[engine]:.3f}" if engine in row else "" for engine in engines]
            share = f"{row['gmacs'] / report['gmacs_at_most']:.0%}" if row["gmacs"] else ""
            speed = f"{row['gmacs']:.0f}" if row["gmacs"] else ""
            table.add_row(row["layer"], f"{row['ms']:.3f}" if row["ms"] else "", speed, share, *theirs)
        table.add_section()
        theirs = [f"{sum(row.get(engine, 0) for row in rows):.3f}" for engine in engines]
        gmacs = macs / total
        table.add_row("all", f"{total:.3f}", f"{gmacs:.0f}", f"{gmacs / report['gmacs_at_most']:.0%}", *theirs)
        console.print(table)
    console.print(
        f"{machine()}. Medians of {CALLS} calls; the peak: {report['gmacs_at_most']:.0f} GMAC/s of multiply-adds in "
        "registers, measured now. By Winograd's algorithm a layer can exceed it. An engine's time is that of the "
        "exported layer, whose joins are plain additions."
    )
