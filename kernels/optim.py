"""masked_sgd_ and masked_adamw_: one launch for all parameters; rows of pruned filters are neither read nor written."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfp.kernels.table import DTYPES, items_of, launcher, load_as_float, store_from_float, upload

_BLOCK = 1024  # elements that a program takes
_FIELDS = 8


@triton.jit
def _locate(parameters, items, keep, BLOCK: tl.constexpr, FIELDS: tl.constexpr):
    """Which elements of which parameter a program has, and which of them belong to kept filters."""
    item = items + 2 * tl.program_id(0)
    parameter = parameters + FIELDS * tl.load(item)
    numel, row_size, offset = tl.load(parameter + 4), tl.load(parameter + 5), tl.load(parameter + 6)
    element = tl.load(item + 1) * BLOCK + tl.arange(0, BLOCK)
    kept = element < numel
    if offset >= 0:
        kept = kept & (tl.load(keep + offset + element // row_size, mask=kept, other=0) != 0)
    return parameter, element, kept, tl.load(parameter + 7)


@triton.jit(do_not_specialize=["lr", "momentum", "dampening_rest", "weight_decay"])
def _sgd_kernel(
    parameters, items, keep, lr, momentum, dampening_rest, weight_decay,
    MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr, FIRST: tl.constexpr,
    BLOCK: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    parameter, element, kept, dtype = _locate(parameters, items, keep, BLOCK, FIELDS)
    value = load_as_float(tl.load(parameter), element, kept, dtype)
    gradient = load_as_float(tl.load(parameter + 1), element, kept, dtype)
    if MAXIMIZE:
        gradient = -gradient
    gradient += weight_decay * value
    if MOMENTUM:
        if FIRST:
            buffer = gradient
        else:
            buffer = momentum * load_as_float(tl.load(parameter + 2), element, kept, dtype) + dampening_rest * gradient
        store_from_float(tl.load(parameter + 2), element, buffer, kept, dtype)
        if NESTEROV:
            gradient += momentum * buffer
        else:
            gradient = buffer
    store_from_float(tl.load(parameter), element, value - lr * gradient, kept, dtype)


@triton.jit(do_not_specialize=["decay", "beta1_rest", "beta2", "beta2_rest", "correction2_root", "eps", "step_size"])
def _adamw_kernel(
    parameters, items, keep, decay, beta1_rest, beta2, beta2_rest, correction2_root, eps, step_size,
    MAXIMIZE: tl.constexpr, BLOCK: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    parameter, element, kept, dtype = _locate(parameters, items, keep, BLOCK, FIELDS)
    value = load_as_float(tl.load(parameter), element, kept, dtype)
    gradient = load_as_float(tl.load(parameter + 1), element, kept, dtype)
    if MAXIMIZE:
        gradient = -gradient
    mean = load_as_float(tl.load(parameter + 2), element, kept, dtype)
    mean += beta1_rest * (gradient - mean)
    square = beta2 * load_as_float(tl.load(parameter + 3), element, kept, dtype) + beta2_rest * gradient * gradient
    scale = tl.sqrt_rn(square) / correction2_root + eps
    store_from_float(tl.load(parameter + 2), element, mean, kept, dtype)
    store_from_float(tl.load(parameter + 3), element, square, kept, dtype)
    store_from_float(tl.load(parameter), element, value * decay - step_size * mean / scale, kept, dtype)


class _Parameters:
    """The table of a step. Tensors that are laid out unlike their parameter go through a copy (rare)."""

    def __init__(self, params, grads, states, keep, offsets, rows):
        self.device = params[0].device
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._read: list[Tensor] = []
        self._written = [*params, *(tensor for state in states for tensor in state)]
        table, counts = [], []
        for i, param in enumerate(params):
            if param.numel() == 0:
                continue
            masked = keep is not None and offsets[i] >= 0
            tensors = [param, grads[i], *(state[i] for state in states)]
            addresses = [self._memory(tensor, param, masked, index != 1) for index, tensor in enumerate(tensors)]
            row_size = param.numel() // rows[i] if masked else param.numel()
            offset = offsets[i] if masked else -1
            table.append(
                (*addresses, *[0] * (4 - len(addresses)), param.numel(), row_size, offset, DTYPES[param.dtype])
            )
            counts.append(triton.cdiv(param.numel(), _BLOCK))
        self.programs = sum(counts)
        if self.programs:
            self.keep = torch.ones(1, dtype=torch.uint8, device=self.device) if keep is None else keep.view(torch.uint8)
            self.arguments = (upload(table, self.device), items_of(counts, self.device), self.keep)

    def _memory(self, tensor: Tensor, param: Tensor, masked: bool, written: bool) -> int:
        if tensor.shape != param.shape or tensor.dtype != param.dtype or tensor.device != param.device:
            own, other = (f"{t.dtype} {tuple(t.shape)} on {t.device}" for t in (tensor, param))
            raise RuntimeError(f"mfp: {own} does not fit its parameter, {other}")
        rows_first = not masked or len(param) <= 1 or param.stride(0) * len(param) == param.numel()
        dense = rows_first and torch.ops.aten.is_non_overlapping_and_dense(param)
        if dense and tensor.stride() == param.stride():
            return tensor.data_ptr()
        copy = torch.empty_like(param) if dense else torch.empty(param.shape, dtype=param.dtype, device=param.device)
        copy.copy_(tensor)
        self._read.append(copy)
        if written:
            self._copies.append((tensor, copy))
        return copy.data_ptr()

    def finish(self) -> None:
        for tensor, copy in self._copies:
            tensor.copy_(copy)
        torch.autograd.graph.increment_version(self._written)  # autograd notices that they were changed


@launcher
def masked_sgd_(
    params: Sequence[Tensor], grads: Sequence[Tensor], momentum_buffers: Sequence[Tensor], keep: Tensor | None,
    offsets: Sequence[int], rows: Sequence[int], lr: float, momentum: float, dampening: float, weight_decay: float,
    nesterov: bool, maximize: bool, first_step: bool,
) -> None:  # fmt: skip
    """One step of torch.optim.SGD's formula on kept rows; arguments as in ``mfp.ops.masked_sgd_``."""
    if not params:
        return
    states = [momentum_buffers] if momentum else []
    parameters = _Parameters(params, grads, states, keep, offsets, rows)
    if parameters.programs:
        _sgd_kernel[(parameters.programs,)](
            *parameters.arguments, lr, momentum, 1 - dampening, weight_decay, MOMENTUM=momentum != 0,
            NESTEROV=nesterov, MAXIMIZE=maximize, FIRST=first_step, BLOCK=_BLOCK, FIELDS=_FIELDS,
        )  # fmt: skip
        parameters.finish()


@launcher
def masked_adamw_(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    keep: Tensor | None, offsets: Sequence[int], rows: Sequence[int], lr: float, beta1: float, beta2: float,
    eps: float, weight_decay: float, maximize: bool, step: int,
) -> None:  # fmt: skip
    """One step of AdamW (arXiv 1711.05101) on kept rows; arguments as in ``mfp.ops.masked_adamw_``."""
    if not params:
        return
    parameters = _Parameters(params, grads, [exp_avgs, exp_avg_sqs], keep, offsets, rows)
    if parameters.programs:
        _adamw_kernel[(parameters.programs,)](
            *parameters.arguments, 1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, (1 - beta2**step) ** 0.5, eps,
            lr / (1 - beta1**step), MAXIMIZE=maximize, BLOCK=_BLOCK, FIELDS=_FIELDS,
        )  # fmt: skip
        parameters.finish()
