"""The few modules that a compact network has besides torch's own: joins by index, selections and border maps.

Under export and compilation each one is plain torch operations, so that it goes everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfp import backend as backends
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
    (width channels of zeros when there is no fill). ``in_order``: all channels of the input, increasing in both.
    """

    mfp_leaf = True

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
        if self.dim == 1 and self.fill is None and self.in_order and fits_op(x) and x.dim() > 2:
            out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x)).zero_()
            ops.scatter_add_(out, x, self.index, False)
            return out
        out = x.new_zeros(shape).contiguous(memory_format=memory_format_of(x))
        if self.fill is not None:
            out = out + per_channel(self.fill, self.dim, x.dim())
        if not self.in_order:
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
        if not fits_op(residual) or (len(residual), residual.shape[2:]) != (len(branch), branch.shape[2:]):
            return joined(residual, branch, self.index, self.relu)
        out = residual if self.inplace or self.bias is not None else residual.clone()
        ops.scatter_add_(out, branch, self.index, self.relu)
        return out


def joined(residual: Tensor, branch: Tensor, index: Tensor, relu: bool) -> Tensor:
    """What a fused join computes, with torch's own operations."""
    whole = len(index) == residual.shape[1]  # torch's ONNX export loses an index_add to all channels
    out = residual + branch if whole else residual.index_add(1, index, branch)
    return out.relu() if relu else out


def only_runs() -> bool:
    """Whether the call just computes: no gradient, no compilation, no export."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing())


def fits_op(residual: Tensor) -> bool:
    """Whether mfp's op may run: nothing but a result is asked, of a layout and a dtype that it takes."""
    if not only_runs():
        return False
    return residual.dtype in ops.FLOATS and residual.is_contiguous(memory_format=memory_format_of(residual))


def memory_format_of(x: Tensor) -> torch.memory_format:
    if x.is_contiguous() or x.dim() not in (4, 5):
        return torch.contiguous_format
    return torch.channels_last if x.dim() == 4 else torch.channels_last_3d


# oneDNN's convs with packed weights are internals of torch: where they are missing, its public conv runs.
ONEDNN = (
    torch.backends.mkldnn.is_available()
    and hasattr(torch._C._nn, "mkldnn_reorder_conv2d_weight")
    and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
)

# Activations that a conv computes while its result is in registers: (oneDNN's name, its numbers, torch's function).
ACTIVATIONS = {
    "none": ("none", [], lambda x: x),
    "relu": ("relu", [], F.relu),
    "relu6": ("hardtanh", [0.0, 6.0], F.relu6),
    "hardswish": ("hardswish", [], F.hardswish),
    "silu": ("swish", [], F.silu),
}
CLAMPS = {"none": (-math.inf, math.inf), "relu": (0.0, math.inf), "relu6": (0.0, 6.0)}


class ServingConv2d(nn.Conv2d):
    """conv and activation in one, with the weight packed once for this processor: for serving on a CPU.

    Convs without groups, with no activation or a clamp, run as mfp's op, others as oneDNN's. torch packs a plain conv's
    weight anew at each call, which costs a 1x1 conv as much time as its arithmetic. The packed copy is made at the
    first call without gradients and renewed when the parameters change; wherever it does not apply (gradients, export,
    other devices and dtypes), this is an ordinary conv and activation.
    """

    mfp_leaf = True
    _packed: tuple[tuple | None, Any, Any] = (None, None, None)  # state, weights, the parameters' memory

    def __init__(self, *args, activation: str = "none", **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        if self.runs_op(x):
            weight, bias = self.packed(self.pack)
            return ops.conv2d(
                x, weight, bias, self.out_channels, self.stride, self.padding, self.dilation, *CLAMPS[self.activation]
            )
        name, numbers, function = ACTIVATIONS[self.activation]
        if not (ONEDNN and self.is_plain(x)):
            return function(super().forward(x))
        weight = self.packed(self.pack_for_onednn, x.shape)
        return torch.ops.mkldnn._convolution_pointwise(
            x, weight, self.bias, self.padding, self.stride, self.dilation, self.groups, name, numbers, ""
        )

    def runs_op(self, x: Tensor) -> bool:
        """Whether the call is one for mfp's op."""
        if self.groups != 1 or self.activation not in CLAMPS or not self.is_plain(x):
            return False
        return backends.choose(x.device).name == "cpu"

    def is_plain(self, x: Tensor) -> bool:
        """Whether the call is one that packed weights can serve."""
        if not only_runs() or self.padding_mode != "zeros" or isinstance(self.padding, str):
            return False
        return x.dim() == 4 and x.numel() > 0 and x.is_cpu and x.dtype == self.weight.dtype == torch.float32

    def packed(self, pack: Callable[..., Any], *sizes: torch.Size) -> Any:
        """``pack(*sizes)``, kept until the parameters or the sizes change."""
        state, packed, _ = self._packed  # once: another thread may renew it
        now = (*sizes, *version_of(self.weight), *version_of(self.bias))
        if state != now:
            packed = pack(*sizes)
            memory = [None if p is None else p.detach() for p in (self.weight, self.bias)]  # not to be given to others
            self._packed = (now, packed, memory)
        return packed

    def pack(self) -> tuple[Tensor, Tensor]:
        return ops.pack_conv2d(self.weight.detach(), None if self.bias is None else self.bias.detach())

    def pack_for_onednn(self, shape: torch.Size) -> Tensor:
        weight = self.weight.detach().to_mkldnn()
        return torch._C._nn.mkldnn_reorder_conv2d_weight(
            weight, self.padding, self.stride, self.dilation, self.groups, shape
        )  # fmt: skip

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_packed"}


def version_of(tensor: Tensor | None) -> tuple:
    """Changes when the tensor's values do, but for inference tensors, which keep no count of writes."""
    if tensor is None:
        return (None,)
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version, tensor.shape


class ServingJoin2d(ServingConv2d):
    """A conv without groups and the FusedJoin that alone reads it, in one: its result is not written anywhere else."""

    def __init__(self, *args, index: Tensor, relu: bool, inplace: bool = False, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.relu, self.inplace = relu, inplace
        self.register_buffer("index", index)

    def forward(self, residual: Tensor, x: Tensor) -> Tensor:
        geometry = self.stride, self.padding, self.dilation
        if not self.runs_op(x) or residual.dtype != x.dtype or not self.is_alike(residual, x):
            return joined(residual, super().forward(x), self.index, self.relu)
        weight, bias = self.packed(self.pack)
        own = self.inplace and residual.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
        if not (own and residual.is_contiguous(memory_format=torch.channels_last)):
            residual = residual.clone(memory_format=torch.channels_last)
        ops.conv2d_join_(residual, x, weight, bias, self.index, *geometry, self.relu)
        return residual

    def is_alike(self, residual: Tensor, x: Tensor) -> bool:
        """Whether the conv's result has the residual's batch and image size: else torch broadcasts."""
        sizes = ops.conv2d_sizes(x.shape[2:], self.kernel_size, self.stride, self.padding, self.dilation)
        return len(residual) == len(x) and list(residual.shape[2:]) == sizes


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
