"""Operators that place channels by an index: what joins by index, selections and expansions look like once they are
captured again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from mfp.compact.channels import Channels, Network, all_live, arguments, is_fixed, shape
from mfp.compact.elementwise import Elementwise
from mfp.compact.movement import Move
from mfp.compact.rules import PerChannel, Rule
from mfp.compact.writer import Piece, Writer

aten = torch.ops.aten


def index_of(net: Network, node: fx.Node) -> Tensor | None:
    """The operator's index, when it is a buffer without repetitions."""
    index = net.value(arguments(node)["index"])
    if index is None or index.dim() != 1 or index.dtype != torch.long or len(index.unique()) != len(index):
        return None
    return index.cpu()


class IndexSelect(Move):
    """x.index_select(dim, index): channels in another order, some of them."""

    def map(self, net: Network, node: fx.Node, known: Channels) -> tuple[int, Tensor, float] | None:
        index = index_of(net, node)
        if index is None or arguments(node)["dim"] % len(shape(node)) != known.dim:
            return None
        return known.dim, index, 0.0

    def copy(self, out: Writer, node: fx.Node, piece: Piece) -> fx.Node:
        return piece.node


class IndexCopy(Rule):
    """base.index_copy(dim, index, source), where all of the base that still shows is constant: the source's channels
    under other numbers."""

    understood = True

    def forward(self, net: Network, node: fx.Node) -> Channels | None:
        found, index = arguments(node), index_of(net, node)
        dim = found["dim"] % len(shape(node))
        base, source = (net.channels_at(found[key], dim).const for key in ("self", "source"))
        if index is None or net.known(found["source"]) is None:
            return None
        const = base.index_copy(0, index, source)
        shows = torch.ones(len(base), dtype=torch.bool)
        shows[index] = False
        return None if base[shows].isnan().any() else Channels(dim, const)

    def backward(self, net: Network, node: fx.Node) -> None:
        known = net.known(node)
        if known is None:
            return super().backward(net, node)
        net.need(arguments(node)["source"], net.kept(node)[index_of(net, node)], known.dim)
        return None

    def write(self, out: Writer, node: fx.Node) -> Any:
        index = index_of(out.network, node)
        if index is None or out.network.known(node) is None:
            return super().write(out, node)
        source = arguments(node)["source"]
        ids = out.ids(source)
        return Piece(out.piece(source).node, torch.where(ids >= 0, index[ids.clamp(min=0)], -1))


class IndexAdd(Elementwise):
    """residual.index_add(dim, index, branch): a sum whose second operand has some of the channels."""

    def places(self, net: Network, node: fx.Node) -> Tensor | None:
        """The result's channel of each of the branch's; None where the call is not understood."""
        found = arguments(node)
        known = net.known(found["self"]) or net.known(found["source"])
        if known is None or found["dim"] % len(shape(node)) != known.dim or found["alpha"] != 1:
            return None
        return index_of(net, node)

    def forward(self, net: Network, node: fx.Node) -> Channels | None:
        found, places = arguments(node), self.places(net, node)
        if places is None:
            return None
        dim = found["dim"] % len(shape(node))
        residual, branch = (net.channels_at(found[key], dim).const for key in ("self", "source"))
        return Channels(dim, residual.index_add(0, places, branch))

    def backward(self, net: Network, node: fx.Node) -> None:
        known = net.known(node)
        if known is None:
            return Rule.backward(self, net, node)
        found, kept = arguments(node), net.kept(node)
        net.need(found["self"], kept, known.dim)
        net.need(found["source"], kept[self.places(net, node)], known.dim)
        return None

    def write(self, out: Writer, node: fx.Node) -> Any:
        known = out.network.known(node)
        if known is None:
            return Rule.write(self, out, node)
        found, places = arguments(node), self.places(out.network, node)
        residual, branch = found["self"], found["source"]
        kept = out.network.kept(node)
        return self.join(out, node, kept, residual, branch, places)


class Filled(PerChannel):
    """x.new_zeros(size), x.new_ones(size): a constant of any number of channels; nothing is read of x itself."""

    def forward(self, net: Network, node: fx.Node) -> Channels | None:
        dim = copied_dim(node)
        if dim is None or not is_fixed(node, dim):
            return None
        value = 1.0 if node.target.overloadpacket is aten.new_ones else 0.0
        return Channels(dim, torch.full_like(all_live(dim, shape(node)[dim]).const, value))

    def backward(self, net: Network, node: fx.Node) -> None:
        pass

    def write(self, out: Writer, node: fx.Node) -> Any:
        return Piece(out.emit(node, out.value(node.args), out.value(node.kwargs)))


def copied_dim(node: fx.Node) -> int | None:
    """Along which dimension channels are copied into a tensor, there or further on."""
    for user in node.users:
        if getattr(user.target, "overloadpacket", None) is aten.index_copy:
            return arguments(user)["dim"] % len(shape(user))
        if shape(user) == shape(node) and copied_dim(user) is not None:
            return copied_dim(user)
    return None
