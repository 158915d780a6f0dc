"""Writes the compact graph: each tensor with the original channels it still has, and the adapters between such sets."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from mfp.compact.channels import Network
from mfp.modules import ExpandChannels, SelectChannels

aten = torch.ops.aten


@dataclass
class Piece:
    """A tensor of the compact graph: entry i along its channel dimension is original channel ``ids[i]``.

    -1 marks a slot with no meaning, to be read with weight zero; ``ids=None`` is the original width and order.
    """

    node: fx.Node
    ids: Tensor | None = None


class Writer:
    """Holds the graph being written; rules ask it for their inputs in the channel set that they want."""

    def __init__(self, network: Network, multiple: int, attribute_rule: Any) -> None:
        self.network = network
        self.multiple = multiple  # channel counts that the processor likes; see pad
        self.attribute_rule = attribute_rule
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.pieces: dict[fx.Node, Any] = {}  # Piece, or list of Pieces
        self.origins: dict[Tensor, tuple[str, Callable[[Tensor], Tensor]]] = {}  # of new parameters and buffers
        self.cuts: dict[str, Any] = {}  # by name of a weight: how it was cut
        self.expanded: dict[fx.Node, list[str]] = {}  # reader: what was widened for it

    # ---- reading inputs

    def piece(self, node: fx.Node) -> Any:
        """What was written for a node; parameters are written when they are first read, if they are."""
        if node not in self.pieces and node.op == "get_attr":
            self.pieces[node] = self.attribute_rule.write(self, node)
        return self.pieces[node]

    def ids(self, node: fx.Node) -> Tensor:
        """The channels of a node's piece, written out; only for nodes with known channels."""
        found = self.piece(node).ids
        return torch.arange(len(self.network.channels[node])) if found is None else found

    def full(self, node: fx.Node, reader: fx.Node) -> Any:
        """The value at its original width, for readers that are not understood (and for the network's outputs)."""
        piece = self.piece(node)
        if isinstance(piece, list):
            known = self.network.channels[node]
            return tuple(self._full_piece(p, c, node, reader) for p, c in zip(piece, known, strict=True))
        return self._full_piece(piece, self.network.channels.get(node), node, reader)

    def _full_piece(self, piece: Piece, known: Any, node: fx.Node, reader: fx.Node) -> fx.Node:
        if piece.ids is None:
            return piece.node
        aligned = self._align(piece, known, torch.arange(len(known)), node)
        if aligned.node is not piece.node:
            self.expanded.setdefault(reader, []).append(node.name)
        return aligned.node

    def align(self, node: fx.Node, wanted: Tensor, dim: int) -> Piece:
        """The node's tensor with exactly the channels ``wanted`` (-1: a slot of zeros), constants filled in.

        The returned ids are -1 where the channel's value was given up because nobody needs it.
        """
        piece = self.piece(node)
        known = self.network.channels_at(node, dim)
        if piece.ids is not None and self.network.channels[node].dim != known.dim:
            raise AssertionError(f"{node.name}: channels along {known.dim} asked, shrunk along another dimension")
        return self._align(piece, known, wanted, node)

    def _align(self, piece: Piece, known: Any, wanted: Tensor, node: fx.Node) -> Piece:
        present = torch.arange(len(known)) if piece.ids is None else piece.ids
        if torch.equal(present, wanted):
            return piece
        slot = torch.full((len(known) + 1,), -1)
        slot[present] = torch.arange(len(present))
        slot[-1] = -1
        position = slot[wanted]
        found = position >= 0
        if found.all():
            module: nn.Module = SelectChannels(position, known.dim)
            return Piece(self.call(f"{node.name}_select", module, (piece.node,)), wanted)
        constant = torch.where(wanted >= 0, known.const[wanted.clamp(min=0)], float("nan"))
        ids = torch.where(found | ~constant.isnan(), wanted, -1)
        fill = torch.where(found, 0.0, constant.nan_to_num())
        in_order = torch.equal(position[found], torch.arange(len(present)))
        dtype = self.dtype_of(node)
        module = ExpandChannels(
            position[found], found.nonzero().flatten(), len(wanted), known.dim,
            fill.to(dtype) if fill.any() else None, in_order,
        )  # fmt: skip
        return Piece(self.call(f"{node.name}_expand", module, (piece.node,)), ids)

    @staticmethod
    def dtype_of(node: fx.Node) -> torch.dtype:
        value = node.meta["val"]
        return (value if isinstance(value, Tensor) else value[0]).dtype

    def pad(self, kept: Tensor, live: Tensor) -> Tensor:
        """bool [channels]: the kept ones, and constant ones that fill up their number to a multiple."""
        missing = -int(kept.sum()) % self.multiple if len(kept) >= self.multiple else 0
        kept = kept.clone()
        kept[(~kept & ~live).nonzero().flatten()[:missing]] = True
        return kept

    # ---- writing nodes

    def value(self, argument: Any) -> Any:
        """An argument of an original node for the new graph, tensors in whatever channel set they have."""
        return fx.map_arg(argument, lambda node: self.piece(node).node)

    def emit(self, node: fx.Node, args: Any, kwargs: Any) -> fx.Node:
        """The same operator under the same name, with these arguments."""
        return self.graph.create_node(node.op, node.target, args, kwargs, node.name)

    def reshape(self, node: fx.Node, source: fx.Node, sizes: list[Any]) -> fx.Node:
        """view under the original node's name, for memory in any order."""
        return self.graph.create_node("call_function", aten.reshape.default, (source, sizes), {}, node.name)

    def size(self, source: fx.Node, dim: int) -> fx.Node:
        return self.graph.call_function(aten.sym_size.int, (source, dim))

    def select(self, node: fx.Node, index: Tensor, dim: int) -> fx.Node:
        """Takes the channels ``index`` of a node of the compact graph."""
        return self.call(f"{node.name}_select", SelectChannels(index, dim), (node,))

    def pick(self, several: fx.Node, index: int) -> fx.Node:
        return self.graph.call_function(operator.getitem, (several, index))

    def call(self, name: str, module: nn.Module, args: tuple) -> fx.Node:
        """Calls a module that the original network does not have."""
        while name in self.network.modules:
            name += "_"
        return self.graph.call_module(self.add(name, module), args)

    def add(self, name: str, module: nn.Module) -> str:
        """Registers a module under a dotted name that is still free, with the containers on the way."""
        path, _, last = name.rpartition(".")
        parent = self.container(path)
        old = parent._modules.get(last)
        if old is not None and type(old) is nn.Module:  # a container that was made for something inside it
            for inner, part in [*old._modules.items(), *old._parameters.items(), *old._buffers.items()]:
                if not hasattr(module, inner):
                    setattr(module, inner, part)
            del parent._modules[last]
        while hasattr(parent, last) or not last:
            last += "_"
        parent.add_module(last, module)
        return f"{path}.{last}" if path else last

    def container(self, path: str) -> nn.Module:
        parent = self.root
        for part in path.split(".") if path else ():
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent._modules[part]
        return parent

    def derive(self, name: str, left: Callable[[Tensor], Tensor]) -> nn.Parameter | Tensor:
        """What is ``left`` of a tensor; of a parameter a parameter, and the same can be done later to its like."""
        old = self.network.tensors[name]
        value = left(old.detach())
        new = nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
        self.origins[new] = name, left
        return new

    def attribute(self, name: str, left: Callable[[Tensor], Tensor]) -> fx.Node:
        """A get_attr node for what is ``left`` of a parameter or buffer."""
        value = self.derive(name, left)
        path, _, last = name.rpartition(".")
        parent = self.container(path)
        if isinstance(value, nn.Parameter):
            parent.register_parameter(last, value)
        else:
            parent.register_buffer(last, value)
        return self.graph.create_node("get_attr", name)
