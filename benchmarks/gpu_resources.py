"""What the compiler made of the CUDA kernels, and the time that this predicts for ResNet-50 on an H100.

python benchmarks/gpu_resources.py    needs mfp built with CUDA, and cuobjdump (triton's package has one); no GPU

Prints, for each architecture: registers and blocks a multiprocessor of every kernel; the instructions in the inner
loops of the scoring kernels; and a prediction from these counts for sm_90. docs/kernels.md has the tables, and
tests/test_compile_cuda.py compares them.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path

TILE, STAGE, THREADS = 64, 32, 128
RATE = 0.4
# One H100 SXM: multiprocessors, float32 lanes each, clock under load in GHz.
PROCESSORS, LANES, CLOCK = 132, 128, 1.755
REGISTERS, MOST_THREADS = 65536, 2048  # of a multiprocessor of any of these architectures
SHARED = {"80": 164 * 1024, "90": 228 * 1024, "100": 228 * 1024}  # bytes of a multiprocessor; a block has 1 KB more
BLOCK_MEMORY = 2 * 2 * TILE * (STAGE + 4) * 4 + 3 * 2 * TILE * 4 + 128  # bytes a block of a scoring kernel asks for
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
SCORING = (  # kernel, job, operations of a pair element (0: on the tensor cores)
    ("score_kernel<1,1>", "five criteria", 3),
    ("score_kernel<1,0>", "`l1_distance` alone", 2),
    ("score_kernel<0,1>", "`l2_distance` alone", 0),
)


def cuobjdump() -> str:
    found = shutil.which("cuobjdump")
    spec = None if found else importlib.util.find_spec("triton")
    if spec is not None:
        found = str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    if not found:
        raise SystemExit("cuobjdump was not found, neither on PATH nor in triton's package")
    return found


def readable(symbol: str) -> str:
    """``score_kernel<1,0>`` and the like from a mangled name."""
    name = re.search(r"_cu_[0-9a-f]{8}\d+([a-z]+_kernel)", symbol)[1]
    flags = "".join(re.findall(r"Lb([01])E", symbol))
    number = re.search(r"(Float32|Bfloat16|Float16|Sgd|Adamw)", symbol.split(name)[1])
    inside = ",".join(flags) or (number[1] if number else "")
    return f"{name}<{inside}>" if inside else name


@cache
def resources(library: Path) -> dict[str, dict[str, tuple[str, dict[str, int]]]]:
    """{architecture: {kernel: (source file, {"REG": registers, "STACK": bytes of what does not fit there, ...})}}"""
    command = [cuobjdump(), "-res-usage", str(library)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, dict[str, tuple[str, dict[str, int]]]] = {}
    for part in text.split("arch = sm_")[1:]:
        source = re.search(r"identifier = .*/(\w+\.cu)", part)[1]
        for name, usage in re.findall(r"Function (\w+):\s+(REG.*)", part):
            numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
            found.setdefault(part.split()[0], {})[readable(name)] = (source, numbers)
    return found


def threads_of(kernel: str) -> int:
    return THREADS if kernel.startswith("score") else 256


def blocks(kernel: str, registers: int, architecture: str) -> int:
    """That a multiprocessor holds at once: by registers, which go in units of 8 a thread, shared memory and threads."""
    threads = threads_of(kernel)
    by_registers = REGISTERS // (-(-registers // 8) * 8 * threads)
    by_memory = SHARED[architecture] // (BLOCK_MEMORY + 1024) if kernel.startswith("score") else by_registers
    return min(by_registers, by_memory, MOST_THREADS // threads)


@cache
def disassembly(library: Path, architecture: str) -> dict[str, str]:
    """The machine code of each kernel."""
    command = [cuobjdump(), "-arch", f"sm_{architecture}", "-sass", str(library)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {readable(part.split("\n")[0]): part for part in re.split(r"\n\s*Function : ", text)[1:]}


def accesses(code: str) -> Counter:
    """How often a kernel's code loads and stores, by the size of the access: ``LD.128``, ``ST.32``, ``LD.U8``, …"""
    found = re.findall(r"\s(LD|ST)G?\.E((?:\.\w+)*)", code)
    sizes = [(kind, re.search(r"\.(U8|S8|U16|S16|64|128)\b", rest)) for kind, rest in found]
    return Counter(f"{kind}.{size[1] if size else 32}" for kind, size in sizes)


def inner_loops(library: Path, architecture: str = "90") -> dict[str, list[Counter]]:
    """For each kernel the innermost loops with much arithmetic: how often each instruction occurs."""
    found = {}
    for name, function in disassembly(library, architecture).items():
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


def longest_loop(loops: dict[str, list[Counter]], kernel: str) -> Counter:
    return max(loops[kernel], key=lambda c: (c["HMMA"], c["FADD"] + c["FFMA"]))


def resource_table(library: Path) -> list[str]:
    """A row a kernel: registers of a thread and blocks of a multiprocessor, by architecture."""
    found = resources(library)
    architectures = sorted(found, key=int)
    lines = [f"| kernel, threads | {' | '.join(f'sm_{a}' for a in architectures)} |", "|---" * (1 + len(found)) + "|"]
    for kernel in sorted(found[architectures[0]]):
        used = ((a, found[a][kernel][1]["REG"]) for a in architectures)
        cells = (f"{registers}, {blocks(kernel, registers, a)}" for a, registers in used)
        lines.append(f"| `{kernel}`, {threads_of(kernel)} | {' | '.join(cells)} |")
    return lines


def loop_table(library: Path, architecture: str) -> list[str]:
    """A row a scoring kernel: what the loop over 8 numbers of each pair executes."""
    loops, lines = inner_loops(library, architecture), []
    for kernel, what, arithmetic in SCORING:
        loop = longest_loop(loops, kernel)
        counted = [loop[name] for name in ("FADD", "FFMA", "HMMA", "LDS")]
        numbers = (pairs_of(loop, arithmetic), *counted, loop.total() - sum(counted))
        lines.append(f"| {what}, sm_{architecture} | {' | '.join(f'{n:.0f}' for n in numbers)} |")
    return lines


def pairs_of(loop: Counter, arithmetic: int) -> float:
    """Pair elements: three TF32 products of 16 x 8 x 8 cover 32 of each thread."""
    return loop["HMMA"] / 3 * 32 or (loop["FADD"] + loop["FFMA"]) / arithmetic


def predictions(library: Path) -> list[str]:
    """A row a job on ResNet-50: milliseconds on one H100, from the counts for sm_90."""
    needed, computed = pair_elements()
    weights = 4 * sum(n * k for n, k in RESNET50)
    rate = PROCESSORS * LANES * CLOCK * 1e9
    from_l2 = computed / TILE**2 * 2 * TILE * 4 / L2_BANDWIDTH
    loops, lines = inner_loops(library), []
    for kernel, what, arithmetic in SCORING:
        loop = longest_loop(loops, kernel)
        instructions = loop.total() / pairs_of(loop, arithmetic) + STAGE_INSTRUCTIONS / (TILE * TILE / THREADS * STAGE)
        issue, tensor = computed * instructions / rate, 3 * computed / TENSOR_RATE if loop["HMMA"] else 0.0
        floor = needed * arithmetic / rate if arithmetic else 3 * needed / TENSOR_RATE
        norms = 0.0 if kernel == "score_kernel<1,0>" else weights / BANDWIDTH
        end = 30e-6 + (RATE * weights / BANDWIDTH if arithmetic == 3 else 0.0)  # last tile; rows to zero
        predicted = max(issue, tensor, from_l2) / EFFICIENCY + norms + end
        columns = (floor, issue, tensor, from_l2, norms, end, predicted)
        cells = (f"{1e3 * seconds:.2f}" if seconds else "" for seconds in columns)
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    from mfp import _C

    assert (len(RESNET50), sum(n for n, _ in RESNET50)) == (53, 26560)
    library = Path(_C.__file__)
    print("\n".join(resource_table(library)))
    print("\n| inner loop (8 numbers of each pair) | pair elements | FADD | FFMA | HMMA | LDS | other |")
    print("|---" * 7 + "|")
    for architecture in sorted(resources(library), key=int):
        print("\n".join(loop_table(library, architecture)))
    print("\n| job on ResNet-50 (ms) | floor | instructions | tensor cores | L2 | norms | end | predicted |")
    print("|---" * 8 + "|\n" + "\n".join(predictions(library)))
    needed, computed = pair_elements()
    print(f"\nPair elements: {needed / 1e9:.2f} G needed, {computed / 1e9:.2f} G computed.")


if __name__ == "__main__":
    main()
