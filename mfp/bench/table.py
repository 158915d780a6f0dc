"""The table of `mfp bench`: every job, ours and the peers', beside the limits of this machine."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mfp.bench.jobs import FIVE, Job, Jobs
from mfp.bench.measure import Limits, best_times, machine
from mfp.bench.oracle import FILTERS_PER_LAYER
from mfp.bench.peers import LOOPS
from mfp.criteria import PAPER_CRITERIA

SECONDS_PER_JOB = 1.25


def measure(arch: str, rate: float, console: Console) -> dict[str, Any]:
    """Check and time all jobs on one network.

    Returns:
        ``{"machine", "network", "limits", "rows"}``, all plain values; a row is one contestant in one job.
    """
    from mfp.train.models import CIFAR_DEPTHS, build_model

    about = machine()
    torch.manual_seed(0)
    small = arch in CIFAR_DEPTHS
    jobs = Jobs(build_model(arch, 10 if small else 1000), rate, 32 if small else 224)
    measured: list[tuple[Job, dict[str, float]]] = []
    limits = None
    for job in jobs.all():
        limits = Limits.measure(limits)  # again before each job: the machine may have been busy the first time
        with console.status(f"{job.name} ..."):
            measured.append((job, best_times(job.contestants, SECONDS_PER_JOB)))
            if job.name == FIVE:
                measured[-1][1]["the five torch loops above"] = _five_loops(measured)
    limits = Limits.measure(limits)
    network = {
        "arch": arch,
        "conv_layers": len(jobs.plan.layers),
        "filters": jobs.plan.num_filters,
        "weights": jobs.weight_bytes // 4,
        "pair_elements": jobs.pair_elements,
        "rate": rate,
    }
    rows = [row for job, times in measured for row in _rows(job, times, limits)]
    return {"machine": about, "network": network, "limits": dataclasses.asdict(limits), "rows": rows}


def _five_loops(measured: list[tuple[Job, dict[str, float]]]) -> float:
    """Nobody else computes the paper's criteria together: the peer is the sum of the single loops."""
    loops = {job.name: times[who] for job, times in measured for who in times if who in LOOPS}
    return sum(loops[name] for name in PAPER_CRITERIA)


def _rows(job: Job, times: dict[str, float], limits: Limits) -> list[dict[str, Any]]:
    ours = next(iter(times.values()))
    return [
        {
            "job": job.name,
            "who": who,
            "seconds": seconds,
            "times_ours": seconds / ours,
            "pair_elements_per_second": job.pair_elements / seconds,
            "bytes_per_second": job.nbytes / seconds,
            "share_of_limit": job.limit(limits) / seconds,
        }
        for who, seconds in times.items()
    ]


def print_table(report: dict[str, Any], console: Console) -> None:
    """Print what :func:`measure` found."""
    about, network, limits = report["machine"], report["network"], report["limits"]
    table = Table(
        title=f"{network['arch']}: {network['conv_layers']} conv layers, {network['filters']:,} filters, "
        f"{network['weights'] / 1e6:.2f} M weights, {network['pair_elements'] / 1e9:.2f} G elements of filter pairs"
    )
    for column in ("job", "by", "ms", "time / ours", "G pair el./s", "GB/s", "of limit"):
        table.add_column(column, justify="left" if column in ("job", "by") else "right")
    previous = None
    for row in report["rows"]:
        first = row["job"] != previous
        if first and previous:
            table.add_section()
        previous = row["job"]
        table.add_row(
            row["job"] if first else "",
            row["who"],
            f"{row['seconds'] * 1e3:.2f}",
            "" if first else f"{row['times_ours']:.2f}",
            _number(row["pair_elements_per_second"]),
            _number(row["bytes_per_second"]),
            f"{row['share_of_limit']:.0%}",
        )
    console.print(table)
    console.print(
        f"{about['processor']}, {about['threads']} threads, {about['instructions']}, torch {about['torch']}, "
        f"{about['date']}. Limits measured in this run: {limits['adds'] / 1e9:.0f} G additions/s, "
        f"{limits['fmas'] / 1e9:.0f} G FMA/s, {limits['adds_and_fmas'] / 1e9:.0f} G pairs of both/s, copy "
        f"{limits['copy'] / 1e9:.0f} GB/s. Best of repeated runs. Checked first against the float64 oracle: "
        f"scores on {FILTERS_PER_LAYER} filters of every layer, the rest in full.",
        soft_wrap=True,
    )
    if any(row["share_of_limit"] > 1 for row in report["rows"]):
        console.print("More than 100% of the limit: what fits in the caches is faster than a copy through memory.")


def _number(rate: float) -> str:
    return f"{rate / 1e9:.1f}" if rate else ""
