"""Scores of all filters of a plan, one flat vector per criterion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mfp import criteria as _criteria
from mfp import ops
from mfp.attributes import Batches
from mfp.criteria import PAPER_CRITERIA, Criterion
from mfp.errors import MfpError
from mfp.gradients import Loss, weight_gradients
from mfp.mask import FilterMask
from mfp.plan import FilterPlan


@dataclass(frozen=True)
class FilterScores(Mapping[str, Tensor]):
    """Scores by criterion name: ``scores["l2_distance"]`` is float32 ``[F]`` in plan order.

    Attributes:
        plan: which layers, and how many filters of each are to go.
        by_name: the scores.
        live: the filters that were scored, if not all; the others are gone for good.
    """

    plan: FilterPlan
    by_name: dict[str, Tensor]
    live: FilterMask | None = None

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.by_name:
            raise MfpError(f"criterion {name!r} was not scored: scored were {', '.join(self.by_name)}")
        return self.by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_name)

    def __len__(self) -> int:
        return len(self.by_name)


def score_filters(
    plan: FilterPlan,
    criteria: Sequence[str | Criterion] = PAPER_CRITERIA,
    backend: str | None = None,
    *,
    calibration: Batches | None = None,
    loss: Loss | None = None,
    live: FilterMask | None = None,
) -> FilterScores:
    """Score every filter of every layer by every criterion, in one call.

    >>> scores = mfp.score_filters(plan, criteria=("l1_norm", "l2_distance"))
    >>> scores["l2_distance"].shape    # F filters, in plan order
    torch.Size([784])
    >>> scores = mfp.score_filters(plan, ("taylor",), calibration=[(images, targets)])

    ``taylor`` is the square of what the calibration loss loses, to first order, when the filter becomes zero (Molchanov
    et al., arXiv 1906.10771, for a whole filter): (sum_k w_k g_k)^2, with the gradient g of the mean loss over all
    calibration samples, measured in evaluation mode and without a trace (:func:`mfp.gradients.weight_gradients`).
    ``bn_scale`` is |gamma| of the BatchNorm that follows the layer (Liu et al., arXiv 1708.06519).

    A filter that is zero has ``taylor`` 0, and ``bn_scale`` 0 if its BatchNorm was zeroed with it: as with a norm, it
    is the first to go until training has moved it.

    Args:
        plan: which layers.
        criteria: names; fewer cost less.
        backend: forces ``cpu``, ``cuda``, ``triton`` or ``reference``.
        calibration: ``[(inputs, targets), ...]``; needed by ``taylor``, and by nothing else.
        loss: ``(outputs, targets) -> scalar``, an average over the samples; cross-entropy for None.
        live: score only the filters that this mask keeps, among each other (distances to those that are gone say
            nothing); the others have score 0.

    Raises:
        MfpError: unknown criterion, ``taylor`` without calibration batches, ``bn_scale`` of a layer that no BatchNorm
            follows, weights or gradients that are not finite (names the layer and the filter), a backend that cannot
            run.
    """
    known = check_criteria(criteria)
    scaled = [c for c in known if c.source == "batchnorm"]
    own = [c for c in known if c not in scaled]
    scales = batchnorm_scales(plan) if scaled else []
    gradients = gradients_for(plan, own, calibration, loss)
    weights = plan.weights()
    keep = None if live is None else live.keep.to(weights[0].device)
    rows = _score(own, _rows(plan, weights, keep), _rows(plan, gradients, keep), backend)
    rows |= _score(scaled, _rows(plan, scales, keep), (), backend)
    if keep is not None:
        rows = {name: row.new_zeros(len(keep)).masked_scatter_(keep, row) for name, row in rows.items()}
    require_finite(plan, torch.stack(list(rows.values())), gradients)
    return FilterScores(plan, {c.name: rows[c.name] for c in known}, live)


def _rows(plan: FilterPlan, tensors: Sequence[Tensor], keep: Tensor | None) -> Sequence[Tensor]:
    """Of tensors with a row a filter, one a layer (or none at all), the rows of filters that are kept."""
    if keep is None:
        return tensors
    pairs = zip(plan.layers, tensors, strict=bool(tensors))
    return [tensor.detach()[keep[layer.slice]].contiguous() for layer, tensor in pairs]


def _score(
    criteria: Sequence[Criterion], tensors: Sequence[Tensor], gradients: Sequence[Tensor], backend: str | None
) -> dict[str, Tensor]:
    if not criteria:
        return {}
    kinds, exponents = [c.kind for c in criteria], [c.exponent for c in criteria]
    values = ops.score_filters(tensors, kinds, exponents, gradients, backend)
    return {c.name: row for c, row in zip(criteria, values, strict=True)}


def gradients_for(
    plan: FilterPlan, criteria: Sequence[Criterion], calibration: Batches | None, loss: Loss | None
) -> list[Tensor]:
    """What the op needs beside the weights: their gradients, measured now; none where no criterion asks for them."""
    check_calibration(criteria, calibration)
    return weight_gradients(plan, calibration or (), loss) if any(c.source == "gradients" for c in criteria) else []


def check_calibration(criteria: Sequence[Criterion], calibration: Batches | None) -> None:
    """Raise for a criterion that is measured on data when there are no batches."""
    for criterion in criteria:
        if criterion.source == "gradients" and not calibration:
            raise MfpError(
                f"criterion {criterion.name!r} is measured on data: give calibration=[(inputs, targets), ...]"
            )


def batchnorm_scales(plan: FilterPlan) -> list[Tensor]:
    """The weight of the first BatchNorm behind each layer as ``[N, ...]``, a row a filter.

    Raises:
        MfpError: a layer that has none, by name.
    """
    scales = []
    for layer in plan.layers:
        behind = [plan.model.get_submodule(f.module) for f in layer.followers if f.parameter == "weight"]
        norm = next((module for module in behind if isinstance(module, nn.modules.batchnorm._BatchNorm)), None)
        if norm is None:
            raise MfpError(
                f"criterion 'bn_scale': no BatchNorm with a scale follows layer {layer.name!r}; leave the layer out "
                f"(skip=({layer.name!r},)) or take another criterion"
            )
        scales.append(norm.weight.detach().view(layer.num_filters, -1))
    return scales


def check_criteria(criteria: Sequence[str | Criterion]) -> list[Criterion]:
    """Look all names up; at least one, none twice."""
    if isinstance(criteria, str) or not criteria:
        raise MfpError(f"criteria must be a sequence of at least one name, got {criteria!r}")
    known = [_criteria.criterion(name) for name in criteria]
    if len({c.name for c in known}) != len(known):
        raise MfpError(f"a criterion is named twice: {', '.join(c.name for c in known)}")
    return known


def require_finite(plan: FilterPlan, values: Tensor, gradients: Sequence[Tensor] = ()) -> None:
    """Raise an error that names the first layer and filter with weights, or gradients, that are not finite.

    Args:
        values: scores ``[criteria, F]``.
        gradients: that they were computed from.
    """
    if torch.isfinite(values).all():
        return
    for what, tensors in (("weights", plan.weights()), ("gradients", gradients)):
        for layer, tensor in zip(plan.layers, tensors, strict=False):
            bad = ~torch.isfinite(tensor.detach().flatten(1)).all(dim=1)
            if bad.any():
                raise MfpError(
                    f"layer {layer.name!r}: filter {int(bad.nonzero()[0])} has {what} that are not finite "
                    f"({int(bad.sum())} of {layer.num_filters} filters); nothing was pruned"
                )
    first = int((~torch.isfinite(values)).any(dim=0).nonzero()[0])
    layer = next(layer for layer in plan.layers if layer.slice.start <= first < layer.slice.stop)
    raise MfpError(
        f"layer {layer.name!r}: the score of filter {first - layer.offset} is not finite or too large for float32"
    )
