"""Rewrites of the traced graph that the analysis relies on: shapes recorded, nothing in place, shuffles as such."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from mfp.compact.modules import channel_permute

IN_PLACE_FUNCTIONS = {
    operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul,
    operator.itruediv: operator.truediv, torch.relu_: torch.relu, torch.sigmoid_: torch.sigmoid,
    torch.tanh_: torch.tanh, F.relu_: F.relu, F.leaky_relu_: F.leaky_relu, F.elu_: F.elu, F.hardtanh_: F.hardtanh,
}  # fmt: skip
IN_PLACE_METHODS = {"add_", "sub_", "mul_", "div_", "relu_", "sigmoid_", "tanh_", "clamp_"}
FUNCTIONS_WITH_SWITCH = {  # position of the inplace argument
    F.relu: 1, F.relu6: 1, F.silu: 1, F.mish: 1, F.hardswish: 1, F.hardsigmoid: 1, F.selu: 1,
    F.leaky_relu: 2, F.elu: 2, F.celu: 2, F.hardtanh: 3,
}  # fmt: skip
VIEWS = {
    "view", "reshape", "flatten", "permute", "transpose", "squeeze", "unsqueeze", "chunk", "split", "narrow",
    "contiguous", "detach", "expand", "view_as", "expand_as", "to", "float", "type", "getitem", "swapaxes", "movedim",
    "unbind", "select", "unflatten", "type_as", "Identity", "Flatten", "Unflatten",
    "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout",
}  # fmt: skip


class ShapeRecorder(fx.Interpreter):
    """Runs the graph once and notes each result's shape in node.meta (values themselves when they are no tensors)."""

    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        if isinstance(result, Tensor):
            node.meta["shape"] = result.shape
            node.meta["dtype"] = result.dtype
        elif isinstance(result, tuple | list) and result and all(isinstance(part, Tensor) for part in result):
            node.meta["shapes"] = [part.shape for part in result]
        else:
            node.meta["scalar"] = True
        return result


def normalize(traced: fx.GraphModule) -> dict[fx.Node, str]:
    """Applies all rewrites; returns the nodes that must stay exactly as they are, each with the reason."""
    modules = dict(traced.named_modules())
    drop_inactive_dropout(traced.graph)
    opaque = make_functional(traced.graph, modules)
    find_shuffles(traced.graph, modules)
    traced.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or node in opaque)
    traced.graph.lint()
    return opaque


def drop_inactive_dropout(graph: fx.Graph) -> None:
    """Functional dropout and stochastic depth, traced in eval mode, are the identity for good."""
    for node in list(graph.nodes):
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        position = {"dropout": 2, "dropout1d": 2, "dropout2d": 2, "dropout3d": 2, "stochastic_depth": 3}.get(name)
        if position is None:
            continue
        training = node.args[position] if len(node.args) > position else node.kwargs.get("training", True)
        if training is False:
            node.replace_all_uses_with(node.args[0] if node.args else node.kwargs["input"])
            graph.erase_node(node)


def is_in_place(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return getattr(modules[node.target], "inplace", False) is True
    if node.op == "call_method":
        return node.target.endswith("_") and not node.target.endswith("__")
    if node.op != "call_function":
        return False
    position = FUNCTIONS_WITH_SWITCH.get(node.target)
    switch = node.args[position] if position and len(node.args) > position else node.kwargs.get("inplace", False)
    name = getattr(node.target, "__name__", "")
    return node.target in IN_PLACE_FUNCTIONS or bool(switch) or (name.endswith("_") and not name.endswith("__"))


def make_functional(graph: fx.Graph, modules: dict[str, nn.Module]) -> dict[fx.Node, str]:
    """Turns in-place operations into ordinary ones: later readers of the overwritten tensor read the result.

    Where a view of the overwritten tensor is read later, or the operation is unknown, all involved nodes are returned:
    they stay as they are, at full width.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    aliases = alias_families(graph, modules)
    opaque: dict[fx.Node, str] = {}
    for node in list(graph.nodes):
        if not is_in_place(node, modules):
            continue
        target = node.args[0] if node.args else node.kwargs.get("input")
        if not isinstance(target, fx.Node) or "scalar" in target.meta:
            continue
        family = aliases[target]
        earlier = [alias for alias in family if alias is not target and order[alias] < order[node]]
        seen_elsewhere = any(order[user] > order[node] for alias in earlier for user in alias.users)
        understood = (IN_PLACE_METHODS, IN_PLACE_FUNCTIONS, FUNCTIONS_WITH_SWITCH)
        known = node.op == "call_module" or any(node.target in names for names in understood)
        if seen_elsewhere or not known:
            opaque.update(dict.fromkeys({*family, node}, "overwritten in place while a view of it is in use"))
            continue
        target.replace_all_uses_with(node, delete_user_cb=lambda user, after=order[node]: order[user] > after)
        _make_pure(node)
    return opaque


def _make_pure(node: fx.Node) -> None:
    if node.op == "call_method":
        node.target = node.target[:-1]
    elif node.op == "call_function":
        node.target = IN_PLACE_FUNCTIONS.get(node.target, node.target)
        position = FUNCTIONS_WITH_SWITCH.get(node.target)
        if position is not None and len(node.args) > position:
            node.args = (*node.args[:position], False, *node.args[position + 1 :])
        node.kwargs = {key: value for key, value in node.kwargs.items() if key != "inplace"}


def alias_families(graph: fx.Graph, modules: dict[str, nn.Module]) -> dict[fx.Node, set[fx.Node]]:
    """For each node the nodes that may share its memory: joined by views and by in-place operations."""
    family: dict[fx.Node, set[fx.Node]] = {}
    for node in graph.nodes:
        family[node] = {node}
        if node.op not in ("call_module", "call_function", "call_method"):
            continue
        kind = type(modules[node.target]) if node.op == "call_module" else node.target
        name = kind if isinstance(kind, str) else getattr(kind, "__name__", "")
        sources = node.all_input_nodes[:1] if name in VIEWS or is_in_place(node, modules) else []
        if node.op == "call_module" and not kind.__module__.startswith(("torch.nn.", "mfp.compact.")):
            sources = node.all_input_nodes  # a piece of the user's may return what it was given
        for source in sources:
            family[source] |= family[node]
            for member in family[source]:
                family[member] = family[source]
    return family


def find_shuffles(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Channel shuffles (view, swap, view; or torch's own) become one channel_permute."""
    for node in list(graph.nodes):
        found = _shuffle_of(node, modules)
        if found is None:
            continue
        source, groups = found
        count = source.meta["shape"][1]
        index = torch.arange(count).view(groups, -1).t().reshape(-1).tolist()
        with graph.inserting_before(node):
            new = graph.call_function(channel_permute, (source, index))
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def _shuffle_of(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[fx.Node, int] | None:
    if node.op == "call_module" and type(modules[node.target]) is nn.ChannelShuffle:
        return node.args[0], modules[node.target].groups
    if node.op == "call_function" and node.target in (F.channel_shuffle, torch.channel_shuffle):
        return node.args[0], node.args[1] if len(node.args) > 1 else node.kwargs["groups"]
    if not _is_reshape(node):
        return None
    swap = node.args[0]
    if isinstance(swap, fx.Node) and swap.op == "call_method" and swap.target == "contiguous":
        swap = swap.args[0]
    if not isinstance(swap, fx.Node) or not swap.args or not _is_reshape(swap.args[0]):
        return None
    split = swap.args[0]
    source = split.args[0]
    shapes = [part.meta.get("shape") for part in (source, split, swap, node)]
    if any(shape is None for shape in shapes):
        return None
    before, wide, _, after = shapes
    if before != after or len(wide) != len(before) + 1 or len(before) < 2:
        return None
    groups, width = wide[1], wide[2]
    if groups * width != before[1] or wide[3:] != before[2:] or wide[0] != before[0]:
        return None
    return (source, groups) if _swaps_one_and_two(swap, len(wide)) else None


def _is_reshape(node: Any) -> bool:
    if not isinstance(node, fx.Node) or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    method = node.op == "call_method" and node.target in ("view", "reshape")
    return method or (node.op == "call_function" and node.target is torch.reshape)


def _swaps_one_and_two(node: fx.Node, ndim: int) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    arguments = node.args[1:]
    if name == "transpose":
        return len(arguments) == 2 and {a % ndim for a in arguments} == {1, 2}
    dims = arguments[0] if len(arguments) == 1 and isinstance(arguments[0], tuple | list) else arguments
    return name == "permute" and list(dims) == [0, 2, 1, *range(3, ndim)]
