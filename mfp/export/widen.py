"""Joins by index become plain additions: the layers in front of a join get filters of zeros for the channels they lack.

Other engines than mfp's own have no cheap join by index; a plain addition they fuse into the convolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from mfp.export.grow import Grower, Wanted
from mfp.modules import AddConstants, ExpandChannels, ResidualJoin, SelectChannels

aten = torch.ops.aten

#: Numbers of channels that engines compute at once: ONNX Runtime takes slower kernels for other widths.
CHANNELS_AT_ONCE = 8


@dataclass
class Widened:
    """What became of the joins: layers that grew, with their filters before and after, and joins that are spread out
    when the network runs; and layers that were filled up to multiples of CHANNELS_AT_ONCE."""

    grown: dict[str, tuple[int, int]]
    left: list[str]
    filled: dict[str, tuple[int, int]]


@torch.no_grad()
def widen(network: fx.GraphModule, arguments: dict[str, Any]) -> Widened:
    """Replaces the joins and expansions of a compact network in place: the layers before them grow where they can,
    elsewhere channels of zeros are put between the others when it runs (padding and a gather, that all engines have).

    Args:
        arguments: forward's arguments by name, for the shapes.
    """
    widener = _Widener(network, arguments)
    for node in list(network.graph.nodes):
        if node.op != "call_module":
            continue
        module = widener.modules[node.target]
        if isinstance(module, ResidualJoin) and not widener.join(node, module):
            widener.spread_join(node, module)
        elif isinstance(module, ExpandChannels) and not widener.expansion(node, module):
            widener.spread_expansion(node, module)
    network.recompile()
    filler = Grower(network, arguments)
    filler.fill_up(CHANNELS_AT_ONCE)
    network.graph.lint()
    network.delete_all_unused_submodules()
    network.recompile()
    return Widened(widener.grown, widener.left, filler.grown)


class _Widener(Grower):
    def __init__(self, network: fx.GraphModule, arguments: dict[str, Any]) -> None:
        super().__init__(network, arguments)
        self.left: list[str] = []

    def join(self, node: fx.Node, module: ResidualJoin) -> bool:
        residual, branch = node.args
        width = self.width(residual, module.dim)
        fill = torch.zeros(width, dtype=torch.float64) if module.bias is None else module.bias.detach().double().cpu()
        if not self.grow(branch, Wanted(module.index.cpu(), width, fill), node):
            return False
        with self.network.graph.inserting_before(node):
            added = self.network.graph.call_function(aten.add.Tensor, (residual, branch))
        added.meta.update(node.meta)
        node.replace_all_uses_with(added)
        self.network.graph.erase_node(node)
        return True

    def expansion(self, node: fx.Node, module: ExpandChannels) -> bool:
        (source,) = node.args
        count = self.width(source, module.dim)
        if sorted(module.source.tolist()) != list(range(count)):
            return False
        place = torch.empty(count, dtype=torch.long)
        place[module.source.cpu()] = module.index.cpu()
        fill = torch.zeros(module.width) if module.fill is None else module.fill.detach().cpu()
        if not self.grow(source, Wanted(place, module.width, fill.double()), node):
            return False
        node.replace_all_uses_with(source)
        self.network.graph.erase_node(node)
        return True

    def spread_join(self, node: fx.Node, module: ResidualJoin) -> None:
        residual, branch = node.args
        width = self.width(residual, module.dim)
        source = torch.full((width,), -1)
        source[module.index.cpu()] = torch.arange(len(module.index))
        with self.network.graph.inserting_before(node):
            spread = self.spread(node.name, branch, source, module.dim)
            added = self.network.graph.call_function(aten.add.Tensor, (residual, spread))
            self.replace(node, self.plus(node.name, added, module.bias, module.dim))

    def spread_expansion(self, node: fx.Node, module: ExpandChannels) -> None:
        source = torch.full((module.width,), -1)
        source[module.index.cpu()] = module.source.cpu()
        with self.network.graph.inserting_before(node):
            spread = self.spread(node.name, node.args[0], source, module.dim)
            self.replace(node, self.plus(node.name, spread, module.fill, module.dim))

    def spread(self, name: str, node: fx.Node, source: Tensor, dim: int) -> fx.Node:
        """A wider tensor: channel i is the node's channel ``source[i]``, or zero where that is -1."""
        count, ndim, graph = self.width(node, dim), len(node.meta["tensor_meta"].shape), self.network.graph
        there = (source >= 0).nonzero().flatten()
        first = int(there[0])
        beside = [0, 0] * (ndim - 1 - dim)  # pads are written from the last dimension on
        if torch.equal(source[first : first + count], torch.arange(count)) and len(there) == count:
            amounts = [*beside, first, len(source) - first - count]
            return graph.call_function(aten.constant_pad_nd.default, (node, amounts, 0.0))
        padded = graph.call_function(aten.constant_pad_nd.default, (node, [*beside, 0, 1], 0.0))
        index = torch.where(source >= 0, source, count)
        device = next((p.device for p in self.network.parameters()), torch.device("cpu"))
        return self.add(f"{name}_spread", SelectChannels(index.to(device), dim), padded)

    def plus(self, name: str, node: fx.Node, constants: Tensor | None, dim: int) -> fx.Node:
        if constants is None:
            return node
        return self.add(f"{name}_constants", AddConstants(constants.detach(), dim), node)

    def add(self, name: str, module: nn.Module, source: fx.Node) -> fx.Node:
        self.network.add_submodule(name, module)
        self.modules[name], self.calls[name] = module, 1
        return self.network.graph.call_module(name, (source,))

    def replace(self, node: fx.Node, new: fx.Node) -> None:
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        self.network.graph.erase_node(node)
        self.left.append(node.name)
