"""The runs of the study, and the table that holds what they gave."""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mfp
from mfp.atomic import write_atomically

CRITERIA = (*mfp.PAPER_CRITERIA, "weighted_hybrid", "taylor", "bn_scale")
BASELINES = ("random", "worst")  # worst: the filters with the highest l2_norm go
SWITCHING = ("mfp loss", "mfp loss, not re-estimated", "mfp top1_error", "mfp top1_error, not re-estimated",
             "mfp top5_error", "mfp top5_error, not re-estimated", "mfp weight_energy")  # fmt: skip
SCRATCH = (*SWITCHING, *CRITERIA, *BASELINES)
ALLOCATED_BY = "l2_distance"  # the criterion by which sensitivities are measured, and pruned at such rates
STAGES = ("once", "rates", "finetune", "scratch")
KEY = ("setting", "seed", "rates", "method")


@dataclass(frozen=True)
class Job:
    """A run: what is done (`once` has all methods in one), for which seed, at which rates, by which method."""

    setting: str
    seed: int
    rates: str = ""
    method: str = ""


class Table:
    """The rows so far, in a file that always holds whole runs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = list(csv.DictReader(path.open())) if path.exists() else []

    def has(self, job: Job) -> bool:
        key = (job.setting, str(job.seed), job.rates, job.method)
        found = {tuple(row[name] for name in KEY) for row in self.rows}
        return key in found if job.method else key[:3] in {other[:3] for other in found}

    def add(self, rows: list[dict[str, Any]]) -> None:
        new = [{name: _text(value) for name, value in row.items()} for row in rows]
        names = list(dict.fromkeys([*KEY, *(name for row in (*self.rows, *new) for name in row)]))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows([*self.rows, *new])
        write_atomically(self.path, text.getvalue().encode())
        self.rows += new


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str("" if value is None else value)


def planned(options: argparse.Namespace) -> Iterator[Job]:
    """The runs of a study, cheap and telling ones first."""
    uniform = [f"{rate:g}" for rate in options.rates]
    allocated = [f"{way}, {share:g} of FLOPs" for share in options.flops for way in ("uniform", "by layer")]
    trained = range(options.first_seed, options.training_seeds)
    for seed in range(options.first_seed, options.seeds):
        if "once" in options.stages:
            yield Job("dense", seed)
            yield from (Job("once", seed, rates) for rates in uniform)
        if "rates" in options.stages:
            yield from (Job("once", seed, rates) for rates in allocated)
    if "finetune" in options.stages:
        for rates in allocated:
            yield from (Job("finetune", seed, rates, ALLOCATED_BY) for seed in trained)
        for rates in uniform:
            for seed in trained:
                yield from (Job("finetune", seed, rates, method) for method in (*CRITERIA, *BASELINES))
    if "scratch" in options.stages:
        for rates in uniform:
            for method in options.methods:
                yield from (Job("scratch", seed, rates, method) for seed in trained)
