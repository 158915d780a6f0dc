"""Which operation follows which rule: the one place to teach a new one.

An operation that is not here is not understood: its inputs are read at full width, its results are live.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from mfp.compact.channels import Network, argument, input_node
from mfp.compact.contraction import Contraction
from mfp.compact.joins import Join
from mfp.compact.modules import channel_permute
from mfp.compact.movement import Cat, ChannelPermute, Pad, Permute, Reshape, Slice, Split, Squeeze
from mfp.compact.rules import (
    Attribute,
    BatchNorm,
    NormAcrossChannels,
    Output,
    PerChannel,
    Placeholder,
    Rule,
    Scalar,
    batch_norm_constant,
    prelu_constant,
    run_on_constants,
    zeros_if_padded,
    zeros_only,
)


def spatial_only(kernel_dims: int) -> Callable[[Network, fx.Node, int], int | None]:
    """Pooling and resizing over the last dimensions leave the channels where they are."""
    return lambda net, node, dim: dim if dim == len(net.shape(node)) - kernel_dims - 1 else None


def pooled(net: Network, node: fx.Node, dim: int) -> int | None:
    """Resizing of [B, C, ...]."""
    return dim if dim == 1 and "shape" in node.meta else None


def after_reduction(net: Network, node: fx.Node, dim: int) -> int | None:
    """mean and amax over dimensions other than the channels."""
    ndim = len(net.shape(input_node(node)))
    dims = argument(node, 1, "dim")
    if dims is None:
        return None
    dims = {d % ndim for d in (dims if isinstance(dims, tuple | list) else [dims])}
    if dim in dims:
        return None
    return dim if argument(node, 2, "keepdim", False) else dim - sum(d < dim for d in dims)


ACTIVATION = PerChannel(run_on_constants)
IDENTITY = PerChannel()
REDUCTION = PerChannel(None, after_reduction)
RESIZE = PerChannel(None, pooled)
CONTRACTION = Contraction()
BATCH_NORM = BatchNorm(batch_norm_constant)
ACROSS = NormAcrossChannels()
RESHAPE, PERMUTE, SQUEEZE, SPLIT, PAD, CAT = Reshape(), Permute(), Squeeze(), Split(), Pad(), Cat()
ADD, SUB, MUL, DIV = Join("add"), Join("sub"), Join("mul"), Join("div")

MODULES: dict[type[nn.Module], Rule] = {
    **dict.fromkeys([
        nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear,
    ], CONTRACTION),
    **dict.fromkeys([nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d], BATCH_NORM),
    **dict.fromkeys([nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d], BATCH_NORM),
    **dict.fromkeys([nn.GroupNorm, nn.LayerNorm], ACROSS),
    **dict.fromkeys([
        nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish,
        nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.Tanhshrink, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Softshrink,
        nn.Hardshrink, nn.LogSigmoid,
    ], ACTIVATION),
    **dict.fromkeys([
        nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
    ], IDENTITY),
    **{getattr(nn, f"{kind}{n}d"): PerChannel(None, spatial_only(n)) for n in (1, 2, 3)
       for kind in ("MaxPool", "AdaptiveMaxPool", "AdaptiveAvgPool", "ReflectionPad", "ReplicationPad")
       if not kind.endswith("Pad")},
    **{getattr(nn, f"AvgPool{n}d"): PerChannel(zeros_if_padded, spatial_only(n)) for n in (1, 2, 3)},
    **{getattr(nn, f"LPPool{n}d"): PerChannel(zeros_only, spatial_only(n)) for n in (1, 2)},
    **{getattr(nn, f"{kind}Pad{n}d"): PAD for n in (1, 2, 3)
       for kind in ("Zero", "Constant", "Reflection", "Replication", "Circular")},
    **dict.fromkeys([nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d], RESIZE),
    nn.PReLU: BatchNorm(prelu_constant),
    nn.Flatten: RESHAPE,
}  # fmt: skip

FUNCTIONS: dict[Callable[..., Any], Rule] = {
    **dict.fromkeys([
        torch.relu, torch.sigmoid, torch.tanh, torch.abs, torch.neg, operator.neg, torch.clamp, F.relu, F.relu6,
        F.leaky_relu, F.elu, F.celu, F.selu, F.gelu, F.silu, F.mish, F.hardswish, F.hardsigmoid, F.sigmoid, F.tanh,
        F.softplus, F.softsign, F.hardtanh, F.logsigmoid, torch.square,
    ], ACTIVATION),
    **{getattr(F, f"{kind}{n}d"): PerChannel(None, spatial_only(n)) for n in (1, 2, 3)
       for kind in ("max_pool", "adaptive_avg_pool", "adaptive_max_pool")},
    **{getattr(F, f"avg_pool{n}d"): PerChannel(zeros_if_padded, spatial_only(n)) for n in (1, 2, 3)},
    F.interpolate: RESIZE,
    **dict.fromkeys([torch.mean, torch.amax, torch.amin], REDUCTION),
    torch.sum: PerChannel(zeros_only, after_reduction),
    **dict.fromkeys([operator.add, torch.add], ADD),
    **dict.fromkeys([operator.sub, torch.sub], SUB),
    **dict.fromkeys([operator.mul, torch.mul], MUL),
    **dict.fromkeys([operator.truediv, torch.div], DIV),
    **dict.fromkeys([torch.cat, torch.concat], CAT),
    **dict.fromkeys([torch.chunk, torch.split], SPLIT),
    **dict.fromkeys([torch.flatten, torch.reshape], RESHAPE),
    **dict.fromkeys([torch.permute, torch.transpose], PERMUTE),
    **dict.fromkeys([torch.squeeze, torch.unsqueeze], SQUEEZE),
    F.pad: PAD,
    operator.getitem: Slice(),
    channel_permute: ChannelPermute(),
}  # fmt: skip

METHODS: dict[str, Rule] = {
    **dict.fromkeys(["relu", "sigmoid", "tanh", "abs", "neg", "clamp", "square"], ACTIVATION),
    **dict.fromkeys(["contiguous", "clone", "detach", "float"], IDENTITY),
    **dict.fromkeys(["mean", "amax", "amin"], REDUCTION),
    "sum": PerChannel(zeros_only, after_reduction),
    "add": ADD, "sub": SUB, "mul": MUL, "div": DIV,
    **dict.fromkeys(["chunk", "split"], SPLIT),
    **dict.fromkeys(["view", "reshape", "flatten"], RESHAPE),
    **dict.fromkeys(["permute", "transpose"], PERMUTE),
    **dict.fromkeys(["squeeze", "unsqueeze"], SQUEEZE),
}  # fmt: skip

UNKNOWN, SCALAR = Rule(), Scalar()
BY_KIND = {"placeholder": Placeholder(), "get_attr": Attribute(), "output": Output()}


def rule_for(net: Network, node: fx.Node) -> Rule:
    """The rule of a node; the safe one for whatever the table does not know."""
    if node.op in BY_KIND:
        return BY_KIND[node.op]
    if node in net.opaque:
        return UNKNOWN
    if "scalar" in node.meta:
        return SCALAR
    if node.op == "call_module":
        return MODULES.get(type(net.module(node)), UNKNOWN)
    return (FUNCTIONS if node.op == "call_function" else METHODS).get(node.target, UNKNOWN)
