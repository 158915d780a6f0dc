"""What a plan asks a model's graph: what follows a conv's filters, what comes out of the network, what meets."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from mfp.build import build_of
from mfp.capture import Captured, capture, example_arguments
from mfp.errors import CaptureError

aten = torch.ops.aten
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONTRACTIONS = {aten.conv1d, aten.conv2d, aten.conv3d, aten.linear}

# Operators that leave every channel where it is and a channel of zeros zero; elementwise ones are tried out on a zero.
_POOLS = """max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d clone contiguous dropout feature_dropout upsample_nearest2d upsample_bilinear2d"""
ZERO_KEEPING = {getattr(aten, name) for name in _POOLS.split()}


@dataclass(frozen=True)
class Structure:
    """What the graph says about a model's convs and linear layers, all by module name.

    Attributes:
        followers: for each conv the modules whose rows are masked with its filters (BatchNorms and depthwise convs that
            read it alone, channel by channel).
        outputs: convs whose channels come out of the network with no other layer between: its classifiers.
        pointwise: linear layers that are 1x1 convs in another notation: they read images with the channels last.
        groups: convs and pointwise linears whose outputs meet in an addition or a product have one number; so have a
            conv with groups and the layer in front of it.
        fixed: groups that also meet a tensor whose channels come from no conv alone (the input, a concatenation, a
            padded shortcut), so that they cannot lose channels together.
        units: for groups with a conv with groups in them, or in front of one: how many filters in a row go together,
            which is one of its groups.
        bound: layers that end in an addition, and gates of other layers' channels: a plain network cannot lose their
            filters, whatever the values.
    """

    followers: dict[str, list[str]]
    outputs: set[str]
    pointwise: set[str]
    groups: dict[str, int]
    fixed: set[int]
    units: dict[int, int]
    bound: set[str]


MOST_BUILT = 64
_BUILT: dict[Any, Structure] = {}
_KNOWN: weakref.WeakKeyDictionary[nn.Module, tuple[tuple, Structure]] = weakref.WeakKeyDictionary()


def structure_of(model: nn.Module, example_input: Any = None) -> Structure:
    """The structure of a model; without an example, images of the size that its first conv suggests are tried.

    Raises:
        CaptureError: the model cannot be captured, or runs on none of the images that were tried.
    """
    state = tuple((name, type(module), getattr(module, "groups", 0)) for name, module in model.named_modules())
    if model in _KNOWN and _KNOWN[model][0] == state:
        return _KNOWN[model][1]
    build = build_of(model, example_input)
    if build in _BUILT:
        _KNOWN[model] = state, _BUILT[build]
        return _BUILT[build]
    error: CaptureError | None = None
    for example in [example_input] if example_input is not None else guesses(model):
        try:
            found = _read(capture(model, example_arguments(model, example), free_sizes=False), model)
        except CaptureError as failure:
            error = error or failure
            continue
        _KNOWN[model] = state, found
        if build is not None:
            _BUILT[build] = found
            if len(_BUILT) > MOST_BUILT:
                del _BUILT[next(iter(_BUILT))]
        return found
    raise error or CaptureError(f"{type(model).__name__} has no conv layer whose input it could be tried with")


def takes_images(model: nn.Module) -> bool:
    """Whether the structure can be had without an example; so for a model without convs, which has none."""
    try:
        structure_of(model)
    except CaptureError:
        return not any(isinstance(module, CONVS) for module in model.modules())
    return True


def guesses(model: nn.Module) -> Iterator[Tensor]:
    """Images that the model may take: the channels of its first conv, some usual sizes."""
    first = next((module for module in model.modules() if isinstance(module, CONVS)), None)
    if first is None:
        return
    weight = first.weight
    for size in (64, 224, 32):
        yield torch.zeros(2, first.in_channels, *[size] * (weight.dim() - 2), dtype=weight.dtype, device=weight.device)


def _read(captured: Captured, model: nn.Module) -> Structure:
    reader = _Reader(captured, model)
    return Structure(reader.followers(), reader.outputs(), reader.pointwise(), *reader.coupled())


class _Reader:
    """Walks a captured graph; ``layer`` has the name of the module whose weight a conv or linear operator applies."""

    def __init__(self, captured: Captured, model: nn.Module) -> None:
        self.graph, self.tensors, self.modules = captured.graph, captured.tensors, captured.modules
        self.layer: dict[fx.Node, str] = {}
        for node in self.graph.nodes:
            if packet(node) in CONTRACTIONS:
                name = self.owner(node.args[1])
                if name is not None and isinstance(self.modules.get(name), (*CONVS, nn.Linear)):
                    self.layer[node] = name
        self.calls: dict[str, int] = {}
        for name in [*self.layer.values(), *map(self.norm_of, self.graph.nodes)]:
            if name is not None:
                self.calls[name] = self.calls.get(name, 0) + 1

    def owner(self, node: Any) -> str | None:
        """The module of the one parameter named weight that a tensor is, or is computed from."""
        found, waiting, seen = set(), [node], set()
        while waiting:
            part = waiting.pop()
            if not isinstance(part, fx.Node) or part in seen:
                continue
            seen.add(part)
            if part.op == "placeholder":
                return None
            if part.op == "get_attr" and self.tensors[part.target].dim() > 1:
                found.add(part.target)
            waiting += part.all_input_nodes
        names = {name.rpartition(".")[0] for name in found if name.rpartition(".")[2] == "weight"}
        return names.pop() if len(names) == len(found) == 1 else None

    def norm_of(self, node: fx.Node) -> str | None:
        """The module whose weight a BatchNorm operator scales with."""
        weight = node.args[1] if packet(node) is aten.batch_norm else None
        if isinstance(weight, fx.Node) and weight.op == "get_attr" and weight.target.endswith(".weight"):
            return weight.target.removesuffix(".weight")
        return None

    def is_depthwise(self, node: fx.Node) -> bool:
        module = self.modules.get(self.layer.get(node, ""))
        return isinstance(module, CONVS) and 1 < module.groups == module.in_channels

    def followers(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for node, name in self.layer.items():
            if isinstance(self.modules[name], CONVS):
                own = found.setdefault(name, [])
                own += [follower for follower in self._behind(node, channels(node)) if follower not in own]
        return {name: own for name, own in found.items() if own}

    def _behind(self, node: fx.Node, width: int) -> Iterator[str]:
        """Walks the readers of a conv through per-channel operators; yields the BatchNorms and depthwise convs."""
        for user in node.users:
            norm = self.norm_of(user)
            if norm is not None and user.args[0] is node and self.calls[norm] == 1:
                yield norm
                yield from self._behind(user, width)
            elif self.is_depthwise(user) and user.args[0] is node and self.calls[self.layer[user]] == 1:
                if self.modules[self.layer[user]].in_channels == width:
                    yield self.layer[user]
                    yield from self._behind(user, channels(user))
            elif keeps_zero(user):
                yield from self._behind(user, width)

    def outputs(self) -> set[str]:
        found: set[str] = set()
        seen: set[fx.Node] = set()
        waiting = [node for node in self.graph.nodes if node.op == "output"]
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in self.layer and isinstance(self.modules[self.layer[node]], CONVS):
                found.add(self.layer[node])
                if not self.is_depthwise(node):
                    continue
            if packet(node) in CONTRACTIONS and not self.is_depthwise(node):
                continue
            if packet(node) not in (aten.matmul, aten.bmm, aten.mm):
                waiting.extend(node.all_input_nodes)
        return found

    def pointwise(self) -> set[str]:
        last: set[fx.Node] = set()  # tensors with the channels last
        for node in self.graph.nodes:
            source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
            through = source in last and (packet(node) in (aten.linear, aten.layer_norm) or keeps_zero(node))
            if moves_channels_last(node) or through:
                last.add(node)
        found = {self.layer[node] for node in last if node in self.layer}
        return {name for name in found if isinstance(self.modules[name], nn.Linear)}

    def coupled(self) -> tuple[dict[str, int], set[int], dict[int, int], set[str]]:
        parent: dict[str, str] = {}
        fixed: set[str] = set()
        widths: dict[str, int] = {}  # of the groups of convs with groups
        added: set[str] = set()
        gates: set[str] = set()
        owner: dict[fx.Node, str | None] = {}  # a conv that stands for the node's channels

        def root(name: str) -> str:
            while parent[name] != name:
                name = parent[name]
            return name

        for node in self.graph.nodes:
            sources = [s for s in node.all_input_nodes if s.op != "get_attr" and isinstance(s.meta.get("val"), Tensor)]
            inputs = [owner.get(source) for source in sources]
            if node in self.layer:
                name = self.layer[node]
                parent.setdefault(name, name)
                conv, before = self.modules[name], inputs[0] if inputs else None
                of_groups = isinstance(conv, CONVS) and conv.groups > 1
                if of_groups and conv.in_channels == conv.out_channels and before:
                    parent[root(name)] = root(before)
                if of_groups and not self.is_depthwise(node):
                    widths[name] = conv.out_channels // conv.groups
                    if not before:
                        fixed.add(name)
                    elif conv.in_channels != conv.out_channels:
                        widths[before] = conv.in_channels // conv.groups
                        fixed |= {name, before}
                owner[node] = name
            elif len(sources) > 1 and is_pointwise(node):
                widest = max((len(self.modules[name].weight) for name in inputs if name), default=0)
                every = list(zip(sources, inputs, strict=True))
                pairs = [pair for pair in every if not is_map(pair[0], node, widest)]
                known = [name for _, name in pairs if name]
                for name in known[1:]:
                    parent[root(name)] = root(known[0])
                scaled = packet(node) is aten.mul  # a channel of zeros stays one, whatever the map
                if known and (len(known) < len(pairs) or (len(pairs) < len(every) and not scaled)):
                    fixed.add(known[0])
                if packet(node) in (aten.add, aten.sub):
                    added.update(known)
                else:
                    gates |= {name for source, name in pairs if name and gates_with(source)}
                owner[node] = known[0] if len(known) == len(pairs) and known else None
            elif len(sources) == 1 and (
                packet(node) in (aten.batch_norm, aten.mean, *ZERO_KEEPING)
                or is_pointwise(node)
                or moves_channels(node)
            ):
                owner[node] = inputs[0]
        numbers = {name: number for number, name in enumerate(dict.fromkeys(root(name) for name in parent))}
        groups = {name: numbers[root(name)] for name in parent}
        summed = {groups[name] for name in added}
        bound = gates | {name for name, group in groups.items() if group in summed}
        units: dict[int, int] = {}
        for name, width in widths.items():
            units[groups[name]] = math.lcm(units.get(groups[name], 1), width)
        return groups, {groups[name] for name in fixed}, units, bound


def packet(node: fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", None)


def channels(node: fx.Node) -> int:
    """Filters of a conv's or a linear's result."""
    value = node.meta["val"]
    return value.shape[-1] if packet(node) is aten.linear else value.shape[1]


def is_map(source: fx.Node, result: fx.Node, channels: int) -> bool:
    """Whether an operand is one image for all channels: spatial attention."""
    shape, whole = source.meta["val"].shape, result.meta["val"].shape
    return len(shape) == len(whole) > 2 and shape[1] == 1 < whole[1] == channels and shape[2:] == whole[2:]


def gates_with(source: fx.Node) -> bool:
    """Whether a factor has one number per channel and image: squeeze-excite."""
    shape = source.meta["val"].shape
    return len(shape) > 2 and all(size == 1 for size in shape[2:])


def is_pointwise(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return packet(node) is aten.hardswish or (torch.Tag.pointwise in tags and isinstance(node.meta.get("val"), Tensor))


def keeps_zero(node: fx.Node) -> bool:
    """Whether a channel of zeros stays one, in its place."""
    if packet(node) is aten.mean:
        ndim = node.args[0].meta["val"].dim()
        return len(node.args) > 1 and all(d % ndim >= 2 for d in node.args[1] or [0])
    if packet(node) is aten.pad:
        return not any(node.args[3:])
    if packet(node) in ZERO_KEEPING:
        return True
    tensors = [s for s in node.all_input_nodes if isinstance(s.meta.get("val"), Tensor)]
    if not is_pointwise(node) or len(tensors) != 1:
        return False
    try:
        zero = torch.zeros(1)
        return bool(node.target(*fx.map_arg(node.args, lambda _: zero), **node.kwargs).eq(0).all())
    except (RuntimeError, TypeError):  # sizes among the arguments
        return False


def moves_channels_last(node: fx.Node) -> bool:
    return packet(node) is aten.permute and list(node.args[1]) == [0, 2, 3, 1]


def moves_channels(node: fx.Node) -> bool:
    """permute between [B, C, H, W] and [B, H, W, C]."""
    return packet(node) is aten.permute and list(node.args[1]) in ([0, 2, 3, 1], [0, 3, 1, 2])
