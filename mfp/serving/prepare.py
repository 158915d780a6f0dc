"""Makes the serving form: channels_last weights, what can be one pass over memory fused, memory reused where that is
safe."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from mfp.capture import aliased_arguments, eval_mode
from mfp.modules import ExpandChannels, ResidualJoin
from mfp.serving.fold import fold_batchnorm, scale_and_shift
from mfp.serving.modules import (
    FusedJoin,
    ServingConv2d,
    ServingGlobalAvgPool2d,
    ServingJoin2d,
    ServingLinear,
    ServingNorm2d,
    ServingPointwiseDepthwise2d,
    ServingSqueezeExcite,
)
from mfp.serving.network import ServingNetwork

aten = torch.ops.aten

SERVING_BYTES = 16  # rows of channels should start at a multiple: 4 floats, 8 half floats as tensor cores take them
FUSED_ACTIVATIONS = {aten.relu: "relu", aten.relu6: "relu6", aten.hardswish: "hardswish", aten.silu: "silu"}
GATES = {aten.sigmoid: False, aten.hardsigmoid: True}  # whether they are hard
IN_PLACE = {
    aten.relu: aten.relu_, aten.relu6: aten.relu6_, aten.hardtanh: aten.hardtanh_, aten.hardswish: aten.hardswish_,
    aten.silu: aten.silu_, aten.leaky_relu: aten.leaky_relu_, aten.elu: aten.elu_,
}  # fmt: skip


@torch.no_grad()
def prepare_for_serving(small: fx.GraphModule, arguments: dict[str, Any]) -> ServingNetwork:
    """The serving form of a compact network that has no operator in place; ``small`` is used up."""
    with eval_mode(small):
        fold_batchnorm(small)
        for module in small.modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, nn.Parameter) and weight.dim() == 4:
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        inputs = [arguments[node.target] for node in small.graph.nodes if node.op == "placeholder"]
        ShapeProp(small).propagate(*inputs)
        fuse_joins(small)
        fuse_norms(small)
        pack_convs(small)
        pack_linears(small)
        fuse_squeeze_excites(small)
        replace_global_pools(small)
        join_in_convs(small)
        fuse_depthwise_convs(small)
        reuse_memory(small)
    small.graph.lint()
    return ServingNetwork(small, small.graph, type(small).__name__)  # with what it uses alone


def shape(node: fx.Node) -> torch.Size | None:
    found = node.meta.get("tensor_meta")
    return getattr(found, "shape", None)


def packet(node: fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", None)


def fuse_joins(small: fx.GraphModule) -> None:
    """ResidualJoin, and the sum of two equally shaped tensors, with the ReLU behind it, become a FusedJoin."""
    modules = dict(small.named_modules())
    for node in list(small.graph.nodes):
        found = join_of(node, modules)
        if found is None:
            continue
        residual, branch, index, bias = found
        behind = activation_behind(node)
        relu = behind[0] if behind is not None and behind[1] == "relu" else None
        last = node if relu is None else relu
        name = free_name(small, f"{node.name}_fused")
        small.add_submodule(name, FusedJoin(index, relu is not None, bias=bias))
        with small.graph.inserting_before(last):
            new = small.graph.call_module(name, (residual, branch))
        new.meta.update(last.meta)
        last.replace_all_uses_with(new)
        for old in dict.fromkeys([last, node]):
            small.graph.erase_node(old)


def join_of(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[fx.Node, fx.Node, Tensor, Tensor | None] | None:
    """(residual, branch, index, bias) where the node is a join along dimension 1."""
    if node.op == "call_module" and isinstance(modules[node.target], ResidualJoin):
        join = modules[node.target]
        increasing = bool((join.index[1:] > join.index[:-1]).all())
        bias = None if join.bias is None else join.bias.detach()
        return (*node.args, join.index, bias) if join.dim == 1 and increasing else None
    if node.target is not aten.add.Tensor or node.kwargs or not all(isinstance(a, fx.Node) for a in node.args):
        return None
    a, b = node.args
    if a is b or shape(a) is None or shape(a) != shape(b) or len(shape(a)) < 3:
        return None
    device = next((p.device for p in modules[""].parameters()), torch.device("cpu"))
    return a, b, torch.arange(shape(a)[1], device=device), None


def activation_behind(node: fx.Node) -> tuple[fx.Node, str] | None:
    """The activation that is the only reader of the node, and its name."""
    if len(node.users) != 1:
        return None
    user = next(iter(node.users))
    if packet(user) is aten.hardtanh and user.args[1:] == (0.0, 6.0):
        return user, "relu6"
    name = FUSED_ACTIVATIONS.get(packet(user))
    return None if name is None else (user, name)


def fuse_norms(small: fx.GraphModule) -> None:
    """BatchNorms that no conv has taken in become ServingNorm2d, with the concatenation before them and the activation
    behind them where those have no other reader or source."""
    modules = dict(small.named_modules())
    calls = Counter(node.target for node in small.graph.nodes if node.op == "call_module")
    for node in list(small.graph.nodes):
        norm = modules[node.target] if node.op == "call_module" else None
        if type(norm) is not nn.BatchNorm2d or norm.running_mean is None or calls[node.target] > 1:
            continue
        source, found = node.args[0], activation_behind(node)
        inputs = source.args[0] if concatenates_channels(source) and len(source.users) == 1 else [source]
        last, activation = (node, "none") if found is None else found
        scale, shift = (vector.to(norm.running_mean.dtype) for vector in scale_and_shift(norm))
        replace_module(small, node.target, ServingNorm2d(scale, shift, activation).train(norm.training))
        with small.graph.inserting_before(node):
            new = small.graph.call_module(node.target, tuple(inputs))
        new.meta.update(last.meta)
        last.replace_all_uses_with(new)
        for old in dict.fromkeys([last, node]):
            small.graph.erase_node(old)
        if not source.users:
            small.graph.erase_node(source)


def concatenates_channels(node: fx.Node) -> bool:
    """Whether the node is a concatenation of images along their channels."""
    if node.target is not aten.cat.default or node.kwargs or node.args[1:] not in ((1,), (-3,)):
        return False
    return all(len(shape(part) or ()) == 4 for part in node.args[0])


def pack_convs(small: fx.GraphModule) -> None:
    """2d convs become ServingConv2d, with the activation that alone reads them."""
    modules = dict(small.named_modules())
    calls: dict[str, list[fx.Node]] = {}
    for node in small.graph.nodes:
        if node.op == "call_module" and type(modules[node.target]) is nn.Conv2d:
            calls.setdefault(node.target, []).append(node)
    for target, nodes in calls.items():
        found = activation_behind(nodes[0]) if len(nodes) == 1 else None
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


def pack_linears(small: fx.GraphModule) -> None:
    """Linear layers of vectors become ServingLinear."""
    for node in small.graph.nodes:
        layer = small.get_submodule(node.target) if node.op == "call_module" else None
        if type(layer) is nn.Linear and len(shape(node.args[0]) or ()) == 2:
            with torch.device("meta"):
                new = ServingLinear(layer.in_features, layer.out_features, layer.bias is not None)
            new.weight, new.bias = layer.weight, layer.bias
            replace_module(small, node.target, new.train(layer.training))


def fuse_squeeze_excites(small: fx.GraphModule) -> None:
    """A product with gates that come from the means of what they multiply becomes a ServingSqueezeExcite."""
    modules = dict(small.named_modules())
    calls = Counter(node.target for node in small.graph.nodes if node.op == "call_module")

    def small_conv(node: fx.Node) -> ServingConv2d | None:
        conv = modules.get(node.target) if node.op == "call_module" and len(node.users) == 1 else None
        return conv if type(conv) is ServingConv2d and calls[node.target] == 1 and conv.is_pointwise() else None

    for node in list(small.graph.nodes):
        if node.target is not aten.mul.Tensor or node.kwargs or shape(node) is None or len(shape(node)) != 4:
            continue
        for x, factor in (node.args, node.args[::-1]):
            if not isinstance(factor, fx.Node):
                continue
            spread = modules.get(factor.target) if factor.op == "call_module" and len(factor.users) == 1 else None
            spread = spread if type(spread) is ExpandChannels and spread.dim == 1 else None
            gates = factor if spread is None else factor.args[0]
            if packet(gates) not in GATES or len(gates.users) > 1:
                continue
            expand = small_conv(gates.args[0])
            reduce = None if expand is None else small_conv(gates.args[0].args[0])
            pool = None if reduce is None else gates.args[0].args[0].args[0]
            if pool is None or expand.activation != "none" or not is_mean_of(pool, x) or len(pool.users) > 1:
                continue
            if tuple(shape(factor)[1:]) != (shape(x)[1], 1, 1):  # padded, or one gate for all channels
                continue
            hard = GATES[packet(gates)]
            biases = [torch.zeros_like(c.weight[:, 0, 0, 0]) if c.bias is None else c.bias for c in (reduce, expand)]
            weight, bias = spread_gates(expand.weight[:, :, 0, 0], biases[1], spread, hard)
            if not bias.isfinite().all():
                continue
            name = free_name(small, f"{node.name}_fused")
            small.add_submodule(name, ServingSqueezeExcite(
                reduce.weight[:, :, 0, 0].contiguous(), biases[0], weight.T.contiguous(), bias, reduce.activation, hard,
            ).train(reduce.training))  # fmt: skip
            with small.graph.inserting_before(node):
                new = small.graph.call_module(name, (x,))
            new.meta.update(node.meta)
            node.replace_all_uses_with(new)
            for old in dict.fromkeys([node, factor, gates, gates.args[0], gates.args[0].args[0], pool]):
                small.graph.erase_node(old)
            break


def spread_gates(weight: Tensor, bias: Tensor, spread: ExpandChannels | None, hard: bool) -> tuple[Tensor, Tensor]:
    """Weight [C, R] and bias of the layer whose gates are those of this one, spread among constants."""
    if spread is None:
        return weight, bias
    fill = weight.new_zeros(spread.width) if spread.fill is None else spread.fill
    constant = 6 * fill.double() - 3 if hard else fill.double().logit()
    whole = weight.new_zeros(spread.width, weight.shape[1])
    whole.index_copy_(0, spread.index, weight[spread.source])
    return whole, constant.to(bias.dtype).index_copy(0, spread.index, bias[spread.source])


def is_mean_of(node: fx.Node, x: fx.Node) -> bool:
    """Whether the node is the mean of each channel of the images ``x``, as an image of one pixel."""
    if len(node.args) < 2 or node.kwargs or node.args[0] is not x or len(shape(x) or ()) != 4:
        return False
    if packet(node) is aten.adaptive_avg_pool2d:
        return tuple(shape(node)[2:]) == (1, 1) == tuple(node.args[1])
    return packet(node) is aten.mean and {dim % 4 for dim in node.args[1] or ()} == {2, 3} and node.args[2:3] == (True,)


def replace_global_pools(small: fx.GraphModule) -> None:
    """Means of the channels become ServingGlobalAvgPool2d."""
    for node in list(small.graph.nodes):
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or not is_mean_of(node, source):
            continue
        name = free_name(small, f"{node.name}_pool")
        small.add_submodule(name, ServingGlobalAvgPool2d())
        with small.graph.inserting_before(node):
            new = small.graph.call_module(name, (source,))
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        small.graph.erase_node(node)


def join_in_convs(small: fx.GraphModule) -> None:
    """A FusedJoin and the conv whose result it alone reads become a ServingJoin2d."""
    modules = dict(small.named_modules())
    calls = Counter(node.target for node in small.graph.nodes if node.op == "call_module")
    for node in list(small.graph.nodes):
        join = modules[node.target] if node.op == "call_module" else None
        if not isinstance(join, FusedJoin) or join.bias is not None:
            continue
        orders = [node.args]
        if len(join.index) == shape(node)[1]:
            orders.append(node.args[::-1])  # a sum of two whole tensors
        for residual, branch in orders:
            if can_join(branch, modules) and calls[branch.target] == 1:
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


def fuse_depthwise_convs(small: fx.GraphModule) -> None:
    """A depthwise conv and the 1x1 conv that it alone reads become a ServingPointwiseDepthwise2d."""
    modules = dict(small.named_modules())
    calls = Counter(node.target for node in small.graph.nodes if node.op == "call_module")

    def conv_of(node: Any) -> ServingConv2d | None:
        found = modules.get(node.target) if isinstance(node, fx.Node) and node.op == "call_module" else None
        plain = type(found) is ServingConv2d and not isinstance(found.padding, str) and calls[node.target] == 1
        return found if plain else None

    for node in list(small.graph.nodes):
        depthwise, source = conv_of(node), node.args[0] if node.args else None
        pointwise = conv_of(source) if depthwise is not None and depthwise.is_depthwise() else None
        if pointwise is None or not pointwise.is_pointwise() or len(source.users) > 1:
            continue
        name = free_name(small, f"{node.name}_fused")
        small.add_submodule(name, ServingPointwiseDepthwise2d(pointwise, depthwise).train(depthwise.training))
        with small.graph.inserting_before(node):
            new = small.graph.call_module(name, source.args)
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        for old in (node, source):
            small.graph.erase_node(old)
            small.delete_submodule(old.target)


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
    for node in small.graph.nodes:
        module = modules.get(node.target) if node.op == "call_module" else None
        whole = isinstance(module, FusedJoin) and len(module.index) == shape(node)[1]
        if whole and not is_free_after(node, node.args[0], small.graph, modules):
            node.args = node.args[::-1]  # a sum of two whole tensors: either may be overwritten
        if isinstance(module, FusedJoin | ServingJoin2d | ServingSqueezeExcite):
            module.inplace = is_free_after(node, node.args[0], small.graph, modules)
        elif packet(node) in IN_PLACE and is_free_after(node, node.args[0], small.graph, modules):
            node.target = IN_PLACE[packet(node)].default


def is_free_after(node: fx.Node, value: fx.Node, graph: fx.Graph, modules: dict[str, nn.Module]) -> bool:
    """Whether the memory of ``value`` belongs to the graph, no other input of ``node`` shares it, and nothing reads it
    afterwards."""
    order = {other: i for i, other in enumerate(graph.nodes)}
    family = alias_families(graph, modules)[value]
    if any(other in family for other in node.args if other is not value) or node.args.count(value) > 1:
        return False
    for alias in family:
        if order[alias] >= order[node]:
            continue  # what comes later is the node's own result, or was read by way of an earlier alias
        if alias.op in ("placeholder", "get_attr") or any(order[user] > order[node] for user in alias.users):
            return False
    return True


def alias_families(graph: fx.Graph, modules: dict[str, nn.Module]) -> dict[fx.Node, set[fx.Node]]:
    """For each node the nodes that may share its memory."""
    family: dict[fx.Node, set[fx.Node]] = {}
    for node in graph.nodes:
        family[node] = {node}
        if node.op == "call_module":
            kept = (
                FusedJoin,
                ServingJoin2d,
                ServingSqueezeExcite,
                nn.modules.dropout._DropoutNd,
            )  # may return their first input
            sources = list(node.args[:1]) if isinstance(modules[node.target], kept) else []
        else:
            sources = aliased_arguments(node) if node.op == "call_function" else []
        for source in sources:
            family[source] |= family[node]
            for member in family[source]:
                family[member] = family[source]
    return family
