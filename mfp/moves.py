"""Channels that move by index, with gradients: one pass over memory in each direction.

torch's ``index_add`` and ``index_select`` go channel by channel, which takes five to ten times as long where channels
lie innermost (channels_last). Here a join is a copy of the residual and mfp's scatter_add_, its gradient a gather.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mfp import ops


def is_plain_call(x: Tensor, dim: int) -> bool:
    """Whether mfp's ops may run: nothing but results and gradients is asked, of tensors that they take."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return not traced and dim == 1 and x.dim() > 2 and x.dtype in ops.FLOATS and type(x) in (Tensor, torch.nn.Parameter)


def memory_format_of(x: Tensor) -> torch.memory_format:
    if x.is_contiguous() or x.dim() not in (4, 5):
        return torch.contiguous_format
    return torch.channels_last if x.dim() == 4 else torch.channels_last_3d


def gather(x: Tensor, index: Tensor) -> Tensor:
    """x[:, index] in the memory format of x; where channels lie innermost, as columns of a matrix."""
    if x.device.type != "cpu" or x.is_contiguous() or not x.is_contiguous(memory_format=memory_format_of(x)):
        return x.index_select(1, index)
    pixels = x.movedim(1, -1)
    columns = pixels.reshape(-1, x.shape[1]).index_select(1, index)
    return columns.view(*pixels.shape[:-1], len(index)).movedim(-1, 1)


def spread(x: Tensor, index: Tensor, width: int) -> Tensor:
    """Channels of x under the numbers ``index`` (increasing) of ``width``; the others are zero."""
    shape = [x.shape[0], width, *x.shape[2:]]
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x)).zero_()
    ops.scatter_add_(out, x, index, False)
    return out


class JoinChannels(torch.autograd.Function):
    """residual [B, C, ...] with branch [B, K, ...] added at the increasing channels index [K]."""

    @staticmethod
    def forward(ctx, residual: Tensor, branch: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        out = residual.clone(memory_format=memory_format_of(residual))
        ops.scatter_add_(out, branch, index, False)
        return out

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
        return spread(x, index, width)

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
        dense = gradient.contiguous(memory_format=memory_format_of(gradient))
        return spread(dense, index, ctx.width), None
