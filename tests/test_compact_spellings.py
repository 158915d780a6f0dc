"""What people write: the same computation in other words must lose the same filters."""

import copy

import pytest
import torch
import torch.nn.functional as F
from compact_cases import compacted, compare, difference, killed, randomize
from torch import nn
from torch.nn.utils import parametrizations

import mfp
from mfp.modules import ExpandChannels, SelectChannels

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("error:mfp.compact removed nothing")


class Net(nn.Module):
    """A conv a with two dead filters of eight, a function of the module and what a gives, a conv b behind it."""

    def __init__(self, function, **layers):
        super().__init__()
        self.a, self.b = killed(nn.Conv2d(3, 8, 3, padding=1), 1, 4), nn.Conv2d(8, 5, 1)
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.b(self.function(self, self.a(x)))


def compacted_net(function, inputs=6, **layers):
    """The compact Net, whose b has lost inputs."""
    small = compacted(Net(function, **layers), 3, 9, 8)
    assert small.a.out_channels == 6
    assert small.b.in_channels == inputs
    return small


class SameConv(nn.Conv2d):
    """TensorFlow's padding, as timm and EfficientNets have it: by the size of the image."""

    def forward(self, x):
        height, width = x.shape[-2:]
        down = max((-(-height // self.stride[0]) - 1) * self.stride[0] + self.kernel_size[0] - height, 0)
        right = max((-(-width // self.stride[1]) - 1) * self.stride[1] + self.kernel_size[1] - width, 0)
        x = F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class StandardisedConv(nn.Conv2d):
    """Weight standardisation by batch_norm, as timm writes it."""

    def forward(self, x):
        rows = self.weight.reshape(1, len(self.weight), -1)
        weight = F.batch_norm(rows, None, None, training=True, momentum=0.0, eps=1e-6).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class NormAct(nn.Module):
    """A BatchNorm of one's own with its activation, without nn.BatchNorm2d."""

    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(channels) + 0.5), nn.Parameter(torch.randn(channels))
        self.register_buffer("running_mean", torch.randn(channels))
        self.register_buffer("running_var", torch.rand(channels) + 0.5)

    def forward(self, x):
        statistics = self.running_mean, self.running_var
        return F.relu(F.batch_norm(x, *statistics, self.weight, self.bias, self.training, 0.1, 1e-5))


def test_a_conv_that_pads_by_the_size_of_its_input():
    torch.manual_seed(0)
    model = nn.Sequential(
        killed(SameConv(3, 8, 3, stride=2), 1, 4), nn.BatchNorm2d(8), nn.ReLU(), SameConv(8, 5, 3, stride=2, bias=False)
    )  # fmt: skip
    small = compacted(randomize(model), 3, 64, 64)
    assert [type(small.get_submodule(name)) for name in ("0", "3")] == [nn.Conv2d, nn.Conv2d]
    assert small.get_submodule("0").weight.shape == (6, 3, 3, 3)
    for size in ((64, 32), (96, 160), (33, 47)):
        compare(model, small, 3, *size)


def test_many_convs_that_pad_by_the_size_of_their_input():
    """What they make of a size doubles with each: beyond two it is multiples of 32, and never a wrong result."""
    torch.manual_seed(0)
    model = nn.Sequential(killed(SameConv(3, 8, 3, stride=2), 1, 4), *(SameConv(8, 8, 3, stride=2) for _ in range(2)))
    small = compacted(model, 3, 64, 64)
    for size in ((64, 32), (96, 160)):
        compare(model, small, 3, *size)
    with pytest.raises(ValueError, match="multiple of 32, not 33"):
        small(torch.randn(1, 3, 33, 64, dtype=torch.float64))
    assert any("multiple of 32" in line for line in small.report.kept_because)


def test_standardised_weights_are_computed_once():
    torch.manual_seed(0)
    model = nn.Sequential(killed(StandardisedConv(3, 8, 3), 1, 4), nn.ReLU(), StandardisedConv(8, 5, 3))
    small = compacted(model, 3, 9, 9)
    assert small.get_submodule("0").weight.shape == (6, 3, 3, 3)
    assert type(small.get_submodule("2")) is nn.Conv2d
    assert not any(node.op == "call_function" and "batch_norm" in str(node.target) for node in small.graph.nodes)


@pytest.mark.parametrize(
    "wrap", [parametrizations.weight_norm, parametrizations.orthogonal, parametrizations.spectral_norm]
)
def test_parametrized_weights_are_folded(wrap):
    torch.manual_seed(0)
    dead = killed(nn.Conv2d(3, 8, 3, padding=1), 1, 4)
    model = nn.Sequential(dead, nn.ReLU(), wrap(nn.Conv2d(8, 5, 1)))
    small = compacted(model, 3, 9, 9)
    assert type(small.get_submodule("2")) is nn.Conv2d
    assert small.get_submodule("2").in_channels == 6
    assert all(type(parameter) is nn.Parameter for parameter in small.parameters())


def test_batch_norm_in_a_module_of_ones_own_becomes_a_batchnorm():
    model = Net(lambda net, x: net.norm(x), norm=NormAct(8))
    model.norm.bias.data[[1, 4]] = 0.0
    model.norm.running_mean[[1, 4]] = 0.0
    small = compacted(model, 3, 9, 8)
    assert type(small.norm) is nn.BatchNorm2d and small.norm.num_features == 6
    small.train(), model.train()
    x = torch.randn(4, 3, 9, 8, dtype=torch.float64)
    assert difference(model(x).detach(), small(x).detach()) < 1e-12
    kept = [0, 2, 3, 5, 6, 7]
    torch.testing.assert_close(small.norm.running_mean, model.norm.running_mean[kept])


def test_a_block_of_chunks_and_a_concatenation():
    def block(net, x):
        parts = list(x.chunk(2, 1))
        for conv in (net.first, net.second):
            parts.append(F.silu(conv(parts[-1])))
        return net.join(torch.cat(parts, 1))

    torch.manual_seed(0)
    layers = {name: killed(nn.Conv2d(4, 4, 3, padding=1), j) for j, name in enumerate(("first", "second"))}
    small = compacted_net(block, inputs=7, join=killed(nn.Conv2d(16, 8, 1), 5), **layers)
    assert (small.first.in_channels, small.first.out_channels) == (3, 3)
    assert small.join.in_channels == 12
    assert small.report.kept_because == []
    assert not any(isinstance(m, ExpandChannels | SelectChannels) for m in small.modules())


def test_one_activation_called_many_times():
    def function(net, x):
        return net.act(net.d(net.act(net.c(net.act(x)))))

    convs = {"c": killed(nn.Conv2d(8, 8, 1), 0, 1, 2), "d": killed(nn.Conv2d(8, 8, 1), 3, 7)}
    small = compacted_net(function, act=nn.ReLU(inplace=True), **convs)
    assert (small.c.out_channels, small.d.in_channels) == (5, 5)
    assert sum(node.target is torch.ops.aten.relu.default for node in small.graph.nodes) == 3


@pytest.mark.parametrize("function", [
    torch.relu, F.relu_, torch.Tensor.relu, torch.Tensor.clip_, lambda x: x.clamp(min=0),
    lambda x: x * torch.sigmoid(x), lambda x: torch.where(x > 0, x, 0.1 * x),
    lambda x: x / 2 + x.mul(3).div_(4), lambda x: x.add_(x, alpha=2),
    lambda x: F.gelu(x, approximate="tanh"), lambda x: x.square().add(1e-6).sqrt() - 1e-3,
    lambda x: x.permute(0, 1, 3, 2),
    lambda x: torch.einsum("bchw->bcwh", x), lambda x: x[..., ::2], lambda x: F.interpolate(x, scale_factor=2),
    lambda x: F.interpolate(x, x.shape[-1], mode="bilinear"), lambda x: F.adaptive_avg_pool2d(x, (3, None)),
    lambda x: x - x.amax((2, 3), keepdim=True), lambda x: torch.cat([x[:, :4], x[:, 4:]], 1), lambda x: x.flip(3),
    lambda x: x.unflatten(1, (2, 4)).flatten(1, 2), lambda x: torch.stack([x, 2 * x]).sum(0), lambda x: x.expand_as(x),
    lambda x: F.pad(x, (1, 0, 0, 1)), lambda x: x.unsqueeze(2).squeeze(2), lambda x: x.movedim(1, -1).movedim(-1, 1),
    lambda x: x.new_zeros(x.shape) + x, lambda x: torch.zeros_like(x).add(x), lambda x: x.to(torch.float32).to(x),
    lambda x: F.normalize(x, dim=2), lambda x: x.softmax(-1) * x, lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
])  # fmt: skip
def test_any_spelling(function):
    if function is torch.Tensor.clip_:
        function = lambda x: x.clip_(0, 6)  # noqa: E731
    model = Net(lambda net, x: function(x)).double().eval()
    x = torch.randn(1, 3, 9, 8, dtype=torch.float64)
    small = mfp.compact(model, x)
    assert small.a.out_channels == 6 or small.report.kept_because
    compare(model, small, 3, 9, 8, tolerance=1e-6)
    compare(model, small, 3, 12, 12, tolerance=1e-6)


def test_a_class_token_is_expanded_to_any_batch():
    def function(net, x):
        batch, _, height, width = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([net.token.expand(batch, -1, -1), tokens], 1)
        tokens = net.linear(tokens) + tokens[:, :1]
        return tokens[:, 1:].transpose(1, 2).reshape(batch, 8, height, width)

    small = compacted(Net(function, token=nn.Parameter(torch.randn(1, 1, 8)), linear=nn.Linear(8, 8)), 3, 6, 6)
    assert small.token.shape == (1, 1, 8)


def test_writes_into_views():
    def first_channels(net, x):
        x[:, :2] += 1
        return x

    def read_later(net, x):
        half, both = x[:, :3], x + 1
        half.mul_(2)  # a view: x changes, too
        F.relu_(both)
        return x * both

    def middle(net, x):
        y = x.clone()
        y[:, :, 1:-1, 1:-1] = 0.5
        y[:, 6].zero_()
        return y

    for function in (first_channels, read_later, middle):
        torch.manual_seed(0)
        compacted(Net(function), 3, 7, 7)


def test_dropouts_come_back_in_train_mode():
    class Drops(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = killed(nn.Conv2d(3, 8, 1), 1, 4), nn.Conv2d(8, 8, 1)
            self.drop, self.whole = nn.Dropout(0.3), nn.Dropout2d(0.25)
            self.never, self.fc = nn.Dropout(0.0), nn.Linear(8, 4)

        def forward(self, x):
            x = self.never(self.whole(self.b(self.drop(self.a(x)))))
            return self.fc(F.dropout(x.mean((2, 3)), 0.4, self.training, inplace=True))

    torch.manual_seed(0)
    model = Drops().train()
    small = mfp.compact(model, torch.randn(2, 3, 5, 5))
    drops = {name: m for name, m in small.named_modules() if isinstance(m, nn.modules.dropout._DropoutNd)}
    assert {(type(m), m.p) for m in drops.values()} == {(nn.Dropout, 0.3), (nn.Dropout2d, 0.25), (nn.Dropout, 0.4)}
    assert {"drop", "whole"} < set(drops) and all(m.training for m in drops.values())
    x = torch.randn(64, 3, 5, 5)
    assert not torch.equal(small(x), small(x))
    small.eval()
    assert torch.equal(small(x), small(x))


def test_dropouts_survive_a_write_into_a_view():
    """torch's own way to a functional graph drops them."""

    def function(net, x):
        half = x[:, :3]
        half.add_(1)
        return net.drop(x)

    model = Net(function, drop=nn.FeatureAlphaDropout(0.3)).double().eval()
    small = compacted(model, 3, 6, 6)
    assert isinstance(small.drop, nn.FeatureAlphaDropout) and small.drop.p == 0.3


def test_frozen_batchnorms():
    torch.manual_seed(0)
    norm = randomize(nn.Sequential(nn.BatchNorm2d(8)))[0]
    model = Net(lambda net, x: net.later(net.frozen(x)), frozen=norm, later=nn.BatchNorm2d(8)).double()
    for layer in (model.frozen, model.later):
        layer.weight.data[[1, 4]], layer.bias.data[[1, 4]] = 0, 0
    model.train()
    model.frozen.eval().requires_grad_(False)
    small = mfp.compact(model, torch.randn(2, 3, 6, 6, dtype=torch.float64))
    assert small.training and small.later.training and not small.frozen.training
    assert not any(parameter.requires_grad for parameter in small.frozen.parameters())
    before = copy.deepcopy(small.frozen.state_dict())
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    assert difference(model(x).detach(), small(x).detach()) < 1e-12
    assert all(torch.equal(value, before[key]) for key, value in small.frozen.state_dict().items())
    assert small.later.num_batches_tracked == 1


def test_hooks_are_part_of_the_computation_and_said():
    model = Net(lambda net, x: x)
    model.b.register_forward_hook(lambda module, args, result: result + 1)
    model.a.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    small = compacted(model, 3, 5, 5)
    assert small.a.out_channels == 6
    assert [line.partition(":")[0] for line in small.report.kept_because] == ["a", "b"]
    assert all("forward hooks" in line for line in small.report.kept_because)


def test_tied_weights_stay_tied_or_whole():
    tied = nn.Sequential(killed(nn.Conv2d(8, 8, 1), 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1))
    tied[2].weight, tied[2].bias = tied[0].weight, tied[0].bias
    small = compacted(tied, 8, 5, 5)
    assert small.report.kept_because == []  # called twice, whatever it is called
    tied[2].bias = nn.Parameter(torch.randn(8).double())
    with pytest.warns(UserWarning, match="removed nothing: see report.kept_because"):
        small = compacted(tied, 8, 5, 5)
    assert any("its weight is used in several ways" in reason for reason in small.report.kept_because)
