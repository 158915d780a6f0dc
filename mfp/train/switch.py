"""From where the mask holds, a run goes on with the network that is left, which needs less memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from mfp.optim import MaskedSGD
from mfp.pruner import FilterPruner
from mfp.train.config import RunConfig
from mfp.train.distributed import World
from mfp.train.memory import Memory, count_memory, fewest_parts, freed_in_words
from mfp.train.progress import Reporter


class Switch:
    """Makes the network smaller once the mask holds, and on the one way again whenever the mask has grown.

    Args:
        config: the settings.
        image_shape: ``[C, H, W]``.
        autocast: makes the context in which the run computes.

    Attributes:
        small_from: the epoch from which the network was small, from 0; None: it is not.
        accumulate: parts in which a process computes its share of a batch from now on.
    """

    def __init__(
        self, config: RunConfig, image_shape: tuple[int, ...], world: World, reporter: Reporter,
        autocast: Callable[[], AbstractContextManager],
    ) -> None:  # fmt: skip
        self.config, self.image_shape = config, image_shape
        self.world, self.reporter, self.autocast = world, reporter, autocast
        self.small_from: int | None = None
        self.accumulate = config.accumulate
        self._needed: Memory | None = None  # by the network in its original shape
        self._impossible = False

    def shrink_(
        self, pruner: FilterPruner, optimizer: MaskedSGD, averaged: AveragedModel | None, epoch: int
    ) -> nn.Module:
        """The network to train on from this epoch on; where a smaller one cannot be had, says why and stays masked."""
        before = pruner.model
        if not (pruner.holds and self.config.shrink) or self._impossible:
            return before
        self._needed = self._needed or self._count(before)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            model = pruner.shrink_(optimizer, averaged=averaged)
        for warning in caught:
            self.reporter.say(f"warning: {warning.message}")
        self._impossible = bool(caught) and pruner.smaller is None
        if model is before:
            return model
        if pruner.smaller is None:  # it was smaller before
            self.small_from, optimizer.mask = None, pruner.mask
        else:
            self.small_from = epoch if self.small_from is None else self.small_from
            left = sum(parameter.numel() for parameter in model.parameters())
            goes_on = f"from epoch {epoch + 1} on with" if epoch < self.config.epochs else "at the end"
            self.reporter.say(f"{goes_on} the network that is left: {left:,} parameters")
        if self.config.compile:
            model.compile()
        self._use_memory(self._count(model))
        return model

    def _count(self, model: nn.Module) -> Memory:
        return count_memory(model, self.image_shape, self.config.momentum > 0, self.autocast)

    def _use_memory(self, now: Memory) -> None:
        """Says what is freed and, where that is asked for, computes a batch in as few parts as need no more."""
        share, parts = self.config.batch // self.world.size, self.config.accumulate
        self.reporter.say(freed_in_words(share // parts, self._needed, now))
        if self.config.lower_accumulate:
            fewest = torch.tensor(fewest_parts(share, parts, self._needed, now), device=self.world.device)
            self.world.broadcast_([fewest])
            if int(fewest) != self.accumulate:
                self.reporter.say(f"--accumulate {int(fewest)} instead of {self.accumulate}: that is room enough now")
            self.accumulate = int(fewest)
