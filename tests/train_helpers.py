"""A network and a data set so small that a whole run takes a fraction of a second."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import Subset

import mfp
from mfp.train import engine
from mfp.train.checkpoints import digest_of, save_checkpoint
from mfp.train.config import RunConfig
from mfp.train.data import ImageData, SeededDataset, load_data
from mfp.train.distributed import World
from mfp.train.engine import Trainer
from mfp.train.progress import Reporter
from mfp.train.run import calibration_batches


class TinyNet(nn.Module):
    """Two convolutions with BatchNorm, and a dropout that makes every step depend on the random state."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 5, stride=4, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3, bias=False)
        self.bn2 = nn.BatchNorm2d(12)
        self.dropout = nn.Dropout(0.1)
        self.fc = nn.Linear(12, num_classes)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.fc(self.dropout(torch.flatten(torch.nn.functional.adaptive_avg_pool2d(x, 1), 1)))


def tiny_data(train: int = 48, test: int = 20, seed: int = 0) -> ImageData:
    """The first few digits, with the real augmentation."""
    data = load_data("digits", seed)

    def part(view: SeededDataset, size: int) -> SeededDataset:
        return SeededDataset(Subset(view.source, range(size)), view.transform, view.seed)

    return ImageData(part(data.train, train), part(data.plain, train), part(data.test, test), 10, data.image_shape)


def few_digits() -> dict:
    """What `--dataset train_helpers:few_digits` gives."""
    from torchvision.transforms import v2

    data = load_data("digits")
    parts = {"train": [data.plain[0, i] for i in range(64)], "test": [data.test[0, i] for i in range(20)]}
    return {**parts, "num_classes": 10, "augment": v2.RandomCrop(32, padding=4)}


def few_grey() -> dict:
    """Images of one channel, which no network of a known name takes."""
    images = [(torch.zeros(1, 32, 32), number % 2) for number in range(20)]
    return {"train": images, "test": images, "num_classes": 2}


def tiny_config(**settings) -> RunConfig:
    return RunConfig(
        **{
            "epochs": 2,
            "batch": 12,
            "lr": 0.05,
            "calibration_batches": 2,
            "channels_last": False,
            "recalibrate": False,  # needs a graph for every trainer: the tests that are about it say so
            "settle": 0.0,
            "clip": 0.0,
            **settings,
        }
    )


def tiny_trainer(
    directory: Path, config: RunConfig, data: ImageData, *, prune: bool = True, world: World | None = None
) -> Trainer:
    """A trainer in its starting state, the same each time."""
    world = world or World()
    torch.manual_seed(7)
    model = TinyNet().to(world.device)
    pruner = None
    if prune:
        pruner = mfp.FilterPruner(
            model, config.rate, criteria=config.criteria, attribute=config.attribute, mode=config.mode,
            calibration=calibration_batches(config, data, world), interval=config.interval,
            epochs=config.choosing_epochs, mask_bn=config.mask_bn, recalibrate=config.recalibrate,
            allocate=config.allocates, one_way=config.one_way,
        )  # fmt: skip
    return Trainer(config, data, model, directory, pruner, world, Reporter(quiet=True))


def essence(trainer: Trainer) -> str:
    """A digest of all that must come out the same; the history without what a clock measured."""
    state = trainer.state()
    clocked = ("seconds", "images_per_second", "share_")
    state["history"] = [{k: v for k, v in row.items() if not k.startswith(clocked)} for row in state["history"]]
    return digest_of(state)


@contextlib.contextmanager
def copied_checkpoints(directory: Path) -> Iterator[list[Path]]:
    """Fills a list with one run directory for each checkpoint that is written, which holds that one alone."""
    copies: list[Path] = []

    def save_and_copy(own: Path, step: int, state: dict) -> Path:
        path = save_checkpoint(own, step, state)
        copies.append(directory / path.stem)
        copies[-1].mkdir(parents=True)
        shutil.copy(path, copies[-1])
        return path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "save_checkpoint", save_and_copy)
        yield copies


def cut_and_resumed(directory: Path, config: RunConfig, data: ImageData, *, which: slice = slice(None)) -> Trainer:
    """A whole run of eight steps, which ends with the same bits when it is resumed from any of its checkpoints.

    Args:
        which: of the checkpoints.
    """
    whole = tiny_trainer(directory / "whole", config, data)
    with copied_checkpoints(directory / "copies") as cuts:
        whole.fit()
    assert len(cuts) == 8
    for cut in cuts[which]:
        resumed = tiny_trainer(cut, config, data)
        assert resumed.resume()
        assert essence(resumed) != essence(whole) or cut == cuts[-1]
        resumed.fit()
        assert essence(resumed) == essence(whole), cut.name
    return whole


@pytest.fixture(scope="module")
def one_thread():
    """Bits depend on the number of threads, and forked processes must not need threads that they do not have."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
