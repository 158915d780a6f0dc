"""The pass itself: constants forward, needs backward, then the compact graph, node by node."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from mfp.compact.builder import Builder, Piece
from mfp.compact.channels import Channels, Network
from mfp.compact.table import rule_for


def analyse(graph: fx.Graph, modules: dict[str, nn.Module], opaque: dict[fx.Node, str]) -> Network:
    """Fills in which channels of every tensor are constant and which are needed."""
    net = Network(graph, modules, dict(opaque))
    for node in graph.nodes:
        if node.op == "call_module":
            net.calls.setdefault(id(net.module(node)), []).append(node)
    find_opaque_modules(net)
    propagate_constants(net)
    for node in graph.nodes:
        found = net.channels[node]
        if isinstance(found, list):
            net.demand[node] = [torch.zeros(len(channels), dtype=torch.bool) for channels in found]
        elif found is not None:
            net.demand[node] = torch.zeros(len(found), dtype=torch.bool)
    for node in reversed(graph.nodes):
        rule_for(net, node).backward(net, node)
    return net


def propagate_constants(net: Network) -> None:
    """The forward pass; once more where one call of a shared module is understood and another is not."""
    while True:
        for node in net.graph.nodes:
            net.channels[node] = rule_for(net, node).forward(net, node)
        mixed = [
            call for calls in net.calls.values() for call in calls
            if len({net.channels[c] is None for c in calls}) > 1 and call not in net.opaque
        ]  # fmt: skip
        if not mixed:
            return
        net.opaque.update(dict.fromkeys(mixed, "one of several calls of the same module is not understood"))


def find_opaque_modules(net: Network) -> None:
    """Modules that do more than their class says: hooks, or parameters that belong to other modules too."""
    owners: dict[int, set[int]] = {}
    for module in net.modules.values():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(id(module))
    read_directly = set()
    for node in net.graph.nodes:
        if node.op == "get_attr":
            *path, last = node.target.split(".")
            read_directly.add(id(getattr(net.modules[".".join(path)], last)))
    for calls in net.calls.values():
        module = net.module(calls[0])
        reason = None
        if module._forward_hooks or module._forward_pre_hooks:
            reason = "has forward hooks"
        elif any(len(owners[id(p)]) > 1 or id(p) in read_directly for p in module.parameters(recurse=False)):
            reason = "shares a parameter with another part of the network"
        if reason:
            net.opaque.update(dict.fromkeys(calls, reason))


def write(net: Network, multiple: int) -> Builder:
    """The compact graph, written node by node in the original order, with channel counts filled up to a multiple."""
    build = Builder(net, multiple)
    for node in net.graph.nodes:
        if node.op == "output":
            result = fx.map_arg(node.args[0], lambda source, reader=node: build.full(source, reader))
            build.graph.output(result)
            continue
        piece = rule_for(net, node).shrink(build, node)
        build.pieces[node] = tidy(piece, net.channels[node])
    return build


def tidy(piece: object, known: object) -> object:
    """A piece that still has all channels in order says so with ids=None."""
    if isinstance(piece, list):
        return [tidy(part, channels) for part, channels in zip(piece, known, strict=True)]
    cut = isinstance(piece, Piece) and piece.ids is not None and isinstance(known, Channels)
    if cut and torch.equal(piece.ids, torch.arange(len(known))):
        return Piece(piece.node)
    return piece


def zero_filters(module: nn.Module) -> Tensor:
    """bool [filters]: all weights of the filter are zero."""
    return (module.weight.detach() == 0).flatten(1).all(1)
