"""Checks of results against the float64 oracle (mfp/reference.py), on few filters where all would take minutes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mfp import reference
from mfp.criteria import Criterion, Kind
from mfp.errors import MfpError

FILTERS_PER_LAYER = 2
OUR_TOLERANCE = 1e-5  # the promise of the kernels
PEER_TOLERANCE = 1e-3  # peers that subtract large from large are right to about this much


class Sample:
    """The oracle's scores for a few filters of each layer, and for all filters by norms."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.weights = [weight.detach().flatten(1) for weight in weights]
        generator = torch.Generator().manual_seed(0)
        self.filters: list[tuple[int, int]] = []  # (layer, filter)
        for layer, weight in enumerate(weights):
            chosen = torch.randperm(len(weight), generator=generator)[:FILTERS_PER_LAYER]
            self.filters += [(layer, int(j)) for j in chosen]
        starts = [0]
        for weight in weights:
            starts.append(starts[-1] + len(weight))
        self.index = torch.tensor([starts[layer] + j for layer, j in self.filters])
        self._known: dict[Criterion, Tensor] = {}

    def expected(self, criterion: Criterion) -> Tensor:
        """Scores of the sampled filters, float64."""
        if criterion not in self._known:
            self._known[criterion] = torch.stack([self._score(criterion, *at) for at in self.filters])
        return self._known[criterion]

    def _score(self, criterion: Criterion, layer: int, j: int) -> Tensor:
        filters = self.weights[layer].double()
        if criterion.kind is Kind.NORM:
            return reference.score_layer(filters[j : j + 1], criterion.kind, criterion.exponent)[0]
        return reference.relation_score(filters, j, criterion.kind, criterion.exponent)

    def check(self, criteria: Sequence[Criterion], tolerance: float) -> Callable[[Sequence[Tensor]], None]:
        """A check of scores ``[criteria][F]``."""

        def check(scores: Sequence[Tensor]) -> None:
            for criterion, row in zip(criteria, scores, strict=True):
                expected = self.expected(criterion)
                error = ((row[self.index].double() - expected) / expected).abs().max()
                if not error <= tolerance:
                    raise MfpError(f"{criterion.name}: relative error {error:.1e} against the oracle")

        return check
