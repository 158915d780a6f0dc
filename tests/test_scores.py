"""The scoring op against the float64 oracle: values, exactness on whole numbers, properties, and bad input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import mfp
from mfp import criteria, ops, reference

pytestmark = pytest.mark.usefixtures("three_threads")

NAMED = tuple(name for name, known in criteria.NAMED.items() if known.source != "batchnorm")
GENERAL = ("l1.5_norm", "l3_norm", "l1.5_distance", "l3_distance")
# Single precision sums of blocks, double precision across them: the bound of the design, for every dtype, because
# 16-bit weights are read exactly and summed like float32.
BOUND = 1e-5
# Sizes around the kernels' own constants: 4, 8, 16 lanes, 64 columns, 192 rows of a tile, 256 weights of a block.
SHAPES = [
    (1, 1), (1, 9), (2, 1), (3, 27), (5, 3), (15, 16), (16, 17), (17, 15), (31, 7), (33, 64), (63, 65), (64, 147),
    (65, 255), (66, 256), (67, 257), (127, 31), (129, 33), (191, 12), (192, 12), (193, 12), (257, 20), (40, 1000),
]  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def gradients_of(weights):
    """As random as weights, laid out like them, the same for the same shape; short rows' in float32, as sums are."""
    found = []
    for weight in weights:
        values = torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel()))
        dtype = weight.dtype if weight[0].numel() > 50 else torch.float32
        found.append(torch.empty_like(weight, dtype=dtype).copy_(values))
    return found


def score(weights, names, backend=None, gradients=None):
    known = [criteria.criterion(name) for name in names]
    gradients = gradients or gradients_of(weights)
    return ops.score_filters(weights, [c.kind for c in known], [c.exponent for c in known], gradients, backend)


def oracle(weights, names):
    known = [criteria.criterion(name) for name in names]
    return reference.score_filters(
        weights, [c.kind for c in known], [c.exponent for c in known], gradients_of(weights), out_dtype=torch.float64
    )


def assert_close(actual, expected, bound=BOUND, noise=1e-24):
    """Relative error within the bound; what is 0 in exact arithmetic (parallel filters' angles) may be ``noise``."""
    floor = torch.maximum(1e-12 * expected.abs().amax(1, keepdim=True), torch.tensor(noise, dtype=torch.float64))
    error = ((actual.double() - expected).abs() - floor) / expected.abs().clamp_min(1e-300)
    where = divmod(int(error.argmax()), error.shape[1])
    assert error.max() <= bound, f"worst relative error {error.max():.2e} at (criterion, filter) {where}"


def awkward(filters, size, dtype, seed=0):
    """Random filters with an all-zero one, a duplicate, a negative, a scaled copy and a near-duplicate among them."""
    weight = torch.randn(filters, size, generator=torch.Generator().manual_seed(seed))
    for index, make in enumerate((lambda w: 0 * w, lambda w: w, lambda w: -w, lambda w: 3 * w, lambda w: w + 1e-4)):
        if filters > index + 3:
            weight[index + 1] = make(weight[0])
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_criterion_is_within_the_bound_of_the_oracle(shape, dtype):
    weight = awkward(*shape, dtype)
    expected = oracle([weight], NAMED + GENERAL)
    assert expected.abs().sum() > 0
    assert_close(score([weight], NAMED + GENERAL), expected)


@pytest.mark.parametrize("size", [4608, 10000])
def test_filters_a_ten_thousandth_apart(size):
    weight = torch.randn(1, size) + 1e-4 * torch.randn(100, size)
    assert_close(score([weight], NAMED), oracle([weight], NAMED))


def test_scaled_copies_keep_their_angles():
    weight = torch.randn(1, 500) * torch.linspace(0.01, 3, 80)[:, None] * (1 + 1e-4 * torch.randn(80, 500))
    assert_close(score([weight], NAMED), oracle([weight], NAMED))
    signs = torch.where(torch.rand(80, 1) < 0.5, -1.0, 1.0)
    assert_close(score([weight * signs], NAMED), oracle([weight * signs], NAMED))


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e-12, 1e12, 1e17])
def test_weights_of_any_size(scale):
    """Squares of such weights leave the range of float32; only the scores themselves must be in it."""
    weight = awkward(40, 50, torch.float32) * scale
    names = tuple(name for name in NAMED if name not in ("weighted_hybrid", "taylor"))  # products of two sums
    assert_close(score([weight], names), oracle([weight], names), noise=1e-24 * scale)


def test_small_filters_among_large_ones():
    weight = torch.randn(60, 100)
    weight[::2] *= 1e-3
    weight[::3] *= 1e-15
    assert_close(score([weight], NAMED), oracle([weight], NAMED))


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 80), st.integers(1, 300)), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    names=st.lists(st.sampled_from(NAMED + GENERAL), min_size=1, max_size=10, unique=True),
    seed=st.integers(0, 2**16),
)
def test_any_layers_and_any_criteria(shapes, dtype, names, seed):
    weights = [awkward(*shape, dtype, seed) for shape in shapes]
    expected = oracle(weights, names)
    actual = score(weights, names)
    for part, layer in zip(
        actual.split([n for n, _ in shapes], 1), expected.split([n for n, _ in shapes], 1), strict=True
    ):
        assert_close(part, layer)


# ---- whole numbers: exact, whatever the order of the sums -----------------------------------------------------------


def test_terms_that_cancel():
    """Weight times gradient has both signs: a sum a millionth of its terms is as exact as any other."""
    weight = torch.randn(40, 1000)
    gradient = torch.randn(40, 1000)
    gradient[:, 0] = 0.0
    gradient[:, 0] = -(weight * gradient).sum(1) / weight[:, 0] * (1 + 1e-6)
    expected = reference.score_filters([weight], [4], [2.0], [gradient], out_dtype=torch.float64)
    assert expected.amax().sqrt() < 1e-3 < (weight * gradient).abs().sum(1).amin()
    assert_close(score([weight], ("taylor",), gradients=[gradient]), expected)


def whole_number_weights(filters, size, dtype=torch.float32):
    """Filters of small integers: Manhattan distances and l1 norms are exact in float32."""
    return torch.randint(-8, 9, (filters, size), generator=torch.Generator().manual_seed(size)).to(dtype)


def weights_on_a_line(filters, size, dtype=torch.float32):
    """Whole multiples of one unit vector (all of it in one coordinate): Euclidean distances are integers."""
    weight = torch.zeros(filters, size)
    weight[:, size // 2] = torch.randint(-50, 51, (filters,), generator=torch.Generator().manual_seed(size)).float()
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_whole_numbers_are_exact(shape, dtype):
    manhattan, euclid = whole_number_weights(*shape, dtype), weights_on_a_line(*shape, dtype)
    expected = oracle([manhattan], ("l1_norm", "l1_distance"))
    assert shape == (1, 1) or expected.sum() > 0
    assert torch.equal(score([manhattan], ("l1_norm", "l1_distance")).double(), expected)
    both = ("l1_norm", "l2_norm", "l1_distance", "l2_distance")
    assert torch.equal(score([euclid], both).double(), oracle([euclid], both))
    gradient = whole_number_weights(*shape, torch.float32).flip(0)
    exact = (manhattan.double() * gradient.double()).sum(1).square().float()
    assert torch.equal(score([manhattan], ("taylor",), gradients=[gradient])[0], exact)


LEVELS = ("portable", "avx2", "avx512")


def levels_here():
    built = mfp.backend.build_info()
    return LEVELS[: LEVELS.index(built["cpu_isa"]) + 1] if built else ()


def test_instruction_sets_agree(monkeypatch):
    """Bitwise on whole numbers; within the bound on real ones."""
    assert "portable" in levels_here()
    real = [awkward(70, 300, torch.float32), awkward(20, 27, torch.float16)]
    whole = [whole_number_weights(200, 300)]
    seen = []
    for level in levels_here():
        monkeypatch.setenv("MFP_CPU_ISA", level)
        assert mfp.backend.build_info()["cpu_isa"] == level
        assert_close(score(real, NAMED + GENERAL), oracle(real, NAMED + GENERAL))
        seen.append(score(whole, ("l1_norm", "l1_distance")))
    assert all(torch.equal(seen[0], other) for other in seen[1:])


def test_an_unknown_instruction_set_is_an_error(monkeypatch):
    monkeypatch.setenv("MFP_CPU_ISA", "sse9")
    with pytest.raises(RuntimeError, match="known are portable, avx2, avx512"):
        score([torch.ones(2, 2)], NAMED, backend="cpu")


def test_the_number_of_threads_does_not_change_a_bit():
    weights = [awkward(200, 100, torch.float32), awkward(64, 576, torch.bfloat16), awkward(30, 9, torch.float32)]
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 8, 1):
            torch.set_num_threads(threads)
            results.append(score(weights, NAMED + GENERAL))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


# ---- properties ----------------------------------------------------------------------------------------------------


def test_permuting_filters_permutes_scores():
    weight = torch.randn(90, 40)
    order = torch.randperm(90)
    (gradient,) = gradients_of([weight])
    permuted = score([weight[order]], NAMED, gradients=[gradient[order]])
    assert_close(permuted, score([weight], NAMED)[:, order].double(), bound=2 * BOUND)


def test_scaling_weights_scales_scores():
    """By a power of two, so that nothing is rounded; the cosine does not change, products grow by the square."""
    weight = torch.randn(50, 60)
    factors = torch.tensor([4.0, 4.0, 4.0, 4.0, 1.0, 16.0, 16.0])[:, None]
    assert torch.equal(score([4 * weight], NAMED), factors * score([weight], NAMED))


def test_a_filter_and_its_negative_are_far_apart():
    """Some toolkits take distances between |w|, for which these two would be the same filter."""
    weight = torch.tensor([[1.0, 2.0], [-1.0, -2.0], [1.0, 2.0]])
    scores = score([weight], ("l1_distance", "l2_distance", "cosine_distance"))
    assert scores[0].tolist() == [6.0, 12.0, 6.0]
    assert scores[1, 1] == 2 * scores[1, 0] > 0
    assert scores[2].tolist() == pytest.approx([2.0, 4.0, 2.0])


def test_cosine_of_all_zero_filters():
    weight = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 2.0]])
    assert score([weight], ("cosine_distance",)).tolist() == [[2.0, 3.0, 2.0, 3.0]]


def test_memory_formats_give_the_same_bits():
    weight = torch.randn(32, 16, 3, 3)
    last = weight.to(memory_format=torch.channels_last)
    assert last.stride() != weight.stride()
    whole = torch.randint(-5, 6, weight.shape).float()
    names = ("l1_norm", "l1_distance")
    assert torch.equal(score([whole], names), score([whole.to(memory_format=torch.channels_last)], names))
    assert_close(score([last], NAMED), oracle([weight], NAMED))


def test_conv1d_and_conv3d_weights():
    weights = [torch.randn(10, 4, 3), torch.randn(6, 2, 3, 3, 3)]
    assert_close(score(weights, NAMED), oracle(weights, NAMED))


def test_a_weight_that_starts_in_the_middle_of_its_storage():
    storage = torch.randn(1 + 20 * 33)
    weight = storage[1:].view(20, 33)
    assert weight.data_ptr() % 16 != 0
    assert_close(score([weight], NAMED), oracle([weight], NAMED))


def test_scores_are_the_same_in_one_call_or_many():
    weights = [torch.randn(40, 50), torch.randn(20, 9)]
    together = score(weights, NAMED)
    for row, name in enumerate(NAMED):
        alone = torch.cat([score([weight], (name,)) for weight in weights], 1)
        assert_close(alone, together[row : row + 1].double())


def test_reference_backend_is_the_oracle():
    weight = torch.randn(10, 10)
    assert torch.equal(score([weight], NAMED, backend="reference"), oracle([weight], NAMED).float())


# ---- the public function and bad input ------------------------------------------------------------------------------


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 2),
    )


def test_score_filters_of_a_plan():
    plan = mfp.FilterPlan.from_model(small_model())
    scores = mfp.score_filters(plan, criteria=("l2_norm", "l2_distance"))
    assert list(scores) == ["l2_norm", "l2_distance"]
    assert scores["l2_norm"].shape == (14,) and scores["l2_norm"].dtype == torch.float32
    expected = plan.model[3].weight.detach().flatten(1).norm(dim=1)
    torch.testing.assert_close(scores["l2_norm"][plan["3"].slice], expected)
    with pytest.raises(mfp.MfpError, match="'l1_norm' was not scored"):
        scores["l1_norm"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("filter_index", [0, 3, 7])
@pytest.mark.parametrize("criterion", NAMED + GENERAL)
def test_weights_that_are_not_finite_are_an_error_with_layer_and_filter(value, filter_index, criterion):
    model = small_model()
    plan = mfp.FilterPlan.from_model(model)
    with torch.no_grad():
        model[0].weight[filter_index, 1, 2, 0] = value
    batches = [(torch.randn(2, 3, 8, 8), torch.tensor([0, 1]))]
    with pytest.raises(mfp.MfpError, match=f"layer '0': filter {filter_index} has weights that are not finite"):
        mfp.score_filters(plan, (criterion,), calibration=batches)


@pytest.mark.parametrize("value", [-0.0, 1e-45, -1e-40])
def test_negative_zero_and_denormal_weights(value):
    weight = torch.full((6, 10), value)
    weight[0] = 1.0
    assert_close(score([weight], NAMED), oracle([weight], NAMED))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("l2",), "unknown criterion 'l2': known are l1_norm, l2_norm"),
        (("l0.5_norm",), "p must be a finite real number >= 1"),
        ((), "at least one name"),
        ("l2_norm", "sequence"),
        (("l2_norm", "l2_norm"), "named twice"),
    ],
)
def test_bad_criteria(names, message):
    with pytest.raises(mfp.MfpError, match=message):
        mfp.score_filters(mfp.FilterPlan.from_model(small_model()), names)


def test_score_too_large_for_float32_is_an_error():
    model = small_model()
    with torch.no_grad():
        model[0].weight.mul_(1e30)
    with pytest.raises(mfp.MfpError, match="too large for float32"):
        mfp.score_filters(mfp.FilterPlan.from_model(model), ("weighted_hybrid",))


def test_a_forced_backend_by_environment(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here, so the backend can run")
    monkeypatch.setenv("MFP_BACKEND", "cuda")
    with pytest.raises(mfp.MfpError, match="backend 'cuda' was requested and cannot run"):
        mfp.score_filters(mfp.FilterPlan.from_model(small_model()))
