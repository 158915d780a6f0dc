"""Every op in plain torch: the oracle in float64 by which all backends are judged, and the fallback where none runs.

Written for being right, from the formulas of the criteria; it shares no code with any kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mfp.conv_weights import kernel_of_winograd
from mfp.layouts import memory_format_of

# What an op computes of a sum that is at hand.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x, "relu": F.relu, "relu6": F.relu6, "hardswish": F.hardswish, "silu": F.silu,
}  # fmt: skip

_NORM, _DISTANCE, _COSINE_DISTANCE, _WEIGHTED_HYBRID, _TAYLOR = range(5)


def score_layer(
    weight: Tensor, kind: int, exponent: float, dtype: torch.dtype = torch.float64, gradient: Tensor | None = None
) -> Tensor:
    """Scores of one layer's filters.

    Args:
        weight: ``[N, ...]``, N filters of any shape.
        kind: a value of :class:`mfp.criteria.Kind`.
        exponent: p of norms and distances.
        dtype: in which to compute.
        gradient: of the weight; for the kind that needs it.

    Returns:
        ``[N]`` in ``dtype``.
    """
    filters = weight.detach().to(dtype).flatten(1)  # [N, K]
    if kind == _NORM:
        return torch.linalg.vector_norm(filters, exponent, dim=1)
    if kind == _TAYLOR and gradient is not None:
        return (filters * gradient.detach().to(dtype).flatten(1)).sum(1).square()
    # One filter against all at a time: [N, K] of memory, never [N, N, K], and differences that do not cancel.
    return torch.stack([relation_score(filters, j, kind, exponent) for j in range(len(filters))])


def relation_score(filters: Tensor, j: int, kind: int, exponent: float) -> Tensor:
    """Score of filter j among ``filters`` ``[N, K]`` by a distance, a scalar in their dtype."""
    if kind == _DISTANCE:
        return torch.linalg.vector_norm(filters - filters[j], exponent, dim=1).sum()
    norms = torch.linalg.vector_norm(filters, 2, dim=1)
    directions = filters / norms.where(norms != 0, 1.0)[:, None]  # an all-zero filter has no direction: cosine 0
    # 1 - cos = |u - v|^2 / 2 and 1 + cos = |u + v|^2 / 2 for unit vectors: no cancellation near +-1
    less = (directions - directions[j]).square().sum(1) / 2
    more = (directions + directions[j]).square().sum(1) / 2
    defined = (norms != 0) & (norms[j] != 0)  # NaN is not 0, and stays NaN
    if kind == _COSINE_DISTANCE:
        both_zero = (norms == 0) & (norms[j] == 0)  # duplicates of each other: distance 0
        return torch.where(defined, less, (~both_zero).to(filters.dtype)).sum()
    if kind == _WEIGHTED_HYBRID:
        share = torch.where(defined, torch.minimum(less, more), 1.0)
        share[j] = 0.0
        return norms[j] * (norms * share).sum()
    raise ValueError(f"unknown kind of criterion: {kind}")


def score_filters(
    weights: Sequence[Tensor],
    kinds: Sequence[int],
    exponents: Sequence[float],
    gradients: Sequence[Tensor] = (),
    dtype: torch.dtype = torch.float64,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The op ``mfp::score_filters``: ``[len(kinds), F]``, layers one after the other."""
    layers = list(zip(weights, gradients or [None] * len(weights), strict=True))
    rows = [
        torch.cat([score_layer(weight, kind, exponent, dtype, gradient) for weight, gradient in layers])
        for kind, exponent in zip(kinds, exponents, strict=True)
    ]
    return torch.stack(rows).to(out_dtype)


def lowest(scores: Tensor, count: int) -> Tensor:
    """Mask ``[N]`` that is False at the ``count`` lowest scores; of equal ones the lower index goes first."""
    keep = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    keep[torch.sort(scores, stable=True).indices[:count]] = False
    return keep


@torch.no_grad()
def mask_filters_(tensors: Sequence[Tensor], keep: Tensor, offsets: Sequence[int], rows: Sequence[int]) -> None:
    """The op ``mfp::mask_filters_``: rows whose filter is not kept become zero."""
    for tensor, offset, count in zip(tensors, offsets, rows, strict=True):
        pruned = ~keep[offset : offset + count]
        repeats = len(tensor) // count if count else 1
        tensor[pruned.repeat_interleave(repeats)] = 0


@torch.no_grad()
def prune_filters_(
    weights: Sequence[Tensor],
    followers: Sequence[Tensor],
    follower_layers: Sequence[int],
    num_pruned: Sequence[int],
    kinds: Sequence[int],
    exponents: Sequence[float],
    chosen: int,
    gradients: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """The op ``mfp::prune_filters_``: scores of all kinds, selection by the chosen one, zeroing."""
    scores = score_filters(weights, kinds, exponents, gradients)
    counts = [len(weight) for weight in weights]
    if not scores.isfinite().all():
        return scores, torch.ones(sum(counts), dtype=torch.bool, device=scores.device)
    parts = scores[chosen].split(counts)
    keep = torch.cat([lowest(part, count) for part, count in zip(parts, num_pruned, strict=True)])
    offsets = [sum(counts[:layer]) for layer in range(len(counts))]
    mask_filters_(weights, keep, offsets, counts)
    mask_filters_(followers, keep, [offsets[i] for i in follower_layers], [counts[i] for i in follower_layers])
    return scores, keep


def _kept_rows(tensor: Tensor, keep: Tensor | None, offset: int, rows: int) -> Tensor:
    """Which elements of a parameter take part in an optimiser step: bool, broadcastable to the tensor."""
    if keep is None or offset < 0:
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    kept = keep[offset : offset + rows].repeat_interleave(len(tensor) // rows)
    return kept.view(-1, *[1] * (tensor.dim() - 1))


@torch.no_grad()
def masked_sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    keep: Tensor | None,
    offsets: Sequence[int],
    rows: Sequence[int],
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first_step: bool,
) -> None:
    """The op ``mfp::masked_sgd_``: torch.optim.SGD's formula, computed in float32 at least, on kept rows."""
    for i, param in enumerate(params):
        kept = _kept_rows(param, keep, offsets[i], rows[i])
        wide = torch.promote_types(param.dtype, torch.float32)
        value, step = param.to(wide), grads[i].to(wide)
        step = (-step if maximize else step) + weight_decay * value
        if momentum:
            buffer = step if first_step else momentum * momentum_buffers[i].to(wide) + (1 - dampening) * step
            step = step + momentum * buffer if nesterov else buffer
            momentum_buffers[i].copy_(torch.where(kept, buffer.to(param.dtype), momentum_buffers[i]))
        param.copy_(torch.where(kept, (value - lr * step).to(param.dtype), param))


@torch.no_grad()
def masked_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    keep: Tensor | None,
    offsets: Sequence[int],
    rows: Sequence[int],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    step: int,
) -> None:
    """The op ``mfp::masked_adamw_``: Loshchilov and Hutter (arXiv 1711.05101), algorithm 2, on kept rows."""
    for i, param in enumerate(params):
        kept = _kept_rows(param, keep, offsets[i], rows[i])
        wide = torch.promote_types(param.dtype, torch.float32)
        value, gradient = param.to(wide), grads[i].to(wide) * (-1 if maximize else 1)
        mean = beta1 * exp_avgs[i].to(wide) + (1 - beta1) * gradient
        square = beta2 * exp_avg_sqs[i].to(wide) + (1 - beta2) * gradient.square()
        scale = (square / (1 - beta2**step)).sqrt() + eps
        value = value - lr * weight_decay * value - lr * mean / (1 - beta1**step) / scale
        for target, new in ((param, value), (exp_avgs[i], mean), (exp_avg_sqs[i], square)):
            target.copy_(torch.where(kept, new.to(target.dtype), target))


@torch.no_grad()
def scatter_add_(residual: Tensor, branch: Tensor, index: Tensor, relu: bool) -> None:
    """The op ``mfp::scatter_add_``: sums in float32 at least, rounded once."""
    wide = torch.promote_types(residual.dtype, torch.float32)
    result = residual.to(wide).index_add(1, index, branch.to(wide))
    residual.copy_(result.clamp(min=0) if relu else result)


def join_channels(residual: Tensor | None, branch: Tensor, index: Tensor, channels: int) -> Tensor:
    """The op ``mfp::join_channels``."""
    like = branch if residual is None else residual
    shape = (branch.shape[0], channels, *branch.shape[2:])
    out = torch.zeros(shape, dtype=branch.dtype, device=branch.device).contiguous(memory_format=memory_format_of(like))
    if residual is not None:
        out.copy_(residual)
    scatter_add_(out, branch, index, False)
    return out


def take_channels(input: Tensor, index: Tensor) -> Tensor:
    """The op ``mfp::take_channels``."""
    return input.index_select(1, index).contiguous(memory_format=torch.channels_last)


def conv2d(
    input: Tensor,
    weights: Tensor,
    bias: Tensor,
    filters: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    winograd: bool = False,
    groups: int = 1,
) -> Tensor:
    """The op ``mfp::conv2d``."""
    by_filter = weights.permute(0, 4, 3, 1, 2).unflatten(0, (groups, -1)).flatten(1, 2)
    plain = by_filter[:, : filters // groups].flatten(0, 1)  # [F, C / groups, H, W]
    plain = kernel_of_winograd(plain) if winograd else plain
    plain_bias = bias.view(groups, -1)[:, : filters // groups].flatten()
    out = F.conv2d(input, plain, plain_bias, stride, padding, dilation, groups)
    return ACTIVATIONS[activation](out).contiguous(memory_format=torch.channels_last)


def grouped_conv2d(
    input: Tensor,
    weights: Tensor,
    bias: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
) -> Tensor:
    """The op ``mfp::grouped_conv2d``."""
    channels = input.shape[1]
    plain = weights[..., :channels].permute(3, 2, 0, 1)  # [C, C / groups, H, W]
    out = F.conv2d(input, plain, bias[:channels], stride, padding, dilation, channels // plain.shape[1])
    return ACTIVATIONS[activation](out).contiguous(memory_format=torch.channels_last)


def pointwise_depthwise_conv2d(
    input: Tensor,
    pointwise_weights: Tensor,
    pointwise_bias: Tensor,
    pointwise_activation: str,
    channels: int,
    weights: Tensor,
    bias: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
) -> Tensor:
    """The op ``mfp::pointwise_depthwise_conv2d``."""
    geometry = (1, 1), (0, 0), (1, 1)
    between = conv2d(input, pointwise_weights, pointwise_bias, channels, *geometry, pointwise_activation)
    return grouped_conv2d(between, weights, bias, stride, padding, dilation, activation)


def conv2d_join_(
    residual: Tensor,
    input: Tensor,
    weights: Tensor,
    bias: Tensor,
    index: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    relu: bool,
    winograd: bool = False,
) -> None:
    """The op ``mfp::conv2d_join_``."""
    branch = conv2d(input, weights, bias, len(index), stride, padding, dilation, "none", winograd)
    scatter_add_(residual, branch, index, relu)


def batch_norm(inputs: Sequence[Tensor], scale: Tensor, shift: Tensor, activation: str) -> Tensor:
    """The op ``mfp::batch_norm``."""
    out = torch.cat(list(inputs), 1) * scale[:, None, None] + shift[:, None, None]
    return ACTIVATIONS[activation](out).contiguous(memory_format=torch.channels_last)


def batch_norm_training_(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op ``mfp::batch_norm_training_``."""
    var, mean = torch.var_mean(input, (0, 2, 3), correction=0)
    values = input.numel() // input.shape[1]
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(var * (values / (values - 1)), momentum)
    inverse_std = (var + eps).rsqrt()
    out = (input - mean[:, None, None]) * (weight * inverse_std)[:, None, None] + bias[:, None, None]
    return out.contiguous(memory_format=torch.channels_last), mean, inverse_std


def batch_norm_gradients(
    gradient: Tensor, input: Tensor, weight: Tensor, mean: Tensor, inverse_std: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The op ``mfp::batch_norm_gradients``."""
    normal = (input - mean[:, None, None]) * inverse_std[:, None, None]
    of_weight, of_bias = (gradient * normal).sum((0, 2, 3)), gradient.sum((0, 2, 3))
    values = input.numel() // input.shape[1]
    rest = gradient - (of_bias[:, None, None] + normal * of_weight[:, None, None]) / values
    of_input = rest * (weight * inverse_std)[:, None, None]
    return of_input.contiguous(memory_format=torch.channels_last), of_weight, of_bias


def squeeze_excite_(
    input: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    activation: str,
    hard: bool,
) -> None:
    """The op ``mfp::squeeze_excite_``."""
    hidden = ACTIVATIONS[activation](F.linear(input.mean((2, 3)), reduce_weight, reduce_bias))
    gates = F.linear(hidden, expand_weight.T, expand_bias)
    input.mul_((F.hardsigmoid(gates) if hard else gates.sigmoid())[:, :, None, None])
