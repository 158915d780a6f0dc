"""Elementwise operators on one tensor or several; a residual stream keeps its width, and a branch is added by index."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from mfp.compact.channels import Channels, Network, all_live, has_shape, is_float, shape
from mfp.compact.rules import Rule
from mfp.compact.writer import Piece, Writer
from mfp.modules import AddConstants, ResidualJoin

aten = torch.ops.aten

# Elementwise, but without torch's tag that says so.
UNTAGGED = {aten.hardswish, aten.square, aten.clip}

# Operators with a product in them, and the places of its factors; what stands before is added to it.
PRODUCTS = {aten.mul: slice(0, 2), aten.addcmul: slice(1, 3), aten.div: slice(0, 1)}

# Finite for whatever is finite: what stands in a slot with no meaning may pass.
TAME = {
    aten.abs, aten.add, aten.celu, aten.clamp, aten.clamp_max, aten.clamp_min, aten.elu, aten.gelu,
    aten.hardsigmoid, aten.hardswish, aten.hardtanh, aten.leaky_relu, aten.maximum, aten.minimum, aten.mish,
    aten.mul, aten.neg, aten.relu, aten.relu6, aten.rsub, aten.selu, aten.sigmoid, aten.silu, aten.softplus,
    aten.sub, aten.tanh, aten.where,
}  # fmt: skip

# A parameter behind these is still one.
FORM_ONLY = {
    aten.view, aten.reshape, aten.unsqueeze, aten.squeeze, aten.permute, aten.transpose, aten.to, aten._to_copy,
}  # fmt: skip


def is_elementwise(node: fx.Node) -> bool:
    """Whether each entry of the result depends on the entries of the inputs at its place alone, and on no chance."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded in target.tags:
        return False
    return has_shape(node) and (torch.Tag.pointwise in target.tags or target.overloadpacket in UNTAGGED)


def tensors_of(node: fx.Node) -> list[fx.Node]:
    return [source for source in node.all_input_nodes if has_shape(source)]


def own_dim(node: fx.Node, operand: fx.Node, dim: int) -> int | None:
    """The operand's dimension that is ``dim`` of the result; None where the operand is broadcast along it."""
    own = dim - (len(shape(node)) - len(shape(operand)))
    return own if own >= 0 and shape(operand)[own] == shape(node)[dim] else None


def parameter_value(net: Network, node: fx.Node) -> Tensor | None:
    """The tensor that a get_attr node reads, also in another shape or dtype."""
    if node.op == "get_attr":
        return net.value(node)
    if getattr(node.target, "overloadpacket", None) not in FORM_ONLY or len(node.all_input_nodes) != 1:
        return None
    value = parameter_value(net, node.args[0])
    return None if value is None else node.target(value, *node.args[1:], **node.kwargs)


class Elementwise(Rule):
    """Constants of all operands give a constant; zero times anything, or divided by anything, is zero."""

    understood = True

    def channel_dim(self, net: Network, node: fx.Node) -> int | None:
        """The result's channel dimension, if all operands with known channels agree on it."""
        known = {operand: net.known(operand) for operand in tensors_of(node)}
        found = {
            len(shape(node)) - len(shape(operand)) + channels.dim
            for operand, channels in known.items()
            if channels is not None and (len(channels) > 1 or len(known) == 1)
        }
        return found.pop() if len(found) == 1 else None

    def forward(self, net: Network, node: fx.Node) -> Channels | None:
        dim = self.channel_dim(net, node)
        if dim is None:
            return None
        count = shape(node)[dim]
        const = self.constants(net, node, dim, count)
        live = torch.stack([values.isnan() for values in const.values()]).any(0)
        if not is_float(node) or not all(is_float(operand) for operand in const):
            return all_live(dim, count)
        result = self.evaluate(node, const, count)
        result = torch.where(live | ~result.isfinite(), torch.nan, result)
        if node.target.overloadpacket in PRODUCTS and node.target._overloadname != "Scalar":
            places = PRODUCTS[node.target.overloadpacket]
            factors = [const[factor] == 0 for factor in node.args[places] if factor in const]
            zero = torch.stack(factors).any(0) if factors else torch.zeros(count, dtype=torch.bool)
            rest = const[node.args[0]] if places.start else torch.zeros_like(result)
            result = torch.where(zero, rest, result)
        return Channels(dim, result)

    @staticmethod
    def constants(net: Network, node: fx.Node, dim: int, count: int) -> dict[fx.Node, Tensor]:
        """The channels of each operand along the result's. A parameter that meets something else counts with its
        values: what it makes of a constant is one, though what depends on parameters alone is still to be trained."""
        found, values = {}, {operand: parameter_value(net, operand) for operand in tensors_of(node)}
        for operand, value in values.items():
            own = own_dim(node, operand, dim)
            if value is not None and value.numel() == 1 and any(v is None for v in values.values()):
                found[operand] = value.detach().double().cpu().flatten().expand(count)
            elif own is None:
                found[operand] = all_live(dim, count).const
            elif value is not None and value.numel() == count and any(v is None for v in values.values()):
                found[operand] = value.detach().double().cpu().flatten()
            else:
                found[operand] = net.channels_at(operand, own).const
        return found

    @staticmethod
    def evaluate(node: fx.Node, const: dict[fx.Node, Tensor], count: int) -> Tensor:
        """The operator itself on the constants, in float64; NaN where it cannot say."""

        def convert(source: fx.Node) -> Any:
            return const[source].nan_to_num(1.0) if source in const else None

        try:
            result = node.target(*fx.map_arg(node.args, convert), **fx.map_arg(node.kwargs, convert))
            return result.double().expand(count)
        except (RuntimeError, TypeError):  # sizes among the arguments
            return torch.full((count,), torch.nan, dtype=torch.float64)

    def backward(self, net: Network, node: fx.Node) -> None:
        known = net.known(node)
        if known is None:
            return super().backward(net, node)
        kept = net.kept(node)
        for operand in tensors_of(node):
            own = own_dim(node, operand, known.dim)
            if own is None:
                net.need_all(operand)
            else:
                net.need(operand, kept, own)
        return None

    def write(self, out: Writer, node: fx.Node) -> Any:
        net, known = out.network, out.network.known(node)
        if known is None:
            return super().write(out, node)
        dims = {operand: own_dim(node, operand, known.dim) for operand in tensors_of(node)}
        carriers = {operand: dim for operand, dim in dims.items() if dim is not None}
        sets = {operand: self.present(out, operand, dim) for operand, dim in carriers.items()}
        first, kept = next(iter(sets.values())), net.kept(node)
        alike = all(torch.equal(ids, first) for ids in sets.values())
        if not alike and self.is_sum(node, dims):
            return self.join(out, node, kept, *self.by_role(out, kept, sets), torch.arange(len(known)))
        there = torch.isin(kept.nonzero().flatten(), first).all()
        tame = self.is_tame(node, carriers)
        if alike and there and (tame or (first >= 0).all()):
            wanted = first
        else:
            wanted = self.common_set(out, kept, sets) if tame else kept.nonzero().flatten()
        if not len(wanted):  # one that all operands have, so that it is no slot
            wanted = torch.stack([torch.isin(torch.arange(len(known)), ids) for ids in sets.values()]).all(0)
            wanted = wanted.float().argmax(keepdim=True)
        pieces = {operand: out.align(operand, wanted, dim) for operand, dim in carriers.items()}

        def convert(source: fx.Node) -> Any:
            return pieces[source].node if source in pieces else out.full(source, node)

        new = out.emit(node, fx.map_arg(node.args, convert), fx.map_arg(node.kwargs, convert))
        if all(piece.ids is None for piece in pieces.values()):
            return Piece(new, None if len(wanted) == len(known) else wanted)
        valid = torch.stack([p.ids >= 0 if p.ids is not None else wanted >= 0 for p in pieces.values()]).all(0)
        return Piece(new, torch.where(valid, wanted, -1))

    @staticmethod
    def present(out: Writer, operand: fx.Node, dim: int) -> Tensor:
        """The operand's channels as they are written so far."""
        ids = out.piece(operand).ids
        return torch.arange(shape(operand)[dim]) if ids is None else ids

    @staticmethod
    def is_tame(node: fx.Node, carriers: dict[fx.Node, int]) -> bool:
        """Whether a slot with no meaning stays finite: times a weight of zero, infinity would not be zero."""
        packet = node.target.overloadpacket
        return packet in TAME or (packet is aten.div and node.args[1] not in carriers)

    @staticmethod
    def is_sum(node: fx.Node, dims: dict[fx.Node, int | None]) -> bool:
        """a + b of two different tensors of one shape, for any input."""
        if node.target is not aten.add.Tensor or node.kwargs or len(dims) != 2:
            return False
        a, b = (operand.meta["val"] for operand in dims)
        return a.dtype == b.dtype and len(a.shape) == len(b.shape) and all(
            str(x) == str(y) for x, y in zip(a.shape, b.shape, strict=True)
        )  # fmt: skip

    @staticmethod
    def common_set(out: Writer, kept: Tensor, sets: dict[fx.Node, Tensor]) -> Tensor:
        """The kept channels, or what the largest operand has where that is hardly more: it need not be copied then."""
        largest = sets[max(sets, key=lambda operand: math.prod(shape(operand)))]
        wanted = kept.nonzero().flatten()
        enough = bool(torch.isin(wanted, largest).all()) and len(largest) < len(wanted) + out.multiple
        return largest if enough else wanted

    @staticmethod
    def by_role(out: Writer, kept: Tensor, sets: dict[fx.Node, Tensor]) -> tuple[fx.Node, fx.Node]:
        """(residual, branch): the residual is the operand that holds more of what is wanted."""
        wanted = kept.nonzero().flatten()

        def held(operand: fx.Node) -> tuple[bool, int]:
            return bool(torch.isin(wanted, sets[operand]).all()), int(torch.isin(sets[operand], wanted).sum())

        first, second = sets
        return (second, first) if held(second) > held(first) else (first, second)

    def join(
        self, out: Writer, node: fx.Node, kept: Tensor, residual: fx.Node, branch: fx.Node, places: Tensor
    ) -> Piece:
        """residual + branch, the branch added where its channels are; the constants it lost are added with it.

        ``places``: the result's channel of each channel of the branch.
        """
        net, known = out.network, out.network.channels[node]
        wanted = kept.nonzero().flatten()
        own = self.present(out, branch, known.dim)
        present = torch.where(own >= 0, places[own.clamp(min=0)], -1)
        stream, held = out.piece(residual).node, self.present(out, residual, known.dim)
        if not torch.isin(wanted, held).all():
            wide = kept.clone()
            for ids in (held, present):  # what is there anyway need not be picked out
                wide[ids[ids >= 0]] = True
            widened = out.align(residual, out.pad(wide, known.live).nonzero().flatten(), known.dim)
            stream, held = widened.node, widened.ids
        landing = torch.isin(present, held[held >= 0])
        const = torch.zeros(len(known), dtype=torch.float64)
        const[places] = net.channels_at(branch, known.dim).const
        added = torch.isin(held, present[landing])
        lost = torch.where(held >= 0, const[held.clamp(min=0)], 0.0)
        ids = torch.where(added | ~lost.isnan(), held, -1)
        bias = torch.where(added | lost.isnan(), 0.0, lost)
        constants = bias.to(out.dtype_of(node)) if bias.any() else None
        if not landing.any():
            joined = stream
            if constants is not None:
                joined = out.call(f"{node.name}_bias", AddConstants(constants, known.dim), (joined,))
            return Piece(joined, ids)
        source = out.piece(branch).node if landing.all() else out.align(branch, own[landing], known.dim).node
        return Piece(self.write_join(out, node, source, stream, held, present[landing], constants), ids)

    @staticmethod
    def write_join(
        out: Writer, node: fx.Node, source: fx.Node, stream: fx.Node, held: Tensor, channels: Tensor,
        constants: Tensor | None,
    ) -> fx.Node:  # fmt: skip
        order = {int(channel): i for i, channel in enumerate(held.tolist()) if channel >= 0}
        index = torch.tensor([order[int(channel)] for channel in channels])
        if torch.equal(index, torch.arange(len(held))):  # torch's ONNX export loses an index_add of all channels
            return out.graph.create_node("call_function", aten.add.Tensor, (stream, source), {}, node.name)
        join = ResidualJoin(index, out.network.channels[node].dim, constants)
        return out.call(f"{node.name}_join", join, (stream, source))
