"""`mfp bench --training`: what training costs from where a mask holds, with the masked network and the smaller one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import mfp
from mfp.bench.jobs import SGD
from mfp.bench.measure import machine

RESIDUAL = ("index", "keep", "coupled")
SECONDS = 40.0  # for all steps of one network
PARTS = ("forward", "backward", "step")


def measure(arch: str, rate: float, batch: int, console: Console) -> dict[str, Any]:
    """Medians of the parts of a step in float32 and channels_last, the networks in turns, on random images.

    The dense network and its torch.optim.SGD are measured too. Each form of the smaller network (``residual``) stands
    beside the masked network of the same mask, which costs the same for all of them and is measured once, for "index".
    """
    from mfp.train.models import CIFAR_DEPTHS, build_model

    small_images = arch in CIFAR_DEPTHS
    size, classes = (32, 10) if small_images else (224, 1000)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, size, size, generator=generator).contiguous(memory_format=torch.channels_last)
    targets = torch.randint(classes, (batch,), generator=generator)

    def dense() -> nn.Module:
        torch.manual_seed(0)
        return build_model(arch, classes).to(memory_format=torch.channels_last).train()

    rows: dict[str, dict[str, float]] = {}
    steps: dict[str, Callable[[], tuple[float, ...]]] = {}
    for residual in RESIDUAL:
        with console.status(f"{arch}, {residual}: shrinking"):
            model = dense()
            pruner = mfp.FilterPruner(
                model, rate, mode="hard", criteria=("l2_norm",), residual=residual, example_input=images[:2]
            )
            pruner.step(0)
            optimizer = mfp.optim.MaskedSGD(model.parameters(), mask=pruner.mask, **SGD)
            flops = mfp.flops(model, images[:1])
            if residual == "index":
                other = dense()
                steps["dense"] = _step(other, torch.optim.SGD(other.parameters(), fused=True, **SGD), images, targets)
                masked = dense()
                masked.load_state_dict(model.state_dict())
                mask = mfp.FilterMask(mfp.FilterPlan(masked, pruner.plan.layers), pruner.mask.keep)
                held = mfp.optim.MaskedSGD(masked.parameters(), mask=mask, **SGD)
                steps["masked"] = _step(masked, held, images, targets)
                rows["dense"] = rows["masked"] = {"flops": flops}
            start = time.perf_counter()
            small = pruner.shrink_(optimizer)
            rows[residual] = {"switch_seconds": time.perf_counter() - start, "flops": mfp.flops(small, images[:1])}
            steps[residual] = _step(small, optimizer, images, targets)
    with console.status(f"{arch}: training steps in turns"):
        times = in_turns(steps, SECONDS)
    for name, parts in times.items():
        rows[name] = {**rows[name], **dict(zip(PARTS, parts, strict=True)), "seconds": sum(parts)}
    for name in RESIDUAL:
        faster = rows["masked"]["seconds"] / rows[name]["seconds"]
        flops_saved = 1 - rows[name]["flops"] / rows["masked"]["flops"]
        rows[name] |= {"faster": faster, "flops_saved": flops_saved, "realised": (1 - 1 / faster) / flops_saved}
    report = {"machine": machine(), "arch": arch, "rate": rate, "batch": batch, "image_size": size}
    return report | {"rows": [{"network": name, **row} for name, row in rows.items()]}


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, images, targets) -> Callable[[], tuple[float, ...]]:
    def step() -> tuple[float, ...]:
        """Seconds of the parts of one training step."""
        optimizer.zero_grad(set_to_none=True)
        start = time.perf_counter()
        loss = nn.functional.cross_entropy(model(images), targets)
        forward = time.perf_counter()
        loss.backward()
        backward = time.perf_counter()
        optimizer.step()
        return forward - start, backward - forward, time.perf_counter() - backward

    return step


def in_turns(steps: dict[str, Callable[[], tuple[float, ...]]], seconds: float) -> dict[str, list[float]]:
    """Medians of each part: at least three steps of each, and for so many seconds in all."""
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in steps}
    for step in steps.values():
        step()  # chooses and prepares kernels
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(found.values()))) < 3:
        for name, step in steps.items():
            found[name].append(step())
    return {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in found.items()}


def print_table(report: dict[str, Any], console: Console) -> None:
    """Print what :func:`measure` found."""
    about, batch = report["machine"], report["batch"]
    title = f"{report['arch']}, {batch} images of {report['image_size']}², rate {report['rate']:g}: ms of a step"
    table = Table(title=title)
    for column in ("network", *PARTS, "together", "images/s", "x masked", "FLOPs saved", "time / FLOPs saved"):
        table.add_column(column, justify="left" if column == "network" else "right")
    for row in report["rows"]:
        cells = [f"{1000 * row[part]:.0f}" for part in (*PARTS, "seconds")] + [f"{batch / row['seconds']:.1f}"]
        if "faster" in row:
            cells += [f"{row['faster']:.2f}", f"{row['flops_saved']:.1%}", f"{row['realised']:.2f}"]
        table.add_row(row["network"] if row["network"] in ("dense", "masked") else f"smaller, {row['network']}", *cells)
    console.print(table)
    switch = max(row.get("switch_seconds", 0.0) for row in report["rows"])
    console.print(
        f"{about['processor']}, {about['threads']} threads, torch {about['torch']}, {about['date']}; float32, "
        f"channels_last, medians, in turns; the switch took {switch:.1f} s.",
        soft_wrap=True,
    )
