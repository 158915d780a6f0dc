"""Every choice of images by chance, as a pure function: the order of an epoch, and which images are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch


def derive_seed(*parts: object) -> int:
    """A 63-bit seed that depends on all parts, the same on every machine.

    >>> derive_seed(0, "order", 1) == derive_seed(0, "order", 1) != derive_seed(0, "order", 2)
    True
    """
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def epoch_order(length: int, seed: int, epoch: int) -> list[int]:
    """The order in which an epoch visits the samples: a permutation that depends on (seed, epoch) alone."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    return torch.randperm(length, generator=generator).tolist()


def hold_out(targets: Sequence[int], share: float) -> tuple[list[int], list[int]]:
    """Indices to keep and indices to hold out, both ascending; no seed of a run changes them.

    Of n images int(n * share) are held out, and of every class its share, rounded up or down.

    >>> [len(part) for part in hold_out([0] * 50 + [1] * 30, 0.1)]
    [72, 8]

    Args:
        targets: the class of every image; all alike where classes are not known.
        share: at least 0 and below 1.
    """
    order = sorted(epoch_order(len(targets), derive_seed("hold out"), 0), key=lambda index: targets[index])
    # every 1/share-th image of the classes one after another
    held = {index for place, index in enumerate(order) if int((place + 1) * share) > int(place * share)}
    return [index for index in range(len(targets)) if index not in held], sorted(held)
