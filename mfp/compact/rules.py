"""What each kind of operation does to channels, in three steps: constants forward, needs backward, the shrunk copy.

``Rule`` itself is the safe answer for whatever is not understood: all results live, all inputs needed, and read at
their full width. The table at the end of table.py says which operation follows which rule.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from mfp.compact.builder import Builder, Piece
from mfp.compact.channels import Channels, Network, all_live, argument, input_node, inputs_of, take_rows


class Rule:
    """An operation that is not understood: never wrong, at worst less small."""

    understood = False

    def forward(self, net: Network, node: fx.Node) -> Any:
        return None

    def backward(self, net: Network, node: fx.Node) -> None:
        for source in inputs_of(node):
            net.need_all(source)

    def shrink(self, build: Builder, node: fx.Node) -> Any:
        args = fx.map_arg(node.args, lambda source: build.full(source, node))
        kwargs = fx.map_arg(node.kwargs, lambda source: build.full(source, node))
        return Piece(build.emit(node, args, kwargs))


class Scalar(Rule):
    """Sizes and arithmetic on them. A size along a shrunk channel dimension is the original one, as a literal."""

    understood = True

    def shrink(self, build: Builder, node: fx.Node) -> Any:
        literal = self.channel_size(build.network, node)
        if literal is not None:
            return literal
        if self.sees_all_sizes(build.network, node):
            return super().shrink(build, node)
        result = build.emit(node, build.value(node.args), build.value(node.kwargs))
        return Piece(result) if isinstance(result, fx.Node) else result

    @staticmethod
    def channel_size(net: Network, node: fx.Node) -> int | None:
        """The original number of channels where the node is x.size(d), x.shape[d] with d the channel dimension."""
        if is_size(node):
            source, dim = node.args[0], node.args[1] if len(node.args) > 1 else None
        elif node.op == "call_function" and node.target.__name__ == "getitem" and is_size(node.args[0]):
            source, dim = node.args[0].args[0], node.args[1]
            if len(node.args[0].args) > 1 and node.args[0].target == "size":
                return None
        else:
            return None
        known = net.known(source)
        if known is None or not isinstance(dim, int):
            return None
        return len(known) if dim % len(net.shape(source)) == known.dim else None

    @staticmethod
    def sees_all_sizes(net: Network, node: fx.Node) -> bool:
        """Whether the node is x.shape, read in some way that could see the channel dimension."""
        if not is_size(node) or (node.target == "size" and len(node.args) > 1):
            return False
        known = net.known(node.args[0])
        if known is None:
            return False
        sizes = range(len(net.shape(node.args[0])))
        for user in node.users:
            index = user.args[1] if getattr(user.target, "__name__", "") == "getitem" else None
            plain = isinstance(index, int) or (
                isinstance(index, slice) and not any(isinstance(part, fx.Node) for part in _parts(index))
                and known.dim not in sizes[index]
            )  # fmt: skip
            if not plain:
                return True
        return False

    def backward(self, net: Network, node: fx.Node) -> None:
        pass


def _parts(index: slice) -> tuple:
    return index.start, index.stop, index.step


def is_size(node: Any) -> bool:
    """x.size(...) or x.shape"""
    if not isinstance(node, fx.Node) or not isinstance(node.args[0] if node.args else None, fx.Node):
        return False
    shape = node.op == "call_function" and node.target is getattr and node.args[1] == "shape"
    return shape or (node.op == "call_method" and node.target == "size")


class PerChannel(Rule):
    """An operation that treats every channel by itself and alike: activations, pooling, resizing, dropout.

    ``constant`` maps the constants of channels; channels whose constant becomes NaN turn live. ``dim_after`` says where
    the channel dimension is afterwards (None: the operation mixes channels, or this call is not understood).
    """

    understood = True

    def __init__(
        self,
        constant: Callable[[Network, fx.Node, Tensor], Tensor] | None = None,
        dim_after: Callable[[Network, fx.Node, int], int | None] = lambda net, node, dim: dim,
    ) -> None:
        self.constant = constant
        self.dim_after = dim_after

    def forward(self, net: Network, node: fx.Node) -> Channels | None:
        source = input_node(node)
        known = net.known(source) if isinstance(source, fx.Node) else None
        if known is None or "shape" not in node.meta:
            return None
        dim = self.dim_after(net, node, known.dim)
        if dim is None or net.shape(node)[dim] != len(known):
            return None
        const = known.const.clone() if self.constant is None else self.constant(net, node, known.const.clone())
        return Channels(dim, const)

    def backward(self, net: Network, node: fx.Node) -> None:
        if net.known(node) is None:
            return super().backward(net, node)
        source = input_node(node)
        net.need(source, net.kept(node), net.known(source).dim)
        for other in inputs_of(node):
            if other is not source:
                net.need_all(other)
        return None

    def shrink(self, build: Builder, node: fx.Node) -> Any:
        net, source = build.network, input_node(node)
        if net.known(node) is None:
            return super().shrink(build, node)
        ids, kept = build.ids(source), net.kept(node)
        piece = build.pieces[source]
        if not torch.isin(kept.nonzero().flatten(), ids).all():  # a constant that is none afterwards
            piece = build.align(source, kept.nonzero().flatten(), net.known(source).dim)

        # fx.map_arg on everything but the data input: sizes and the like
        def convert(other: fx.Node) -> Any:
            return piece.node if other is source else build.full(other, node)

        args, kwargs = fx.map_arg(node.args, convert), fx.map_arg(node.kwargs, convert)
        return Piece(build.emit(node, args, kwargs), piece.ids)


def run_on_constants(net: Network, node: fx.Node, const: Tensor) -> Tensor:
    """Applies an activation to the constants, in float64; NaN stays NaN."""
    if node.op == "call_module":
        module = copy.deepcopy(net.module(node)).double().eval()
        if hasattr(module, "inplace"):
            module.inplace = False
        out = module(const.view(1, -1, 1, 1)).flatten()
    elif node.op == "call_method":
        out = getattr(const, node.target)(*node.args[1:], **node.kwargs)
    else:
        kwargs = {key: value for key, value in node.kwargs.items() if key != "input"}
        out = node.target(const, *node.args[1:], **kwargs)
    return torch.where(const.isnan(), const, out)


def zeros_only(net: Network, node: fx.Node, const: Tensor) -> Tensor:
    """Zero stays zero, any other constant turns live."""
    return torch.where(const == 0, const, float("nan"))


def zeros_if_padded(net: Network, node: fx.Node, const: Tensor) -> Tensor:
    """Average pooling: with zero padding that counts, a constant varies near the border."""
    module = net.module(node) if node.op == "call_module" else None
    if module is not None:
        padding, count = module.padding, getattr(module, "count_include_pad", True)
        divisor = getattr(module, "divisor_override", None)
    else:
        padding, count = argument(node, 3, "padding", 0), argument(node, 5, "count_include_pad", True)
        divisor = argument(node, 6, "divisor_override")
    padded = any(padding) if isinstance(padding, tuple | list) else bool(padding)
    return zeros_only(net, node, const) if (padded and count) or divisor else const


class Placeholder(Rule):
    understood = True

    def backward(self, net: Network, node: fx.Node) -> None:
        pass


class Attribute(Rule):
    """A parameter or buffer read by the graph itself (layer scale): zeros are constants, the rest is live."""

    understood = True

    def forward(self, net: Network, node: fx.Node) -> Channels | None:
        shape = net.shape(node)
        wide = [d for d, size in enumerate(shape or ()) if size > 1]
        if len(wide) != 1:
            return None
        *path, last = node.target.split(".")
        value = getattr(net.modules[".".join(path)], last).detach().double().cpu().flatten()
        return Channels(wide[0], torch.where(value == 0, value, float("nan")))

    def backward(self, net: Network, node: fx.Node) -> None:
        pass

    def shrink(self, build: Builder, node: fx.Node) -> Any:
        net = build.network
        uses = [n for n in net.graph.nodes if n.op == "get_attr" and n.target == node.target]
        known = net.known(node)
        if known is None or len(uses) > 1 or not net.kept(node).any() or net.kept(node).all():
            return super().shrink(build, node)
        ids = net.kept(node).nonzero().flatten()
        new = build.emit(node, (), {})
        path, _, last = node.target.rpartition(".")
        value = getattr(build.root.get_submodule(path), last)
        left = partial(torch.index_select, dim=known.dim, index=ids.to(value.device))
        value.data = left(value.data)
        if value in build.origins:
            build.origins[value] = build.origins[value][0], left
        return Piece(new, ids)


class Output(Rule):
    """The network's results keep their width."""

    understood = True


class BatchNorm(Rule):
    """Scale and shift per channel (BatchNorm, InstanceNorm, PReLU): constants are mapped, parameters sliced."""

    understood = True

    def __init__(self, constant: Callable[[nn.Module, Tensor], Tensor]) -> None:
        self.constant = constant

    def forward(self, net: Network, node: fx.Node) -> Channels | None:
        source = input_node(node)
        known = net.channels_at(source, 1)
        found = net.known(source)
        if found is not None and found.dim != 1:
            return None
        return Channels(1, self.constant(net.module(node), known.const))

    def backward(self, net: Network, node: fx.Node) -> None:
        if net.known(node) is None:
            return super().backward(net, node)
        net.need(input_node(node), net.kept(node), 1)
        return None

    def shrink(self, build: Builder, node: fx.Node) -> Any:
        net, source, module = build.network, input_node(node), build.network.module(node)
        if net.known(node) is None:
            return super().shrink(build, node)
        piece = build.pieces[source]
        calls = net.call_nodes(node)
        if len(calls) > 1:
            common = torch.stack([net.kept(call) for call in calls]).any(0).nonzero().flatten()
            piece = build.align(source, common if len(common) else torch.zeros(1, dtype=torch.long), 1)
        ids = piece.ids
        if ids is None and len(calls) == 1:
            return Piece(build.emit(node, (piece.node,), {}), None)
        if id(module) not in build.shared:
            rows = ids if len(calls) == 1 else common if len(common) else torch.zeros(1, dtype=torch.long)
            build.shared[id(module)] = build.add(node.target, slice_norm(build, module, rows))
        name = build.shared[id(module)]
        return Piece(build.graph.create_node("call_module", name, (piece.node,), {}, node.name), ids)


def slice_norm(build: Builder, module: nn.Module, rows: Tensor) -> nn.Module:
    """The same norm for the channels ``rows`` only; slots of -1 scale by zero."""
    new = copy.deepcopy(module)
    for attribute in ("num_features", "num_parameters"):
        if hasattr(new, attribute):
            setattr(new, attribute, len(rows))
    for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        if tensor.dim() != 1:
            continue
        left = partial(take_rows, rows=rows, missing=1.0 if key == "running_var" else 0.0)
        if isinstance(tensor, nn.Parameter):
            setattr(new, key, build.derive(tensor, left))
        else:
            new._buffers[key] = left(tensor)
    return new


def batch_norm_constant(module: nn.Module, const: Tensor) -> Tensor:
    count = len(const)
    weight = torch.ones(count) if module.weight is None else module.weight.detach()
    shift = torch.zeros(count) if module.bias is None else module.bias.detach()
    weight, shift = weight.double().cpu(), shift.double().cpu()
    if module.running_mean is None:  # statistics of the batch: a constant channel is its own mean
        return torch.where(const.isnan() & (weight != 0), const, shift)
    mean, variance = module.running_mean.double().cpu(), module.running_var.double().cpu()
    normed = (const - mean) / (variance + module.eps).sqrt()
    return torch.where(weight == 0, shift, normed * weight + shift)


def instance_norm_constant(module: nn.Module, const: Tensor) -> Tensor:
    return batch_norm_constant(module, const)


def prelu_constant(module: nn.Module, const: Tensor) -> Tensor:
    slope = module.weight.detach().double().cpu()
    return torch.where(const >= 0, const, const * slope)


class NormAcrossChannels(Rule):
    """GroupNorm and LayerNorm read all channels of their input; a zero scale still makes its result constant."""

    understood = True

    def forward(self, net: Network, node: fx.Node) -> Channels | None:
        module, shape = net.module(node), net.shape(node)
        if isinstance(module, nn.LayerNorm):
            if len(module.normalized_shape) != 1:
                return None
            dim = len(shape) - 1
        else:
            dim = 1
        result = all_live(dim, shape[dim])
        if getattr(module, "weight", None) is not None:
            shift = torch.zeros(shape[dim]) if module.bias is None else module.bias.detach().double().cpu()
            result.const[module.weight.detach().cpu() == 0] = 0.0
            result.const += torch.where(result.const.isnan(), 0.0, shift)
        return result
