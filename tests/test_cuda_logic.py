"""The kernels of csrc/cuda, run on the CPU by tests/cuda_on_cpu.h, against the float64 oracle.

What only a GPU can show (races, memory order, speed) is in the tests marked gpu and in benchmarks/gpu.py.
"""

import cuda_logic
import pytest
import torch

from mfp import backend, reference

NORM, DISTANCE, COSINE, HYBRID, TAYLOR = range(5)
ALL = ((NORM, 1), (NORM, 2), (DISTANCE, 1), (DISTANCE, 2), (COSINE, 2), (HYBRID, 2), (TAYLOR, 2))
PAPER = ALL[:5]
POWERS = ((NORM, 1.5), (NORM, 3), (DISTANCE, 1.5), (DISTANCE, 3))
BOUND = 1e-5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TILE, DEPTH = 64, 32  # kTile and kDepth of the kernel
SHAPES = [
    (1, 1), (1, 9), (2, 1), (3, 27), (5, 3), (TILE - 1, DEPTH - 1), (TILE, DEPTH), (TILE + 1, DEPTH + 1), (31, 7),
    (33, 2 * DEPTH), (TILE, 147), (2 * TILE + 1, 2 * DEPTH - 1), (3 * TILE + 2, 12), (20, 300),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _device():
    cuda_logic.configure()


def split(criteria):
    return [kind for kind, _ in criteria], [float(exponent) for _, exponent in criteria]


def gradients_of(weights):
    """As random as weights, laid out like them; every other one in float32, as the sum over batches is."""
    found = []
    for index, weight in enumerate(weights):
        values = torch.randn(weight.shape, generator=torch.Generator().manual_seed(20 + index)).to(weight.device)
        gradient = torch.empty_like(weight, dtype=torch.float32 if index % 2 else weight.dtype)
        found.append(gradient.copy_(values))
    return found


def asked(weights, criteria):
    """What a scoring op takes beside the weights: kinds, exponents, gradients."""
    return *split(criteria), gradients_of(weights) if TAYLOR in split(criteria)[0] else []


def score(weights, criteria, launches=1):
    return cuda_logic.score_filters(weights, *asked(weights, criteria), launches=launches)


def oracle(weights, criteria):
    return reference.score_filters(weights, *asked(weights, criteria), out_dtype=torch.float64)


def assert_close(actual, expected, bound=BOUND, noise=1e-24):
    """Relative error within the bound; what is 0 in exact arithmetic (parallel filters' angles) may be ``noise``."""
    floor = torch.maximum(1e-12 * expected.abs().amax(1, keepdim=True), torch.tensor(noise, dtype=torch.float64))
    error = ((actual.double() - expected).abs() - floor) / expected.abs().clamp_min(1e-300)
    where = divmod(int(error.argmax()), error.shape[1])
    assert error.max() <= bound, f"worst relative error {error.max():.2e} at (criterion, filter) {where}"


def awkward(filters, size, dtype=torch.float32, seed=0):
    """Random filters with all-zero ones, a duplicate, a negative, a scaled copy and a near-duplicate among them."""
    weight = torch.randn(filters, size, generator=torch.Generator().manual_seed(seed))
    changes = (lambda w: 0 * w, lambda w: w, lambda w: -w, lambda w: 3 * w, lambda w: w + 1e-4, lambda w: 0 * w)
    for index, change in enumerate(changes):
        if filters > index + 3:
            weight[index + 1] = change(weight[0])
    return weight.to(dtype)


# ---- scores ---------------------------------------------------------------------------------------------------------


def test_the_tile_is_the_one_the_shapes_are_chosen_for():
    assert cuda_logic.build().tile_size() == TILE


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scores_are_within_the_bound_of_the_oracle(shape, dtype):
    weight = awkward(*shape, dtype)
    expected = oracle([weight], ALL)
    assert expected.abs().sum() > 0
    assert_close(score([weight], ALL), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_powers(dtype):
    weights = [awkward(10, 7, dtype), awkward(TILE + 3, DEPTH + 5, dtype)]
    for weight in weights:
        assert_close(score([weight], POWERS + ALL), oracle([weight], POWERS + ALL))


@pytest.mark.parametrize("size", [4608, 10000])
def test_filters_a_ten_thousandth_apart(size):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(1, size, generator=generator) + 1e-4 * torch.randn(12, size, generator=generator)
    assert_close(score([weight], ALL), oracle([weight], ALL))


def test_constant_filters_do_not_drift():
    """All terms of a sum equal: rounding errors of a long float32 sum would all have one sign."""
    weight = torch.linspace(0.1, 0.7, 9)[:, None].expand(9, 20000).contiguous()
    criteria = ((DISTANCE, 1), (DISTANCE, 2))
    assert_close(score([weight], criteria), oracle([weight], criteria))


def test_norms_far_apart_and_parallel_filters():
    """Where the cosine from the squared distance cancels: small filters among large, scaled copies, negatives."""
    generator = torch.Generator().manual_seed(2)
    small = torch.randn(70, 40, generator=generator)
    small[::2] *= 1e-3
    small[::3] *= 1e-15
    assert_close(score([small], ALL), oracle([small], ALL))
    copies = torch.randn(1, 50, generator=generator) * torch.linspace(0.01, 3, 40)[:, None]
    copies *= 1 + 1e-4 * torch.randn(40, 50, generator=generator)
    copies[::3] *= -1
    assert_close(score([copies], ALL), oracle([copies], ALL))


L2 = ((DISTANCE, 2),)  # alone it goes through the tensor cores


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (40, 1500)], ids=str)
def test_euclidean_distances_through_matrix_products(shape, dtype):
    """Random filters, and positive ones, whose products do not average out."""
    generator = torch.Generator().manual_seed(8)
    for weight in (torch.randn(shape, generator=generator), torch.rand(shape, generator=generator)):
        assert_close(score([weight.to(dtype)], L2), oracle([weight.to(dtype)], L2))


def test_matrix_products_that_cancel():
    """Near-duplicates, duplicates and zeros, in some tiles of a layer and in all."""
    generator = torch.Generator().manual_seed(9)
    weight = torch.randn(2 * TILE + 20, 100, generator=generator)
    weight[3] = weight[70]
    weight[5] = weight[6] + 1e-4 * torch.randn(100, generator=generator)
    weight[40:50] = 0
    weight[60] *= 1e-3
    assert_close(score([weight], L2), oracle([weight], L2))
    close = torch.randn(1, 200, generator=generator) + 1e-4 * torch.randn(30, 200, generator=generator)
    assert_close(score([close], L2), oracle([close], L2))
    for scale in (1e-30, 1e-22, 1e-12, 1e12, 1e17):
        assert_close(score([scale * weight], L2), oracle([scale * weight], L2))


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e-12, 1e12, 1e17])
def test_weights_of_any_size(scale):
    weight = awkward(40, 50) * scale
    assert_close(score([weight], PAPER), oracle([weight], PAPER), noise=1e-24 * scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_whole_numbers_are_exact(shape, dtype):
    generator = torch.Generator().manual_seed(3)
    whole = torch.randint(-8, 9, shape, generator=generator).to(dtype)
    manhattan = ((NORM, 1), (DISTANCE, 1))
    expected = oracle([whole], manhattan)
    assert shape == (1, 1) or expected.sum() > 0
    assert torch.equal(score([whole], manhattan).double(), expected)
    line = torch.zeros(shape)  # multiples of one unit vector: Euclidean distances are integers
    line[:, shape[1] // 2] = torch.randint(-50, 51, shape[:1], generator=generator).float()
    for criteria in ((*manhattan, (NORM, 2), (DISTANCE, 2)), L2):
        assert torch.equal(score([line.to(dtype)], criteria).double(), oracle([line.to(dtype)], criteria))


MIXED = [
    awkward(TILE, 576), awkward(5, 147, torch.bfloat16), awkward(1, 4), awkward(2 * TILE + 1, 33),
    awkward(TILE + 2, 64, torch.float16), awkward(3, 1), torch.zeros(4, 6),
]  # fmt: skip


@pytest.mark.parametrize("criteria", [*[(c,) for c in ALL], ALL[:2], ALL[2:4], ALL[3:], (*ALL, *POWERS, ALL[3])])
def test_any_criteria_of_many_layers_in_one_launch(criteria):
    assert_close(score(MIXED, criteria), oracle(MIXED, criteria))


def test_more_layers_than_any_fixed_limit():
    weights = [awkward(1 + index % 7, 1 + index % 11, seed=index) for index in range(1500)]
    assert_close(score(weights, ALL[2:4]), oracle(weights, ALL[2:4]))


def test_a_weight_that_starts_off_alignment():
    weight = torch.randn(1 + 20 * 36)[1:].view(20, 36)
    assert weight.data_ptr() % 16 != 0
    assert_close(score([weight], ALL), oracle([weight], ALL))
    gradient = torch.randn(1 + 20 * 36)[1:].view(20, 36)
    aligned = weight.clone()
    actual = cuda_logic.score_filters([aligned], [TAYLOR], [2.0], [gradient])
    assert_close(actual, reference.score_filters([aligned], [TAYLOR], [2.0], [gradient], out_dtype=torch.float64))


def test_order_of_threads_number_of_blocks_and_repetition_do_not_change_a_bit():
    """Also shows that the counters are ready for the next launch with the same table."""
    results = []
    for seed, processors, blocks in ((0, 1, 1), (0, 1, 3), (1, 2, 2), (7, 5, 1)):
        cuda_logic.configure(seed, processors, blocks)
        results.append(score(MIXED, ALL, launches=2))
    assert results[0].abs().sum() > 0
    assert all(torch.equal(results[0], other) for other in results[1:])


# ---- selection and zeroing ------------------------------------------------------------------------------------------


def prune_both(weights, followers, follower_layers, num_pruned, criteria, chosen):
    """(scores, keep, weights, followers) of the kernel and of the reference, from copies of the same tensors."""
    results = []
    for prune in (cuda_logic.prune_filters_, reference.prune_filters_):
        own = [weight.clone() for weight in weights]
        own_followers = [tensor.clone() for tensor in followers]
        kinds, exponents, gradients = asked(weights, criteria)
        scores, keep = prune(own, own_followers, follower_layers, num_pruned, kinds, exponents, chosen, gradients)
        results.append((scores, keep, own, own_followers))
    return results


def assert_same_pruning(ours, theirs):
    assert torch.equal(ours[1], theirs[1])
    for own, other in zip((*ours[2], *ours[3]), (*theirs[2], *theirs[3]), strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("chosen", [*range(len(PAPER)), ALL.index((TAYLOR, 2))])
def test_pruning_is_that_of_the_reference(chosen, seed):
    cuda_logic.configure(seed, 1, 3)
    shapes = [(TILE, 147), (2 * TILE + 5, 9), (1, 5), (17, 64), (40, 33)]
    weights = [torch.randn(shape, generator=torch.Generator().manual_seed(index)) for index, shape in enumerate(shapes)]
    weights[1] = weights[1].half()
    num_pruned = [25, 60, 0, 16, 13]
    followers = [torch.ones(TILE), torch.ones(40, 3), torch.ones(17, 5).bfloat16(), torch.ones(40), torch.ones(1)]
    ours, theirs = prune_both(weights, followers, [0, 4, 3, 4, 2], num_pruned, ALL, chosen)
    assert_same_pruning(ours, theirs)
    assert_close(ours[0], theirs[0].double())
    counts = [int((~part).sum()) for part in ours[1].split([n for n, _ in shapes])]
    assert counts == num_pruned


def test_ties_go_by_index():
    """Duplicates, zeros and whole numbers: many equal scores, each cut through the middle of a group of equals."""
    generator = torch.Generator().manual_seed(4)
    weights = [torch.randint(-1, 2, (n, k), generator=generator).float() for n, k in ((100, 3), (150, 2), (33, 4))]
    weights.append(torch.zeros(70, 5))
    for chosen, criterion in enumerate(ALL[:3]):
        ours, theirs = prune_both(weights, [], [], [40, 77, 32, 69], ALL[:3], chosen)
        assert_same_pruning(ours, theirs)
        assert len(ours[0][chosen].unique()) < 283, criterion
    assert ours[1][-70:].tolist() == [False] * 69 + [True]


def test_negative_zero_scores_tie_with_zero():
    weight = torch.tensor([[0.0], [-0.0], [1.0]])
    ours, theirs = prune_both([weight], [], [], [1], ((NORM, 2),), 0)
    assert torch.equal(ours[1], theirs[1]) and ours[1].tolist() == [False, True, True]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (1, 66), (2, 4)])
def test_nothing_is_zeroed_when_a_score_is_not_finite(bad, place):
    weights = [torch.randn(10, 8), torch.randn(67, 40), torch.randn(5, 3)]
    layer, filter_ = place
    weights[layer][filter_, 1] = bad
    before = [weight.clone() for weight in weights]
    for criteria, chosen in ((ALL, 0), (ALL, 3), (((DISTANCE, 3),), 0), (((NORM, 1),), 0), (((TAYLOR, 2),), 0)):
        kinds, exponents, gradients = asked(weights, criteria)
        scores, keep = cuda_logic.prune_filters_(weights, [], [], [4, 20, 2], kinds, exponents, chosen, gradients)
        assert keep.all() and not scores.isfinite().all()
        for weight, old in zip(weights, before, strict=True):
            assert torch.equal(weight, old) or (weight.isnan() == old.isnan()).all()
        assert scores.isfinite()[:, : 10 if layer else 0].all()  # the other layers have their scores


def test_empty_layers_among_others():
    weights = [torch.randn(6, 3), torch.empty(0, 4), torch.empty(3, 0), torch.randn(4, 5)]
    kinds, exponents, gradients = asked(weights, ALL)
    full = [[tensors[0], tensors[3]] for tensors in (weights, gradients)]
    expected = reference.score_filters(full[0], kinds, exponents, full[1], out_dtype=torch.float64)
    scores, keep = cuda_logic.prune_filters_(weights, [], [], [2, 0, 1, 1], kinds, exponents, 3, gradients)
    assert [int((~part).sum()) for part in keep.split([6, 3, 4])] == [2, 1, 1]
    assert_close(scores[:, [0, 1, 2, 3, 4, 5, 9, 10, 11, 12]], expected)
    assert (scores[:, 6:9] == 0).all()


# ---- masks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mask_filters(dtype):
    generator = torch.Generator().manual_seed(5)
    rows = [1, 7, 64, 300, 33, 5]
    widths = [1, 3, 147, 2, 17, 9000]
    tensors = [torch.randn(n, k, generator=generator).to(dtype) for n, k in zip(rows, widths, strict=True)]
    tensors.append(torch.randn(1 + 12 * 7, generator=generator).to(dtype)[1:].view(12, 7))  # off alignment
    tensors.append(torch.randn(20, 3, generator=generator).to(dtype))  # two rows a filter
    rows += [12, 10]
    offsets = [0, 1, 2, 0, 30, 4, 9, 50]
    keep = torch.rand(320, generator=generator) < 0.5
    keep[0] = False
    expected = [tensor.clone() for tensor in tensors]
    reference.mask_filters_(expected, keep, offsets, rows)
    cuda_logic.mask_filters_(tensors, keep, offsets, rows)
    for tensor, other in zip(tensors, expected, strict=True):
        assert torch.equal(tensor, other)
    assert (tensors[0] == 0).all() and (tensors[3] != 0).any()


def test_masking_keeps_to_its_rows():
    """Bytes before and after the tensor stay: a store that is too wide would show."""
    for offset in range(1, 9):
        storage = torch.full((200,), 7, dtype=torch.float16)
        tensor = storage[offset : offset + 5 * 13].view(5, 13)
        cuda_logic.mask_filters_([tensor], torch.tensor([False, True, False, False, True]), [0], [5])
        expected = torch.full((200,), 7, dtype=torch.float16)
        for row in (0, 2, 3):
            expected[offset + 13 * row : offset + 13 * row + 13] = 0
        assert torch.equal(storage, expected)


# ---- optimiser steps ------------------------------------------------------------------------------------------------


def step_case(dtype, seed=0, long=(1000, 20000, 30001)):
    """Parameters of awkward sizes, some masked: (params, grads, first, second), keep, offsets, rows.

    Rows that are ``long`` go over several blocks of a kernel.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = [(4, 3), (5, 8), (1,), (64, 147), (20, long[0]), (7,), (40, 4), (3, long[1]), (long[2],)]
    groups = [[torch.randn(shape, generator=generator).to(dtype) for shape in shapes] for _ in range(4)]
    groups[3] = [tensor.square() for tensor in groups[3]]
    keep = torch.rand(200, generator=generator) < 0.6
    offsets = [0, 4, -1, 9, 73, 9, 100, 5, -1]
    rows = [shape[0] if offset >= 0 else 1 for shape, offset in zip(shapes, offsets, strict=True)]
    rows[6] = 20  # two rows of the tensor a filter
    return groups, keep, offsets, rows


def assert_same_step(name, dtype, count, numbers, keep_mask=True):
    """The kernel and the reference from the same start; pruned rows keep their bits."""
    groups, keep, offsets, rows = step_case(dtype)
    mask = keep if keep_mask else None
    ours, theirs = ([[tensor.clone() for tensor in group] for group in groups[:count]] for _ in range(2))
    start = [tensor.clone() for tensor in groups[0]]
    getattr(cuda_logic, name)(*ours, *([[]] if count == 2 else []), mask, offsets, rows, *numbers)
    getattr(reference, name)(*theirs, *([[]] if count == 2 else []), mask, offsets, rows, *numbers)
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]  # a rounding of the result
    for which, (own, other) in enumerate(zip(ours, theirs, strict=True)):
        for tensor, expected in zip(own, other, strict=True):
            torch.testing.assert_close(tensor, expected, rtol=tolerance, atol=tolerance, msg=f"{name} {which}")
    assert not torch.equal(ours[0][3], start[3])
    if keep_mask:
        gone = ~keep[9 : 9 + 64]
        assert gone.any() and torch.equal(ours[0][3][gone], start[3][gone])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("count", "numbers"),
    [
        (3, (0.1, 0.9, 0.0, 1e-4, False, False, False)),
        (3, (0.1, 0.9, 0.0, 1e-4, True, False, False)),
        (3, (0.1, 0.9, 0.3, 0.0, False, True, False)),
        (3, (0.1, 0.9, 0.3, 1e-4, False, False, True)),
        (2, (0.1, 0.0, 0.0, 1e-4, False, False, True)),
    ],
)
def test_masked_sgd(dtype, count, numbers):
    assert_same_step("masked_sgd_", dtype, count, numbers)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keep_mask", [True, False])
def test_masked_adamw(dtype, keep_mask):
    assert_same_step("masked_adamw_", dtype, 4, (1e-3, 0.9, 0.999, 1e-8, 0.05, False, 7), keep_mask)


@pytest.mark.skipif(backend.backends()["cpu"].unusable is not None, reason="the CPU kernels are not built")
def test_steps_have_the_bits_of_the_cpu_kernels():
    for name, count, numbers in (
        ("masked_sgd_", 3, (0.1, 0.9, 0.1, 1e-4, True, False, False)),
        ("masked_adamw_", 4, (1e-3, 0.9, 0.999, 1e-8, 0.05, False, 7)),
    ):
        groups, keep, offsets, rows = step_case(torch.float32)
        ours, theirs = ([[tensor.clone() for tensor in group] for group in groups[:count]] for _ in range(2))
        getattr(cuda_logic, name)(*ours, keep, offsets, rows, *numbers)
        getattr(torch.ops.mfp, name)(*theirs, keep, offsets, rows, *numbers)
        for own, other in zip(ours, theirs, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(own, other, strict=True)), name
