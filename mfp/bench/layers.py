"""`mfp bench --layers`: where a serving form's time goes, layer by layer, and what engines take for the same ones."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
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
from mfp.export.engines import ENGINES, environment, installed, last_line
from mfp.serving.network import ServingNetwork, record
from mfp.train.models import build_model

ROUNDS, CALLS = 3, 10
THEN = ", then "  # between two convs that are computed in one
NAMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}  # those that are profiled


def measure(
    arch: str, rate: float, batches: Sequence[int], console: Console, residual: str = "index"
) -> dict[str, Any]:
    """Each layer of the dense network and of the one whose filters were pruned at ``rate`` (0: the dense one alone)."""
    limits, rows = Limits.measure(), []
    with tempfile.TemporaryDirectory() as directory:
        networks = {
            form: Network(arch, rate, form, Path(directory) / form)
            for form in (("dense", residual) if rate else ("dense",))
        }
        for batch in batches:
            console.print(f"{arch}, batch {batch} ...", style="dim")
            rounds = [[network.rows(batch) for network in networks.values()] for _ in range(ROUNDS)]  # in turns
            for form, found in zip(networks, zip(*rounds, strict=True), strict=True):
                same_layer = zip(*found, strict=True)
                rows += [{"arch": arch, "batch": batch, "form": form, **medians(same)} for same in same_layer]
    return {"rate": rate, "gmacs_at_most": limits.fmas / 1e9, "rows": rows}


def medians(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row of several of the same layer."""
    return {
        key: statistics.median(row[key] for row in rows) if isinstance(value, float) else value
        for key, value in rows[0].items()
    }


class Network:
    """A dense or a pruned network as serving form and as files for the engines."""

    def __init__(self, arch: str, rate: float, form: str, directory: Path) -> None:
        torch.manual_seed(0)
        model, self.image = build_model(arch, 1000).eval(), torch.randn(1, 3, SIZE, SIZE)
        if form != "dense":
            plan = mfp.FilterPlan.from_model(model, rate, residual=form, channel_multiple=MULTIPLE)
            mfp.prune_filters_(plan, "l2_norm")
        self.serving = mfp.compact(model, self.image, fold_bn=True)
        network, arguments, _ = prepare(model, self.image)
        program, _ = exported_program(network, arguments)
        suffixes = {engine: ENGINES[engine].suffix for engine in filter(installed, NAMES)}
        self.files = {
            engine: FORMATS[suffix].write(program, directory / f"network{suffix}")[0]
            for engine, suffix in suffixes.items()
        }
        self.inputs = directory / "inputs.npz"
        np.savez(self.inputs, x=self.image.numpy())

    def rows(self, batch: int) -> list[dict[str, Any]]:
        """A row for each layer of the serving form, with the engines' times of the same convs; then their others."""
        image = self.image.repeat(batch, 1, 1, 1).contiguous(memory_format=torch.channels_last)
        rows = time_layers(self.serving, image)
        return rows + [row for engine in self.files for row in self._beside(rows, engine, batch)]

    def _beside(self, rows: list[dict[str, Any]], engine: str, batch: int) -> list[dict[str, Any]]:
        """Writes an engine's times into the rows of the same convs; returns rows for its other operators, by kind."""
        convs = [
            (row, convolution, int(channels))
            for row in rows if row["convolution"]
            for convolution, channels in zip(row["convolution"].split(THEN), row["channels"].split(THEN), strict=True)
        ]  # fmt: skip
        others: dict[str, float] = {}
        for operator, convolution, channels, milliseconds in self.times(engine, batch):
            same = [conv for conv in convs if conv[1] == convolution]
            if same:  # branches may run in another order
                nearest = min(same, key=lambda conv: abs(conv[2] - channels))
                nearest[0][engine] = nearest[0].get(engine, 0.0) + milliseconds
                convs.remove(nearest)
            else:
                others[operator] = others.get(operator, 0.0) + milliseconds
        none = {"ms": 0.0, "gmacs": 0.0, "convolution": "", "channels": ""}
        return [{"layer": f"{NAMES[engine]}: {name}", **none, engine: time} for name, time in sorted(others.items())]

    def times(self, engine: str, batch: int) -> list[tuple[str, str, int, float]]:
        """(operator, which conv, its channels, milliseconds) of all that an engine runs."""
        script, threads = Path(__file__).with_name("engine_profile.py"), torch.get_num_threads()
        command = [sys.executable, script, engine, self.files[engine], self.inputs, batch, threads, CALLS]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment())
        if done.returncode:
            raise MfpError(f"{engine} cannot run the network: {last_line(done)}")
        return json.loads(done.stdout.splitlines()[-1])


@torch.no_grad()
def time_layers(serving: ServingNetwork, x: torch.Tensor) -> list[dict[str, Any]]:
    """A row for each node of the graph: milliseconds (the median of some calls), GMAC/s, which conv it is."""
    from mfp import _C  # type: ignore[attr-defined]  # the compiled part

    for _ in range(2):
        serving(x)
    recording = record(serving, [x], _C.Memory())[1]
    if recording is None:
        raise MfpError(f"{type(serving).__name__} cannot be replayed: its layers have no times of their own")
    runs = [recording.tape.seconds([x]) for _ in range(CALLS + 3)][3:]
    times: dict[str, float] = {}
    for name, seconds in zip(recording.steps, zip(*runs, strict=True), strict=True):
        times[name] = times.get(name, 0.0) + 1000 * statistics.median(seconds)
    counter = Counter(serving)
    with torch.enable_grad():  # then each layer is called by itself
        counter.run(x)
    return [
        {"layer": name, "ms": ms, "gmacs": counter.macs.get(name, 0) / 1e6 / ms,
         "convolution": THEN.join(counter.convs.get(name, ())), "channels": THEN.join(counter.channels.get(name, ()))}
        for name, ms in times.items()
    ]  # fmt: skip


class Counter(torch.fx.Interpreter):
    """Counts the multiply-adds of convs and linear layers: their positions times their weights."""

    def __init__(self, network: torch.fx.GraphModule) -> None:
        super().__init__(network)
        self.macs: dict[str, int] = {}
        self.convs: dict[str, list[str]] = {}  # what they are: "3x3 on 14x14"
        self.channels: dict[str, list[str]] = {}  # of their inputs, in a group

    def run_node(self, node: torch.fx.Node) -> Any:
        layer = self.module.get_submodule(node.target) if node.op == "call_module" else None
        parts = [part for part in (layer.modules() if layer else ()) if isinstance(part, nn.Conv2d | nn.Linear)]
        hooks = [part.register_forward_hook(partial(self.count, node.name)) for part in parts]
        try:
            return super().run_node(node)
        finally:
            for hook in hooks:
                hook.remove()

    def count(self, name: str, layer: nn.Conv2d | nn.Linear, inputs: Any, result: torch.Tensor) -> None:
        """Adds a layer of a node, which may have two of them."""
        if isinstance(layer, nn.Linear):
            macs = result[..., 0].numel() * layer.weight.numel()
        else:
            macs = result[:, 0].numel() * layer.weight.numel()
            kernel, image = ("x".join(map(str, size)) for size in (layer.kernel_size, result.shape[2:]))
            self.convs.setdefault(name, []).append(f"{kernel} on {image}{', groups' if layer.groups > 1 else ''}")
            self.channels.setdefault(name, []).append(str(layer.weight.shape[1]))
        self.macs[name] = self.macs.get(name, 0) + macs


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
        f"{machine()}. Medians of {ROUNDS} rounds in turns, of {CALLS} calls each; the peak: "
        f"{report['gmacs_at_most']:.0f} GMAC/s of multiply-adds in registers, measured now. By Winograd's algorithm a "
        "layer can exceed it. An engine's time is that of the exported layer, whose joins are plain additions."
    )
