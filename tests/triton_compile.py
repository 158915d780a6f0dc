"""Compiles Triton kernels for GPUs that are not here. Run by test_triton_compile.py, in a process without interpreter.

python tests/triton_compile.py resources 80 90    prints what every kernel takes on sm_80 and sm_90
python tests/triton_compile.py networks           prints how many compilations each of several networks asks for
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from mfp import kernels
from mfp.kernels import mask, optim, scatter, score

TABLES = {"layers": "*i64", "items": "*i64", "tensors": "*i64", "parameters": "*i64", "index": "*i64"}
FLOATS = ("p", "lr", "momentum", "dampening_rest", "weight_decay", "decay", "beta1_rest", "beta2", "beta2_rest",
          "correction2_root", "eps", "step_size")  # fmt: skip
TYPES = {
    **TABLES, "counters": "*i32", "partial": "*fp32", "scores": "*fp32", "bad": "*u8", "keep": "*u8", "slots": "i64",
    "residual": "*fp32", "branch": "*fp32", "numel": "i64", **dict.fromkeys(FLOATS, "fp32"),
    **dict.fromkeys(("total_filters", "first_score", "channels", "branch_channels", "inner", "steps"), "i32"),
}  # fmt: skip
TILE = {"BLOCK": score._BLOCK, "DEPTH": score._DEPTH, "FIELDS": score._FIELDS}
STEP = {"BLOCK": optim._BLOCK, "FIELDS": optim._FIELDS, "MAXIMIZE": True}
VARIANTS = [
    *[
        (score._direct_kernel, {**TILE, "SPAN": score._SPAN, "L1": l1, "L2": l2, "COSINE": cosine}, score._WARPS)
        for l1, l2, cosine in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0), (0, 1, 1), (1, 1, 1))
    ],
    (score._power_kernel, TILE, score._WARPS),
    (score._taylor_kernel, TILE, score._WARPS),
    (score._select_kernel, {"ROWS": score._ROWS}, 4),
    (mask._mask_kernel, {"ROWS": mask._ROWS, "COLUMNS": mask._COLUMNS}, 4),
    (optim._sgd_kernel, {**STEP, "MOMENTUM": True, "NESTEROV": True, "FIRST": False}, 4),
    (optim._sgd_kernel, {**STEP, "MOMENTUM": False, "NESTEROV": False, "FIRST": True}, 4),
    (optim._adamw_kernel, STEP, 4),
    (scatter._scatter_kernel, {"RELU": True, "BLOCK": scatter._BLOCK}, 4),
    (scatter._scatter_kernel, {"RELU": False, "BLOCK": scatter._BLOCK}, 4),
]  # fmt: skip


def resources(kernel: JITFunction, constants: dict, warps: int, architecture: int) -> tuple[int, int]:
    """Registers and bytes of stack, where what does not fit into registers goes."""
    signature = {name: "constexpr" if name in constants else TYPES[name] for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if "*" in signature[name]}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps})
    check_arrival(compiled.asm["ptx"])
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(cuobjdump), "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"Function {kernel.__name__}" in report
    return int(re.search(r"REG:(\d+)", report)[1]), int(re.search(r"STACK:(\d+)", report)[1])


def check_arrival(ptx: str) -> None:
    """Where tiles count themselves in: a barrier between a block's stores and the atomic, which releases and acquires,
    and a barrier between the atomic and the loads of what others stored."""
    names = re.findall(r"\b(bar\.sync|atom\.\S+|st\.global|ld\.global\.cg)", ptx)
    arrivals = [i for i, name in enumerate(names) if name.startswith("atom")]
    assert len(arrivals) <= 1
    for i in arrivals:
        assert names[i] == "atom.global.gpu.acq_rel.add.u32" and names[i - 1] == names[i + 1] == "bar.sync", names
        assert "st.global" in names[:i] and "ld.global.cg" in names[i:] and "ld.global.cg" not in names[:i], names


class _Device:
    """Stands in for the driver: names a GPU that is not here."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def use_all_ops(shapes: list[tuple[int, ...]], channels: int) -> None:
    """One call of each op for a network with these weights; kernels are compiled, not launched."""
    weights = [torch.randn(shape) for shape in shapes]
    counts = [len(weight) for weight in weights]
    kinds, exponents = [0, 0, 1, 1, 2, 3, 1, 4], [1.0, 2.0, 1.0, 2.0, 2.0, 2.0, 3.0, 2.0]
    followers, num_pruned = [torch.ones(counts[0])], [n // 2 for n in counts]
    kernels.prune_filters_(weights, followers, [0], num_pruned, kinds, exponents, 0, weights)
    keep, offsets = torch.ones(sum(counts), dtype=torch.bool), [sum(counts[:i]) for i in range(len(counts))]
    states = [[torch.zeros_like(weight) for weight in weights] for _ in range(3)]
    kernels.masked_sgd_(weights, *states[:2], keep, offsets, counts, 0.1, 0.9, 0.0, 1e-4, False, False, False)
    kernels.masked_adamw_(weights, *states, keep, offsets, counts, 1e-3, 0.9, 0.999, 1e-8, 0.01, False, channels)
    residual, branch = torch.randn(1, channels, 3, 5), torch.randn(1, channels // 2, 3, 5)
    for layout in (torch.contiguous_format, torch.channels_last):
        kernels.scatter_add_(residual.to(memory_format=layout), branch, torch.arange(channels // 2), True)


def compilations_of_networks() -> list[int]:
    """How many compilations each of several networks asks for, one after the other in one process; none is made."""
    triton.runtime.driver.set_active(_Device())
    launch = JITFunction.run
    JITFunction.run = lambda self, *args, grid, warmup, **options: launch(
        self, *args, grid=grid, warmup=True, **options
    )
    known = {id(kernel): kernel for kernel, *_ in VARIANTS}.values()
    for kernel in known:
        kernel.compile = lambda *_, **__: object()
    counts, before = [], 0
    for shapes, channels in (
        ([(64, 3, 7, 7), (64, 64, 1, 1), (256, 64, 1, 1)], 64),
        ([(16, 16, 3, 3), (1, 5, 1, 1), (33, 7, 3, 3), (48, 1, 1, 1)], 33),
        ([(1, 1, 1, 1)], 2),
        ([(32, 32, 1, 1)] * 70, 128),
    ):
        use_all_ops(shapes, channels)
        compiled = sum(len(kernel.device_caches[0][0]) for kernel in known)
        counts.append(compiled - before)
        before = compiled
    return counts


if __name__ == "__main__":
    if sys.argv[1] == "networks":
        print(*compilations_of_networks())
    else:
        for kernel, constants, warps in VARIANTS:
            for architecture in map(int, sys.argv[2:]):
                flags = "".join(f"{int(value)}" for value in constants.values() if value in (0, 1))
                print(f"{kernel.__name__}[{flags}]", architecture, *resources(kernel, constants, warps, architecture))
