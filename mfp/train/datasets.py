"""The data sets that are known by name, each read by torchvision where it can; and the user's own.

Nothing is unpickled but CIFAR's published batches, which torchvision reads only after their md5 were found right.
"""

from __future__ import annotations

import contextlib
import gzip
import math
import operator
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from mfp.errors import MfpError, did_you_mean
from mfp.train.order import epoch_order, hold_out
from mfp.train.user_code import read_own

CIFAR10_STATISTICS = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
CIFAR100_STATISTICS = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DIGITS_STATISTICS = (0.3047, 0.3232)
FASHION_STATISTICS = (0.2860, 0.3530)
DIGITS_TEST = 360  # of 1,797; the rest is for training
FOLDER_TEST = 0.2  # of the images of a folder that has no others to test on
LARGEST_IDX = 2**30  # bytes: what a few packed bytes can grow to has a limit
KNOWN = "digits, fashion-mnist:PATH, cifar10:PATH, cifar100:PATH, imagenet:PATH, folder:PATH"
OWN = "dataset:"  # and package:function: what --dataset makes of its value


@dataclass(frozen=True)
class Source:
    """Images and their classes as they are stored, and what makes tensors [C, H, W] of them."""

    train: Dataset
    test: Dataset
    num_classes: int
    image_shape: tuple[int, int, int]  # channels, height, width
    augmented: Callable[[Any], Tensor]
    plain: Callable[[Any], Tensor]


def read_source(spec: str, download: bool = False) -> Source:
    """The data that a specification names: see ``mfp.train.data.load_data``.

    Raises:
        MfpError: unknown name, missing path, damaged files.
    """
    if spec.startswith(OWN):
        return Source(*read_own(spec.removeprefix(OWN)), nn.Identity())
    name, separator, path = spec.partition(":")
    if name == "digits" and not separator:
        return _digits()
    readers = {
        "fashion-mnist": lambda folder: _fashion_mnist(folder, download),
        "cifar10": lambda folder: _cifar("CIFAR10", "CIFAR-10", folder, CIFAR10_STATISTICS, 10, download),
        "cifar100": lambda folder: _cifar("CIFAR100", "CIFAR-100", folder, CIFAR100_STATISTICS, 100, download),
        "imagenet": lambda folder: _folder("imagenet", folder),
        "folder": lambda folder: _folder("folder", folder),
    }
    if name not in readers:
        near = did_you_mean(name, ("digits", *readers))
        raise MfpError(f"unknown data {spec!r}; known are {KNOWN}, and --dataset package:function{near}")
    if not path:
        raise MfpError(f"data {spec!r} needs a folder: {name}:PATH")
    return readers[name](Path(path))


def short_name(spec: str) -> str:
    """What a run directory and a table call the data of a specification.

    >>> short_name("cifar10:/data/cifar"), short_name("dataset:flowers.data:load")
    ('cifar10', 'load')
    """
    return spec.rpartition(":")[2] if spec.startswith(OWN) else spec.partition(":")[0]


def targets_of(dataset: Dataset) -> list[int]:
    """The class of every image where a data set tells it without reading the images, else zeros."""
    targets = getattr(dataset, "targets", None)
    if isinstance(dataset, Subset):
        inner = targets_of(dataset.dataset)
        return [inner[index] for index in dataset.indices]
    try:
        found = [operator.index(target) for target in targets]
    except TypeError:  # another kind of targets, of a data set of the user's own
        found = []
    return found if len(found) == len(dataset) else [0] * len(dataset)


class GreyImages(Dataset):
    """Images [N, H, W] with values from 0 to 1, normalised once and kept in memory; three equal channels each."""

    def __init__(self, images: Tensor, targets: Sequence[int], statistics: tuple[float, float]) -> None:
        self.images, self.targets = _normalised(images[:, None], statistics), list(targets)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index].expand(3, -1, -1), self.targets[index]


def _source(train, test, augment: list, plain: list, statistics, num_classes: int, size: int) -> Source:
    from torchvision.transforms import v2

    finish = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*statistics)]
    augmented, plainly = v2.Compose([*augment, *finish]), v2.Compose([*plain, *finish])
    return Source(train, test, num_classes, (3, size, size), augmented, plainly)


def _normalised(images: Tensor, statistics: tuple[float, float]) -> Tensor:
    mean, deviation = statistics
    return (images - mean) / deviation


def _grey_source(train, test, size: int, padding: int, flip: bool, statistics: tuple[float, float]) -> Source:
    from torchvision.transforms import v2

    black = _normalised(torch.zeros(()), statistics).item()
    augment = [v2.RandomCrop(size, padding, fill=black)]
    augment += [v2.RandomHorizontalFlip()] * flip
    return Source(train, test, 10, (3, size, size), v2.Compose(augment), nn.Identity())


def _digits() -> Source:
    """scikit-learn's digits (8x8, 17 grey levels) as 32x32 images in three equal channels, as in CIFAR."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MfpError("the data 'digits' comes with scikit-learn: pip install 'mfp[train]'") from error
    bunch = load_digits()
    small = torch.from_numpy(bunch.images / 16).float()[:, None]  # [1797, 1, 8, 8]
    large = nn.functional.interpolate(small, size=(32, 32), mode="bilinear")[:, 0]
    images = GreyImages(large, bunch.target.tolist(), DIGITS_STATISTICS)
    order = epoch_order(len(images), seed=0, epoch=0)  # the test images are the same for every seed of a run
    parts = Subset(images, order[DIGITS_TEST:]), Subset(images, order[:DIGITS_TEST])
    return _grey_source(*parts, size=32, padding=4, flip=False, statistics=DIGITS_STATISTICS)


def _fashion_mnist(path: Path, download: bool) -> Source:
    from torchvision.datasets import FashionMNIST

    folder, raw = path, path / "FashionMNIST" / "raw"  # where torchvision puts what it fetches
    if not _idx_file(path, "train-images-idx3-ubyte") and (download or raw.is_dir()):
        folder = raw
    if download and folder == raw:
        try:
            with contextlib.suppress(AssertionError, TypeError, ValueError):  # of files that are there and damaged
                FashionMNIST(path, download=True)
        except (RuntimeError, OSError) as error:
            raise MfpError(f"cannot fetch Fashion-MNIST into {path}: {' '.join(str(error).split())}") from error
    parts = []
    for part in ("train", "t10k"):
        images, labels = (_read_idx(folder, f"{part}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
        if not len(images) or images.shape[1:] != (28, 28) or len(images) != len(labels) or labels.max() > 9:
            largest = f"the largest {labels.max()}" if len(labels) else "none"
            raise MfpError(
                f"{folder}: the {part} files hold images {list(images.shape)} and {len(labels)} labels, {largest}; "
                "Fashion-MNIST's are [N, 28, 28] and N, none above 9"
            )
        parts.append(GreyImages(torch.from_numpy(images) / 255, labels.tolist(), FASHION_STATISTICS))
    return _grey_source(*parts, size=28, padding=2, flip=True, statistics=FASHION_STATISTICS)


def _idx_file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _read_idx(folder: Path, name: str) -> np.ndarray:
    """An idx file of bytes, packed or not (torchvision reads unpacked ones alone, and asserts instead of saying)."""
    path = _idx_file(folder, name)
    if path is None:
        raise MfpError(
            f"no file {folder / name} or {name}.gz: PATH in fashion-mnist:PATH holds it; --download fetches it"
        )
    dimensions = int(name[-7])
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            header = np.frombuffer(file.read(4 + 4 * dimensions), ">u4")
            shape = tuple(map(int, header[1:]))
            size = math.prod(shape)
            if len(shape) != dimensions or header[0] != 0x800 + dimensions or size > LARGEST_IDX:
                raise MfpError(f"{path} is not an idx file of bytes with {dimensions} dimensions, below 1 GiB")
            data = file.read(size + 1)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise MfpError(f"cannot read {path}, it is damaged or cut short: {error}") from error
    if len(data) != size:
        found = "more" if len(data) > size else "fewer"
        raise MfpError(f"{path} holds {found} than the {size:,} bytes that its header tells, {list(shape)}")
    return np.frombuffer(bytearray(data), np.uint8).reshape(shape)


def _cifar(kind: str, title: str, path: Path, statistics, num_classes: int, download: bool) -> Source:
    from torchvision import datasets
    from torchvision.transforms import v2

    reader = getattr(datasets, kind)
    folder = path / reader.base_folder
    if not download and not folder.is_dir():
        raise MfpError(f"no folder {folder}: PATH in {kind.lower()}:PATH holds it; --download fetches it")
    try:
        train, test = (reader(path, train=train, download=download) for train in (True, False))
    except (RuntimeError, OSError) as error:  # torchvision checks every file's md5 before it reads it
        raise MfpError(f"{title} in {path} is incomplete or damaged (its checksums differ): {error}") from error
    augment = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]
    return _source(train, test, augment, [], statistics, num_classes, 32)


def _folder(name: str, path: Path) -> Source:
    """PATH/train/CLASS/* and PATH/val/CLASS/*; of a `folder`, a fifth of the images tests where val is missing."""
    from torchvision.transforms import v2

    has_val = (path / "val").is_dir() or name == "imagenet"
    parts = [_image_folder(name, path, part) for part in ("train", "val")[: 1 + has_val]]
    train, classes = parts[0], parts[0].classes
    if len(classes) < 2:
        raise MfpError(f"{path / 'train'} has one class, {classes[0]}: there must be a folder for each of two or more")
    if has_val and classes != parts[1].classes:
        odd = sorted(set(classes) ^ set(parts[1].classes))
        raise MfpError(f"{path}: train and val have different classes; only in one of them: {', '.join(odd[:5])}")
    if not has_val:
        parts = [Subset(train, indices) for indices in hold_out(train.targets, FOLDER_TEST)]
        if not len(parts[1]):
            raise MfpError(f"{path}: {len(train)} images are too few to keep a fifth for testing, and there is no val")
    augment, plain = [v2.RandomResizedCrop(224), v2.RandomHorizontalFlip()], [v2.Resize(256), v2.CenterCrop(224)]
    return _source(*parts, augment, plain, IMAGENET_STATISTICS, len(classes), 224)


def _image_folder(name: str, path: Path, part: str):
    from torchvision.datasets import ImageFolder

    if not (path / part).is_dir():
        needed = "PATH/train/CLASS/* and PATH/val/CLASS/*" if name == "imagenet" else "PATH/train/CLASS/*"
        raise MfpError(f"no folder {path / part}: {name}:PATH needs {needed}")
    try:
        return ImageFolder(path / part)
    except OSError as error:  # FileNotFoundError where a class has no image
        raise MfpError(f"{path}: {error}") from error
