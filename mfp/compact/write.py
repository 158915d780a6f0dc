"""Writes the compact graph, node by node in the original order."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx, nn

from mfp.capture import DROPOUTS, drops_whole_samples
from mfp.capture.sizes import size_rules
from mfp.compact.channels import Channels, Network, arguments
from mfp.compact.operators import BY_KIND, rule_for
from mfp.compact.optimizer import Origin
from mfp.compact.writer import Piece, Writer
from mfp.modules import InputSizes
from mfp.serving.fold import absorb_constants


def write(net: Network, multiple: int) -> Writer:
    """The compact graph, with channel counts filled up to a multiple."""
    out = Writer(net, multiple, BY_KIND["get_attr"])
    for node in net.graph.nodes:
        if node.op == "get_attr":
            continue  # written when it is read
        if node.op == "output":
            out.graph.output(fx.map_arg(node.args[0], lambda source, reader=node: out.full(source, reader)))
            continue
        rule = rule_for(net, node)
        piece = write_dropout(out, node) if is_dropout(node) else rule.write(out, node)
        if node.meta.get("is_input") and size_rules(node.meta["val"]):
            check = InputSizes(size_rules(node.meta["val"]))
            piece = Piece(out.call(f"{node.name}_sizes", check, (piece.node,)))
        out.pieces[node] = tidy(piece, net.channels[node])
    return out


def tidy(piece: Any, known: Any) -> Any:
    """A piece that still has all channels in order says so with ids=None."""
    if isinstance(piece, list):
        return [tidy(part, channels) for part, channels in zip(piece, known, strict=True)]
    cut = isinstance(piece, Piece) and piece.ids is not None and isinstance(known, Channels)
    if cut and torch.equal(piece.ids, torch.arange(len(known))):
        return Piece(piece.node)
    return piece


def is_dropout(node: fx.Node) -> bool:
    return getattr(node.target, "overloadpacket", None) in DROPOUTS


def write_dropout(out: Writer, node: fx.Node) -> Piece:
    """Dropout is a module again, so that train() switches it on; a functional one gets a module of its own."""
    piece, share = out.piece(node.args[0]), arguments(node)["p"]
    if share == 0:
        return piece
    name = node.meta["module"]
    original = out.network.modules.get(name)
    if drops_whole_samples(original):
        return Piece(out.graph.call_module(out.add(name, copy.deepcopy(original)), (piece.node,)), piece.ids)
    if not isinstance(original, nn.modules.dropout._DropoutNd):
        name, original = node.name, DROPOUTS[node.target.overloadpacket]()
    if name not in out.cuts:
        out.cuts[name] = out.add(name, type(original)(share))
    return Piece(out.graph.create_node("call_module", out.cuts[name], (piece.node,), {}, node.name), piece.ids)


def modes_of(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def origins(small: fx.GraphModule, out: Writer) -> dict[str, Origin]:
    """Where parameters and buffers come from; those for constants, and of weights that are computed, are not listed."""
    tensors = [*small.named_parameters(), *small.named_buffers()]
    return {name: Origin(*out.origins[tensor]) for name, tensor in tensors if tensor in out.origins}


def finish(out: Writer, name: str, modes: dict[str, bool]) -> fx.GraphModule:
    """The module around the written graph, with what it uses alone, in the graph's order."""
    graph = out.graph
    for node in reversed(list(graph.nodes)):
        if node.op not in ("placeholder", "output") and not node.users:
            graph.erase_node(node)
    small = fx.GraphModule(out.root, graph, f"Compact{name.removeprefix('Compact')}")
    absorb_constants(small)
    restore_modes(small, modes)
    return small


def restore_modes(small: fx.GraphModule, modes: dict[str, bool]) -> None:
    """Each module is in the mode of its original (a frozen BatchNorm stays in eval), new ones in the model's."""
    for name, module in small.named_modules():
        module.training = modes.get(name, modes.get(name.rpartition(".")[0], modes[""]))
