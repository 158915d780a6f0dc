"""Where tensors meet: add, sub, mul. A residual stream keeps its width, and a branch is added to it by index."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from mfp.compact.builder import Builder, Piece
from mfp.compact.channels import Channels, Network, all_live
from mfp.compact.modules import AddConstants, ResidualJoin
from mfp.compact.rules import Rule


class Join(Rule):
    """Elementwise operation on two operands, numbers and broadcast tensors included."""

    understood = True

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def operands(self, node: fx.Node) -> tuple[Any, Any] | None:
        if len(node.args) == 2 and not node.kwargs:
            return node.args[0], node.args[1]
        return None

    def channel_dim(self, net: Network, node: fx.Node) -> int | None:
        """The result's channel dimension, if all operands with known channels agree on it."""
        operands = self.operands(node)
        if operands is None or net.shape(node) is None:
            return None
        ndim, dims = len(net.shape(node)), set()
        for operand in operands:
            known = net.known(operand) if isinstance(operand, fx.Node) else None
            if known is not None and len(known) > 1:
                dims.add(ndim - len(net.shape(operand)) + known.dim)
        return dims.pop() if len(dims) == 1 else None

    def constants(self, net: Network, node: fx.Node, operand: Any, dim: int) -> Channels | None:
        """The operand's channels along the result's dimension; None for an operand that is the same for all."""
        ndim, count = len(net.shape(node)), net.shape(node)[dim]
        if not isinstance(operand, fx.Node):
            return Channels(dim, torch.full((count,), float(operand), dtype=torch.float64))
        shape = net.shape(operand)
        own = None if shape is None else dim - (ndim - len(shape))
        if own is None or own < 0 or shape[own] != count:
            return all_live(dim, count)
        return net.channels_at(operand, own)

    def carries(self, net: Network, node: fx.Node, operand: Any, dim: int) -> int | None:
        """The operand's own channel dimension, None where it is a number or broadcast along the channels."""
        if not isinstance(operand, fx.Node) or net.shape(operand) is None:
            return None
        own = dim - (len(net.shape(node)) - len(net.shape(operand)))
        return own if own >= 0 and net.shape(operand)[own] == net.shape(node)[dim] else None

    def forward(self, net: Network, node: fx.Node) -> Channels | None:
        dim = self.channel_dim(net, node)
        if dim is None:
            return None
        operands = self.operands(node)
        if any(not isinstance(o, fx.Node | int | float) for o in operands):
            return None
        a, b = (self.constants(net, node, operand, dim).const for operand in operands)
        if self.kind == "mul":
            result = torch.where((a == 0) | (b == 0), 0.0, a * b)
        elif self.kind == "div":
            if isinstance(operands[1], fx.Node):
                return None
            result = a / b
        else:
            result = a + b if self.kind == "add" else a - b
        return Channels(dim, result)

    def backward(self, net: Network, node: fx.Node) -> None:
        known = net.known(node)
        if known is None:
            return super().backward(net, node)
        kept = net.kept(node)
        for operand in self.operands(node):
            own = self.carries(net, node, operand, known.dim)
            if own is not None:
                net.need(operand, kept, own)
            elif isinstance(operand, fx.Node):
                net.need_all(operand)
        return None

    def shrink(self, build: Builder, node: fx.Node) -> Any:
        net, known = build.network, build.network.known(node)
        if known is None:
            return super().shrink(build, node)
        operands = self.operands(node)
        dims = [self.carries(net, node, operand, known.dim) for operand in operands]
        sets = [self.ids(build, o, d) for o, d in zip(operands, dims, strict=True) if d is not None]
        kept = net.kept(node)
        same_set = all(torch.equal(ids, sets[0]) for ids in sets)
        by_index = self.kind == "add" and len(sets) == 2 and self.same_shape(net, node)
        if not same_set and by_index:
            return self.join(build, node, kept)
        wanted = sets[0] if same_set else self.common_set(build, kept, operands, dims, sets)
        if not len(wanted):
            wanted = torch.zeros(1, dtype=torch.long)
        args, valid = [], wanted >= 0
        for operand, own in zip(operands, dims, strict=True):
            if own is None:
                args.append(build.full(operand, node) if isinstance(operand, fx.Node) else operand)
                continue
            piece = build.align(operand, wanted, own)
            args.append(piece.node)
            if piece.ids is not None:
                valid = valid & (piece.ids >= 0)
        all_there = same_set and all(build.pieces[o].ids is None for o in operands if isinstance(o, fx.Node))
        ids = None if all_there else torch.where(valid, wanted, -1)
        return Piece(build.emit(node, tuple(args), {}), ids)

    @staticmethod
    def common_set(build: Builder, kept: Tensor, operands: tuple, dims: list, sets: list[Tensor]) -> Tensor:
        """The kept channels, or what the largest operand has where that is hardly more: it need not be copied then."""
        sizes = [build.network.shape(o).numel() for o, d in zip(operands, dims, strict=True) if d is not None]
        largest, wanted = sets[sizes.index(max(sizes))], kept.nonzero().flatten()
        enough = bool(torch.isin(wanted, largest).all()) and len(largest) < len(wanted) + build.multiple
        return largest if enough else wanted

    @staticmethod
    def ids(build: Builder, operand: fx.Node, dim: int) -> Tensor:
        piece = build.pieces[operand]
        return torch.arange(build.network.shape(operand)[dim]) if piece.ids is None else piece.ids

    def same_shape(self, net: Network, node: fx.Node) -> bool:
        return all(net.shape(operand) == net.shape(node) for operand in self.operands(node))

    def join(self, build: Builder, node: fx.Node, kept: Tensor) -> Piece:
        """residual + branch at the branch's channels; the wider operand is the residual, widened where it must be."""
        net, known = build.network, build.network.known(node)
        dim = known.dim
        wanted = kept.nonzero().flatten() if kept.any() else torch.zeros(1, dtype=torch.long)
        residual, branch = self.operands(node)
        sets = {operand: self.ids(build, operand, dim) for operand in (residual, branch)}
        holds = {operand: bool(torch.isin(wanted, ids).all()) for operand, ids in sets.items()}
        useful = {operand: int(torch.isin(ids, wanted).sum()) for operand, ids in sets.items()}
        if (holds[branch], useful[branch]) > (holds[residual], useful[residual]):
            residual, branch = branch, residual
        stream = Piece(build.pieces[residual].node, sets[residual])
        if not holds[residual]:
            wide = kept.clone()
            for ids in sets.values():  # what is there anyway need not be picked out
                wide[ids[ids >= 0]] = True
            stream = build.align(residual, build.pad(wide, known.live).nonzero().flatten(), dim)
        present = sets[branch]
        landing = torch.isin(present, stream.ids[stream.ids >= 0])
        const = net.channels_at(branch, dim).const
        added = torch.isin(stream.ids, present[landing])
        lost = torch.where(stream.ids >= 0, const[stream.ids.clamp(min=0)], 0.0)
        ids = torch.where(added | ~lost.isnan(), stream.ids, -1)
        bias = torch.where(added | lost.isnan(), 0.0, lost)
        return Piece(self.write(build, node, branch, stream.node, present, landing, stream.ids, bias, dim), ids)

    @staticmethod
    def write(build, node, branch, stream, present, landing, target, bias, dim) -> fx.Node:
        dtype = node.meta["dtype"]
        constants = bias.to(dtype) if bias.any() else None
        if not landing.any():
            return (
                stream
                if constants is None
                else build.call(f"{node.name}_bias", AddConstants(constants, dim), (stream,))
            )
        order = {int(channel): i for i, channel in enumerate(target.tolist()) if channel >= 0}
        channels = present[landing]
        source = build.pieces[branch].node
        if not landing.all():
            source = build.align(branch, channels, dim).node
        index = torch.tensor([order[int(channel)] for channel in channels])
        return build.call(f"{node.name}_join", ResidualJoin(index, dim, constants), (stream, source))
