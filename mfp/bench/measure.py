"""Time several ways of doing one job side by side, and measure what the machine can do at most."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from mfp import backend
from mfp.errors import MfpError


@dataclass(frozen=True)
class Contestant:
    """One way of doing a job.

    Attributes:
        name: for the table.
        run: does the job and returns its result.
        check: raises unless the result is right; called on the first result, before anything is timed.
        prepare: undoes what ``run`` does in place; not timed.
    """

    name: str
    run: Callable[[], Any]
    check: Callable[[Any], None]
    prepare: Callable[[], None] = lambda: None


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of one call, and its result."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def best_times(contestants: Sequence[Contestant], seconds: float) -> dict[str, float]:
    """The shortest time of each contestant, all of them checked first.

    They take turns for about ``seconds``, so that a busy moment of the machine hits all alike; short ones run several
    times a turn. Whoever needs more than ``seconds`` runs once: the checked run is then the timed one.
    """
    best = {}
    for contestant in contestants:
        contestant.prepare()
        best[contestant.name], result = timed(contestant.run)
        contestant.check(result)
    end = time.perf_counter() + seconds
    quick = [c for c in contestants if best[c.name] < seconds]
    while quick and time.perf_counter() < end:
        for contestant in quick:
            for _ in range(int(min(20, max(1, 0.02 / best[contestant.name])))):
                contestant.prepare()
                best[contestant.name] = min(best[contestant.name], timed(contestant.run)[0])
    return best


@dataclass(frozen=True)
class Limits:
    """What this machine can do at most with the threads in use, measured in this run.

    Attributes:
        adds, fmas: float operations per second, each kind alone.
        adds_and_fmas: pairs of one addition and one fused multiply-add per second.
        copy: bytes per second, read and written, of a copy much larger than the caches.
    """

    adds: float
    fmas: float
    adds_and_fmas: float
    copy: float

    @classmethod
    def measure(cls, before: Limits | None = None) -> Limits:
        """The best of several short runs, and of what was measured ``before``."""
        from mfp import _C  # type: ignore[attr-defined]  # the compiled part

        source = torch.ones(32 << 20)
        target = torch.empty_like(source)
        copy = min(timed(lambda: target.copy_(source))[0] for _ in range(5))
        rates = {**_C.measure_limits(torch.get_num_threads()), "copy": 2 * source.nbytes / copy}
        return cls(**{name: max(rate, getattr(before, name, 0.0)) for name, rate in rates.items()})


def machine() -> dict[str, Any]:
    """What a number must stand with: processor, threads, instruction set, versions, date."""
    info = backend.build_info()
    if info is None:
        raise MfpError("mfp bench measures the compiled kernels, and they were not built (mfp info says why)")
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "instructions": info["cpu_isa"],
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }
