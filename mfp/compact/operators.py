"""Which ATen operator follows which rule: the one place to teach a new one.

Elementwise operators (torch tags them) need no line here. An operator that is not here is not understood: its inputs
are read at full width, its results are live.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from mfp.compact.channels import Network, has_shape
from mfp.compact.contraction import KINDS, Contraction
from mfp.compact.elementwise import Elementwise, is_elementwise
from mfp.compact.indexed import Filled, IndexAdd, IndexCopy, IndexSelect
from mfp.compact.movement import RESHAPES, ChannelShuffle, Pad, Permute, Reshape, Select, Slice, Squeeze
from mfp.compact.norms import BatchNorm, NormAcrossChannels, PerChannelNorm, prelu_constant, shifted
from mfp.compact.parts import Cat, Split
from mfp.compact.rules import (
    Attribute,
    Expand,
    Input,
    Output,
    PerChannel,
    Pick,
    ReadsAll,
    Rule,
    Sizes,
    after_expand,
    after_reduction,
    all_of_it_live,
    along_others,
    spatial,
    zeros_if_padded,
    zeros_only,
)

aten = torch.ops.aten


def packets(names: str) -> list[Any]:
    """The operators of these names that this torch has."""
    return [getattr(aten, name) for name in names.split() if hasattr(aten, name)]


def each(names: str, rule: Rule) -> dict[Any, Rule]:
    return dict.fromkeys(packets(names), rule)


def per_dimension(name: str, *constant: Any) -> dict[Any, Rule]:
    """Pooling over one, two or three dimensions."""
    return {p: PerChannel(spatial(n), *constant) for n in (1, 2, 3) for p in packets(name.replace("#", str(n)))}


RULES: dict[Any, Rule] = {
    **dict.fromkeys(KINDS, Contraction()),
    aten.batch_norm: BatchNorm(shifted),
    aten.instance_norm: PerChannelNorm(shifted),
    aten.prelu: PerChannelNorm(prelu_constant),
    **each("group_norm layer_norm rms_norm", NormAcrossChannels()),
    **each("clone contiguous detach alias to _to_copy lift_fresh_copy lift_fresh", PerChannel()),
    **each("dropout alpha_dropout feature_dropout feature_alpha_dropout", PerChannel()),
    **each("expand", Expand(after_expand)),
    **each("mean amax amin nanmean median", PerChannel(after_reduction)),
    **each("sum std var var_mean std_mean prod linalg_vector_norm norm", PerChannel(after_reduction, zeros_only)),
    **each("max min topk sort", PerChannel(along_others, all_of_it_live)),
    **each("softmax log_softmax _softmax flip roll cumsum", PerChannel(along_others, all_of_it_live)),
    **per_dimension("max_pool#d adaptive_avg_pool#d adaptive_max_pool#d max_pool#d_with_indices"),
    **per_dimension("avg_pool#d", zeros_if_padded),
    **each("upsample_nearest1d upsample_linear1d", PerChannel(spatial(1))),
    **each("upsample_nearest2d upsample_bilinear2d upsample_bicubic2d", PerChannel(spatial(2))),
    **each("_upsample_nearest_exact2d _upsample_bilinear2d_aa", PerChannel(spatial(2))),
    **each("upsample_nearest3d upsample_trilinear3d", PerChannel(spatial(3))),
    **dict.fromkeys(RESHAPES, Reshape()),
    **each("permute transpose movedim t swapaxes", Permute()),
    **each("squeeze unsqueeze", Squeeze()),
    **each("slice narrow", Slice()),
    **each("select", Select()),
    **each("channel_shuffle native_channel_shuffle", ChannelShuffle()),
    **each("pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d", Pad()),
    **each("replication_pad1d replication_pad2d replication_pad3d", Pad()),
    **each("chunk split split_with_sizes unbind tensor_split", Split()),
    **each("cat concat stack", Cat()),
    **each("index_select", IndexSelect()),
    **each("index_copy", IndexCopy()),
    **each("index_add", IndexAdd()),
    **each("new_zeros new_ones", Filled()),
    **each("matmul bmm mm addmm baddbmm einsum scaled_dot_product_attention", ReadsAll()),
}  # fmt: skip

UNKNOWN, SIZES, PICK, ELEMENTWISE = Rule(), Sizes(), Pick(), Elementwise()
BY_KIND = {"placeholder": Input(), "get_attr": Attribute(), "output": Output()}
READS_SIZES = {aten.sym_size}


def rule_for(net: Network, node: fx.Node) -> Rule:
    """The rule of a node; the safe one for whatever the table does not know."""
    if node.op in BY_KIND:
        return BY_KIND[node.op]
    if node in net.whole:
        return UNKNOWN
    if node.target is operator.getitem:
        return PICK
    packet = getattr(node.target, "overloadpacket", None)
    if packet in READS_SIZES or (packet is None and "val" in node.meta and not has_shape(node)):
        return SIZES
    if packet in RULES:
        return RULES[packet]
    return ELEMENTWISE if is_elementwise(node) else UNKNOWN
