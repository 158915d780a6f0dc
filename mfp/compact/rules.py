"""What a kind of operator does to channels, in three steps: constants forward, needs backward, the smaller call.

``Rule`` itself is the safe answer for whatever is not understood: all results live, all inputs needed, and read at
their full width. operators.py says which operator follows which rule.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from mfp.compact.channels import Channels, Network, all_live, arguments, has_shape, shape
from mfp.compact.writer import Piece, Writer


class Rule:
    """An operator that is not understood: never wrong, at worst less small."""

    understood = False

    def forward(self, net: Network, node: fx.Node) -> Any:
        return None

    def backward(self, net: Network, node: fx.Node) -> None:
        for source in node.all_input_nodes:
            net.need_all(source)

    def write(self, out: Writer, node: fx.Node) -> Any:
        args = fx.map_arg(node.args, lambda source: out.full(source, node))
        kwargs = fx.map_arg(node.kwargs, lambda source: out.full(source, node))
        return Piece(out.emit(node, args, kwargs))


class ReadsAll(Rule):
    """An operator that is known to read across channels: its inputs are whole by nature, which is no news."""

    understood = True


class Sizes(Rule):
    """Sizes and arithmetic on them: channel counts are constants by now, and the other sizes do not shrink."""

    understood = True

    def backward(self, net: Network, node: fx.Node) -> None:
        pass

    def write(self, out: Writer, node: fx.Node) -> Any:
        return Piece(out.emit(node, out.value(node.args), out.value(node.kwargs)))


class Input(Rule):
    understood = True

    def backward(self, net: Network, node: fx.Node) -> None:
        pass

    def write(self, out: Writer, node: fx.Node) -> Any:
        return Piece(out.graph.create_node("placeholder", node.target, node.args, {}, node.name))


class Attribute(Rule):
    """A parameter or buffer read by the graph itself (layer scale). What its values make of the tensors that it meets,
    the reader says."""

    understood = True

    def forward(self, net: Network, node: fx.Node) -> Channels | None:
        wide = [d for d, size in enumerate(shape(node)) if size > 1]
        if len(wide) != 1:
            return None
        return all_live(wide[0], shape(node)[wide[0]])

    def backward(self, net: Network, node: fx.Node) -> None:
        pass

    def write(self, out: Writer, node: fx.Node) -> Any:
        net, known = out.network, out.network.known(node)
        if known is None or not net.kept(node).any() or net.kept(node).all():
            return Piece(out.attribute(node.target, torch.clone))
        ids = net.kept(node).nonzero().flatten()
        left = partial(torch.index_select, dim=known.dim, index=ids.to(net.tensors[node.target].device))
        return Piece(out.attribute(node.target, left), ids)


class Output(Rule):
    """The network's results keep their width."""

    understood = True


class Pick(Rule):
    """One result of an operator with several, or one part of a nested input."""

    understood = True

    def forward(self, net: Network, node: fx.Node) -> Any:
        several = net.channels.get(node.args[0])
        return several[node.args[1]] if isinstance(several, list) else None

    def backward(self, net: Network, node: fx.Node) -> None:
        several = net.demand.get(node.args[0])
        if isinstance(several, list):
            if net.known(node) is None:
                net.need_all(node.args[0])
            else:
                several[node.args[1]] |= net.demand[node]

    def write(self, out: Writer, node: fx.Node) -> Any:
        several = out.piece(node.args[0])
        if isinstance(several, list):
            return several[node.args[1]]
        return Piece(out.emit(node, (several.node, node.args[1]), {}))


def data_input(node: fx.Node) -> fx.Node:
    """The tensor that an operator with one data argument reads: its first."""
    return node.args[0]


def same_dim(node: fx.Node, dim: int) -> int | None:
    return dim


class PerChannel(Rule):
    """An operator on one tensor that treats every channel by itself and alike: pooling, resizing, copies, reductions.

    ``constant`` maps the constants of channels; channels whose constant becomes NaN turn live. ``dim_after`` says where
    the channel dimension is afterwards (None: the operator mixes channels, or this call is not understood).
    """

    understood = True

    def __init__(
        self,
        dim_after: Callable[[fx.Node, int], int | None] = same_dim,
        constant: Callable[[fx.Node, Tensor], Tensor] | None = None,
    ) -> None:
        self.constant = constant
        self.dim_after = dim_after

    def forward(self, net: Network, node: fx.Node) -> Any:
        known = net.known(data_input(node))
        if known is None:
            return None
        dim = self.dim_after(node, known.dim)
        results = node.meta["val"] if isinstance(node.meta["val"], tuple | list) else [node.meta["val"]]
        if dim is None or any(dim >= result.dim() or result.shape[dim] != len(known) for result in results):
            return None
        const = known.const.clone() if self.constant is None else self.constant(node, known.const.clone())
        if not has_shape(node):  # values and positions of a maximum
            return [Channels(dim, const), *[Channels(dim, torch.full_like(const, torch.nan)) for _ in results[1:]]]
        return Channels(dim, const)

    def needed(self, net: Network, node: fx.Node) -> Tensor:
        channels, demand = net.channels[node], net.demand[node]
        if isinstance(channels, list):
            return torch.stack([c.live & d for c, d in zip(channels, demand, strict=True)]).any(0)
        return net.kept(node)

    def backward(self, net: Network, node: fx.Node) -> None:
        if net.channels.get(node) is None:
            return super().backward(net, node)
        source = data_input(node)
        net.need(source, self.needed(net, node), net.channels[source].dim)
        for other in node.all_input_nodes:
            if other is not source:
                net.need_all(other)
        return None

    def write(self, out: Writer, node: fx.Node) -> Any:
        net, source = out.network, data_input(node)
        if net.channels.get(node) is None:
            return super().write(out, node)
        kept, piece = self.needed(net, node).nonzero().flatten(), out.piece(source)
        if not torch.isin(kept, out.ids(source)).all():  # a constant that is none afterwards
            piece = out.align(source, kept, net.channels[source].dim)

        def convert(other: fx.Node) -> Any:
            return piece.node if other is source else out.full(other, node)

        new = out.emit(node, *self.smaller(out, node, piece, fx.map_arg(node.args, convert)))
        if isinstance(net.channels[node], list):
            return [Piece(out.pick(new, i), piece.ids) for i in range(len(net.channels[node]))]
        return Piece(new, piece.ids)

    def smaller(self, out: Writer, node: fx.Node, piece: Piece, args: tuple) -> tuple[tuple, dict]:
        return args, fx.map_arg(node.kwargs, lambda other: out.full(other, node))


class Expand(PerChannel):
    """expand: the size along the channels is the number of them that are left."""

    def smaller(self, out: Writer, node: fx.Node, piece: Piece, args: tuple) -> tuple[tuple, dict]:
        known = out.network.channels[node]
        sizes = list(args[1])
        sizes[known.dim] = -1
        return (args[0], sizes), {}


def after_expand(node: fx.Node, dim: int) -> int | None:
    return dim + len(shape(node)) - len(shape(data_input(node)))


def spatial(kernel_dims: int) -> Callable[[fx.Node, int], int | None]:
    """Pooling and resizing over the last dimensions leave the channels where they are."""
    return lambda node, dim: dim if dim == len(shape(data_input(node))) - kernel_dims - 1 else None


def after_reduction(node: fx.Node, dim: int) -> int | None:
    """mean, amax and the like over dimensions other than the channels."""
    found, ndim = arguments(node), len(shape(data_input(node)))
    dims = found.get("dim")
    if dims is None or dims == []:
        return None
    dims = {d % ndim for d in (dims if isinstance(dims, tuple | list) else [dims])}
    if dim in dims:
        return None
    return dim if found.get("keepdim") else dim - sum(d < dim for d in dims)


def along_others(node: fx.Node, dim: int) -> int | None:
    """softmax, flip, roll and the like: the channels stay unless they are what it works along."""
    found, ndim = arguments(node), len(shape(data_input(node)))
    dims = found.get("dim", found.get("dims"))
    dims = dims if isinstance(dims, tuple | list) else [dims]
    if not dims or any(not isinstance(d, int) or d % ndim == dim for d in dims):
        return None
    return dim


def all_of_it_live(node: fx.Node, const: Tensor) -> Tensor:
    return torch.full_like(const, torch.nan)


def zeros_only(node: fx.Node, const: Tensor) -> Tensor:
    """Zero stays zero, any other constant turns live."""
    return torch.where(const == 0, const, float("nan"))


def zeros_if_padded(node: fx.Node, const: Tensor) -> Tensor:
    """Average pooling: with zero padding that counts, a constant varies near the border."""
    found = arguments(node)
    varies = any(found["padding"]) and found["count_include_pad"]
    return zeros_only(node, const) if varies or found.get("divisor_override") else const
