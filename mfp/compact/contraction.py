"""Convs and linear layers: where channels die and where constants end, in a bias or in a border map."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from mfp.compact.channels import Channels, Network, arguments, shape, take_rows
from mfp.compact.cutting import Cut, cut_weight, grouped_cut, lost_kernels, to_rows
from mfp.compact.rules import Rule, data_input
from mfp.compact.writer import Piece, Writer
from mfp.modules import ConvWithBorder

aten = torch.ops.aten
CONVS = {aten.conv1d: nn.Conv1d, aten.conv2d: nn.Conv2d, aten.conv3d: nn.Conv3d}
TRANSPOSED = {
    aten.conv_transpose1d: nn.ConvTranspose1d, aten.conv_transpose2d: nn.ConvTranspose2d,
    aten.conv_transpose3d: nn.ConvTranspose3d,
}  # fmt: skip
KINDS = {**CONVS, **TRANSPOSED, aten.linear: nn.Linear}


@dataclass(frozen=True)
class Layer:
    """One call of a conv, a transposed conv or a linear operator: what a module of its kind is made of."""

    kind: type[nn.Module]
    weight: fx.Node
    bias: fx.Node | None
    groups: int = 1
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()

    @property
    def transposed(self) -> bool:
        return self.kind in TRANSPOSED.values()

    @property
    def kernel(self) -> tuple[int, ...]:
        return shape(self.weight)[2:]

    def channel_dim(self, node: fx.Node) -> int:
        return len(shape(node)) - len(self.kernel) - 1

    @property
    def inputs(self) -> int:
        return shape(self.weight)[0] if self.transposed else shape(self.weight)[1] * self.groups

    def varies_at_border(self) -> bool:
        """Whether a constant input channel gives a result that differs between inside and border."""
        if isinstance(self.padding, str):
            return self.padding == "same" and any(size > 1 for size in self.kernel)
        return self.transposed or any(self.padding)


def layer_of(node: fx.Node) -> Layer | None:
    """The node as a layer; None for any other operator."""
    return as_layer(node) if is_contraction(node) else None


def as_layer(node: fx.Node) -> Layer:
    """A contraction as a layer."""
    found, kind = arguments(node), KINDS[node.target.overloadpacket]
    if kind is nn.Linear:
        return Layer(kind, found["weight"], found["bias"])
    n = len(shape(found["weight"])) - 2

    def spread(value: Any) -> Any:
        return value if isinstance(value, str) else tuple(value) * (n if len(value) == 1 else 1)

    return Layer(
        kind, found["weight"], found["bias"], found["groups"], spread(found["stride"]), spread(found["padding"]),
        spread(found["dilation"]), spread(found.get("output_padding", [0])),
    )  # fmt: skip


def is_contraction(node: fx.Node) -> bool:
    return getattr(node.target, "overloadpacket", None) in KINDS


class Contraction(Rule):
    """conv, transposed conv, linear"""

    understood = True

    def forward(self, net: Network, node: fx.Node) -> Channels | None:
        layer, source = as_layer(node), data_input(node)
        dim = layer.channel_dim(node)
        known = net.known(source)
        if known is not None and known.dim != dim:
            return None
        const = net.channels_at(source, dim).const.view(layer.groups, 1, -1)  # [groups, 1, in / groups]
        nonzero = nonzero_weights(net, layer)
        moving = const.isnan() | ((const != 0) & layer.varies_at_border())
        live = (nonzero & moving).any(-1)  # [groups, out / groups]
        value = torch.zeros(live.shape, dtype=torch.float64)
        if const.nan_to_num().any():
            value = (weight_sums(net, layer) * const.nan_to_num()).sum(-1)
        if layer.bias is not None:
            value = value + net.tensors[layer.bias.target].detach().double().cpu().view(layer.groups, -1)
        return Channels(dim, torch.where(live, float("nan"), value).flatten())

    def backward(self, net: Network, node: fx.Node) -> None:
        if net.known(node) is None:
            return super().backward(net, node)
        layer = as_layer(node)
        calls = net.calls[layer.weight.target]
        if len(calls) > 1:  # one set of filters for all calls: whatever one of them needs
            net.demand[node].fill_(True)
        nonzero = nonzero_weights(net, layer)
        kept = net.kept(node)
        if len(calls) > 1:
            kept = torch.stack([net.channels[call].live for call in calls]).any(0)
        kept = kept.view(nonzero.shape[0], -1, 1)
        net.need(data_input(node), (nonzero & kept).any(1).flatten(), layer.channel_dim(node))
        return None

    def write(self, out: Writer, node: fx.Node) -> Any:
        net, layer = out.network, as_layer(node)
        if net.known(node) is None:
            return super().write(out, node)
        name = layer.weight.target
        if name not in out.cuts:
            cut = plan_cut(out, node, layer)
            cut.name = out.add(layer_name(net, node, layer), cut_module(out, node, layer, cut))
            out.cuts[name] = cut
        cut = out.cuts[name]
        piece = out.align(data_input(node), cut.layout, layer.channel_dim(node))
        new = out.graph.create_node("call_module", cut.name, (piece.node,), {}, node.name)
        right = net.kept(node) | ~net.channels[node].live  # others lack inputs that nobody else needs
        return Piece(new, torch.where((cut.rows >= 0) & right[cut.rows.clamp(min=0)], cut.rows, -1))


def layer_name(net: Network, node: fx.Node, layer: Layer) -> str:
    """The module that holds the weight; for a weight that was computed the module that computed the layer."""
    path, _, last = layer.weight.target.rpartition(".")
    around = path.rpartition(".")[0]
    if isinstance(net.modules.get(around), ConvWithBorder):
        path = around  # so that it has the old name again, and a border anew where it needs one
    if isinstance(net.modules.get(path), ConvWithBorder) and last == "border":
        return f"{path}_border"
    if last == "weight" and path:
        return path
    return node.meta["module"] or node.name


def nonzero_weights(net: Network, layer: Layer) -> Tensor:
    """Which kernels [groups, out / groups, in / groups] are not all zero."""
    name = layer.weight.target
    if name not in net.nonzero:
        net.nonzero[name] = (kernels(net, layer) != 0).any(-1).cpu()
    return net.nonzero[name]


def weight_sums(net: Network, layer: Layer) -> Tensor:
    """The sums over the kernels, [groups, out / groups, in / groups] in float64."""
    return kernels(net, layer).sum(-1, dtype=torch.float64).cpu()


def kernels(net: Network, layer: Layer) -> Tensor:
    """[groups, out / groups, in / groups, kernel]"""
    rows = to_rows(net.tensors[layer.weight.target].detach(), layer.groups, layer.transposed)
    return rows.reshape(layer.groups, rows.shape[0] // layer.groups, rows.shape[1], -1)


def plan_cut(out: Writer, node: fx.Node, layer: Layer) -> Cut:
    """Which filters and which inputs stay."""
    net, source, dim = out.network, data_input(node), layer.channel_dim(node)
    calls = net.calls[layer.weight.target]
    kept = torch.stack([net.kept(call) for call in calls]).any(0)
    if not kept.any():
        kept[0] = True
    fits = len(calls) == 1 and layer.kind is not nn.Linear and layer.groups in (1, len(kept))
    if fits and not goes_into_groups(net, node):
        kept = out.pad(kept, net.channels[node].live)
    nonzero = nonzero_weights(net, layer)
    wanted = (nonzero & kept.view(layer.groups, -1, 1)).any(1).flatten()  # input channels these filters read
    live = torch.zeros_like(wanted)
    first = net.channels_at(source, dim).const
    for call in calls:
        const = net.channels_at(data_input(call), dim).const
        live |= const.isnan() | (const != first)  # folded only where all calls see the same constant
    wanted &= live
    ids = out.piece(source).ids
    present = torch.arange(layer.inputs) if ids is None else ids
    if layer.groups > 1:
        at_hand = torch.isin(torch.arange(layer.inputs), present)
        constant = first.nan_to_num() != 0
        return grouped_cut(*(mask.view(layer.groups, -1) for mask in (kept, wanted, constant, at_hand)))
    layout = wanted.nonzero().flatten()
    enough = torch.isin(layout, present).all()
    share = 0.9 if out.multiple == 1 else 0.75  # in serving form time counts, not parameters
    few = len(layout) > share * len(present) or len(layout) + out.multiple > len(present)
    if len(calls) == 1 and enough and few:
        layout = present  # a few columns of zeros are cheaper than a copy of the input
    elif not len(layout):
        layout = present[:1]
    return Cut(kept.nonzero().flatten(), layout, layout, 1)


def cut_module(out: Writer, node: fx.Node, layer: Layer, cut: Cut) -> nn.Module:
    """The contraction for these rows and columns, with the lost constants in its bias or its border map."""
    net = out.network
    const = net.channels_at(data_input(node), layer.channel_dim(node)).const.nan_to_num()
    const[cut.layout[cut.layout >= 0]] = 0  # still there
    new = module_for(out, layer, cut)
    weight = net.tensors[layer.weight.target].detach()
    lost = lost_kernels(to_rows(weight, layer.groups, layer.transposed), const, cut.rows, layer.groups)
    if not lost.any():  # [out', kernel...] in float64
        return new
    if layer.varies_at_border():
        border = lost.to(weight.dtype)[:, None]
        return ConvWithBorder(new, border.transpose(0, 1).contiguous() if layer.transposed else border)
    bias = lost.flatten(1).sum(1) if lost.dim() > 1 else lost
    if new.bias is None:
        new.bias = nn.Parameter(bias.to(weight.dtype))
        new.bias.mfp_from_constants = True
    else:
        new.bias.data = (new.bias.data.double() + bias).to(new.bias.dtype)
    return new


def module_for(out: Writer, layer: Layer, cut: Cut) -> nn.Module:
    """torch's own module of the layer's kind and settings around a smaller weight."""
    inputs, outputs = len(cut.layout), len(cut.rows)
    with torch.device("meta"):
        if layer.kind is nn.Linear:
            new: nn.Module = nn.Linear(inputs, outputs, bias=layer.bias is not None)
        else:
            extra = {"output_padding": layer.output_padding} if layer.transposed else {}
            new = layer.kind(
                inputs, outputs, layer.kernel, layer.stride, layer.padding, dilation=layer.dilation,
                groups=cut.groups, bias=layer.bias is not None, **extra,
            )  # fmt: skip
    left = partial(cut_weight, cut=cut, old_groups=layer.groups, transposed=layer.transposed)
    new.weight = as_parameter(out.derive(layer.weight.target, left))
    if layer.bias is not None:
        new.bias = as_parameter(out.derive(layer.bias.target, partial(take_rows, rows=cut.rows)))
    return new


def as_parameter(value: Tensor) -> nn.Parameter:
    """A weight that was computed from parameters is one of its own from now on."""
    return value if isinstance(value, nn.Parameter) else nn.Parameter(value)


def goes_into_groups(net: Network, node: fx.Node) -> bool:
    """Whether a conv with groups alone reads the result, past BatchNorm and activations: it wants channels sorted into
    its groups, and others would only have to be taken out again."""
    while len(node.users) == 1:
        reader = next(iter(node.users))
        layer = layer_of(reader)
        if layer is not None:
            return 1 < layer.groups < layer.inputs
        known, sources = net.known(reader), [s for s in reader.all_input_nodes if s.op != "get_attr"]
        if known is None or len(sources) > 1 or len(known) != len(net.channels[node]):
            return False
        node = reader
    return False
