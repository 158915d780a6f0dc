"""What a training step holds in memory, counted on the network itself; and in how many parts a batch then fits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


@dataclass(frozen=True)
class Memory:
    """Bytes that a process needs for a training step.

    Attributes:
        activations: per image, what the forward pass keeps for the backward pass.
        weights: with gradients and momentum.
    """

    activations: float
    weights: int


def count_memory(
    model: nn.Module, shape: tuple[int, ...], momentum: bool, autocast: Callable[[], AbstractContextManager]
) -> Memory:
    """Counted without a trace: on a copy in training mode, uncompiled; what libraries need besides is not seen.

    Args:
        shape: of an image, ``[C, H, W]``. Activations are what two images more take (weights are cast once for all).
        momentum: whether the optimiser keeps any.
        autocast: makes the context in which the run computes.
    """
    network = copy.deepcopy(model).train()
    device = next(network.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
        two, four = (_kept(network, torch.zeros(n, *shape, device=device), autocast) for n in (2, 4))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return Memory((four - two) / 2, weights * (3 if momentum else 2))


def _kept(network: nn.Module, images: Tensor, autocast: Callable[[], AbstractContextManager]) -> int:
    """Bytes that a forward pass keeps for the backward pass."""
    found: dict[int, int] = {}  # by address: what is kept stays where it is

    def keep(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor), autocast():
        _outputs = network(images)  # alive until all is counted
    return sum(found.values())


def fewest_parts(images: int, parts: int, before: Memory, after: Memory) -> int:
    """The smallest number of equal parts of so many images that keeps no more activations than ``parts`` did before."""
    room = images // parts * before.activations
    fitting = (n for n in range(1, parts) if images % n == 0 and images // n * after.activations <= room)
    return next(fitting, parts)


def freed_in_words(images: int, before: Memory, after: Memory) -> str:
    """What is freed where so many images are computed at once."""
    kept, left = (images * memory.activations / 1e6 for memory in (before, after))
    weights, fewer = (memory.weights / 1e6 for memory in (before, after))
    return (
        f"memory freed: {kept - left:,.2f} of {kept:,.2f} MB of activations (of {images} images, for the backward "
        f"pass), {weights - fewer:,.2f} of {weights:,.2f} MB of weights, gradients and momentum"
    )
