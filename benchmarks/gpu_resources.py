"""What the compiler made of the CUDA kernels, and the time that this predicts for ResNet-50 on an H100.

python benchmarks/gpu_resources.py    needs nvcc, and cuobjdump from the toolkit or from triton's package; no GPU

Prints, for sm_90: registers, spills, shared memory and blocks a multiprocessor of every kernel; the instructions in the
inner loops of the scoring kernels; and a prediction from these counts. docs/kernels.md explains the numbers.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
TILE, STAGE, THREADS = 64, 32, 128
RATE = 0.4
# One H100 SXM: multiprocessors, float32 lanes each, clock under load in GHz, registers and shared memory of one.
PROCESSORS, LANES, CLOCK, REGISTERS, SHARED = 132, 128, 1.755, 65536, 227 * 1024
STAGE_INSTRUCTIONS = 300  # of a thread, a stage: 8 asynchronous copies, a barrier, half of the time the block sums
BANDWIDTH, L2_BANDWIDTH = 3.0e12, 5.5e12  # bytes/s: of a copy, and from L2 to the multiprocessors
# TF32 products a clock: mma.sync reaches about 0.62 of the 494 TFLOP/s that Hopper's own instructions reach.
TENSOR_RATE = 0.62 * 494e12 / 2
EFFICIENCY = 0.9  # of the tightest limit that a kernel of this kind is expected to reach
RESNET50 = [
    (64, 147), (64, 64), (256, 64), (64, 256), (64, 256), (128, 256), (512, 256), (256, 512), (1024, 512), (512, 1024),
    (2048, 1024), *[(64, 576)] * 3, *[(256, 64)] * 3, *[(128, 512)] * 3, *[(128, 1152)] * 4, *[(512, 128)] * 4,
    *[(256, 1024)] * 5, *[(256, 2304)] * 6, *[(1024, 256)] * 6, *[(512, 2048)] * 2, *[(512, 4608)] * 3,
    *[(2048, 512)] * 3,
]  # fmt: skip  # (filters, weights of one) of the 53 conv layers of torchvision's resnet50


def cuobjdump() -> str:
    found = shutil.which("cuobjdump")
    spec = None if found else importlib.util.find_spec("triton")
    if spec is not None:
        found = str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    if not found:
        raise SystemExit("cuobjdump was not found, neither on PATH nor in triton's package")
    return found


def compile_kernels(name: str, folder: Path, architecture: int = 90) -> tuple[str, Path]:
    """ptxas's report on a file of csrc/cuda, and the object."""
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    built = folder / f"{name}.{architecture}.o"
    command = ["nvcc", "-O3", "-std=c++17", f"-I{ROOT / 'csrc'}", target, "-Xptxas", "-v", "-c",
               str(ROOT / "csrc" / "cuda" / name), "-o", str(built)]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr, built


def readable(symbol: str) -> str:
    """``score_kernel<1,0>`` and the like from a mangled name."""
    name = re.search(r"_cu_[0-9a-f]{8}\d+([a-z]+_kernel)", symbol)[1]
    flags = "".join(re.findall(r"Lb([01])E", symbol))
    number = re.search(r"(Float32|Bfloat16|Float16|Sgd|Adamw)", symbol.split(name)[1])
    inside = ",".join(flags) or (number[1] if number else "")
    return f"{name}<{inside}>" if inside else name


def resources(report: str) -> dict[str, tuple[int, int]]:
    """Registers and bytes spilled of each kernel."""
    found = {}
    for part in report.split("Compiling entry function '")[1:]:
        spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", part))
        found[readable(part.split("'")[0])] = (int(re.search(r"Used (\d+) registers", part)[1]), spills)
    return found


def inner_loops(built: Path) -> dict[str, list[Counter]]:
    """For each kernel the innermost loops with much arithmetic: how often each instruction occurs."""
    text = subprocess.run(
        [cuobjdump(), "-arch", "sm_90", "-sass", str(built)], capture_output=True, text=True, check=True
    ).stdout
    found = {}
    for function in re.split(r"\n\s*Function : ", text)[1:]:
        code = re.findall(
            r"/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)[^;\n]*?(?:0x([0-9a-f]+)\s*)?;", function
        )
        places = [int(at, 16) for at, _, _ in code]
        loops = [
            (int(goal, 16), at)
            for at, (_, name, goal) in zip(places, code, strict=True)
            if name == "BRA" and goal and int(goal, 16) < at
        ]
        innermost = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
        counts = [
            Counter(name for at, (_, name, _) in zip(places, code, strict=True) if begin <= at <= end)
            for begin, end in innermost
        ]
        name = readable(function.split("\n")[0])
        found[name] = [c for c in counts if c["HMMA"] or (c["FADD"] + c["FFMA"] >= 128 and not c["MUFU"])]
    return found


def pair_elements() -> tuple[float, float]:
    """Over all of ResNet-50: needed (a triangle a layer), computed (whole tiles, 3/4 of those on the diagonal)."""
    needed = sum(n * (n + 1) / 2 * k for n, k in RESNET50)
    computed = 0.0
    for n, k in RESNET50:
        tiles, depth = -(-n // TILE), -(-k // STAGE) * STAGE
        computed += (tiles * (tiles - 1) / 2 + 0.75 * tiles) * TILE * TILE * depth
    return needed, computed


def main() -> None:
    assert (len(RESNET50), sum(n for n, _ in RESNET50)) == (53, 26560)
    needed, computed = pair_elements()
    weights = 4 * sum(n * k for n, k in RESNET50)
    shared = 2 * 2 * TILE * (STAGE + 4) * 4 + 3 * 2 * TILE * 4 + 128
    print("| kernel | registers | bytes spilled | blocks a multiprocessor |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        loops: dict[str, list[Counter]] = {}
        for name in ("score.cu", "mask.cu", "optim.cu", "scatter.cu"):
            report, built = compile_kernels(name, Path(folder))
            for kernel, (registers, spills) in resources(report).items():
                threads = THREADS if name == "score.cu" else 256
                by_registers = REGISTERS // (-(-registers // 8) * 8 * threads)
                blocks = min(by_registers, SHARED // (shared + 1024)) if name == "score.cu" else by_registers
                print(f"| `{kernel}` | {registers} | {spills} | {min(blocks, 2048 // threads)} |")
            if name == "score.cu":
                loops = inner_loops(built)
    print("\n| inner loop | pair elements | FADD | FFMA | HMMA | LDS | other | instructions a pair element |")
    print("|---|---|---|---|---|---|---|---|")
    rate = PROCESSORS * LANES * CLOCK * 1e9
    from_l2 = computed / TILE**2 * 2 * TILE * 4 / L2_BANDWIDTH
    rows = []
    for kernel, what, arithmetic in (
        ("score_kernel<1,1>", "five criteria", 3),
        ("score_kernel<1,0>", "l1 alone", 2),
        ("score_kernel<0,1>", "l2 alone", 0),
    ):
        loop = max(loops[kernel], key=lambda c: (c["HMMA"], c["FADD"] + c["FFMA"]))
        # three TF32 products of 16 x 8 x 8 cover 32 pair elements of each thread
        pairs = loop["HMMA"] / 3 * 32 or (loop["FADD"] + loop["FFMA"]) / arithmetic
        counted = [loop[name] for name in ("FADD", "FFMA", "HMMA", "LDS")]
        each = loop.total() / pairs
        numbers = " | ".join(map(str, (*counted, loop.total() - sum(counted))))
        print(f"| {what} | {pairs:.0f} | {numbers} | {each:.3f} |")
        instructions = each + STAGE_INSTRUCTIONS / (TILE * TILE / THREADS * STAGE)
        issue, tensor = computed * instructions / rate, 3 * computed / TENSOR_RATE if loop["HMMA"] else 0.0
        floor = needed * arithmetic / rate if arithmetic else 3 * needed / TENSOR_RATE
        norms = 0.0 if what == "l1 alone" else weights / BANDWIDTH
        end = 30e-6 + (RATE * weights / BANDWIDTH if what == "five criteria" else 0.0)  # last tile; rows to zero
        predicted = max(issue, tensor, from_l2) / EFFICIENCY + norms + end
        rows.append((what, floor, issue, tensor, from_l2, norms, end, predicted))
    columns = ("job (ms)", "floor", "issue", "tensor cores", "L2", "norms", "end", "predicted")
    print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for what, *seconds in rows:
        print(f"| {what} | {' | '.join(f'{1e3 * value:.2f}' for value in seconds)} |")
    print(f"\nPair elements: {needed / 1e9:.2f} G needed, {computed / 1e9:.2f} G computed.")


if __name__ == "__main__":
    main()
