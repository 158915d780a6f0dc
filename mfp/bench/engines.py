"""`mfp bench --engines`: what pruning saves in the engines that people serve with, dense against compact."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

import mfp
from mfp.bench.measure import machine
from mfp.capture import exported_program
from mfp.compact.count import flops
from mfp.export import FORMATS, prepare
from mfp.export.engines import ENGINES, check_engine, installed, measure, run_file
from mfp.train.models import build_model

NETWORKS = (
    "resnet18", "resnet34", "resnet50", "resnet101", "vgg16_bn", "densenet121", "efficientnet_b0", "mobilenet_v2",
    "regnet_y_400mf",
)  # fmt: skip
FORMS = ("keep", "coupled", "index")
MULTIPLE = 8  # of filters kept
SIZE, ROUNDS, SECONDS = 224, 3, 1.0  # of images, and of each measurement
LARGEST_DIFFERENCE = 1e-3  # between engines, relative: they sum in other orders, and some by Winograd


def usual_engines() -> list[str]:
    """Those that are installed here and that need no GPU; torch.compile takes minutes a network: by request alone."""
    return [name for name in ("onnxruntime", "openvino", "mfp") if installed(name)]


def measure_networks(
    archs: Sequence[str], engines: Sequence[str], rate: float, batches: Sequence[int], console: Console,
    device: str = "cpu",
) -> dict[str, Any]:  # fmt: skip
    """Dense networks and three compact ones each, in every engine, in turns, each in a process of its own."""
    for engine in engines:
        check_engine(engine)
    rows: list[dict[str, Any]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("engines", total=len(archs) * len(engines) * (1 + len(FORMS)) * ROUNDS)
        for arch in archs:
            progress.update(task, description=arch)
            with tempfile.TemporaryDirectory() as directory:
                rows += _measure_network(
                    arch, engines, rate, batches, Path(directory), lambda: progress.advance(task), device
                )
    return {"machine": machine(), "rate": rate, "multiple": MULTIPLE, "rows": rows}


def _measure_network(arch, engines, rate, batches, directory, advance, device) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    dense, image = build_model(arch, 1000).eval(), torch.randn(1, 3, SIZE, SIZE)
    models: dict[str, nn.Module] = {"dense": dense}
    for form in FORMS:
        models[form] = copy.deepcopy(dense)
        plan = mfp.FilterPlan.from_model(models[form], rate, residual=form, channel_multiple=MULTIPLE)
        mfp.prune_filters_(plan, "l2_norm")
    files: dict[str, tuple[str, Path]] = {}
    counts: dict[str, int] = {}
    for form, model in models.items():
        for engine, file, count in _files(model, engines, image, directory / form):
            files[f"{form}/{engine}"], counts[f"{form}/{engine}"] = (engine, file), count
            _check(model, image, engine, file, device)
    inputs = {"x": image.numpy()}
    times = measure(files, inputs, batches, rounds=ROUNDS, seconds=SECONDS, device=device, advance=advance)
    whole = flops(dense, image)
    return [
        {
            "arch": arch, "batch": batch, "engine": engine, "residual": form,
            "flops_kept": counts[f"{form}/{engine}"] / whole,
            "dense_ms": times[f"dense/{engine}"][batch], "compact_ms": times[f"{form}/{engine}"][batch],
        }
        for batch in batches for form in FORMS for engine in engines
    ]  # fmt: skip


def _files(model: nn.Module, engines: Sequence[str], image: torch.Tensor, directory: Path):
    """(engine, file, multiply-adds) for each engine; a format is written once."""
    written: dict[str, Path] = {}
    others = [engine for engine in engines if engine != "mfp"]
    if others:
        network, arguments, report = prepare(model, image)
        program, _ = exported_program(network, arguments)
        for engine in others:
            suffix = ENGINES[engine].suffix
            if suffix not in written:
                written[suffix] = FORMATS[suffix].write(program, directory / f"network{suffix}")[0]
            yield engine, written[suffix], report.flops_exported
    if "mfp" in engines:
        small = mfp.compact(model, image, fold_bn=True)
        mfp.save(small, directory / "network.mfp")
        yield "mfp", directory / "network.mfp", small.report.flops_after


@torch.no_grad()
def _check(model: nn.Module, image: torch.Tensor, engine: str, file: Path, device: str) -> None:
    """A network that computes something else is not timed."""
    (ours,) = run_file(engine, file, {"x": image.numpy()}, device=device)[1][1]
    expected = model(image)
    apart = float((torch.from_numpy(ours) - expected).abs().max() / expected.abs().max())
    if not apart < (LARGEST_DIFFERENCE if device == "cpu" else 0.05):
        raise mfp.MfpError(f"{file.name} in {engine}: the outputs differ by {apart:.1e}; not timed")


def print_table(report: dict[str, Any], console: Console) -> None:
    """A row for each network, batch and form; for each engine dense → compact and the share of FLOPs that came back."""
    engines = list(dict.fromkeys(row["engine"] for row in report["rows"]))
    table = Table(title=f"ms a call, dense → compact, at rate {report['rate']}, filters in multiples of {report['multiple']}, 224 x 224")  # fmt: skip  # noqa: E501
    for column in ("network", "batch", "residual", "FLOPs kept"):
        table.add_column(column, justify="left" if column in ("network", "residual") else "right")
    for engine in engines:
        table.add_column(engine, justify="right")
    table.add_column("fastest")
    rows = {(row["arch"], row["batch"], row["residual"], row["engine"]): row for row in report["rows"]}
    for arch, batch, form in dict.fromkeys(key[:3] for key in rows):
        found = [rows[arch, batch, form, engine] for engine in engines]
        fastest = min(found, key=lambda row: row["compact_ms"])["engine"]
        kept = sorted({f"{row['flops_kept']:.3f}" for row in found})
        table.add_row(arch, str(batch), form, " / ".join(kept), *map(cell, found), fastest)
    console.print(table)
    about = ", ".join(str(value) for value in report["machine"].values())
    console.print(
        f"{about}. The fastest call of {ROUNDS} rounds in turns, each engine in a process of its own. In brackets: "
        "time saved / FLOPs saved in that engine. index: exported with plain additions, in mfp with joins by index."
    )


def cell(row: dict[str, Any]) -> str:
    saved = 1 - row["compact_ms"] / row["dense_ms"]
    return f"{row['dense_ms']:.1f} → {row['compact_ms']:.1f} ({saved / max(1 - row['flops_kept'], 1e-9):.2f})"
