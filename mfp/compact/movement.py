"""Operations that move channels about: reshape, permute, slices, chunks, concatenation, padding, shuffles."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from mfp.compact.builder import Builder, Piece
from mfp.compact.channels import Channels, Network, argument, input_node
from mfp.compact.rules import Rule, Scalar, is_size


class Reshape(Rule):
    """view, reshape, flatten: the channel dimension may stay, or take dimensions beside it in."""

    understood = True

    def forward(self, net: Network, node: fx.Node) -> Channels | None:
        known = net.known(input_node(node))
        plan = None if known is None else self.plan(net, node)
        if plan is None:
            return None
        dim, before, after = plan
        return Channels(dim, known.const[:, None].expand(-1, after).reshape(-1).repeat(before))

    def plan(self, net: Network, node: fx.Node) -> tuple[int, int, int] | None:
        """(dimension that holds the channels now, entries of it per channel before, after); None: split up."""
        source = input_node(node)
        known, old, new = net.known(source), net.shape(source), net.shape(node)
        count, suffix, prefix = len(known), math.prod(old[known.dim + 1 :]), math.prod(old[: known.dim])
        if count < 2:
            return None
        for dim, size in enumerate(new):
            rest, ahead = math.prod(new[dim + 1 :]), math.prod(new[:dim])
            if size < 2 or rest > suffix or ahead > prefix or suffix % rest or prefix % ahead:
                continue
            before, after = prefix // ahead, suffix // rest
            if size != before * count * after:
                continue
            return (dim, before, after) if self.holds_for_any_batch(net, node, dim, known.dim) else None
        return None

    def holds_for_any_batch(self, net: Network, node: fx.Node, dim: int, old_dim: int) -> bool:
        size = self.size_argument(net, node, dim)
        if size is None:  # flatten
            start = flatten_range(net, node)[0]
            return start > 0 or old_dim == 0
        return isinstance(size, int) or is_static(net, size)

    def size_argument(self, net: Network, node: fx.Node, dim: int) -> Any:
        if flatten_range(net, node) is not None:
            return None
        return sizes_of(node)[dim]

    def backward(self, net: Network, node: fx.Node) -> None:
        if net.known(node) is None:
            return super().backward(net, node)
        _, before, after = self.plan(net, node)
        kept = net.kept(node).view(before, -1, after).any(2).any(0)
        net.need(input_node(node), kept, net.known(input_node(node)).dim)
        return None

    def shrink(self, build: Builder, node: fx.Node) -> Any:
        net, source = build.network, input_node(node)
        if net.known(node) is None or build.pieces[source].ids is None:
            return super().shrink(build, node)
        dim, before, after = self.plan(net, node)
        ids, count = build.pieces[source].ids, len(net.known(source))
        args = list(build.value(node.args))
        if flatten_range(net, node) is None:
            sizes = list(build.value(tuple(sizes_of(node))))
            if sizes[dim] != -1:
                sizes[dim] = before * len(ids) * after
            args = [args[0], *sizes] if isinstance(node.target, str) else [args[0], tuple(sizes)]
        spread = torch.where(ids >= 0, ids, -count * after * before - 1)
        spread = torch.arange(before)[:, None, None] * count + spread[None, :, None]
        spread = (spread * after + torch.arange(after)).reshape(-1)
        kwargs = build.value(node.kwargs) if flatten_range(net, node) is not None else {}
        return Piece(build.emit(node, tuple(args), kwargs), torch.where(spread >= 0, spread, -1))


def flatten_range(net: Network, node: fx.Node) -> tuple[int, int] | None:
    """(first, last) dimension of a flatten, None for view and reshape."""
    if node.op == "call_module":
        module = net.module(node)
        return (module.start_dim, module.end_dim) if isinstance(module, nn.Flatten) else None
    name = node.target if isinstance(node.target, str) else node.target.__name__
    if name != "flatten":
        return None
    return argument(node, 1, "start_dim", 0), argument(node, 2, "end_dim", -1)


def sizes_of(node: fx.Node) -> list[Any]:
    sizes = node.args[1:] or tuple(node.kwargs.values())
    return list(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else list(sizes)


def is_static(net: Network, size: Any) -> bool:
    """Whether a size comes from channel counts alone, so that it is the same for every input."""
    if not isinstance(size, fx.Node):
        return True
    if Scalar.channel_size(net, size) is not None:
        return True
    if is_size(size) or "scalar" not in size.meta:
        return False
    return bool(size.all_input_nodes) and all(is_static(net, part) for part in size.all_input_nodes)


class Move(Rule):
    """Base of operations on one input whose every output channel is one input channel (or a constant, at -1)."""

    understood = True

    def map(self, net: Network, node: fx.Node, known: Channels) -> tuple[int, Tensor, float] | None:
        """(channel dimension afterwards, source channel of each output channel, constant for -1)"""
        raise NotImplementedError

    def mapped(self, net: Network, node: fx.Node) -> tuple[int, Tensor, float] | None:
        source = input_node(node)
        known = net.known(source) if isinstance(source, fx.Node) else None
        return None if known is None or net.shape(node) is None else self.map(net, node, known)

    def forward(self, net: Network, node: fx.Node) -> Channels | None:
        found = self.mapped(net, node)
        if found is None:
            return None
        dim, source, fill = found
        const = net.known(input_node(node)).const
        return Channels(dim, torch.where(source >= 0, const[source.clamp(min=0)], fill))

    def backward(self, net: Network, node: fx.Node) -> None:
        if net.known(node) is None:
            return super().backward(net, node)
        source, known = self.mapped(net, node)[1], net.known(input_node(node))
        wanted = torch.zeros(len(known), dtype=torch.bool)
        wanted[source[net.kept(node) & (source >= 0)]] = True
        net.need(input_node(node), wanted, known.dim)
        return None

    def shrink(self, build: Builder, node: fx.Node) -> Any:
        net = build.network
        if net.known(node) is None:
            return super().shrink(build, node)
        _, source, _ = self.mapped(net, node)
        piece, ids = self.pick(build, input_node(node), source, net.kept(node))
        return Piece(self.copy(build, node, piece), ids)

    def pick(self, build: Builder, node: fx.Node, source: Tensor, kept: Tensor) -> tuple[Piece, Tensor]:
        """The input with the channels that the output shows, and the output's ids for them."""
        net, piece = build.network, build.pieces[node]
        known, present = net.known(node), build.ids(node)
        target = torch.full((len(known) + 1,), -1)
        target[source[source >= 0]] = (source >= 0).nonzero().flatten()
        target[-1] = -1
        if len(set(source.tolist())) == len(source) and (target[:-1] >= 0).all():  # a permutation: nothing moves
            return piece, target[present]
        shown = torch.isin(source, present) & (source >= 0)
        if not shown.any():
            shown = kept if kept.any() else torch.arange(len(source)) == 0
        ids = shown.nonzero().flatten()
        aligned = build.align(node, source[ids], known.dim)
        return aligned, torch.where(aligned.ids >= 0, ids, -1) if aligned.ids is not None else ids

    def copy(self, build: Builder, node: fx.Node, piece: Piece) -> fx.Node:
        args = (piece.node, *build.value(node.args[1:]))
        return build.emit(node, args, build.value(node.kwargs))


class Permute(Move):
    """permute and transpose: the channels stay, their dimension moves."""

    def map(self, net: Network, node: fx.Node, known: Channels) -> tuple[int, Tensor, float] | None:
        ndim = len(net.shape(node))
        name = node.target if isinstance(node.target, str) else node.target.__name__
        arguments = list(node.args[1:]) or list(node.kwargs.values())
        if name in ("transpose", "swapaxes"):
            if len(arguments) != 2:
                return None
            order = list(range(ndim))
            first, second = (a % ndim for a in arguments)
            order[first], order[second] = second, first
        else:
            dims = arguments[0] if isinstance(arguments[0], tuple | list) else arguments
            order = [a % ndim for a in dims]
        return order.index(known.dim), torch.arange(len(known)), 0.0


class Squeeze(Move):
    """squeeze(dim) and unsqueeze(dim)"""

    def map(self, net: Network, node: fx.Node, known: Channels) -> tuple[int, Tensor, float] | None:
        name = node.target if isinstance(node.target, str) else node.target.__name__
        dim = argument(node, 1, "dim")
        if not isinstance(dim, int):
            return None
        if name == "unsqueeze":
            dim %= len(net.shape(node))
            return known.dim + (dim <= known.dim), torch.arange(len(known)), 0.0
        old = net.shape(input_node(node))
        dim %= len(old)
        if dim == known.dim or old[dim] != 1:
            return None
        return known.dim - (dim < known.dim), torch.arange(len(known)), 0.0


class Slice(Move):
    """x[:, :, ::2, ::2] and the like: slices, whole numbers and ... ; also picks one result of several."""

    def map(self, net: Network, node: fx.Node, known: Channels) -> tuple[int, Tensor, float] | None:
        index = self.index(net, node)
        if index is None:
            return None
        own = index[known.dim]
        if not isinstance(own, slice) or any(isinstance(part, fx.Node) for part in _limits(own)):
            return None
        dim = sum(isinstance(part, slice) for part in index[: known.dim])
        return dim, torch.arange(len(known))[own], 0.0

    @staticmethod
    def index(net: Network, node: fx.Node) -> list[Any] | None:
        ndim = len(net.shape(node.args[0]))
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        if Ellipsis in [part for part in index if not isinstance(part, fx.Node)]:
            at = [part is Ellipsis for part in index].index(True)
            index = (*index[:at], *[slice(None)] * (ndim - len(index) + 1), *index[at + 1 :])
        index = [*index, *[slice(None)] * (ndim - len(index))]
        plain = all(isinstance(part, int | slice) and not isinstance(part, bool) for part in index)
        return index if plain and len(index) == ndim else None

    def forward(self, net: Network, node: fx.Node) -> Any:
        several = net.channels.get(node.args[0])
        if isinstance(several, list):
            return several[node.args[1]] if isinstance(node.args[1], int) else None
        return super().forward(net, node)

    def backward(self, net: Network, node: fx.Node) -> None:
        several = net.demand.get(node.args[0])
        if isinstance(several, list) and net.known(node) is not None:
            several[node.args[1]] |= net.kept(node)
            return None
        return super().backward(net, node)

    def shrink(self, build: Builder, node: fx.Node) -> Any:
        several = build.pieces[node.args[0]]
        if isinstance(several, list) and isinstance(node.args[1], int):
            return several[node.args[1]]
        return super().shrink(build, node)

    def copy(self, build: Builder, node: fx.Node, piece: Piece) -> fx.Node:
        index = self.index(build.network, node)
        index[build.network.known(node.args[0]).dim] = slice(None)
        if all(part == slice(None) for part in index):
            return piece.node
        return build.emit(node, (piece.node, build.value(tuple(index))), {})


def _limits(part: slice) -> tuple:
    return part.start, part.stop, part.step


class ChannelPermute(Move):
    """A channel shuffle moves no data: only the meaning of the channels changes."""

    def map(self, net: Network, node: fx.Node, known: Channels) -> tuple[int, Tensor, float] | None:
        return (1, torch.tensor(node.args[1]), 0.0) if known.dim == 1 else None

    def copy(self, build: Builder, node: fx.Node, piece: Piece) -> fx.Node:
        return piece.node


class Pad(Move):
    """F.pad and padding modules: new channels are constants; a border keeps a channel's constant or ends it."""

    def map(self, net: Network, node: fx.Node, known: Channels) -> tuple[int, Tensor, float] | None:
        amounts, mode, value = pad_arguments(net, node)
        if amounts is None:
            return None
        before, after = self.own(net, node, known, amounts)
        if (before or after) and (mode != "constant" or before < 0 or after < 0):
            return None
        source = torch.cat([torch.full((before,), -1), torch.arange(len(known)), torch.full((after,), -1)])
        return known.dim, source, float(value)

    @staticmethod
    def own(net: Network, node: fx.Node, known: Channels, amounts: list[int]) -> tuple[int, int]:
        place = 2 * (len(net.shape(input_node(node))) - 1 - known.dim)
        return (amounts[place], amounts[place + 1]) if place + 1 < len(amounts) else (0, 0)

    def forward(self, net: Network, node: fx.Node) -> Channels | None:
        result = super().forward(net, node)
        if result is not None:
            amounts, mode, value = pad_arguments(net, node)
            before, after = self.own(net, node, net.known(input_node(node)), amounts)
            if mode == "constant" and sum(map(abs, amounts)) != before + after:
                result.const[result.const != value] = float("nan")
        return result

    def pick(self, build: Builder, node: fx.Node, source: Tensor, kept: Tensor) -> tuple[Piece, Tensor]:
        present = build.ids(node)
        lost = (kept & (source >= 0)).nonzero().flatten()
        if torch.isin(source[lost], present).all():  # the input as it is; the new channels are constants
            start = int((source < 0).nonzero()[0] == 0) if (source < 0).any() else 0
            offset = int((source >= 0).nonzero()[0]) if start else 0
            return build.pieces[node], torch.where(present >= 0, present + offset, -1)
        piece = build.align(node, source[lost], build.network.known(node).dim)
        return piece, lost if piece.ids is None else torch.where(piece.ids >= 0, lost, -1)

    def copy(self, build: Builder, node: fx.Node, piece: Piece) -> fx.Node:
        net = build.network
        amounts, mode, value = pad_arguments(net, node)
        known = net.known(input_node(node))
        place = 2 * (len(net.shape(input_node(node))) - 1 - known.dim)
        if place + 1 < len(amounts) and (amounts[place] or amounts[place + 1]):
            amounts = [0 if i in (place, place + 1) else amount for i, amount in enumerate(amounts)]
            if not any(amounts):
                return piece.node
            return build.graph.call_function(torch.nn.functional.pad, (piece.node, amounts, mode, value))
        return super().copy(build, node, piece)


def pad_arguments(net: Network, node: fx.Node) -> tuple[list[int] | None, str, float]:
    """(amounts from the last dimension backwards, mode, value); amounts None where they are not plain numbers."""
    if node.op == "call_module":
        module = net.module(node)
        amounts = module.padding
        name = type(module).__name__
        mode = "constant" if name.startswith(("Zero", "Constant")) else "edge"
        value = getattr(module, "value", 0.0)
    else:
        amounts, mode = argument(node, 1, "pad"), argument(node, 2, "mode", "constant")
        value = argument(node, 3, "value", 0.0) or 0.0
    if not isinstance(amounts, tuple | list) or not all(isinstance(a, int) for a in amounts):
        return None, mode, 0.0
    return list(amounts), mode, float(value)


class Split(Rule):
    """chunk and split: several results, each with its share of the channels."""

    understood = True

    def ranges(self, net: Network, node: fx.Node) -> tuple[int, list[Tensor]] | None:
        """(split dimension, channels of each result)"""
        source = input_node(node)
        known = net.known(source) if isinstance(source, fx.Node) else None
        shapes = node.meta.get("shapes")
        dim = argument(node, 2, "dim", 0)
        if known is None or shapes is None or not isinstance(dim, int):
            return None
        dim %= len(net.shape(source))
        if dim != known.dim:
            return dim, [torch.arange(len(known))] * len(shapes)
        return dim, list(torch.arange(len(known)).split([shape[dim] for shape in shapes]))

    def forward(self, net: Network, node: fx.Node) -> Any:
        found = self.ranges(net, node)
        if found is None:
            return None
        known = net.known(input_node(node))
        return [Channels(known.dim, known.const[part].clone()) for part in found[1]]

    def backward(self, net: Network, node: fx.Node) -> None:
        if not isinstance(net.channels.get(node), list):
            return super().backward(net, node)
        known = net.known(input_node(node))
        wanted = torch.zeros(len(known), dtype=torch.bool)
        for part, mask in zip(self.ranges(net, node)[1], net.demand[node], strict=True):
            wanted[part] |= mask
        net.need(input_node(node), wanted, known.dim)
        return None

    def shrink(self, build: Builder, node: fx.Node) -> Any:
        net, source = build.network, input_node(node)
        several = net.channels.get(node)
        if not isinstance(several, list):
            return super().shrink(build, node)
        dim, parts = self.ranges(net, node)
        known, piece = net.known(source), build.pieces[source]
        if dim != known.dim:
            new = build.emit(node, build.value(node.args), build.value(node.kwargs))
            return [Piece(build.graph.call_function(operator.getitem, (new, i)), piece.ids) for i in range(len(parts))]
        return [
            self.part(build, source, part, channels.live & mask)
            for part, channels, mask in zip(parts, several, net.demand[node], strict=True)
        ]

    @staticmethod
    def part(build: Builder, source: fx.Node, channels: Tensor, kept: Tensor) -> Piece:
        """Consecutive channels of the source: a view where they lie side by side, a selection elsewhere."""
        present, dim = build.ids(source), build.network.known(source).dim
        inside = torch.isin(present, channels).nonzero().flatten()
        if not len(inside):
            piece = build.align(source, channels[kept] if kept.any() else channels[:1], dim)
            return Piece(piece.node, torch.where(piece.ids >= 0, piece.ids - channels[0], -1))
        ids = present[inside] - channels[0]
        if len(inside) == len(present):
            return Piece(build.pieces[source].node, ids)
        if torch.equal(inside, torch.arange(int(inside[0]), int(inside[0]) + len(inside))):
            cut = (build.pieces[source].node, dim, int(inside[0]), len(inside))
            return Piece(build.graph.call_function(torch.narrow, cut), ids)
        piece = build.align(source, present[inside], dim)
        return Piece(piece.node, ids)


class Cat(Rule):
    """cat: along the channels the sets lie side by side, along another dimension they must agree."""

    understood = True

    def parts(self, node: fx.Node) -> list[fx.Node] | None:
        tensors = argument(node, 0, "tensors")
        return list(tensors) if isinstance(tensors, tuple | list) else None

    def forward(self, net: Network, node: fx.Node) -> Channels | None:
        parts, dim = self.parts(node), argument(node, 1, "dim", 0)
        found = [] if parts is None else [net.known(part) for part in parts]
        dims = {known.dim for known in found if known is not None}
        if len(dims) != 1 or not isinstance(dim, int):
            return None
        dim, own = dim % len(net.shape(node)), dims.pop()
        each = [net.channels_at(part, own).const for part in parts]
        if dim == own:
            return Channels(own, torch.cat(each))
        if len({len(const) for const in each}) != 1:
            return None
        same = torch.stack(each)
        return Channels(own, torch.where((same == same[0]).all(0), same[0], float("nan")))

    def backward(self, net: Network, node: fx.Node) -> None:
        known = net.known(node)
        if known is None:
            return super().backward(net, node)
        kept, parts = net.kept(node), self.parts(node)
        widths = [net.shape(part)[known.dim] for part in parts]
        joined = argument(node, 1, "dim", 0) % len(net.shape(node)) == known.dim
        for part, wanted in zip(parts, kept.split(widths) if joined else [kept] * len(parts), strict=True):
            net.need(part, wanted, known.dim)
        return None

    def shrink(self, build: Builder, node: fx.Node) -> Any:
        net, known = build.network, build.network.known(node)
        if known is None:
            return super().shrink(build, node)
        parts, dim = self.parts(node), argument(node, 1, "dim", 0)
        kept = net.kept(node)
        if dim % len(net.shape(node)) != known.dim:
            wanted = kept.nonzero().flatten() if kept.any() else torch.zeros(1, dtype=torch.long)
            pieces = [build.align(part, wanted, known.dim) for part in parts]
            valid = torch.stack([_ids(piece, len(known)) >= 0 for piece in pieces]).all(0)
            ids = torch.where(valid, wanted, -1)
        else:
            pieces, ids = self.side_by_side(build, parts, known.dim, kept)
        return Piece(build.emit(node, (tuple(piece.node for piece in pieces), dim), {}), ids)

    @staticmethod
    def side_by_side(build: Builder, parts: list, dim: int, kept: Tensor) -> tuple[list[Piece], Tensor]:
        pieces, ids, offset = [], [], 0
        for part in parts:
            width = build.network.shape(part)[dim]
            own = _ids(build.pieces[part], width)
            shifted = torch.where(own >= 0, own + offset, -1)
            if kept[offset : offset + width].any():
                pieces.append(build.pieces[part])
                ids.append(shifted)
            offset += width
        if not pieces:
            own = _ids(build.pieces[parts[0]], build.network.shape(parts[0])[dim])
            return [build.pieces[parts[0]]], own
        return pieces, torch.cat(ids)


def _ids(piece: Piece, width: int) -> Tensor:
    return torch.arange(width) if piece.ids is None else piece.ids
