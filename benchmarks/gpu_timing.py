"""What the steps of `make gpu` share: arguments, times of calls, and rows that are written as they come."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Bench:
    """Where a step runs and where its rows go.

    Attributes:
        device: "cuda", or "cpu" for a dry run: every line runs, on inputs so small that the times say nothing.
        rows: a file; a row is added as one line of JSON the moment it is there, and stays when the step is ended.
    """

    device: str
    rows: Path | None

    @classmethod
    def from_arguments(cls, about: str) -> Bench:
        parser = argparse.ArgumentParser(description=about)
        parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run, tiny inputs")
        parser.add_argument("--rows", type=Path, help="file that gets a line of JSON a row")
        options = parser.parse_args()
        if options.device == "cuda" and not torch.cuda.is_available():
            parser.exit(1, "No GPU here: --device cpu runs the same code with tiny inputs.\n")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        return cls(options.device, options.rows)

    @property
    def dry(self) -> bool:
        return self.device == "cpu"

    def add(self, **row: str | float | bool) -> None:
        floats = {key: value for key, value in row.items() if isinstance(value, float)}
        rounded = {key: float(f"{value:.5g}") if math.isfinite(value) else None for key, value in floats.items()}
        line = json.dumps(row | rounded)
        print(line, flush=True)
        if self.rows is not None:
            with self.rows.open("a") as file:
                file.write(line + "\n")

    def wait(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], object]) -> float:
        """Of one call, the host's part included."""
        self.wait()
        start = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - start

    def median_ms(
        self, run: Callable[[], object], prepare: Callable[[], object] = lambda: None, repeats: int = 21
    ) -> float:
        """Median time of a call on the device; ``prepare`` is not timed, and the first three calls warm up."""
        times = []
        for _ in range(2 if self.dry else repeats + 3):
            prepare()
            times.append(1e3 * self.seconds(run) if self.dry else self._device_ms(run))
        times = sorted(times[-repeats:])
        return times[len(times) // 2]

    def _device_ms(self, run: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(2_000_000)  # a millisecond in which the host gets ahead: its time is not counted
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)
