"""Images to train on, to watch training by, and to test. A sample is a pure function of (seed, epoch, index).

Because neither the order nor the augmentation depends on what was drawn before, a run that was killed goes on
bit for bit, for any number of loading workers, and each rank of a run reads its part of the same batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from mfp.errors import MfpError
from mfp.train.datasets import read_source, targets_of
from mfp.train.order import derive_seed, epoch_order, hold_out


@dataclass(frozen=True)
class ImageData:
    """A data set in views: `train` is augmented, `plain` the same images as they are, the others are other images."""

    train: SeededDataset
    plain: SeededDataset
    test: SeededDataset
    num_classes: int
    image_shape: tuple[int, int, int]  # channels, height, width
    validation: SeededDataset | None = None  # held out of the training images

    @property
    def watched(self) -> SeededDataset:
        """What each epoch is evaluated on: validation images, or the test images where none are held out."""
        return self.test if self.validation is None else self.validation

    @property
    def counts(self) -> list[int]:
        """How many images there are for training, validation and testing."""
        return [len(self.train), 0 if self.validation is None else len(self.validation), len(self.test)]

    def example(self, batch: int = 1) -> Tensor:  # [batch, C, H, W]
        """A few test images, to trace or time a network with."""
        return torch.stack([self.test[0, index % len(self.test)][0] for index in range(batch)])


class SeededDataset(Dataset):
    """Items of `source` under (epoch, index) keys; whatever draws from torch's generator, draws from (seed, key)."""

    def __init__(self, source: Dataset, transform: Callable[[Any], Tensor], seed: int) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        generator = torch.default_generator  # torchvision's transforms draw from it
        state = generator.get_state()
        try:
            generator.manual_seed(derive_seed(self.seed, "augment", epoch, index))
            image, target = self.source[index]
            return self.transform(image), target
        except OSError as error:  # a damaged or vanished file; PIL's errors are of this kind
            raise MfpError(f"cannot read {_file_of(self.source, index)}: {error}") from error
        finally:
            generator.set_state(state)


def _file_of(source: Dataset, index: int) -> str:
    while isinstance(source, Subset):
        source, index = source.dataset, source.indices[index]
    samples = getattr(source, "samples", None)  # of an ImageFolder
    return samples[index][0] if samples else f"image {index}"


class EpochBatches(Sampler):
    """The batches of one epoch from batch `start` on, as lists of (epoch, index) keys.

    A global batch is cut into equal consecutive parts, one per rank; images that do not fill a last batch are
    left to another epoch's order.
    """

    def __init__(self, length: int, batch: int, seed: int, epoch: int, start: int = 0, rank: int = 0, ranks: int = 1):
        self.length, self.batch, self.seed, self.epoch, self.start = length, batch, seed, epoch, start
        self.rank, self.ranks = rank, ranks

    def __len__(self) -> int:
        return self.length // self.batch - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = epoch_order(self.length, self.seed, self.epoch)
        part = self.batch // self.ranks
        for number in range(self.start, self.length // self.batch):
            first = number * self.batch + self.rank * part
            yield [(self.epoch, index) for index in order[first : first + part]]


class AllBatches(Sampler):
    """Every sample once, in order, dealt out over the ranks; nothing is repeated to fill up."""

    def __init__(self, length: int, batch: int, rank: int = 0, ranks: int = 1) -> None:
        self.indices = range(rank, length, ranks)
        self.batch = batch

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for first in range(0, len(self.indices), self.batch):
            yield [(0, index) for index in self.indices[first : first + self.batch]]


def spread_over(data: SeededDataset, count: int) -> SeededDataset:
    """So many of the images, spread evenly over all: a folder's stand class by class."""
    count = min(count, len(data))
    some = Subset(data.source, [number * len(data) // count for number in range(count)])
    return SeededDataset(some, data.transform, data.seed)


def make_loader(dataset: SeededDataset, batches: Sampler, workers: int = 0, pin: bool = False) -> DataLoader:
    """A DataLoader over the keys of `batches`; with workers it prefetches, two batches per worker."""
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, pin_memory=pin)


def load_data(spec: str, seed: int = 0, *, download: bool = False, validation: float = 0.0) -> ImageData:
    """The data set that a specification names.

    >>> load_data("digits").image_shape
    (3, 32, 32)

    Args:
        spec: "digits" (in scikit-learn, nothing to fetch), "fashion-mnist:PATH" (PATH holds the four idx files, packed
            or not), "cifar10:PATH" or "cifar100:PATH" (PATH holds cifar-10-batches-py or cifar-100-python),
            "imagenet:PATH" (PATH holds train/CLASS/*.jpeg and val/CLASS/*.jpeg, of any classes), "folder:PATH" (the
            same, but a fifth of the images is for testing where there is no val) or "dataset:package:function": a
            function of yours that is called without arguments and returns a dict of `train` and `test`, data sets of
            (float tensor [C, H, W], number of the class), `num_classes` and, if wanted, `augment`, a function of a
            training image. Only the last form imports code.
        seed: of the augmentation.
        download: whether Fashion-MNIST or CIFAR may be fetched into PATH.
        validation: share of the training images, of every class alike, to hold out; the same for every seed.
    Raises:
        MfpError: unknown name, missing path, damaged files, too few images for the share.
    """
    source = read_source(spec, download)
    train, held_out = source.train, None
    if validation:
        kept, held = hold_out(targets_of(train), validation)
        if not held:
            raise MfpError(f"--validation {validation} holds out none of {len(train)} training images: give more, or 0")
        train, held_out = Subset(train, kept), SeededDataset(Subset(train, held), source.plain, seed)
    return ImageData(
        train=SeededDataset(train, source.augmented, seed),
        plain=SeededDataset(train, source.plain, seed),
        test=SeededDataset(source.test, source.plain, seed),
        num_classes=source.num_classes,
        image_shape=source.image_shape,
        validation=held_out,
    )
