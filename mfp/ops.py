"""The ops of pruning, scores, masks and optimiser steps: argument checks, and the step from a call to a backend.

Only this file and layer_ops.py name ``torch.ops.mfp``. The compiled part implements the schemas for CPU and CUDA; the
plain-torch reference stands in on any other device, and Triton is called directly when it is the chosen backend.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from mfp import backend as backends
from mfp import reference, schemas  # noqa: F401 (schemas: defines what torch.ops.mfp has)
from mfp.errors import MfpError
from mfp.layouts import is_row_dense

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TAYLOR = 4  # the kind of criterion that is computed from gradients, too


def _check_tensors(op: str, argument: str, tensors: Sequence[Tensor], device: torch.device) -> None:
    for index, tensor in enumerate(tensors):
        if tensor.device != device:
            raise MfpError(
                f"{op}: {argument}[{index}] is on {tensor.device}, the first weight on {device}; "
                "all must be on one device"
            )
        if tensor.dtype not in FLOATS:
            raise MfpError(f"{op}: {argument}[{index}] is {tensor.dtype}; expected float32, bfloat16 or float16")
        if not is_row_dense(tensor):
            raise MfpError(
                f"{op}: {argument}[{index}] has shape {tuple(tensor.shape)} and strides {tensor.stride()}; "
                "each row must be one dense block (contiguous or channels_last)"
            )


def _check_criteria(op: str, kinds: Sequence[int], exponents: Sequence[float]) -> None:
    if not kinds or len(kinds) != len(exponents):
        raise MfpError(f"{op}: expected at least one kind and as many exponents, got {len(kinds)} and {len(exponents)}")
    for kind, exponent in zip(kinds, exponents, strict=True):
        if not 0 <= kind <= TAYLOR or not 1.0 <= exponent < float("inf"):
            raise MfpError(f"{op}: kind must be 0..4 and the exponent a finite number >= 1, got {kind} and {exponent}")


def _strides(tensor: Tensor) -> list[int]:
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def _check_gradients(op: str, weights: Sequence[Tensor], kinds: Sequence[int], gradients: Sequence[Tensor]) -> None:
    if not gradients and TAYLOR not in kinds:
        return
    if len(gradients) != len(weights):
        raise MfpError(f"{op}: kind {TAYLOR} needs one gradient a weight, got {len(gradients)} for {len(weights)}")
    _check_tensors(op, "gradients", gradients, weights[0].device)
    for index, (gradient, weight) in enumerate(zip(gradients, weights, strict=True)):
        if gradient.shape != weight.shape or _strides(gradient) != _strides(weight):
            raise MfpError(
                f"{op}: gradients[{index}] has shape {tuple(gradient.shape)} and strides {gradient.stride()}; expected "
                f"those of its weight, {tuple(weight.shape)} and {weight.stride()}"
            )


def module_of(device: torch.device, backend: str | None) -> ModuleType:
    """Where the functions of the chosen backend are."""
    chosen = backends.choose(device, backend)
    if chosen.name == "reference":
        return reference
    if chosen.name == "triton":
        return importlib.import_module("mfp.kernels")  # imports triton
    return torch.ops.mfp


@torch.no_grad()
def score_filters(
    weights: Sequence[Tensor],
    kinds: Sequence[int],
    exponents: Sequence[float],
    gradients: Sequence[Tensor] = (),
    backend: str | None = None,
) -> Tensor:
    """Scores of all filters of all layers, ``[len(kinds), F]`` in float32.

    Args:
        weights: conv weights ``[N, ...]``, one a layer.
        kinds: values of :class:`mfp.criteria.Kind`.
        exponents: p for each kind.
        gradients: one a weight, of its shape and strides, in any of the dtypes; none where no kind needs them.
        backend: forces one of :func:`mfp.backend.backends`.
    """
    if not weights:
        raise MfpError("score_filters: no weights")
    _check_tensors("score_filters", "weights", weights, weights[0].device)
    _check_criteria("score_filters", kinds, exponents)
    _check_gradients("score_filters", weights, kinds, gradients)
    return module_of(weights[0].device, backend).score_filters(weights, kinds, exponents, gradients)


def mask_filters_(
    tensors: Sequence[Tensor],
    keep: Tensor,
    offsets: Sequence[int],
    rows: Sequence[int],
    backend: str | None = None,
) -> None:
    """Zero, in place, the rows whose filter is not kept.

    Args:
        tensors: tensor i is seen as ``[rows[i], -1]``.
        keep: bool ``[F]``; row r of tensor i belongs to filter ``offsets[i] + r``.
    """
    if not tensors:
        return
    _check_tensors("mask_filters_", "tensors", tensors, keep.device)
    if keep.dtype != torch.bool or keep.dim() != 1 or not keep.is_contiguous():
        raise MfpError(f"mask_filters_: keep must be a contiguous bool vector, got {keep.dtype} {tuple(keep.shape)}")
    for index, (tensor, offset, count) in enumerate(zip(tensors, offsets, rows, strict=True)):
        if count < 0 or offset < 0 or offset + count > len(keep) or (count and len(tensor) % count):
            raise MfpError(
                f"mask_filters_: tensors[{index}] {tuple(tensor.shape)} does not fit {count} filters at "
                f"{offset} of {len(keep)}"
            )
    module_of(keep.device, backend).mask_filters_(tensors, keep, offsets, rows)


def prune_filters_(
    weights: Sequence[Tensor],
    followers: Sequence[Tensor],
    follower_layers: Sequence[int],
    num_pruned: Sequence[int],
    kinds: Sequence[int],
    exponents: Sequence[float],
    chosen: int,
    gradients: Sequence[Tensor] = (),
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Score, select and zero in one op; nothing is zeroed when a score is not finite.

    Args:
        weights: conv weights ``[N, ...]``, one a layer.
        followers: tensors whose rows are zeroed with the filters of layer ``follower_layers[i]``.
        num_pruned: filters to prune in each layer.
        kinds, exponents: the criteria to score.
        chosen: which of them selects.
        gradients: as for :func:`score_filters`.

    Returns:
        scores ``[len(kinds), F]`` float32 and keep ``[F]`` bool.
    """
    if not weights:
        raise MfpError("prune_filters_: no weights")
    device = weights[0].device
    _check_tensors("prune_filters_", "weights", weights, device)
    _check_tensors("prune_filters_", "followers", followers, device)
    _check_criteria("prune_filters_", kinds, exponents)
    _check_gradients("prune_filters_", weights, kinds, gradients)
    if not 0 <= chosen < len(kinds):
        raise MfpError(f"prune_filters_: chosen must be an index into {len(kinds)} criteria, got {chosen}")
    for index, (weight, count) in enumerate(zip(weights, num_pruned, strict=True)):
        if not 0 <= count < max(len(weight), 1):
            raise MfpError(f"prune_filters_: layer {index} has {len(weight)} filters; cannot prune {count}")
    for index, (tensor, layer) in enumerate(zip(followers, follower_layers, strict=True)):
        if not 0 <= layer < len(weights) or len(tensor) % len(weights[layer]):
            raise MfpError(f"prune_filters_: followers[{index}] {tuple(tensor.shape)} does not fit layer {layer}")
    return module_of(device, backend).prune_filters_(
        weights, followers, follower_layers, num_pruned, kinds, exponents, chosen, gradients
    )


def masked_sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    keep: Tensor | None,
    offsets: Sequence[int],
    rows: Sequence[int],
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first_step: bool,
    backend: str | None = None,
) -> None:
    """One SGD step of all parameters in place; rows whose filter is not kept are neither read nor written.

    Args:
        params, grads: one gradient per parameter.
        momentum_buffers: one per parameter, or none when ``momentum`` is 0.
        keep: bool ``[F]``, or None for no mask.
        offsets, rows: parameter i is seen as ``[rows[i], -1]`` and its row r belongs to filter ``offsets[i] + r``;
            a negative offset means that it has no mask.
        first_step: the momentum buffers have no value yet and start as the gradients.
    """
    if params:
        module_of(params[0].device, backend).masked_sgd_(
            params, grads, momentum_buffers, keep, offsets, rows, lr, momentum, dampening, weight_decay, nesterov,
            maximize, first_step,
        )  # fmt: skip


def masked_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    keep: Tensor | None,
    offsets: Sequence[int],
    rows: Sequence[int],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    step: int,
    backend: str | None = None,
) -> None:
    """One AdamW step of all parameters in place; arguments as for :func:`masked_sgd_`, ``step`` counts from 1."""
    if params:
        module_of(params[0].device, backend).masked_adamw_(
            params, grads, exp_avgs, exp_avg_sqs, keep, offsets, rows, lr, beta1, beta2, eps, weight_decay, maximize,
            step,
        )  # fmt: skip
