"""What lets a soft-pruned filter learn on although its BatchNorm entries were zeroed with it.

With scale and shift zero, a ReLU behind them passes no gradient: the filter would stay zero for good. So their values
are set aside while the network is evaluated or saved, and restored by the first forward pass in training mode.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mfp.errors import MfpError
from mfp.mask import FilterMask
from mfp.plan import FilterPlan, PlannedLayer


class AffineBackup:
    """Biases and BatchNorm entries of pruned filters, kept aside until training goes on.

    Attributes:
        values: parameter name -> its values before the zeroing; empty when nothing is to be restored.
    """

    def __init__(self, plan: FilterPlan) -> None:
        self.plan = plan
        self.values: dict[str, Tensor] = {}
        self._mask: FilterMask | None = None
        plan.model.register_forward_pre_hook(_RestoreBeforeTraining(self))

    def snapshot(self) -> dict[str, Tensor]:
        """Biases and BatchNorm entries as they are now, by parameter name: to be taken before filters are zeroed."""
        return {name: parameter.detach().clone() for name, (parameter, _) in self._entries().items()}

    def set_aside(self, values: Mapping[str, Tensor], mask: FilterMask) -> None:
        """Keep the values of :meth:`snapshot` until the filters that ``mask`` prunes learn on."""
        self.values, self._mask = dict(values), mask

    @torch.no_grad()
    def restore_(self) -> None:
        """Give the pruned filters their biases and BatchNorm entries back."""
        if self._mask is None or not self.values:
            return
        for name, (parameter, layer) in self._entries().items():
            pruned = ~self._mask.keep[layer.slice].to(parameter.device)
            pruned = pruned.repeat_interleave(len(parameter) // layer.num_filters)
            parameter[pruned] = self.values[name].to(parameter)[pruned]
        self.values = {}

    def check(self, values: Mapping[str, Tensor]) -> None:
        """Raise MfpError when values from a file do not fit this network."""
        shapes = {name: parameter.shape for name, (parameter, _) in self._entries().items()}
        if values and {name: value.shape for name, value in values.items()} != shapes:
            raise MfpError("pruner state is of another network: its BatchNorm entries do not fit this one's")

    def _entries(self) -> dict[str, tuple[nn.Parameter, PlannedLayer]]:
        found = {}
        for layer in self.plan.layers:
            for follower in layer.followers:
                if not follower.is_weight:
                    name = f"{follower.module}.{follower.parameter}"
                    found[name] = (self.plan.model.get_parameter(name), layer)
        return found


class _RestoreBeforeTraining:
    """The hook. It holds no strong reference, and copies and pickles of the model carry it as one that does nothing."""

    def __init__(self, backup: AffineBackup | None = None) -> None:
        self._backup = weakref.ref(backup) if backup is not None else lambda: None

    def __call__(self, module: nn.Module, inputs: tuple) -> None:
        backup = self._backup()
        if backup is not None and backup.values and module.training:
            backup.restore_()

    def __deepcopy__(self, memo: dict) -> _RestoreBeforeTraining:
        return _RestoreBeforeTraining()

    def __reduce__(self) -> tuple:
        return _RestoreBeforeTraining, ()
