"""The user's own network or data, by functions named on the command line; nothing else causes an import."""

from __future__ import annotations

import importlib
import operator
import os
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from mfp.errors import MfpError


def users_function(option: str, name: str) -> Callable[..., Any]:
    """The function that --model or --dataset names, from an installed package or the working directory.

    Args:
        option: "--model" or "--dataset", for the message.
        name: "package:function".
    Raises:
        MfpError: it cannot be imported.
    """
    package, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(package), function)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise MfpError(
            f"{option} {name}: cannot find it ({error}); write package:function, importable from here"
        ) from error
    if not callable(found):
        raise MfpError(f"{option} {name} is a {type(found).__name__}, not a function")
    return found


class OwnImages(Dataset):
    """A data set of the user's own; every item is checked when it is drawn."""

    def __init__(self, source: Any, name: str, num_classes: int, shape: tuple[int, ...] | None = None) -> None:
        self.source, self.name, self.num_classes = source, name, num_classes
        self.targets = getattr(source, "targets", None)
        self.shape = shape
        self.shape = tuple(self[0][0].shape)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        item, said = self.source[index], f"{self.name}[{index}]"
        try:
            image, target = item
            target = operator.index(target)
        except (TypeError, ValueError) as error:
            raise MfpError(f"{said} is not a pair of an image and the number of its class: {error}") from error
        if not isinstance(image, Tensor):
            raise MfpError(f"{said}: the image is a {type(image).__name__}, not a tensor")
        if image.dim() != 3 or not image.is_floating_point():
            shown = f"{image.dtype} {list(image.shape)}"
            raise MfpError(f"{said}: the image is {shown}, not floats [channels, height, width]")
        if self.shape and tuple(image.shape) != self.shape:
            raise MfpError(f"{said}: the image is {list(image.shape)}, the first one is {list(self.shape)}")
        if not 0 <= target < self.num_classes:
            raise MfpError(f"{said}: class {target} is not one of 0 to {self.num_classes - 1}")
        return image, target


def read_own(function: str) -> tuple[Dataset, Dataset, int, tuple[int, ...], Callable[[Tensor], Tensor]]:
    """Training and test images, number of classes, shape of an image, and augmentation, from the user's function.

    Args:
        function: "package:function"; it is called without arguments and returns a dict: `train` and `test`, data sets
            (with a length) of pairs (float tensor [C, H, W], number of the class); `num_classes`; and, if wanted,
            `augment`, a function of a training image. A data set with `targets` is split class by class.
    Raises:
        MfpError: it cannot be imported, or returned something else.
    """
    said = f"--dataset {function}"
    returned = users_function("--dataset", function)()
    if not isinstance(returned, dict):
        raise MfpError(f"{said}: returned a {type(returned).__name__}, not a dict of train, test and num_classes")
    required = {"train", "test", "num_classes"}
    if not required <= returned.keys() <= required | {"augment"}:
        keys = ", ".join(map(str, returned))
        raise MfpError(f"{said}: returned a dict of {keys}, not of train, test, num_classes and, if wanted, augment")
    num_classes, augment = returned["num_classes"], returned.get("augment") or nn.Identity()
    if not isinstance(num_classes, int) or num_classes < 2:
        raise MfpError(f"{said}: num_classes is {num_classes!r}, not a whole number from 2")
    if not callable(augment):
        raise MfpError(f"{said}: augment is a {type(augment).__name__}, not a function of an image")
    for name in ("train", "test"):
        part = returned[name]
        try:
            usable = len(part) > 0 and hasattr(part, "__getitem__")
        except TypeError:
            usable = False
        if not usable:
            raise MfpError(f"{said}: {name} is a {type(part).__name__} without a length, without items, or empty")
    train = OwnImages(returned["train"], f"{said}: train", num_classes)
    test = OwnImages(returned["test"], f"{said}: test", num_classes, train.shape)
    return train, test, num_classes, train.shape, augment
