import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from mfp.errors import MfpError
from mfp.graph import example_arguments, find_followers, trace


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        if x.sum() > 0:
            return self.conv(x)
        return x


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, image, mask=None, *, scale=2.0, double=False):
        out = self.dropout(self.conv(image)) * scale
        if mask is not None:
            out = out * mask
        return out + out if double else out


def test_arguments_that_are_not_given_keep_their_defaults():
    model = Optional()
    image, mask = torch.randn(2, 3, 6, 6), torch.rand(2, 1, 4, 4)
    examples = (image, (image,), (image, mask), {"mask": mask, "image": image}, {"image": image, "scale": 3.0})
    for example in examples:
        arguments = example_arguments(model, example)
        graph = trace(model, arguments)
        assert [node.name for node in graph.graph.nodes if node.op == "placeholder"] == list(arguments)
        graph.eval(), model.eval()
        torch.testing.assert_close(graph(**arguments), model(**arguments))
        model.train()


def test_tracing_leaves_the_model_alone():
    model = torchvision.models.mobilenet_v2()
    model.features[3].eval()
    before = [module.training for module in model.modules()]
    trace(model)
    assert [module.training for module in model.modules()] == before
    assert not all(before) and any(before)


def test_refusal_names_the_line_and_the_way_out():
    with pytest.raises(MfpError, match=r"test_graph\.py:\d+ \(`if x\.sum\(\) > 0:`\).*leaf_modules"):
        trace(Branching())


def test_refusal_inside_a_submodule_names_it_and_leaf_modules_helps():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Branching())
    with pytest.raises(MfpError, match="keep '1' as one"):
        trace(model)
    for leaf in ("1", Branching):
        nodes = trace(model, leaf_modules=(leaf,)).graph.nodes
        assert [node.target for node in nodes if node.op == "call_module"] == ["0", "1"]
    with pytest.raises(MfpError, match="nothing_here"):
        trace(model, leaf_modules=("nothing_here",))


def test_example_that_does_not_fit_is_refused():
    with pytest.raises(MfpError, match="no argument.*picture"):
        example_arguments(Optional(), {"picture": 1})
    with pytest.raises(MfpError, match="the example gives 5"):
        example_arguments(Optional(), (1, 2, 3, 4, 5))
    with pytest.raises(MfpError, match="'image'"):
        trace(Optional(), {"mask": torch.ones(1)})


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


def test_single_channel_conv_is_not_depthwise():
    assert find_followers(nn.Sequential(nn.Conv2d(3, 1, 1), nn.Conv2d(1, 8, 1))) == {}


def test_untraceable_model_gives_nothing_and_one_warning():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert find_followers(Branching()) == {}
    assert len(caught) == 1 and "removes less" in str(caught[0].message)
