"""Which neighbour is closest: with one criterion for all layers, or one for each; with the plan's rates or others."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from mfp import attributes
from mfp.attributes import WithoutData
from mfp.mask import FilterMask
from mfp.plan import FilterPlan, PlannedLayer
from mfp.scores import FilterScores
from mfp.selection import select_filters
from mfp.variants import Statistics

if TYPE_CHECKING:
    from mfp.pruner import FilterPruner

BY_SENSITIVITY = " by sensitivity"  # follows a criterion's name where its rates suit the layers


class Choice(NamedTuple):
    """Fields as those of :class:`mfp.Decision`."""

    criterion: str | dict[str, str]
    mask: FilterMask
    before: float | None
    after: float | None
    neighbours: dict[str, float]
    statistics: Statistics | None = None  # of the BatchNorms, where they were estimated for the choice
    layer_rates: dict[str, float] | None = None
    hindsight: dict[str, float] = {}  # noqa: RUF012 (never written to)


def choose(pruner: FilterPruner, plan: FilterPlan, hindsight: Callable[[nn.Module], float] | None) -> Choice:
    """The neighbour of the pruner's network whose attribute stays closest; nothing is zeroed.

    Args:
        plan: at which rates.
        hindsight: as for :meth:`mfp.FilterPruner.step`.
    """
    needed = [c for c in attributes.NEEDED_SCORES.values() if c not in pruner.criteria]
    scores = pruner.score(plan, needed)
    masks = {criterion: select_filters(scores, criterion) for criterion in pruner.criteria}
    measure = attributes.WITHOUT_DATA.get(pruner.attribute) if isinstance(pruner.attribute, str) else None
    if measure and pruner.per_layer:
        return _choose_per_layer(measure, scores, masks)
    if pruner.allocator:
        last = pruner.decisions[-1].criterion if pruner.decisions else pruner.criteria[0]
        # one criterion for all layers: an allocator is refused together with per_layer
        suiting = pruner.allocator.suited(scores, last, pruner.comparison)  # type: ignore[arg-type]
        suited = replace(scores, plan=suiting)
        masks |= {c + BY_SENSITIVITY: select_filters(suited, c) for c in pruner.criteria}
    if measure:
        before, values = 1.0, {c: measure(scores, mask.keep) for c, mask in masks.items()}
        statistics: dict[str, Statistics] = {}
    else:
        before, values, statistics = pruner.comparison.measure(masks)
    found = pruner.comparison.also(masks, statistics, hindsight) if hindsight else {}
    chosen = closest(before, values)
    mask, criterion = masks[chosen], chosen.removesuffix(BY_SENSITIVITY)
    rates = None if chosen == criterion else {layer.name: layer.rate for layer in mask.plan.layers}
    return Choice(criterion, mask, before, values[chosen], values, statistics.get(mask.digest), rates, found)


def _choose_per_layer(measure: WithoutData, scores: FilterScores, masks: dict[str, FilterMask]) -> Choice:
    together: dict[str | int, list[PlannedLayer]] = {}  # layers that lose the same filters are ranked by one criterion
    for layer in scores.plan.layers:
        together.setdefault(layer.name if layer.group is None else layer.group, []).append(layer)
    chosen: dict[str, str] = {}
    for layers in together.values():
        own = {name: torch.cat([row[layer.slice] for layer in layers]) for name, row in scores.items()}
        keep = {c: torch.cat([mask.keep[layer.slice] for layer in layers]) for c, mask in masks.items()}
        criterion = closest(1.0, {c: measure(own, kept) for c, kept in keep.items()})
        chosen |= {layer.name: criterion for layer in layers}
    mask = select_filters(scores, chosen)
    return Choice(chosen, mask, 1.0, measure(scores, mask.keep), {})


def closest(before: float, values: dict[str, float]) -> str:
    """The candidate whose attribute is closest; of equals the first, and one that is not a number never wins."""
    distances = {c: abs(value - before) for c, value in values.items()}
    return min(distances, key=lambda c: distances[c] if not math.isnan(distances[c]) else math.inf)
