"""What torch is told of the ops: schemas, the reference as the implementation for any device, and fake kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mfp import reference
from mfp.conv_weights import WINOGRAD_OUT, conv2d_sizes
from mfp.layouts import memory_format_of

SCHEMAS = """
score_filters(Tensor[] weights, int[] kinds, float[] exponents, Tensor[] gradients) -> Tensor
mask_filters_(Tensor(a!)[] tensors, Tensor keep, int[] offsets, int[] rows) -> ()
prune_filters_(Tensor(a!)[] weights, Tensor(b!)[] followers, int[] follower_layers, int[] num_pruned, int[] kinds, \
float[] exponents, int chosen, Tensor[] gradients) -> (Tensor, Tensor)
masked_sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor? keep, int[] offsets, \
int[] rows, float lr, float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, \
bool first_step) -> ()
masked_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor? keep, \
int[] offsets, int[] rows, float lr, float beta1, float beta2, float eps, float weight_decay, bool maximize, \
int step) -> ()
scatter_add_(Tensor(a!) residual, Tensor branch, Tensor index, bool relu) -> ()
join_channels(Tensor? residual, Tensor branch, Tensor index, int channels) -> Tensor
take_channels(Tensor input, Tensor index) -> Tensor
conv2d(Tensor input, Tensor weights, Tensor bias, int filters, int[] stride, int[] padding, int[] dilation, \
str activation, bool winograd=False, int groups=1) -> Tensor
grouped_conv2d(Tensor input, Tensor weights, Tensor bias, int[] stride, int[] padding, int[] dilation, \
str activation) -> Tensor
pointwise_depthwise_conv2d(Tensor input, Tensor pointwise_weights, Tensor pointwise_bias, str pointwise_activation, \
int channels, Tensor weights, Tensor bias, int[] stride, int[] padding, int[] dilation, str activation) -> Tensor
conv2d_join_(Tensor(a!) residual, Tensor input, Tensor weights, Tensor bias, Tensor index, int[] stride, \
int[] padding, int[] dilation, bool relu, bool winograd=False) -> ()
batch_norm(Tensor[] inputs, Tensor scale, Tensor shift, str activation) -> Tensor
batch_norm_training_(Tensor input, Tensor weight, Tensor bias, Tensor(a!) running_mean, Tensor(b!) running_var, \
float momentum, float eps) -> (Tensor, Tensor, Tensor)
batch_norm_gradients(Tensor gradient, Tensor input, Tensor weight, Tensor mean, Tensor inverse_std) \
-> (Tensor, Tensor, Tensor)
squeeze_excite_(Tensor(a!) input, Tensor reduce_weight, Tensor reduce_bias, Tensor expand_weight, Tensor expand_bias, \
str activation, bool hard) -> ()
"""

_library = torch.library.Library("mfp", "DEF")
for _schema in SCHEMAS.strip().splitlines():
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    _name = _schema.split("(")[0]
    _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")


@torch.library.register_fake("mfp::score_filters", lib=_library)
def _(weights, kinds, exponents, gradients):
    return weights[0].new_empty((len(kinds), sum(len(weight) for weight in weights)), dtype=torch.float32)


@torch.library.register_fake("mfp::mask_filters_", lib=_library)
def _(tensors, keep, offsets, rows):
    return None


@torch.library.register_fake("mfp::prune_filters_", lib=_library)
def _(weights, followers, follower_layers, num_pruned, kinds, exponents, chosen, gradients):
    filters = sum(len(weight) for weight in weights)
    scores = weights[0].new_empty((len(kinds), filters), dtype=torch.float32)
    return scores, weights[0].new_empty((filters,), dtype=torch.bool)


@torch.library.register_fake("mfp::conv2d", lib=_library)
def _(input, weights, bias, filters, stride, padding, dilation, activation, winograd=False, groups=1):
    kernel = [size - WINOGRAD_OUT + 1 if winograd else size for size in weights.shape[1:3]]
    return _channels_last(input, filters, conv2d_sizes(input.shape[2:], kernel, stride, padding, dilation))


@torch.library.register_fake("mfp::grouped_conv2d", lib=_library)
def _(input, weights, bias, stride, padding, dilation, activation):
    sizes = conv2d_sizes(input.shape[2:], weights.shape[:2], stride, padding, dilation)
    return _channels_last(input, input.shape[1], sizes)


@torch.library.register_fake("mfp::pointwise_depthwise_conv2d", lib=_library)
def _(input, pointwise_weights, pointwise_bias, pointwise_activation, channels, weights, bias, *geometry):
    *geometry, _ = geometry
    return _channels_last(input, channels, conv2d_sizes(input.shape[2:], weights.shape[:2], *geometry))


def _channels_last(input: Tensor, channels: int, sizes: Sequence[int]) -> Tensor:
    return input.new_empty((input.shape[0], channels, *sizes)).to(memory_format=torch.channels_last)


@torch.library.register_fake("mfp::batch_norm", lib=_library)
def _(inputs, scale, shift, activation):
    return _channels_last(inputs[0], scale.shape[0], inputs[0].shape[2:])


@torch.library.register_fake("mfp::join_channels", lib=_library)
def _(residual, branch, index, channels):
    shape = (branch.shape[0], channels, *branch.shape[2:])
    like = branch if residual is None else residual
    return torch.empty(shape, dtype=branch.dtype, device=branch.device, memory_format=memory_format_of(like))


@torch.library.register_fake("mfp::take_channels", lib=_library)
def _(input, index):
    return _channels_last(input, len(index), input.shape[2:])


@torch.library.register_fake("mfp::batch_norm_training_", lib=_library)
def _(input, weight, *_):
    return _norm_results(input, weight)


@torch.library.register_fake("mfp::batch_norm_gradients", lib=_library)
def _(gradient, input, weight, *_):
    return _norm_results(input, weight)


def _norm_results(input: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    whole = _channels_last(input, input.shape[1], input.shape[2:])
    return whole, weight.new_empty(weight.shape), weight.new_empty(weight.shape)


@torch.library.register_fake("mfp::conv2d_join_", lib=_library)
@torch.library.register_fake("mfp::squeeze_excite_", lib=_library)
@torch.library.register_fake("mfp::scatter_add_", lib=_library)
@torch.library.register_fake("mfp::masked_sgd_", lib=_library)
@torch.library.register_fake("mfp::masked_adamw_", lib=_library)
def _(*arguments):
    return None
