"""A convolution's weights as mfp's CPU kernels read them, and Winograd's transformation of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CONV_BLOCK = 16  # filters, or a depthwise conv's channels, that lie side by side in packed weights
WINOGRAD_OUT = 4  # by as many outputs at once: F(4x4, 3x3)
WINOGRAD_POINTS = (
    0.75,
    1.5,
)  # with either sign, beside 0 and infinity; known to winograd_kernels.h too


def conv2d_sizes(
    sizes: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """Height and width of a convolution's result."""
    parts = zip(sizes, kernel, stride, padding, dilation, strict=True)
    return [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in parts]


def pack_conv2d(weight: Tensor, bias: Tensor | None, groups: int = 1) -> tuple[Tensor, Tensor]:
    """A conv's weight ``[F, C / groups, H, W]`` and bias ``[F]`` as the conv ops read them.

    Returns:
        ``[F / 16, H, W, C / groups, 16]`` and ``[F]``, each group's filters filled up to a multiple of 16 with zeros.
    """
    filters = len(weight) // groups
    blocks = -(-filters // CONV_BLOCK)
    packed = weight.new_zeros((groups, blocks * CONV_BLOCK, *weight.shape[1:]))
    packed[:, :filters] = weight.unflatten(0, (groups, filters))
    packed = packed.view(groups * blocks, CONV_BLOCK, *weight.shape[1:]).permute(0, 3, 4, 2, 1).contiguous()
    full = weight.new_zeros(groups, blocks * CONV_BLOCK)
    if bias is not None:
        full[:, :filters] = bias.view(groups, filters)
    return packed, full.flatten()


def pack_grouped_conv2d(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same for narrow groups of as many filters as channels, from ``[C, C / groups, H, W]`` and ``[C]``.

    Returns:
        ``[H, W, C / groups, C]`` and ``[C]``, filled up likewise.
    """
    channels = len(weight)
    full = -(-channels // CONV_BLOCK) * CONV_BLOCK
    packed = weight.new_zeros((*weight.shape[2:], weight.shape[1], full))
    packed[..., :channels] = weight.permute(2, 3, 1, 0)
    full_bias = weight.new_zeros(full)
    if bias is not None:
        full_bias[:channels] = bias
    return packed, full_bias


def winograd_weight(weight: Tensor) -> Tensor:
    """3x3 kernels ``[F, C, 3, 3]`` at Winograd's points: ``[F, C, 6, 6]``, computed in float64 and rounded once."""
    points = _winograd_points().to(weight.device)
    return (points @ weight.double() @ points.T).to(weight.dtype)


def kernel_of_winograd(weight: Tensor) -> Tensor:
    """The 3x3 kernels that :func:`winograd_weight` has transformed, up to rounding."""
    back = torch.linalg.pinv(_winograd_points()).to(weight.device)
    return (back @ weight.double() @ back.T).to(weight.dtype)


def _winograd_points() -> Tensor:
    """[6, 3]: a kernel's polynomial at the points, divided by what interpolation through the points divides by."""
    a, b = WINOGRAD_POINTS
    points = [0.0, a, -a, b, -b]
    rows = []
    for point in points:
        divisor = 1.0
        for other in points:
            divisor *= point - other if other != point else 1.0
        rows.append([1 / divisor, point / divisor, point**2 / divisor])
    return torch.tensor([*rows, [0.0, 0.0, 1.0]], dtype=torch.float64)
