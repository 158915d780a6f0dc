from __future__ import annotations

import pytest
import torch
from torch.utils.data import IterableDataset
from torchvision.datasets import FakeData

from mfp.errors import MfpError
from mfp.train.data import load_data


class Squares:
    """Grey squares, each with its number as value; a sequence will do as a data set."""

    def __init__(self, count, classes=3, size=8, shift=0):
        self.targets = [index % classes for index in range(count)]
        self.size, self.shift = size, shift

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return torch.full((1, self.size, self.size), float(index)), self.targets[index] + self.shift


class Random(Squares):
    """Draws in the data set itself; `augment` is there for that, but people do."""

    def __getitem__(self, index):
        image, target = super().__getitem__(index)
        return image + torch.rand(1), target


def jitter(image):
    return image + torch.rand(1)


def good():
    return {"train": Squares(30), "test": Squares(9), "num_classes": 3, "augment": jitter}


def random():
    return {"train": Random(30), "test": Random(9), "num_classes": 3}


def pairs():
    return {part: [(torch.ones(3, 4, 4), i % 2) for i in range(10)] for part in ("train", "test")} | {"num_classes": 2}


def number(view, index):
    return int(view[0, index][0][0, 0, 0])


def test_data_of_the_users_own():
    data, other = (load_data("dataset:test_user_code:good", seed, validation=0.2) for seed in (0, 1))
    assert (data.counts, data.num_classes, data.image_shape) == ([24, 6, 9], 3, (1, 8, 8))
    held = [number(data.validation, i) for i in range(6)]
    assert held == [number(other.validation, i) for i in range(6)]
    assert sorted(held + [number(data.plain, i) for i in range(24)]) == list(range(30))
    assert sorted(data.validation[0, i][1] for i in range(6)) == [0, 0, 1, 1, 2, 2]
    plain, first, second = data.plain[0, 4][0], data.train[0, 4][0], data.train[1, 4][0]
    assert 0 < (first - plain).max() < 1 and not torch.equal(first, second)
    assert torch.equal(first, load_data("dataset:test_user_code:good", validation=0.2).train[0, 4][0])


def test_a_data_set_without_targets_is_split_too():
    assert load_data("dataset:test_user_code:pairs", validation=0.3).counts == [7, 3, 10]


def test_what_a_data_set_draws_itself_depends_on_the_key_alone():
    data, same = (load_data("dataset:test_user_code:random", 3, validation=0.2) for _ in range(2))
    for view, other in ((data.train, same.train), (data.validation, same.validation), (data.test, same.test)):
        first = view[2, 1][0]
        torch.rand(5)
        assert torch.equal(other[2, 1][0], first)
        assert not torch.equal(view[3, 1][0], first)


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.zeros(1, 8, 8), 0


RETURNED = [
    (None, "returned a NoneType, not a dict of train, test and num_classes"),
    ((Squares(3), Squares(3), 3), "returned a tuple, not a dict"),
    ({"train": Squares(3), "test": Squares(3)}, "returned a dict of train, test, not of train, test, num_classes and"),
    ({**good(), "size": 8}, "returned a dict of train, test, num_classes, augment, size, not of train, test"),
    ({**good(), "num_classes": "3"}, "num_classes is '3', not a whole number from 2"),
    ({**good(), "num_classes": 1}, "num_classes is 1, not a whole number from 2"),
    ({**good(), "augment": "flip"}, "augment is a str, not a function of an image"),
    ({**good(), "train": Squares(0)}, "train is a Squares without a length, without items, or empty"),
    ({**good(), "test": Endless()}, "test is a Endless without a length, without items, or empty"),
    ({**good(), "test": {torch.zeros(1)}}, "test is a set without a length, without items, or empty"),
    ({**good(), "train": FakeData(4)}, r"train[0]: the image is a Image, not a tensor"),
    (
        {**good(), "train": [torch.zeros(3)]},
        r"train[0] is not a pair of an image and the number of its class",
    ),
    ({**good(), "train": [7]}, r"train[0] is not a pair of an image and the number of its class: cannot unpack"),
    ({**good(), "train": [(torch.zeros(3, 4, 4), 1.5)]}, r"train[0] is not a pair of an image and the number of its"),
    (
        {**good(), "train": [(torch.zeros(4, 4), 1)]},
        r"train[0]: the image is torch.float32 [4, 4], not floats",
    ),
    (
        {**good(), "train": [(torch.zeros(1, 8, 8).byte(), 1)]},
        r"train[0]: the image is torch.uint8 [1, 8, 8], not",
    ),
    ({**good(), "test": Squares(4, size=7)}, r"test[0]: the image is [1, 7, 7], the first one is [1, 8, 8]"),
    ({**good(), "test": Squares(4, shift=3)}, r"test[0]: class 3 is not one of 0 to 2"),
    ({**good(), "train": Squares(4, shift=-1)}, r"train[0]: class -1 is not one of 0 to 2"),
]


@pytest.mark.parametrize(("returned", "message"), RETURNED, ids=range(len(RETURNED)))
def test_functions_that_return_something_else(monkeypatch, returned, message):
    monkeypatch.setattr("test_user_code.good", lambda: returned)
    with pytest.raises(MfpError) as error:
        load_data("dataset:test_user_code:good")
    assert str(error.value).startswith(f"--dataset test_user_code:good: {message}")
    assert len(str(error.value).splitlines()) == 1


def test_a_later_image_that_is_wrong(monkeypatch):
    train = [(torch.zeros(1, 8, 8), 0), (torch.zeros(1, 8, 8), 3), (torch.zeros(1, 8, 9), 0)]
    monkeypatch.setattr("test_user_code.good", lambda: {"train": train, "test": Squares(3), "num_classes": 3})
    data = load_data("dataset:test_user_code:good")
    with pytest.raises(MfpError, match=r"train\[1\]: class 3 is not one of 0 to 2"):
        data.train[0, 1]
    with pytest.raises(MfpError, match=r"train\[2\]: the image is \[1, 8, 9\], the first one is \[1, 8, 8\]"):
        data.plain[0, 2]


@pytest.mark.parametrize("name", ["no_such_package_here:f", "test_user_code:nothing", "test_user_code:", "./file.py:f"])
def test_functions_that_are_not_there(name):
    with pytest.raises(MfpError, match=f"--dataset {name}: cannot find it"):
        load_data(f"dataset:{name}")


def test_something_else_than_a_function():
    with pytest.raises(MfpError, match="--dataset test_user_code:RETURNED is a list, not a function"):
        load_data("dataset:test_user_code:RETURNED")
