"""What the analysis knows about the channels of each tensor in a graph, and the tables it fills in."""

from __future__ import annotations

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
    """A captured graph, and per node the channels and which of them somebody needs.

    ``channels[node]`` is a Channels, a list of them for an operator with several results, or None where no channel
    dimension is known (everything is live then). ``demand[node]`` has the same form, with bool tensors.
    """

    graph: fx.Graph
    tensors: dict[str, Tensor]
    modules: dict[str, nn.Module]
    whole: dict[fx.Node, str] = field(default_factory=dict)  # nodes that are left as they are, and why
    channels: dict[fx.Node, Any] = field(default_factory=dict)
    demand: dict[fx.Node, Any] = field(default_factory=dict)
    calls: dict[str, list[fx.Node]] = field(default_factory=dict)  # by name of a weight: the operators that apply it
    nonzero: dict[str, Tensor] = field(default_factory=dict)  # by name of a weight: which kernels are not zero
    zeros_only: bool = False  # any other constant counts as live

    def known(self, node: Any) -> Channels | None:
        found = self.channels.get(node) if isinstance(node, fx.Node) else None
        return found if isinstance(found, Channels) else None

    def channels_at(self, node: fx.Node, dim: int) -> Channels:
        """The node's channels seen along ``dim``; all live where the analysis knows none, or another dimension."""
        found = self.known(node)
        dim %= len(shape(node))
        return found if found is not None and found.dim == dim else all_live(dim, shape(node)[dim])

    def kept(self, node: fx.Node) -> Tensor:
        """bool [n]: channels that are live and that somebody needs."""
        return self.channels[node].live & self.demand[node]

    def need(self, node: fx.Node, wanted: Tensor, dim: int) -> None:
        """Some reader needs these channels of the node (bool [n] along dim)."""
        found = self.known(node)
        if found is not None and found.dim == dim % len(shape(node)):
            self.demand[node] |= wanted
        else:
            self.need_all(node)

    def need_all(self, node: fx.Node) -> None:
        found = self.demand.get(node)
        for mask in found if isinstance(found, list) else [found]:
            if mask is not None:
                mask.fill_(True)

    def value(self, node: Any) -> Tensor | None:
        """The tensor that a get_attr node reads."""
        return self.tensors[node.target] if isinstance(node, fx.Node) and node.op == "get_attr" else None


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator's call by the names in its schema, defaults included."""
    schema = node.target._schema.arguments
    given = dict(zip([argument.name for argument in schema], node.args, strict=False)) | node.kwargs
    return {argument.name: given.get(argument.name, argument.default_value) for argument in schema}


def shape(node: fx.Node) -> tuple[int, ...]:
    """The sizes of the node's tensor on the example; which of them hold for any input is_fixed tells."""
    if "shape" not in node.meta:
        sizes = node.meta["val"].shape
        node.meta["shape"] = tuple(s if isinstance(s, int) else int(s.node.hint) for s in sizes)
    return node.meta["shape"]


def has_shape(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), Tensor)


def is_fixed(node: fx.Node, dim: int) -> bool:
    """Whether a size is the same for every input."""
    return isinstance(node.meta["val"].shape[dim], int)


def is_float(node: fx.Node) -> bool:
    return has_shape(node) and node.meta["val"].dtype.is_floating_point


def numel_between(node: fx.Node, start: int, end: int) -> Any:
    """The product of sizes as an int or a sympy expression: equal ones are equal for every input."""
    total: Any = 1
    for size in node.meta["val"].shape[start:end]:
        total = total * (size if isinstance(size, int) else size.node.expr)
    return total if isinstance(total, int) else total.expand()


def take_rows(vector: Tensor, rows: Tensor, missing: float = 0.0) -> Tensor:
    """vector[rows]; -1 gives ``missing``."""
    rows = rows.to(vector.device)
    taken = vector[rows.clamp(min=0)]
    taken[rows < 0] = missing
    return taken
