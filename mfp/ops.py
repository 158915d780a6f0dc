"""The ops: argument checks, and the step from a call to a backend.

The only file that names ``torch.ops.mfp``. The compiled part implements the schemas for the CPU and, except for the
convs, for CUDA; the plain-torch reference stands in on any other device, and Triton is called directly when it is the
chosen backend.
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

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TAYLOR = 4  # the kind of criterion that is computed from gradients, too


def is_row_dense(tensor: Tensor) -> bool:
    """Whether every row ``tensor[j]`` is one dense block and the blocks follow each other without gaps.

    True for contiguous and channels_last weights alike; such a filter needs no copy, whatever its layout.
    """
    if tensor.is_contiguous():
        return True
    row = tensor.numel() // max(len(tensor), 1)
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride()[1:], tensor.shape[1:], strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return len(tensor) <= 1 or tensor.stride(0) == row


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


def _module(device: torch.device, backend: str | None) -> ModuleType:
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
    return _module(weights[0].device, backend).score_filters(weights, kinds, exponents, gradients)


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
    _module(keep.device, backend).mask_filters_(tensors, keep, offsets, rows)


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
    return _module(device, backend).prune_filters_(
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
        _module(params[0].device, backend).masked_sgd_(
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
        _module(params[0].device, backend).masked_adamw_(
            params, grads, exp_avgs, exp_avg_sqs, keep, offsets, rows, lr, beta1, beta2, eps, weight_decay, maximize,
            step,
        )  # fmt: skip


def scatter_add_(
    residual: Tensor, branch: Tensor, index: Tensor, relu: bool = False, *, backend: str | None = None
) -> None:
    """``residual[:, index] += branch``, then ReLU if asked, in one pass over memory and without gradients.

    >>> residual, branch = torch.zeros(1, 4, 2, 2), torch.ones(1, 2, 2, 2)
    >>> scatter_add_(residual, branch, torch.tensor([0, 3]))
    >>> residual[0, :, 0, 0]
    tensor([1., 0., 0., 1.])

    Args:
        residual: ``[B, C, ...]``, contiguous or channels_last; overwritten.
        branch: ``[B, len(index), ...]``, the same dtype.
        index: int64, strictly increasing channels of the residual.
        relu: rectify the result (all channels of it).
        backend: a backend's name, to force it; the best one otherwise.
    """
    _module(residual.device, backend).scatter_add_(residual, branch, index, relu)


def join_channels(residual: Tensor | None, branch: Tensor, index: Tensor, channels: int) -> Tensor:
    """:func:`scatter_add_` to a new tensor of so many channels, without ReLU; no residual stands for zeros.

    Args:
        residual: ``[B, channels, ...]``, whose layout (contiguous or channels_last) the result has; else the branch's.
        branch: ``[B, len(index), ...]``, the same dtype.
        index: int64, strictly increasing numbers below ``channels``.
    """
    if backends.choose(branch.device).name == "cpu":
        return torch.ops.mfp.join_channels(residual, branch, index, channels)
    shape, like = [branch.shape[0], channels, *branch.shape[2:]], branch if residual is None else residual
    out = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=reference.memory_format_of(like))
    out = out.zero_() if residual is None else out.copy_(residual)
    scatter_add_(out, branch, index)
    return out


def take_channels(input: Tensor, index: Tensor) -> Tensor:
    """``input[:, index]``, without gradients; channels_last.

    Args:
        input: float32 ``[B, C, H, W]``.
        index: int64 ``[K]``, increasing.
    """
    return torch.ops.mfp.take_channels(input, index)


def conv2d(
    input: Tensor,
    weights: Tensor,
    bias: Tensor,
    filters: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str = "none",
    winograd: bool = False,
) -> Tensor:
    """A convolution and what is computed of its result, without gradients; channels_last.

    Each output is summed in one order: with finite weights bitwise the same for any batch and number of threads. The
    one kernel is for the CPU, and the caller sees to it that it is the chosen backend there; elsewhere torch's own
    convolution runs.

    Args:
        input: float32 ``[B, C, H, W]``.
        weights, bias: from :func:`~mfp.conv_weights.pack_conv2d`.
        filters: how many of them there are.
        activation: "none", "relu", "relu6", "hardswish" or "silu".
        winograd: the weights went through :func:`~mfp.conv_weights.winograd_weight` first; for a 3x3 kernel with stride
            and dilation 1. A quarter of the multiplications, and results that differ from the plain sum by up to 5e-6
            of the largest output; what is not finite in the input spreads to the 4x4 outputs computed with it.
    """
    return torch.ops.mfp.conv2d(input, weights, bias, filters, stride, padding, dilation, activation, winograd)


def depthwise_conv2d(
    input: Tensor,
    weights: Tensor,
    bias: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str = "none",
) -> Tensor:
    """:func:`conv2d` where each channel has one kernel of its own.

    Args:
        input: float32 ``[B, C, H, W]``.
        weights, bias: from :func:`~mfp.conv_weights.pack_depthwise_conv2d`.
    """
    return torch.ops.mfp.depthwise_conv2d(input, weights, bias, stride, padding, dilation, activation)


def pointwise_depthwise_conv2d(
    input: Tensor,
    pointwise_weights: Tensor,
    pointwise_bias: Tensor,
    pointwise_activation: str,
    channels: int,
    weights: Tensor,
    bias: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str = "none",
) -> Tensor:
    """:func:`conv2d` with a 1x1 kernel and :func:`depthwise_conv2d` of its result, which goes to no memory: same bits.

    Args:
        input: float32 ``[B, C, H, W]``, at least a pixel.
        pointwise_weights, pointwise_bias: from :func:`~mfp.conv_weights.pack_conv2d`.
        channels: between the two, and of the result.
        weights, bias, stride, padding, dilation, activation: of the depthwise one.
    """
    return torch.ops.mfp.pointwise_depthwise_conv2d(
        input, pointwise_weights, pointwise_bias, pointwise_activation, channels, weights, bias, stride, padding,
        dilation, activation,
    )  # fmt: skip


def conv2d_join_(
    residual: Tensor,
    input: Tensor,
    weights: Tensor,
    bias: Tensor,
    index: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    relu: bool = False,
    winograd: bool = False,
) -> None:
    """``residual[:, index] += conv(input)``, then ReLU if asked, in one pass; arguments as for :func:`conv2d`.

    Args:
        residual: float32 ``[B, R, H, W]``, channels_last; must not share memory with the input.
        index: int64, strictly increasing channels of the residual, one for each filter.
    """
    torch.ops.mfp.conv2d_join_(residual, input, weights, bias, index, stride, padding, dilation, relu, winograd)


def batch_norm(inputs: Sequence[Tensor], scale: Tensor, shift: Tensor, activation: str = "none") -> Tensor:
    """``activation(cat(inputs, 1) * scale + shift)`` in one pass, without gradients; channels_last.

    Args:
        inputs: float32 ``[B, C_i, H, W]``, which differ in the channels alone.
        scale, shift: float32 ``[C]``, one number for each channel of all inputs.
        activation: as for :func:`conv2d`.
    """
    return torch.ops.mfp.batch_norm(inputs, scale, shift, activation)


def batch_norm_training_(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """BatchNorm by the statistics of the batch, which the running ones move towards; without gradients; channels_last.

    torch's own takes many times as long on a CPU where the channels are no multiple of 16.

    Args:
        input: float32 ``[B, C, H, W]``, more than one value a channel.
        weight, bias, running_mean, running_var: float32 ``[C]``; the last two are overwritten.
        momentum, eps: as in :class:`torch.nn.BatchNorm2d`.

    Returns:
        the output ``[B, C, H, W]``, and what :func:`batch_norm_gradients` needs: means and ``1 / sqrt(var + eps)``,
        ``[C]`` each.
    """
    return torch.ops.mfp.batch_norm_training_(input, weight, bias, running_mean, running_var, momentum, eps)


def batch_norm_gradients(
    gradient: Tensor, input: Tensor, weight: Tensor, mean: Tensor, inverse_std: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias of :func:`batch_norm_training_`, whose output has this gradient.

    Args:
        gradient, input: float32 ``[B, C, H, W]``.
        weight: float32 ``[C]``.
        mean, inverse_std: float32 ``[C]``, as :func:`batch_norm_training_` returned them.
    """
    return torch.ops.mfp.batch_norm_gradients(gradient, input, weight, mean, inverse_std)


def squeeze_excite_(
    input: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    activation: str = "relu",
    hard: bool = False,
) -> None:
    """Multiplies every channel of an image by a gate, in place and without gradients.

    The gates are ``sigmoid(expand(activation(reduce(means of the channels))))`` (Hu et al., arXiv 1709.01507).

    Args:
        input: float32 ``[B, C, H, W]``, channels_last; overwritten.
        reduce_weight, reduce_bias: ``[R, C]``, ``[R]``.
        expand_weight, expand_bias: ``[R, C]`` (the transpose of a linear layer's), ``[C]``.
        activation: as for :func:`conv2d`.
        hard: the gates are hard sigmoids.
    """
    torch.ops.mfp.squeeze_excite_(input, reduce_weight, reduce_bias, expand_weight, expand_bias, activation, hard)
