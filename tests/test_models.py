from __future__ import annotations

import pickle
import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mfp.errors import MfpError
from mfp.train.models import CifarResNet, available_models, build_model, load_state, read_state


@pytest.mark.parametrize(
    ("name", "convs", "parameters"),
    [("resnet20", 19, 0.27), ("resnet32", 31, 0.46), ("resnet56", 55, 0.85), ("resnet110", 109, 1.7)],
)
def test_cifar_resnets_have_the_papers_size(name, convs, parameters):
    model = build_model(name, 10)
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == convs
    # table 6 of He et al. gives millions to two digits
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, abs=0.035)


def test_cifar_resnet_can_be_traced():
    model = CifarResNet(8, width=4).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x), rtol=0, atol=0)


def test_option_a_shortcut_takes_every_second_pixel_and_pads_with_zeros():
    block = CifarResNet(8, width=4).layer2[0].eval()
    nn.init.zeros_(block.bn2.weight)  # only the shortcut is left
    x = torch.rand(1, 4, 6, 6)
    y = block(x)
    torch.testing.assert_close(y[:, 2:6], x[:, :, ::2, ::2])
    assert y.shape == (1, 8, 3, 3)
    assert y[:, :2].abs().sum() == y[:, 6:].abs().sum() == 0


def test_torchvision_networks_by_name():
    assert {"resnet50", "vgg16_bn", "mobilenet_v2"} <= set(available_models())
    assert build_model("squeezenet1_1", 7)(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
    assert build_model("googlenet", 3).train()(torch.zeros(2, 3, 64, 64)).shape == (2, 3)


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("resnet21", "unknown network 'resnet21'; near it: .*resnet20"),
        ("os.path:nothing", "--model os.path:nothing: cannot find it"),
        ("no_such_package_here:f", "--model no_such_package_here:f: cannot find it"),
        ("builtins:dict", "returned a dict, not a torch.nn.Module"),
    ],
)
def test_names_that_do_not_resolve(arch, message):
    with pytest.raises(MfpError, match=message):
        build_model(arch, 10)


def test_a_function_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "own_nets.py").write_text(
        "import torch\ndef net(num_classes): return torch.nn.Linear(3, num_classes)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert build_model("own_nets:net", 4).out_features == 4


def test_a_depth_that_is_no_resnet():
    with pytest.raises(MfpError, match=re.escape("6n+2 layers")):
        CifarResNet(21)


@pytest.mark.parametrize("kind", ["safetensors", "torch", "wrapped"])
def test_weights_from_a_file(tmp_path, kind):
    saved = build_model("resnet20", 10)
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pt")
    if kind == "safetensors":
        save_file(saved.state_dict(), path)
    elif kind == "torch":
        torch.save(saved.state_dict(), path)
    else:
        torch.save({"state_dict": {f"module.{k}": v for k, v in saved.state_dict().items()}}, path)
    loaded = build_model("resnet20", 10, str(path))
    for name, value in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_another_number_of_classes_keeps_all_but_the_classifier(tmp_path):
    saved = build_model("resnet20", 10)
    torch.save(saved.state_dict(), tmp_path / "w.pt")
    with pytest.warns(UserWarning, match="classifier fc has another number of classes"):
        loaded = build_model("resnet20", 5, str(tmp_path / "w.pt"))
    assert loaded.fc.out_features == 5
    assert torch.equal(loaded.layer1[0].conv1.weight, saved.layer1[0].conv1.weight)


def test_weights_of_another_network():
    with pytest.raises(MfpError, match="w.pt is of another network: .* entries differ, first layer1.9; conv1.weight"):
        load_state(
            CifarResNet(8, width=8),
            CifarResNet(8, width=4).state_dict() | {"layer1.9": torch.zeros(1)},
            "w.pt",
        )


class Marker:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("container", ["torch", "pickle"])
def test_a_weights_file_never_runs_code(tmp_path, container):
    payload = {"fc.weight": Marker(tmp_path / "ran")}
    path = tmp_path / "hostile.pt"
    if container == "torch":
        torch.save(payload, path)
    else:
        path.write_bytes(pickle.dumps(payload))
    with pytest.raises(MfpError, match="cannot read weights from .*hostile.pt"):
        read_state(path)
    assert not (tmp_path / "ran").exists()


def test_weights_that_cannot_be_used(tmp_path):
    with pytest.raises(MfpError, match="no weights file"):
        read_state(tmp_path / "missing.pt")
    (tmp_path / "short.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(MfpError, match="cannot read weights from .*short.safetensors"):
        read_state(tmp_path / "short.safetensors")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(MfpError, match="does not hold a state dict"):
        read_state(tmp_path / "list.pt")


def test_pretrained_weights_are_not_fetched_unasked(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(MfpError, match="or give --download to fetch it"):
        build_model("resnet18", 10, "pretrained")
    with pytest.raises(MfpError, match="resnet18 has no weights 'V9'; there are: IMAGENET1K_V1"):
        build_model("resnet18", 10, "pretrained:V9")
    with pytest.raises(MfpError, match="no pretrained weights for resnet20"):
        build_model("resnet20", 10, "pretrained")
