"""The same scores by other means: torch loops, scipy as the authors of FPGM do it, torch.ao, Torch-Pruning."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mfp import reference
from mfp.bench.measure import Contestant
from mfp.bench.oracle import OUR_TOLERANCE, PEER_TOLERANCE, Sample
from mfp.criteria import Criterion, Kind
from mfp.errors import MfpError

LOOPS = ("torch loop", "torch.cdist loop")


def torch_layer(criterion: Criterion) -> Callable[[Tensor], Tensor]:
    """What a user writes for one layer's filters ``[N, K]``."""
    p = criterion.exponent
    if criterion.kind is Kind.NORM:
        return lambda filters: torch.linalg.vector_norm(filters, p, dim=1)
    if criterion.kind is Kind.DISTANCE:
        return lambda filters: torch.cdist(filters, filters, p=p).sum(0)
    if criterion.kind is Kind.COSINE_DISTANCE:
        return lambda filters: (1 - _cosines(filters)).sum(0)
    return _weighted_hybrid


def _cosines(filters: Tensor) -> Tensor:
    directions = nn.functional.normalize(filters, dim=1)
    return directions @ directions.T


def _weighted_hybrid(filters: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(filters, dim=1)
    share = (1 - _cosines(filters).abs()).fill_diagonal_(0)
    return norms * (share * norms).sum(1)


def torch_loop(criterion: Criterion, sample: Sample) -> Contestant:
    """A loop over the layers."""
    score = torch_layer(criterion)
    name = LOOPS[criterion.kind is Kind.DISTANCE]
    tolerance = OUR_TOLERANCE if criterion.kind is Kind.NORM else PEER_TOLERANCE
    return Contestant(
        name,
        lambda: [torch.cat([score(filters) for filters in sample.weights])],
        sample.check([criterion], tolerance),
    )


def scipy_loop(criterion: Criterion, sample: Sample) -> Contestant | None:
    """As in the authors' code: scipy's cdist and a numpy sum."""
    if importlib.util.find_spec("scipy") is None:
        return None
    import numpy
    from scipy.spatial import distance

    metric = {1.0: "cityblock", 2.0: "euclidean"}[criterion.exponent]

    def run() -> list[Tensor]:
        arrays = [filters.numpy() for filters in sample.weights]
        sums = [numpy.sum(numpy.abs(distance.cdist(array, array, metric)), axis=0) for array in arrays]
        return [torch.from_numpy(numpy.concatenate(sums))]

    return Contestant("scipy cdist (the authors')", run, sample.check([criterion], OUR_TOLERANCE))


def torch_ao_fpgm(model: nn.Module, names: Sequence[str], rate: float, expected: list[Tensor]) -> Contestant | None:
    """A step of torch.ao's pruner: its scores and its mask.

    Args:
        expected: checked l2_distance scores of each layer.
    """
    try:
        from torch.ao.pruning._experimental.pruner.FPGM_pruner import FPGMPruner
    except ImportError:
        return None
    pruner = FPGMPruner(rate)
    pruner.prepare(model, [{"tensor_fqn": f"{name}.weight"} for name in names])
    pruner.enable_mask_update = True

    def run() -> list[Tensor]:
        pruner.step()
        return [model.get_submodule(name).parametrizations.weight[0].mask for name in names]

    def check(masks: list[Tensor]) -> None:
        for name, mask, scores in zip(names, masks, expected, strict=True):
            pruned, kept = scores[~mask], scores[mask]
            if not len(pruned) or pruned.max() > kept.min() * (1 + PEER_TOLERANCE):
                raise MfpError(f"torch.ao FPGM: layer {name} pruned others than the lowest scores")

    return Contestant("torch.ao FPGM pruner", run, check)


def torch_pruning_fpgm(model: nn.Module, convs: Sequence[nn.Conv2d], size: int) -> Contestant | None:
    """Torch-Pruning's FPGM importance of each layer's filters alone, without the layers coupled to it.

    It takes distances between abs(w)^2 and divides by their mean, so it is checked against the oracle on those.
    """
    if importlib.util.find_spec("torch_pruning") is None:
        return None
    import torch_pruning as tp

    graph = tp.DependencyGraph().build_dependency(model, torch.zeros(1, 3, size, size))
    groups = []
    for conv in convs:
        whole = graph.get_pruning_group(conv, tp.prune_conv_out_channels, list(range(conv.out_channels)))
        groups.append(tp.dependency.Group())
        groups[-1]._DG = graph
        groups[-1]._group.append(whole[0])
    importance = tp.importance.FPGMImportance()

    def check(scores: list[Tensor]) -> None:
        for conv, row in zip(convs, scores, strict=True):
            filters = conv.weight.detach().double().flatten(1).square()
            first, second = (reference.relation_score(filters, j, Kind.DISTANCE, 2.0) for j in (0, 1))
            error = abs(float(row[0] / row[1] * second / first - 1))
            if not error <= PEER_TOLERANCE:
                raise MfpError(f"Torch-Pruning FPGM: relative error {error:.1e} against the oracle")

    return Contestant("Torch-Pruning FPGM importance", lambda: [importance(group) for group in groups], check)
