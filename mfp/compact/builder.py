"""Writes the compact graph: each tensor with the original channels it still has, and the adapters between such sets."""

from __future__ import annotations

import copy
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from mfp.compact.channels import Network
from mfp.compact.modules import ExpandChannels, SelectChannels


@dataclass
class Piece:
    """A tensor of the compact graph: entry i along its channel dimension is original channel ``ids[i]``.

    -1 marks a slot with no meaning, to be read with weight zero; ``ids=None`` is the original width and order.
    """

    node: fx.Node
    ids: Tensor | None = None


class Builder:
    """Holds the graph being written; rules ask it for their inputs in the channel set that they want."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.pieces: dict[fx.Node, Any] = {}  # Piece, list of Pieces, or a plain Python value
        self.origin: dict[str, tuple[Tensor | None, Tensor | None, int, int]] = {}
        self.sources: dict[str, nn.Parameter] = {}
        self.shared: dict[int, Any] = {}
        self.expanded: dict[fx.Node, list[str]] = {}

    # ---- reading inputs

    def ids(self, node: fx.Node) -> Tensor:
        """The physical channels of a node's piece, written out; only for nodes with known channels or a shape."""
        piece = self.pieces[node]
        if piece.ids is not None:
            return piece.ids
        known = self.network.known(node)
        return torch.arange(len(known))

    def full(self, node: fx.Node, reader: fx.Node) -> Any:
        """The value at its original width, for readers that are not understood (and for the network's outputs)."""
        piece = self.pieces[node]
        if isinstance(piece, list):
            parts = [self._full_piece(p, c, node, reader) for p, c in zip(piece, self.network.channels[node], strict=True)]
            return tuple(parts)
        if not isinstance(piece, Piece):
            return piece
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
        piece = self.pieces[node]
        known = self.network.channels_at(node, dim)
        if piece.ids is not None and self.network.known(node).dim != known.dim:
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
        module = ExpandChannels(
            position[found], found.nonzero().flatten(), len(wanted), known.dim,
            fill.to(node.meta["dtype"]) if fill.any() else None,
        )  # fmt: skip
        return Piece(self.call(f"{node.name}_expand", module, (piece.node,)), ids)

    # ---- writing nodes

    def value(self, argument: Any) -> Any:
        """An argument of an original node for the new graph, tensors in whatever channel set they have."""
        def convert(node: fx.Node) -> Any:
            piece = self.pieces[node]
            return piece.node if isinstance(piece, Piece) else piece

        return fx.map_arg(argument, convert)

    def emit(self, node: fx.Node, args: Any, kwargs: Any, module: nn.Module | None = None) -> fx.Node | Any:
        """Copies a node with these arguments; plain arithmetic on plain numbers is done at once."""
        if node.op == "call_module":
            name = node.target if module is None else self.add(node.target, module)
            if module is None:
                self.keep_module(node.target)
            return self.graph.create_node("call_module", name, args, kwargs, node.name)
        values = [*args, *kwargs.values()]
        if node.op == "call_function" and getattr(operator, node.target.__name__, None) is node.target:
            if all(isinstance(v, int | float | bool) for v in values):
                return node.target(*args, **kwargs)
        if node.op == "get_attr":
            self.keep_attribute(node.target)
        return self.graph.create_node(node.op, node.target, args, kwargs, node.name)

    def call(self, name: str, module: nn.Module, args: tuple) -> fx.Node:
        return self.graph.call_module(self.add(name, module), args)

    def add(self, name: str, module: nn.Module) -> str:
        """Registers a module under a dotted name that is still free, with the containers on the way."""
        parent, (*path, last) = self.root, name.split(".")
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent._modules[part]
        while hasattr(parent, last):
            last += "_"
        parent.add_module(last, module)
        return ".".join([*path, last])

    def keep_module(self, target: str) -> None:
        """Copies a module of the original network as it is, once."""
        original = self.network.modules[target]
        if id(original) in self.shared or target in dict(self.root.named_modules()):
            return
        module = copy.deepcopy(original)
        for part in module.modules():
            if getattr(part, "inplace", False) is True:
                part.inplace = False
        self.add(target, module)
        for name, parameter in original.named_parameters():
            self.sources[f"{target}.{name}"] = parameter

    def keep_attribute(self, target: str) -> None:
        *path, last = target.split(".")
        original: Any = self.network.modules[".".join(path)]
        value = getattr(original, last)
        parent = self.root
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent._modules[part]
        if hasattr(parent, last):
            return
        if isinstance(value, nn.Parameter):
            parent.register_parameter(last, nn.Parameter(value.detach().clone(), value.requires_grad))
            self.sources[target] = value
        elif isinstance(value, Tensor):
            parent.register_buffer(last, value.detach().clone())
        else:
            setattr(parent, last, copy.deepcopy(value))
