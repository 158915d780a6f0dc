"""The few modules that a compact network has besides torch's own: joins by index, selections and border maps.

Under export and compilation each one is plain torch operations, so that it goes everywhere.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfp import ops
from mfp.layouts import memory_format_of
from mfp.moves import JoinChannels, SpreadChannels, TakeChannels, is_plain_call


def per_channel(values: Tensor, dim: int, ndim: int) -> Tensor:
    """[n] shaped so that it broadcasts along ``dim`` of a tensor with ``ndim`` dimensions."""
    return values.view([-1 if d == dim else 1 for d in range(ndim)])


class InputSizes(nn.Module):
    """Returns its input, and refuses one of a size that the network was not captured for.

    ``rules`` are those of :func:`mfp.capture.sizes.size_rules`.
    """

    def __init__(self, rules: list[list]) -> None:
        super().__init__()
        self.rules = [list(rule) for rule in rules]

    def forward(self, x: Tensor) -> Tensor:
        for dim, kind, number in self.rules:
            size = x.shape[dim]
            if kind == "multiple of":
                fits = size % number == 0
            else:
                fits = size == (number if kind == "is" else x.shape[number])
            if not fits:
                wanted = number if kind == "is" else f"{kind} {number}"
                raise ValueError(
                    f"this compact network takes inputs whose size in dimension {dim} is {wanted}, not {size}; "
                    "compact the model again with such an example"
                )
        return x


class ByIndex(nn.Module):
    """A module that moves the channels ``index`` along ``dim``."""

    def __init__(self, index: Tensor, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self._ordered: tuple[Tensor | None, bool] = None, False
        self.register_buffer("index", index)

    def is_fast(self, x: Tensor) -> bool:
        """Whether mfp.moves takes the call; the index is looked at once."""
        if x.is_meta or not is_plain_call(x, self.dim):
            return False
        if self._ordered[0] is not self.index:
            self._ordered = self.index, bool((self.index.diff() > 0).all())
        return self._ordered[1]


class SelectChannels(ByIndex):
    """Takes the channels ``index`` of the input, in that order."""

    def forward(self, x: Tensor) -> Tensor:
        if self.is_fast(x):
            return TakeChannels.apply(x, self.index)
        return x.index_select(self.dim, self.index)


class ExpandChannels(nn.Module):
    """Spreads the input's channels over a wider tensor whose other channels hold constants.

    Channel ``source[i]`` of the input becomes channel ``index[i]`` of the output, which has len(fill) channels
    (width channels of zeros when there is no fill). ``in_order``: all channels of the input, increasing in both.
    """

    def __init__(
        self, source: Tensor, index: Tensor, width: int, dim: int, fill: Tensor | None = None, in_order: bool = False
    ) -> None:
        super().__init__()
        self.dim, self.width = dim, width
        self.register_buffer("source", source)
        self.register_buffer("index", index)
        self.fill = None if fill is None else nn.Parameter(fill)
        self.in_order = in_order

    def forward(self, x: Tensor) -> Tensor:
        shape = list(x.shape)
        shape[self.dim] = self.width
        if self.fill is None and self.in_order and is_plain_call(x, self.dim):
            return SpreadChannels.apply(x, self.index, self.width)
        out = x.new_zeros(shape).contiguous(memory_format=memory_format_of(x))
        if self.fill is not None:
            out = out + per_channel(self.fill, self.dim, x.dim())
        if not self.in_order:
            x = x.index_select(self.dim, self.source)
        return out.index_copy(self.dim, self.index, x)


class ResidualJoin(ByIndex):
    """residual with the branch's channels added at ``index`` (and constants that the branch lost, when there are any).

    The residual stream keeps its width, [B, Cres, ...]; the branch is [B, len(index), ...].
    """

    def __init__(self, index: Tensor, dim: int, bias: Tensor | None = None) -> None:
        super().__init__(index, dim)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, residual: Tensor, branch: Tensor) -> Tensor:
        if residual.dtype == branch.dtype and self.is_fast(residual):
            out = JoinChannels.apply(residual, branch, self.index)
        else:
            out = residual.index_add(self.dim, self.index, branch)
        return out if self.bias is None else out + per_channel(self.bias, self.dim, out.dim())


class AddConstants(nn.Module):
    """Adds one constant per channel."""

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


def only_runs() -> bool:
    """Whether the call just computes: no gradient, no compilation, no export, no torch.func."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return torch._C._functorch.peek_interpreter_stack() is None


def fits_op(residual: Tensor) -> bool:
    """Whether mfp's op may run: nothing but a result is asked, of a layout and a dtype that it takes."""
    if not only_runs():
        return False
    return residual.dtype in ops.FLOATS and residual.is_contiguous(memory_format=memory_format_of(residual))
