from __future__ import annotations

import copy
import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.transforms.functional import to_pil_image

import mfp
from mfp import targets
from mfp.train.data import load_data
from mfp.train.models import CifarResNet

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(monkeypatch, tmp_path):
    """Imports an example; what it writes goes to a temporary folder."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)

    def load(name: str):
        sys.modules.pop(name, None)
        return importlib.import_module(name)

    return load


def widths(model: nn.Module) -> list[int]:
    return [module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d)]


def test_plain_loop(example, tmp_path, capsys):
    small = example("plain_loop").main(epochs=2, images=128)
    assert min(widths(small)) == 8 - int(8 * 0.4)
    assert "pruned by" in capsys.readouterr().out
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(mfp.load(tmp_path / "small.mfp")(x), small(x))


def test_lightning_callback(example):
    lightning = pytest.importorskip("pytorch_lightning")
    module = example("lightning_callback")
    small = module.main(epochs=2, images=128)
    assert min(widths(small)) == 8 - int(8 * 0.4)
    # its state goes through Lightning's own checkpoints
    callback = module.FilterPruning(hold=1, rate=0.4)
    model = module.Classifier()
    callback.on_fit_start(lightning.Trainer(max_epochs=2, accelerator="cpu", logger=False), model)
    callback.pruner.step(0)
    again = module.FilterPruning(hold=1, rate=0.4)
    again.load_state_dict(callback.state_dict())
    again.on_fit_start(lightning.Trainer(max_epochs=2, accelerator="cpu", logger=False), model)
    assert torch.equal(again.pruner.mask.keep, callback.pruner.mask.keep)


def test_timm_hook(example, capsys):
    timm = pytest.importorskip("timm")
    dense = timm.create_model("test_resnet", num_classes=10)
    small = example("timm_hook").main(epochs=2, images=128)
    assert sum(widths(small)) < sum(widths(dense))
    assert capsys.readouterr().out.count("pruned by") == 1  # the mask holds after half of the epochs


def test_transformers_trainer(example, capsys, monkeypatch):
    pytest.importorskip("accelerate")
    shrink, trained = mfp.FilterPruner.shrink_, []
    monkeypatch.setattr(
        mfp.FilterPruner, "shrink_", lambda *args, **named: trained.append(shrink(*args, **named)) or trained[-1]
    )
    small = example("transformers_trainer").main(epochs=3, images=64)
    assert widths(small) == [10, 10, 10, 20, 20, 20]
    assert [widths(network) for network in trained] == [widths(small)]  # in the third epoch
    assert capsys.readouterr().out.count("pruned by") == 2
    with torch.no_grad():
        assert small(pixel_values=torch.randn(3, 3, 32, 32))["logits"].shape == (3, 10)


def test_own_images(example, tmp_path, capsys):
    generator = torch.Generator().manual_seed(0)
    for name in ("bright", "dark"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(20):
            noise = torch.rand(3, 40, 48, generator=generator) / 2 + 0.5 * (name == "bright")
            to_pil_image(noise).save(tmp_path / "images" / name / f"{number}.png")
    small = example("own_images").main(str(tmp_path / "images"), epochs=2, weights=None, size=32)
    assert small.report.flops_saved > 0.4
    assert "accuracy of the small network" in capsys.readouterr().out
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(mfp.load(tmp_path / "small.mfp").eval()(x), small.eval()(x))
    assert (tmp_path / "small.onnx").stat().st_size > 1e6


def test_openvino_time(example, tmp_path, capsys, monkeypatch):
    pytest.importorskip("openvino")

    def run_file(engine, file, inputs, *, batches, seconds):
        """Times are made up from the size of the file, so that the answer is the same each time."""
        assert engine == "openvino"
        return {batch: file.with_suffix(".bin").stat().st_size / 1e6 for batch in batches}, {}

    monkeypatch.setattr(targets, "run_file", run_file)
    monkeypatch.setattr(targets, "MEASURED_STEP", 0.25)
    found = example("openvino_time").main("resnet18", "60%", size=32)
    assert (found.rate, found.what, found.channel_multiple) == (0.25, "milliseconds", 8)
    assert 0.5 < found.reached / found.dense < 0.6
    assert (tmp_path / "small.bin").stat().st_size / 1e6 == pytest.approx(found.reached)
    assert "rate 0.25" in capsys.readouterr().out


def test_detector_backbone(example, capsys):
    small = example("detector_backbone").main(size=96)
    assert small.report.flops_saved > 0.2
    apart = float(capsys.readouterr().out.rpartition("at most ")[2].split()[0])
    assert apart < 1e-2


@pytest.mark.long
def test_eight_bits(example):
    pytest.importorskip("nncf")
    torch.manual_seed(0)
    data = load_data("digits")
    images, targets = (torch.stack(part) for part in zip(*(
        (image, torch.tensor(target)) for image, target in (data.plain[0, index] for index in range(768))
    ), strict=True))  # fmt: skip
    dense = CifarResNet(8, width=8)
    optimizer = torch.optim.AdamW(dense.parameters(), lr=0.01)
    for _ in range(4):
        for part in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(dense(images[part]), targets[part]).backward()
            optimizer.step()
    compact = copy.deepcopy(dense)
    mfp.prune_filters_(mfp.FilterPlan.from_model(compact, 0.2, residual="coupled"), "l2_norm")
    for network in (dense, compact):
        mfp.recalibrate_batchnorm(network, [(images, targets)])
    rows = example("eight_bits").compare({"dense": dense.eval(), "compact": compact.eval()}, data, 1, 0.05)
    assert len(rows) == 8 and all(row["ms_1"] > 0 and row["ms_64"] > 0 for row in rows)
    top1 = {(row["engine"], row["network"]): row["top1"] for row in rows}
    for engine in ("onnxruntime", "openvino"):
        for network in ("dense", "compact"):
            assert top1[engine, network] > 40  # of ten classes, after a few seconds of training
            assert abs(top1[engine, f"{network}, 8 bits"] - top1[engine, network]) < 6
    assert top1["onnxruntime", "compact"] == pytest.approx(top1["openvino", "compact"], abs=0.3)
