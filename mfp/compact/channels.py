"""What the analysis knows about the channels of each tensor in a graph, and the tables it fills in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn


@dataclass
class Channels:
    """One tensor's channels: each is live (NaN) or holds one constant at every position and for every input.

    ``const`` is float64 [n]; ``dim`` is the dimension of the tensor that has those n entries.
    """

    dim: int
    const: Tensor

    @property
    def live(self) -> Tensor:
        return self.const.isnan()

    def __len__(self) -> int:
        return len(self.const)


def all_live(dim: int, count: int) -> Channels:
    return Channels(dim, torch.full((count,), float("nan"), dtype=torch.float64))


@dataclass
class Network:
    """A traced graph with its shapes, and per node the channels and which of them somebody needs.

    ``channels[node]`` is a Channels, a list of them for an operation with several results, or None where no channel
    dimension is known (everything is live then). ``demand[node]`` has the same form, with bool tensors.
    """

    graph: fx.Graph
    modules: dict[str, nn.Module]
    opaque: dict[fx.Node, str] = field(default_factory=dict)
    channels: dict[fx.Node, Any] = field(default_factory=dict)
    demand: dict[fx.Node, Any] = field(default_factory=dict)
    calls: dict[int, list[fx.Node]] = field(default_factory=dict)  # by id of the module
    facts: dict[int, Any] = field(default_factory=dict)  # by id of the module: what its weights say

    def module(self, node: fx.Node) -> nn.Module:
        return self.modules[node.target]

    def call_nodes(self, node: fx.Node) -> list[fx.Node]:
        """All nodes that call the same module object as this one."""
        return self.calls[id(self.module(node))]

    def shape(self, node: fx.Node) -> torch.Size | None:
        return node.meta.get("shape")

    def known(self, node: fx.Node) -> Channels | None:
        found = self.channels.get(node)
        return found if isinstance(found, Channels) else None

    def channels_at(self, node: fx.Node, dim: int) -> Channels:
        """The node's channels seen along ``dim``; all live where the analysis knows none, or another dimension."""
        found = self.known(node)
        dim %= len(self.shape(node))
        return found if found is not None and found.dim == dim else all_live(dim, self.shape(node)[dim])

    def kept(self, node: fx.Node) -> Tensor:
        """bool [n]: channels that are live and that somebody needs."""
        return self.channels[node].live & self.demand[node]

    def need(self, node: fx.Node, wanted: Tensor, dim: int) -> None:
        """Some reader needs these channels of the node (bool [n] along dim)."""
        found = self.known(node)
        if found is None:
            self.need_all(node)
        elif found.dim == dim % len(self.shape(node)):
            self.demand[node] |= wanted
        else:
            self.need_all(node)

    def need_all(self, node: fx.Node) -> None:
        found = self.demand.get(node)
        for mask in found if isinstance(found, list) else [found]:
            if mask is not None:
                mask.fill_(True)


def input_node(node: fx.Node, name: str = "input") -> fx.Node:
    """The tensor that an operation with one data argument reads."""
    return node.args[0] if node.args else node.kwargs[name]


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """The argument of a call by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def inputs_of(node: fx.Node) -> Iterator[fx.Node]:
    yield from node.all_input_nodes


def take_rows(vector: Tensor, rows: Tensor, missing: float = 0.0) -> Tensor:
    """vector[rows]; -1 gives ``missing``."""
    rows = rows.to(vector.device)
    taken = vector[rows.clamp(min=0)]
    taken[rows < 0] = missing
    return taken
