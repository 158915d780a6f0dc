"""The criteria as data: a name, a family, a formula, and the code by which the kernels know them.

One score per filter; the filters with the lowest scores are pruned. w_j is filter j of a layer, seen as K numbers; g_j
is the gradient of the loss for it, gamma_j the scale of the BatchNorm that follows.
"""

from __future__ import annotations

import enum
import math
import re
from dataclasses import dataclass

from mfp.errors import MfpError, did_you_mean


class Kind(enum.IntEnum):
    """What a kernel computes; the values are part of the ops' schema."""

    NORM = 0
    DISTANCE = 1
    COSINE_DISTANCE = 2
    WEIGHTED_HYBRID = 3
    TAYLOR = 4


@dataclass(frozen=True)
class Criterion:
    """One way to score filters.

    Attributes:
        name: the public name, e.g. ``"l2_distance"``.
        kind: what the kernels compute.
        exponent: p of the p-norm or of the Minkowski distance; 2 where the formula has no p.
        formula: the score of filter j.
        source: what is scored: ``"weights"``; ``"gradients"``, the weights and their gradients on calibration batches;
            ``"batchnorm"``, the scales of the BatchNorms that follow.
    """

    name: str
    kind: Kind
    exponent: float
    formula: str
    source: str = "weights"

    @property
    def family(self) -> str:
        """``"magnitude"`` (of the filter alone), ``"relation"`` (to the others of its layer), or its other source."""
        if self.source != "weights":
            return self.source
        return "magnitude" if self.kind is Kind.NORM else "relation"


NAMED = {
    criterion.name: criterion
    for criterion in (
        Criterion("l1_norm", Kind.NORM, 1.0, "sum_k |w_jk|"),
        Criterion("l2_norm", Kind.NORM, 2.0, "sqrt(sum_k w_jk^2)"),
        Criterion("l1_distance", Kind.DISTANCE, 1.0, "sum_i sum_k |w_jk - w_ik|"),
        Criterion("l2_distance", Kind.DISTANCE, 2.0, "sum_i sqrt(sum_k (w_jk - w_ik)^2)"),
        Criterion("cosine_distance", Kind.COSINE_DISTANCE, 2.0, "sum_i 1 - cos(w_j, w_i)"),
        Criterion("weighted_hybrid", Kind.WEIGHTED_HYBRID, 2.0, "|w_j| sum_{i != j} |w_i| (1 - |cos(w_j, w_i)|)"),
        Criterion("taylor", Kind.TAYLOR, 2.0, "(sum_k w_jk g_jk)^2", "gradients"),  # arXiv 1906.10771
        Criterion("bn_scale", Kind.NORM, 1.0, "|gamma_j|", "batchnorm"),  # arXiv 1708.06519
    )
}

#: The pool of the MFP paper (arXiv 1904.03961): the default candidates.
PAPER_CRITERIA = ("l1_norm", "l2_norm", "l1_distance", "l2_distance", "cosine_distance")

_GENERAL = re.compile(r"l(\d+(?:\.\d+)?)_(norm|distance)")


def criterion(name: str | Criterion) -> Criterion:
    """Look a criterion up by its name.

    Besides the named ones, ``l{p}_norm`` and ``l{p}_distance`` exist for any real p >= 1.

    >>> criterion("l2_distance").family
    'relation'
    >>> criterion("l1.5_norm").exponent
    1.5

    Raises:
        MfpError: unknown name, or p below 1; the known names are listed.
    """
    if isinstance(name, Criterion):
        return name
    if name in NAMED:
        return NAMED[name]
    match = _GENERAL.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        raise MfpError(
            f"unknown criterion {name!r}: known are {', '.join(NAMED)}, "
            f"and l<p>_norm and l<p>_distance for real p >= 1{did_you_mean(name, NAMED)}"
        )
    exponent = float(match[1])
    if not 1.0 <= exponent < math.inf:
        raise MfpError(f"criterion {name!r}: p must be a finite real number >= 1, not {match[1]}")
    if match[2] == "norm":
        return Criterion(name, Kind.NORM, exponent, "(sum_k |w_jk|^p)^(1/p)")
    return Criterion(name, Kind.DISTANCE, exponent, "sum_i (sum_k |w_jk - w_ik|^p)^(1/p)")
