"""The serving form's convolutions, alone and joined into a residual, at every level of SIMD."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from mfp import backend, layer_ops, reference
from mfp.conv_weights import kernel_of_winograd, pack_conv2d, pack_grouped_conv2d, winograd_weight
from mfp.reference import ACTIVATIONS

CL = torch.channels_last
CLAMPS = ("none", "relu", "relu6")  # exact where the sum is
pytestmark = [
    pytest.mark.usefixtures("three_threads"),
    pytest.mark.skipif(backend.backends()["cpu"].unusable is not None, reason="mfp._C is not built"),
]

# (batch, channels, height, width), filters, kernel, stride, padding, dilation
CASES = [
    # one less, the same and one more than half a vector, a vector, a strip of AVX2 and of AVX-512
    *(((2, 19, 5, 6), filters, (3, 3), (1, 1), (1, 1), (1, 1))
      for filters in (1, 7, 8, 9, 15, 16, 17, 24, 25, 31, 32, 33, 40, 47, 48, 49, 56, 97)),
    # as many pixels as a tile has, one less and one more; ranges of pixels and of filters
    *(((1, 20, 1, pixels), 70, (1, 1), (1, 1), (0, 0), (1, 1)) for pixels in (1, 3, 4, 5, 6, 7, 8, 9, 500)),
    *(((3, 8, 9, 7), 20, *rest) for rest in itertools.product(
        [(1, 1), (3, 3), (2, 5)], [(1, 1), (2, 3)], [(0, 0), (1, 2), (4, 4)], [(1, 1), (2, 1)])),
    ((2, 3, 33, 31), 40, (7, 7), (2, 2), (3, 3), (1, 1)),  # a stem
    ((1, 4, 3, 3), 5, (3, 3), (1, 1), (2, 2), (3, 3)),  # more padding than image: no pixel has all taps
    ((1, 300, 7, 7), 200, (3, 3), (1, 1), (1, 1), (1, 1)),  # more weights than the nearest caches hold
]  # fmt: skip


def small_integers(*shape, generator):
    return torch.randint(-4, 5, shape, generator=generator).float()


def sample(case, generator):
    shape, filters, kernel, *geometry = case
    x = small_integers(*shape, generator=generator).contiguous(memory_format=CL)
    weight = small_integers(filters, shape[1], *kernel, generator=generator)
    bias = small_integers(filters, generator=generator)
    return x, weight, bias, geometry


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_torch_bitwise_on_whole_numbers(isa, case):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, geometry = sample(case, generator)
    expected = F.conv2d(x, weight, bias, *geometry)
    assert expected.abs().max() > 0
    packed = pack_conv2d(weight, bias)
    for activation in CLAMPS:
        actual = layer_ops.conv2d(x, *packed, len(weight), *geometry, activation)
        assert actual.is_contiguous(memory_format=CL)
        assert torch.equal(actual, ACTIVATIONS[activation](expected))
    for more in (0, 1, 50):
        channels = len(weight) + more
        index = torch.randperm(channels, generator=generator)[: len(weight)].sort().values
        residual = small_integers(len(x), channels, *expected.shape[2:], generator=generator)
        for relu in (False, True):
            right = residual.index_add(1, index, expected)
            actual = residual.clone(memory_format=CL)
            layer_ops.conv2d_join_(actual, x, *packed, index, *geometry, relu)
            assert torch.equal(actual, right.relu() if relu else right)


def test_real_numbers(isa):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 200, 9, 9, generator=generator)
    weight, bias = torch.randn(72, 200, 3, 3, generator=generator), torch.randn(72, generator=generator)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    actual = layer_ops.conv2d(x, *pack_conv2d(weight, bias), 72, (1, 1), (1, 1), (1, 1))  # from NCHW
    assert (actual - expected).abs().max() < 2e-6 * expected.abs().max()


def test_bitwise_the_same_for_any_batch_and_number_of_threads(isa):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 70, 11, 11, generator=generator).contiguous(memory_format=CL)
    weight, bias = torch.randn(90, 70, 3, 3, generator=generator), torch.randn(90, generator=generator)
    arguments = (*pack_conv2d(weight, bias), 90, (1, 1), (1, 1), (1, 1))
    expected = layer_ops.conv2d(x, *arguments)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(layer_ops.conv2d(x, *arguments), expected)
            assert torch.equal(torch.cat([layer_ops.conv2d(image[None], *arguments) for image in x]), expected)
    finally:
        torch.set_num_threads(before)


# (batch, channels, height, width), filters, padding: images that 4x4 tiles fill, and not; one pixel; part vectors
WINOGRAD_CASES = [
    ((2, 32, 8, 12), 32, (1, 1)), ((1, 64, 7, 7), 48, (1, 1)), ((3, 19, 9, 14), 21, (1, 1)), ((1, 5, 1, 1), 3, (1, 1)),
    ((1, 16, 3, 3), 17, (0, 0)), ((2, 24, 6, 5), 40, (0, 2)), ((1, 300, 14, 14), 97, (1, 1)),
]  # fmt: skip


@pytest.mark.parametrize("case", WINOGRAD_CASES, ids=str)
def test_winograd(isa, case):
    (shape, filters, padding), generator = case, torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).relu().contiguous(memory_format=CL)
    weight = torch.randn(filters, shape[1], 3, 3, generator=generator)
    bias = torch.randn(filters, generator=generator)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=padding)
    largest = expected.abs().max()
    arguments, geometry = pack_conv2d(winograd_weight(weight), bias), ((1, 1), padding, (1, 1))
    for activation, function in ACTIVATIONS.items():
        actual = layer_ops.conv2d(x, *arguments, filters, *geometry, activation, winograd=True)
        assert actual.is_contiguous(memory_format=CL)
        assert (actual - function(expected)).abs().max() < 5e-6 * largest
    index = torch.randperm(filters + 9, generator=generator)[:filters].sort().values
    residual = torch.randn(len(x), filters + 9, *expected.shape[2:], generator=generator).contiguous(memory_format=CL)
    right = residual.double().index_add(1, index, expected).relu()
    layer_ops.conv2d_join_(residual, x, *arguments, index, *geometry, True, winograd=True)
    assert (residual - right).abs().max() < 5e-6 * largest


NUMBERS = [*range(-100, 101), 1e-30, -1e-30, 3e38, -3e38, math.inf, -math.inf, math.nan]


@pytest.mark.parametrize("activation", ["hardswish", "silu"])
@pytest.mark.parametrize("kernel", [layer_ops.conv2d, layer_ops.grouped_conv2d, layer_ops.batch_norm])
def test_curves_in_every_kernel_and_at_every_number(isa, activation, kernel):
    """What is computed of a sum, against float64 and, where that is no number, torch in float32."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.cat([torch.tensor(NUMBERS), torch.randn(3000, generator=generator) * 4])
    x = numbers[: len(numbers) // 9 * 9].view(1, 1, 9, -1).expand(1, 5, -1, -1).contiguous(memory_format=CL)
    geometry = (1, 1), (0, 0), (1, 1)
    if kernel is layer_ops.batch_norm:
        actual = kernel([x], torch.ones(5), torch.zeros(5), activation)
    elif kernel is layer_ops.grouped_conv2d:
        actual = kernel(x, *pack_grouped_conv2d(torch.ones(5, 1, 1, 1), None), *geometry, activation)
    else:
        x = x[:, :1]
        actual = kernel(x, *pack_conv2d(torch.ones(5, 1, 1, 1), None), 5, *geometry, activation)
    function = ACTIVATIONS[activation]
    torch.testing.assert_close(actual.isnan(), function(x).isnan().expand_as(actual))
    right = function(x.double()).expand_as(actual)
    real = right.isfinite() & (right.abs() < 1e38)
    assert real.sum() > 3000
    error = (actual.double() - right).abs() / right.abs().clamp(min=1e-30)
    assert error[real].max() < 5e-7
    assert torch.equal(actual[right == math.inf].isinf(), (right == math.inf)[right == math.inf])


def test_an_unknown_activation_is_refused():
    packed = pack_conv2d(torch.ones(4, 2, 3, 3), None)
    with pytest.raises(RuntimeError, match="activation tanh; known are none, relu, relu6, hardswish, silu"):
        layer_ops.conv2d(torch.zeros(1, 2, 5, 5), *packed, 4, (1, 1), (0, 0), (1, 1), "tanh")


def call_batch_norm(x, weight, bias):
    return layer_ops.batch_norm(
        [x[:, :33], x[:, 33:]], weight[: x.shape[1], 0, 0, 0].contiguous(), bias[: x.shape[1]], "silu"
    )


def call_winograd(x, weight, bias):
    packed = pack_conv2d(winograd_weight(weight), bias)
    return layer_ops.conv2d(x, *packed, len(weight), (1, 1), (1, 1), (1, 1), winograd=True)


def call_depthwise(x, weight, bias):
    kernels = weight[: x.shape[1], :1]
    return layer_ops.grouped_conv2d(x, *pack_grouped_conv2d(kernels, bias[: x.shape[1]]), (1, 1), (1, 1), (1, 1))


def call_narrow_groups(x, weight, bias):
    x, kernels = x[:, :64], weight[:64, :8]
    return layer_ops.grouped_conv2d(x, *pack_grouped_conv2d(kernels, bias[:64]), (1, 1), (1, 1), (1, 1))


def call_wide_groups(x, weight, bias):
    packed = pack_conv2d(weight[:, :35], bias, 2)
    return layer_ops.conv2d(x, *packed, len(weight), (1, 1), (1, 1), (1, 1), groups=2)


@pytest.mark.parametrize("call", [call_winograd, call_depthwise, call_narrow_groups, call_wide_groups, call_batch_norm])
def test_other_kernels_are_bitwise_the_same_for_any_batch_and_number_of_threads(isa, call):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 70, 30, 31, generator=generator).contiguous(memory_format=CL)
    weight, bias = torch.randn(90, 70, 3, 3, generator=generator), torch.randn(90, generator=generator)
    expected = call(x, weight, bias)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(call(x, weight, bias), expected)
            assert torch.equal(torch.cat([call(image[None], weight, bias) for image in x]), expected)
    finally:
        torch.set_num_threads(before)


def test_winograd_weights_keep_the_kernel():
    weight = torch.randn(5, 7, 3, 3, generator=torch.Generator().manual_seed(0))
    assert winograd_weight(weight).shape == (5, 7, 6, 6)
    assert (kernel_of_winograd(winograd_weight(weight)) - weight).abs().max() < 1e-6 * weight.abs().max()
    x = torch.randn(2, 7, 5, 5, generator=torch.Generator().manual_seed(1))
    geometry = (1, 1), (1, 1), (1, 1)
    packed = pack_conv2d(winograd_weight(weight), None)
    actual = reference.conv2d(x, *packed, 5, *geometry, "none", winograd=True)
    assert torch.allclose(actual, F.conv2d(x, weight, padding=1), atol=1e-5)


def test_wrong_weights_of_winograds_form_are_refused():
    x, geometry = torch.zeros(1, 2, 9, 9), ((1, 1), (1, 1), (1, 1))
    plain, bias = pack_conv2d(torch.ones(4, 2, 3, 3), None)
    with pytest.raises(RuntimeError, match="6x6 weights, stride 1"):
        layer_ops.conv2d(x, plain, bias, 4, *geometry, winograd=True)
    six, bias = pack_conv2d(torch.ones(4, 2, 6, 6), None)
    with pytest.raises(RuntimeError, match="6x6 weights, stride 1"):
        layer_ops.conv2d(x, six, bias, 4, (2, 1), (1, 1), (1, 1), winograd=True)


def test_nothing_outside_the_residual_is_touched(isa):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1, 5, 3, 3, generator=generator), torch.randn(9, 5, 1, 1, generator=generator)
    around = torch.full((1 * 21 * 9 + 64,), 7.0)
    residual = around[32:-32].view(1, 3, 3, 21).permute(0, 3, 1, 2)
    layer_ops.conv2d_join_(
        residual, x, *pack_conv2d(weight, None), torch.arange(2, 20, 2), (1, 1), (0, 0), (1, 1), True
    )
    assert (around[:32] == 7).all()
    assert (around[-32:] == 7).all()
    assert (residual[:, 1::2] == 7).all()
    assert (residual[:, [0, 20]] == 7).all()
    assert not (residual[:, 2:20:2] == 7).any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_not_a_number_stays(isa, activation):
    x = torch.ones(1, 2, 4, 4)
    x[0, 0, 1, 1] = math.nan
    packed = pack_conv2d(torch.ones(20, 2, 1, 1), None)
    actual = layer_ops.conv2d(x, *packed, 20, (1, 1), (0, 0), (1, 1), activation)
    assert actual[0, :, 1, 1].isnan().all()
    assert actual.isnan().sum() == 20
    residual = torch.zeros(1, 30, 4, 4).contiguous(memory_format=CL)
    layer_ops.conv2d_join_(residual, x, *packed, torch.arange(5, 25), (1, 1), (0, 0), (1, 1), True)
    assert residual[0, 5:25, 1, 1].isnan().all()
    assert residual.isnan().sum() == 20


def test_empty_batch():
    packed = pack_conv2d(torch.ones(4, 2, 3, 3), None)
    assert layer_ops.conv2d(torch.zeros(0, 2, 5, 5), *packed, 4, (1, 1), (0, 0), (1, 1)).shape == (0, 4, 3, 3)


@pytest.mark.parametrize(("change", "message"), [
    ({"input": torch.zeros(1, 3, 5, 5)}, "input is"),
    ({"input": torch.zeros(1, 2, 5)}, "input is"),
    ({"input": torch.zeros(1, 2, 5, 5, dtype=torch.float64)}, "expected float32 on the CPU"),
    ({"input": torch.zeros(1, 2, 2, 5)}, "does not fit"),
    ({"bias": torch.zeros(4)}, "bias is"),
    ({"stride": (0, 1)}, "stride"),
    ({"dilation": (1,)}, "two numbers each"),
    ({"filters": 17}, "17 filters in 1 blocks"),
    ({"filters": 0}, "0 filters in 1 blocks"),
    ({"index": torch.tensor([0, 2, 1, 3])}, "strictly increasing"),
    ({"index": torch.tensor([0, 1, 2, 6])}, "below 6"),
    ({"residual": torch.zeros(1, 6, 4, 3).contiguous(memory_format=CL)}, "residual is"),
    ({"residual": torch.zeros(1, 6, 3, 4).contiguous(memory_format=CL)}, "residual is"),
    ({"weights": torch.zeros(0, 3, 3, 2, 16), "bias": torch.zeros(0), "filters": 0}, "weights"),
    ({"residual": torch.zeros(1, 6, 3, 3)}, "expected channels_last"),
    ({"residual": torch.zeros(2, 6, 3, 3).contiguous(memory_format=CL)}, "residual is"),
])  # fmt: skip
def test_wrong_arguments_are_refused(change, message):
    packed, bias = pack_conv2d(torch.ones(4, 2, 3, 3), None)
    given = {
        "input": torch.zeros(1, 2, 5, 5), "weights": packed, "bias": bias,
        "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1),
    }  # fmt: skip
    alone = change.keys() <= given.keys() | {"filters"}
    joined = change.keys() <= given.keys() | {"residual", "index"}
    if alone:
        with pytest.raises(RuntimeError, match=message):
            layer_ops.conv2d(**{**given, "filters": 4, **change})
    if joined:
        residual = torch.zeros(1, 6, 3, 3).contiguous(memory_format=CL)
        with pytest.raises(RuntimeError, match=message):
            layer_ops.conv2d_join_(**{**given, "residual": residual, "index": torch.arange(4), **change})


@pytest.mark.parametrize("case", CASES[:4] + CASES[-3:], ids=str)
def test_reference(case):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, geometry = sample(case, generator)
    expected = F.conv2d(x, weight, bias, *geometry)
    packed = pack_conv2d(weight, bias)
    assert torch.equal(reference.conv2d(x, *packed, len(weight), *geometry, "relu6"), expected.clamp(0, 6))
    residual, index = small_integers(*expected.shape, generator=generator), torch.arange(len(weight))
    actual = residual.clone()
    reference.conv2d_join_(actual, x, *packed, index, *geometry, True)
    assert torch.equal(actual, (residual + expected).relu())


def test_opcheck():
    packed = pack_conv2d(torch.ones(20, 3, 3, 2), torch.ones(20))
    x, geometry = torch.randn(2, 3, 8, 9), ((2, 1), (1, 0), (1, 2))
    torch.library.opcheck(torch.ops.mfp.conv2d.default, (x, *packed, 20, *geometry, "relu6"))
    residual = torch.randn(2, 25, 4, 7).contiguous(memory_format=CL)
    arguments = (residual, x, *packed, torch.arange(5, 25), *geometry, True)
    torch.library.opcheck(torch.ops.mfp.conv2d_join_.default, arguments)
    six = pack_conv2d(torch.ones(20, 3, 6, 6), None)
    torch.library.opcheck(torch.ops.mfp.conv2d.default, (x, *six, 20, (1, 1), (1, 0), (1, 1), "silu", True))
    packed = pack_conv2d(torch.ones(40, 3, 3, 2), torch.ones(40), groups=2)
    wide = torch.randn(2, 6, 8, 9)
    torch.library.opcheck(torch.ops.mfp.conv2d.default, (wide, *packed, 40, *geometry, "relu6", False, 2))
    packed = pack_grouped_conv2d(torch.ones(3, 1, 3, 2), torch.ones(3))
    layers = torch.ones(2, 25), torch.ones(2), torch.ones(2, 25), torch.ones(25)
    torch.library.opcheck(torch.ops.mfp.squeeze_excite_.default, (residual, *layers, "silu", False))
    torch.library.opcheck(torch.ops.mfp.grouped_conv2d.default, (x, *packed, *geometry, "relu6"))
