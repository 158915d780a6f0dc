"""Single behaviours of compaction, each on a network small enough to see what must come out."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from compact_cases import compacted, compare, killed, masked, randomize
from torch import nn

import mfp
from mfp.modules import ConvWithBorder, ExpandChannels, ResidualJoin, SelectChannels
from mfp.train.models import CifarResNet

torch.set_num_threads(1)


def test_chain_of_convs_loses_filters_and_inputs():
    torch.manual_seed(0)
    small = compacted(nn.Sequential(killed(nn.Conv2d(3, 8, 3), 1, 4), nn.ReLU(), nn.Conv2d(8, 5, 3)), 3, 9, 9)
    assert small.get_submodule("0").weight.shape == (6, 3, 3, 3)
    assert small.get_submodule("2").weight.shape == (5, 6, 3, 3)


def test_filters_that_nobody_reads_go_too():
    torch.manual_seed(0)
    last = nn.Conv2d(8, 5, 3)
    last.weight.data[:, [0, 7]] = 0
    small = compacted(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), last), 3, 9, 9)
    assert small.get_submodule("0").out_channels == 6
    assert small.get_submodule("1").num_features == 6


def test_filters_that_only_unread_filters_read_go_too():
    """A filter two layers ahead of the zeros: what reads it does not matter either."""
    torch.manual_seed(0)
    middle, last = nn.Conv2d(8, 6, 3), nn.Conv2d(6, 5, 3)
    middle.weight.data[:, 3] = 0
    middle.weight.data[4, 3] = 1  # filter 4 alone reads channel 3,
    last.weight.data[:, 4] = 0  # and nobody reads filter 4
    small = compacted(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), middle, nn.ReLU(), last), 3, 9, 9)
    assert [layer.out_channels for layer in small.children() if isinstance(layer, nn.Conv2d)] == [7, 5, 5]


def test_constant_goes_into_the_bias_without_padding_and_into_a_border_map_with():
    torch.manual_seed(0)
    for padding, kind in ((0, nn.Conv2d), (1, ConvWithBorder)):
        first = killed(nn.Conv2d(3, 8, 3, padding=1), 2, 5)
        first.bias.data[2] = 0.7
        model = nn.Sequential(first, nn.ReLU(), nn.Conv2d(8, 5, 3, padding=padding, bias=False))
        small = compacted(model, 3, 9, 9)
        assert type(small.get_submodule("2")) is kind
        for size in ((5, 12), (20, 3)):  # exact for any image size
            compare(model, small, 3, *size)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_that_repeats_the_image_needs_no_border_map(mode):
    first = killed(nn.Conv2d(3, 8, 3, padding=1), 2)
    first.bias.data[2] = 0.7
    small = compacted(nn.Sequential(first, nn.Conv2d(8, 5, 3, padding=1, padding_mode=mode)), 3, 9, 9)
    assert type(small.get_submodule("1")) is nn.Conv2d
    assert small.get_submodule("1").in_channels == 7


def test_border_map_of_strided_dilated_one_and_three_dimensional_convs():
    torch.manual_seed(0)
    for conv, n in ((nn.Conv1d, 1), (nn.Conv2d, 2), (nn.Conv3d, 3)):
        first = killed(conv(2, 6, 1), 0, 3)
        first.bias.data[3] = -0.4
        second = conv(6, 4, 3, stride=2, padding=2, dilation=2)
        small = compacted(nn.Sequential(first, second), 2, *[9] * n)
        assert small.get_submodule("0").out_channels == 4
        assert type(small.get_submodule("1")) is ConvWithBorder


def test_batchnorm_constants_need_no_new_bias_before_a_batchnorm():
    torch.manual_seed(0)
    model = randomize(nn.Sequential(killed(nn.Conv2d(3, 8, 3), 1), nn.BatchNorm2d(8), nn.ReLU(),
                                    nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4)))  # fmt: skip
    small = compacted(model, 3, 9, 9)
    assert small.get_submodule("3").bias is None
    assert small.get_submodule("3").in_channels == 7


def test_residual_stream_keeps_its_width_and_the_branch_joins_by_index():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 8, 1), killed(nn.Conv2d(8, 8, 1), 0, 3, 5)
            self.head = nn.Conv2d(8, 2, 1)

        def forward(self, x):
            x = self.stem(x)
            return self.head(F.relu(x + self.conv(x)))

    small = compacted(Block(), 3, 5, 5)
    joins = [m for m in small.modules() if isinstance(m, ResidualJoin)]
    assert [join.index.tolist() for join in joins] == [[1, 2, 4, 6, 7]]
    assert joins[0].bias is None
    assert not any(isinstance(m, ExpandChannels | SelectChannels) for m in small.modules())


def test_squeeze_excite_of_dead_channels_is_dead():
    model = torchvision.ops.SqueezeExcitation(8, 4)
    small = compacted(nn.Sequential(killed(nn.Conv2d(3, 8, 1), 1, 2), model, nn.Conv2d(8, 3, 1)), 3, 5, 5)
    assert small.get_submodule("1.fc1").in_channels == 6
    assert small.get_submodule("1.fc2").out_channels == 6
    assert small.get_submodule("2").in_channels == 6


def test_shuffle_moves_nothing():
    class Shuffle(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = killed(nn.Conv2d(3, 8, 1), 1, 2, 7), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            x = self.first(x)
            b, c, h, w = x.size()
            return self.second(x.view(b, 2, c // 2, h, w).transpose(1, 2).contiguous().view(b, -1, h, w))

    small = compacted(Shuffle(), 3, 5, 5)
    assert [node.target for node in small.graph.nodes if node.op not in ("placeholder", "output")] == [
        "first",
        "second",
    ]


def test_option_a_shortcut_is_understood():
    torch.manual_seed(0)
    small = compacted(masked(CifarResNet(20, width=8), rate=0.5), 3, 32, 32)
    assert small.report.kept_because == []
    assert not any(node.target is torch.ops.aten.pad.default for node in small.graph.nodes)


def test_layers_never_become_empty():
    torch.manual_seed(0)
    model = nn.Sequential(killed(nn.Conv2d(3, 4, 1), 0, 1, 2, 3), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.Flatten(),
                          nn.Linear(5 * 4, 3))  # fmt: skip
    model[2].bias.data = torch.randn(5)
    small = mfp.compact(model.eval(), torch.randn(1, 3, 2, 2))
    assert all(parameter.numel() > 0 for parameter in small.parameters())
    x = torch.randn(2, 3, 2, 2)
    torch.testing.assert_close(small(x), model(x))


def test_module_called_twice_is_cut_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.shared = killed(nn.Conv2d(3, 6, 1), 0), killed(nn.Conv2d(6, 6, 3, padding=1), 1, 2)
            self.norm, self.head = nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)

        def forward(self, x):
            x = self.stem(x)
            return self.head(self.norm(self.shared(F.relu(self.norm(self.shared(x))))))

    torch.manual_seed(0)
    for seed in range(4):
        small = compacted(randomize(Twice(), seed), 3, 7, 7)
        assert sum(isinstance(m, nn.Conv2d) for m in small.modules()) == 3


def test_flops_are_counted_exactly():
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), nn.ConvTranspose2d(6, 5, 2, stride=2), nn.Flatten(),
        nn.Linear(5 * 8 * 8, 7),
    )  # fmt: skip
    expected = 2 * (4 * 4) * 6 * 2 * 9 + 2 * (4 * 4) * 6 * 5 * 4 + 2 * 5 * 64 * 7
    assert mfp.flops(model, torch.zeros(2, 4, 8, 8)) == expected
    assert mfp.flops(torchvision.models.resnet50(), torch.zeros(1, 3, 224, 224)) == 4089184256


def test_counting_leaves_a_module_with_two_names_alone():
    """timm's CoaT: each block holds the position encoding that its stage holds too."""
    conv = nn.Conv2d(3, 3, 3, padding=1)
    model = nn.Sequential(conv, nn.Sequential(conv, nn.ReLU()), nn.BatchNorm2d(3))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert mfp.flops(model, torch.zeros(1, 3, 8, 8)) == 2 * 64 * 9 * 9
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert model[0] is model[1][0]
    assert isinstance(model[0].weight, nn.Parameter)
