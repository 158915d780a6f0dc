"""What a plan asks the graph: followers, outputs, pointwise linears, what meets in a sum."""

import copy
import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision
from small_networks import NETWORKS
from torch import nn

import mfp
from mfp.build import build_of
from mfp.capture import capture
from mfp.errors import CaptureError
from mfp.structure import structure_of

torch.set_num_threads(1)


def find_followers(model, example=None):
    return structure_of(model, example).followers


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        if x.sum() > 0:
            return self.norm(self.conv(x)).mean((2, 3))
        return x


def test_followers_of_resnet_are_its_batchnorms():
    followers = find_followers(torchvision.models.resnet18())
    assert followers["conv1"] == ["bn1"]
    assert followers["layer2.0.conv2"] == ["layer2.0.bn2"]
    assert followers["layer2.0.downsample.0"] == ["layer2.0.downsample.1"]
    assert len(followers) == 20


def test_followers_of_mobilenet_include_depthwise_convs():
    followers = find_followers(torchvision.models.mobilenet_v2())
    block = "features.2.conv"
    assert followers[f"{block}.0.0"] == [f"{block}.0.1", f"{block}.1.0", f"{block}.1.1"]
    assert followers["features.2.conv.1.0"] == ["features.2.conv.1.1"]
    assert followers["features.2.conv.2"] == ["features.2.conv.3"]  # the end of the block


def test_chain_stops_where_zero_or_the_channel_is_lost():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
            self.grouped, self.wide = nn.Conv2d(8, 8, 1, groups=4), nn.Conv2d(8, 16, 1, groups=8)
            self.shifted = nn.Conv2d(8, 8, 1, groups=8)
            self.bn, self.shared = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

        def forward(self, x):
            first = self.first(x)
            second = self.second(F.hardswish(first))
            return (self.shared(first), self.shared(second), self.wide(F.relu(second)), self.grouped(second),
                    self.shifted(torch.sigmoid(second)), self.bn(first + second))  # fmt: skip

    assert find_followers(Net()) == {"second": ["wide"]}


def test_chain_goes_through_whatever_keeps_zero_in_its_channel():
    class Net(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.conv, self.depthwise = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
            self.function = function

        def forward(self, x):
            return self.depthwise(self.function(self.conv(x)))

    keeping = [
        F.relu_, F.silu, F.gelu, torch.tanh, lambda x: x.clamp(0, 6), lambda x: x * 3, lambda x: F.pad(x, (1, 1)),
        lambda x: F.max_pool2d(x, 3), lambda x: F.interpolate(x, scale_factor=2), lambda x: F.dropout(x, 0.1, False),
        lambda x: F.avg_pool2d(x, 2), lambda x: F.leaky_relu(x, 0.1), lambda x: x.contiguous(),
    ]  # fmt: skip
    losing = [torch.sigmoid, torch.exp, lambda x: x + 1, lambda x: F.pad(x, (1, 1), value=1.0), lambda x: x.flip(1)]
    for function in keeping:
        assert find_followers(Net(function)) == {"conv": ["depthwise"]}, function
    for function in losing:
        assert find_followers(Net(function)) == {}, function


def test_single_channel_conv_is_not_depthwise():
    assert find_followers(nn.Sequential(nn.Conv2d(3, 1, 1), nn.Conv2d(1, 8, 1))) == {}


def test_a_norm_of_ones_own_and_a_conv_that_computes_its_weight_are_found():
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))
            self.register_buffer("mean", torch.zeros(8))
            self.register_buffer("var", torch.ones(8))

        def forward(self, x):
            return F.batch_norm(x, self.mean, self.var, self.weight, self.bias)

    class Standardised(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)

    assert find_followers(nn.Sequential(Standardised(3, 8, 1), Norm(), nn.ReLU())) == {"0": ["1"]}


def test_outputs_pointwise_linears_and_sums():
    structure = structure_of(torchvision.models.squeezenet1_1())
    assert structure.outputs == {"classifier.1"}
    structure = structure_of(NETWORKS["convnext"]())
    assert {"features.1.0.block.3", "features.1.0.block.5"} < structure.pointwise
    assert "classifier.2" not in structure.pointwise
    structure = structure_of(NETWORKS["resnet"]())
    groups = structure.groups
    assert groups["conv1"] == groups["layer1.0.conv2"] == groups["layer1.1.conv2"] != groups["layer1.0.conv1"]
    assert groups["layer2.0.downsample.0"] == groups["layer2.0.conv2"] != groups["conv1"]


def test_a_layer_that_reads_a_parameter_alone():
    """Swin's table of positions goes through linear layers, whatever the image."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.linear = nn.Parameter(torch.randn(1, 5)), nn.Linear(5, 8)
            self.conv, self.next, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            return self.last(self.next(self.conv(x) * self.linear(self.table).view(1, 8, 1, 1))).mean((2, 3))

    for residual in ("index", "keep", "coupled"):
        plan = mfp.FilterPlan.from_model(Net(), 0.5, residual=residual)
        assert plan.layers[-1].name == "next"


def test_an_example_is_needed_where_no_image_fits():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm = nn.Conv2d(3, 4, 1), nn.Conv2d(5, 4, 1), nn.BatchNorm2d(4)

        def forward(self, left, right):
            return self.norm(self.a(left)), self.b(right)

    with pytest.raises((CaptureError, mfp.MfpError)):
        structure_of(Two())
    example = torch.zeros(1, 3, 4, 4), torch.zeros(1, 5, 4, 4)
    assert structure_of(Two(), example).followers == {"a": ["norm"]}
    assert structure_of(Two(), {"right": example[1], "left": example[0]}).outputs == {"a", "b"}


def test_what_cannot_be_captured_gives_nothing_and_one_warning():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plan = mfp.FilterPlan.from_model(Branching())
    assert [layer.name for layer in plan.layers] == ["conv"]
    assert [follower.module for follower in plan["conv"].followers] == ["conv"]  # its bias
    assert len(caught) == 1 and "removes less" in str(caught[0].message)
    assert "if x.sum() > 0:" in str(caught[0].message)


class Chosen(nn.Module):
    """What forward does is decided by a plain attribute."""

    def __init__(self, follows: object) -> None:
        super().__init__()
        self.conv, self.norm, self.other, self.follows = (
            nn.Conv2d(3, 4, 1),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 4, 1),
            follows,
        )

    def forward(self, x):
        x = self.conv(x)
        return self.other(self.norm(x) if self.follows is True or self.follows == [1] else x.softmax(1))


def test_models_of_one_build_are_captured_once(monkeypatch):
    captured = []
    monkeypatch.setattr(
        "mfp.structure.capture", lambda *args, **options: captured.append(1) or capture(*args, **options)
    )
    first = Chosen(True)
    assert find_followers(first) == find_followers(Chosen(True)) == find_followers(copy.deepcopy(first))
    assert find_followers(first)["conv"] == ["norm"] and len(captured) == 1
    for number, (other, followers) in enumerate((
        (Chosen(False), {}), (Chosen([1]), {"conv": ["norm"]}), (Chosen([2]), {}), (Chosen(1), {}),
        (Chosen(True).double(), {"conv": ["norm"]}),
    )):  # fmt: skip
        assert find_followers(other) == followers and len(captured) == number + 2, number


def test_what_cannot_be_compared_is_captured_each_time():
    hooked, shared, wide = Chosen(True), Chosen(True), Chosen(True)
    hooked.register_forward_hook(functools.partial(lambda *_: None))
    assert build_of(hooked) is None and build_of(Chosen(object())) is None
    shared.other = shared.conv = nn.Conv2d(4, 4, 1)
    wide.conv = nn.Conv2d(4, 4, 1)
    assert build_of(shared) != build_of(wide) == build_of(copy.deepcopy(wide))
    assert build_of(wide, torch.zeros(1, 4, 2, 2)) != build_of(wide, torch.zeros(1, 4, 3, 3))
