"""Layers get filters of zeros, and whatever reads them columns of zeros: the network computes what it did.

A join by index becomes a plain addition by it, and odd numbers of channels multiples of what engines compute at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from mfp.modules import ConvWithBorder, ExpandChannels, ResidualJoin, SelectChannels
from mfp.serving.fold import BATCH_NORMS

aten = torch.ops.aten
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)
READ_NO_CHANNELS = {aten.new_ones, aten.new_zeros, aten.sym_size}  # sizes of images alone

# Operators that leave each channel where it is and give a constant channel back as it came.
_KEEPING = """max_pool1d max_pool2d max_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d mean
    clone contiguous permute upsample_nearest2d upsample_bilinear2d dropout"""
CONSTANT_KEEPING = {getattr(aten, name) for name in _KEEPING.split()}


@dataclass
class Wanted:
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

    def zeros(self, any: bool = False) -> Wanted:
        return Wanted(self.place, self.width, torch.zeros_like(self.fill), any)

    def gives(self, other: Wanted) -> bool:
        """Whether a tensor as wanted here is as wanted there."""
        alike = self.width == other.width and torch.equal(self.place, other.place)
        return alike and (other.any or (not self.any and torch.equal(self.fill, other.fill)))

    def rows(self, old: Tensor, new: Tensor | float = 0.0, dim: int = 0) -> Tensor:
        """``old`` with its entries along a dimension in their new places, ``new`` in the others."""
        shape = list(old.shape)
        shape[dim] = self.width
        start = old.new_zeros(shape)
        start += torch.as_tensor(new, dtype=old.dtype, device=old.device)
        return start.index_copy(dim, self.place.to(old.device), old)


Steps = list[Callable[[], None]]


class Grower:
    """Makes tensors of a network wider, with all that writes and reads them, or leaves everything as it is.

    Attributes:
        grown: layers that got filters, with the numbers before and after.
    """

    def __init__(self, network: fx.GraphModule, arguments: dict[str, Any]) -> None:
        self.network, self.modules = network, dict(network.named_modules())
        ShapeProp(network).propagate(*(arguments[n.target] for n in network.graph.nodes if n.op == "placeholder"))
        self.calls = Counter(node.target for node in network.graph.nodes if node.op == "call_module")
        self.widths: dict[fx.Node, int] = {}  # of what has grown
        self.grown: dict[str, tuple[int, int]] = {}
        self.under_way: dict[fx.Node, Wanted] = {}

    def width(self, node: fx.Node, dim: int) -> int:
        return self.widths.get(node) or node.meta["tensor_meta"].shape[dim]

    def layer(self, node: fx.Node) -> nn.Module | None:
        """The conv, without groups, or linear layer that is called here and nowhere else."""
        if node.op != "call_module" or self.calls[node.target] > 1:
            return None
        module = self.modules[node.target]
        layer = module.conv if isinstance(module, ConvWithBorder) else module
        return layer if isinstance(layer, LAYERS) and getattr(layer, "groups", 1) == 1 else None

    def grow(self, node: fx.Node, wanted: Wanted, reader: fx.Node | None = None) -> bool:
        """Makes a node's channels wider, for one reader that wants it; nothing is changed where that cannot be done."""
        self.under_way = {}
        steps = self.source(node, wanted, reader)
        for step in steps or ():
            step()
        return steps is not None

    def fill_up(self, multiple: int) -> None:
        """Fills the results of layers up to a multiple of channels, where all that reads them can take it."""
        for node in self.network.graph.nodes:
            layer = self.layer(node)
            if layer is not None:
                count = filters_of(layer)
                width = -(-count // multiple) * multiple
                if width != count:
                    self.grow(node, Wanted(torch.arange(count), width, torch.zeros(width, dtype=torch.float64)))

    # ---- what must change for it: steps, or None

    def source(self, node: fx.Node, wanted: Wanted, reader: fx.Node | None) -> Steps | None:
        """The steps for a node and all in front of it, and for its other readers."""
        if node in self.under_way:
            return [] if self.under_way[node].gives(wanted) else None
        self.under_way[node] = wanted
        parts = [self.call(node, wanted) if node.op == "call_module" else self.operator(node, wanted)]
        parts += [self.behind(user, node, wanted) for user in node.users if user is not reader]
        return self.together(node, wanted, parts)

    def together(self, node: fx.Node, wanted: Wanted, parts: list[Steps | None]) -> Steps | None:
        steps: Steps = [lambda: self.widths.__setitem__(node, wanted.width)]
        for part in parts:
            if part is None:
                return None
            steps += part
        return steps

    def call(self, node: fx.Node, wanted: Wanted) -> Steps | None:
        module, layer = self.modules[node.target], self.layer(node)
        if layer is not None:
            fits = filters_of(layer) == len(wanted.place)
            return [lambda: self.grow_layer(node.target, module, wanted)] if fits else None
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
        return None

    def operator(self, node: fx.Node, wanted: Wanted) -> Steps | None:
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
        if is_pointwise(node):
            fill = wanted.fill if wanted.any else preimage(node, wanted.fill, wanted.new)
            wider = Wanted(wanted.place, wanted.width, fill, wanted.any)
            return None if fill is None else self.source(tensors[0], wider, node)
        return None

    def parameter(self, source: fx.Node, wanted: Wanted, new: float) -> Callable[[], None] | None:
        """The step for a parameter of one entry a channel: what is new gets what changes nothing."""
        node = parameter_of(source)
        written = source.args[1] if source.op != "get_attr" and isinstance(source.args[1], list) else []
        if node is None or len(source.users) != 1 or len(wanted.place) in written:  # its width is a number in the graph
            return None
        path, _, name = node.target.rpartition(".")
        owner = self.network.get_submodule(path)
        value = getattr(owner, name)
        wide = [dim for dim, size in enumerate(value.shape) if size == len(wanted.place)]
        if len(wide) != 1 or value.numel() != len(wanted.place) or len(node.users) != 1:
            return None
        return lambda: setattr(owner, name, nn.Parameter(wanted.rows(value.detach(), new, wide[0])))

    def behind(self, user: fx.Node, node: fx.Node, wanted: Wanted) -> Steps | None:
        """The steps for another reader of a node that grows: it must do as before."""
        own: Steps | None = None  # for a reader that hands the new channels on, whatever they hold
        layer = self.layer(user)
        if layer is not None:
            return [lambda: grow_inputs(layer, wanted)]
        if user in self.under_way or getattr(user.target, "overloadpacket", None) in READ_NO_CHANNELS:
            return []
        if user.op == "call_function":
            own = self.handed_on(user, node, wanted)
        elif user.op == "call_module" and self.calls[user.target] == 1:
            module = self.modules[user.target]
            if isinstance(module, SelectChannels):
                return [lambda: setattr(module, "index", wanted.place.to(module.index.device)[module.index])]
            if isinstance(module, ExpandChannels):
                return [lambda: grow_source(module, wanted)]
            if isinstance(module, nn.modules.dropout._DropoutNd):
                own = []
            if is_depthwise(module):
                own = [lambda: grow_depthwise(module, wanted)]
        if own is None:
            return None
        self.under_way[user] = wanted.zeros(any=True)
        return self.together(user, wanted, [own, *(self.behind(reader, user, wanted) for reader in user.users)])

    def handed_on(self, user: fx.Node, node: fx.Node, wanted: Wanted) -> Steps | None:
        """The steps for an operator itself, if each of its channels comes from the same channel of the node."""
        packet = getattr(user.target, "overloadpacket", None)
        shape, result = (n.meta["tensor_meta"].shape for n in (node, user))
        if packet is aten.flatten and shape[1] == result[-1] and len(result) == 2:
            return []
        if packet is aten.mean and Counter(shape)[len(wanted.place)] != Counter(result)[len(wanted.place)]:
            return None  # over channels
        if user.all_input_nodes == [node]:
            return [] if packet in CONSTANT_KEEPING or is_pointwise(user) else None
        if packet not in (aten.add, aten.mul) or user.kwargs or len(user.all_input_nodes) != 2:
            return None
        other = next(n for n in user.all_input_nodes if n is not node)
        if parameter_of(other) is not None:
            step = self.parameter(other, wanted, 0.0)
            return None if step is None else [step]
        there = getattr(other.meta.get("tensor_meta"), "shape", ())
        if len(there) != len(shape) or self.width(other, 1) != self.width(node, 1):
            return None  # one value for all channels
        return self.source(other, wanted.zeros(any=True), user)

    def grow_layer(self, name: str, module: nn.Module, wanted: Wanted) -> None:
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
        self.grown[name] = (self.grown.get(name, (before, 0))[0], wanted.width)


def parameter_of(node: fx.Node) -> fx.Node | None:
    """The get_attr node that a node reads, maybe in another shape."""
    while getattr(node.target, "overloadpacket", None) in (aten.view, aten.reshape, aten.unsqueeze):
        node = node.args[0]
    return node if node.op == "get_attr" else None


def is_pointwise(node: fx.Node) -> bool:
    return torch.Tag.pointwise in node.target.tags or node.target.overloadpacket is aten.hardswish


def is_depthwise(module: nn.Module) -> bool:
    groups = getattr(module, "groups", 0)
    return isinstance(module, LAYERS[:3]) and groups == module.in_channels == module.out_channels


def filters_of(layer: nn.Module) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def grow_join(module: ResidualJoin, wanted: Wanted) -> None:
    module.index = wanted.place.to(module.index.device)[module.index]
    if module.bias is not None:
        module.bias = nn.Parameter(wanted.rows(module.bias.detach()))


def grow_norm(module: nn.Module, wanted: Wanted) -> None:
    """What is new is zero before the norm and ``fill`` behind it."""
    module.weight = nn.Parameter(wanted.rows(module.weight.detach(), 1.0))
    module.bias = nn.Parameter(wanted.rows(module.bias.detach(), wanted.fill))
    module.running_mean = wanted.rows(module.running_mean)
    module.running_var = wanted.rows(module.running_var, 1.0)
    module.num_features = wanted.width


def grow_source(module: ExpandChannels, wanted: Wanted) -> None:
    module.source, module.in_order = wanted.place.to(module.source.device)[module.source], False


def grow_inputs(layer: nn.Module, wanted: Wanted) -> None:
    """Columns of zeros for what is new."""
    layer.weight = nn.Parameter(wanted.rows(layer.weight.detach(), dim=0 if getattr(layer, "transposed", False) else 1))
    setattr(layer, "in_features" if isinstance(layer, nn.Linear) else "in_channels", wanted.width)


def grow_depthwise(layer: nn.Module, wanted: Wanted) -> None:
    layer.weight = nn.Parameter(wanted.rows(layer.weight.detach()))
    if layer.bias is not None:
        layer.bias = nn.Parameter(wanted.rows(layer.bias.detach()))
    layer.in_channels = layer.out_channels = layer.groups = wanted.width


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
