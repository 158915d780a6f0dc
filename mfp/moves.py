"""Channels that move by index, with gradients: one pass over memory in each direction.

torch's ``index_add`` and ``index_select`` go channel by channel, which takes five to ten times as long where channels
lie innermost (channels_last). Here a join is one op, and its gradient another.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from mfp import backend as backends
from mfp import layer_ops, ops
from mfp.layouts import memory_format_of


def is_plain_call(x: Tensor, dim: int) -> bool:
    """Whether mfp's ops may run: nothing but results and gradients is asked, of tensors that they take."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    transformed = torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    return (
        not traced
        and not transformed
        and dim == 1
        and x.dim() > 2
        and x.dtype in ops.FLOATS
        and type(x) in (Tensor, torch.nn.Parameter)
    )


def gather(x: Tensor, index: Tensor) -> Tensor:
    """x[:, index] in the memory format of x."""
    if x.device.type != "cpu" or x.is_contiguous() or not x.is_contiguous(memory_format=memory_format_of(x)):
        return x.index_select(1, index)
    if x.dim() == 4 and x.dtype == torch.float32 and backends.choose(x.device).name == "cpu":
        return layer_ops.take_channels(x, index)
    pixels = x.movedim(1, -1)  # channels lie innermost: as columns of a matrix
    columns = pixels.reshape(-1, x.shape[1]).index_select(1, index)
    return columns.view(*pixels.shape[:-1], len(index)).movedim(-1, 1)


class JoinChannels(torch.autograd.Function):
    """residual [B, C, ...] with branch [B, K, ...] added at the increasing channels index [K]."""

    @staticmethod
    def forward(ctx, residual: Tensor, branch: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        return layer_ops.join_channels(residual, branch, index, residual.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (index,) = ctx.saved_tensors
        return gradient, gather(gradient, index), None


class SpreadChannels(torch.autograd.Function):
    """x [B, K, ...] as the increasing channels index [K] of width; zeros elsewhere."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, width: int) -> Tensor:
        ctx.save_for_backward(index)
        return layer_ops.join_channels(None, x, index, width)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return gather(gradient, index), None, None


class TakeChannels(torch.autograd.Function):
    """The increasing channels index [K] of x [B, C, ...]."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.width = x.shape[1]
        return gather(x, index)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return layer_ops.join_channels(None, gradient, index, ctx.width), None
