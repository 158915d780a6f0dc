"""mask_filters_: the rows of pruned filters in any number of tensors become zero, in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfp.kernels.table import items_of, launcher, upload

_ROWS = 16  # that a program takes
_COLUMNS = 128


@triton.jit
def _mask_kernel(tensors, items, keep, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    item = items + 2 * tl.program_id(0)
    tensor = tensors + 5 * tl.load(item)
    address, rows, row_size, offset = tl.load(tensor), tl.load(tensor + 1), tl.load(tensor + 2), tl.load(tensor + 3)
    element_size = tl.load(tensor + 4)
    row = tl.load(item + 1) * ROWS + tl.arange(0, ROWS)
    pruned = (row < rows) & (tl.load(keep + offset + row, mask=row < rows, other=1) == 0)
    if tl.max(pruned.to(tl.int32), 0) > 0:
        for first in range(0, row_size, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            where = row[:, None] * row_size + column[None, :]
            mask = pruned[:, None] & (column < row_size)[None, :]
            if element_size == 4:
                tl.store(address.to(tl.pointer_type(tl.int32)) + where, 0, mask=mask)
            else:
                tl.store(address.to(tl.pointer_type(tl.int16)) + where, 0, mask=mask)


@launcher
def mask_filters_(tensors: Sequence[Tensor], keep: Tensor, offsets: Sequence[int], rows: Sequence[int]) -> None:
    """Zero row r of tensor i, seen as ``[rows[i], -1]``, where ``keep[offsets[i] + r]`` is False."""
    table = [
        (tensor.data_ptr(), count, tensor.numel() // count, offset, tensor.element_size())
        for tensor, offset, count in zip(tensors, offsets, rows, strict=True)
        if count and tensor.numel()
    ]
    if not table:
        return
    items = items_of([triton.cdiv(count, _ROWS) for _, count, *_ in table], keep.device)
    _mask_kernel[(len(items),)](upload(table, keep.device), items, keep.view(torch.uint8), ROWS=_ROWS, COLUMNS=_COLUMNS)
    torch.autograd.graph.increment_version(tensors)  # autograd notices that they were changed
