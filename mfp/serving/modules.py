"""The modules of the serving form: convs with packed weights, and joins fused with their ReLU or with the conv before.

Under export and compilation each one is plain torch operations, so that it goes everywhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from mfp import backend as backends
from mfp import layer_ops
from mfp.conv_weights import CONV_BLOCK, conv2d_sizes, pack_conv2d, pack_grouped_conv2d, winograd_weight
from mfp.modules import fits_op, only_runs, per_channel
from mfp.reference import ACTIVATIONS


class FusedJoin(nn.Module):
    """ResidualJoin along dimension 1 with its ReLU, one pass over memory where no gradient is asked: for serving.

    Under export, and wherever the op does not apply, the same with torch's own operations.
    """

    def __init__(self, index: Tensor, relu: bool, inplace: bool = False, bias: Tensor | None = None) -> None:
        super().__init__()
        self.relu, self.inplace = relu, inplace
        self.register_buffer("index", index)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, residual: Tensor, branch: Tensor) -> Tensor:
        if self.bias is not None:
            residual = residual + per_channel(self.bias, 1, residual.dim())
        return joined(residual, branch, self.index, self.relu, self.inplace or self.bias is not None)


def joined(residual: Tensor, branch: Tensor, index: Tensor, relu: bool, inplace: bool) -> Tensor:
    """What a fused join computes, by the op where it applies, else with torch's own operations."""
    if fits_op(residual) and (len(residual), residual.shape[2:]) == (len(branch), branch.shape[2:]):
        out = residual if inplace else residual.clone()
        layer_ops.scatter_add_(out, branch, index, relu)
        return out
    whole = len(index) == residual.shape[1]  # torch's ONNX export loses an index_add to all channels
    out = residual + branch if whole else residual.index_add(1, index, branch)
    return out.relu() if relu else out


# oneDNN's convs with packed weights are internals of torch: where they are missing, its public conv runs.
ONEDNN = (
    torch.backends.mkldnn.is_available()
    and hasattr(torch._C._nn, "mkldnn_reorder_conv2d_weight")
    and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
)

# Activations that a conv computes while its result is in registers, as oneDNN calls them, with its numbers.
ONEDNN_ACTIVATIONS: dict[str, tuple[str, list[float]]] = {
    "none": ("none", []), "relu": ("relu", []), "relu6": ("hardtanh", [0.0, 6.0]), "hardswish": ("hardswish", []),
    "silu": ("swish", []),
}  # fmt: skip
WINOGRAD_PIXELS = 49  # of the input, at least


class PackedOnce(nn.Module):
    """A layer whose weight and bias are kept in another form as well, made when it is needed first."""

    weight: Tensor
    bias: Tensor | None
    _packed: tuple[tuple | None, Any, Any] = (None, None, None)  # state, weights, the parameters' memory

    def packed(self, pack: Callable[..., Any], *sizes: Any) -> Any:
        """``pack(*sizes)``, kept until the parameters or the sizes change."""
        state, packed, _ = self._packed  # once: another thread may renew it
        now = (*sizes, *version_of(self.weight), *version_of(self.bias))
        if state != now:
            with _disable_current_modes():  # what records the network's operators takes the result as it is
                packed = pack(*sizes)
            memory = [None if p is None else p.detach() for p in (self.weight, self.bias)]  # not to be given to others
            self._packed = (now, packed, memory)
        return packed

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_packed"}


class ServingConv2d(PackedOnce, nn.Conv2d):
    """conv and activation in one, with the weight packed once for this processor: for serving on a CPU.

    Most run as mfp's ops, the rest (some with groups) as oneDNN's. torch packs a plain conv's weight anew at each
    call, which costs a 1x1 conv as much time as its arithmetic. The packed copy is made at the first call
    without gradients and renewed when the parameters change; wherever it does not apply (gradients, export, other
    devices and dtypes), this is an ordinary conv and activation.
    """

    def __init__(self, *args, activation: str = "none", **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        if self.runs_op(x):
            geometry = self.stride, self.padding, self.dilation
            if self.has_narrow_groups():
                return layer_ops.grouped_conv2d(x, *self.packed(self.pack_grouped), *geometry, self.activation)
            winograd = self.is_for_winograd(x)
            weight, bias = self.packed(self.pack, winograd)
            return layer_ops.conv2d(
                x, weight, bias, self.out_channels, *geometry, self.activation, winograd, self.groups
            )
        if not (ONEDNN and self.is_plain(x)):
            return ACTIVATIONS[self.activation](super().forward(x))
        name, numbers = ONEDNN_ACTIVATIONS[self.activation]
        weight = self.packed(self.pack_for_onednn, x.shape)
        return torch.ops.mkldnn._convolution_pointwise(
            x, weight, self.bias, self.padding, self.stride, self.dilation, self.groups, name, numbers, ""
        )

    def runs_op(self, x: Tensor) -> bool:
        """Whether the call is one for mfp's op."""
        if not self.is_plain(x) or not (self.groups == 1 or self.has_narrow_groups() or self.has_wide_groups()):
            return False
        return backends.choose(x.device).name == "cpu"

    def is_depthwise(self) -> bool:
        return self.groups == self.in_channels == self.out_channels

    def has_narrow_groups(self) -> bool:
        """Whether the kernel for narrow groups is there for this conv and the fastest."""
        if self.groups == 1:
            return False
        if self.is_depthwise():
            return True
        square = self.in_channels == self.out_channels >= CONV_BLOCK
        common = self.kernel_size[1] == 3 and self.stride[1] <= 2 and self.dilation[1] == 1
        widths = (4, 8, 16) if has_avx512() else (4, 8)
        return square and common and self.in_channels // self.groups in widths

    def has_wide_groups(self) -> bool:
        """Whether the direct kernel's register tiles are well filled by each group; AVX2's are of 16 filters."""
        filters = self.out_channels // self.groups
        return filters >= CONV_BLOCK and (has_avx512() or filters % CONV_BLOCK == 0)

    def is_pointwise(self) -> bool:
        """Whether each output pixel is made of all channels of the same pixel of the input."""
        plain = (self.kernel_size, self.stride, self.groups) == ((1, 1), (1, 1), 1)
        return plain and self.padding in ((0, 0), "valid", "same")

    def is_plain(self, x: Tensor) -> bool:
        """Whether the call is one that packed weights can serve."""
        if not only_runs() or self.padding_mode != "zeros" or isinstance(self.padding, str):
            return False
        return x.dim() == 4 and x.numel() > 0 and x.is_cpu and x.dtype == self.weight.dtype == torch.float32

    def is_for_winograd(self, x: Tensor) -> bool:
        """Whether Winograd's form of the conv is faster; it must not depend on the batch, for equal results.

        Below 8 channels or filters the transformations cost too much, and its weights, four times the kernel's, must
        be used for enough outputs to be worth reading.
        """
        if (self.kernel_size, self.stride, self.dilation) != ((3, 3), (1, 1), (1, 1)):
            return False
        if self.groups > 1 or min(self.in_channels, self.out_channels) < 8 or os.environ.get("MFP_WINOGRAD") == "0":
            return False
        return x.shape[2] * x.shape[3] >= WINOGRAD_PIXELS

    def pack(self, winograd: bool = False) -> tuple[Tensor, Tensor]:
        weight, bias = self.weight.detach(), None if self.bias is None else self.bias.detach()
        return pack_conv2d(winograd_weight(weight) if winograd else weight, bias, self.groups)

    def pack_grouped(self) -> tuple[Tensor, Tensor]:
        return pack_grouped_conv2d(self.weight.detach(), None if self.bias is None else self.bias.detach())

    def pack_for_onednn(self, shape: torch.Size) -> Tensor:
        weight = self.weight.detach().to_mkldnn()
        return torch._C._nn.mkldnn_reorder_conv2d_weight(
            weight, self.padding, self.stride, self.dilation, self.groups, shape
        )  # fmt: skip


class ServingLinear(PackedOnce, nn.Linear):
    """A linear layer of vectors, as a 1x1 conv of images of one pixel: its weight is packed and read by all threads."""

    def forward(self, x: Tensor) -> Tensor:
        plain = x.dim() == 2 and x.numel() > 0 and x.is_cpu and x.dtype == self.weight.dtype == torch.float32
        if not (plain and only_runs() and backends.choose(x.device).name == "cpu") or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        geometry = (1, 1), (0, 0), (1, 1)
        return layer_ops.conv2d(x[:, :, None, None], *self.packed(self.pack), self.out_features, *geometry).flatten(1)

    def pack(self) -> tuple[Tensor, Tensor]:
        return pack_conv2d(self.weight.detach()[:, :, None, None], None if self.bias is None else self.bias.detach())


class ServingGlobalAvgPool2d(nn.Module):
    """The mean of each channel, as images of one pixel.

    For small images by a kernel that is ready faster than torch's mean. It adds up one pixel after the other, which is
    slower and less exact for large ones.
    """

    def forward(self, x: Tensor) -> Tensor:
        small = x.dim() == 4 and 0 < x.shape[2] * x.shape[3] <= 256 and len(x) > 0
        if small and only_runs() and x.is_cpu and x.is_contiguous(memory_format=torch.channels_last):
            return F.avg_pool2d(x, x.shape[2:])
        return F.adaptive_avg_pool2d(x, 1)


class ServingPointwiseDepthwise2d(nn.Module):
    """A 1x1 conv and the depthwise one that alone reads it, in one: what is between them stays in the caches."""

    def __init__(self, pointwise: ServingConv2d | None = None, depthwise: ServingConv2d | None = None) -> None:
        super().__init__()
        self.register_module("pointwise", pointwise)  # a file's are put there when they are made
        self.register_module("depthwise", depthwise)

    def forward(self, x: Tensor) -> Tensor:
        pointwise, depthwise = self.pointwise, self.depthwise
        alike = depthwise.padding_mode == "zeros" and depthwise.weight.dtype == x.dtype
        if not (alike and pointwise.runs_op(x)):
            return depthwise(pointwise(x))
        return layer_ops.pointwise_depthwise_conv2d(
            x, *pointwise.packed(pointwise.pack), pointwise.activation, pointwise.out_channels,
            *depthwise.packed(depthwise.pack_grouped), depthwise.stride, depthwise.padding, depthwise.dilation,
            depthwise.activation,
        )  # fmt: skip


def has_avx512() -> bool:
    return (backends.build_info() or {}).get("cpu_isa") == "avx512"


def version_of(tensor: Tensor | None) -> tuple:
    """Changes when the tensor's values do, but for inference tensors, which keep no count of writes."""
    if tensor is None:
        return (None,)
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version, tensor.shape


class ServingNorm2d(nn.Module):
    """A trained BatchNorm that no conv takes in, the concatenation that it alone reads, and its activation, in one.

    ``scale`` and ``shift`` ``[C]`` are what its statistics and parameters come to.
    """

    def __init__(self, scale: Tensor, shift: Tensor, activation: str = "none") -> None:
        super().__init__()
        self.scale, self.shift, self.activation = nn.Parameter(scale), nn.Parameter(shift), activation

    def forward(self, *inputs: Tensor) -> Tensor:
        if runs_op(inputs, self.scale):
            return layer_ops.batch_norm(inputs, self.scale, self.shift, self.activation)
        x = inputs[0] if len(inputs) == 1 else torch.cat(inputs, 1)
        x = x * per_channel(self.scale, 1, x.dim()) + per_channel(self.shift, 1, x.dim())
        return ACTIVATIONS[self.activation](x)


class ServingSqueezeExcite(nn.Module):
    """Squeeze-and-excitation in one: means of the channels, two small layers, and the product.

    Both weights are ``[R, C]``: the second one is the transpose of a linear layer's.
    """

    def __init__(
        self, reduce_weight: Tensor, reduce_bias: Tensor, expand_weight: Tensor, expand_bias: Tensor, activation: str,
        hard: bool, inplace: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.reduce_weight, self.reduce_bias = nn.Parameter(reduce_weight), nn.Parameter(reduce_bias)
        self.expand_weight, self.expand_bias = nn.Parameter(expand_weight), nn.Parameter(expand_bias)
        self.activation, self.hard, self.inplace = activation, hard, inplace

    def forward(self, x: Tensor) -> Tensor:
        parameters = self.reduce_weight, self.reduce_bias, self.expand_weight, self.expand_bias
        if runs_op((x,), self.reduce_weight):
            if not (self.inplace and x.is_contiguous(memory_format=torch.channels_last)):
                x = x.clone(memory_format=torch.channels_last)
            layer_ops.squeeze_excite_(x, *parameters, self.activation, self.hard)
            return x
        hidden = F.conv2d(x.mean((2, 3), keepdim=True), self.reduce_weight[:, :, None, None], self.reduce_bias)
        hidden = ACTIVATIONS[self.activation](hidden)
        gates = F.conv2d(hidden, self.expand_weight.T[:, :, None, None], self.expand_bias)
        return x * (F.hardsigmoid(gates) if self.hard else gates.sigmoid())


def runs_op(inputs: Sequence[Tensor], parameter: Tensor) -> bool:
    """Whether the call is one for mfp's ops: images in float32 on a CPU, and nothing but a result is asked."""
    if not only_runs() or parameter.dtype != torch.float32:
        return False
    if not all(x.dim() == 4 and x.is_cpu and x.dtype == torch.float32 for x in inputs):
        return False
    return backends.choose(inputs[0].device).name == "cpu"


class ServingJoin2d(ServingConv2d):
    """A conv without groups and the FusedJoin that alone reads it, in one: its result is not written anywhere else."""

    def __init__(self, *args, index: Tensor, relu: bool, inplace: bool = False, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.relu, self.inplace = relu, inplace
        self.register_buffer("index", index)

    def forward(self, residual: Tensor, x: Tensor) -> Tensor:
        geometry = self.stride, self.padding, self.dilation
        if not self.runs_op(x) or residual.dtype != x.dtype or not self.is_alike(residual, x):
            return joined(residual, super().forward(x), self.index, self.relu, self.inplace)
        winograd = self.is_for_winograd(x)
        weight, bias = self.packed(self.pack, winograd)
        own = self.inplace and residual.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
        if not (own and residual.is_contiguous(memory_format=torch.channels_last)):
            residual = residual.clone(memory_format=torch.channels_last)
        layer_ops.conv2d_join_(residual, x, weight, bias, self.index, *geometry, self.relu, winograd)
        return residual

    def is_alike(self, residual: Tensor, x: Tensor) -> bool:
        """Whether the conv's result has the residual's batch and image size: else torch broadcasts."""
        sizes = conv2d_sizes(x.shape[2:], self.kernel_size, self.stride, self.padding, self.dilation)
        return len(residual) == len(x) and list(residual.shape[2:]) == sizes


SERVING_MODULES = (
    FusedJoin, ServingConv2d, ServingGlobalAvgPool2d, ServingJoin2d, ServingLinear, ServingNorm2d,
    ServingPointwiseDepthwise2d, ServingSqueezeExcite,
)  # fmt: skip
