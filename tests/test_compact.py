"""Compact networks compute what the masked ones do, in every family, and save the FLOPs that were published."""

import copy

import pytest
import torch
import torchvision
from compact_cases import difference, masked
from small_networks import NETWORKS
from torch import nn

import mfp
from mfp.train.models import CifarResNet

torch.set_num_threads(1)


#: ShuffleNet's shuffle and LayerNorm read all channels; whole groups of the small ResNeXt are less than the rate.
SAVE_LESS = ("resnext", "shufflenet", "convnext")
KEEP_SOME = ("shufflenet", "convnext")


#: BatchNorm left unmasked asks most of the rules; masked networks of the other families are in tests/test_zoo.py.
CASES = [
    *((name, False, torch.float64, 1e-12) for name in NETWORKS),
    *((name, True, torch.float32, 1e-5) for name in ("vgg_bn", "mobilenet_v3", "feature pyramid", "lraspp")),
]


@pytest.mark.parametrize(("name", "mask_bn", "dtype", "tolerance"), CASES)
def test_compact_equals_masked(name, mask_bn, dtype, tolerance):
    model = masked(NETWORKS[name](), mask_bn=mask_bn).to(dtype)
    before = copy.deepcopy(model.state_dict())
    small = mfp.compact(model, torch.randn(1, 3, 64, 64, dtype=dtype))
    other_size = torch.randn(2, 3, 80, 72, dtype=dtype)  # neither the example's batch nor its image size
    with torch.no_grad():
        assert difference(model(other_size), small(other_size)) < tolerance
    assert small.report.flops_saved > (0.34 if name in SAVE_LESS else 0.45)
    if "regnet" not in name:  # there a group is more than the rate, and filters that go one by one may fill up groups
        assert (small.report.kept_because == []) == (name not in KEEP_SOME)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("name", ["cifar resnet", "resnet bottleneck", "vgg_bn"])
def test_folded_equals_masked(name):
    model = masked(NETWORKS[name](), mask_bn=False).double()
    small = mfp.compact(model, torch.randn(1, 3, 64, 64, dtype=torch.float64), fold_bn=True)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in small.modules())
    x = torch.randn(2, 3, 80, 72, dtype=torch.float64)
    with torch.no_grad():
        assert difference(model(x), small(x)) < 1e-12


#: FLOPs saved in percent, and how near ours must be (the FPGM paper, tables 1 and 2); its other networks repeat blocks.
PUBLISHED = [
    ("resnet18", 0.3, 41.8, 1.2), ("resnet50", 0.4, 53.5, 1.2), (20, 0.3, 42.2, 2.0), (20, 0.4, 54.0, 2.0),
    (56, 0.4, 52.6, 2.0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "rate", "saved", "near"), PUBLISHED)
def test_flops_saved_are_the_published_ones(name, rate, saved, near):
    if isinstance(name, int):
        model, x = CifarResNet(name), torch.randn(1, 3, 32, 32)
    else:
        model, x = getattr(torchvision.models, name)(), torch.randn(1, 3, 224, 224)
    small = mfp.compact(masked(model, rate=rate), x)
    assert 100 * small.report.flops_saved == pytest.approx(saved, abs=near)
    if name == "resnet18":  # the authors' own count
        assert list(small.conv1.weight.shape) == [45, 3, 7, 7]
        assert list(small.layer1.get_submodule("0.conv1").weight.shape) == [45, 45, 3, 3]
