"""Sums over one tile of pairs of filters, as parts of a kernel.

A float32 sum runs over at most SPAN numbers of a filter before it joins a total. Where float32 is not enough (weights
whose squares leave its range, cosines whose formula cancels), a tile is computed again in float64.
"""

import triton
import triton.language as tl

from mfp.kernels.table import load_as_float


@triton.jit
def load_rows(address, rows, filters, columns, size, dtype):
    """``[rows, columns]`` of a layer's weights seen as [filters, size]; zeros outside, which add nothing to any sum."""
    mask = (rows < filters)[:, None] & (columns < size)[None, :]
    return load_as_float(address, rows[:, None] * size + columns[None, :], mask, dtype)


@triton.jit
def any_of(condition):
    return tl.max(tl.max(condition.to(tl.int32), 1), 0) > 0


@triton.jit
def sum_differences(
    address, rows, columns, filters, size, dtype, L1: tl.constexpr, L2: tl.constexpr, SPAN: tl.constexpr,
    BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Manhattan and squared Euclidean distances of all pairs, ``[BLOCK, BLOCK]`` each."""
    l1 = tl.zeros([BLOCK, BLOCK], tl.float32)
    square = tl.zeros([BLOCK, BLOCK], tl.float32)
    for begin in range(0, size, SPAN):
        l1_part = tl.zeros([BLOCK, BLOCK], tl.float32)
        square_part = tl.zeros([BLOCK, BLOCK], tl.float32)
        for first in range(begin, tl.minimum(begin + SPAN, size), DEPTH):
            k = first + tl.arange(0, DEPTH)
            a = load_rows(address, rows, filters, k, size, dtype)
            b = load_rows(address, columns, filters, k, size, dtype)
            difference = a[:, None, :] - b[None, :, :]
            if L1:
                l1_part += tl.sum(tl.abs(difference), 2)
            if L2:
                square_part += tl.sum(difference * difference, 2)
        l1 += l1_part
        square += square_part
    return l1, square


@triton.jit
def sum_norms(address, rows, filters, size, dtype, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    """l1 norms and Euclidean norms of the rows, ``[BLOCK]`` in float64."""
    absolute = tl.zeros([BLOCK], tl.float64)
    square = tl.zeros([BLOCK], tl.float64)
    for first in range(0, size, DEPTH):
        a = load_rows(address, rows, filters, first + tl.arange(0, DEPTH), size, dtype).to(tl.float64)
        absolute += tl.sum(tl.abs(a), 1)
        square += tl.sum(a * a, 1)
    return absolute, tl.sqrt(square)


@triton.jit
def wide_distances(
    address, rows, columns, filters, size, dtype, scale_a, scale_b, BLOCK: tl.constexpr, DEPTH: tl.constexpr
):
    """Squares of ``a * scale_a - b * scale_b`` and of ``a * scale_a + b * scale_b`` summed, in float64."""
    HALF: tl.constexpr = DEPTH // 2  # float64 takes twice the registers
    less = tl.zeros([BLOCK, BLOCK], tl.float64)
    more = tl.zeros([BLOCK, BLOCK], tl.float64)
    for first in range(0, size, HALF):
        k = first + tl.arange(0, HALF)
        a = load_rows(address, rows, filters, k, size, dtype).to(tl.float64) * scale_a[:, None]
        b = load_rows(address, columns, filters, k, size, dtype).to(tl.float64) * scale_b[:, None]
        difference = a[:, None, :] - b[None, :, :]
        total = a[:, None, :] + b[None, :, :]
        less += tl.sum(difference * difference, 2)
        more += tl.sum(total * total, 2)
    return less, more


@triton.jit
def store_sums(partial, width, row_block, column_block, rows, columns, to_row, to_column):
    """A tile's sums into its own slots: its rows' in slot `column_block`, its columns' in slot `row_block`."""
    row_sums = tl.sum(to_row, 1)
    column_sums = tl.sum(to_column, 0)
    if row_block == column_block:
        tl.store(partial + column_block * width + rows, row_sums + column_sums)
    else:
        tl.store(partial + column_block * width + rows, row_sums)
        tl.store(partial + row_block * width + columns, column_sums)


@triton.jit
def add_slots(partial, width, tiles, rows, SLOTS: tl.constexpr, ROWS: tl.constexpr):
    """The sums of all slots for some rows, in float64 and in a fixed order."""
    total = tl.zeros([ROWS], tl.float64)
    for first in range(0, tiles, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        mask = (slot < tiles)[:, None] & (rows < width)[None, :]
        part = tl.load(partial + slot[:, None] * width + rows[None, :], mask=mask, other=0.0, cache_modifier=".cg")
        total += tl.sum(part.to(tl.float64), 0)
    return total


@triton.jit
def power(x, p):
    """x^p for x in [0, 1]; 0 at 0, and NaN stays."""
    return tl.where(x == 0.0, 0.0, tl.exp2(p * tl.log2(tl.where(x == 0.0, 1.0, x))))


@triton.jit
def root(x, p):
    """x^(1/p) for x >= 0; NaN stays."""
    return power(x, 1.0 / p)
