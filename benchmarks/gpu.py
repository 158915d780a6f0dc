"""`make gpu`: build, test and measure mfp on the GPU at hand. At most nine minutes, no network.

python3 benchmarks/gpu.py [--dry-run] [--only STEP ...] [--seconds 540] [--output FOLDER] [--study-data KIND:PATH]

Uses the python that runs it and what is installed there: torch >= 2.11, pybind11, setuptools, pytest, nvcc for the
CUDA backend (without it, Triton alone is tested and measured). Steps run in the order of what they are worth, each in a
process of its own; one that takes longer than its budget is ended, with all that it started, and the rest goes on. The
rows that are there are written to FOLDER/gpu-<name>-<date>.json (default: benchmarks/results) every few seconds.

--dry-run needs no GPU: what a CPU can run of the steps, with tiny inputs; results under build/gpu.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "gpu"  # logs of the steps
BUILD_NEEDS = ("pybind11", "setuptools", "wheel", "ninja", "numpy", "safetensors")
PYTHON = sys.executable
PYTEST = ("-m", "pytest", "-vv", "--tb=short", "-p", "no:cacheprovider", "tests/test_gpu.py")
# With few and small launches, under a tool that makes them many times slower.
SANITIZED = "test_pruning_is_that_of_the_reference and cuda and 3 or test_masks_and_steps or test_scatter_add and cuda"
DRY_SECONDS = 300.0  # of a step; a CPU may be busy with other things
TICK = 5.0  # seconds between two writes of the results


@dataclass(frozen=True)
class Step:
    """What runs, for how long at most, and why it is worth it.

    Attributes:
        seconds: its budget.
        command: given the options; None: not on this machine.
    """

    name: str
    seconds: float
    about: str
    command: Callable[[argparse.Namespace], list[str] | None]


def build(options: argparse.Namespace) -> list[str] | None:
    if options.dry_run:
        return None
    command = "-m pip install --no-build-isolation --no-deps --no-index -q -e"
    return [PYTHON, *command.split(), str(ROOT)]


def tests(options: argparse.Namespace) -> list[str]:
    workers = ["-n", "4"] if importlib.util.find_spec("xdist") and not options.dry_run else []
    return [PYTHON, *PYTEST, *workers]


def script(*names: str) -> Callable[[argparse.Namespace], list[str]]:
    def command(options: argparse.Namespace) -> list[str]:
        device = "cpu" if options.dry_run else "cuda"
        rows = str(WORK / "rows.jsonl")
        return [PYTHON, str(ROOT / "benchmarks" / names[0]), *names[1:], "--device", device, "--rows", rows]

    return command


def sanitizer(tool: str) -> Callable[[argparse.Namespace], list[str] | None]:
    def command(options: argparse.Namespace) -> list[str] | None:
        found = shutil.which("compute-sanitizer")
        if found is None:
            return None
        return [found, "--tool", tool, "--error-exitcode", "9", PYTHON, *PYTEST, "-k", SANITIZED]

    return command


def study(options: argparse.Namespace) -> list[str] | None:
    file = ROOT / "benchmarks" / "study.py"
    if options.study_data is None or not file.exists():
        return None
    return [PYTHON, str(file), "--data", options.study_data, "--output", str(options.output / "gpu-study")]


STEPS = (
    Step("build", 120, "the extension, for this GPU alone", build),
    Step("tests", 80, "against the oracle; 1,000 launches with equal bits; streams; graph capture", tests),
    Step("kernels", 80, "the goals of the scoring, masking and optimiser kernels; a pruning point",
         script("gpu_kernels.py")),
    Step("networks", 80, "compact ResNet-50 in float16 and bfloat16: right, and how fast in CUDA graphs",
         script("gpu_networks.py", "eager")),
    Step("memcheck", 40, "compute-sanitizer: accesses out of bounds", sanitizer("memcheck")),
    Step("racecheck", 40, "compute-sanitizer: races in shared memory", sanitizer("racecheck")),
    Step("compiled", 100, "the same networks through torch.compile", script("gpu_networks.py", "compiled")),
    Step("study", 540, "benchmarks/study.py on the data that is given, in what time is left", study),
)  # fmt: skip


def environment(dry_run: bool) -> dict[str, str]:
    """For every step: build for this GPU alone, and print at once."""
    import torch

    variables = dict(os.environ) | {"PYTHONUNBUFFERED": "1"}
    if dry_run:
        variables["MFP_TEST_DEVICE"] = "cpu"
    elif torch.cuda.is_available():
        variables.setdefault("TORCH_CUDA_ARCH_LIST", "{}.{}".format(*torch.cuda.get_device_capability()))
    return variables


def run(command: list[str], seconds: float, log: Path, tick: Callable[[], None], env: dict[str, str]) -> str:
    """``ok``, ``status N``, or ``ended after N s``: the process and all that it started are gone then."""
    end = time.monotonic() + seconds
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while time.monotonic() < end:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = process.wait(max(0.0, min(TICK, end - time.monotonic())))
                    return "ok" if status == 0 else f"status {status}"
                tick()
            return f"ended after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class Results:
    """The rows of all steps, and the file that they are written to."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch

        self.device, self.driver = "none: a dry run on the CPU", "none"
        if not options.dry_run:
            self.device, self.driver = torch.cuda.get_device_name(), driver()
        name = "dry-run" if options.dry_run else re.sub(r"\W+", "-", self.device.lower())
        self.path = options.output / f"gpu-{name}-{date.today().isoformat()}.json"
        self.rows: list[dict] = []
        (WORK / "rows.jsonl").unlink(missing_ok=True)
        self.known = 0

    def collect(self, step: str) -> None:
        """Take the rows that the step has written by now, and write the file if there are any."""
        file = WORK / "rows.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        if len(whole) > self.known:
            self.rows += [{"step": step} | json.loads(line) for line in whole[self.known :]]
            self.known = len(whole)
            self.write()

    def add(self, **row) -> None:
        self.rows.append(row)
        self.write()

    def write(self) -> None:
        try:
            from mfp.bench import results
        except ImportError as error:
            print(f"nothing written: {error}")
            return
        command = "make gpu" + (" ARGS=--dry-run" if self.driver == "none" else "")
        about = f"{self.device}, driver {self.driver}; {results.machine()}, Python {platform.python_version()}"
        results.write(self.path, command, self.rows, machine=about)


def driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def outcomes(log: Path) -> dict[str, int | str]:
    """How many tests passed, failed and were skipped by pytest's log, and which failed; an ended run has them too."""
    ends = "PASSED|FAILED|ERROR|SKIPPED"
    found = re.findall(rf"(tests/\S+::.+?) ({ends})|({ends}) (tests/\S+)", log.read_text(errors="replace"))
    by_test = {a or d: b or c for a, b, c, d in found}
    counts: dict[str, int | str] = {
        word.lower(): sum(value == word for value in by_test.values()) for word in ("PASSED", "FAILED", "SKIPPED")
    }
    failed = [test for test, word in by_test.items() if word in ("FAILED", "ERROR")]
    return counts | ({"failures": "; ".join(failed)} if failed else {})


def goals(rows: list[dict]) -> list[str]:
    """What was measured beside what was to be reached, on one H100."""
    ms = {(row.get("job"), row.get("contestant")): row["ms"] for row in rows if "ms" in row}
    lines = []
    for job, goal in (("five criteria, selection and zeroing", 1.6), ("l2_distance", 0.4)):
        ours, loops = (ms.get((job, contestant)) for contestant in ("cuda", "torch loops"))
        if ours is not None:
            lines.append(f"{job}: {ours:.2f} ms, goal {goal} ms; torch loops {loops or float('nan'):.2f} ms")
    masked, fused = ms.get(("SGD step, mask of 40 %", "cuda")), ms.get(("SGD step, no mask", "torch fused"))
    if masked and fused:
        lines.append(f"masked SGD step: {masked / fused:.2f} of torch's fused one without a mask, goal 0.8")
    for row in rows:
        if "share_of_epoch" in row:
            lines.append(f"{row['job']}, {row['contestant']}: {row['share_of_epoch']:.2%} of five minutes, goal 1 %")
        if "saved_of_flops" in row and row["batch"] == 256:
            what = f"{row['way']}, {row['form']}, {row['dtype']}, batch {row['batch']}"
            lines.append(f"{what}: time saved / FLOPs saved {row['saved_of_flops']:.2f}, goal 0.85")
    return lines


def run_steps(options: argparse.Namespace) -> int:
    end = time.monotonic() + (DRY_SECONDS * len(STEPS) if options.dry_run else options.seconds)
    results, failed = Results(options), 0
    env = environment(options.dry_run)
    for step in STEPS:
        command = step.command(options) if not options.only or step.name in options.only else None
        if command is None:
            print(f"-- {step.name}: left out", flush=True)
            continue
        seconds = min(DRY_SECONDS if options.dry_run else step.seconds, end - time.monotonic())
        if seconds <= 0:
            results.add(step=step.name, outcome="no time left")
            continue
        print(f"== {step.name}, at most {seconds:.0f} s: {step.about}", flush=True)
        log, start = WORK / f"{step.name}.log", time.monotonic()
        outcome = run(command, seconds, log, lambda step=step: results.collect(step.name), env)
        results.collect(step.name)
        took = time.monotonic() - start
        counts = outcomes(log) if "pytest" in command else {}
        results.add(step=step.name, outcome=outcome, seconds=round(took, 1), budget=step.seconds, **counts)
        print(f"{outcome}, {took:.1f} s {counts or ''}", flush=True)
        if outcome != "ok":
            failed += 1
            print("\n".join(log.read_text(errors="replace").splitlines()[-30:]))
        if step.name == "build" and outcome != "ok":
            print("nothing was built; the rest is left out")
            break
    print("\n".join(["", *goals(results.rows), f"written: {results.path}"]))
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="what a CPU can run of the steps, with tiny inputs")
    parser.add_argument("--only", nargs="+", choices=[step.name for step in STEPS], help="these steps alone")
    parser.add_argument("--seconds", type=float, default=540, help="for all steps (default: 540)")
    parser.add_argument("--output", type=Path, help="folder of the results (default: benchmarks/results)")
    parser.add_argument("--study-data", help="data for benchmarks/study.py, e.g. fashion-mnist:PATH")
    options = parser.parse_args()
    options.output = options.output or (WORK if options.dry_run else ROOT / "benchmarks" / "results")
    import torch

    print(f"Python {platform.python_version()}, torch {torch.__version__}, nvcc: {shutil.which('nvcc') or 'not found'}")
    if not options.dry_run and not torch.cuda.is_available():
        print("No GPU here: --dry-run runs what can be run without one.")
        return 0
    lacking = [name for name in BUILD_NEEDS if importlib.util.find_spec(name) is None]
    if lacking and not options.dry_run:
        return f"cannot build: {', '.join(lacking)} not installed for {PYTHON}"
    sys.path.insert(0, str(ROOT))  # an mfp that is built now would not be found otherwise
    WORK.mkdir(parents=True, exist_ok=True)
    options.output.mkdir(parents=True, exist_ok=True)
    return run_steps(options)


if __name__ == "__main__":
    sys.exit(main())
