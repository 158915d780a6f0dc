"""scatter_add_: residual += branch at some channels, then ReLU if asked, in one pass over memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfp.kernels.table import launcher

_BLOCK = 1024


@triton.jit(do_not_specialize=["numel", "channels", "branch_channels", "inner", "steps"])
def _scatter_kernel(
    residual, branch, index, numel, channels, branch_channels, inner, steps, RELU: tl.constexpr, BLOCK: tl.constexpr
):
    """Dense tensors seen as [outer, channels, inner]; with a ReLU every residual element, else every branch element."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < numel
    if RELU:
        channel = element // inner % channels
        low = tl.zeros([BLOCK], tl.int64)  # first position of the index that is not below the channel
        high = low + branch_channels
        for _ in range(steps):
            middle = (low + high) // 2
            searching = low < high
            below = tl.load(index + middle, mask=inside & searching, other=0) < channel
            low = tl.where(searching & below, middle + 1, low)
            high = tl.where(searching & ~below, middle, high)
        found = inside & (low < branch_channels)
        found = found & (tl.load(index + low, mask=found, other=-1) == channel)
        outer = element // (inner * channels)
        source = (outer * branch_channels + low) * inner + element % inner
        value = tl.load(residual + element, mask=inside).to(tl.float32)
        value += tl.load(branch + source, mask=found, other=0.0).to(tl.float32)
        value = tl.where(value < 0.0, 0.0, value)  # keeps a NaN, as torch.relu does
        tl.store(residual + element, value.to(residual.dtype.element_ty), mask=inside)
    else:
        channel = tl.load(index + element // inner % branch_channels, mask=inside, other=0)
        outer = element // (inner * branch_channels)
        target = (outer * channels + channel) * inner + element % inner
        value = tl.load(residual + target, mask=inside).to(tl.float32)
        value += tl.load(branch + element, mask=inside, other=0.0).to(tl.float32)
        tl.store(residual + target, value.to(residual.dtype.element_ty), mask=inside)


@launcher
def scatter_add_(residual: Tensor, branch: Tensor, index: Tensor, relu: bool) -> None:
    """``residual[:, index] += branch``, then ReLU if ``relu``; ``index`` is strictly increasing."""
    last = not residual.is_contiguous()
    layout = torch.channels_last_3d if residual.dim() == 5 else torch.channels_last
    if last and not residual.is_contiguous(memory_format=layout):
        raise RuntimeError(
            f"scatter_add_: residual has strides {residual.stride()}; expected contiguous or channels_last"
        )
    source = branch.contiguous(memory_format=layout if last else torch.contiguous_format)
    numel = residual.numel() if relu else source.numel()
    if numel == 0:
        return
    channels, branch_channels = residual.shape[1], branch.shape[1]
    inner = 1 if last else residual.numel() // (residual.shape[0] * channels)
    _scatter_kernel[(triton.cdiv(numel, _BLOCK),)](
        residual, source, index, numel, channels, branch_channels, inner, branch_channels.bit_length(), RELU=relu,
        BLOCK=_BLOCK,
    )  # fmt: skip
    torch.autograd.graph.increment_version(residual)  # autograd notices that it was changed
