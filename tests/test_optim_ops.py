"""The ops under the masked optimisers against the reference: values, layouts, instruction sets, 16-bit rounding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mfp import ops, reference

pytestmark = pytest.mark.usefixtures("three_threads")


def test_every_level_and_thread_count_gives_the_same_parameters(isa):
    weight = torch.randn(700, 701, generator=torch.Generator().manual_seed(0))  # more than one piece of work
    keep = torch.arange(700) % 3 > 0
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        param, buffer = weight.clone(), weight.clone()
        ops.masked_sgd_([param], [weight], [buffer], keep, [0], [700], 0.1, 0.9, 0.0, 1e-2, True, False, False)
        results.append((param, buffer))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))
    expected = [weight.double(), weight.double()]
    reference.masked_sgd_(
        expected[:1], [weight.double()], expected[1:], keep, [0], [700], 0.1, 0.9, 0.0, 1e-2, True, False, False
    )
    for result, wanted in zip(results[0], expected, strict=True):
        torch.testing.assert_close(result.double(), wanted, atol=1e-6, rtol=1e-6)


#: One rounding of the result, and float32 arithmetic before it.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def as_laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "channels_last" and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "gaps":
        return torch.stack([tensor, tensor], dim=-1)[..., 0]
    return tensor.contiguous()


LAYOUTS = st.sampled_from(["contiguous", "channels_last", "transposed", "gaps"])


@st.composite
def parameters(draw):
    """Values of one parameter and its tensors in layouts of their own, and which of its rows are kept."""
    rows = draw(st.integers(1, 5))
    repeats = draw(st.integers(1, 2))
    shape = (rows * repeats, *draw(st.sampled_from([(), (1,), (3,), (15,), (17,), (33,), (2, 3, 3), (5, 1, 1)])))
    dtype = draw(st.sampled_from(list(TOLERANCES)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([1e-3, 1.0, 30.0]))
    tensors = [
        as_laid_out((torch.randn(shape, generator=generator) * scale).to(dtype), draw(LAYOUTS)) for _ in range(4)
    ]
    tensors[3] = tensors[3].square()  # mean of squares
    keep = torch.tensor(draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    return tensors, rows, keep, draw(st.booleans())


def check_against_reference(op, tensors, rows, keep, masked, arguments, mutated) -> None:
    start = [tensor.clone(memory_format=torch.preserve_format) for tensor in tensors]
    wide = [tensor.double() for tensor in tensors]
    spans = ([0], [rows]) if masked else ([-1], [1])
    getattr(ops, op)(*([tensor] for tensor in tensors), keep, *spans, *arguments)
    getattr(reference, op)(*([tensor] for tensor in wide), keep, *spans, *arguments)
    pruned = ~keep.repeat_interleave(len(tensors[0]) // rows) if masked else torch.zeros(len(tensors[0])).bool()
    terms = sum(tensor.double().abs() for tensor in start[:3])  # a sum near zero is rounded as its terms are
    for index, (tensor, before, expected) in enumerate(zip(tensors, start, wide, strict=True)):
        tolerance = TOLERANCES[tensor.dtype]
        excess = (tensor.double() - expected).abs() - tolerance * (expected.abs() + terms) - 1e-8
        assert (excess <= 0).all(), f"tensor {index}: {excess.max():.1e} beyond rounding, of {expected.abs().max():.1e}"
        assert torch.equal(tensor[pruned], before[pruned])
        assert index in mutated or torch.equal(tensor, before)


@settings(max_examples=150, deadline=None)
@given(parameters(), st.booleans(), st.booleans(), st.booleans())
def test_sgd_op_is_the_reference(case, nesterov, maximize, first_step):
    tensors, rows, keep, masked = case
    arguments = (0.1, 0.9, 0.0, 1e-2, nesterov, maximize, first_step)
    check_against_reference("masked_sgd_", tensors[:3], rows, keep, masked, arguments, mutated=(0, 2))


@settings(max_examples=150, deadline=None)
@given(parameters(), st.booleans(), st.integers(1, 1000))
def test_adamw_op_is_the_reference(case, maximize, step):
    tensors, rows, keep, masked = case
    arguments = (1e-2, 0.9, 0.999, 1e-8, 1e-2, maximize, step)
    check_against_reference("masked_adamw_", tensors, rows, keep, masked, arguments, mutated=(0, 2, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_values_are_rounded_as_torch_rounds(dtype):
    """All 16-bit patterns, and sums between them: the step adds a float to each and rounds once."""
    values = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
    values = values[values.isfinite()].clone()
    gradients = values.flip(0).clone()
    expected = (values.float() - 0.25 * gradients.float()).to(dtype)
    ops.masked_sgd_([values], [gradients], [], None, [-1], [1], 0.25, 0.0, 0.0, 0.0, False, False, True)
    assert torch.equal(values, expected)


def test_ops_pass_opcheck():
    def tensors():
        return [torch.randn(4, 3, 2, 2), torch.randn(5)]

    keep = torch.tensor([True, False, True, True])
    spans = (keep, [0, -1], [4, 1])
    torch.library.opcheck(
        torch.ops.mfp.masked_sgd_.default,
        (tensors(), tensors(), tensors(), *spans, 0.1, 0.9, 0.0, 1e-2, True, False, False),
    )
    squares = [tensor.square() for tensor in tensors()]
    torch.library.opcheck(
        torch.ops.mfp.masked_adamw_.default,
        (tensors(), tensors(), tensors(), squares, *spans, 0.1, 0.9, 0.99, 1e-8, 1e-2, False, 3),
    )
