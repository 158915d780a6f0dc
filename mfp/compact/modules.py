"""The few modules that a compact network has besides torch's own: joins by index, selections and border maps.

Each one runs plain torch operations, so that it exports everywhere.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfp import ops


def per_channel(values: Tensor, dim: int, ndim: int) -> Tensor:
    """[n] shaped so that it broadcasts along ``dim`` of a tensor with ``ndim`` dimensions."""
    return values.view([-1 if d == dim else 1 for d in range(ndim)])


class SelectChannels(nn.Module):
    """Takes the channels ``index`` of the input, in that order."""

    mfp_leaf = True

    def __init__(self, index: Tensor, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("index", index)

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(self.dim, self.index)


class ExpandChannels(nn.Module):
    """Spreads the input's channels over a wider tensor whose other channels hold constants.

    Channel ``source[i]`` of the input becomes channel ``index[i]`` of the output, which has len(fill) channels
    (width channels of zeros when there is no fill).
    """

    mfp_leaf = True

    def __init__(self, source: Tensor, index: Tensor, width: int, dim: int, fill: Tensor | None = None) -> None:
        super().__init__()
        self.dim, self.width = dim, width
        self.register_buffer("source", source)
        self.register_buffer("index", index)
        self.fill = None if fill is None else nn.Parameter(fill)

    def forward(self, x: Tensor) -> Tensor:
        shape = list(x.shape)
        shape[self.dim] = self.width
        out = x.new_zeros(shape).contiguous(memory_format=memory_format_of(x))
        if self.fill is not None:
            out = out + per_channel(self.fill, self.dim, x.dim())
        if len(self.source) < x.shape[self.dim]:
            x = x.index_select(self.dim, self.source)
        return out.index_copy(self.dim, self.index, x)


class ResidualJoin(nn.Module):
    """residual with the branch's channels added at ``index`` (and constants that the branch lost, when there are any).

    The residual stream keeps its width, [B, Cres, ...]; the branch is [B, len(index), ...].
    """

    mfp_leaf = True

    def __init__(self, index: Tensor, dim: int, bias: Tensor | None = None) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("index", index)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, residual: Tensor, branch: Tensor) -> Tensor:
        out = residual.index_add(self.dim, self.index, branch)
        return out if self.bias is None else out + per_channel(self.bias, self.dim, out.dim())


class FusedJoin(nn.Module):
    """ResidualJoin along dimension 1 with its ReLU, one pass over memory where no gradient is asked: for serving.

    Under export, and wherever the op does not apply, the same with torch's own operations.
    """

    mfp_leaf = True

    def __init__(self, index: Tensor, relu: bool, inplace: bool = False, bias: Tensor | None = None) -> None:
        super().__init__()
        self.relu, self.inplace = relu, inplace
        self.register_buffer("index", index)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, residual: Tensor, branch: Tensor) -> Tensor:
        if self.bias is not None:
            residual = residual + per_channel(self.bias, 1, residual.dim())
        if not fits_op(residual):
            out = residual.index_add(1, self.index, branch)
            return out.relu() if self.relu else out
        out = residual if self.inplace or self.bias is not None else residual.clone()
        ops.scatter_add_(out, branch, self.index, self.relu)
        return out


def fits_op(residual: Tensor) -> bool:
    """Whether mfp's op may run: no gradient, no export, a layout and a dtype that it takes."""
    if torch.is_grad_enabled() or torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
        return False
    return residual.dtype in ops.FLOATS and residual.is_contiguous(memory_format=memory_format_of(residual))


def memory_format_of(x: Tensor) -> torch.memory_format:
    if x.is_contiguous() or x.dim() not in (4, 5):
        return torch.contiguous_format
    return torch.channels_last if x.dim() == 4 else torch.channels_last_3d


class AddConstants(nn.Module):
    """Adds one constant per channel."""

    mfp_leaf = True

    def __init__(self, bias: Tensor, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + per_channel(self.bias, self.dim, x.dim())


class ConvWithBorder(nn.Module):
    """A conv some of whose input channels were constants: they are gone, their part of the result is a border map.

    Zero padding makes a constant channel vary near the border, so its part is no bias. It is the conv of an
    image of ones with ``border``, the kernels of the lost channels times their constants, summed up: exact for any
    input size, and as cheap as one input channel on one image.
    """

    mfp_leaf = True

    def __init__(self, conv: nn.Module, border: Tensor) -> None:
        super().__init__()
        self.conv = conv
        self.border = nn.Parameter(border)  # [out, 1, ...]; [1, out, ...] for a transposed conv

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        spatial = self.border.dim() - 2
        ones = x.new_ones([1, 1, *x.shape[-spatial:]])
        if conv.transposed:
            run = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[spatial - 1]
            extra = run(ones, self.border, None, conv.stride, conv.padding, conv.output_padding, 1, conv.dilation)
        else:
            run = (F.conv1d, F.conv2d, F.conv3d)[spatial - 1]
            extra = run(ones, self.border, None, conv.stride, conv.padding, conv.dilation)
        return conv(x) + (extra if x.dim() == spatial + 2 else extra[0])


def channel_permute(x: Tensor, index: list[int]) -> Tensor:
    """The channels of x in another order: what a channel shuffle does."""
    return x.index_select(1, torch.tensor(index, device=x.device))
