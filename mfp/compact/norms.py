"""Normalisations: BatchNorm becomes a module again, the others stay operators with what is left of their parameters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from mfp.compact.channels import Channels, Network, all_live, arguments, shape, take_rows
from mfp.compact.rules import Rule, data_input
from mfp.compact.writer import Piece, Writer

CLASSES = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
VECTORS = ("weight", "bias", "running_mean", "running_var")


def vector(net: Network, argument: Any, missing: float, count: int) -> Tensor:
    """A parameter's values in float64; ``missing`` everywhere for None."""
    value = net.value(argument)
    return torch.full((count,), missing).double() if value is None else value.detach().double().cpu()


def shifted(net: Network, node: fx.Node, const: Tensor) -> Tensor:
    """Constants after a norm with fixed statistics (``running_mean``), or with those of the channel itself."""
    found, n = arguments(node), len(const)
    weight, shift = vector(net, found["weight"], 1.0, n), vector(net, found["bias"], 0.0, n)
    if found.get("use_input_stats", False) or found.get("running_mean") is None:
        return torch.where(const.isnan() & (weight != 0), const, shift)
    mean, variance = vector(net, found["running_mean"], 0.0, n), vector(net, found["running_var"], 1.0, n)
    normed = (const - mean) / (variance + found["eps"]).sqrt()
    return torch.where(weight == 0, shift, normed * weight + shift)


def prelu_constant(net: Network, node: fx.Node, const: Tensor) -> Tensor:
    slope = net.tensors[node.args[1].target].detach().double().cpu()
    return torch.where(const >= 0, const, const * slope)


class PerChannelNorm(Rule):
    """InstanceNorm and PReLU: one parameter per channel of dimension 1."""

    understood = True

    def __init__(self, constant: Callable[[Network, fx.Node, Tensor], Tensor]) -> None:
        self.constant = constant

    def vectors(self, node: fx.Node) -> list[fx.Node]:
        return [source for source in node.all_input_nodes if source is not data_input(node)]

    def forward(self, net: Network, node: fx.Node) -> Channels | None:
        source = data_input(node)
        known = net.channels_at(source, 1)
        found = net.known(source)
        values = [net.value(v) for v in self.vectors(node)]
        own = all(value is not None and value.numel() in (1, len(known)) for value in values)
        if not own or (found is not None and found.dim != 1):
            return None
        return Channels(1, self.constant(net, node, known.const))

    def backward(self, net: Network, node: fx.Node) -> None:
        if net.known(node) is None:
            return super().backward(net, node)
        net.need(data_input(node), net.kept(node), 1)
        for other in self.vectors(node):
            net.need_all(other)
        return None

    def write(self, out: Writer, node: fx.Node) -> Any:
        net, source = out.network, data_input(node)
        if net.known(node) is None or out.piece(source).ids is None:
            return super().write(out, node)
        piece = self.input(out, node)
        rows: dict[fx.Node, Tensor] = {v: piece.ids for v in self.vectors(node) if net.tensors[v.target].numel() > 1}

        def convert(other: fx.Node) -> Any:
            if other is source:
                return piece.node
            if other not in rows or len(other.users) > 1:
                wide = out.full(other, node)
                return out.select(wide, rows[other].clamp(min=0), 0) if other in rows else wide
            missing = 1.0 if "var" in other.target else 0.0
            return out.attribute(other.target, partial(take_rows, rows=rows[other], missing=missing))

        return Piece(out.emit(node, fx.map_arg(node.args, convert), {}), piece.ids)

    @staticmethod
    def input(out: Writer, node: fx.Node) -> Piece:
        """The norm's input, with the constant channels that the norm makes live."""
        source, kept = data_input(node), out.network.kept(node).nonzero().flatten()
        return out.piece(source) if torch.isin(kept, out.ids(source)).all() else out.align(source, kept, 1)


class BatchNorm(PerChannelNorm):
    """BatchNorm is written as a module, so that train() and eval() mean what they did."""

    def backward(self, net: Network, node: fx.Node) -> None:
        if net.known(node) is None:
            return super().backward(net, node)
        net.need(data_input(node), net.kept(node), 1)
        return None

    def write(self, out: Writer, node: fx.Node) -> Any:
        net, source = out.network, data_input(node)
        if net.known(node) is None:
            return Rule.write(self, out, node)
        name = norm_name(net, node)
        calls = net.calls[name]
        piece = self.input(out, node) if net.known(source) is not None else out.piece(source)
        if len(calls) > 1:
            rows = torch.stack([net.kept(call) for call in calls]).any(0).nonzero().flatten()
            rows = rows if len(rows) else torch.zeros(1, dtype=torch.long)
            piece = out.align(source, rows, 1)
        else:
            rows = torch.arange(len(net.channels[node])) if piece.ids is None else piece.ids
        if name not in out.cuts:
            out.cuts[name] = out.add(name, cut_norm(out, node, name, rows))
        new = out.graph.create_node("call_module", out.cuts[name], (piece.node,), {}, node.name)
        return Piece(new, piece.ids)


def norm_name(net: Network, node: fx.Node) -> str:
    """The module that holds the norm's statistics, or its weight; the operator's own name where it has neither."""
    found = arguments(node)
    for key in ("running_mean", "weight", "bias"):
        if net.value(found[key]) is not None:
            return found[key].target.rpartition(".")[0] or node.name
    return node.meta["module"] if isinstance(net.modules.get(node.meta["module"]), nn.Module) else node.name


def cut_norm(out: Writer, node: fx.Node, name: str, rows: Tensor) -> nn.Module:
    """The same norm for the channels ``rows`` only; slots of -1 scale by zero."""
    net, found = out.network, arguments(node)
    original = net.modules.get(name)
    kind = nn.SyncBatchNorm if isinstance(original, nn.SyncBatchNorm) else CLASSES[len(shape(node))]
    momentum = original.momentum if isinstance(original, nn.modules.batchnorm._BatchNorm) else found["momentum"]
    with torch.device("meta"):
        new = kind(
            len(rows), found["eps"], momentum,
            affine=found["weight"] is not None, track_running_stats=found["running_mean"] is not None,
        )  # fmt: skip
    for key in VECTORS:
        if found[key] is None:
            if key == "bias":
                new.bias = None
            continue
        left = partial(take_rows, rows=rows, missing=1.0 if key == "running_var" else 0.0)
        setattr(new, key, out.derive(found[key].target, left))
    if new.num_batches_tracked is not None:
        count = getattr(original, "num_batches_tracked", None)
        new.num_batches_tracked = torch.zeros((), dtype=torch.long) if count is None else count.detach().clone()
        out.origins[new.num_batches_tracked] = f"{name}.num_batches_tracked", torch.clone
    return new


class NormAcrossChannels(Rule):
    """GroupNorm and LayerNorm read all channels of their input; a zero scale still makes its result constant."""

    understood = True

    def forward(self, net: Network, node: fx.Node) -> Channels | None:
        found, sizes = arguments(node), shape(node)
        dim = 1 if node.target.overloadpacket is torch.ops.aten.group_norm else len(sizes) - 1
        weight, shift = net.value(found["weight"]), net.value(found["bias"])
        per_channel = all(v is None or v.dim() == 1 for v in (weight, shift))
        if weight is None or (shift is None and found["bias"] is not None) or not per_channel:
            return None
        result = all_live(dim, sizes[dim])
        zero = weight.detach().cpu() == 0
        result.const[zero] = vector(net, found["bias"], 0.0, sizes[dim])[zero]
        return result
