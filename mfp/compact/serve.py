"""The serving form: channels_last weights, joins fused with their ReLU, memory reused where that is provably safe."""

from __future__ import annotations

import copy
import operator
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from mfp.compact.modules import FusedJoin, ResidualJoin, ServingConv2d, ServingJoin2d
from mfp.compact.normalize import ShapeRecorder, alias_families, is_in_place

RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.LeakyReLU, nn.ELU)
FUSED_ACTIVATIONS = {
    nn.ReLU: "relu", nn.ReLU6: "relu6", nn.Hardswish: "hardswish", nn.SiLU: "silu", F.relu: "relu", torch.relu: "relu",
    F.relu6: "relu6", F.hardswish: "hardswish", F.silu: "silu", "relu": "relu",
}  # fmt: skip


@torch.no_grad()
def prepare_for_serving(small: fx.GraphModule, arguments: dict[str, Any]) -> None:
    """Rewrites a compact network with folded BatchNorm in place; its results stay the same."""
    for module in small.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.dim() == 4:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    ShapeRecorder(small).run(*arguments.values())
    fuse_joins(small)
    pack_convs(small)
    join_in_convs(small)
    reuse_memory(small)
    small.graph.lint()


def fuse_joins(small: fx.GraphModule) -> None:
    """ResidualJoin, and the sum of two equally shaped tensors, with the ReLU behind it, become a FusedJoin."""
    modules = dict(small.named_modules())
    for node in list(small.graph.nodes):
        joined = join_of(node, modules)
        if joined is None:
            continue
        residual, branch, index, bias = joined
        last, relu = node, only_relu_behind(node, modules)
        if relu is not None and writes_between(node, relu, modules):
            relu = None
        if relu is not None:
            last = relu
        name = free_name(small, f"{node.name}_fused")
        small.add_submodule(name, FusedJoin(index, relu is not None, bias=bias))
        with small.graph.inserting_before(last):
            new = small.graph.call_module(name, (residual, branch))
        new.meta.update(last.meta)
        last.replace_all_uses_with(new)
        for old in (last, node) if relu is not None else (node,):
            small.graph.erase_node(old)


def join_of(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[fx.Node, fx.Node, Tensor, Tensor | None] | None:
    """(residual, branch, index, bias) where the node is a join along dimension 1."""
    if node.op == "call_module" and isinstance(modules[node.target], ResidualJoin):
        join = modules[node.target]
        increasing = bool((join.index[1:] > join.index[:-1]).all())
        bias = None if join.bias is None else join.bias.detach()
        return (*node.args, join.index, bias) if join.dim == 1 and increasing else None
    if node.op != "call_function" or node.target not in (operator.add, torch.add) or len(node.args) != 2 or node.kwargs:
        return None
    a, b = node.args
    shapes = [part.meta.get("shape") if isinstance(part, fx.Node) else None for part in (a, b)]
    if a is b or shapes[0] is None or shapes[0] != shapes[1] or len(shapes[0]) < 3:
        return None
    return a, b, torch.arange(shapes[0][1], device=first_device(modules)), None


def first_device(modules: dict[str, nn.Module]) -> torch.device:
    return next((p.device for p in modules[""].parameters()), torch.device("cpu"))


def only_relu_behind(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node | None:
    """The ReLU that is the only reader of the node."""
    found = activation_behind(node, modules)
    return found[0] if found is not None and found[1] == "relu" else None


def activation_behind(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[fx.Node, str] | None:
    """The activation that is the only reader of the node, and its name."""
    if len(node.users) != 1:
        return None
    user = next(iter(node.users))
    kind = type(modules[user.target]) if user.op == "call_module" else user.target
    name = FUSED_ACTIVATIONS.get(kind) if user.op.startswith("call_") else None
    return None if name is None else (user, name)


def pack_convs(small: fx.GraphModule) -> None:
    """2d convs become ServingConv2d, with the activation that alone reads them."""
    modules = dict(small.named_modules())
    calls: dict[str, list[fx.Node]] = {}
    for node in small.graph.nodes:
        module = modules[node.target] if node.op == "call_module" else None
        if type(module) is nn.Conv2d and not module._forward_hooks and not module._forward_pre_hooks:
            calls.setdefault(node.target, []).append(node)
    for target, nodes in calls.items():
        found = activation_behind(nodes[0], modules) if len(nodes) == 1 else None
        activation = "none" if found is None else found[1]
        replace_module(small, target, with_parameters_of(modules[target], ServingConv2d, activation=activation))
        if found is not None:
            found[0].replace_all_uses_with(nodes[0])
            small.graph.erase_node(found[0])


def with_parameters_of(conv: nn.Conv2d, kind: type[ServingConv2d], **settings) -> ServingConv2d:
    with torch.device("meta"):
        new = kind(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
            conv.groups, conv.bias is not None, conv.padding_mode, **settings,
        )  # fmt: skip
    new.weight, new.bias = conv.weight, conv.bias
    return new.train(conv.training)


def join_in_convs(small: fx.GraphModule) -> None:
    """A FusedJoin and the conv whose result it alone reads become a ServingJoin2d."""
    modules = dict(small.named_modules())
    calls = Counter(node.target for node in small.graph.nodes if node.op == "call_module")
    for node in list(small.graph.nodes):
        join = modules[node.target] if node.op == "call_module" else None
        if not isinstance(join, FusedJoin) or join.bias is not None:
            continue
        orders = [node.args]
        if len(join.index) == node.meta["shape"][1]:
            orders.append(node.args[::-1])  # a sum of two whole tensors
        for residual, branch in orders:
            if can_join(branch, modules) and calls[branch.target] == 1 and not writes_between(branch, node, modules):
                new = with_parameters_of(modules[branch.target], ServingJoin2d, index=join.index, relu=join.relu)
                replace_module(small, branch.target, new)
                modules[branch.target] = new
                with small.graph.inserting_before(node):
                    both = small.graph.call_module(branch.target, (residual, *branch.args))
                both.meta.update(node.meta)
                node.replace_all_uses_with(both)
                small.graph.erase_node(node)
                small.graph.erase_node(branch)
                break


def can_join(branch: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the node is a conv that can add its result into a residual, read by one node alone."""
    conv = modules[branch.target] if branch.op == "call_module" else None
    return type(conv) is ServingConv2d and len(branch.users) == 1 and conv.groups == 1 and conv.activation == "none"


def writes_between(first: fx.Node, last: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether an operation between the two works in place: the first one cannot be put off then."""
    node = first.next
    while node is not last:
        if is_in_place(node, modules):
            return True
        node = node.next
    return False


def replace_module(small: fx.GraphModule, target: str, module: nn.Module) -> None:
    path, _, last = target.rpartition(".")
    setattr(small.get_submodule(path), last, module)


def free_name(small: fx.GraphModule, name: str) -> str:
    while hasattr(small, name):
        name += "_"
    return name


def reuse_memory(small: fx.GraphModule) -> None:
    """Joins and activations overwrite their input where nothing reads it, or any view of it, afterwards."""
    modules = dict(small.named_modules())
    for node in list(small.graph.nodes):
        module = modules.get(node.target) if node.op == "call_module" else None
        whole = isinstance(module, FusedJoin) and len(module.index) == node.meta["shape"][1]
        if whole and not is_free_after(node, node.args[0], small.graph, modules):
            node.args = node.args[::-1]  # a sum of two whole tensors: either may be overwritten
        if isinstance(module, FusedJoin | ServingJoin2d):
            module.inplace = is_free_after(node, node.args[0], small.graph, modules)
        elif type(module) in RECTIFIERS and is_free_after(node, node.args[0], small.graph, modules):
            own = copy.deepcopy(module)  # the module may be called elsewhere, where it must not overwrite
            own.inplace = True
            name = free_name(small, f"{node.name}_in_place")
            small.add_submodule(name, own)
            modules[name] = own
            node.target = name


def is_free_after(node: fx.Node, value: fx.Node, graph: fx.Graph, modules: dict[str, nn.Module]) -> bool:
    """Whether the memory of ``value`` belongs to the graph, no other input of ``node`` shares it, and nothing reads it
    afterwards."""
    order = {other: i for i, other in enumerate(graph.nodes)}
    family = alias_families(graph, modules)[value]
    if any(other in family for other in node.args if other is not value) or node.args.count(value) > 1:
        return False
    for alias in family:
        if alias is node:
            continue
        if alias.op in ("placeholder", "get_attr") or any(order[user] > order[node] for user in alias.users):
            return False
    return True
