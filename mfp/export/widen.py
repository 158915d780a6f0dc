"""Joins by index become plain additions: the layers in front of a join get filters of zeros for the channels they lack.

Other engines than mfp's own have no cheap join by index; a plain addition they fuse into the convolution.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from mfp.modules import AddConstants, ConvWithBorder, ExpandChannels, ResidualJoin, SelectChannels
from mfp.serving.fold import BATCH_NORMS

aten = torch.ops.aten
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)
READ_NO_CHANNELS = {aten.new_ones, aten.new_zeros, aten.sym_size}  # sizes of images alone

# Operators that leave each channel where it is and give a constant channel back as it came.
_KEEPING = """max_pool1d max_pool2d max_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d mean
    clone contiguous permute upsample_nearest2d upsample_bilinear2d dropout"""
CONSTANT_KEEPING = {getattr(aten, name) for name in _KEEPING.split()}


@dataclass
class Widened:
    """What became of the joins: layers that grew, and joins that are spread out when the network runs."""

    grown: dict[str, tuple[int, int]] = field(default_factory=dict)  # filters before and after
    left: list[str] = field(default_factory=list)


@torch.no_grad()
def widen(network: fx.GraphModule, arguments: dict[str, Any]) -> Widened:
    """Replaces the joins and expansions of a compact network in place: the layers before them grow where they can,
    elsewhere channels of zeros are put between the others when it runs (padding and a gather, that all engines have).

    Args:
        arguments: forward's arguments by name, for the shapes.
    """
    grower = _Grower(network, arguments)
    for node in list(network.graph.nodes):
        if node.op != "call_module":
            continue
        module = grower.modules[node.target]
        if isinstance(module, ResidualJoin) and not grower.join(node, module):
            grower.spread_join(node, module)
        elif isinstance(module, ExpandChannels) and not grower.expansion(node, module):
            grower.spread_expansion(node, module)
    network.graph.lint()
    network.delete_all_unused_submodules()
    network.recompile()
    return grower.result


@dataclass
class _Wanted:
    """Channel i of a tensor shall become channel ``place[i]`` of ``width``; the others hold ``fill``, or anything."""

    place: Tensor
    width: int
    fill: Tensor
    any: bool = False

    @property
    def new(self) -> Tensor:
        """bool [width]: the channels that were not there."""
        mask = torch.ones(self.width, dtype=torch.bool)
        mask[self.place] = False
        return mask

    def zeros(self, any: bool = False) -> _Wanted:
        return _Wanted(self.place, self.width, torch.zeros_like(self.fill), any)

    def rows(self, old: Tensor, new: Tensor | float = 0.0, dim: int = 0) -> Tensor:
        """``old`` with its entries along a dimension in their new places, ``new`` in the others."""
        shape = list(old.shape)
        shape[dim] = self.width
        start = old.new_zeros(shape)
        start += torch.as_tensor(new, dtype=old.dtype, device=old.device)
        return start.index_copy(dim, self.place.to(old.device), old)


class _Grower:
    def __init__(self, network: fx.GraphModule, arguments: dict[str, Any]) -> None:
        self.network, self.modules = network, dict(network.named_modules())
        ShapeProp(network).propagate(*(arguments[n.target] for n in network.graph.nodes if n.op == "placeholder"))
        self.calls = Counter(node.target for node in network.graph.nodes if node.op == "call_module")
        self.widths: dict[fx.Node, int] = {}  # of what has grown
        self.result = Widened()

    def join(self, node: fx.Node, module: ResidualJoin) -> bool:
        residual, branch = node.args
        width = self.width(residual, module.dim)
        fill = torch.zeros(width, dtype=torch.float64) if module.bias is None else module.bias.detach().double().cpu()
        if not self.grow(branch, _Wanted(module.index.cpu(), width, fill), node):
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
        if not self.grow(source, _Wanted(place, module.width, fill.double()), node):
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
        self.result.left.append(node.name)

    def width(self, node: fx.Node, dim: int) -> int:
        return self.widths.get(node) or node.meta["tensor_meta"].shape[dim]

    def grow(self, node: fx.Node, wanted: _Wanted, reader: fx.Node) -> bool:
        """Makes a node's channels wider for one reader; nothing is changed where that cannot be done."""
        steps = self.source(node, wanted, reader)
        for step in steps or ():
            step()
        return steps is not None

    # ---- what must change for it: steps, or None

    def source(self, node: fx.Node, wanted: _Wanted, reader: fx.Node) -> list[Callable[[], None]] | None:
        """The steps for a node and all in front of it, and for its other readers."""
        steps: list[Callable[[], None]] = [lambda: self.widths.__setitem__(node, wanted.width)]
        parts = [self.behind(user, node, wanted) for user in node.users if user is not reader]
        parts.append(self.call(node, wanted) if node.op == "call_module" else self.operator(node, wanted))
        if any(part is None for part in parts):
            return None
        return sum(parts, steps)

    def call(self, node: fx.Node, wanted: _Wanted) -> list[Callable[[], None]] | None:
        module = self.modules[node.target]
        if self.calls[node.target] > 1:
            return None
        if isinstance(module, ResidualJoin):
            before = self.source(node.args[0], wanted, node)
            return None if before is None else [*before, lambda: grow_join(module, wanted)]
        if isinstance(module, nn.modules.dropout._DropoutNd):
            return self.source(node.args[0], wanted, node)
        if isinstance(module, BATCH_NORMS):
            if module.weight is None or module.running_mean is None:
                return None
            before = self.source(node.args[0], wanted.zeros(), node)
            return None if before is None else [*before, lambda: grow_norm(module, wanted)]
        layer = module.conv if isinstance(module, ConvWithBorder) else module
        if not isinstance(layer, LAYERS) or getattr(layer, "groups", 1) != 1:
            return None
        return [lambda: self.grow_layer(node.target, module, wanted)]

    def operator(self, node: fx.Node, wanted: _Wanted) -> list[Callable[[], None]] | None:
        packet = getattr(node.target, "overloadpacket", None)
        parameters = [source for source in node.all_input_nodes if parameter_of(source) is not None]
        tensors = [source for source in node.all_input_nodes if source not in parameters]
        if node.op != "call_function" or not tensors:
            return None
        if packet in (aten.add, aten.mul) and len(tensors) == len(parameters) == 1 and not node.kwargs:
            before = self.source(tensors[0], wanted, node)  # layer scale, constants of a join
            grown = self.parameter(parameters[0], wanted, 1.0 if packet is aten.mul else 0.0)
            return None if before is None or grown is None else [*before, grown]
        if parameters:
            return None
        if packet in (aten.add, aten.mul) and len(tensors) == 2 and not node.kwargs:
            if packet is aten.mul and not wanted.any and wanted.fill.any():
                return None
            first = self.source(tensors[0], wanted, node)
            second = self.source(tensors[1], wanted.zeros(any=packet is aten.mul), node)
            return None if first is None or second is None else first + second
        if len(tensors) != 1:
            return None
        if packet in CONSTANT_KEEPING:
            return self.source(tensors[0], wanted, node)
        if torch.Tag.pointwise in node.target.tags or packet is aten.hardswish:
            fill = wanted.fill if wanted.any else preimage(node, wanted.fill, wanted.new)
            before = _Wanted(wanted.place, wanted.width, fill, wanted.any)
            return None if fill is None else self.source(tensors[0], before, node)
        return None

    def parameter(self, source: fx.Node, wanted: _Wanted, new: float) -> Callable[[], None] | None:
        """The step for a parameter of one entry a channel: what is new gets what changes nothing."""
        node = parameter_of(source)
        written = source.args[1] if source.op != "get_attr" and isinstance(source.args[1], list) else []
        if len(source.users) != 1 or len(wanted.place) in written:  # its width is a number in the graph
            return None
        path, _, name = node.target.rpartition(".")
        owner = self.network.get_submodule(path)
        value = getattr(owner, name)
        wide = [dim for dim, size in enumerate(value.shape) if size == len(wanted.place)]
        if len(wide) != 1 or value.numel() != len(wanted.place) or len(node.users) != 1:
            return None
        return lambda: setattr(owner, name, nn.Parameter(wanted.rows(value.detach(), new, wide[0])))

    def behind(self, user: fx.Node, node: fx.Node, wanted: _Wanted) -> list[Callable[[], None]] | None:
        """The steps for another reader of a node that grows: it must do as before."""
        if user.op == "call_function":
            packet = getattr(user.target, "overloadpacket", None)
            if packet in READ_NO_CHANNELS:
                return []
            through = packet in CONSTANT_KEEPING or torch.Tag.pointwise in getattr(user.target, "tags", ())
            if user.all_input_nodes != [node] or not through:
                return None
            parts = [self.behind(reader, user, wanted) for reader in user.users]
            own = [lambda: self.widths.__setitem__(user, wanted.width)]
            return None if any(part is None for part in parts) else sum(parts, own)
        if user.op != "call_module" or self.calls[user.target] > 1:
            return None
        module = self.modules[user.target]
        if isinstance(module, SelectChannels):
            return [lambda: setattr(module, "index", wanted.place.to(module.index.device)[module.index])]
        if isinstance(module, ExpandChannels):
            return [lambda: grow_source(module, wanted)]
        layer = module.conv if isinstance(module, ConvWithBorder) else module
        if not isinstance(layer, LAYERS) or getattr(layer, "groups", 1) != 1:
            return None
        return [lambda: grow_inputs(layer, wanted)]

    def grow_layer(self, name: str, module: nn.Module, wanted: _Wanted) -> None:
        layer = module.conv if isinstance(module, ConvWithBorder) else module
        transposed = getattr(layer, "transposed", False)
        before = layer.weight.shape[int(transposed)]
        layer.weight = nn.Parameter(wanted.rows(layer.weight.detach(), dim=int(transposed)))
        if layer.bias is not None or wanted.fill.any():
            bias = layer.weight.new_zeros(before) if layer.bias is None else layer.bias.detach()
            layer.bias = nn.Parameter(wanted.rows(bias, wanted.fill))
        if layer is not module:
            module.border = nn.Parameter(wanted.rows(module.border.detach(), dim=int(transposed)))
        setattr(layer, "out_features" if isinstance(layer, nn.Linear) else "out_channels", wanted.width)
        self.result.grown[name] = (self.result.grown.get(name, (before, 0))[0], wanted.width)


def parameter_of(node: fx.Node) -> fx.Node | None:
    """The get_attr node that a node reads, maybe in another shape."""
    while getattr(node.target, "overloadpacket", None) in (aten.view, aten.reshape, aten.unsqueeze):
        node = node.args[0]
    return node if node.op == "get_attr" else None


def grow_join(module: ResidualJoin, wanted: _Wanted) -> None:
    module.index = wanted.place.to(module.index.device)[module.index]
    if module.bias is not None:
        module.bias = nn.Parameter(wanted.rows(module.bias.detach()))


def grow_norm(module: nn.Module, wanted: _Wanted) -> None:
    """What is new is zero before the norm and ``fill`` behind it."""
    module.weight = nn.Parameter(wanted.rows(module.weight.detach(), 1.0))
    module.bias = nn.Parameter(wanted.rows(module.bias.detach(), wanted.fill))
    module.running_mean = wanted.rows(module.running_mean)
    module.running_var = wanted.rows(module.running_var, 1.0)
    module.num_features = wanted.width


def grow_source(module: ExpandChannels, wanted: _Wanted) -> None:
    module.source, module.in_order = wanted.place.to(module.source.device)[module.source], False


def grow_inputs(layer: nn.Module, wanted: _Wanted) -> None:
    """Columns of zeros for what is new."""
    layer.weight = nn.Parameter(wanted.rows(layer.weight.detach(), dim=0 if getattr(layer, "transposed", False) else 1))
    setattr(layer, "in_features" if isinstance(layer, nn.Linear) else "in_channels", wanted.width)


def preimage(node: fx.Node, values: Tensor, where: Tensor) -> Tensor | None:
    """What an elementwise operator of one tensor must be given for these values [n] (where [n] says so); None: nothing
    gives them, or the operator has sizes among its arguments."""

    def apply(x: Tensor) -> Tensor:
        return node.target(*fx.map_arg(node.args, lambda _: x), **node.kwargs)

    goal, result = values[where], torch.zeros_like(values)
    try:
        if torch.equal(apply(goal), goal):  # ReLU, and zero nearly always
            result[where] = goal
            return result
        grid = torch.linspace(-30, 30, 6001, dtype=goal.dtype)
        low = grid[apply(grid).argmin()].expand(goal.shape)
        high = (2 * goal.abs()).clamp(min=30)
        for _ in range(80):  # between the lowest point and one high enough the function takes all values
            middle = (low + high) / 2
            below = apply(middle) <= goal
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        result[where] = low
        return result if torch.allclose(apply(low), goal, rtol=1e-9, atol=1e-12) else None
    except (RuntimeError, TypeError):
        return None
