"""`make gpu`: build, test and measure mfp on the GPU at hand. Under nine minutes, no network.

python3 benchmarks/gpu.py [--skip-build] [--skip-tests]

Uses the python that runs it and what is installed there: torch >= 2.11, pybind11, setuptools, pytest, nvcc for the CUDA
backend (without it, Triton alone is tested and measured). Writes benchmarks/results/gpu-<name>-<date>.json and .md.
Without a GPU it does everything up to the first call that needs one, says so, and ends with status 0.

Times are medians of CUDA events over inputs that are renewed before each call (so they are not in L2, and a pruned
network is never pruned again); the peers are torch's own operators, layer by layer, in the same run.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD_NEEDS = ("pybind11", "setuptools", "wheel", "ninja", "numpy", "safetensors")
TEST_FILES = ("tests/test_gpu.py", "tests/test_cuda_logic.py", "tests/test_triton_compile.py")
RATE = 0.4
DEVICE = "cuda"


def step(title: str) -> None:
    print(f"\n== {title} [{time.strftime('%H:%M:%S')}]", flush=True)


def missing(names: tuple[str, ...]) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name) is None]


def environment() -> dict[str, str]:
    """For every command that is started here: build for this GPU alone."""
    import torch

    variables = dict(os.environ)
    if torch.cuda.is_available():
        variables.setdefault("TORCH_CUDA_ARCH_LIST", "{}.{}".format(*torch.cuda.get_device_capability()))
    return variables


def build() -> None:
    step("build")
    lacking = missing(BUILD_NEEDS)
    if lacking:
        sys.exit(f"cannot build: {', '.join(lacking)} not installed for {sys.executable}")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "-q",
        "-e",
        str(ROOT),
    ]
    subprocess.run(command, check=True, cwd=ROOT, env=environment())


def run_tests() -> dict[str, str]:
    """Outcomes of the test files, and of memcheck and racecheck where compute-sanitizer is installed."""
    outcomes = {}
    step("tests")
    command = [sys.executable, "-m", "pytest", "-m", "gpu or not gpu", *TEST_FILES]
    run = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    print(run.stdout[-3000:])
    outcomes["pytest"] = run.stdout.strip().splitlines()[-1] if run.stdout.strip() else run.stderr[-500:]
    if run.returncode:
        sys.exit("tests failed; nothing is measured")
    sanitizer = shutil.which("compute-sanitizer")
    for tool in ("memcheck", "racecheck"):
        if sanitizer is None:
            outcomes[tool] = "compute-sanitizer is not installed"
            continue
        step(tool)
        chosen = "test_pruning_is_that_of_the_reference and cuda and 3 or test_a_pruner_on_the_gpu"
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest",
                   "tests/test_gpu.py", "-k", chosen]  # fmt: skip
        run = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=180)
        outcomes[tool] = "clean" if run.returncode == 0 else f"status {run.returncode}: {run.stdout[-800:]}"
        print(outcomes[tool])
    return outcomes


class Network:
    """ResNet-50's conv weights with random values, and copies to renew them from."""

    def __init__(self) -> None:
        import torch
        from gpu_resources import RESNET50

        torch.manual_seed(0)
        self.start = [torch.randn(n, k, device=DEVICE) * k**-0.5 for n, k in RESNET50]
        self.weights = [weight.clone() for weight in self.start]
        self.grads = [torch.randn_like(weight) for weight in self.start]
        self.states = [[torch.zeros_like(weight) for weight in self.start] for _ in range(2)]
        self.counts = [n for n, _ in RESNET50]
        self.num_pruned = [int(n * RATE) for n in self.counts]
        self.offsets = [sum(self.counts[:i]) for i in range(len(self.counts))]
        self.keep = torch.rand(sum(self.counts), device=DEVICE) >= RATE
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)

    def renew(self) -> None:
        import torch

        torch._foreach_copy_(self.weights, self.start)
        self.flush.zero_()


def median_ms(run: Callable[[], object], prepare: Callable[[], None], repeats: int = 21) -> float:
    """Median time of a call on the GPU; `prepare` is not timed."""
    import torch

    times = []
    for index in range(repeats + 3):  # the first three warm up
        prepare()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(200_000)  # the launch is queued while the GPU is busy, so that the host's time is not counted
        begin.record()
        run()
        end.record()
        end.synchronize()
        if index >= 3:
            times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def torch_scores(network: Network, names: tuple[str, ...]) -> list:
    """The peers: torch's own operators, one layer after the other."""
    import torch
    from torch.nn.functional import normalize

    ways = {
        "l1_norm": lambda w: w.abs().sum(1),
        "l2_norm": lambda w: torch.linalg.vector_norm(w, dim=1),
        "l1_distance": lambda w: torch.cdist(w, w, p=1).sum(1),
        "l2_distance": lambda w: torch.cdist(w, w).sum(1),
        "cosine_distance": lambda w: (1 - normalize(w) @ normalize(w).T).sum(1),
    }
    return [ways[name](weight) for name in names for weight in network.weights]


def torch_prune(network: Network, names: tuple[str, ...]) -> None:
    torch_scores(network, names)
    for weight, count in zip(network.weights, network.num_pruned, strict=True):
        weight[weight.abs().sum(1).argsort()[:count]] = 0


def measure(backends: list[str]) -> list[dict]:
    """Rows of the table: job, contestant, milliseconds."""
    import torch

    import mfp
    from mfp import criteria, ops

    network, rows = Network(), []
    five = mfp.criteria.PAPER_CRITERIA

    def codes(names):
        known = [criteria.criterion(name) for name in names]
        return [int(c.kind) for c in known], [c.exponent for c in known]

    def add(job, contestant, run, prepare=network.renew, repeats=21):
        rows.append({"job": job, "contestant": contestant, "ms": median_ms(run, prepare, repeats)})
        print(f"{job:42} {contestant:14} {rows[-1]['ms']:9.3f} ms", flush=True)

    def pruning(name):
        return lambda: ops.prune_filters_(network.weights, [], [], network.num_pruned, *codes(five), 3, backend=name)

    for name in backends:
        add("five criteria, selection and zeroing", name, pruning(name))
    add("five criteria, selection and zeroing", "torch loops", lambda: torch_prune(network, five), repeats=3)
    jobs = [("l2_distance",), ("l1_distance",), ("cosine_distance",), ("l1_norm", "l2_norm"), five, ("l3_distance",)]
    for names in jobs:
        for name in backends:
            run = lambda name=name, names=names: ops.score_filters(network.weights, *codes(names), backend=name)  # noqa: E731
            add(" + ".join(names) if names != five else "five criteria, scores alone", name, run, repeats=9)
        if set(names) <= set(five) and names != five:
            add(" + ".join(names), "torch loops", lambda names=names: torch_scores(network, names), repeats=5)

    from mfp import kernels

    masks = (network.keep, network.offsets, network.counts)
    sgd = (0.1, 0.9, 0.0, 1e-4, False, False, False)
    adamw = (1e-3, 0.9, 0.999, 1e-8, 0.01, False, 10)
    for name in backends:
        module = kernels if name == "triton" else torch.ops.mfp
        add("mask all weights", name, lambda name=name: ops.mask_filters_(network.weights, *masks, backend=name))
        for keep, what in ((masks, "mask of 40 %"), ((None, *masks[1:]), "no mask")):
            tensors = (network.weights, network.grads, network.states[0])
            run = lambda m=module, k=keep, t=tensors: m.masked_sgd_(*t, *k, *sgd)  # noqa: E731
            add(f"SGD step, {what}", name, run)
            run = lambda m=module, k=keep, t=tensors: m.masked_adamw_(*t, network.states[1], *k, *adamw)  # noqa: E731
            add(f"AdamW step, {what}", name, run)
    for optimizer, job in (
        (torch.optim.SGD(network.weights, lr=0.1, momentum=0.9, weight_decay=1e-4, fused=True), "SGD step, no mask"),
        (torch.optim.AdamW(network.weights, lr=1e-3, fused=True), "AdamW step, no mask"),
    ):
        for weight, grad in zip(network.weights, network.grads, strict=True):
            weight.grad = grad
        add(job, "torch fused", optimizer.step)

    residual = torch.randn(64, 2048, 14, 14, device=DEVICE).contiguous(memory_format=torch.channels_last)
    index = torch.arange(0, 2048, 2, device=DEVICE)
    branch = torch.randn(64, 1024, 14, 14, device=DEVICE).contiguous(memory_format=torch.channels_last)
    for name in backends:
        add_ = (kernels if name == "triton" else torch.ops.mfp).scatter_add_
        add("join of 1,024 into 2,048 channels + ReLU", name, lambda add_=add_: add_(residual, branch, index, True))
    add("join of 1,024 into 2,048 channels + ReLU", "torch", lambda: residual.index_add_(1, index, branch).relu_())
    return rows


def limits() -> dict[str, float]:
    """What the device can do at most, measured in this run."""
    import torch

    source = torch.empty(1 << 28, device=DEVICE)  # 1 GiB
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / median_ms(lambda: target.copy_(source), lambda: None) / 1e9
    torch.backends.cuda.matmul.allow_tf32 = False
    a = torch.randn(8192, 8192, device=DEVICE)
    fma = 8192**3 / median_ms(lambda: a @ a, lambda: None, 5) / 1e9
    return {"copy, TB/s (read and written)": copy, "float32 matrix product, T FMA/s": fma}


def serving() -> list[dict]:
    """Dense and compact ResNet-50 in float16, channels_last, in the engines that run on this GPU."""
    from rich.console import Console

    from mfp.bench.engines import measure_networks
    from mfp.export.engines import installed

    engines = [name for name in ("torch.compile", "tensorrt") if installed(name)]
    return measure_networks(["resnet50"], engines, 0.4, (1, 64), Console(), "cuda")["rows"]


def summary(rows: list[dict], most: dict[str, float]) -> list[str]:
    """Goals beside what was measured."""
    from gpu_resources import RESNET50

    times = {(row["job"], row["contestant"]): row["ms"] for row in rows}
    lines = []
    for job, contestant, goal in (
        ("five criteria, selection and zeroing", "cuda", 1.6), ("l2_distance", "cuda", 0.4)
    ):  # fmt: skip
        if (job, contestant) in times:
            lines.append(f"- {job}: {times[job, contestant]:.2f} ms, goal {goal} ms on one H100")
    if ("SGD step, no mask", "cuda") in times:
        moved = 5 * 4 * sum(n * k for n, k in RESNET50) / times["SGD step, no mask", "cuda"] / 1e9
        share = moved / most["copy, TB/s (read and written)"]
        lines.append(f"- SGD step: {moved:.2f} TB/s, {share:.0%} of a copy, goal 85 %")
    return lines


def write_results(rows: list[dict], served: list[dict], tests: dict[str, str], most: dict[str, float]) -> None:
    import torch

    facts = {
        "gpu": torch.cuda.get_device_name(), "date": datetime.date.today().isoformat(), "command": "make gpu",
        "torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version(),
    }  # fmt: skip
    folder = ROOT / "benchmarks" / "results"
    folder.mkdir(exist_ok=True)
    stem = folder / f"gpu-{facts['gpu'].replace(' ', '-').lower()}-{facts['date']}"
    everything = {**facts, "tests": tests, "limits": most, "times": rows, "serving": served}
    stem.with_suffix(".json").write_text(json.dumps(everything, indent=1) + "\n")
    lines = [f"# {facts['gpu']}, {facts['date']}", "", f"`make gpu`; torch {facts['torch']}, CUDA {facts['cuda']}, "
             f"Python {facts['python']}. ResNet-50, float32, medians.", ""]  # fmt: skip
    lines += [*summary(rows, most), "", *(f"- {name}: {value:.2f}" for name, value in most.items()), ""]
    lines += ["| job | contestant | ms |", "|---|---|---|"]
    lines += [f"| {row['job']} | {row['contestant']} | {row['ms']:.3f} |" for row in rows]
    lines += [
        "",
        "| engine, float16 | batch | residual | FLOPs kept | dense, ms | compact, ms |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['engine']} | {row['batch']} | {row['residual']} | {row['flops_kept']:.3f} | {row['dense_ms']:.3f} "
        f"| {row['compact_ms']:.3f} |" for row in served
    ]  # fmt: skip
    lines += ["", *(f"- {name}: {outcome}" for name, outcome in tests.items())]
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"\nwritten: {stem}.json and .md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--skip-build", action="store_true", help="use the mfp that is installed")
    parser.add_argument("--skip-tests", action="store_true")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import torch

    print(f"Python {platform.python_version()}, torch {torch.__version__}, nvcc: {shutil.which('nvcc') or 'not found'}")
    if not options.skip_build:
        build()
    importlib.invalidate_caches()
    from mfp import backend

    for record in backend.backends().values():
        print(f"backend {record.name}: {record.unusable or 'usable'}")
    if not torch.cuda.is_available():
        print("\nNo GPU here: what needs one (tests, measurements) was left out. Everything before it is in order.")
        return
    tests = {} if options.skip_tests else run_tests()
    step("measurements")
    names = [name for name in ("cuda", "triton") if backend.backends()[name].unusable is None]
    write_results(measure(names), serving(), tests, limits())


if __name__ == "__main__":
    main()
