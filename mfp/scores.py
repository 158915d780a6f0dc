"""Scores of all filters of a plan, one flat vector per criterion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mfp import criteria as _criteria
from mfp import ops
from mfp.criteria import PAPER_CRITERIA, Criterion
from mfp.errors import MfpError
from mfp.plan import FilterPlan


@dataclass(frozen=True)
class FilterScores(Mapping[str, Tensor]):
    """Scores by criterion name: ``scores["l2_distance"]`` is float32 ``[F]`` in plan order."""

    plan: FilterPlan
    by_name: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.by_name:
            raise MfpError(f"criterion {name!r} was not scored: scored were {', '.join(self.by_name)}")
        return self.by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_name)

    def __len__(self) -> int:
        return len(self.by_name)


def score_filters(
    plan: FilterPlan, criteria: Sequence[str | Criterion] = PAPER_CRITERIA, backend: str | None = None
) -> FilterScores:
    """Score every filter of every layer by every criterion, in one call.

    >>> scores = mfp.score_filters(plan, criteria=("l1_norm", "l2_distance"))
    >>> scores["l2_distance"].shape    # F filters, in plan order
    torch.Size([784])

    Args:
        plan: which layers.
        criteria: names; fewer cost less.
        backend: forces ``cpu``, ``cuda``, ``triton`` or ``reference``.

    Raises:
        MfpError: unknown criterion, weights that are not finite (names the layer and the filter), a backend that
            cannot run.
    """
    known = check_criteria(criteria)
    weights = plan.weights()
    values = ops.score_filters(weights, [c.kind for c in known], [c.exponent for c in known], backend)
    require_finite(plan, values)
    return FilterScores(plan, {c.name: row for c, row in zip(known, values, strict=True)})


def check_criteria(criteria: Sequence[str | Criterion]) -> list[Criterion]:
    """Look all names up; at least one, none twice."""
    if isinstance(criteria, str) or not criteria:
        raise MfpError(f"criteria must be a sequence of at least one name, got {criteria!r}")
    known = [_criteria.criterion(name) for name in criteria]
    if len({c.name for c in known}) != len(known):
        raise MfpError(f"a criterion is named twice: {', '.join(c.name for c in known)}")
    return known


def require_finite(plan: FilterPlan, values: Tensor) -> None:
    """Raise an error that names the first layer and filter with weights that are not finite.

    Args:
        values: scores ``[criteria, F]``.
    """
    if torch.isfinite(values).all():
        return
    for layer in plan.layers:
        bad = ~torch.isfinite(plan.weight(layer).detach().flatten(1)).all(dim=1)
        if bad.any():
            raise MfpError(
                f"layer {layer.name!r}: filter {int(bad.nonzero()[0])} has weights that are not finite "
                f"({int(bad.sum())} of {layer.num_filters} filters); nothing was pruned"
            )
    first = int((~torch.isfinite(values)).any(dim=0).nonzero()[0])
    layer = next(layer for layer in plan.layers if layer.slice.start <= first < layer.slice.stop)
    raise MfpError(f"layer {layer.name!r}: the score of filter {first - layer.offset} is too large for float32")
