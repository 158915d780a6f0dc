"""What compact says about its own result: a right one passes, a wrong one names its layer, nothing goes silently."""

import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision
from compact_cases import compacted, difference, killed, masked, randomize
from torch import nn

import mfp
from mfp.compact import contraction, elementwise, norms
from mfp.compact.check import largest_difference
from mfp.compact.operators import RULES

torch.set_num_threads(1)


# ---- right results pass, whatever rounding does


def test_rounding_noise_is_no_difference():
    """InstanceNorm of channels without any variance: what is left of them is the last bit of a mean."""
    torch.manual_seed(0)
    first = killed(nn.Conv2d(3, 6, 3, padding=1), *range(6))
    first.bias.data = torch.tensor([0.1, 0.7, -0.3, 1.1, 0.0, 0.9])
    second = nn.Conv2d(6, 4, 1)
    second.weight.data[[1, 2]] = 0
    model = nn.Sequential(first, second, nn.InstanceNorm2d(4), nn.Conv2d(4, 3, 1, bias=False)).eval()
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(1, 3, 7, 7, dtype=dtype)
        largest = model.to(dtype)(x).abs().max()
        assert largest < 1e-5
        small = mfp.compact(model, x)
        assert small(x).abs().max() < 1e-5
        assert small.get_submodule("0").out_channels < 6


def ill_conditioned(depth=24, width=16):
    """Every BatchNorm scales up by a hundred and shifts: float32 loses a digit every few layers."""
    torch.manual_seed(0)
    layers = []
    for i in range(depth):
        conv, norm = nn.Conv2d(width if i else 3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        norm.running_var.uniform_(1e-6, 1e-4)
        norm.running_mean.uniform_(-1, 1)
        norm.bias.data.uniform_(-100, 100)
        layers += [killed_conv(conv), norm, nn.Hardtanh(-40.0, 40.0)]
    return nn.Sequential(*layers, nn.Conv2d(width, 5, 1)).eval()


def killed_conv(conv):
    conv.weight.data[::4] = 0
    return conv


def test_an_ill_conditioned_network_is_judged_by_what_rounding_does_to_it():
    model, x = ill_conditioned(), torch.randn(1, 3, 9, 9)
    with torch.no_grad():
        single = model(x)
        exact = model.double()(x.double())
        model.float()
    assert difference(exact, single.double()) > 0.01, "the network is no test"
    small = mfp.compact(model, x)
    assert small.report.flops_saved > 0.35
    assert small.report.max_difference < 1e-6
    mfp.compact(model, x, fold_bn=True)
    for fold_bn in (False, True):
        with torch.no_grad():
            assert difference(exact, mfp.compact(model.double(), x.double(), fold_bn)(x.double())) < 1e-6


def test_what_is_not_finite_is_a_difference(monkeypatch):
    """A slot that nobody reads becomes 0 / 0 where a rule lets it, and the reader's weight of zero does not help."""
    nan, inf = float("nan"), float("inf")
    theirs = torch.tensor([1.0, -2.0, inf])
    for ours, expected in (([1, -2, 3], 0), ([1, -1, inf], 0.5), ([nan, -2, inf], inf), ([1, inf, inf], inf)):
        assert largest_difference([torch.tensor(ours)], [theirs]) == expected

    class Ratio(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(3, 16, 3)
            self.ratio, self.other = nn.Conv2d(16, 4, 1), nn.Conv2d(16, 4, 1)
            self.ratio.weight.data[:, 5] = 0

        def forward(self, x):
            a = self.a(x)
            return self.ratio(a / (self.b(x).abs() + 1)), self.other(a)

    monkeypatch.setattr(elementwise.Elementwise, "is_tame", staticmethod(lambda node, carriers: True))
    with pytest.raises(mfp.MfpError, match="differs by inf"):
        mfp.compact(Ratio().eval(), torch.randn(1, 3, 9, 9), fold_bn=True)


def test_a_deep_network_with_statistics_of_chance():
    """efficientnet_v2_m, whose outputs in float32 and float64 are far apart: a right result is not refused."""
    model, x = masked(torchvision.models.efficientnet_v2_m()), torch.randn(1, 3, 64, 64)
    small = mfp.compact(model, x)
    assert small.report.flops_saved > 0.2
    with torch.no_grad():
        assert difference(model.double()(x.double()), small.double()(x.double())) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_judged_in_its_own_terms(dtype):
    torch.manual_seed(0)
    model = randomize(
        nn.Sequential(killed(nn.Conv2d(3, 16, 3), 1, 4), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3))
    )
    small = mfp.compact(model.eval().to(dtype), torch.randn(1, 3, 9, 9, dtype=dtype))
    assert small.get_submodule("0").out_channels == 14
    assert small.get_submodule("0").weight.dtype is dtype


def test_constant_and_integer_outputs():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = killed(nn.Conv2d(3, 8, 1), 1, 4), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            x = self.b(self.a(x))
            return x.argmax(1), x * 0, x.flatten(1).shape[1], torch.full_like(x, float("inf")), x[:, :0], x

    small = mfp.compact(Odd().eval(), torch.randn(1, 3, 5, 5))
    assert small.b.in_channels == 6
    assert small(torch.zeros(2, 3, 7, 5))[2] == 4 * 35


# ---- wrong rules are found, and the layer is named


class Faulty(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = killed(nn.Conv2d(4, 8, 3, padding=1), 1, 4)
        self.norm = nn.BatchNorm2d(8)
        self.middle = nn.Sequential(nn.Conv2d(8, 8, 1), nn.PReLU(8))
        self.branch = killed(nn.Conv2d(8, 8, 3, padding=1), 0, 5, 6)
        self.halves = nn.Conv2d(8, 6, 1)
        self.head = nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, x):
        x = self.middle(self.norm(self.stem(x)).relu())
        x = x + self.branch(x)
        first, second = self.halves(torch.cat([x[:, 4:], x[:, :4]], 1)).chunk(2, 1)
        return self.head(torch.cat([first.sigmoid(), F.max_pool2d(second, 3, 1, 1)], 1))


def wrong_rows(monkeypatch):
    real = contraction.cut_weight

    def cut_weight(weight, **how):
        left = real(weight, **how)
        return left.flip(0) if weight.shape[:2] == (8, 4) else left

    monkeypatch.setattr(contraction, "cut_weight", cut_weight)


def wrong_norm(monkeypatch):
    real = norms.cut_norm

    def cut(*args):
        norm = real(*args)
        norm.running_mean += 1
        return norm

    monkeypatch.setattr(norms, "cut_norm", cut)


def wrong_constant(monkeypatch):
    real = norms.shifted
    rule = norms.BatchNorm(lambda net, node, const: real(net, node, const) + 1)
    monkeypatch.setitem(RULES, torch.ops.aten.batch_norm, rule)


def wrong_join(monkeypatch):
    real = elementwise.ResidualJoin
    monkeypatch.setattr(elementwise, "ResidualJoin", lambda index, dim, bias: real(index.flip(0), dim, bias))


def wrong_sigmoid(monkeypatch):
    real = elementwise.Elementwise.write

    def write(self, out, node):
        piece = real(self, out, node)
        if node.target is torch.ops.aten.sigmoid.default:
            piece.node.target = torch.ops.aten.tanh.default
        return piece

    monkeypatch.setattr(elementwise.Elementwise, "write", write)


def wrong_need(monkeypatch):
    """A conv that forgets half of what it needs: its input is cut too far."""
    real = contraction.nonzero_weights

    def weights(net, layer):
        found = real(net, layer).clone()
        if layer.weight.target == "head.weight":
            found[:, :, 0] = False
        return found

    monkeypatch.setattr(contraction, "nonzero_weights", weights)


FAULTS = [
    (wrong_rows, "stem"), (wrong_norm, "norm"), (wrong_constant, r"middle\.0"),
    (wrong_join, r"the network itself \(aten.add"), (wrong_need, "head"),
    (wrong_sigmoid, r"the network itself \(aten.sigmoid"),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_a_fault_nothing_is_said(dtype):
    model, x = randomize(Faulty()).to(dtype).eval(), torch.randn(2, 4, 7, 7, dtype=dtype)
    assert mfp.compact(model, x).report.max_difference < 1e-4


@pytest.mark.parametrize(("fault", "where"), FAULTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wrong_rule_is_an_error_that_names_the_layer(fault, where, dtype, monkeypatch):
    model, x = randomize(Faulty()).to(dtype).eval(), torch.randn(2, 4, 7, 7, dtype=dtype)
    fault(monkeypatch)
    with pytest.raises(mfp.MfpError, match=rf"compact Faulty: .* differs by .* it begins in {where}"):
        mfp.compact(model, x)


def test_a_fault_of_the_serving_form_says_so(monkeypatch):
    real = mfp.serving.prepare.fold_batchnorm

    def fold(small):
        real(small)
        next(m for m in small.modules() if isinstance(m, nn.Conv2d)).bias.data += 1

    monkeypatch.setattr(mfp.serving.prepare, "fold_batchnorm", fold)
    with pytest.raises(mfp.MfpError, match="begins in the serving form"):
        mfp.compact(randomize(Faulty()).eval(), torch.randn(2, 4, 7, 7), fold_bn=True)


def test_a_wrong_result_of_a_noisy_network_is_still_wrong(monkeypatch):
    """What rounding does to the network is no excuse for more than that."""
    model, x = ill_conditioned(depth=8), torch.randn(1, 3, 9, 9)
    mfp.compact(model, x)
    wrong_norm(monkeypatch)
    with pytest.raises(mfp.MfpError, match="begins in 1 "):
        mfp.compact(model, x)


# ---- never silent


class Keeps(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.first, self.second, self.function = killed(nn.Conv2d(3, 8, 1), 1, 4), nn.Conv2d(8, 4, 1), function

    def forward(self, x):
        return self.second(self.function(self.first(x)))


def test_what_is_not_understood_is_kept_and_said():
    small = compacted(Keeps(lambda x: x * 2 + torch.cummax(x.sin(), 1).values), 3, 5, 5)
    assert small.second.in_channels == 8
    (line,) = small.report.kept_because
    assert line.startswith("cummax: aten.cummax.default is not understood; the result of sin")
    assert f"kept: {line}" in str(small.report)


KEEPERS = [
    (lambda x: x.reshape(x.shape[0], 4, -1).sort(1).values.reshape(x.shape), "reshape"),
    (lambda x: x.sort(1).values, "sort"),
    (lambda x: x[:, torch.arange(8).flip(0)], "index"),
    (lambda x: x + x.flatten(2).transpose(1, 2).cumsum(2).transpose(1, 2).reshape(x.shape), "cumsum"),
    (lambda x: F.local_response_norm(x, 3), "avg_pool3d"),
    (lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (8,)).permute(0, 3, 1, 2), "layer_norm"),
    (lambda x: x.softmax(1), "softmax"),
    (lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2), "pixel"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "word"), KEEPERS)
def test_a_zero_filter_that_had_to_stay_is_named(function, word):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "mfp.compact removed nothing")
        small = compacted(Keeps(function), 3, 6, 6)
    if small.first.out_channels == 8 or small.second.in_channels == 8:
        assert any(word in line for line in small.report.kept_because), small.report


def test_zero_filters_that_fill_up_a_group_are_named():
    grouped = killed(nn.Conv2d(4, 8, 1, groups=2), 0, 1, 5)
    small = compacted(nn.Sequential(nn.Conv2d(3, 4, 1), grouped, nn.ReLU(), nn.Conv2d(8, 2, 1)), 3, 5, 5)
    assert small.get_submodule("1").out_channels == 6
    assert small.report.kept_because == ["1 (conv2d_1): 1 zero filters stay, to fill up its groups"]


def test_filters_that_are_the_networks_output_are_named():
    small = compacted(nn.Sequential(nn.Conv2d(3, 4, 1), killed(nn.Conv2d(4, 8, 1), 2)), 3, 5, 5)
    assert any("outputs keep their width" in line and "1 (" in line for line in small.report.kept_because)


def test_nothing_removed_is_a_warning():
    with pytest.warns(UserWarning, match="removed nothing: no filter of the model is zero; was the mask applied?"):
        small = mfp.compact(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)), torch.randn(1, 3, 5, 5))
    assert small.report.nothing_removed
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = mfp.compact(Keeps(torch.relu), torch.randn(1, 3, 5, 5))
        mfp.compact(nn.Sequential(nn.Conv2d(3, 4, 1)), torch.randn(1, 3, 5, 5), fold_bn=True)
        mfp.compact(nn.Sequential(nn.ReLU()), torch.randn(1, 3, 5, 5))
    assert not small.report.nothing_removed
