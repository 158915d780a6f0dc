"""Constants into BatchNorm's mean, BatchNorm into convs."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from mfp.modules import ConvWithBorder

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def conv_norm_pairs(small: fx.GraphModule) -> list[tuple[fx.Node, nn.Module, fx.Node, nn.Module]]:
    """Every conv or linear whose only reader is a BatchNorm, both called once."""
    modules = dict(small.named_modules())
    calls: dict[str, int] = {}
    for node in small.graph.nodes:
        if node.op == "call_module":
            calls[node.target] = calls.get(node.target, 0) + 1
    pairs = []
    for node in small.graph.nodes:
        if node.op != "call_module" or not isinstance(modules[node.target], BATCH_NORMS):
            continue
        source = node.args[0]
        if source.op != "call_module" or len(source.users) > 1:
            continue
        conv = modules[source.target]
        inner = conv.conv if isinstance(conv, ConvWithBorder) else conv
        foldable = isinstance(inner, nn.Linear) or hasattr(inner, "transposed")
        if (
            foldable
            and calls[source.target] == calls[node.target] == 1
            and modules[node.target].running_mean is not None
        ):
            pairs.append((source, conv, node, modules[node.target]))
    return pairs


def absorb_constants(small: fx.GraphModule) -> None:
    """A bias that came from constants alone moves into the mean of the BatchNorm behind it: no new parameter."""
    for _, conv, _, norm in conv_norm_pairs(small):
        inner = conv.conv if isinstance(conv, ConvWithBorder) else conv
        if inner.bias is not None and getattr(inner.bias, "mfp_from_constants", False):
            norm.running_mean -= inner.bias.detach().to(norm.running_mean.dtype)
            inner.bias = None


@torch.no_grad()
def fold_batchnorm(small: fx.GraphModule) -> None:
    """conv followed by BatchNorm becomes one conv with a bias."""
    for source, conv, node, norm in conv_norm_pairs(small):
        inner = conv.conv if isinstance(conv, ConvWithBorder) else conv
        scale, shift = scale_and_shift(norm)
        if inner.bias is not None:
            shift = shift + inner.bias.double() * scale
        scale_filters(inner, scale)
        inner.bias = nn.Parameter(shift.to(inner.weight.dtype))
        if isinstance(conv, ConvWithBorder):
            shape = [1, -1] if inner.transposed else [-1, 1]
            by_row = scale.view(shape + [1] * (conv.border.dim() - 2))
            conv.border.data = (conv.border.double() * by_row).to(conv.border.dtype)
        node.replace_all_uses_with(source)
        small.graph.erase_node(node)


def scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """What a trained BatchNorm multiplies by and adds, in float64."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.double()


def scale_filters(module: nn.Module, scale: Tensor) -> None:
    weight = module.weight
    if getattr(module, "transposed", False):  # [in, out / groups, ...]
        grouped = weight.double().view(module.groups, -1, *weight.shape[1:])
        by_row = scale.view(module.groups, 1, -1, *[1] * (weight.dim() - 2))
        scaled = (grouped * by_row).view(weight.shape)
    else:
        scaled = weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))
    module.weight = nn.Parameter(scaled.to(weight.dtype).contiguous(memory_format=_format(weight)))


def _format(weight: Tensor) -> torch.memory_format:
    is_last = weight.dim() == 4 and not weight.is_contiguous()
    return torch.channels_last if is_last else torch.contiguous_format
