"""Trying out neighbours: the network pruned one way or another, looked at, and put back without a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from mfp.attributes import training_flags
from mfp.mask import FilterMask


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
