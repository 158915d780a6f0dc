"""The serving form: what is fused into convs, when memory may be overwritten, and when packed weights are renewed."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from compact_cases import difference, images, masked, served
from small_networks import NETWORKS
from torch import nn

import mfp
from mfp import layer_ops
from mfp.serving.modules import FusedJoin, ServingConv2d, ServingGlobalAvgPool2d, ServingJoin2d, has_avx512


class Net(nn.Module):
    """Convs named a, b, c and a function of them."""

    def __init__(self, function, groups=1):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Conv2d(6, 24, 3, padding=1)
        self.b = nn.Conv2d(24, 24, 3, padding=1, groups=groups)
        self.c = nn.Conv2d(24, 24, 1)
        self.same = nn.AlphaDropout()
        self.table = nn.Parameter(torch.randn(1, 24, 12, 12))
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def kinds(serving):
    return {name: type(module) for name, module in serving.named_children()}


def test_joins_and_activations_are_computed_in_the_convs():
    def block(net, x):
        x = F.relu(net.a(x))
        return F.relu(x + net.c(F.relu6(net.b(x))))

    serving = served(Net(block), images())
    assert kinds(serving) == {"a": ServingConv2d, "b": ServingConv2d, "c": ServingJoin2d}
    assert (serving.a.activation, serving.b.activation, serving.c.relu) == ("relu", "relu6", True)
    assert serving.c.inplace


def test_mfps_op_computes_them_and_writes_into_the_residual(monkeypatch):
    called = []
    for name in ("conv2d", "conv2d_join_"):
        op = getattr(layer_ops, name)
        monkeypatch.setattr(
            layer_ops, name, lambda *args, op=op: (called.append((op.__name__, args[0].data_ptr())), op(*args))[1]
        )
    model = Net(lambda net, x: F.relu(F.relu(net.a(x)) + net.c(net.b(net.a(x)))))
    serving = mfp.compact(model.eval(), images(), fold_bn=True)
    with torch.inference_mode():
        called.clear()
        result = serving(images())
    assert [name for name, _ in called] == ["conv2d", "conv2d", "conv2d", "conv2d_join_"][-len(called) :]
    assert called[-1] == ("conv2d_join_", result.data_ptr())


@pytest.mark.parametrize(("groups", "filters"), [(1, 24), (24, 24), (4, 21)])
def test_filters_are_filled_up_where_that_helps_the_reader(groups, filters):
    model = Net(lambda net, x: net.b(F.relu(net.a(x))), groups)
    for parameter in (model.a.weight, model.a.bias):
        parameter.data[:3] = 0  # 21 of 24 are left
    serving = served(model, images())
    assert serving.a.out_channels == filters


def test_joins_of_a_masked_resnet():
    torch.manual_seed(0)
    model = masked(torchvision.models.resnet18(num_classes=10), mask_bn=True)
    serving = mfp.compact(model, torch.zeros(1, 3, 64, 64), fold_bn=True)
    assert sum(isinstance(module, ServingJoin2d) for module in serving.modules()) == 7
    assert sum(isinstance(module, FusedJoin) for module in serving.modules()) == 1  # the stem's, pruned itself
    x = torch.randn(2, 3, 80, 72)
    with torch.inference_mode():
        assert difference(model.eval()(x), serving(x)) < 1e-5


@pytest.mark.parametrize(("function", "inplace"), [
    (lambda net, x: (lambda y: y + net.b(y))(net.a(x)), False),  # the conv reads what it would overwrite
    (lambda net, x: (lambda y: y + net.c(y))(net.a(x)), False),
    (lambda net, x: (lambda y: (y + net.c(net.b(y)), y))(net.a(x))[0], True),
    (lambda net, x: (lambda y, z: (y + net.c(z)) * y)(net.a(x), net.b(net.a(x))), False),  # read afterwards
    (lambda net, x: (lambda y: y.view_as(y) + net.c(y))(net.a(x)), False),  # a view of what the conv reads
    (lambda net, x: (lambda y: y + net.b(net.same(y)))(net.a(x)), False),  # returns what it is given
])  # fmt: skip
def test_memory_is_overwritten_only_where_nothing_reads_it(function, inplace):
    serving = served(Net(function), images())
    joins = [module for module in serving.modules() if isinstance(module, ServingJoin2d)]
    assert [join.inplace for join in joins] == [inplace]


def test_a_chain_of_joins_is_computed_in_one_memory():
    def function(net, x):
        y = net.a(x)
        y = F.relu(y + net.c(net.b(y)))
        return F.relu(y + y.sigmoid())

    serving = served(Net(function), images())
    joins = [module for module in serving.modules() if isinstance(module, FusedJoin | ServingJoin2d)]
    assert [join.inplace for join in joins] == [True, True]


def test_winograd_where_it_is_faster_and_not_switched_off(monkeypatch):
    called = []
    op = layer_ops.conv2d
    monkeypatch.setattr(layer_ops, "conv2d", lambda *args: (called.append(args[8]), op(*args))[1])
    torch.manual_seed(0)
    conv = ServingConv2d(24, 24, 3, padding=1).eval()
    large, small = torch.randn(2, 24, 14, 14), torch.randn(2, 24, 6, 8)
    with torch.inference_mode():
        for x in (large, small, large):
            assert difference(F.conv2d(x, conv.weight, conv.bias, padding=1), conv(x)) < 5e-6
        monkeypatch.setenv("MFP_WINOGRAD", "0")
        conv(large)
        monkeypatch.delenv("MFP_WINOGRAD")
        strided, dilated = ServingConv2d(24, 24, 3, 2, 1), ServingConv2d(24, 24, 3, dilation=2)
        for other in (strided, dilated, ServingConv2d(7, 24, 3), ServingConv2d(8, 24, 3), ServingConv2d(16, 16, 3)):
            other.eval()(large[:, : other.in_channels])
    assert called == [True, False, True, False, False, False, False, True, True]


@pytest.mark.parametrize("pool", [lambda x: F.adaptive_avg_pool2d(x, 1), lambda x: x.mean((-2, 3), keepdim=True)])
def test_means_of_channels(pool):
    class Pooling(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 20, 3)

        def forward(self, x):
            return pool(self.conv(x)).flatten(1)

    torch.manual_seed(0)
    model, x = Pooling().eval(), torch.randn(2, 3, 9, 12)
    small = mfp.compact(model, x, fold_bn=True)
    assert any(isinstance(module, ServingGlobalAvgPool2d) for module in small.modules())
    expected = model(x)
    assert difference(expected, small(x)) < 1e-6  # with gradients: by torch
    with torch.inference_mode():
        for _ in range(3):
            assert difference(expected, small(x)) < 1e-6
        assert difference(model(x[:1, :, :5]), small(x[:1, :, :5])) < 1e-6
        flat = torch.full((1, 3, 226, 226), 0.1)  # a sum of one pixel after the other would be off by 5e-4
        assert difference(model.double()(flat.double()).float(), small(flat)) < 1e-6
        assert small(x[:0]).shape == (0, 20)


def test_other_means_stay():
    class Others(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 20, 3)

        def forward(self, x):
            x = self.conv(x)
            parts = x.mean((1, 2), keepdim=True), x.mean(None, keepdim=True), x.mean(), F.adaptive_avg_pool2d(x, (1, 2))
            return x.mean((2, 3)) + sum(part.square().sum() for part in parts)

    torch.manual_seed(0)
    model, x = Others().eval(), torch.randn(2, 3, 9, 12)
    small = mfp.compact(model, x, fold_bn=True)
    assert not any(isinstance(module, ServingGlobalAvgPool2d) for module in small.modules())
    with torch.inference_mode():
        assert difference(model(x), small(x)) < 1e-6


@pytest.mark.parametrize("activation", ["none", "relu6", "silu"])
def test_convs_with_groups(activation):
    torch.manual_seed(0)
    for channels, filters, groups, stride, dilation, by_mfp in (
        (20, 20, 20, 2, 1, True), (6, 12, 6, 1, 1, False),  # depthwise; two filters of each channel
        (24, 24, 3, 1, 1, True), (24, 24, 3, 2, 1, True), (24, 24, 3, 3, 1, False), (24, 24, 3, 1, 2, False),
        (32, 32, 2, 1, 1, True), (8, 8, 2, 1, 1, False), (24, 48, 3, 1, 1, True), (12, 12, 2, 1, 1, False),
        (50, 34, 2, 3, 2, has_avx512()), (24, 24, 6, 1, 1, True),
    ):  # fmt: skip
        conv = ServingConv2d(channels, filters, 3, stride, 1, dilation, groups, activation=activation)
        x = torch.randn(2, channels, 9, 10)
        expected = conv(x)  # with gradients: by torch
        with torch.inference_mode():
            assert conv.runs_op(x) == by_mfp
            assert difference(expected, conv(x)) < 1e-6


def test_the_networks_input_is_not_overwritten():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(24, 24, 3, padding=1)
            self.other = nn.Conv2d(24, 24, 1)

        def forward(self, x):
            return x + self.other(F.relu(self.conv(x)))

    torch.manual_seed(0)
    model, x = Residual().eval(), torch.randn(2, 24, 5, 5).contiguous(memory_format=torch.channels_last)
    serving = mfp.compact(model, x, fold_bn=True)
    before = x.clone()
    with torch.inference_mode():
        assert difference(model(x), serving(x)) < 1e-5
    assert torch.equal(x, before)
    assert not serving.other.inplace


@pytest.mark.parametrize("function", [
    lambda net, x: net.table + net.b(net.a(x)),  # one table for the whole batch
    lambda net, x: net.a(x) + net.c(net.a(x).mean((2, 3), keepdim=True)),
    lambda net, x: net.b(net.a(x)) + net.b(net.b(net.a(x))),  # called more than once
    lambda net, x: net.b(net.a(x)).sigmoid() + F.hardswish(net.c(net.a(x))),
])  # fmt: skip
@pytest.mark.parametrize("groups", [1, 24])
def test_what_cannot_be_fused_is_computed_all_the_same(function, groups):
    model, x = Net(function, groups).eval(), images()
    serving = mfp.compact(model, x[:1], fold_bn=True)
    with torch.inference_mode():
        for batch in (x, x[:1]):
            assert difference(model(batch), serving(batch)) < 1e-5


@pytest.mark.parametrize("function", [
    lambda net, x: (lambda y: net.b(y) + net.c(y) + y)(net.a(x)),
    lambda net, x: (lambda y: y + F.relu(net.a(x) + net.c(y)))(net.b(net.a(x))),
    lambda net, x: (lambda y: y + (net.b(y) + net.c(y)))(net.a(x)),
])  # fmt: skip
def test_sums_of_three(function):
    served(Net(function), images())


def test_a_conv_is_not_put_off_past_a_write_to_its_input():
    def function(net, x):
        y = net.a(x)
        z = net.c(y)
        torch.clamp_(y, 0, 0.1)
        return y + z

    served(Net(function), images())


def test_a_join_is_not_put_off_past_a_write_to_its_residual():
    def function(net, x):
        y, z = net.a(x), net.b(net.a(x)).sigmoid()
        total = y + z
        torch.clamp_(y, 0, 0.1)
        return F.relu(total) + y

    served(Net(function), images())


def test_hooks_stay():
    model = Net(lambda net, x: net.c(F.relu(net.a(x))))
    model.c.register_forward_hook(lambda module, inputs, output: output * 2)
    served(model, images())


def test_operators_that_may_return_their_input():
    """Inactive dropout, reshape, contiguous and to() give what they are given: that memory is not overwritten."""
    operators = [
        lambda x: F.dropout(x, 0.5, training=False), lambda x: x.reshape(x.shape), lambda x: x.contiguous(),
        lambda x: x.to(x.dtype), lambda x: x[:, :], lambda x: x.expand_as(x),
    ]  # fmt: skip
    for same in operators:
        serving = served(Net(lambda net, x, same=same: (lambda y: y + net.b(same(y)))(net.a(x))), images())
        assert not serving.b.inplace


def test_a_module_of_the_users_may_return_its_input():
    class Pass(nn.Module):
        def forward(self, x):
            return x

    model = Net(lambda net, x: (lambda y: y + net.b(net.same(y)))(net.a(x))).eval()
    model.same = Pass()
    serving = mfp.compact(model, images(), fold_bn=True)
    assert not serving.b.inplace
    with torch.inference_mode():
        assert difference(model(images()), serving(images())) < 1e-5


def test_sizes_that_agree_in_the_example_alone():
    """A pooled map has the size of the other one where the image is that small: later it is spread out."""
    model = Net(lambda net, x: net.a(x) + net.c(net.a(x).mean((2, 3), keepdim=True))).eval()
    serving = mfp.compact(model, torch.randn(1, 6, 1, 1), fold_bn=True)
    assert isinstance(serving.c, ServingJoin2d)
    with torch.inference_mode():
        assert difference(model(images()), serving(images())) < 1e-5


@pytest.mark.parametrize("groups", [1, 24])
@pytest.mark.parametrize("change", ["in place", "bias in place", "data", "data twice", "new parameter"])
def test_changed_parameters_are_packed_again(change, groups):
    model = Net(lambda net, x: net.b(net.a(x)), groups).eval()
    x = images()
    serving = mfp.compact(model, x[:1], fold_bn=True)
    with torch.inference_mode():
        before = serving(x)
    with torch.no_grad():
        if change == "in place":
            serving.b.weight.mul_(2)
            serving.b.bias.mul_(2)
        elif change == "bias in place":
            serving.b.bias.add_(1)
        elif change == "data":
            serving.b.weight.data, serving.b.bias.data = 2 * serving.b.weight.data, 2 * serving.b.bias.data
        elif change == "data twice":  # the second may lie where the first one was
            for factor in (4, 0.5):
                for parameter in (serving.b.weight, serving.b.bias):
                    parameter.data = factor * parameter.data
        else:
            serving.b.weight, serving.b.bias = (nn.Parameter(2 * p.data) for p in (serving.b.weight, serving.b.bias))
    with torch.inference_mode():
        assert difference(serving(x), before + 1 if change == "bias in place" else 2 * before) < 1e-6


@pytest.mark.parametrize("form", ["gradients", "reference", "float64", "deepcopy", "file"])
def test_everywhere_the_same_result(form, monkeypatch, tmp_path):
    def block(net, x):
        x = F.relu(net.a(x))
        return F.relu(x + net.c(F.relu(net.b(x))))

    model, x = Net(block).eval(), images()
    serving = mfp.compact(model, x[:1], fold_bn=True)
    with torch.inference_mode():
        expected = serving(x)
    if form == "gradients":
        assert difference(serving(x).detach(), expected) < 1e-5
        serving(x).sum().backward()
        assert all(parameter.grad is not None for parameter in serving.parameters() if parameter is not model.table)
        return
    if form == "reference":
        monkeypatch.setenv("MFP_BACKEND", "reference")
    if form == "float64":
        serving, x, expected = serving.double(), x.double(), expected.double()
    if form == "deepcopy":
        serving = copy.deepcopy(serving)
    if form == "file":
        mfp.save(serving, tmp_path / "small.mfp")
        serving = mfp.load(tmp_path / "small.mfp")
        assert isinstance(serving.c, ServingJoin2d)
        assert serving.c.inplace
        assert serving.c.relu
    with torch.inference_mode():
        assert difference(serving(x), expected) < 1e-5


@pytest.mark.parametrize("name", ["regnet_y", "shufflenet"])
def test_a_serving_form_counts_as_the_network_it_is_made_of(name):
    model, image = masked(NETWORKS[name]()), torch.zeros(1, 3, 64, 64)
    small, serving = mfp.compact(model, image), mfp.compact(model, image, fold_bn=True)
    wider = serving.report.flops_after / small.report.flops_after  # its widths are filled up
    assert 1 <= wider < 1.2
