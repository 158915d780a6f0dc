"""From scores to masks: in every layer the filters with the lowest scores go, of equal ones the lower index first."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mfp import criteria as _criteria
from mfp import ops
from mfp.attributes import Batches
from mfp.errors import MfpError
from mfp.gradients import Loss
from mfp.mask import FilterMask
from mfp.plan import FilterPlan, check_rate
from mfp.scores import FilterScores, check_criteria, gradients_for, require_finite, score_filters


def select_filters(scores: FilterScores, criterion: str | Mapping[str, str] | None = None) -> FilterMask:
    """Mark exactly ``layer.num_pruned`` filters of each layer as pruned: those with the lowest scores.

    >>> mask = mfp.select_filters(scores, criterion="l2_distance")
    >>> int((~mask.keep).sum()) == sum(layer.num_pruned for layer in plan.layers)
    True

    Where only some filters were scored (``scores.live``), all others are marked too, and count as lost.

    Args:
        scores: from :func:`mfp.score_filters`; its plan says how many filters go.
        criterion: a scored criterion, or one per layer ``{layer name: criterion}``; may be left out when only one
            was scored.

    Raises:
        MfpError: a criterion that was not scored, or none named among several.
    """
    plan = scores.plan
    if criterion is None:
        if len(scores) != 1:
            raise MfpError(f"name the criterion to select by: scored were {', '.join(scores)}")
        (criterion,) = scores
    if isinstance(criterion, str):
        criterion = {layer.name: criterion for layer in plan.layers}
    own = [scores[criterion[layer.name]][layer.slice] for layer in plan.layers]
    live, gone = scores.live, torch.zeros_like(torch.cat(own), dtype=torch.bool)
    if live is not None:
        gone = ~live.keep.to(gone.device)
    shared: dict[int, tuple[Tensor, Tensor]] = {}  # of layers that lose the same filters: sum of scores, any lost
    for layer, score in zip(plan.layers, own, strict=True):
        if layer.group is not None:
            total, lost = shared.get(layer.group, (0, False))
            shared[layer.group] = total + score.double(), gone[layer.slice] | lost
    keep = []
    for layer, score in zip(plan.layers, own, strict=True):
        total, lost = (score, gone[layer.slice]) if layer.group is None else shared[layer.group]
        total, lost = total.view(-1, layer.unit).sum(1), lost.view(-1, layer.unit).any(1)
        count = layer.num_pruned // layer.unit
        count = count if live is None else max(count, int(lost.sum()))
        keep.append(lowest_pruned(total.masked_fill(lost, -torch.inf), count).repeat_interleave(layer.unit))
    return FilterMask(plan, torch.cat(keep))


def lowest_pruned(scores: Tensor, count: int) -> Tensor:
    """Keep mask ``[N]``: False for the ``count`` lowest scores, the lower index first among equals."""
    keep = torch.ones_like(scores, dtype=torch.bool)
    keep[torch.argsort(scores, stable=True)[:count]] = False
    return keep


def select_mix(
    plan: FilterPlan,
    rate_norm: float,
    rate_distance: float,
    norm: str = "l2_norm",
    distance: str = "l2_distance",
    backend: str | None = None,
) -> FilterMask:
    """FPGM's mix: prune ``int(N * rate_norm)`` filters by a norm, then ``int(N * rate_distance)`` of those left.

    The distances of the second step are among the filters that are left. The plan's own rates only say which layers
    take part (rate 0 leaves a layer alone); source: He et al., arXiv 1811.00250, "FPGM-mix".

    Raises:
        MfpError: a rate outside [0, 1), two rates that leave a layer empty, a criterion of the wrong family,
            layers that lose filters together.
    """
    check_rate("rate_norm", rate_norm)
    check_rate("rate_distance", rate_distance)
    for name, family in ((norm, "magnitude"), (distance, "relation")):
        if _criteria.criterion(name).family != family:
            raise MfpError(f"select_mix: {name!r} is not a {family} criterion")
    if any(layer.group is not None for layer in plan.layers):
        raise MfpError("select_mix ranks each layer for itself; it does not take layers that lose filters together")
    layers = [layer for layer in plan.layers if layer.rate > 0]
    counts = [(int(layer.num_filters * rate_norm), int(layer.num_filters * rate_distance)) for layer in layers]
    for layer, (first, second) in zip(layers, counts, strict=True):
        if first + second >= layer.num_filters:
            raise MfpError(
                f"layer {layer.name!r} has {layer.num_filters} filters; rate_norm={rate_norm} and "
                f"rate_distance={rate_distance} would prune {first} + {second} and leave none"
            )

    keep = torch.ones(plan.num_filters, dtype=torch.bool, device=plan.weights()[0].device)
    norms = _score(plan, [plan.weight(layer) for layer in layers], norm, backend)
    left = []
    for layer, scores, (first, _) in zip(layers, norms, counts, strict=True):
        keep[layer.slice] = lowest_pruned(scores, first)
        left.append(keep[layer.slice].nonzero().squeeze(1))
    remaining = [plan.weight(layer).detach()[index].contiguous() for layer, index in zip(layers, left, strict=True)]
    distances = _score(plan, remaining, distance, backend)
    for layer, index, scores, (_, second) in zip(layers, left, distances, counts, strict=True):
        keep[layer.offset + index[~lowest_pruned(scores, second)]] = False
    return FilterMask(plan, keep)


def _score(plan: FilterPlan, weights: list[Tensor], criterion: str, backend: str | None) -> tuple[Tensor, ...]:
    known = _criteria.criterion(criterion)
    scores = ops.score_filters(weights, [known.kind], [known.exponent], backend=backend)
    require_finite(plan, scores)
    return scores[0].split([len(weight) for weight in weights])


def prune_filters_(
    plan: FilterPlan,
    criterion: str,
    *,
    mask_bn: bool = True,
    backend: str | None = None,
    calibration: Batches | None = None,
    loss: Loss | None = None,
    live: FilterMask | None = None,
) -> FilterMask:
    """Score, select and zero in one op: one launch on a GPU, one call on a CPU.

    Layers that lose filters together are scored in one launch and selected by torch operators.

    >>> mask = mfp.prune_filters_(plan, criterion="l2_distance")

    Args:
        plan: the layers and how many filters of each go.
        criterion: a name.
        mask_bn: zero the pruned filters' biases and BatchNorm entries too.
        calibration, loss: for criteria that look at data, as in :func:`mfp.score_filters`.
        live: the filters that are left; what it does not keep stays pruned and counts as lost.

    Raises:
        MfpError: as :func:`mfp.score_filters`; nothing is zeroed then. For weights that are not finite nobody looks
            while a CUDA graph is captured: the op itself then leaves layers with such weights alone.
    """
    (known,) = check_criteria((criterion,))
    grouped = any(layer.group is not None for layer in plan.layers)
    # ranked across layers, by other tensors, or among some filters: the op does none of these
    if grouped or known.source == "batchnorm" or live is not None:
        mask = select_filters(score_filters(plan, (criterion,), backend, calibration=calibration, loss=loss, live=live))
        mask.apply_(mask_bn)
        return mask
    gradients = gradients_for(plan, [known], calibration, loss)
    weights, followers = plan.weights(), plan.followers(mask_bn)
    with torch.no_grad():
        scores, keep = ops.prune_filters_(
            weights,
            [parameter for _, parameter in followers],
            [layer for layer, _ in followers],
            [layer.num_pruned for layer in plan.layers],
            [known.kind],
            [known.exponent],
            0,
            gradients,
            backend,
        )
    if not (keep.is_cuda and torch.cuda.is_current_stream_capturing()):  # a look at the scores waits for the GPU
        require_finite(plan, scores, gradients)
    return FilterMask(plan, keep)
