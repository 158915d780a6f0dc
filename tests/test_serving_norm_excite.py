"""The serving form: BatchNorms that take in concatenations and activations, and squeeze-excite as one op."""

import pytest
import torch
import torch.nn.functional as F
from compact_cases import difference, images, served
from torch import nn

import mfp
from mfp.serving.modules import ServingNorm2d, ServingSqueezeExcite


class Dense(nn.Module):
    """A block of DenseNet: each layer reads all before it, concatenated, through a BatchNorm of its own."""

    def __init__(self, activation=F.relu, twice=False):
        super().__init__()
        torch.manual_seed(0)
        self.convs = nn.ModuleList(nn.Conv2d(channels, 8, 3, padding=1) for channels in (6, 14, 22))
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for channels in (6, 14, 22))
        for norm in self.norms:
            for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
        self.activation, self.twice = activation, twice

    def forward(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = torch.cat([x, conv(self.activation(norm(x)))], 1)
        return x.mean() + self.norms[0](x[:, :6]) if self.twice else x


@pytest.mark.parametrize("activation", [F.relu, F.silu, torch.sigmoid])
def test_norms_take_in_concatenations_and_activations(activation):
    serving = served(Dense(activation), images())
    norms = [module for module in serving.modules() if isinstance(module, ServingNorm2d)]
    name = activation.__name__ if activation is not torch.sigmoid else "none"
    assert [norm.activation for norm in norms] == [name] * 3
    targets = [str(node.target) for node in serving.graph.nodes if node.op == "call_function"]
    assert targets.count("aten.cat.default") == 3  # each is read by the next one, too
    assert mfp.flops(serving, images()) == mfp.flops(Dense(activation).eval(), images())


def test_a_concatenation_that_a_norm_alone_reads_is_not_written():
    class Last(Dense):
        def forward(self, x):
            a = self.convs[0](x)
            return self.convs[1](F.relu(self.norms[1](torch.cat([x, a], 1))))

    serving = served(Last(), images())
    assert not [node for node in serving.graph.nodes if node.target is torch.ops.aten.cat.default]
    norm = next(node for node in serving.graph.nodes if node.target == "norms.1")
    assert len(norm.args) == 2


def test_a_norm_that_is_called_twice_stays():
    serving = served(Dense(twice=True), images())
    assert sum(isinstance(module, nn.BatchNorm2d) for module in serving.modules()) == 1


@pytest.mark.parametrize("gradient", [False, True])
def test_norms_without_the_op(gradient):
    model = Dense(F.silu).eval()
    serving = mfp.compact(model, images(), fold_bn=True).double()
    with torch.set_grad_enabled(gradient):
        assert difference(model.double()(images().double()), serving(images().double())) < 1e-6


class Gated(nn.Module):
    """A conv whose result is gated, as in squeeze-excite."""

    def __init__(self, function, padding=0, gates=24):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.c = nn.Conv2d(6, 24, 3, padding=1), nn.Conv2d(24, 24, 1)
        self.reduce = nn.Conv2d(24, 5, 1, bias=False)
        self.expand = nn.Conv2d(5, gates, 1, padding=padding)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def mean(x):
    return x.mean((2, 3), keepdim=True)


@pytest.mark.parametrize("function", [
    lambda net, x: (lambda y: y * net.expand(F.silu(net.reduce(F.adaptive_avg_pool2d(y, 1)))).sigmoid())(net.a(x)),
    lambda net, x: (lambda y: F.hardsigmoid(net.expand(F.relu(net.reduce(mean(y))))) * y)(net.a(x)),
    lambda net, x: (lambda y: net.c(y + y * net.expand(net.reduce(mean(y))).sigmoid()))(net.a(x)),  # y is read later
])  # fmt: skip
def test_squeeze_excite_is_one_op(function):
    model = Gated(function)
    serving = served(model, images())
    found = [module for module in serving.modules() if isinstance(module, ServingSqueezeExcite)]
    assert len(found) == 1
    assert found[0].inplace == ("add" not in str(serving.graph))
    assert mfp.flops(serving, images()) == mfp.flops(model, images())
    with torch.enable_grad():  # by torch's own operators
        assert difference(model(images()), serving(images())) < 1e-5


@pytest.mark.parametrize("function", [
    lambda net, y: (y * net.expand(net.reduce(mean(y))).sigmoid()) * y.mean(),
    lambda net, y: y * (y * net.expand(net.reduce(mean(y))).sigmoid()).sigmoid(),
])  # fmt: skip
def test_products_behind_a_fused_one(function):
    model = Gated(lambda net, x: function(net, net.a(x)))
    serving = served(model, images())
    assert sum(isinstance(module, ServingSqueezeExcite) for module in serving.modules()) == 1
    with torch.enable_grad():
        assert difference(model(images()), serving(images())) < 1e-5


@pytest.mark.parametrize("hard", [False, True])
def test_gates_whose_filters_are_pruned_are_constants_of_the_op(hard):
    gate = F.hardsigmoid if hard else torch.sigmoid
    model = Gated(lambda net, x: (lambda y: net.c(y * gate(net.expand(F.relu(net.reduce(mean(y)))))))(net.a(x)))
    with torch.no_grad():
        model.expand.weight[3:17] = 0
        model.expand.bias[3:17] = torch.randn(14)
    serving = served(model, images())
    (found,) = (module for module in serving.modules() if isinstance(module, ServingSqueezeExcite))
    assert (found.expand_weight == 0).all(0).sum() == 14
    with torch.enable_grad():
        assert difference(model(images()), serving(images())) < 1e-5


@pytest.mark.parametrize(("function", "settings"), [
    (lambda net, x: (lambda y: y * net.expand(net.reduce(mean(y))).sigmoid())(net.a(x)), {"gates": 1}),  # one for all
    (lambda net, x: (lambda y: y[..., :3, :3] * net.expand(net.reduce(mean(y))).sigmoid())(net.a(x)), {"padding": 1}),
    (lambda net, x: (lambda y: y * net.expand(net.reduce(mean(net.c(y)))).sigmoid())(net.a(x)), {}),  # means of others
    (lambda net, x: (lambda y: y * net.expand(net.reduce(y.amax((2, 3), keepdim=True))).sigmoid())(net.a(x)), {}),
    (lambda net, x: (lambda y, m: y * net.expand(net.reduce(m)).sigmoid() + m)(net.a(x), mean(net.a(x))), {}),
    (lambda net, x: (lambda y: y * net.expand(net.reduce(mean(y))).tanh())(net.a(x)), {}),
])  # fmt: skip
def test_what_only_looks_like_squeeze_excite(function, settings):
    serving = served(Gated(function, **settings), images())
    assert not any(isinstance(module, ServingSqueezeExcite) for module in serving.modules())
