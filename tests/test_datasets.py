from __future__ import annotations

import gzip
import hashlib
import itertools
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST

from mfp.errors import MfpError
from mfp.train.data import _file_of, load_data
from mfp.train.datasets import short_name


def write_cifar(root, monkeypatch, kind=CIFAR10, per_file=6):
    """The real layout: pickled batches with rows of 3072 bytes, and their md5 in torchvision's tables."""
    folder = root / kind.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)
    labels, names = ("labels", "label_names") if kind is CIFAR10 else ("fine_labels", "fine_label_names")

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    def batch():
        data = rng.integers(0, 256, (per_file, 3072), dtype=np.uint8)
        return {"data": data, labels: [11 * i % (10 if kind is CIFAR10 else 100) for i in range(per_file)]}

    monkeypatch.setattr(kind, "train_list", [[name, write(name, batch())] for name, _ in kind.train_list])
    monkeypatch.setattr(kind, "test_list", [[name, write(name, batch())] for name, _ in kind.test_list])
    digest = write(kind.meta["filename"], {names: list("abcdefghij")})
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": digest})
    return folder


@pytest.mark.parametrize(
    ("kind", "spec", "test_file", "counts", "classes", "mean", "deviation"),
    [
        (CIFAR10, "cifar10", "test_batch", [24, 6, 6], 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        (CIFAR100, "cifar100", "test", [5, 1, 6], 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    ],
)
def test_cifar_from_its_own_format(tmp_path, monkeypatch, kind, spec, test_file, counts, classes, mean, deviation):
    folder = write_cifar(tmp_path, monkeypatch, kind)
    data = load_data(f"{spec}:{tmp_path}", validation=0.2)
    assert (data.counts, data.num_classes) == (counts, classes)
    image, target = data.test[0, 4]
    assert target == 44 % classes
    stored = pickle.loads((folder / test_file).read_bytes())["data"][4].reshape(3, 32, 32) / 255
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (mean, deviation))
    expected = (torch.from_numpy(stored).float() - mean) / deviation
    torch.testing.assert_close(image, expected)
    assert data.train[0, 0][0].shape == (3, 32, 32)


@pytest.mark.parametrize(("kind", "file"), [(CIFAR10, "data_batch_3"), (CIFAR100, "train")])
def test_a_damaged_cifar_is_not_unpickled(tmp_path, monkeypatch, kind, file):
    folder = write_cifar(tmp_path, monkeypatch, kind)
    (folder / file).write_bytes(pickle.dumps(Trap(tmp_path / "trapped")))
    with pytest.raises(MfpError, match="CIFAR-100? in .* is incomplete or damaged"):
        load_data(f"{kind.__name__.lower()}:{tmp_path}")
    assert not (tmp_path / "trapped").exists()
    pickle.loads((folder / file).read_bytes()).close()
    assert (tmp_path / "trapped").exists()


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


# ---- Fashion-MNIST


def idx(array: np.ndarray) -> bytes:
    return np.array([0x800 + array.ndim, *array.shape], ">u4").tobytes() + array.astype(np.uint8).tobytes()


FASHION = {"train": 40, "t10k": 10}


@pytest.fixture
def fashion(tmp_path):
    """The four files as they are published, packed; of 40 and 10 images."""
    rng = np.random.default_rng(1)
    for part, count in FASHION.items():
        for kind, array in (
            ("images-idx3", rng.integers(0, 256, (count, 28, 28))),
            ("labels-idx1", np.arange(count) % 10),
        ):
            (tmp_path / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(idx(array)))
    return tmp_path


def unpack(folder, target=None):
    for path in list(folder.glob("*.gz")):
        ((target or folder) / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()


@pytest.mark.parametrize("layout", ["packed", "unpacked", "torchvision's"])
def test_fashion_mnist(fashion, layout):
    if layout != "packed":
        raw = fashion / "FashionMNIST" / "raw" if layout == "torchvision's" else fashion
        raw.mkdir(parents=True, exist_ok=True)
        unpack(fashion, raw)
    data = load_data(f"fashion-mnist:{fashion}", validation=0.25)
    assert (data.counts, data.num_classes, data.image_shape) == ([30, 10, 10], 10, (3, 28, 28))
    rng = np.random.default_rng(1)
    stored = rng.integers(0, 256, (40, 28, 28))
    image, target = data.validation[0, 3]
    index = data.validation.source.indices[3]
    expected = (torch.from_numpy(stored[index] / 255).float() - 0.2860) / 0.3530
    torch.testing.assert_close(image, expected.expand(3, -1, -1))
    assert target == index % 10
    augmented = torch.stack([data.train[epoch, 0][0] for epoch in range(8)])
    assert augmented.shape == (8, 3, 28, 28) and len(augmented.flatten(1).unique(dim=0)) > 4
    assert augmented.min() >= -0.2860 / 0.3530 - 1e-6  # what a crop adds is black


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("train-images-idx3-ubyte", lambda data: data[:-1], "holds fewer than the 31,360 bytes that its header tells"),
        ("train-labels-idx1-ubyte", lambda data: data + b"x", "holds more than the 40 bytes that its header tells"),
        ("t10k-images-idx3-ubyte", lambda data: data[:9], "t10k-images-idx3-ubyte"),
        ("t10k-images-idx3-ubyte", lambda data: b"", "is not an idx file of bytes with 3 dimensions"),
        ("t10k-labels-idx1-ubyte", lambda data: b"\x80\x02}q" + data, "is not an idx file of bytes with 1 dimensions"),
        ("t10k-images-idx3-ubyte", lambda data: data[:4] + b"\xff" * 12, "is not an idx file of bytes"),
        (
            "train-labels-idx1-ubyte",
            lambda data: idx(np.arange(39) % 10),
            "and 39 labels, the largest 9; Fashion",
        ),
        ("train-labels-idx1-ubyte", lambda data: idx(np.arange(40)), "and 40 labels, the largest 39; Fashion"),
        ("t10k-images-idx3-ubyte", lambda data: idx(np.zeros((10, 32, 32))), r"hold images \[10, 32, 32\] and 10"),
        ("t10k-images-idx3-ubyte", lambda data: idx(np.zeros((0, 28, 28))), r"hold images \[0, 28, 28\] and 10"),
        (
            "t10k-labels-idx1-ubyte",
            lambda data: None,
            "no file .*t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte.gz: ",
        ),
    ],
)
def test_files_that_are_not_fashion_mnist(fashion, packed, file, change, message):
    if not packed:
        unpack(fashion)
    path = fashion / (f"{file}.gz" if packed else file)
    changed = change(gzip.decompress(path.read_bytes()) if packed else path.read_bytes())
    path.unlink() if changed is None else path.write_bytes(gzip.compress(changed) if packed else changed)
    with pytest.raises(MfpError, match=message) as error:
        load_data(f"fashion-mnist:{fashion}")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("change", [lambda data: data[:-20], lambda data: data[:30] + b"\xff" * 30, lambda data: b"no"])
def test_a_packed_file_that_is_damaged(fashion, change):
    path = fashion / "train-images-idx3-ubyte.gz"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(MfpError, match=f"cannot read {path}, it is damaged or cut short: ") as error:
        load_data(f"fashion-mnist:{fashion}")
    assert len(str(error.value).splitlines()) == 1


def test_fetching_fashion_mnist(fashion, tmp_path, monkeypatch):
    """torchvision fetches; what it fetched is then read from where torchvision puts it."""
    target = tmp_path / "new"

    def download(self):
        raw = target / "FashionMNIST" / "raw"
        raw.mkdir(parents=True)
        unpack(fashion, raw)

    monkeypatch.setattr(FashionMNIST, "download", download)
    monkeypatch.setattr(FashionMNIST, "mirrors", [])
    with pytest.raises(MfpError, match="--download fetches it"):
        load_data(f"fashion-mnist:{target}")
    assert load_data(f"fashion-mnist:{target}", download=True).counts == [40, 0, 10]
    assert load_data(f"fashion-mnist:{target}").counts == [40, 0, 10]
    monkeypatch.undo()
    monkeypatch.setattr(FashionMNIST, "mirrors", ["file:///nowhere/"])
    with pytest.raises(MfpError, match="cannot fetch Fashion-MNIST into .*: Error downloading train-images") as error:
        load_data(f"fashion-mnist:{tmp_path / 'other'}", download=True)
    assert len(str(error.value).splitlines()) == 1


# ---- folders of images


def write_folders(root, classes=("n01", "n02"), per_class=2, parts=("train", "val")):
    rng = np.random.default_rng(0)
    for part in parts:
        for number, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for i in range(per_class):
                pixels = rng.integers(0, 256, (280 + 20 * i, 260, 3), dtype=np.uint8)
                suffix = "JPEG" if number == 0 else "png"
                Image.fromarray(pixels).save(root / part / name / f"{i}.{suffix}")


@pytest.mark.parametrize("name", ["imagenet", "folder"])
def test_images_from_folders(tmp_path, name):
    write_folders(tmp_path)
    data = load_data(f"{name}:{tmp_path}")
    assert (data.counts, data.num_classes) == ([4, 0, 4], 2)
    assert [data.test[0, i][1] for i in range(4)] == [0, 0, 1, 1]
    assert data.train[0, 0][0].shape == data.test[0, 3][0].shape == (3, 224, 224)
    assert not torch.equal(data.train[0, 0][0], data.train[1, 0][0])


def test_a_folder_without_images_to_test_on(tmp_path):
    write_folders(tmp_path, per_class=5, parts=["train"])
    data, again = (load_data(f"folder:{tmp_path}", seed, validation=0.25) for seed in (0, 1))
    assert data.counts == again.counts == [6, 2, 2]
    assert [data.test[0, i][1] for i in range(2)] == [data.validation[0, i][1] for i in range(2)] == [0, 1]
    parts = [files(view) for view in (data.plain, data.validation, data.test)]
    assert parts == [files(view) for view in (again.plain, again.validation, again.test)]
    assert sorted(itertools.chain(*parts)) == sorted(str(path) for path in (tmp_path / "train").glob("*/*"))
    with pytest.raises(MfpError, match=r"no folder .*/val: imagenet:PATH needs PATH/train/CLASS/\* and PATH/val/CLASS"):
        load_data(f"imagenet:{tmp_path}")


def files(view) -> list[str]:
    return [_file_of(view.source, index) for index in range(len(view))]


@pytest.mark.parametrize("validation", [0.0, 0.5])
def test_a_damaged_image_is_named(tmp_path, validation):
    write_folders(tmp_path)
    for path in (tmp_path / "train" / "n02").iterdir():
        path.write_bytes(b"not an image")
    data = load_data(f"folder:{tmp_path}", validation=validation)
    with pytest.raises(MfpError, match=r"cannot read .*train/n02/[01]\.png"):
        data.train[0, len(data.train) - 1]


def test_folders_that_do_not_match(tmp_path):
    write_folders(tmp_path)
    (tmp_path / "train" / "n03").mkdir()
    with pytest.raises(MfpError, match="Found no valid file for the classes n03"):
        load_data(f"folder:{tmp_path}")
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "n03" / "0.png")
    with pytest.raises(MfpError, match="only in one of them: n03"):
        load_data(f"imagenet:{tmp_path}")


@pytest.mark.parametrize("parts", [("train",), ("train", "val")])
def test_a_folder_of_one_class(tmp_path, parts):
    write_folders(tmp_path, classes=["cat"], per_class=1, parts=parts)
    with pytest.raises(MfpError, match="train has one class, cat: there must be a folder for each of two or more"):
        load_data(f"folder:{tmp_path}")


def test_a_folder_of_too_few_images(tmp_path):
    write_folders(tmp_path, parts=["train"])
    with pytest.raises(MfpError, match="4 images are too few to keep a fifth for testing, and there is no val"):
        load_data(f"folder:{tmp_path}")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mnist", "unknown data 'mnist'; known are digits, fashion-mnist:PATH, cifar10:PATH, cifar100:PATH, imagenet:"),
        ("digits:here", "unknown data 'digits:here'"),
        ("cifar10", "needs a folder: cifar10:PATH"),
        ("cifar10:/no/such/folder", "no folder /no/such/folder/cifar-10-batches-py"),
        ("cifar100:/no/such/folder", "no folder /no/such/folder/cifar-100-python: PATH in cifar100:PATH holds it"),
        ("imagenet:/no/such/folder", "no folder /no/such/folder/train"),
        ("folder:/no/such/folder", r"no folder /no/such/folder/train: folder:PATH needs PATH/train/CLASS/\*"),
        ("fashion-mnist:/no/such/folder", "no file /no/such/folder/train-images-idx3-ubyte or train-images-idx3"),
        ("", "unknown data ''"),
    ],
)
def test_specifications_that_cannot_be_read(spec, message):
    with pytest.raises(MfpError, match=message):
        load_data(spec)


def test_short_names():
    names = [short_name(spec) for spec in ("digits", "folder:/a:b/c", "dataset:flowers.data:load")]
    assert names == ["digits", "folder", "load"]
