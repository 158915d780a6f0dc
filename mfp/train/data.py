"""Images by name: digits, cifar10:PATH, imagenet:PATH. A sample is a pure function of (seed, epoch, index).

Because neither the order nor the augmentation depends on what was drawn before, a run that was killed goes on
bit for bit, for any number of loading workers, and each rank of a run reads its part of the same batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mfp.errors import MfpError

CIFAR10_STATISTICS = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DIGITS_STATISTICS = ((0.3047,) * 3, (0.3232,) * 3)
DIGITS_TEST = 360  # of 1,797; the rest is for training
KNOWN = "digits, cifar10:PATH, imagenet:PATH"


@dataclass(frozen=True)
class ImageData:
    """A data set in three views: `train` is augmented, `plain` the same images as they are, `test` others."""

    train: SeededDataset
    plain: SeededDataset
    test: SeededDataset
    num_classes: int
    image_shape: tuple[int, int, int]  # channels, height, width

    def example(self, batch: int = 1) -> Tensor:  # [batch, C, H, W]
        """A few test images, to trace or time a network with."""
        return torch.stack([self.test[0, index % len(self.test)][0] for index in range(batch)])


class SeededDataset(Dataset):
    """Items of `source` under (epoch, index) keys; the transform draws from a seed made of them."""

    def __init__(self, source, transform, seed: int, random: bool = False) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed
        self.random = random

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        try:
            image, target = self.source[index]
        except OSError as error:  # a damaged or vanished file; PIL's errors are of this kind
            path = getattr(self.source, "samples", {index: ("image", 0)})[index][0]
            raise MfpError(f"cannot read {path}: {error}") from error
        if not self.random:
            return self.transform(image), target
        generator = torch.default_generator  # torchvision's transforms draw from it
        state = generator.get_state()
        try:
            generator.manual_seed(derive_seed(self.seed, "augment", epoch, index))
            return self.transform(image), target
        finally:
            generator.set_state(state)


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


def make_loader(dataset: SeededDataset, batches: Sampler, workers: int = 0, pin: bool = False) -> DataLoader:
    """A DataLoader over the keys of `batches`; with workers it prefetches, two batches per worker."""
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, pin_memory=pin)


def load_data(spec: str, seed: int = 0, *, download: bool = False) -> ImageData:
    """The data set that a specification names.

    >>> load_data("digits").image_shape
    (3, 32, 32)

    Args:
        spec: "digits" (in scikit-learn, nothing to fetch), "cifar10:PATH" (PATH holds cifar-10-batches-py) or
            "imagenet:PATH" (PATH holds train/CLASS/*.jpeg and val/CLASS/*.jpeg, of any classes).
        seed: of the augmentation.
        download: whether CIFAR-10 may be fetched into PATH.
    Raises:
        MfpError: unknown name, missing path, damaged files.
    """
    name, separator, path = spec.partition(":")
    if name == "digits" and not separator:
        return _digits(seed)
    if name not in ("cifar10", "imagenet"):
        raise MfpError(f"unknown data {spec!r}; known are {KNOWN}")
    if not path:
        raise MfpError(f"data {spec!r} needs a folder: {name}:PATH")
    return _cifar10(Path(path), seed, download) if name == "cifar10" else _imagenet(Path(path), seed)


def _views(train, test, augment: list, plain: list, statistics, num_classes: int, size: int, seed: int) -> ImageData:
    from torchvision.transforms import v2

    finish = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*statistics)]
    plainly = v2.Compose([*plain, *finish])
    return ImageData(
        train=SeededDataset(train, v2.Compose([*augment, *finish]), seed, random=True),
        plain=SeededDataset(train, plainly, seed),
        test=SeededDataset(test, plainly, seed),
        num_classes=num_classes,
        image_shape=(3, size, size),
    )


def _digits(seed: int) -> ImageData:
    """scikit-learn's digits (8x8, 17 grey levels) as 32x32 images in three equal channels, as in CIFAR."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MfpError("the data 'digits' comes with scikit-learn: pip install 'mfp[train]'") from error
    from torchvision.transforms import v2

    bunch = load_digits()
    small = torch.from_numpy(bunch.images / 16).float()[:, None]  # [1797, 1, 8, 8]
    images = torch.nn.functional.interpolate(small, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1)
    targets = bunch.target.tolist()
    order = epoch_order(len(targets), seed=0, epoch=0)  # the split is the same for every seed of a run
    parts = [
        [(images[i], targets[i]) for i in order[DIGITS_TEST:]],
        [(images[i], targets[i]) for i in order[:DIGITS_TEST]],
    ]
    augment = [v2.RandomCrop(32, padding=4)]
    return _views(*parts, augment, [], DIGITS_STATISTICS, 10, 32, seed)


def _cifar10(path: Path, seed: int, download: bool) -> ImageData:
    from torchvision.datasets import CIFAR10
    from torchvision.transforms import v2

    if not download and not (path / CIFAR10.base_folder).is_dir():
        raise MfpError(f"no folder {path / CIFAR10.base_folder}: PATH in cifar10:PATH holds it; --download fetches it")
    try:
        train, test = (CIFAR10(path, train=train, download=download) for train in (True, False))
    except (RuntimeError, OSError) as error:  # torchvision checks every file's md5 before it reads it
        raise MfpError(f"CIFAR-10 in {path} is incomplete or damaged (its checksums differ): {error}") from error
    augment = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]
    return _views(train, test, augment, [], CIFAR10_STATISTICS, 10, 32, seed)


def _imagenet(path: Path, seed: int) -> ImageData:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    for part in ("train", "val"):
        if not (path / part).is_dir():
            raise MfpError(f"no folder {path / part}: imagenet:PATH needs PATH/train/CLASS/* and PATH/val/CLASS/*")
    try:
        train, test = ImageFolder(path / "train"), ImageFolder(path / "val")
    except (FileNotFoundError, OSError) as error:
        raise MfpError(f"{path}: {error}") from error
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise MfpError(f"{path}: train and val have different classes; only in one of them: {', '.join(odd[:5])}")
    augment = [v2.RandomResizedCrop(224), v2.RandomHorizontalFlip()]
    return _views(
        train,
        test,
        augment,
        [v2.Resize(256), v2.CenterCrop(224)],
        IMAGENET_STATISTICS,
        len(train.classes),
        224,
        seed,
    )
