"""Tables of pointers and sizes in device memory, and what all kernels need to follow them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import wraps

import torch
import triton
import triton.language as tl
from torch import Tensor

FLOAT32, BFLOAT16, FLOAT16 = range(3)
DTYPES = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}

_CACHED = 256
_cache: OrderedDict[tuple, Tensor] = OrderedDict()
_captured: dict[int, Tensor] = {}  # by address: what CUDA graphs read at each replay, kept for the life of the process


def launcher(function: Callable) -> Callable:
    """For the functions that launch: on the device of the first tensor, as Triton launches on the current one."""

    @wraps(function)
    def launch(tensors: Tensor | Sequence[Tensor], *args, **kwargs):
        if len(tensors) == 0:
            return function(tensors, *args, **kwargs)
        with torch.no_grad(), torch.cuda.device_of(tensors if isinstance(tensors, Tensor) else tensors[0]):
            return function(tensors, *args, **kwargs)

    return launch


def upload(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """``rows`` as an int64 tensor on ``device``; the same rows are copied only once.

    The copy runs on a stream of its own and the host waits for it alone, so that the table is valid on any stream and
    in any CUDA graph, and no work of the caller's stream is waited for.
    """
    values = torch.tensor(rows, dtype=torch.int64)
    if device.type != "cuda":
        return values
    key = (device, values.numpy().tobytes())
    table = _cache.get(key)
    if table is None:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a Triton op meets new tensors while a CUDA graph is captured: run it once before")
        side = torch.cuda.Stream(device)
        with torch.cuda.stream(side):
            table = values.pin_memory().to(device, non_blocking=True)
        side.synchronize()
        _cache[key] = table
        if len(_cache) > _CACHED:
            _cache.popitem(last=False)
    _cache.move_to_end(key)
    # It may leave the cache while a kernel, or a graph, still reads it.
    if torch.cuda.is_current_stream_capturing():
        _captured[table.data_ptr()] = table
    else:
        table.record_stream(torch.cuda.current_stream(device))
    return table


def items_of(counts: Sequence[int], device: torch.device) -> Tensor:
    """``[items, 2]``: for each entry i of a table its index and the numbers 0 to counts[i] - 1."""
    return upload([(index, number) for index, count in enumerate(counts) for number in range(count)], device)


@triton.jit
def load_as_float(address, offsets, mask, dtype):
    """Elements of a float32, bfloat16 or float16 tensor at ``address`` as float32; 0 where ``mask`` is false."""
    if dtype == 0:
        value = tl.load(address.to(tl.pointer_type(tl.float32)) + offsets, mask=mask, other=0.0)
    elif dtype == 1:
        bits = tl.load(address.to(tl.pointer_type(tl.uint16)) + offsets, mask=mask, other=0)
        value = (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        value = tl.load(address.to(tl.pointer_type(tl.float16)) + offsets, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def store_from_float(address, offsets, value, mask, dtype):
    """The other way round, rounded to nearest, ties to even."""
    if dtype == 0:
        tl.store(address.to(tl.pointer_type(tl.float32)) + offsets, value, mask=mask)
    elif dtype == 1:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        narrow = tl.where(value == value, rounded, (bits >> 16) | 0x40)
        tl.store(address.to(tl.pointer_type(tl.uint16)) + offsets, narrow.to(tl.uint16), mask=mask)
    else:
        tl.store(address.to(tl.pointer_type(tl.float16)) + offsets, value.to(tl.float16), mask=mask)
