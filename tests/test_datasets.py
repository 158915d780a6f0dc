from __future__ import annotations

import hashlib
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from mfp.errors import MfpError
from mfp.train.data import load_data


def write_cifar10(root, monkeypatch, per_file=6):
    """The real layout: pickled batches with rows of 3072 bytes, and their md5 in torchvision's tables."""
    folder = root / CIFAR10.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    def batch():
        return {
            "data": rng.integers(0, 256, (per_file, 3072), dtype=np.uint8),
            "labels": [i % 10 for i in range(per_file)],
        }

    monkeypatch.setattr(CIFAR10, "train_list", [[name, write(name, batch())] for name, _ in CIFAR10.train_list])
    monkeypatch.setattr(CIFAR10, "test_list", [[name, write(name, batch())] for name, _ in CIFAR10.test_list])
    digest = write("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": digest})
    return folder


def test_cifar10_from_its_own_format(tmp_path, monkeypatch):
    folder = write_cifar10(tmp_path, monkeypatch)
    data = load_data(f"cifar10:{tmp_path}")
    assert (len(data.train), len(data.test), data.num_classes) == (30, 6, 10)
    image, target = data.test[0, 4]
    assert target == 4
    stored = pickle.loads((folder / "test_batch").read_bytes())["data"][4].reshape(3, 32, 32) / 255
    expected = (torch.from_numpy(stored).float() - torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)) / torch.tensor(
        [0.2470, 0.2435, 0.2616]
    ).view(3, 1, 1)
    torch.testing.assert_close(image, expected)
    assert data.train[0, 0][0].shape == (3, 32, 32)


def test_cifar10_damaged(tmp_path, monkeypatch):
    folder = write_cifar10(tmp_path, monkeypatch)
    (folder / "data_batch_3").write_bytes(b"no longer what it was")
    with pytest.raises(MfpError, match="CIFAR-10 in .* is incomplete or damaged"):
        load_data(f"cifar10:{tmp_path}")


def write_imagenet(root, classes=("n01", "n02"), per_class=2):
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for number, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for i in range(per_class):
                pixels = rng.integers(0, 256, (280 + 20 * i, 260, 3), dtype=np.uint8)
                suffix = "JPEG" if number == 0 else "png"
                Image.fromarray(pixels).save(root / part / name / f"{i}.{suffix}")


def test_imagenet_from_folders(tmp_path):
    write_imagenet(tmp_path)
    data = load_data(f"imagenet:{tmp_path}")
    assert (len(data.train), len(data.test), data.num_classes) == (4, 4, 2)
    assert [data.test[0, i][1] for i in range(4)] == [0, 0, 1, 1]
    assert data.train[0, 0][0].shape == data.test[0, 3][0].shape == (3, 224, 224)
    assert not torch.equal(data.train[0, 0][0], data.train[1, 0][0])


def test_imagenet_with_a_damaged_image_names_the_file(tmp_path):
    write_imagenet(tmp_path)
    (tmp_path / "train" / "n02" / "0.png").write_bytes(b"not an image")
    data = load_data(f"imagenet:{tmp_path}")
    with pytest.raises(MfpError, match=r"cannot read .*n02/0\.png"):
        data.train[0, 2]


def test_imagenet_whose_parts_do_not_match(tmp_path):
    write_imagenet(tmp_path)
    (tmp_path / "train" / "n03").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "n03" / "0.png")
    with pytest.raises(MfpError, match="only in one of them: n03"):
        load_data(f"imagenet:{tmp_path}")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mnist", "unknown data 'mnist'; known are digits, cifar10:PATH, imagenet:PATH"),
        ("digits:here", "unknown data 'digits:here'"),
        ("cifar10", "needs a folder: cifar10:PATH"),
        ("cifar10:/no/such/folder", "no folder /no/such/folder/cifar-10-batches-py"),
        ("imagenet:/no/such/folder", "no folder /no/such/folder/train"),
        ("", "unknown data ''"),
    ],
)
def test_specifications_that_cannot_be_read(spec, message):
    with pytest.raises(MfpError, match=message):
        load_data(spec)
