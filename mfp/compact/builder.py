"""Writes the compact graph: each tensor with the original channels it still has, and the adapters between such sets."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
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

    def __init__(self, network: Network, multiple: int) -> None:
        self.network = network
        self.multiple = multiple  # channel counts that the processor likes; see pad
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.pieces: dict[fx.Node, Any] = {}  # Piece, list of Pieces, or a plain Python value
        self.origins: dict[nn.Parameter, tuple[nn.Parameter, Callable[[Tensor], Tensor]]] = {}  # of new parameters
        self.shared: dict[int, Any] = {}  # by id of the original module: how it was cut
        self.kept: dict[int, str] = {}  # by id of the original module: the name of its copy
        self.expanded: dict[fx.Node, list[str]] = {}  # reader: what was widened for it
        self.must_run: set[fx.Node] = set()  # nodes that may work in place: no dead code, even without readers

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
            parts = [
                self._full_piece(p, c, node, reader) for p, c in zip(piece, self.network.channels[node], strict=True)
            ]
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
        in_order = torch.equal(position[found], torch.arange(len(present)))
        module = ExpandChannels(
            position[found], found.nonzero().flatten(), len(wanted), known.dim,
            fill.to(node.meta["dtype"]) if fill.any() else None, in_order,
        )  # fmt: skip
        return Piece(self.call(f"{node.name}_expand", module, (piece.node,)), ids)

    def pad(self, kept: Tensor, live: Tensor) -> Tensor:
        """bool [channels]: the kept ones, and constant ones that fill up their number to a multiple."""
        missing = -int(kept.sum()) % self.multiple
        kept = kept.clone()
        kept[(~kept & ~live).nonzero().flatten()[:missing]] = True
        return kept

    # ---- writing nodes

    def value(self, argument: Any) -> Any:
        """An argument of an original node for the new graph, tensors in whatever channel set they have."""

        def convert(node: fx.Node) -> Any:
            piece = self.pieces[node]
            return piece.node if isinstance(piece, Piece) else piece

        return fx.map_arg(argument, convert)

    def emit(self, node: fx.Node, args: Any, kwargs: Any) -> fx.Node | Any:
        """Copies a node with these arguments; plain arithmetic on plain numbers is done at once."""
        if node.op == "call_module":
            name = self.keep_module(node.target, as_is=node in self.network.opaque)
            return self.create(node, name, args, kwargs)
        values = [*args, *kwargs.values()]
        plain = all(isinstance(v, int | float | bool) for v in values)
        if plain and node.op == "call_function" and getattr(operator, node.target.__name__, None) is node.target:
            return node.target(*args, **kwargs)
        if node.op == "get_attr":
            self.keep_attribute(node.target)
        return self.create(node, node.target, args, kwargs)

    def create(self, node: fx.Node, target: Any, args: Any, kwargs: Any) -> fx.Node:
        """A node of the same kind and name as the original one."""
        new = self.graph.create_node(node.op, target, args, kwargs, node.name)
        if node in self.network.opaque:
            self.must_run.add(new)
        return new

    def call(self, name: str, module: nn.Module, args: tuple) -> fx.Node:
        """Calls a module that the original network does not have."""
        while name in self.network.modules:
            name += "_"
        return self.graph.call_module(self.add(name, module), args)

    def add(self, name: str, module: nn.Module) -> str:
        """Registers a module under a dotted name that is still free, with the containers on the way."""
        path, _, last = name.rpartition(".")
        parent = self.container(path)
        while hasattr(parent, last):
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

    def derive(self, old: nn.Parameter, left: Callable[[Tensor], Tensor]) -> nn.Parameter:
        """A parameter with what is ``left`` of an old one; the same can be done later to tensors of its shape."""
        new = nn.Parameter(left(old.detach()), old.requires_grad)
        self.origins[new] = old, left
        return new

    def keep_module(self, target: str, as_is: bool) -> str:
        """Copies a module of the original network as it is, once; the name it has now."""
        original = self.network.modules[target]
        if id(original) not in self.kept:
            module = copy.deepcopy(original)
            for part in module.modules():
                if getattr(part, "inplace", False) is True and not as_is:
                    part.inplace = False
            self.kept[id(original)] = self.add(target, module)
            for new, old in zip(module.parameters(), original.parameters(), strict=True):
                self.origins[new] = old, torch.clone
        return self.kept[id(original)]

    def keep_attribute(self, target: str) -> None:
        path, _, last = target.rpartition(".")
        value = getattr(self.network.modules[path], last)
        parent = self.container(path)
        if hasattr(parent, last):
            return
        if isinstance(value, nn.Parameter):
            parent.register_parameter(last, self.derive(value, torch.clone))
        elif isinstance(value, Tensor):
            parent.register_buffer(last, value.detach().clone())
        else:
            setattr(parent, last, copy.deepcopy(value))
