"""Operators that take a tensor apart or put one together: chunk, split, unbind; cat, stack."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from mfp.compact.channels import Channels, Network, arguments, shape
from mfp.compact.rules import Rule, data_input
from mfp.compact.writer import Piece, Writer

aten = torch.ops.aten


class Split(Rule):
    """Several results: each with its share of the channels, or all of them where another dimension is split."""

    understood = True

    def ranges(self, net: Network, node: fx.Node) -> tuple[int, list[Tensor]] | None:
        """(split dimension, channels of each result)"""
        known = net.known(data_input(node))
        if known is None:
            return None
        dim, results = arguments(node)["dim"] % len(shape(data_input(node))), node.meta["val"]
        everything = torch.arange(len(known))
        if dim != known.dim:
            return dim, [everything] * len(results)
        if node.target.overloadpacket is aten.unbind:
            return None
        return dim, list(everything.split([int(result.shape[dim]) for result in results]))

    def forward(self, net: Network, node: fx.Node) -> Any:
        found = self.ranges(net, node)
        if found is None:
            return None
        known = net.channels[data_input(node)]
        lost = node.target.overloadpacket is aten.unbind and found[0] < known.dim
        return [Channels(known.dim - lost, known.const[part].clone()) for part in found[1]]

    def backward(self, net: Network, node: fx.Node) -> None:
        if not isinstance(net.channels.get(node), list):
            return super().backward(net, node)
        known, (_, parts) = net.channels[data_input(node)], self.ranges(net, node)
        wanted = torch.zeros(len(known), dtype=torch.bool)
        for part, mask in zip(parts, net.demand[node], strict=True):
            wanted[part] |= mask
        net.need(data_input(node), wanted, known.dim)
        return None

    def write(self, out: Writer, node: fx.Node) -> Any:
        net, source = out.network, data_input(node)
        several = net.channels.get(node)
        if not isinstance(several, list):
            return super().write(out, node)
        dim, parts = self.ranges(net, node)
        known, piece = net.channels[source], out.piece(source)
        if dim != known.dim:
            new = out.emit(node, out.value(node.args), out.value(node.kwargs))
            return [Piece(out.pick(new, i), piece.ids) for i in range(len(parts))]
        return [
            self.part(out, source, part, channels.live & mask)
            for part, channels, mask in zip(parts, several, net.demand[node], strict=True)
        ]

    @staticmethod
    def part(out: Writer, source: fx.Node, channels: Tensor, kept: Tensor) -> Piece:
        """Consecutive channels of the source: a view where they lie side by side, a selection elsewhere."""
        present, dim = out.ids(source), out.network.channels[source].dim
        inside = torch.isin(present, channels).nonzero().flatten()
        if not len(inside):
            wanted = channels[kept] if kept.any() else channels[:1]
            piece = out.align(source, wanted, dim)
            ids = wanted if piece.ids is None else piece.ids
            return Piece(piece.node, torch.where(ids >= 0, ids - channels[0], -1))
        ids = present[inside] - channels[0]
        if len(inside) == len(present):
            return Piece(out.piece(source).node, ids)
        if torch.equal(inside, torch.arange(int(inside[0]), int(inside[0]) + len(inside))):
            cut = (out.piece(source).node, dim, int(inside[0]), int(inside[0]) + len(inside))
            return Piece(out.graph.call_function(aten.slice.Tensor, cut), ids)
        return Piece(out.align(source, present[inside], dim).node, ids)


class Cat(Rule):
    """cat: along the channels the sets lie side by side, along another dimension they must agree; so for stack."""

    understood = True

    def forward(self, net: Network, node: fx.Node) -> Channels | None:
        parts, dim, stacks = self.parts(node)
        found = [net.known(part) for part in parts]
        dims = {known.dim for known in found if known is not None}
        if len(dims) != 1:
            return None
        own = dims.pop()
        each = [net.channels_at(part, own).const for part in parts]
        if dim == own and not stacks:
            return Channels(own, torch.cat(each))
        if len({len(const) for const in each}) != 1:
            return None
        same = torch.stack(each)
        const = torch.where((same == same[0]).all(0), same[0], float("nan"))
        return Channels(own + (stacks and dim <= own), const)

    @staticmethod
    def parts(node: fx.Node) -> tuple[list[fx.Node], int, bool]:
        """(tensors, dimension along which they are put together, whether it is a new one)"""
        found = arguments(node)
        return list(found["tensors"]), found["dim"] % len(shape(node)), node.target.overloadpacket is aten.stack

    def backward(self, net: Network, node: fx.Node) -> None:
        known = net.known(node)
        if known is None:
            return super().backward(net, node)
        parts, dim, stacks = self.parts(node)
        kept, own = net.kept(node), known.dim - (stacks and dim <= known.dim)
        joined = dim == own and not stacks
        masks = kept.split([shape(part)[own] for part in parts]) if joined else [kept] * len(parts)
        for part, wanted in zip(parts, masks, strict=True):
            net.need(part, wanted, own)
        return None

    def write(self, out: Writer, node: fx.Node) -> Any:
        net, known = out.network, out.network.known(node)
        if known is None:
            return super().write(out, node)
        parts, dim, stacks = self.parts(node)
        kept, own = net.kept(node), known.dim - (stacks and dim <= known.dim)
        if dim == own and not stacks:
            pieces, ids = self.side_by_side(out, parts, own, kept)
        else:
            wanted = kept.nonzero().flatten() if kept.any() else torch.zeros(1, dtype=torch.long)
            pieces = [out.align(part, wanted, own) for part in parts]
            valid = torch.stack([(wanted if p.ids is None else p.ids) >= 0 for p in pieces]).all(0)
            ids = torch.where(valid, wanted, -1)
        return Piece(out.emit(node, ([piece.node for piece in pieces], dim), {}), ids)

    @staticmethod
    def side_by_side(out: Writer, parts: list, dim: int, kept: Tensor) -> tuple[list[Piece], Tensor]:
        pieces, ids, offset = [], [], 0
        for part in parts:
            width = shape(part)[dim]
            own = out.piece(part).ids
            own = torch.arange(width) if own is None else own
            if kept[offset : offset + width].any():
                pieces.append(out.piece(part))
                ids.append(torch.where(own >= 0, own + offset, -1))
            offset += width
        if not pieces:
            own = out.piece(parts[0]).ids
            return [out.piece(parts[0])], torch.arange(shape(parts[0])[dim]) if own is None else own
        return pieces, torch.cat(ids)
