"""Optimisers whose step keeps pruned filters at zero: the update and the mask in one pass over memory.

:class:`MaskedSGD` and :class:`MaskedAdamW` are ``torch.optim.SGD`` and ``torch.optim.AdamW`` with another ``step``:
same arguments, parameter groups and state. The rows of pruned filters are zero in the weights and in the optimiser's
state; a step does not touch them, so that pruning makes a step cheaper instead of dearer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import is_
from typing import Any

import torch
from torch import Tensor

from mfp import ops
from mfp.errors import MfpError
from mfp.mask import FilterMask


class _MaskedStep(torch.optim.Optimizer):
    """What both optimisers share: the mask, and which rows of which parameters it means."""

    _STATE: tuple[str, ...]  # per-weight state by its name in torch's optimiser
    _mask: FilterMask | None = None

    def _start(self, mask: FilterMask | None, mask_bn: bool) -> None:
        self._mask_bn = mask_bn
        self.mask = mask

    @property
    def mask(self) -> FilterMask | None:
        """The mask in force; None for a plain optimiser. Setting it zeroes the newly pruned weights and their state."""
        return self._mask

    @mask.setter
    def mask(self, mask: FilterMask | None) -> None:
        spans = {} if mask is None else {id(p): (o, rows) for p, o, rows in mask.parameters(self._mask_bn)}
        owned = [p for group in self.param_groups for p in group["params"] if id(p) in spans]
        if spans and not owned:
            raise MfpError(
                f"{type(self).__name__}: the mask belongs to a model of which no parameter is optimised here"
            )
        self._mask = mask
        self._spans = spans
        self._masked = owned
        self._forget()

    def _forget(self) -> None:
        """Look at everything anew at the next step."""
        self._applied: tuple | None = None
        self._parts: dict[Any, tuple[list[Tensor], list[int], list[int]]] = {}
        self._keep: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_mask": self._mask, "_mask_bn": self._mask_bn}

    def __setstate__(self, state: dict[str, Any]) -> None:  # of a copy, and at the end of load_state_dict
        super().__setstate__(state)
        self.mask = self._mask

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch.optim; the mask holds for the new parameters too."""
        super().add_param_group(param_group)
        self.mask = self._mask

    def _apply_mask_(self) -> None:
        """Zero pruned rows if the mask, a masked weight, or the state was changed by anyone but this optimiser."""
        if self._mask is None or self._applied == self._versions(self._mask):
            return
        by_device: dict[torch.device, list[tuple[Tensor, int, int]]] = {}
        for parameter in self._masked:
            states = (self.state[parameter].get(name) for name in self._STATE if parameter in self.state)
            for tensor in (parameter, *states):
                if tensor is not None:
                    entry = (tensor.detach(), *self._spans[id(parameter)])
                    by_device.setdefault(tensor.device, []).append(entry)
        for device, entries in by_device.items():
            tensors, offsets, rows = zip(*entries, strict=True)
            ops.mask_filters_(tensors, self._mask.keep.to(device), offsets, rows)
        self._keep = None

    def _versions(self, mask: FilterMask) -> tuple:
        """Changes when the mask or a masked weight is changed in place."""
        return mask.keep._version, [parameter._version for parameter in self._masked]

    def _update(self, key: Any, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        """One step of these parameters, which are on one device."""
        raise NotImplementedError

    def _part(self, key: Any, params: list[Tensor]) -> tuple[Tensor | None, list[int], list[int]]:
        """keep, offsets and rows for a step of these parameters."""
        known = self._parts.get(key)
        if known is None or len(known[0]) != len(params) or not all(map(is_, known[0], params)):
            spans = [self._spans.get(id(parameter), (-1, 1)) for parameter in params]
            known = self._parts[key] = (params, [offset for offset, _ in spans], [rows for _, rows in spans])
        if self._mask is None:
            return None, known[1], known[2]
        if self._keep is None or self._keep.device != params[0].device:
            self._keep = self._mask.keep.to(params[0].device)
        return self._keep, known[1], known[2]

    def _with_gradients(self, group: dict[str, Any]) -> dict[torch.device, tuple[list[Tensor], list[Tensor]]]:
        """Parameters of a group that have a gradient, and the gradients, by device."""
        found: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is None:
                continue
            if gradient.layout is not torch.strided:
                raise MfpError(
                    f"{type(self).__name__}: a parameter of shape {tuple(parameter.shape)} has a sparse gradient "
                    f"({gradient.layout}); use torch.optim for it (e.g. nn.Embedding(sparse=False) makes it dense)"
                )
            params, grads = found.get(parameter.device) or found.setdefault(parameter.device, ([], []))
            params.append(parameter)
            grads.append(gradient)
        return found

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step for all parameters that have a gradient.

        Args:
            closure: computes the loss anew, as in torch.optim.

        Raises:
            MfpError: a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._apply_mask_()
        for index, group in enumerate(self.param_groups):
            for device, (params, grads) in self._with_gradients(group).items():
                self._update((index, device), group, params, grads)
        if self._mask is not None:
            self._applied = self._versions(self._mask)
        return loss


class MaskedSGD(_MaskedStep, torch.optim.SGD):
    """SGD that keeps pruned filters at zero.

    >>> optimizer = mfp.optim.MaskedSGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, mask=mask)
    >>> optimizer.mask = pruner.mask    # after each pruning point

    The arguments, parameter groups and ``state_dict`` are those of ``torch.optim.SGD``; the results are equal to its
    step followed by ``mask.apply_()``.

    Args:
        params: parameters or groups of them; float32, bfloat16 or float16.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in torch.optim.SGD.
        mask: the filters to keep at zero; None for none.
        mask_bn: also their biases and BatchNorm entries, as in :meth:`mfp.FilterMask.apply_`.

    Raises:
        MfpError: no parameter that the mask means is among ``params``.
    """

    _STATE = ("momentum_buffer",)

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        mask: FilterMask | None = None,
        mask_bn: bool = True,
    ) -> None:
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize)
        self._start(mask, mask_bn)

    def _update(self, key: Any, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        if group["momentum"] == 0:
            return self._call(key, group, True, params, grads, [])
        states = [self.state[parameter] for parameter in params]
        buffers = [state.get("momentum_buffer") for state in states]
        new = [i for i, buffer in enumerate(buffers) if buffer is None]
        for i in new:
            buffers[i] = states[i]["momentum_buffer"] = torch.zeros_like(params[i])
        if not new or len(new) == len(params):
            return self._call(key, group, bool(new), params, grads, buffers)
        old = sorted(set(range(len(params))) - set(new))
        for first_step, indices in ((True, new), (False, old)):
            parts = ([column[i] for i in indices] for column in (params, grads, buffers))
            self._call((*key, first_step), group, first_step, *parts)
        return None

    def _call(self, key, group, first_step: bool, params, grads, buffers) -> None:
        ops.masked_sgd_(
            params, grads, buffers, *self._part(key, params), float(group["lr"]), group["momentum"],
            group["dampening"], group["weight_decay"], group["nesterov"], group["maximize"], first_step,
        )  # fmt: skip


class MaskedAdamW(_MaskedStep, torch.optim.AdamW):
    """AdamW that keeps pruned filters at zero; see :class:`MaskedSGD`.

    >>> optimizer = mfp.optim.MaskedAdamW(model.parameters(), lr=1e-3, weight_decay=0.05, mask=mask)

    Args:
        params: parameters or groups of them; float32, bfloat16 or float16.
        lr, betas, eps, weight_decay, maximize: as in torch.optim.AdamW; there is no ``amsgrad``.
        mask, mask_bn: as in :class:`MaskedSGD`.
    """

    _STATE = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        mask: FilterMask | None = None,
        mask_bn: bool = True,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, maximize=maximize)
        self._start(mask, mask_bn)

    def _update(self, key: Any, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        if group["amsgrad"]:
            raise MfpError("MaskedAdamW has no amsgrad; the loaded state of torch.optim.AdamW has it switched on")
        states = [self.state[parameter] for parameter in params]
        for state, parameter in zip(states, params, strict=True):
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        torch._foreach_add_([state["step"] for state in states], 1)
        by_step: dict[int, list[int]] = {}
        for i, state in enumerate(states):
            by_step.setdefault(int(state["step"]), []).append(i)
        for step, indices in by_step.items():
            self._call((*key, step if len(by_step) > 1 else None), group, step, params, grads, states, indices)

    def _call(self, key, group, step: int, params, grads, states, indices: list[int]) -> None:
        if len(indices) < len(params):
            params, grads, states = ([column[i] for i in indices] for column in (params, grads, states))
        averages = [state["exp_avg"] for state in states]
        squares = [state["exp_avg_sq"] for state in states]
        beta1, beta2 = group["betas"]
        ops.masked_adamw_(
            params, grads, averages, squares, *self._part(key, params), float(group["lr"]), beta1, beta2,
            group["eps"], group["weight_decay"], group["maximize"], step,
        )  # fmt: skip
