"""Cutting the weight of a conv or linear layer: rows, columns, groups, and what lost constant inputs leave behind."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Cut:
    """What is left of a contraction: its rows and columns, and the input channels that its input must bring.

    rows [out'] and columns [in' / groups'] (or [out', in' / groups']) index the weight in the form of to_rows;
    ``layout`` [in'] is the input's channels in the order of the columns.
    """

    rows: Tensor
    columns: Tensor
    layout: Tensor
    groups: int
    name: str = ""


def to_rows(weight: Tensor, groups: int, transposed: bool) -> Tensor:
    """Any contraction's weight as [out, in / groups, kernel...]."""
    if not transposed:
        return weight
    per_group = weight.view(groups, weight.shape[0] // groups, *weight.shape[1:]).transpose(1, 2)
    return per_group.reshape(-1, *per_group.shape[2:])


def from_rows(rows: Tensor, groups: int, transposed: bool) -> Tensor:
    """The inverse of to_rows."""
    if not transposed:
        return rows
    per_group = rows.view(groups, rows.shape[0] // groups, *rows.shape[1:]).transpose(1, 2)
    return per_group.reshape(-1, *per_group.shape[2:])


def take(rows_of: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """rows_of[rows][:, columns], columns [in'] or one set per row [out', in']; -1 gives zeros."""
    rows, columns = rows.to(rows_of.device), columns.to(rows_of.device)
    if columns.dim() == 1 and bool((rows >= 0).all()) and bool((columns >= 0).all()):
        return rows_of.index_select(0, rows).index_select(1, columns)
    columns = columns.expand(len(rows), -1)
    taken = rows_of[rows.clamp(min=0)[:, None], columns.clamp(min=0)]
    missing = (rows[:, None] < 0) | (columns < 0)
    taken[missing] = 0
    return taken


def cut_weight(weight: Tensor, cut: Cut, old_groups: int, transposed: bool) -> Tensor:
    """What is left of a contraction's weight, or of anything of its shape."""
    rows = take(to_rows(weight, old_groups, transposed), cut.rows, cut.columns)
    left = from_rows(rows, cut.groups, transposed)
    is_last = weight.dim() == 4 and not weight.is_contiguous()
    return left.contiguous(memory_format=torch.channels_last if is_last else torch.contiguous_format)


def grouped_cut(kept: Tensor, wanted: Tensor, constant: Tensor, present: Tensor) -> Cut:
    """Groups without a kept filter go; the others get equal numbers of filters and of inputs.

    kept [groups, out / groups]; [groups, in / groups]: wanted, inputs that are read; constant, inputs with a constant
    that is not zero; present, inputs at hand. Groups with fewer inputs than others are filled up with constants (they
    need no border map then), with what is at hand, or with slots of zeros (-1).
    """
    per_out, per_in = kept.shape[1], wanted.shape[1]
    alive = kept.any(1).nonzero().flatten()
    most_out, most_in = int(kept.sum(1).max()), max(int(wanted[alive].sum(1).max()), 1)
    rows = first_choices([kept], most_out, fill=True)[alive]
    columns = first_choices([wanted, constant, present], most_in, fill=False)[alive]
    layout = torch.where(columns >= 0, columns + alive[:, None] * per_in, -1).flatten()
    rows = (rows + alive[:, None] * per_out).flatten()
    return Cut(rows, columns.repeat_interleave(most_out, dim=0), layout, len(alive))


def first_choices(choices: list[Tensor], count: int, fill: bool) -> Tensor:
    """``count`` places per row, in order: first those of choices[0], then of choices[1], ...; then any, or -1."""
    rank = torch.full(choices[0].shape, len(choices))
    for place, choice in reversed(list(enumerate(choices))):
        rank[choice] = place
    order = rank.argsort(dim=1, stable=True)[:, :count]
    taken = order if fill else torch.where(rank.gather(1, order) < len(choices), order, rank.shape[1])
    taken = taken.sort(dim=1).values
    return torch.where(taken < rank.shape[1], taken, -1)


def lost_kernels(rows_of: Tensor, const: Tensor, rows: Tensor, groups: int) -> Tensor:
    """For each row the sum over lost input channels of constant times kernel, float64."""
    rows_on = rows.to(rows_of.device)
    if not const.any():
        return torch.zeros(len(rows), dtype=torch.float64, device=rows_of.device)
    weights = rows_of[rows_on.clamp(min=0)].double()
    group = rows_on.clamp(min=0) // (rows_of.shape[0] // groups)
    constants = const.to(rows_of.device).view(groups, -1)[group]  # [out', in / groups]
    constants = constants.view(*constants.shape, *[1] * (weights.dim() - 2))
    lost = (weights * constants).sum(1)
    lost[rows_on < 0] = 0
    return lost
