"""`mfp bench --overhead`: what pruning adds to an ImageNet epoch."""

from __future__ import annotations

import copy
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import mfp
from mfp import optim
from mfp.bench.jobs import SGD
from mfp.bench.measure import Contestant, best_times, machine

STEPS_PER_EPOCH, EPOCH_BATCH = 5004, 256  # ILSVRC-2012
SECONDS = 8.0


def measure(arch: str, rate: float, batch: int, console: Console) -> dict[str, Any]:
    """Time the parts of a training step and a pruning point, and add them up to an epoch.

    Forward and backward passes are scaled from ``batch`` to 256 images; an optimiser step and a pruning point cost the
    same for any batch.
    """
    from mfp.train.models import CIFAR_DEPTHS, build_model

    about = machine()
    torch.manual_seed(0)
    small = arch in CIFAR_DEPTHS
    model = build_model(arch, 10 if small else 1000)
    size = 32 if small else 224
    images, labels = torch.randn(batch, 3, size, size), torch.randint(10, (batch,))

    def passes() -> None:
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()

    def seconds(run) -> float:
        return best_times([Contestant("", run, lambda _: None)], SECONDS)[""]

    with console.status("forward and backward ..."):
        times = {"passes": seconds(passes)}
    plan = mfp.FilterPlan.from_model(model, rate)
    pruner = mfp.FilterPruner(model, rate)  # soft: each call scores, tries and zeroes anew
    with console.status("pruning point, optimiser steps ..."):
        times["pruning"] = seconds(lambda: pruner.step(0))
        mask = mfp.select_filters(mfp.score_filters(plan, ("l2_distance",)))
        other = copy.deepcopy(model)  # of its own: plain steps would bring pruned filters back
        for copied, parameter in zip(other.parameters(), model.parameters(), strict=True):
            copied.grad = parameter.grad.clone()
        steps = {
            "plain": torch.optim.SGD(other.parameters(), fused=True, **SGD),
            "masked": optim.MaskedSGD(model.parameters(), mask=mask, **SGD),
        }
        contestants = [Contestant(name, optimizer.step, lambda _: None) for name, optimizer in steps.items()]
        times |= best_times(contestants, SECONDS)
    epochs = {
        name: STEPS_PER_EPOCH * (times["passes"] * EPOCH_BATCH / batch + times[name]) for name in ("plain", "masked")
    }
    parts = times | {
        "epoch, plain": epochs["plain"],
        "epoch, soft": epochs["plain"] + times["pruning"],
        "epoch, hard": epochs["masked"] + times["pruning"],
    }
    rows = [{"part": part, "seconds": took} for part, took in parts.items()]
    return {"machine": about, "arch": arch, "rate": rate, "batch": batch, "rows": rows}


def print_table(report: dict[str, Any], console: Console) -> None:
    """Print what :func:`measure` found."""
    about, batch = report["machine"], report["batch"]
    seconds = {row["part"]: row["seconds"] for row in report["rows"]}
    table = Table(title=f"{report['arch']}, rate {report['rate']:g}: what pruning adds to an epoch")
    table.add_column("part")
    table.add_column("seconds", justify="right")
    table.add_row(f"forward and backward, {batch} images", f"{seconds['passes']:.4f}")
    table.add_row("optimiser step, plain (torch.optim.SGD, fused)", f"{seconds['plain']:.4f}")
    table.add_row("optimiser step, masked (mfp.optim.MaskedSGD)", f"{seconds['masked']:.4f}")
    table.add_row("pruning point: five criteria, choice, zeroing", f"{seconds['pruning']:.4f}")
    table.add_section()
    for mode in ("soft", "hard"):
        epoch = seconds[f"epoch, {mode}"]
        table.add_row(f"epoch of {STEPS_PER_EPOCH:,} steps of {EPOCH_BATCH} images, {mode} pruning once",
                      f"{epoch:.0f} ({epoch / seconds['epoch, plain'] - 1:+.4%})")  # fmt: skip
    console.print(table)
    console.print(
        f"{about['processor']}, {about['threads']} threads, torch {about['torch']}, {about['date']}; forward and "
        f"backward scaled from {batch} to {EPOCH_BATCH} images.",
        soft_wrap=True,
    )
