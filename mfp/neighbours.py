"""Trying out neighbours: the network pruned one way or another, looked at, and put back without a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from mfp import attributes
from mfp.attributes import Batches, recalibrate_batchnorm, training_flags
from mfp.errors import CaptureError
from mfp.mask import FilterMask
from mfp.variants import Statistics, Variants


class Trial:
    """Measures a network as some masks would leave it.

    What a mask can zero is copied once, however many masks are tried; the buffers (BatchNorm statistics) with it.
    Inside :func:`trying`, everything else that a measurement could disturb is put back as well.
    """

    def __init__(self, model: nn.Module, masks: list[FilterMask], mask_bn: bool) -> None:
        self.model = model
        self.mask_bn = mask_bn
        self.saved = [
            (p, p.detach().clone()) for p in {id(p): p for m in masks for p, *_ in m.parameters(mask_bn)}.values()
        ]
        self.saved += [(buffer, buffer.detach().clone()) for buffer in model.buffers()]

    def measure(self, mask: FilterMask | None, attribute: Callable[[nn.Module], float]) -> float:
        """The attribute of the network pruned with ``mask``, or as it is for None."""
        try:
            if mask is not None:
                mask.apply_(self.mask_bn)
            self.model.eval()
            return float(attribute(self.model))
        finally:
            self.restore()

    @torch.no_grad()
    def restore(self) -> None:
        """Bit for bit the state before."""
        for tensor, value in self.saved:
            tensor.detach().copy_(value)


@contextmanager
def trying(model: nn.Module, masks: list[FilterMask], mask_bn: bool) -> Iterator[Trial]:
    """A :class:`Trial` after which weights, buffers, gradients, training flags and random state are as before."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(devices=sorted(devices, key=str)), training_flags(model), torch.no_grad():
        for parameter, _ in gradients:
            parameter.grad = None
        try:
            yield Trial(model, masks, mask_bn)
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient


class Comparison:
    """Measures one meta-attribute of a network and of its neighbours, each with BatchNorm statistics of its own.

    Args:
        model, mask_bn: as for :class:`Trial`.
        attribute, calibration, recalibrate: as for :class:`mfp.FilterPruner`.
    """

    def __init__(
        self,
        model: nn.Module,
        attribute: str | Callable[[nn.Module], float],
        calibration: Batches | None,
        recalibrate: bool,
        mask_bn: bool,
    ) -> None:
        self.model, self.attribute, self.calibration = model, attribute, calibration or ()
        self.recalibrate, self.mask_bn = recalibrate, mask_bn
        self._variants: Variants | Literal[False] | None = None  # False: cannot be captured

    def check(self) -> None:
        """Raise MfpError where the calibration images are too few for statistics."""
        if self.recalibrate and any(isinstance(x, Tensor) and len(x) == 1 for x, _ in self.calibration):
            with trying(self.model, [], self.mask_bn) as trial:
                trial.measure(None, self._settled)

    def _settled(self, model: nn.Module) -> float:
        self.settle_()
        return 0.0

    def measure(self, masks: Mapping[str, FilterMask]) -> tuple[float, dict[str, float], dict[str, Statistics]]:
        """The attribute of the network as it is and of each neighbour, and the statistics of the neighbours, by digest
        of their masks, where they are known; equal masks are tried once."""
        distinct = {mask.digest: mask for mask in masks.values()}
        variants = self.variants() if self.recalibrate and isinstance(self.attribute, str) else None
        if variants is not None:
            found = variants.run([None, *distinct.values()], self.calibration, mask_bn=self.mask_bn)
            values = [variant.metrics[self.attribute] for variant in found]
            statistics = dict(zip(distinct, (variant.statistics for variant in found[1:]), strict=True))
        else:
            with trying(self.model, list(distinct.values()), self.mask_bn) as trial:
                values = [trial.measure(mask, self.attribute_of) for mask in (None, *distinct.values())]
            statistics = {}
        known = dict(zip(distinct, values[1:], strict=True))
        return values[0], {name: known[mask.digest] for name, mask in masks.items()}, statistics

    def also(
        self,
        masks: Mapping[str, FilterMask],
        statistics: Mapping[str, Statistics],
        measure: Callable[[nn.Module], float],
    ) -> dict[str, float]:
        """What another measurement gives for each neighbour."""
        distinct = {mask.digest: mask for mask in masks.values()}

        def of(digest: str, model: nn.Module) -> float:
            if self.recalibrate:
                self.settle_(statistics.get(digest))
            return measure(model)

        with trying(self.model, list(distinct.values()), self.mask_bn) as trial:
            found = {
                digest: trial.measure(mask, lambda model, digest=digest: of(digest, model))
                for digest, mask in distinct.items()
            }
        return {name: found[mask.digest] for name, mask in masks.items()}

    def attribute_of(self, model: nn.Module) -> float:
        """The attribute of the network as it is now."""
        if self.recalibrate:
            self.settle_()
        if callable(self.attribute):
            return self.attribute(model)
        return attributes.measure(model, self.calibration)[self.attribute]

    def settle_(self, statistics: Statistics | None = None) -> None:
        """New BatchNorm statistics for the network as it is, those given where they were estimated already."""
        variants = self.variants()
        if variants is None:
            recalibrate_batchnorm(self.model, self.calibration)
            return
        if statistics is None:
            statistics = variants.run([None], self.calibration, measure=False)[0].statistics
        variants.settle_(statistics, self.calibration)

    def variants(self) -> Variants | None:
        """The network's graph, captured once; None where it cannot be, and the module itself must run."""
        if self._variants is None or (self._variants and not self._variants.fits()):
            try:
                self._variants = Variants(self.model, self.calibration)
            except CaptureError:
                self._variants = False  # nor at the next pruning point, and trying takes seconds
        return self._variants or None
