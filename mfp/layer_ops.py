"""The ops of layers: joins by index with their gradients, and what serving and training compute by kernels of mfp.

The compiled part has them for the CPU; of scatter_add_ there are CUDA and Triton kernels, too. Elsewhere plain torch
(reference.py) computes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mfp import backend as backends
from mfp.layouts import memory_format_of
from mfp.ops import module_of


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
    module_of(residual.device, backend).scatter_add_(residual, branch, index, relu)


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
    out = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format_of(like))
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
    groups: int = 1,
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
        groups: of filters, each of which sees its own part of the channels; 1 for Winograd's form.
    """
    return torch.ops.mfp.conv2d(input, weights, bias, filters, stride, padding, dilation, activation, winograd, groups)


def grouped_conv2d(
    input: Tensor,
    weights: Tensor,
    bias: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str = "none",
) -> Tensor:
    """:func:`conv2d` in narrow groups: of one channel and one filter (a depthwise convolution), or of 4, 8 or 16.

    Args:
        input: float32 ``[B, C, H, W]``; C is at least 16, but for a depthwise convolution.
        weights, bias: from :func:`~mfp.conv_weights.pack_grouped_conv2d`; kernels of 3 columns with stride 1 or 2
            and dilation 1, but for a depthwise convolution.
    """
    return torch.ops.mfp.grouped_conv2d(input, weights, bias, stride, padding, dilation, activation)


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
    """:func:`conv2d` with a 1x1 kernel, then a depthwise :func:`grouped_conv2d` of what it gives, with the same bits.

    What is between them stays in the caches.

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
