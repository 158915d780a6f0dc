"""Convs and linear layers: where channels die and where constants end, in a bias or in a border map."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from mfp.compact.builder import Builder, Piece
from mfp.compact.channels import Channels, Network, input_node, take_rows
from mfp.compact.modules import ConvWithBorder
from mfp.compact.rules import Rule


def groups_of(module: nn.Module) -> int:
    return getattr(module, "groups", 1)


def is_transposed(module: nn.Module) -> bool:
    return getattr(module, "transposed", False)


def to_rows(weight: Tensor, groups: int, transposed: bool) -> Tensor:
    """Any contraction's weight as [out, in / groups, kernel...]."""
    if not transposed:
        return weight
    per_group = weight.view(groups, weight.shape[0] // groups, *weight.shape[1:]).transpose(1, 2)
    return per_group.reshape(-1, *per_group.shape[2:])


def from_rows(rows: Tensor, groups: int, transposed: bool) -> Tensor:
    """The inverse of to_rows."""
    if not transposed:
        return rows
    per_group = rows.view(groups, rows.shape[0] // groups, *rows.shape[1:]).transpose(1, 2)
    return per_group.reshape(-1, *per_group.shape[2:])


def take(rows_of: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """rows_of[rows][:, columns], columns [in'] or one set per row [out', in']; -1 gives zeros."""
    rows, columns = rows.to(rows_of.device), columns.to(rows_of.device)
    columns = columns.expand(len(rows), -1)
    taken = rows_of[rows.clamp(min=0)[:, None], columns.clamp(min=0)]
    missing = (rows[:, None] < 0) | (columns < 0)
    taken[missing] = 0
    return taken


def cut_weight(weight: Tensor, cut: Cut, old_groups: int, transposed: bool) -> Tensor:
    """What is left of a contraction's weight, or of anything of its shape."""
    rows = take(to_rows(weight, old_groups, transposed), cut.rows, cut.columns)
    left = from_rows(rows, cut.groups, transposed)
    is_last = weight.dim() == 4 and not weight.is_contiguous()
    return left.contiguous(memory_format=torch.channels_last if is_last else torch.contiguous_format)


def varies_at_border(module: nn.Module) -> bool:
    """Whether a constant input channel gives a result that differs between inside and border."""
    if isinstance(module, nn.Linear):
        return False
    if module.transposed:
        return True
    if module.padding_mode != "zeros":
        return False
    if isinstance(module.padding, str):
        return module.padding == "same" and any(size > 1 for size in module.kernel_size)
    return any(module.padding)


@dataclass
class Cut:
    """What is left of a contraction: its rows and columns, and the input channels that its input must bring.

    rows [out'] and columns [in' / groups'] (or [out', in' / groups']) index the weight in the form of to_rows;
    ``layout`` [in'] is the input's channels in the order of the columns.
    """

    rows: Tensor
    columns: Tensor
    layout: Tensor
    groups: int
    name: str = ""


class Contraction(Rule):
    """conv, transposed conv, linear"""

    understood = True

    def forward(self, net: Network, node: fx.Node) -> Channels | None:
        module, source = net.module(node), input_node(node)
        dim = self.channel_dim(net, node)
        known = net.known(source)
        if known is not None and known.dim != dim:
            return None
        groups = groups_of(module)
        const = net.channels_at(source, dim).const.view(groups, 1, -1)  # [groups, 1, in / groups]
        nonzero, sums = self.weight_facts(net, module)
        moving = const.isnan() | ((const != 0) & varies_at_border(module))
        live = (nonzero & moving).any(-1)  # [groups, out / groups]
        value = (sums * const.nan_to_num()).sum(-1)
        if module.bias is not None:
            value = value + module.bias.detach().double().cpu().view(groups, -1)
        return Channels(dim, torch.where(live, float("nan"), value).flatten())

    def backward(self, net: Network, node: fx.Node) -> None:
        if net.known(node) is None:
            return super().backward(net, node)
        calls = net.call_nodes(node)
        if len(calls) > 1:  # one set of filters for all calls: whatever one of them needs
            net.demand[node].fill_(True)
        nonzero, _ = self.weight_facts(net, net.module(node))
        kept = net.kept(node).view(nonzero.shape[0], -1, 1)
        if len(calls) > 1:
            kept = torch.stack([net.channels[call].live for call in calls]).any(0).view_as(kept)
        net.need(input_node(node), (nonzero & kept).any(1).flatten(), self.channel_dim(net, node))
        return None

    @staticmethod
    def channel_dim(net: Network, node: fx.Node) -> int:
        module = net.module(node)
        ndim = len(net.shape(node))
        return ndim - 1 if isinstance(module, nn.Linear) else ndim - len(module.kernel_size) - 1

    @staticmethod
    def weight_facts(net: Network, module: nn.Module) -> tuple[Tensor, Tensor]:
        """Which weights [groups, out / groups, in / groups] are not zero, and their sums over the kernel."""
        if id(module) not in net.facts:
            groups = groups_of(module)
            rows = to_rows(module.weight.detach(), groups, is_transposed(module))
            rows = rows.reshape(groups, rows.shape[0] // groups, rows.shape[1], -1)
            net.facts[id(module)] = (rows != 0).any(-1).cpu(), rows.sum(-1, dtype=torch.float64).cpu()
        return net.facts[id(module)]

    def shrink(self, build: Builder, node: fx.Node) -> Any:
        net, module, source = build.network, build.network.module(node), input_node(node)
        if net.known(node) is None:
            return super().shrink(build, node)
        dim = self.channel_dim(net, node)
        cut = build.shared.get(id(module))
        if cut is None:
            cut = self.plan_cut(build, node, dim)
            cut.name = build.add(node.target, self.cut_module(build, node, cut, dim))
            build.shared[id(module)] = cut
        piece = build.align(source, cut.layout, dim)
        new = build.graph.create_node("call_module", cut.name, (piece.node,), {}, node.name)
        right = net.kept(node) | ~net.channels[node].live  # others lack inputs that nobody else needs
        return Piece(new, torch.where((cut.rows >= 0) & right[cut.rows.clamp(min=0)], cut.rows, -1))

    def plan_cut(self, build: Builder, node: fx.Node, dim: int) -> Cut:
        net, module, source = build.network, build.network.module(node), input_node(node)
        calls = net.call_nodes(node)
        groups = groups_of(module)
        kept = torch.stack([net.kept(call) for call in calls]).any(0)
        if not kept.any():
            kept[0] = True
        fits = len(calls) == 1 and not isinstance(module, nn.Linear) and groups in (1, len(kept))
        if fits and not goes_into_groups(net, node):
            kept = build.pad(kept, net.channels[node].live)
        nonzero, _ = self.weight_facts(net, module)
        wanted = (nonzero & kept.view(groups, -1, 1)).any(1).flatten()  # input channels these filters read
        live = torch.zeros_like(wanted)
        first = net.channels_at(source, dim).const
        for call in calls:
            const = net.channels_at(input_node(call), dim).const
            live |= const.isnan() | (const != first)  # folded only where all calls see the same constant
        wanted &= live
        piece_ids = build.pieces[source].ids
        present = torch.arange(module_inputs(module)) if piece_ids is None else piece_ids
        if groups > 1:
            at_hand = torch.isin(torch.arange(module_inputs(module)), present)
            constant = first.nan_to_num() != 0
            return grouped_cut(*(mask.view(groups, -1) for mask in (kept, wanted, constant, at_hand)))
        layout = wanted.nonzero().flatten()
        enough = torch.isin(layout, present).all()
        share = 0.9 if build.multiple == 1 else 0.75  # in serving form time counts, not parameters
        few = len(layout) > share * len(present) or len(layout) + build.multiple > len(present)
        if len(calls) == 1 and enough and few:
            layout = present  # a few columns of zeros are cheaper than a copy of the input
        elif not len(layout):
            layout = present[:1]
        return Cut(kept.nonzero().flatten(), layout, layout, 1)

    def cut_module(self, build: Builder, node: fx.Node, cut: Cut, dim: int) -> nn.Module:
        """The contraction for these rows and columns, with the lost constants in its bias or its border map."""
        net, module = build.network, build.network.module(node)
        const = net.channels_at(input_node(node), dim).const.nan_to_num()
        const[cut.layout[cut.layout >= 0]] = 0  # still there
        old_groups, transposed = groups_of(module), is_transposed(module)
        new = rebuild(module, cut, build)
        rows_of = to_rows(module.weight.detach(), old_groups, transposed)
        lost = lost_kernels(rows_of, const, cut.rows, old_groups)  # [out', kernel...] in float64
        if not lost.any():
            return new
        if varies_at_border(module):
            border = lost.to(module.weight.dtype)[:, None]
            return ConvWithBorder(new, border.transpose(0, 1).contiguous() if transposed else border)
        bias = lost.flatten(1).sum(1) if lost.dim() > 1 else lost
        if new.bias is None:
            new.bias = nn.Parameter(bias.to(module.weight.dtype))
            new.bias.mfp_from_constants = True
        else:
            new.bias.data = (new.bias.data.double() + bias).to(new.bias.dtype)
        return new


def goes_into_groups(net: Network, node: fx.Node) -> bool:
    """Whether a conv with groups alone reads the result, past BatchNorm and activations: it wants channels sorted into
    its groups, and others would only have to be taken out again."""
    while len(node.users) == 1:
        reader = next(iter(node.users))
        module = net.module(reader) if reader.op == "call_module" else None
        if isinstance(module, nn.modules.conv._ConvNd):
            return 1 < module.groups < module.in_channels
        known = net.known(reader)
        if known is None or len(reader.all_input_nodes) > 1 or len(known) != len(net.known(node)):
            return False
        node = reader
    return False


def module_inputs(module: nn.Module) -> int:
    return module.in_features if isinstance(module, nn.Linear) else module.in_channels


def grouped_cut(kept: Tensor, wanted: Tensor, constant: Tensor, present: Tensor) -> Cut:
    """Groups without a kept filter go; the others get equal numbers of filters and of inputs.

    kept [groups, out / groups]; [groups, in / groups]: wanted, inputs that are read; constant, inputs with a constant
    that is not zero; present, inputs at hand. Groups with fewer inputs than others are filled up with constants (they
    need no border map then), with what is at hand, or with slots of zeros (-1).
    """
    per_out, per_in = kept.shape[1], wanted.shape[1]
    alive = kept.any(1).nonzero().flatten()
    most_out, most_in = int(kept.sum(1).max()), max(int(wanted[alive].sum(1).max()), 1)
    rows = first_choices([kept], most_out, fill=True)[alive]
    columns = first_choices([wanted, constant, present], most_in, fill=False)[alive]
    layout = torch.where(columns >= 0, columns + alive[:, None] * per_in, -1).flatten()
    rows = (rows + alive[:, None] * per_out).flatten()
    return Cut(rows, columns.repeat_interleave(most_out, dim=0), layout, len(alive))


def first_choices(choices: list[Tensor], count: int, fill: bool) -> Tensor:
    """``count`` places per row, in order: first those of choices[0], then of choices[1], ...; then any, or -1."""
    rank = torch.full(choices[0].shape, len(choices))
    for place, choice in reversed(list(enumerate(choices))):
        rank[choice] = place
    order = rank.argsort(dim=1, stable=True)[:, :count]
    taken = order if fill else torch.where(rank.gather(1, order) < len(choices), order, rank.shape[1])
    taken = taken.sort(dim=1).values
    return torch.where(taken < rank.shape[1], taken, -1)


def lost_kernels(rows_of: Tensor, const: Tensor, rows: Tensor, groups: int) -> Tensor:
    """For each row the sum over lost input channels of constant times kernel, float64."""
    rows_on = rows.to(rows_of.device)
    weights = rows_of[rows_on.clamp(min=0)].double()
    group = rows_on.clamp(min=0) // (rows_of.shape[0] // groups)
    constants = const.to(rows_of.device).view(groups, -1)[group]  # [out', in / groups]
    used = constants != 0
    if not used.any():
        return torch.zeros(len(rows), dtype=torch.float64, device=rows_of.device)
    constants = constants.view(*constants.shape, *[1] * (weights.dim() - 2))
    lost = (weights * constants).sum(1)
    lost[rows_on < 0] = 0
    return lost


def rebuild(module: nn.Module, cut: Cut, build: Builder) -> nn.Module:
    """A module of the same class and settings around a smaller weight."""
    inputs, outputs, transposed = len(cut.layout), len(cut.rows), is_transposed(module)
    with torch.device("meta"):
        if isinstance(module, nn.Linear):
            new: nn.Module = nn.Linear(inputs, outputs, bias=module.bias is not None)
        else:
            extra = {"output_padding": module.output_padding} if module.transposed else {}
            new = type(module)(
                inputs, outputs, module.kernel_size, module.stride, module.padding, dilation=module.dilation,
                groups=cut.groups, bias=module.bias is not None, padding_mode=module.padding_mode, **extra,
            )  # fmt: skip
    left = partial(cut_weight, cut=cut, old_groups=groups_of(module), transposed=transposed)
    new.weight = build.derive(module.weight, left)
    if module.bias is not None:
        new.bias = build.derive(module.bias, partial(take_rows, rows=cut.rows))
    return new.train(module.training)
