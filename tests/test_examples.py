from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import mfp
from mfp.train.config import RunConfig
from mfp.train.run import run

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
    callback = module.FilterPruning(rate=0.4)
    model = module.Classifier()
    callback.on_fit_start(lightning.Trainer(max_epochs=2, accelerator="cpu", logger=False), model)
    callback.pruner.step(0)
    again = module.FilterPruning(rate=0.4)
    again.load_state_dict(callback.state_dict())
    again.on_fit_start(lightning.Trainer(max_epochs=2, accelerator="cpu", logger=False), model)
    assert torch.equal(again.pruner.mask.keep, callback.pruner.mask.keep)


def test_timm_hook(example, capsys):
    timm = pytest.importorskip("timm")
    dense = timm.create_model("test_resnet", num_classes=10)
    small = example("timm_hook").main(epochs=2, images=128)
    assert sum(widths(small)) < sum(widths(dense))
    assert capsys.readouterr().out.count("pruned by") == 2


def test_eight_bits(example, tmp_path):
    pytest.importorskip("nncf")
    run(RunConfig(arch="resnet20", epochs=2, batch=64, residual="coupled", settle=0.5), tmp_path / "run")
    rows = example("eight_bits").main(str(tmp_path / "run"))
    assert len(rows) == 8 and all(row["ms_1"] > 0 and row["ms_64"] > 0 for row in rows)
    top1 = {(row["engine"], row["network"]): row["top1"] for row in rows}
    for engine in ("onnxruntime", "openvino"):
        for network in ("dense", "compact"):
            assert top1[engine, network] > 50
            assert top1[engine, f"{network}, 8 bits"] > top1[engine, network] - 5
    assert top1["onnxruntime", "compact"] == top1["openvino", "compact"]
