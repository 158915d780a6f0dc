"""Operators that move channels about: reshape, permute, slices, padding, shuffles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from mfp.compact.channels import Channels, Network, arguments, is_fixed, numel_between, shape
from mfp.compact.rules import Rule, data_input
from mfp.compact.writer import Piece, Writer

aten = torch.ops.aten
RESHAPES = {aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten}


class Reshape(Rule):
    """view, reshape, flatten: the channel dimension may stay, or take dimensions beside it in."""

    understood = True

    def forward(self, net: Network, node: fx.Node) -> Channels | None:
        known = net.known(data_input(node))
        plan = None if known is None else self.plan(node, known)
        if known is None or plan is None:
            return None
        dim, before, after = plan
        return Channels(dim, known.const[:, None].expand(-1, after).reshape(-1).repeat(before))

    @staticmethod
    def plan(node: fx.Node, known: Channels) -> tuple[int, int, int] | None:
        """(dimension that holds the channels now, entries of it per channel before, after); None: split up."""
        source, count, old_dim = data_input(node), len(known), known.dim
        if count < 2:
            return None
        ahead, behind = numel_between(source, 0, old_dim), numel_between(source, old_dim + 1, len(shape(source)))
        for dim, size in enumerate(shape(node)):
            if not is_fixed(node, dim) or size % count:
                continue
            before = ratio(ahead, numel_between(node, 0, dim))
            after = ratio(behind, numel_between(node, dim + 1, len(shape(node))))
            if before is not None and after is not None and size == before * count * after:
                return dim, before, after
        return None

    def backward(self, net: Network, node: fx.Node) -> None:
        if net.known(node) is None:
            return super().backward(net, node)
        known = net.channels[data_input(node)]
        _, before, after = self.plan(node, known)
        kept = net.kept(node).view(before, -1, after).any(2).any(0)
        net.need(data_input(node), kept, known.dim)
        return None

    def write(self, out: Writer, node: fx.Node) -> Any:
        net, source = out.network, data_input(node)
        if net.known(node) is None or out.piece(source).ids is None:
            return self.write_whole(out, node)
        known = net.channels[source]
        dim, before, after = self.plan(node, known)
        ids, count = out.piece(source).ids, len(known)
        spread = torch.where(ids >= 0, ids, -count * after * before - 1)
        spread = torch.arange(before)[:, None, None] * count + spread[None, :, None]
        spread = (spread * after + torch.arange(after)).reshape(-1)
        args = list(out.value(node.args))
        new_ids = torch.where(spread >= 0, spread, -1)
        if node.target.overloadpacket is aten.flatten:
            return Piece(out.emit(node, tuple(args), {}), new_ids)
        sizes = sizes_of(out, node)
        sizes[dim] = before * len(ids) * after
        return Piece(out.reshape(node, args[0], sizes), new_ids)

    def write_whole(self, out: Writer, node: fx.Node) -> Piece:
        source = out.full(data_input(node), node)
        if node.target.overloadpacket is aten.flatten:
            return Piece(out.emit(node, (source, *node.args[1:]), {}))
        return Piece(out.reshape(node, source, sizes_of(out, node)))


def ratio(a: Any, b: Any) -> int | None:
    """a / b where that is a whole number for every input, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    quotient = (a / b).simplify() if not isinstance(a, int) else a / b
    try:
        return int(quotient) if quotient == int(quotient) else None
    except TypeError:  # an expression
        return None


def sizes_of(out: Writer, node: fx.Node) -> list[Any]:
    """The sizes of a reshape, those that no argument gives (unflatten) from the result itself."""
    found = arguments(node)
    if "size" in found or "shape" in found:
        return list(out.value(found.get("size", found.get("shape"))))
    sizes, dim = list(out.value(found["sizes"])), found["dim"] % len(shape(data_input(node)))
    source = out.piece(data_input(node)).node
    return [
        *[out.size(source, d) for d in range(dim)], *sizes,
        *[out.size(source, d) for d in range(dim + 1, len(shape(data_input(node))))],
    ]  # fmt: skip


class Move(Rule):
    """Base of operators on one tensor whose every output channel is one input channel (or a constant, at -1)."""

    understood = True

    def map(self, net: Network, node: fx.Node, known: Channels) -> tuple[int, Tensor, float] | None:
        """(channel dimension afterwards, source channel of each output channel, constant for -1)"""
        raise NotImplementedError

    def mapped(self, net: Network, node: fx.Node) -> tuple[int, Tensor, float] | None:
        known = net.known(data_input(node))
        return None if known is None else self.map(net, node, known)

    def forward(self, net: Network, node: fx.Node) -> Channels | None:
        found = self.mapped(net, node)
        if found is None:
            return None
        dim, source, fill = found
        const = net.channels[data_input(node)].const
        return Channels(dim, torch.where(source >= 0, const[source.clamp(min=0)], fill))

    def backward(self, net: Network, node: fx.Node) -> None:
        if net.known(node) is None:
            return super().backward(net, node)
        (_, source, _), known = self.mapped(net, node), net.channels[data_input(node)]
        wanted = torch.zeros(len(known), dtype=torch.bool)
        wanted[source[net.kept(node) & (source >= 0)]] = True
        net.need(data_input(node), wanted, known.dim)
        return None

    def write(self, out: Writer, node: fx.Node) -> Any:
        net = out.network
        if net.known(node) is None:
            return super().write(out, node)
        _, source, _ = self.mapped(net, node)
        piece, ids = self.pick(out, data_input(node), source, net.kept(node))
        return Piece(self.copy(out, node, piece), ids)

    def pick(self, out: Writer, node: fx.Node, source: Tensor, kept: Tensor) -> tuple[Piece, Tensor]:
        """The input with the channels that the output shows, and the output's ids for them."""
        piece, present, known = out.piece(node), out.ids(node), out.network.channels[node]
        target = torch.full((len(known) + 1,), -1)
        target[source[source >= 0]] = (source >= 0).nonzero().flatten()
        target[-1] = -1
        if len(set(source.tolist())) == len(source) and (target[:-1] >= 0).all():  # a permutation: nothing moves
            return piece, target[present]
        shown = torch.isin(source, present) & (source >= 0)
        if not shown.any():
            shown = kept if kept.any() else torch.arange(len(source)) == 0
        ids = shown.nonzero().flatten()
        aligned = out.align(node, source[ids], known.dim)
        return aligned, torch.where(aligned.ids >= 0, ids, -1) if aligned.ids is not None else ids

    def copy(self, out: Writer, node: fx.Node, piece: Piece) -> fx.Node:
        return out.emit(node, (piece.node, *out.value(node.args[1:])), out.value(node.kwargs))


class Permute(Move):
    """permute, transpose, movedim: the channels stay, their dimension moves."""

    def map(self, net: Network, node: fx.Node, known: Channels) -> tuple[int, Tensor, float] | None:
        order = new_order(arguments(node), len(shape(data_input(node))))
        return order.index(known.dim), torch.arange(len(known)), 0.0


def new_order(found: dict[str, Any], ndim: int) -> list[int]:
    """Which old dimension each new one is, from the arguments of permute, transpose, movedim or t."""
    order = list(range(ndim))
    if "dims" in found:
        return [d % ndim for d in found["dims"]]
    if "dim0" in found:
        first, second = found["dim0"] % ndim, found["dim1"] % ndim
        order[first], order[second] = second, first
        return order
    if "source" in found:  # movedim
        moves = [(d if isinstance(d, tuple | list) else [d]) for d in (found["source"], found["destination"])]
        sources, goals = ([d % ndim for d in part] for part in moves)
        rest = iter(d for d in order if d not in sources)
        return [sources[goals.index(d)] if d in goals else next(rest) for d in range(ndim)]
    return order[::-1]  # t


class Squeeze(Move):
    """squeeze and unsqueeze"""

    def map(self, net: Network, node: fx.Node, known: Channels) -> tuple[int, Tensor, float] | None:
        found, ndim = arguments(node), len(shape(data_input(node)))
        if node.target.overloadpacket is aten.unsqueeze:
            dim = found["dim"] % (ndim + 1)
            return known.dim + (dim <= known.dim), torch.arange(len(known)), 0.0
        dims = found.get("dim")
        if dims is None:
            return None
        dims = {d % ndim for d in (dims if isinstance(dims, tuple | list) else [dims])}
        gone = {d for d in dims if is_fixed(data_input(node), d) and shape(data_input(node))[d] == 1}
        if known.dim in gone or any(not is_fixed(data_input(node), d) for d in dims):
            return None
        return known.dim - sum(d < known.dim for d in gone), torch.arange(len(known)), 0.0


class Slice(Move):
    """x[:, :, ::2, ::2] and the like; narrow."""

    def map(self, net: Network, node: fx.Node, known: Channels) -> tuple[int, Tensor, float] | None:
        if not self.cuts_channels(node, known):
            return known.dim, torch.arange(len(known)), 0.0
        found = arguments(node)
        if "length" in found:
            limits = (found["start"], found["start"] + found["length"], 1)
        else:
            limits = (found["start"], found["end"], found["step"])
        if any(isinstance(limit, fx.Node) for limit in limits):
            return None
        return known.dim, torch.arange(len(known))[slice(*limits)], 0.0

    @staticmethod
    def cuts_channels(node: fx.Node, known: Channels) -> bool:
        return arguments(node)["dim"] % len(shape(data_input(node))) == known.dim

    def copy(self, out: Writer, node: fx.Node, piece: Piece) -> fx.Node:
        known = out.network.channels[data_input(node)]
        return piece.node if self.cuts_channels(node, known) else super().copy(out, node, piece)


class Select(Move):
    """x[:, :, 0]: another dimension than the channels goes."""

    def map(self, net: Network, node: fx.Node, known: Channels) -> tuple[int, Tensor, float] | None:
        dim = arguments(node)["dim"] % len(shape(data_input(node)))
        if dim == known.dim:
            return None
        return known.dim - (dim < known.dim), torch.arange(len(known)), 0.0


class ChannelShuffle(Move):
    """A channel shuffle moves no data: only the meaning of the channels changes."""

    def map(self, net: Network, node: fx.Node, known: Channels) -> tuple[int, Tensor, float] | None:
        if known.dim != 1:
            return None
        return 1, torch.arange(len(known)).view(arguments(node)["groups"], -1).t().reshape(-1), 0.0

    def copy(self, out: Writer, node: fx.Node, piece: Piece) -> fx.Node:
        return piece.node


class Pad(Move):
    """pad: new channels are constants; a border keeps a channel's constant or ends it."""

    def map(self, net: Network, node: fx.Node, known: Channels) -> tuple[int, Tensor, float] | None:
        amounts, mode, value = pad_arguments(node)
        before, after = self.own(node, known, amounts)
        if not isinstance(before, int) or not isinstance(after, int):
            return None
        if (before or after) and (mode != "constant" or before < 0 or after < 0):
            return None
        source = torch.cat([torch.full((before,), -1), torch.arange(len(known)), torch.full((after,), -1)])
        return known.dim, source, float(value)

    @staticmethod
    def own(node: fx.Node, known: Channels, amounts: list[Any]) -> tuple[Any, Any]:
        place = 2 * (len(shape(data_input(node))) - 1 - known.dim)
        return (amounts[place], amounts[place + 1]) if place + 1 < len(amounts) else (0, 0)

    def forward(self, net: Network, node: fx.Node) -> Channels | None:
        result = super().forward(net, node)
        if result is not None:
            amounts, mode, value = pad_arguments(node)
            own = self.own(node, net.channels[data_input(node)], amounts)
            borders = sum(amount != 0 for amount in amounts) - sum(amount != 0 for amount in own)
            if mode == "constant" and borders:
                result.const[result.const != value] = float("nan")
        return result

    def pick(self, out: Writer, node: fx.Node, source: Tensor, kept: Tensor) -> tuple[Piece, Tensor]:
        present = out.ids(node)
        lost = (kept & (source >= 0)).nonzero().flatten()
        offset = int((source >= 0).nonzero()[0]) if len(source) else 0
        if torch.isin(source[lost], present).all():  # the input as it is; the new channels are constants
            return out.piece(node), torch.where(present >= 0, present + offset, -1)
        piece = out.align(node, source[lost], out.network.channels[node].dim)
        return piece, lost if piece.ids is None else torch.where(piece.ids >= 0, lost, -1)

    def copy(self, out: Writer, node: fx.Node, piece: Piece) -> fx.Node:
        amounts, _, _ = pad_arguments(node)
        known = out.network.channels[data_input(node)]
        place = 2 * (len(shape(data_input(node))) - 1 - known.dim)
        if any(self.own(node, known, amounts)):
            amounts = [0 if i in (place, place + 1) else amount for i, amount in enumerate(amounts)]
            if not any(amounts):
                return piece.node
        return out.emit(node, (piece.node, out.value(amounts), *node.args[2:]), node.kwargs)


def pad_arguments(node: fx.Node) -> tuple[list[Any], str, float]:
    """(amounts from the last dimension backwards, mode, value)"""
    found = arguments(node)
    name = node.target.overloadpacket.__name__
    amounts = list(found["pad"] if "pad" in found else found["padding"])
    mode = found.get("mode", "constant" if name == "constant_pad_nd" else "edge")
    return amounts, mode, float(found.get("value") or 0.0)


def find_shuffles(graph: fx.Graph) -> None:
    """Channel shuffles in three steps (view, swap, view) become one operator."""
    for node in list(graph.nodes):
        found = _shuffle_of(node)
        if found is not None:
            with graph.inserting_before(node):
                new = graph.call_function(aten.channel_shuffle.default, found)
            new.meta.update(node.meta)
            node.replace_all_uses_with(new)
            graph.erase_node(node)


def _shuffle_of(node: fx.Node) -> tuple[fx.Node, int] | None:
    """(source, groups)"""
    if not _is_reshape(node):
        return None
    swap = node.args[0]
    while getattr(swap.target, "overloadpacket", None) in (aten.contiguous, aten.clone):
        swap = swap.args[0]
    if getattr(swap.target, "overloadpacket", None) not in (aten.transpose, aten.permute) or not _is_reshape(
        swap.args[0]
    ):
        return None
    split = swap.args[0]
    source = split.args[0]
    before, wide, after = (part.meta["val"].shape for part in (source, split, node))
    if len(wide) != len(before) + 1 or len(before) < 2 or not all(isinstance(size, int) for size in wide[1:3]):
        return None
    same = [str(before[0]), *map(str, before[2:])] == [str(wide[0]), *map(str, wide[3:])] and before[1:2] == after[1:2]
    if not same or len(after) != len(before) or wide[1] * wide[2] != before[1]:
        return None
    if new_order(arguments(swap), len(wide)) != [0, 2, 1, *range(3, len(wide))]:
        return None
    return source, wide[1]


def _is_reshape(node: Any) -> bool:
    return isinstance(node, fx.Node) and getattr(node.target, "overloadpacket", None) in RESHAPES
