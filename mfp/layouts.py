"""How tensors lie in memory: rows without gaps, channels innermost or not."""

from __future__ import annotations

import torch
from torch import Tensor


def is_row_dense(tensor: Tensor) -> bool:
    """Whether every row ``tensor[j]`` is one dense block and the blocks follow each other without gaps.

    True for contiguous and channels_last weights alike; such a filter needs no copy, whatever its layout.
    """
    if tensor.is_contiguous():
        return True
    row = tensor.numel() // max(len(tensor), 1)
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride()[1:], tensor.shape[1:], strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return len(tensor) <= 1 or tensor.stride(0) == row


def memory_format_of(x: Tensor) -> torch.memory_format:
    """channels_last for what is not contiguous, where it has one."""
    if x.is_contiguous() or x.dim() not in (4, 5):
        return torch.contiguous_format
    return torch.channels_last if x.dim() == 4 else torch.channels_last_3d
