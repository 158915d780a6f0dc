"""Every Triton kernel in Triton's interpreter against the oracle, on CPU tensors.

Not collected by name: the interpreter is chosen when triton is imported, so test_triton_logic.py runs this file in a
process of its own with TRITON_INTERPRET=1.
"""

import pytest
import test_versions
import torch
from test_cuda_logic import ALL, DTYPES, PAPER, POWERS, asked, assert_close, awkward, step_case

from mfp import kernels, ops, reference

BLOCK, SPAN = kernels.score._BLOCK, kernels.score._SPAN
SHAPES = [(1, 1), (1, 9), (3, 27), (BLOCK - 1, 7), (BLOCK, 8), (BLOCK + 1, 65), (2 * BLOCK + 1, 12), (9, 2 * SPAN + 22)]

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on numbers that are masked out


def oracle(weights, criteria):
    return reference.score_filters(weights, *asked(weights, criteria), out_dtype=torch.float64)


@pytest.mark.parametrize(("shape", "dtype"), [
    *((shape, torch.float32) for shape in SHAPES), ((BLOCK, 8), torch.bfloat16), ((BLOCK + 1, 65), torch.float16),
], ids=str)  # fmt: skip
def test_scores_are_within_the_bound_of_the_oracle(shape, dtype):
    weight = awkward(*shape, dtype)
    expected = oracle([weight], ALL + POWERS)
    assert expected.abs().sum() > 0
    assert_close(ops.score_filters([weight], *asked([weight], ALL + POWERS), backend="triton"), expected)


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e-12, 1e12, 1e17])
def test_weights_of_any_size(scale):
    weight = awkward(BLOCK + 3, 20) * scale
    assert_close(kernels.score_filters([weight], *asked([weight], PAPER)), oracle([weight], PAPER), noise=1e-24 * scale)


def test_norms_far_apart_and_parallel_filters():
    generator = torch.Generator().manual_seed(2)
    small = torch.randn(BLOCK + 8, 24, generator=generator)
    small[::2] *= 1e-3
    small[::3] *= 1e-15
    assert_close(kernels.score_filters([small], *asked([small], ALL)), oracle([small], ALL))
    copies = torch.randn(1, 50, generator=generator) * torch.linspace(-3, 3, 20)[:, None]
    copies *= 1 + 1e-4 * torch.randn(20, 50, generator=generator)
    assert_close(kernels.score_filters([copies], *asked([copies], ALL)), oracle([copies], ALL))


@pytest.mark.parametrize("size", [300])
def test_filters_a_ten_thousandth_apart(size):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(1, size, generator=generator) + 1e-4 * torch.randn(6, size, generator=generator)
    assert_close(kernels.score_filters([weight], *asked([weight], ALL)), oracle([weight], ALL))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_numbers_are_exact(dtype):
    generator = torch.Generator().manual_seed(3)
    shapes = [(BLOCK + 1, 9), (5, 70)]
    whole = [torch.randint(-8, 9, shape, generator=generator).to(dtype) for shape in shapes]
    line = [torch.zeros(shape) for shape in shapes]
    for weight in line:  # multiples of one unit vector: Euclidean distances are integers
        weight[:, 4] = torch.randint(-50, 51, (len(weight),), generator=generator).float()
    line = [weight.to(dtype) for weight in line]
    for weights, criteria in ((whole, (ALL[0], ALL[2])), (line, ALL[:4])):
        expected = oracle(weights, criteria)
        assert expected.sum() > 0
        assert torch.equal(kernels.score_filters(weights, *asked(weights, criteria)).double(), expected)


@pytest.mark.parametrize("criteria", [*[(c,) for c in (*ALL, *POWERS)], (ALL[3], ALL[0], ALL[3])])
def test_any_criteria_of_many_layers(criteria):
    weights = [awkward(12, 9), awkward(3, 5, torch.bfloat16), awkward(BLOCK + 2, 3, torch.float16), torch.zeros(2, 3)]
    assert_close(kernels.score_filters(weights, *asked(weights, criteria)), oracle(weights, criteria))


@pytest.mark.parametrize("chosen", range(4))
def test_pruning_is_that_of_the_reference(chosen):
    generator = torch.Generator().manual_seed(4)
    shapes = [(BLOCK + 5, 4), (1, 5), (70, 2), (8, 40)]
    weights = [torch.randint(-1, 2, shape, generator=generator).float() for shape in shapes]  # many ties
    weights[2] = weights[2].half()
    followers = [torch.ones(BLOCK + 5), torch.ones(8, 3).bfloat16(), torch.ones(16)]
    num_pruned = [17, 0, 41, 5]
    kinds, exponents, _ = asked(weights, (*ALL[:3], ALL[6]))
    gradients = [torch.randint(-1, 2, weight.shape, generator=generator).float() for weight in weights]
    results = []
    for module in (kernels, reference):
        own, own_followers = [w.clone() for w in weights], [f.clone() for f in followers]
        scores, keep = module.prune_filters_(
            own, own_followers, [0, 3, 3], num_pruned, kinds, exponents, chosen, gradients
        )
        results.append([scores, keep, *own, *own_followers])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    assert [int((~part).sum()) for part in results[0][1].split([n for n, _ in shapes])] == num_pruned


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nothing_is_zeroed_when_a_score_is_not_finite(bad):
    for criteria in (PAPER, POWERS[1:2], POWERS[3:], ALL[6:]):
        weights = [torch.randn(10, 8), torch.randn(20, 3)]
        weights[1][4, 1] = bad
        before = [weight.clone() for weight in weights]
        kinds, exponents, gradients = asked(weights, criteria)
        scores, keep = kernels.prune_filters_(weights, [], [], [4, 7], kinds, exponents, 0, gradients)
        assert keep.all() and not scores.isfinite().all() and scores[:, :10].isfinite().all()
        assert torch.equal(weights[0], before[0]) and (weights[1] == 0).sum() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mask_filters(dtype):
    generator = torch.Generator().manual_seed(5)
    rows = [1, 7, 64, 33, 10]
    tensors = [torch.randn(n, k, generator=generator).to(dtype) for n, k in zip(rows, [1, 3, 147, 2, 300], strict=True)]
    tensors.append(torch.randn(20, 3, generator=generator).to(dtype))  # two rows a filter
    rows.append(10)
    offsets = [0, 1, 2, 0, 30, 50]
    keep = torch.rand(70, generator=generator) < 0.5
    keep[0] = False
    expected = [tensor.clone() for tensor in tensors]
    reference.mask_filters_(expected, keep, offsets, rows)
    ops.mask_filters_(tensors, keep, offsets, rows, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))
    assert (tensors[0] == 0).all() and (tensors[3] != 0).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "count", "numbers"),
    [
        ("masked_sgd_", 3, (0.1, 0.9, 0.0, 1e-4, True, False, False)),
        ("masked_sgd_", 3, (0.1, 0.9, 0.3, 0.0, False, True, False)),
        ("masked_sgd_", 3, (0.1, 0.9, 0.3, 1e-4, False, False, True)),
        ("masked_sgd_", 2, (0.1, 0.0, 0.0, 1e-4, False, False, True)),
        ("masked_adamw_", 4, (1e-3, 0.9, 0.999, 1e-8, 0.05, False, 7)),
        ("masked_adamw_", 4, (1e-3, 0.9, 0.999, 1e-8, 0.0, True, 1)),
    ],
)
def test_masked_steps(name, count, numbers, dtype):
    groups, keep, offsets, rows = step_case(dtype, long=(100, 2100, 3001))  # a program takes 1,024
    states = [[]] if count == 2 else []
    for mask in (keep, None):
        ours, theirs = ([[tensor.clone() for tensor in group] for group in groups[:count]] for _ in range(2))
        getattr(kernels, name)(*ours, *states, mask, offsets, rows, *numbers)
        getattr(reference, name)(*theirs, *states, mask, offsets, rows, *numbers)
        tolerance = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
        for own, other in zip(ours, theirs, strict=True):
            for tensor, expected in zip(own, other, strict=True):
                torch.testing.assert_close(tensor, expected, rtol=tolerance, atol=tolerance)
        assert not torch.equal(ours[0][3], groups[0][3])


def test_a_step_with_a_gradient_in_another_layout():
    params = [torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last)]
    grads = [torch.randn(6, 4, 3, 3)]
    expected = params[0] - 0.1 * grads[0]
    version = params[0]._version
    kernels.masked_sgd_(params, grads, [], None, [-1], [1], 0.1, 0.0, 0.0, 0.0, False, False, True)
    torch.testing.assert_close(params[0], expected)
    assert params[0]._version > version


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 3, 3), (1, 90, 2, 5), (3, 64, 1, 1)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_scatter_add(shape, relu, dtype, layout):
    generator = torch.Generator().manual_seed(6)
    residual = torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=layout)
    for count in {0, 1, shape[1] // 2, shape[1]}:
        index = torch.randperm(shape[1], generator=generator)[:count].sort().values
        branch = torch.randn(shape[0], count, *shape[2:], generator=generator).to(dtype)
        expected = residual.float().index_add(1, index, branch.float())
        expected = (expected.relu() if relu else expected).to(dtype)
        actual = residual.clone(memory_format=torch.preserve_format)
        kernels.scatter_add_(actual, branch, index, relu)
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", test_versions.CASES)
def test_autograd_notices(name):
    test_versions.assert_noticed(kernels, name)
