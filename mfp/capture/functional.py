"""From operators that work in place to operators that do not."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from mfp.errors import MfpError

aten = torch.ops.aten

# Operators that return their input or a new tensor, whichever it is not said in their schema; active in training alone.
DROPOUTS = {
    aten.dropout: nn.Dropout, aten.alpha_dropout: nn.AlphaDropout,
    aten.feature_dropout: nn.Dropout2d, aten.feature_alpha_dropout: nn.FeatureAlphaDropout,
}  # fmt: skip


def inline_blocks(program: Any) -> None:
    """What stands under ``torch.no_grad()`` or a switched off ``torch.autocast`` is a graph of its own; it becomes part
    of the one around it, since the network may be trained and is run in the dtypes it was captured in.

    Raises MfpError for an autocast that is switched on: the dtypes inside are decided when it runs.
    """
    graph, root = program.graph, program.graph_module
    for node in list(graph.nodes):
        name = getattr(node.target, "_name", "") if node.op == "call_function" else ""
        if name not in ("wrap_with_autocast", "wrap_with_set_grad_enabled"):
            continue
        if name == "wrap_with_autocast" and node.args[2]:
            raise MfpError("the model's forward switches torch.autocast on: call it under autocast instead")
        block, inputs = (node.args[4], node.args[5:]) if name == "wrap_with_autocast" else (node.args[1], node.args[2:])
        inner = getattr(root, block.target).graph
        values = dict(zip((n for n in inner.nodes if n.op == "placeholder"), inputs, strict=True))
        with graph.inserting_before(node):
            results = graph.graph_copy(inner, values)
        results = results if isinstance(results, tuple | list) else (results,)
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(node)
        graph.erase_node(block)


def make_functional(graph: fx.Graph, buffers: set[str]) -> bool:
    """Replaces operators that work in place by those that do not; later readers of what they overwrite read the result.

    False, with the graph half done, where a view of an overwritten tensor is read later, or a buffer is overwritten.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    family: dict[fx.Node, set[fx.Node]] = {}
    for node in list(graph.nodes):
        target = node.target
        family[node] = {node}
        if node.op != "call_function":
            continue
        written = _written_argument(node)
        for source in [written] if written is not None else aliased_arguments(node):
            family[source] |= family[node]
            for member in family[source]:
                family[member] = family[source]
        if written is None:
            continue
        pure = _pure_form(node)
        earlier = [other for other in family[node] if other not in (node, written) and order[other] < order[node]]
        seen = any(order[user] > order[node] for other in earlier for user in other.users)
        if pure is None or seen or any(other.name in buffers for other in family[node]):
            return False
        written.replace_all_uses_with(node, delete_user_cb=lambda user, at=order[node]: order[user] > at)
        node.target = pure
        if target.overloadpacket is aten.copy_:
            node.args = node.args[:2]
    return True


def _written_argument(node: fx.Node) -> fx.Node | None:
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return None
    for value, argument in zip(node.args, schema.arguments, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return value
    return None


def aliased_arguments(node: fx.Node) -> list[fx.Node]:
    """The inputs of a call whose memory its result may share."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.all_input_nodes
    schema = node.target._schema
    if node.target.overloadpacket is aten.batch_norm:  # tagged for its statistics, which eval mode does not write
        return []
    if torch.Tag.maybe_aliasing_or_mutating in node.target.tags:
        return node.all_input_nodes
    if all(result.alias_info is None for result in schema.returns):
        return []
    pairs = zip(node.args, schema.arguments, strict=False)
    return [v for v, argument in pairs if argument.alias_info is not None and isinstance(v, fx.Node)]


def _pure_form(node: fx.Node) -> Any:
    """The operator without the underscore, if it gives what the one with it writes."""
    packet, overload = node.target._schema.name.removeprefix("aten::"), node.target._overloadname
    pure = getattr(getattr(aten, packet.removesuffix("_"), None), overload, None) if packet.endswith("_") else None
    values = [n.meta.get("val") for n in node.all_input_nodes]
    kinds = {v.dtype for v in values if isinstance(v, Tensor) and v.dim()}
    return pure if len(kinds) == 1 else None


def decompose(program: Any) -> Any:
    """torch's own way to a functional graph. It drops inactive dropout, so that goes in disguise."""
    graph, kinds = program.graph, []
    for node in list(graph.nodes):
        packet = getattr(node.target, "overloadpacket", None)
        pure = getattr(aten, packet.__name__.removesuffix("_"), packet) if packet is not None else None
        if pure is not None and pure in DROPOUTS:
            with graph.inserting_before(node):
                both = graph.call_function(aten.native_dropout.default, (node.args[0], node.args[1], False))
                result = graph.call_function(operator.getitem, (both, 0))
            both.meta["nn_module_stack"] = result.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
            result.meta["val"] = node.meta["val"]
            kinds.append(pure.default)
            node.replace_all_uses_with(result)
            graph.erase_node(node)
    program.graph_module.recompile()
    program = program.run_decompositions({})
    graph = program.graph
    for node in list(graph.nodes):
        if node.target is aten.native_dropout.default:
            _replace_first(graph, node, kinds.pop(0), (node.args[0], node.args[1], False))
        elif node.target is aten._native_batch_norm_legit_no_training.default:
            values, (momentum, eps) = node.args[:5], node.args[5:]
            _replace_first(graph, node, aten.batch_norm.default, (*values, False, momentum, eps, False))
        elif node.target is aten._native_batch_norm_legit.no_stats:
            values, (training, momentum, eps) = node.args[:3], node.args[3:]
            args = (*values, None, None, training, momentum, eps, False)
            _replace_first(graph, node, aten.batch_norm.default, args)
    return program


def _replace_first(graph: fx.Graph, node: fx.Node, target: Any, args: tuple) -> None:
    """An operator with one result instead of one with several of which the first is read."""
    with graph.inserting_before(node):
        new = graph.call_function(target, args)
    for user in list(node.users):
        new.meta.update(user.meta)
        user.replace_all_uses_with(new)
        graph.erase_node(user)
    graph.erase_node(node)
