"""A 1x1 conv and the depthwise one behind it in one op, and linear layers as convs, in the serving form."""

import copy

import pytest
import torch
import torch.nn.functional as F
from compact_cases import difference, served
from test_files_hostile import rewritten
from torch import nn

import mfp
from mfp import backend, layer_ops, reference
from mfp.conv_weights import pack_conv2d, pack_grouped_conv2d
from mfp.serving.modules import ServingConv2d, ServingLinear, ServingPointwiseDepthwise2d

CL = torch.channels_last
pytestmark = [
    pytest.mark.usefixtures("three_threads"),
    pytest.mark.skipif(backend.backends()["cpu"].unusable is not None, reason="mfp._C is not built"),
]

# (batch, channels, height, width), channels between, kernel, stride, padding, dilation
CASES = [
    *(((2, 5, 9, 11), channels, (3, 3), (1, 1), (1, 1), (1, 1)) for channels in (1, 8, 15, 16, 17, 40, 48, 49, 97)),
    *(((1, 7, size, size + 1), 200, (3, 3), (2, 2), (1, 1), (1, 1)) for size in (1, 2, 7, 14, 30)),
    ((1, 6, 228, 120), 24, (5, 5), (2, 1), (2, 2), (1, 1)),  # bands of rows
    ((1, 3, 5, 3300), 40, (3, 3), (1, 2), (1, 1), (1, 1)),  # rows that are computed one at a time
    ((2, 4, 40, 9), 33, (3, 3), (1, 1), (3, 3), (3, 3)),
    ((1, 4, 39, 3), 5600, (3, 3), (2, 2), (40, 5), (3, 2)),  # more padding than image
    ((1, 4, 20, 5), 20, (1, 3), (3, 1), (0, 1), (1, 1)),  # rows that nothing reads
]  # fmt: skip


def sample(case, generator):
    shape, channels, kernel, *geometry = case
    x = torch.randn(shape, generator=generator).contiguous(memory_format=CL)
    first = torch.randn(channels, shape[1], 1, 1, generator=generator), torch.randn(channels, generator=generator)
    second = torch.randn(channels, 1, *kernel, generator=generator), torch.randn(channels, generator=generator)
    return x, pack_conv2d(*first), pack_grouped_conv2d(*second), geometry


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_bits_as_by_two_ops(isa, case):
    (batch, *image), channels = case[:2]
    # for 16 threads one after the other, for fewer in one pass: that is faster above 200,000 numbers a thread
    case = (max(batch, 650_000 // (channels * image[1] * image[2])), *image), *case[1:]
    x, first, second, geometry = sample(case, torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    for activations in (("relu6", "none"), ("silu", "hardswish")):
        between = layer_ops.conv2d(x, *first, channels, (1, 1), (0, 0), (1, 1), activations[0])
        expected = layer_ops.grouped_conv2d(between, *second, *geometry, activations[1])
        arguments = (*first, activations[0], channels, *second, *geometry, activations[1])
        try:
            for threads in (1, 2, 16):
                torch.set_num_threads(threads)
                actual = layer_ops.pointwise_depthwise_conv2d(x, *arguments)
                assert actual.is_contiguous(memory_format=CL)
                assert torch.equal(actual, expected)
        finally:
            torch.set_num_threads(before)
        alone = [layer_ops.pointwise_depthwise_conv2d(image[None], *arguments) for image in x[:3]]
        assert torch.equal(torch.cat(alone), expected[:3])
        right = reference.pointwise_depthwise_conv2d(x.double(), *(
            value.double() if isinstance(value, torch.Tensor) else value for value in arguments
        ))  # fmt: skip
        assert (expected - right).abs().max() < 1e-5 * right.abs().max()
    assert layer_ops.pointwise_depthwise_conv2d(x[:0], *arguments).shape == (0, *expected.shape[1:])


def test_opcheck_and_wrong_arguments():
    x, first, second, geometry = sample(((1, 3, 6, 5), 20, (3, 3), (1, 2), (1, 1), (1, 1)), torch.Generator())
    op = torch.ops.mfp.pointwise_depthwise_conv2d
    torch.library.opcheck(op.default, (x, *first, "relu", 20, *second, *geometry, "silu"))
    given = {
        "input": x, "pointwise_weights": first[0], "pointwise_bias": first[1], "pointwise_activation": "none",
        "channels": 20, "weights": second[0], "bias": second[1], "stride": (1, 1), "padding": (1, 1),
        "dilation": (1, 1), "activation": "none",
    }  # fmt: skip
    for change, message in (
        ({"input": x[:, :2]}, "input is"), ({"input": x[0]}, "input is"), ({"input": x[:, :, :0]}, "does not fit"),
        ({"channels": 33}, "33 filters in 2 blocks"), ({"weights": second[0][..., :16]}, "weights"),
        ({"bias": second[1][:16]}, "bias is"), ({"pointwise_bias": first[1].double()}, "expected float32"),
        ({"pointwise_weights": torch.zeros(2, 3, 3, 3, 16)}, "a kernel of 1x1"), ({"stride": (0, 1)}, "stride"),
        ({"pointwise_activation": "tanh"}, "activation tanh"), ({"padding": (0, 0), "input": x[:, :, :2]}, "fit"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            op(**{**given, **change})


class Inverted(nn.Module):
    """An inverted residual block and a classifier; with ``reread`` something else reads what is between the two."""

    def __init__(self, reread: bool = False) -> None:
        super().__init__()
        self.expand, self.depthwise = nn.Conv2d(6, 30, 1), nn.Conv2d(30, 30, 3, 2, 1, groups=30)
        self.project, self.head, self.reread = nn.Conv2d(30, 12, 1), nn.Linear(12, 7), reread

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        between = F.relu6(self.expand(x))
        x = self.project(F.hardswish(self.depthwise(between))).mean((2, 3))
        return self.head(x) + (between.mean() if self.reread else 0)


def serving_of(model):
    return served(model, torch.randn(2, 6, 18, 15, generator=torch.Generator().manual_seed(1)))


def test_the_serving_form_has_them_in_one(tmp_path):
    torch.manual_seed(0)
    serving = serving_of(Inverted())
    kinds = {type(module) for module in serving.modules()}
    assert {ServingPointwiseDepthwise2d, ServingLinear} < kinds
    (both,) = (module for module in serving.modules() if isinstance(module, ServingPointwiseDepthwise2d))
    assert (both.pointwise.activation, both.depthwise.activation) == ("relu6", "hardswish")
    x = torch.randn(3, 6, 18, 15)
    assert mfp.flops(serving, x) == mfp.flops(Inverted(), x)
    mfp.save(serving, tmp_path / "small.mfp")
    loaded = mfp.load(tmp_path / "small.mfp")
    with torch.inference_mode():
        expected = serving(x)
        for again in (loaded, copy.deepcopy(serving)):
            assert torch.equal(again(x), expected)
        kept = both.depthwise(both.pointwise(x))
        assert torch.equal(both(x), kept)
        large = torch.randn(40, 6, 36, 15)  # in one pass
        assert torch.equal(both(large), both.depthwise(both.pointwise(large)))
    assert difference(serving(x), expected) < 1e-5  # with gradients: by torch


def test_a_file_without_one_of_the_two_is_refused(tmp_path):
    mfp.save(serving_of(Inverted()), tmp_path / "small.mfp")

    def change(description, tensors):
        (name,) = (name for name in description["modules"] if name.endswith(".depthwise"))
        description["modules"][name] |= {"class": "Module", "config": {}}

    rewritten(tmp_path / "small.mfp", tmp_path / "bad.mfp", change)
    with pytest.raises(mfp.MfpError, match="is not made of two convolutions"):
        mfp.load(tmp_path / "bad.mfp")


def test_not_where_something_else_reads_what_is_between():
    torch.manual_seed(0)
    serving = serving_of(Inverted(reread=True))
    assert not any(isinstance(module, ServingPointwiseDepthwise2d) for module in serving.modules())


def test_a_depthwise_conv_behind_another_one():
    torch.manual_seed(0)
    depthwise = [nn.Conv2d(16, 16, 3, padding=1, groups=16) for _ in range(2)]
    model, x = nn.Sequential(nn.Conv2d(6, 16, 1), *depthwise).eval(), torch.randn(2, 6, 18, 15)
    serving = serving_of(model)
    assert sum(isinstance(module, ServingPointwiseDepthwise2d) for module in serving.modules()) == 1
    with torch.inference_mode():
        assert difference(serving(x), model(x)) < 1e-5


@pytest.mark.parametrize("change", ["weight", "bias"])
@pytest.mark.parametrize("layer", ["pointwise", "depthwise"])
def test_packed_weights_follow_their_parameters(layer, change):
    torch.manual_seed(0)
    pointwise = ServingConv2d(4, 20, 1, activation="relu").eval()
    both = ServingPointwiseDepthwise2d(pointwise, ServingConv2d(20, 20, 3, padding=1, groups=20)).eval()
    x = torch.randn(1, 4, 9, 9)
    with torch.inference_mode():
        before = both(x)
    with torch.no_grad():
        getattr(getattr(both, layer), change).mul_(2)
        expected = both.depthwise(both.pointwise(x))
    with torch.inference_mode():
        assert not torch.equal(both(x), before)
        assert difference(both(x), expected) < 1e-6


def test_linear_layers(isa):
    torch.manual_seed(0)
    layer = ServingLinear(301, 77).eval()
    x = torch.randn(9, 301)
    right = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    with torch.inference_mode():
        actual = layer(x)
        assert difference(right, actual) < 1e-6
        assert torch.equal(torch.cat([layer(row[None]) for row in x]), actual)
        assert torch.equal(layer(x.view(3, 3, 301)), F.linear(x.view(3, 3, 301), layer.weight, layer.bias))
        assert layer(x[:0]).shape == (0, 77)
        assert layer(x.T.contiguous().T).equal(actual)
    with torch.no_grad():
        layer.weight.zero_()
        assert torch.equal(layer(x), layer.bias.expand(9, -1))
    no_bias = ServingLinear(5, 3, bias=False).eval()
    with torch.inference_mode():
        assert difference(F.linear(x[:, :5], no_bias.weight), no_bias(x[:, :5])) < 1e-6
