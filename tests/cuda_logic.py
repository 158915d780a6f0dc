"""The kernels of csrc/cuda, compiled by g++ on top of cuda_on_cpu.h and called on CPU tensors.

`build` compiles once per state of the sources; the functions mirror the ops of mfp.reference.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

TESTS = Path(__file__).parent
SOURCES = TESTS.parent / "csrc"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@contextlib.contextmanager
def only_one(path: Path):
    """Of the processes that want to make a file, one does; the others wait and find it."""
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@cache
def build() -> ctypes.CDLL:
    compiler = shutil.which("g++")
    assert compiler, "g++ is needed to run the CUDA kernels' logic on the CPU"
    files = [
        TESTS / "cuda_on_cpu.h",
        TESTS / "cuda_logic_driver.cpp",
        *sorted(SOURCES.glob("*.h")),
        *sorted((SOURCES / "cuda").glob("*")),
    ]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"mfp_cuda_logic_{digest}.so"
    with only_one(library):
        if not library.exists():
            fresh = library.with_suffix(f".{os.getpid()}.so")
            subprocess.run(
                [compiler, "-std=c++17", "-O2", "-march=native", "-ffp-contract=off", "-Wall", "-Wextra",
                 "-Wno-clobbered", "-Wno-unknown-pragmas", "-Werror", "-shared", "-fPIC", "-DMFP_CUDA_ON_CPU",
                 f"-I{TESTS}", f"-I{SOURCES}", str(TESTS / "cuda_logic_driver.cpp"), "-o", str(fresh)],
                check=True)  # fmt: skip
            fresh.rename(library)
    return ctypes.CDLL(str(library))


def configure(seed: int = 0, processors: int = 1, blocks_per_processor: int = 3) -> None:
    """Order in which threads take turns, and how many blocks are on the device at once."""
    build().configure(ctypes.c_uint(seed), processors, blocks_per_processor)


def _pointers(tensors: Sequence[Tensor]):
    return (ctypes.c_void_p * max(len(tensors), 1))(*[tensor.data_ptr() for tensor in tensors])


def _int64(values: Sequence[int]):
    return (ctypes.c_int64 * max(len(values), 1))(*values)


def _int32(values: Sequence[int]):
    return (ctypes.c_int * max(len(values), 1))(*values)


def mask_filters_(tensors: Sequence[Tensor], keep: Tensor, offsets: Sequence[int], rows: Sequence[int]) -> None:
    row_bytes = [
        tensor.numel() * tensor.element_size() // max(count, 1) for tensor, count in zip(tensors, rows, strict=True)
    ]
    error = build().mask_filters(_pointers(tensors), _int64(rows), _int64(row_bytes), _int64(offsets), len(tensors),
                                 ctypes.c_void_p(keep.data_ptr()))  # fmt: skip
    assert error == 0


def prune_filters_(weights, followers, follower_layers, num_pruned, kinds, exponents, chosen, gradients=(), launches=1):
    filters = [len(weight) for weight in weights]
    sizes = [weight.numel() // max(len(weight), 1) for weight in weights]
    row_bytes = [
        tensor.numel() * tensor.element_size() // filters[layer]
        for tensor, layer in zip(followers, follower_layers, strict=True)
    ]
    scores = torch.full((len(kinds), sum(filters)), float("nan"))
    keep = torch.zeros(sum(filters), dtype=torch.bool)
    error = build().prune_filters(
        _pointers(weights), _pointers(gradients) if gradients else None, _int64(filters), _int64(sizes),
        _int32([DTYPES[w.dtype] for w in weights]), _int32([DTYPES[g.dtype] for g in gradients]),
        _int32(num_pruned), len(weights), _pointers(followers), _int64(row_bytes), _int32(follower_layers),
        len(followers), _int32(kinds), (ctypes.c_float * len(kinds))(*exponents), len(kinds), chosen,
        ctypes.c_void_p(scores.data_ptr()), ctypes.c_void_p(keep.data_ptr()), launches)  # fmt: skip
    assert error == 0
    return scores, keep


def score_filters(weights, kinds, exponents, gradients=(), launches=1):
    return prune_filters_(weights, [], [], [0] * len(weights), kinds, exponents, -1, gradients, launches)[0]


def _masked_step(adamw, params, grads, first, second, keep, offsets, rows, numbers, flags):
    row_sizes = [p.numel() // r if o >= 0 else p.numel() for p, r, o in zip(params, rows, offsets, strict=True)]
    nothing = (ctypes.c_void_p * len(params))(*[None] * len(params))
    error = build().masked_step(
        adamw, _pointers(params), _pointers(grads), _pointers(first) if first else nothing,
        _pointers(second) if second else nothing, _int64([p.numel() for p in params]), _int64(row_sizes),
        _int64(offsets if keep is not None else [-1] * len(params)), _int32([DTYPES[p.dtype] for p in params]),
        len(params), ctypes.c_void_p(0 if keep is None else keep.data_ptr()),
        (ctypes.c_double * len(numbers))(*numbers), _int32(flags))  # fmt: skip
    assert error == 0


def masked_sgd_(
    params, grads, momentum_buffers, keep, offsets, rows, lr, momentum, dampening, weight_decay, nesterov, maximize,
    first_step,
):  # fmt: skip
    _masked_step(0, params, grads, momentum_buffers, [], keep, offsets, rows,
                 (lr, momentum, dampening, weight_decay), (nesterov, maximize, first_step))  # fmt: skip


def masked_adamw_(
    params, grads, exp_avgs, exp_avg_sqs, keep, offsets, rows, lr, beta1, beta2, eps, weight_decay, maximize, step
):
    _masked_step(1, params, grads, exp_avgs, exp_avg_sqs, keep, offsets, rows, (lr, beta1, beta2, eps, weight_decay),
                 (0, maximize, step))  # fmt: skip


def scatter_add_(residual, branch, index, relu):
    batch, channels = residual.shape[:2]
    pixels = residual.numel() // max(batch * channels, 1)
    last = not residual.is_contiguous()
    outer, inner = (batch * pixels, 1) if last else (batch, pixels)
    pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (residual, branch, index))
    sizes = (ctypes.c_int64(size) for size in (outer, channels, branch.shape[1], inner))
    assert build().scatter_add(*pointers, *sizes, DTYPES[residual.dtype], relu) == 0
