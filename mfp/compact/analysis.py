"""The analysis: weights that are computed become constants, then constants forward, then needs backward."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from mfp.capture import Captured
from mfp.compact.channels import Channels, Network, arguments
from mfp.compact.contraction import Layer, is_contraction, layer_of
from mfp.compact.movement import find_shuffles
from mfp.compact.norms import VECTORS, norm_name
from mfp.compact.operators import rule_for

aten = torch.ops.aten


def analyse(captured: Captured, held: dict[str, Tensor] | None = None) -> Network:
    """Fills in which channels of every tensor are constant and which are needed.

    Args:
        held: by name of a parameter, which of its entries stay zero. Then every other entry of a parameter counts as
            one that learns, whatever its value, and of constants only zero: what is found holds for the rest of a
            training, in which a constant that comes from a parameter would move.
    """
    net = Network(captured.graph, dict(captured.tensors), captured.modules, zeros_only=held is not None)
    fold_computed_tensors(net)
    values = net.tensors
    if held is not None:
        net.tensors = {name: may_become(name, tensor, held) for name, tensor in values.items()}
    find_shuffles(net.graph)
    find_calls(net)
    propagate_constants(net)
    for node in net.graph.nodes:
        found = net.channels[node]
        if isinstance(found, list):
            net.demand[node] = [torch.zeros(len(channels), dtype=torch.bool) for channels in found]
        elif found is not None:
            net.demand[node] = torch.zeros(len(found), dtype=torch.bool)
    for node in reversed(net.graph.nodes):
        rule_for(net, node).backward(net, node)
    net.tensors = values
    return net


def may_become(name: str, tensor: Tensor, held: dict[str, Tensor]) -> Tensor:
    """A parameter with NaN, the lattice's word for live, wherever it is not held at zero."""
    if not isinstance(tensor, nn.Parameter) or not tensor.is_floating_point():
        return tensor
    unknown = torch.full_like(tensor, torch.nan, requires_grad=False)
    return unknown.masked_fill_(held[name], 0) if name in held else unknown


def fold_computed_tensors(net: Network) -> None:
    """What is computed from buffers alone (a frozen norm), and weights that are computed from parameters (standardised
    ones), are tensors of their own: the compact network does not compute them again."""
    is_weight = set()
    for node in net.graph.nodes:
        if is_contraction(node):
            found = arguments(node)
            is_weight |= {found[key] for key in ("weight", "bias") if isinstance(found[key], fx.Node)}
    for node in reversed(net.graph.nodes):  # whatever leads to a weight
        if node in is_weight and node.op == "call_function":
            is_weight |= set(node.all_input_nodes)
    values: dict[fx.Node, Tensor] = {}
    for node in list(net.graph.nodes):
        if node.op == "get_attr":
            tensor = net.tensors[node.target]
            if node in is_weight or not isinstance(tensor, nn.Parameter):
                values[node] = tensor.detach()
        elif node.op == "call_function" and node.all_input_nodes and all(s in values for s in node.all_input_nodes):
            if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                continue
            values[node] = node.target(
                *fx.map_arg(node.args, values.__getitem__), **fx.map_arg(node.kwargs, values.__getitem__)
            )
    for node in list(net.graph.nodes):
        value = values.get(node)
        if node.op != "call_function" or not isinstance(value, Tensor) or all(u in values for u in node.users):
            continue
        name = node.name
        while name in net.tensors or name in net.modules:
            name += "_"
        net.tensors[name] = value.clone()
        with net.graph.inserting_before(node):
            new = net.graph.create_node("get_attr", name)
        new.meta.update(node.meta)
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user not in values)
    for node in reversed(list(net.graph.nodes)):
        if node in values and not node.users:
            net.graph.erase_node(node)


def find_calls(net: Network) -> None:
    """Which operators apply the same weight or the same norm, and which must stay whole because they share it
    otherwise."""
    layers: dict[fx.Node, Layer] = {}
    names: dict[fx.Node, str] = {}
    held: dict[fx.Node, list[fx.Node]] = {}  # operator: the parameters that it would hold as a module
    for node in net.graph.nodes:
        layer = layer_of(node)
        if layer is not None:
            layers[node], names[node] = layer, getattr(layer.weight, "target", "")
            held[node] = [v for v in (layer.weight, layer.bias) if v is not None]
        elif getattr(node.target, "overloadpacket", None) is aten.batch_norm:
            names[node] = norm_name(net, node)
            held[node] = [v for key, v in arguments(node).items() if key in VECTORS and v is not None]
    for node, name in names.items():
        net.calls.setdefault(name, []).append(node)
    for node, parameters in held.items():
        calls = net.calls[names[node]]
        if any(net.value(v) is None for v in parameters):
            net.whole[node] = "its weight depends on the input"
        elif any(user not in calls for v in parameters for user in v.users):
            net.whole.update(dict.fromkeys(calls, "it shares a parameter with another part of the network"))
        elif any(layers.get(call) != layers.get(node) or held[call] != parameters for call in calls):
            net.whole.update(dict.fromkeys(calls, "its weight is used in several ways"))


def propagate_constants(net: Network) -> None:
    """The forward pass; once more where one call of a shared layer is understood and another is not."""
    while True:
        for node in net.graph.nodes:
            net.channels[node] = found = rule_for(net, node).forward(net, node)
            for channels in found if isinstance(found, list) else [found]:
                if net.zeros_only and isinstance(channels, Channels):
                    channels.const = torch.where(channels.const == 0, channels.const, torch.nan)
        mixed = [
            call for calls in net.calls.values() for call in calls
            if len({net.channels[c] is None for c in calls}) > 1 and call not in net.whole
        ]  # fmt: skip
        if not mixed:
            return
        net.whole.update(dict.fromkeys(mixed, "one of several calls of the same layer is not understood"))
