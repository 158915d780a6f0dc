"""FilterMask: which filters stay, and what it means to apply that to weights, gradients and optimiser state."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mfp import ops
from mfp.errors import MfpError
from mfp.plan import FilterPlan


@dataclass(frozen=True, eq=False)
class FilterMask:
    """Which filters of a plan are kept.

    Attributes:
        plan: the plan that gives the flat axis its meaning.
        keep: bool ``[F]``, False for pruned filters.
    """

    plan: FilterPlan
    keep: Tensor

    def __post_init__(self) -> None:
        if self.keep.dtype != torch.bool or self.keep.shape != (self.plan.num_filters,):
            raise MfpError(
                f"keep must be bool [{self.plan.num_filters}], got {self.keep.dtype} {list(self.keep.shape)}"
            )

    def layer(self, name: str) -> Tensor:
        """The part of one layer, bool ``[N]``."""
        return self.keep[self.plan[name].slice]

    @property
    def kept(self) -> dict[str, int]:
        """Filters kept in each layer."""
        return {layer.name: int(self.keep[layer.slice].sum()) for layer in self.plan.layers}

    @property
    def num_pruned(self) -> int:
        """Pruned filters of all layers."""
        return int((~self.keep).sum())

    @property
    def digest(self) -> str:
        """Short fingerprint, the same for equal masks on any device or process."""
        return hashlib.sha256(self.keep.cpu().numpy().tobytes()).hexdigest()[:16]

    def churn(self, previous: FilterMask | None) -> float:
        """Share of the pruned filters that ``previous`` did not prune: 0 for a frozen mask, 1 without a previous."""
        pruned = ~self.keep
        if previous is None or not pruned.any():
            return float(pruned.any())
        return float((pruned & previous.keep.to(pruned.device)).sum() / pruned.sum())

    def parameters(self, mask_bn: bool = True) -> list[tuple[nn.Parameter, int, int]]:
        """Everything that is masked, as (parameter, offset of its layer, N): rows of the parameter follow filters."""
        layers = self.plan.layers
        found = [(weight, *_span(layer)) for weight, layer in zip(self.plan.weights(), layers, strict=True)]
        return found + [(p, *_span(layers[index])) for index, p in self.plan.followers(mask_bn)]

    def apply_(self, mask_bn: bool = True) -> None:
        """Zero the pruned filters in place, in one call for all layers.

        Args:
            mask_bn: also their biases and BatchNorm scales and shifts, so that their output channels are zero. Without
                (as in the papers), such a channel is a constant that compaction carries on.
        """
        self._zero_rows(mask_bn, lambda parameter: parameter.detach())

    def apply_to_gradients_(self, mask_bn: bool = True) -> None:
        """Zero the gradients of what :meth:`apply_` zeroes, so that a step leaves it zero; missing ones are skipped."""
        self._zero_rows(mask_bn, lambda parameter: parameter.grad)

    def apply_to_optimizer_(self, optimizer: torch.optim.Optimizer, mask_bn: bool = True) -> None:
        """Zero momentum and other per-weight state of pruned filters, so that old steps do not revive them."""
        states = {
            key
            for parameter, *_ in self.parameters(mask_bn)
            for key, value in optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor) and value.shape == parameter.shape
        }
        for state in sorted(states):
            self._zero_rows(mask_bn, lambda parameter, state=state: optimizer.state.get(parameter, {}).get(state))

    def _zero_rows(self, mask_bn: bool, tensor_of: Callable[[nn.Parameter], Tensor | None]) -> None:
        found = [(tensor_of(parameter), offset, rows) for parameter, offset, rows in self.parameters(mask_bn)]
        found = [item for item in found if item[0] is not None]
        tensors, offsets, rows = zip(*found, strict=True) if found else ((), (), ())
        with torch.no_grad():
            ops.mask_filters_(tensors, self.keep.to(tensors[0].device) if found else self.keep, offsets, rows)


def _span(layer) -> tuple[int, int]:
    return layer.offset, layer.num_filters
