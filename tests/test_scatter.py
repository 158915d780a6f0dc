"""scatter_add_: residual += branch at some channels, then ReLU, on every backend and instruction set of the CPU."""

import pytest
import torch

from mfp import layer_ops

pytestmark = pytest.mark.usefixtures("three_threads")

CL = torch.channels_last
SHAPES = [
    (1, 1, 1, 1),
    (2, 15, 3, 5),
    (2, 16, 4, 4),
    (1, 17, 7, 1),
    (3, 31, 2, 3),
    (2, 33, 5, 5),
    (2, 64, 1, 1),
    (0, 8, 2, 2),
]


def sample(shape, kept, dtype, layout, generator):
    channels = shape[1]
    index = torch.randperm(channels, generator=generator)[:kept].sort().values
    whole = torch.randint(-9, 10, shape, generator=generator).to(dtype).contiguous(memory_format=layout)
    branch = torch.randint(-9, 10, (shape[0], kept, *shape[2:]), generator=generator).to(dtype)
    return whole, branch.contiguous(memory_format=layout), index


@pytest.mark.parametrize("layout", [torch.contiguous_format, CL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_torch_bitwise_on_whole_numbers(isa, layout, dtype):
    generator = torch.Generator().manual_seed(0)
    for shape in SHAPES:
        for kept in {1, shape[1] // 2 + 1, max(shape[1] - 1, 1), shape[1]}:
            for relu in (False, True):
                residual, branch, index = sample(shape, kept, dtype, layout, generator)
                expected = residual.index_add(1, index, branch)
                expected = expected.relu() if relu else expected
                layer_ops.scatter_add_(residual, branch, index, relu, backend="cpu")
                assert torch.equal(residual, expected), (shape, kept, relu)


def test_layouts_may_differ_and_nothing_outside_is_touched():
    generator = torch.Generator().manual_seed(0)
    for layout, other in ((CL, torch.contiguous_format), (torch.contiguous_format, CL)):
        residual, branch, index = sample((2, 20, 3, 3), 7, torch.float32, layout, generator)
        around = torch.full((residual.numel() + 32,), 7.0)
        inner = around[16:-16].as_strided(residual.shape, residual.stride(), 16).copy_(residual)
        expected = residual.index_add(1, index, branch)
        layer_ops.scatter_add_(inner, branch.contiguous(memory_format=other), index)
        assert torch.equal(inner, expected)
        assert (around[:16] == 7).all()
        assert (around[-16:] == 7).all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, CL])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats_are_summed_in_float32_and_rounded_once(layout, dtype):
    generator = torch.Generator().manual_seed(0)
    residual = torch.randn(2, 40, 5, 5, generator=generator).to(dtype).contiguous(memory_format=layout)
    branch = torch.randn(2, 21, 5, 5, generator=generator).to(dtype).contiguous(memory_format=layout)
    index = torch.randperm(40, generator=generator)[:21].sort().values
    expected = residual.float().index_add(1, index, branch.float()).relu().to(dtype)
    layer_ops.scatter_add_(residual, branch, index, True, backend="cpu")
    assert torch.equal(residual, expected)


def test_not_a_number_stays():
    residual = torch.tensor([float("nan"), -1.0, 2.0]).view(1, 3, 1, 1).repeat(1, 6, 1, 1)
    layer_ops.scatter_add_(residual, torch.zeros(1, 1, 1, 1), torch.tensor([4]), True)
    assert residual.flatten()[:3].isnan().tolist() == [True, False, False]
    assert residual.flatten()[1:3].tolist() == [0.0, 2.0]


@pytest.mark.parametrize(("index", "shape", "dtype", "message"), [
    ([0, 0], (1, 2, 2, 2), torch.float32, "strictly increasing"),
    ([2, 1], (1, 2, 2, 2), torch.float32, "strictly increasing"),
    ([-1, 1], (1, 2, 2, 2), torch.float32, "strictly increasing"),
    ([0, 4], (1, 2, 2, 2), torch.float32, "below 4"),
    ([0], (1, 2, 2, 2), torch.float32, "one channel of the residual for each"),
    ([0, 1], (1, 2, 2, 3), torch.float32, "differ in the channels alone"),
    ([0, 1], (1, 2, 2, 2), torch.float16, "expected one dtype"),
])  # fmt: skip
def test_wrong_arguments_are_refused(index, shape, dtype, message):
    with pytest.raises(RuntimeError, match=message):
        layer_ops.scatter_add_(
            torch.zeros(1, 4, 2, 2), torch.zeros(shape, dtype=dtype), torch.tensor(index), backend="cpu"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, CL])
def test_opcheck(dtype, layout):
    generator = torch.Generator().manual_seed(0)
    for relu in (False, True):
        residual, branch, index = sample((2, 8, 3, 3), 5, dtype, layout, generator)
        torch.library.opcheck(torch.ops.mfp.scatter_add_.default, (residual, branch, index, relu))


def test_one_image_may_have_any_stride_between_images():
    """As a view of channels that were moved has: torch calls it channels_last, and keeps the stride in copies."""
    residual = torch.randn(1, 7, 9, 3).permute(0, 3, 1, 2).as_strided((1, 3, 7, 9), (3, 1, 27, 3))
    branch = torch.randn(1, 2, 7, 9)
    assert residual.is_contiguous(memory_format=CL) and residual.clone().stride() == residual.stride()
    index = torch.tensor([0, 2])
    expected = residual.index_add(1, index, branch)
    layer_ops.scatter_add_(residual, branch, index, backend="cpu")
    assert torch.equal(residual, expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, CL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_join_as_a_tensor_of_its_own(isa, layout, dtype):
    generator = torch.Generator().manual_seed(0)
    for shape in SHAPES:
        for kept in {1, shape[1] // 2 + 1, shape[1]}:
            residual, branch, index = sample(shape, kept, dtype, layout, generator)
            for given in (residual, None):
                before = torch.zeros_like(residual) if given is None else residual.clone()
                out = layer_ops.join_channels(given, branch, index, shape[1])
                assert torch.equal(out, before.index_add(1, index, branch)), (shape, kept)
                alike = residual if given is not None else branch
                assert out.is_contiguous(memory_format=layout) or alike.is_contiguous()


def test_a_join_takes_views_of_other_layouts():
    generator = torch.Generator().manual_seed(0)
    residual, branch, index = sample((2, 20, 6, 6), 7, torch.float32, CL, generator)
    right = residual[:, :, ::2, 1:].index_add(1, index, branch[:, :, ::2, 1:])
    assert torch.equal(layer_ops.join_channels(residual[:, :, ::2, 1:], branch[:, :, ::2, 1:], index, 20), right)
    many = torch.randn(2, 2, 1, 3, 2, 2)[..., :1]
    assert layer_ops.join_channels(None, many, torch.tensor([1, 3]), 5)[:, [1, 3]].equal(many)
    flat = torch.randn(3, 2)
    assert layer_ops.join_channels(None, flat, torch.tensor([1, 3]), 5)[:, [1, 3]].equal(flat)


@pytest.mark.parametrize(("residual", "channels", "message"), [
    ((1, 4, 2, 2), 5, "expected 5 channels"), ((1, 4, 2, 3), 4, "differ in the channels alone"),
    (None, 2, "strictly increasing numbers below 2"),
])  # fmt: skip
def test_wrong_arguments_of_a_new_join_are_refused(residual, channels, message):
    whole = None if residual is None else torch.zeros(residual)
    with pytest.raises(RuntimeError, match=message):
        layer_ops.join_channels(whole, torch.zeros(1, 2, 2, 2), torch.tensor([0, 3]), channels)


@pytest.mark.parametrize("channels", [1, 15, 16, 17, 33, 64])
def test_taken_channels(isa, channels):
    generator = torch.Generator().manual_seed(0)
    for kept in {1, channels // 2 + 1, channels}:
        x, _, index = sample((2, channels, 5, 3), kept, torch.float32, CL, generator)
        out = layer_ops.take_channels(x, index)
        assert torch.equal(out, x[:, index]) and out.is_contiguous(memory_format=CL)
    assert layer_ops.take_channels(x[:0], index).shape == (0, len(index), 5, 3)
    torch.library.opcheck(torch.ops.mfp.take_channels.default, (x, index))
    torch.library.opcheck(torch.ops.mfp.join_channels.default, (None, x, torch.arange(channels), channels))


@pytest.mark.parametrize(("x", "index", "message"), [
    (torch.zeros(1, 4, 2, 2), [2, 1], "strictly increasing"), (torch.zeros(1, 4, 2, 2), [4], "below 4"),
    (torch.zeros(1, 4, 2), [0], "expected float32"), (torch.zeros(1, 4, 2, 2).half(), [0], "expected float32"),
])  # fmt: skip
def test_wrong_arguments_of_taken_channels_are_refused(x, index, message):
    with pytest.raises(RuntimeError, match=message):
        layer_ops.take_channels(x, torch.tensor(index))
