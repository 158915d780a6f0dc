"""Convolutions with groups, narrow and wide, at every level of SIMD."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_conv import CL, CLAMPS, small_integers

from mfp import backend, layer_ops, reference
from mfp.conv_weights import pack_conv2d, pack_grouped_conv2d
from mfp.reference import ACTIVATIONS

pytestmark = [
    pytest.mark.usefixtures("three_threads"),
    pytest.mark.skipif(backend.backends()["cpu"].unusable is not None, reason="mfp._C is not built"),
]

GEOMETRY = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}

# (batch, channels, height, width), channels of a group, kernel, stride, padding, dilation
GROUPED_CASES = [
    *(((2, channels, 9, 11), 1, (3, 3), (1, 1), (1, 1), (1, 1)) for channels in (1, 3, 4, 8, 9, 15, 16, 17, 33)),
    *(((1, 20, size, size + 1), 1, (3, 3), (2, 2), (1, 1), (1, 1)) for size in (1, 2, 3, 14)),
    ((2, 24, 17, 30), 1, (5, 5), (1, 1), (2, 2), (1, 1)), ((1, 12, 9, 9), 1, (7, 3), (1, 3), (3, 0), (1, 1)),
    ((2, 10, 8, 20), 1, (3, 3), (1, 1), (2, 2), (2, 2)), ((1, 6, 3, 3), 1, (3, 3), (1, 1), (4, 4), (3, 3)),
    *(((2, channels, 9, columns), width, (3, 3), (stride, stride), (1, 1), (1, 1))
      for width, channels in ((4, 16), (4, 36), (8, 24), (8, 40), (8, 64), (16, 16), (16, 48))
      for columns, stride in ((11, 1), (30, 2), (1, 1))),
    ((1, 32, 9, 9), 8, (5, 3), (3, 1), (6, 3), (2, 1)),
]  # fmt: skip


@pytest.mark.parametrize("case", GROUPED_CASES, ids=str)
def test_narrow_groups_equal_torch_bitwise_on_whole_numbers(isa, case):
    (shape, width, kernel, *geometry), generator = case, torch.Generator().manual_seed(0)
    channels = shape[1]
    x = small_integers(*shape, generator=generator).contiguous(memory_format=CL)
    weight = small_integers(channels, width, *kernel, generator=generator)
    bias = small_integers(channels, generator=generator)
    expected = F.conv2d(x, weight, bias, *geometry, groups=channels // width)
    packed = pack_grouped_conv2d(weight, bias)
    for activation in CLAMPS:
        right, arguments = ACTIVATIONS[activation](expected), (x, *packed, *geometry, activation)
        actual = layer_ops.grouped_conv2d(*arguments)
        assert actual.is_contiguous(memory_format=CL)
        assert torch.equal(actual, right)
        assert torch.equal(reference.grouped_conv2d(*arguments), right)
    assert layer_ops.grouped_conv2d(x[:0], *packed, *geometry).shape == (0, *expected.shape[1:])


# as CASES, with the number of groups at the end
WIDE_GROUPS = [
    *(((2, 3 * channels, 6, 9), 3 * filters, (3, 3), (1, 1), (1, 1), (1, 1), 3)
      for channels, filters in ((1, 8), (5, 17), (24, 24), (20, 56), (40, 97))),
    ((1, 60, 9, 7), 100, (1, 1), (2, 2), (0, 0), (1, 1), 2), ((1, 50, 9, 7), 75, (5, 2), (1, 2), (2, 0), (1, 3), 25),
]  # fmt: skip


@pytest.mark.parametrize("case", WIDE_GROUPS, ids=str)
def test_wide_groups_equal_torch_bitwise_on_whole_numbers(isa, case):
    (shape, filters, kernel, *geometry, groups), generator = case, torch.Generator().manual_seed(0)
    x = small_integers(*shape, generator=generator).contiguous(memory_format=CL)
    weight = small_integers(filters, shape[1] // groups, *kernel, generator=generator)
    bias = small_integers(filters, generator=generator)
    expected = F.conv2d(x, weight, bias, *geometry, groups=groups)
    arguments = (x, *pack_conv2d(weight, bias, groups), filters, *geometry, "relu", False, groups)
    assert torch.equal(layer_ops.conv2d(*arguments), expected.relu())
    assert torch.equal(reference.conv2d(*arguments), expected.relu())


def test_what_is_not_finite_stays_in_its_group(isa):
    generator, channels = torch.Generator().manual_seed(0), 48
    x = torch.randn(1, channels, 5, 6, generator=generator)
    x[0, 8], x[0, 41] = math.nan, math.inf
    for width in (4, 8, 16, 24):
        weight, groups = torch.randn(channels, width, 3, 3, generator=generator), channels // width
        expected = F.conv2d(x, weight, padding=1, groups=groups).isfinite()
        if width == 24:
            actual = layer_ops.conv2d(x, *pack_conv2d(weight, None, groups), channels, **GEOMETRY, groups=groups)
        else:
            actual = layer_ops.grouped_conv2d(x, *pack_grouped_conv2d(weight, None), **GEOMETRY)
        assert torch.equal(actual.isfinite(), expected)


def test_wrong_arguments_of_narrow_groups_are_refused():
    weights, bias = pack_grouped_conv2d(torch.ones(2, 1, 3, 3), None)
    for change, message in (
        ({"input": torch.zeros(1, 17, 9, 9)}, "input is"), ({"input": torch.zeros(2, 9, 9)}, "input is"),
        ({"weights": weights[..., :2]}, "weights"), ({"bias": bias[:2]}, "bias is"),
        ({"bias": bias.double()}, "expected float32"), ({"stride": (1, 0)}, "stride"),
        ({"padding": (0, 0), "input": torch.zeros(1, 2, 2, 9)}, "does not fit"),
    ):  # fmt: skip
        given = {"input": torch.zeros(1, 2, 9, 9), "weights": weights, "bias": bias, **GEOMETRY}
        with pytest.raises(RuntimeError, match=message):
            layer_ops.grouped_conv2d(**{**given, **change})
    weights, bias = pack_grouped_conv2d(torch.ones(24, 8, 3, 3), None)
    given = {"input": torch.zeros(1, 24, 9, 9), "weights": weights, "bias": bias, **GEOMETRY}
    layer_ops.grouped_conv2d(**given)
    for change in (
        {"weights": weights[:, :, :5].contiguous()}, {"weights": weights[:, :2].contiguous()}, {"stride": (1, 3)},
        {"dilation": (1, 2)}, {"input": torch.zeros(1, 20, 9, 9)},
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="groups of 4, 8 or 16"):
            layer_ops.grouped_conv2d(**{**given, **change})


def test_wrong_numbers_of_wide_groups_are_refused():
    weights, bias = pack_conv2d(torch.ones(50, 3, 3, 3), None, groups=2)
    x = torch.zeros(1, 6, 9, 9)
    assert layer_ops.conv2d(x, weights, bias, 50, **GEOMETRY, groups=2).shape == (1, 50, 9, 9)
    for filters, groups in ((50, 1), (50, 3), (49, 2), (50, 0), (70, 2)):
        with pytest.raises(RuntimeError, match="conv2d: "):
            layer_ops.conv2d(x, weights, bias, filters, **GEOMETRY, groups=groups)
