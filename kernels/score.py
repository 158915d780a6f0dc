"""score_filters and prune_filters_.

One program a tile of pairs. A tile stores its sums in slots of its own; the tile of a layer that arrives last adds the
slots in a fixed order, so that the scores of all layers take one launch and have the same bits every time. General
exponents take a second launch, gradients a third, selection a fourth, zeroing a fifth.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfp.kernels.mask import mask_filters_
from mfp.kernels.pairs import (
    add_slots,
    any_of,
    load_rows,
    power,
    root,
    store_sums,
    sum_differences,
    sum_norms,
    wide_distances,
)
from mfp.kernels.table import DTYPES, launcher, upload

_NORM, _DISTANCE, _COSINE, _HYBRID, _TAYLOR = range(5)
_L1_NORM, _L2_NORM, _L1, _L2, _COS, _HYB = range(6)  # rows of the direct kernel's result
_BLOCK = 32  # filters along each side of a tile
_DEPTH = 8
_SPAN = 64
_WARPS = 8
_FIELDS = 10
_ROWS = 64  # filters that are ranked at a time
_SMALLEST = tl.constexpr(1e-37)  # scale: its inverse is finite


@triton.jit
def _tile(layers, items, BLOCK: tl.constexpr, FIELDS: tl.constexpr):
    """A program's layer, and the rows and columns of its tile."""
    item = items + 3 * tl.program_id(0)
    layer = layers + FIELDS * tl.load(item)
    row_block, column_block = tl.load(item + 1), tl.load(item + 2)
    rows = row_block * BLOCK + tl.arange(0, BLOCK)
    columns = column_block * BLOCK + tl.arange(0, BLOCK)
    filters = tl.load(layer + 1)
    valid = (rows < filters)[:, None] & (columns < filters)[None, :]  # each pair of different filters once
    valid = valid & ((row_block != column_block) | (rows[:, None] > columns[None, :]))
    return layer, row_block, column_block, rows, columns, valid


@triton.jit
def _arrives_last(counters, items, layer, FIELDS: tl.constexpr):
    """Whether all other tiles of the layer are done; their sums are visible then."""
    tl.debug_barrier()
    before = tl.atomic_add(counters + tl.load(items + 3 * tl.program_id(0)), 1, sem="acq_rel")
    return before == tl.load(layer + 6) - 1


@triton.jit(do_not_specialize=["slots", "total_filters"])
def _direct_kernel(
    layers, items, counters, partial, scores, slots, total_filters, L1: tl.constexpr, L2: tl.constexpr,
    COSINE: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr, SPAN: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """Norms, the two fast distances, cosine and hybrid."""
    layer, row_block, column_block, rows, columns, valid = _tile(layers, items, BLOCK, FIELDS)
    address, filters, size, dtype = tl.load(layer), tl.load(layer + 1), tl.load(layer + 2), tl.load(layer + 3)
    offset, slot, tiles = tl.load(layer + 4), tl.load(layer + 5), tl.load(layer + 7)
    width = tiles * BLOCK
    absolute = tl.zeros([BLOCK], tl.float64)
    row_norms = tl.zeros([BLOCK], tl.float64)
    if COSINE or row_block == column_block:
        absolute, row_norms = sum_norms(address, rows, filters, size, dtype, BLOCK, DEPTH)
    if row_block == column_block:
        tl.store(scores + offset + rows, absolute.to(tl.float32), mask=rows < filters)
        tl.store(scores + total_filters + offset + rows, row_norms.to(tl.float32), mask=rows < filters)

    if L1 or L2:
        l1, square = sum_differences(address, rows, columns, filters, size, dtype, L1, L2, SPAN, BLOCK, DEPTH)
        if L1:
            given = tl.where(valid, l1, 0.0)
            store_sums(partial + slot, width, row_block, column_block, rows, columns, given, given)
    if L2:
        distance = tl.sqrt_rn(square)
        wide = square.to(tl.float64)
        # If some pair of a tile is 1e-12 apart, each of its filters is half as far from one of that pair, and squares
        # that underflow do not show in its sum.
        far_out = any_of(valid & ~(square <= 1e30)) | ~any_of(valid & (square >= 1e-24))
        if far_out:
            one = tl.full([BLOCK], 1.0, tl.float64)
            wide, _ = wide_distances(address, rows, columns, filters, size, dtype, one, one, BLOCK, DEPTH)
            distance = tl.sqrt(wide).to(tl.float32)
        given = tl.where(valid, distance, 0.0)
        store_sums(partial + slots + slot, width, row_block, column_block, rows, columns, given, given)
        if COSINE:
            _, column_norms = sum_norms(address, columns, filters, size, dtype, BLOCK, DEPTH)
            # 1 - cos = (|a - b|^2 - (|a| - |b|)^2) / (2 |a| |b|)
            apart = row_norms[:, None] - column_norms[None, :]
            rest = wide - apart * apart
            product = row_norms[:, None] * column_norms[None, :]
            directed = product > 0.0
            less = rest / tl.where(directed, 2.0 * product, 1.0)
            share = tl.minimum(less, 2.0 - less)
            lost = (rest < wide / 32) | (share < 1.0 / 32) | ~((square >= 1e-30) & (square <= 1e30))
            lost = lost & valid & directed
            if any_of(lost):
                row_scale = 1.0 / tl.where(row_norms > 0.0, row_norms, 1.0)
                column_scale = 1.0 / tl.where(column_norms > 0.0, column_norms, 1.0)
                direct, opposite = wide_distances(
                    address, rows, columns, filters, size, dtype, row_scale, column_scale, BLOCK, DEPTH
                )
                less = tl.where(lost, direct / 2, less)
                share = tl.where(lost, tl.minimum(direct, opposite) / 2, share)
            both_zero = (row_norms[:, None] == 0.0) & (column_norms[None, :] == 0.0)
            less = tl.where(directed, less, tl.where(both_zero, 0.0, 1.0))
            given = tl.where(valid, less, 0.0).to(tl.float32)
            store_sums(partial + 2 * slots + slot, width, row_block, column_block, rows, columns, given, given)
            share = tl.where(valid & directed, share, 0.0)
            to_row = (share * column_norms[None, :]).to(tl.float32)
            to_column = (share * row_norms[:, None]).to(tl.float32)
            store_sums(partial + 3 * slots + slot, width, row_block, column_block, rows, columns, to_row, to_column)

    if (L1 or L2) and _arrives_last(counters, items, layer, FIELDS):
        for first in range(0, filters, BLOCK):
            row = first + tl.arange(0, BLOCK)
            inside = row < filters
            if L1:
                total = add_slots(partial + slot, width, tiles, row, 16, BLOCK)
                tl.store(scores + 2 * total_filters + offset + row, total.to(tl.float32), mask=inside)
            if L2:
                total = add_slots(partial + slots + slot, width, tiles, row, 16, BLOCK)
                tl.store(scores + 3 * total_filters + offset + row, total.to(tl.float32), mask=inside)
            if COSINE:
                total = add_slots(partial + 2 * slots + slot, width, tiles, row, 16, BLOCK)
                tl.store(scores + 4 * total_filters + offset + row, total.to(tl.float32), mask=inside)
                norm = tl.load(scores + total_filters + offset + row, mask=inside, other=0.0, cache_modifier=".cg")
                total = norm * add_slots(partial + 3 * slots + slot, width, tiles, row, 16, BLOCK)
                tl.store(scores + 5 * total_filters + offset + row, total.to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=["total_filters", "p"])
def _power_kernel(
    layers, items, counters, partial, scores, total_filters, p, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
    FIELDS: tl.constexpr,
):  # fmt: skip
    """Norm and distance of any exponent; a row or pair is scaled by its largest number, so that no power vanishes."""
    layer, row_block, column_block, rows, columns, valid = _tile(layers, items, BLOCK, FIELDS)
    address, filters, size, dtype = tl.load(layer), tl.load(layer + 1), tl.load(layer + 2), tl.load(layer + 3)
    offset, slot, tiles = tl.load(layer + 4), tl.load(layer + 5), tl.load(layer + 7)
    width = tiles * BLOCK
    if row_block == column_block:
        largest = tl.zeros([BLOCK], tl.float32)
        for first in range(0, size, DEPTH):
            a = load_rows(address, rows, filters, first + tl.arange(0, DEPTH), size, dtype)
            largest = tl.maximum(largest, tl.max(tl.abs(a), 1))
        largest = tl.maximum(largest, _SMALLEST)
        inverse = 1.0 / largest
        total = tl.zeros([BLOCK], tl.float64)
        for first in range(0, size, DEPTH):
            a = load_rows(address, rows, filters, first + tl.arange(0, DEPTH), size, dtype)
            total += tl.sum(power(tl.abs(a) * inverse[:, None], p), 1).to(tl.float64)
        tl.store(scores + offset + rows, largest * root(total.to(tl.float32), p), mask=rows < filters)

    HALF: tl.constexpr = DEPTH // 2  # powers take registers
    largest = tl.zeros([BLOCK, BLOCK], tl.float32)
    for first in range(0, size, HALF):
        k = first + tl.arange(0, HALF)
        a = load_rows(address, rows, filters, k, size, dtype)
        b = load_rows(address, columns, filters, k, size, dtype)
        largest = tl.maximum(largest, tl.max(tl.abs(a[:, None, :] - b[None, :, :]), 2))
    largest = tl.maximum(largest, _SMALLEST)
    inverse = 1.0 / largest
    sums = tl.zeros([BLOCK, BLOCK], tl.float32)
    for first in range(0, size, HALF):
        k = first + tl.arange(0, HALF)
        a = load_rows(address, rows, filters, k, size, dtype)
        b = load_rows(address, columns, filters, k, size, dtype)
        sums += tl.sum(power(tl.abs(a[:, None, :] - b[None, :, :]) * inverse[:, :, None], p), 2)
    given = tl.where(valid, largest * root(sums, p), 0.0)
    store_sums(partial + slot, width, row_block, column_block, rows, columns, given, given)

    if _arrives_last(counters, items, layer, FIELDS):
        for first in range(0, filters, BLOCK):
            row = first + tl.arange(0, BLOCK)
            total = add_slots(partial + slot, width, tiles, row, 16, BLOCK)
            tl.store(scores + total_filters + offset + row, total.to(tl.float32), mask=row < filters)


@triton.jit
def _taylor_kernel(
    layers, items, counters, partial, scores, BLOCK: tl.constexpr, DEPTH: tl.constexpr, FIELDS: tl.constexpr
):
    """The sum of weight times gradient, squared, of the rows of a tile on the diagonal; in float64, for it cancels."""
    layer, _, _, rows, _, _ = _tile(layers, items, BLOCK, FIELDS)
    address, filters, size, dtype = tl.load(layer), tl.load(layer + 1), tl.load(layer + 2), tl.load(layer + 3)
    offset, gradients, gradient_dtype = tl.load(layer + 4), tl.load(layer + 8), tl.load(layer + 9)
    STEP: tl.constexpr = 8 * DEPTH
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, size, STEP):
        k = first + tl.arange(0, STEP)
        weight = load_rows(address, rows, filters, k, size, dtype).to(tl.float64)
        gradient = load_rows(gradients, rows, filters, k, size, gradient_dtype).to(tl.float64)
        total += tl.sum(weight * gradient, 1)
    tl.store(scores + offset + rows, (total * total).to(tl.float32), mask=rows < filters)


@triton.jit(do_not_specialize=["first_score"])
def _select_kernel(scores, first_score, layers, items, bad, keep, ROWS: tl.constexpr):
    """keep = False for the lowest scores of each layer, the lower index first among equals; all True if any is bad."""
    item = items + 2 * tl.program_id(0)
    layer = layers + 3 * tl.load(item)
    filters, offset, count = tl.load(layer), tl.load(layer + 1), tl.load(layer + 2)
    row = tl.load(item + 1) * ROWS + tl.arange(0, ROWS)
    scores += first_score
    own = tl.load(scores + offset + row, mask=row < filters, other=0.0)
    rank = tl.zeros([ROWS], tl.int32)
    for first in range(0, filters, ROWS):
        other = first + tl.arange(0, ROWS)
        score = tl.load(scores + offset + other, mask=other < filters, other=float("inf"))
        ahead = (score[None, :] < own[:, None]) | ((score[None, :] == own[:, None]) & (other[None, :] < row[:, None]))
        rank += tl.sum((ahead & (other < filters)[None, :]).to(tl.int32), 1)
    kept = (rank >= count) | (tl.load(bad) != 0)
    tl.store(keep + offset + row, kept.to(tl.int8), mask=row < filters)


class _Layers:
    """The tables of a call: one row a layer, and one item a tile (only the diagonal ones for norms alone)."""

    def __init__(self, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        self.device = weights[0].device
        self.table, self._tiles = [], []
        self.filters = self.slots = 0
        for weight, gradient in zip(weights, gradients or weights, strict=True):
            filters = len(weight)
            tiles = triton.cdiv(filters, _BLOCK)
            size = weight.numel() // max(filters, 1)
            triangle = tiles * (tiles + 1) // 2
            sizes = (self.filters, self.slots, triangle, tiles)
            pointers = (gradient.data_ptr(), DTYPES[gradient.dtype])
            self.table.append((weight.data_ptr(), filters, size, DTYPES[weight.dtype], *sizes, *pointers))
            self._tiles.append(tiles)
            self.filters += filters
            self.slots += tiles * tiles * _BLOCK
        self.order = sorted(range(len(weights)), key=lambda index: -self.table[index][2])  # longest filters first

    def items(self, pairs: bool) -> Tensor:
        tiles = [
            (index, i, j)
            for index in self.order
            for i in range(self._tiles[index])
            for j in range(0 if pairs else i, i + 1)
        ]
        return upload(tiles, self.device)

    def launch(self, kernel, rows: int, channels: int, pairs: bool, *numbers, **flags) -> Tensor:
        """Scores ``[rows, F]`` from a kernel."""
        scores = torch.zeros((rows, self.filters), dtype=torch.float32, device=self.device)
        items = self.items(pairs)
        if len(items):
            counters = torch.zeros(len(self.table), dtype=torch.int32, device=self.device)
            partial = torch.empty(max(channels, 1) * self.slots, dtype=torch.float32, device=self.device)
            kernel[(len(items),)](
                upload(self.table, self.device), items, counters, partial, scores, *numbers, BLOCK=_BLOCK,
                DEPTH=_DEPTH, FIELDS=_FIELDS, num_warps=_WARPS, **flags,
            )  # fmt: skip
        return scores


@launcher
def score_filters(
    weights: Sequence[Tensor], kinds: Sequence[int], exponents: Sequence[float], gradients: Sequence[Tensor] = ()
) -> Tensor:
    """Scores of all filters of all layers, ``[len(kinds), F]`` float32; arguments as in ``mfp.ops.score_filters``."""
    layers = _Layers(weights, gradients)
    asked = list(zip(kinds, exponents, strict=True))
    l1 = (_DISTANCE, 1.0) in asked
    cosine = any(kind in (_COSINE, _HYBRID) for kind, _ in asked)
    l2 = cosine or (_DISTANCE, 2.0) in asked
    fixed = {(_NORM, 1.0): _L1_NORM, (_NORM, 2.0): _L2_NORM, (_DISTANCE, 1.0): _L1, (_DISTANCE, 2.0): _L2}
    if cosine or any(pair in fixed for pair in asked):
        flags = {"L1": l1, "L2": l2, "COSINE": cosine, "SPAN": _SPAN}
        direct = layers.launch(_direct_kernel, 6, 4, l1 or l2, layers.slots, layers.filters, **flags)
    powers: dict[float, Tensor] = {}
    rows = []
    for kind, exponent in asked:
        if kind in (_COSINE, _HYBRID):
            rows.append(direct[_COS if kind == _COSINE else _HYB])
        elif kind == _TAYLOR:
            rows.append(layers.launch(_taylor_kernel, 1, 0, False)[0])
        elif (kind, exponent) in fixed:
            rows.append(direct[fixed[kind, exponent]])
        else:
            if exponent not in powers:
                powers[exponent] = layers.launch(_power_kernel, 2, 1, True, layers.filters, float(exponent))
            rows.append(powers[exponent][0 if kind == _NORM else 1])
    return torch.stack(rows)


@launcher
def prune_filters_(
    weights: Sequence[Tensor], followers: Sequence[Tensor], follower_layers: Sequence[int], num_pruned: Sequence[int],
    kinds: Sequence[int], exponents: Sequence[float], chosen: int, gradients: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scores, selection and zeroing without the host; arguments as in ``mfp.ops.prune_filters_``."""
    scores = score_filters(weights, kinds, exponents, gradients)
    bad = ~scores.isfinite().all()
    counts = [len(weight) for weight in weights]
    offsets = [sum(counts[:layer]) for layer in range(len(counts))]
    keep = torch.empty(sum(counts), dtype=torch.bool, device=scores.device)
    items = [(layer, block) for layer, count in enumerate(counts) for block in range(triton.cdiv(count, _ROWS))]
    if items:
        table = upload(list(zip(counts, offsets, num_pruned, strict=True)), scores.device)
        _select_kernel[(len(items),)](
            scores, chosen * len(keep), table, upload(items, scores.device), bad.view(torch.uint8),
            keep.view(torch.uint8), ROWS=_ROWS,
        )  # fmt: skip
    mask_filters_(weights, keep, offsets, counts)
    mask_filters_(followers, keep, [offsets[i] for i in follower_layers], [counts[i] for i in follower_layers])
    return scores, keep
