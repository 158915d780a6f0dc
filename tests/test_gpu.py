"""The ops on a GPU, both backends, against the float64 oracle. Run by `make gpu`; skipped where there is no GPU."""

import cuda_logic
import pytest
import torch
from test_cuda_logic import ALL, DTYPES, MIXED, PAPER, POWERS, SHAPES, asked, assert_close, awkward, split, step_case
from torch import nn

import mfp
from mfp import backend, ops, reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]
BACKENDS = [name for name in ("cuda", "triton") if backend.backends()[name].unusable is None]
LARGE = [(512, 4608), (1000, 257), (2048, 512), (300, 1152)]


def on_gpu(tensors):
    return [tensor.cuda() for tensor in tensors]


def asked_on_gpu(weights, criteria):
    kinds, exponents, gradients = asked(weights, criteria)
    return kinds, exponents, on_gpu(gradients)


def score(weights, criteria, name):
    return ops.score_filters(on_gpu(weights), *asked_on_gpu(weights, criteria), backend=name).cpu()


def oracle(weights, criteria):
    device = [weight.cuda() for weight in weights]  # float64 in plain torch; only the device is shared
    return reference.score_filters(device, *asked_on_gpu(weights, criteria), out_dtype=torch.float64).cpu()


def test_a_gpu_backend_is_usable():
    assert BACKENDS, {name: record.unusable for name, record in backend.backends().items()}


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_are_within_the_bound(name, dtype):
    for shape in SHAPES + LARGE:
        weight = awkward(*shape, dtype)
        criteria = ALL if shape in LARGE else ALL + POWERS
        assert_close(score([weight], criteria, name), oracle([weight], criteria))
    assert_close(score(MIXED, ALL, name), oracle(MIXED, ALL))


@pytest.mark.parametrize("name", BACKENDS)
def test_hard_numbers(name):
    generator = torch.Generator().manual_seed(2)
    small = torch.randn(200, 100, generator=generator)
    small[::2] *= 1e-3
    small[::3] *= 1e-15
    copies = torch.randn(1, 500, generator=generator) * torch.linspace(-3, 3, 150)[:, None]
    copies *= 1 + 1e-4 * torch.randn(150, 500, generator=generator)
    close = torch.randn(1, 4608, generator=generator) + 1e-4 * torch.randn(100, 4608, generator=generator)
    constant = torch.linspace(0.1, 0.7, 70)[:, None].expand(70, 20000).contiguous()
    for weight in (small, copies, close, constant):
        assert_close(score([weight], ALL, name), oracle([weight], ALL))
    for scale in (1e-30, 1e-22, 1e12, 1e17):
        weight = awkward(100, 50) * scale
        assert_close(score([weight], PAPER, name), oracle([weight], PAPER), noise=1e-24 * scale)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_numbers_are_exact(name, dtype):
    generator = torch.Generator().manual_seed(3)
    for shape in [*SHAPES, (600, 300)]:
        whole = torch.randint(-8, 9, shape, generator=generator).to(dtype)
        assert torch.equal(score([whole], (ALL[0], ALL[2]), name).double(), oracle([whole], (ALL[0], ALL[2])))
        line = torch.zeros(shape)
        line[:, shape[1] // 2] = torch.randint(-50, 51, shape[:1], generator=generator).float()
        assert torch.equal(score([line.to(dtype)], ALL[:4], name).double(), oracle([line.to(dtype)], ALL[:4]))


def resnet_like():
    generator = torch.Generator().manual_seed(7)
    shapes = [(64, 147), (256, 64), (64, 576), (512, 256), (128, 1152), (33, 50), (1024, 300)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("chosen", range(len(ALL)))
def test_pruning_is_that_of_the_reference(name, chosen):
    weights = resnet_like()
    num_pruned = [int(0.4 * len(weight)) for weight in weights]
    results = []
    for which in (name, "reference"):
        own, follower = on_gpu(weights), torch.ones(256, 3, device="cuda")
        kinds, exponents, gradients = asked(own, ALL)
        scores, keep = ops.prune_filters_(
            own, [follower], [1], num_pruned, kinds, exponents, chosen, gradients, backend=which
        )
        results.append([keep, *own, follower, scores])
    for ours, theirs in zip(results[0][:-1], results[1][:-1], strict=True):
        assert torch.equal(ours, theirs)
    assert_close(results[0][-1].cpu(), results[1][-1].cpu().double())


@pytest.mark.parametrize("name", BACKENDS)
def test_a_thousand_launches_give_the_same_bits(name):
    weights = on_gpu(resnet_like())
    first = ops.score_filters(weights, *asked(weights, ALL), backend=name)
    assert first.abs().sum() > 0
    different = sum(
        (ops.score_filters(weights, *asked(weights, ALL), backend=name) != first).any() for _ in range(1000)
    )
    assert int(different) == 0


@pytest.mark.parametrize("name", BACKENDS)
def test_streams_at_once(name):
    weights = [on_gpu(resnet_like()[i:]) for i in range(4)]
    expected = [ops.score_filters(layers, *asked(layers, ALL), backend=name) for layers in weights]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    for _ in range(20):
        results = []
        for stream, layers in zip(streams, weights, strict=True):
            with torch.cuda.stream(stream):
                results.append(ops.score_filters(layers, *asked(layers, ALL), backend=name))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.skipif("cuda" not in BACKENDS, reason="needs the compiled CUDA kernels")
def test_a_cuda_graph_prunes_what_the_weights_are_at_replay():
    start = on_gpu(resnet_like())
    static = [weight.clone() for weight in start]
    num_pruned = [int(0.4 * len(weight)) for weight in static]
    arguments = ([], [], num_pruned, *split(PAPER), 3, [])
    torch.ops.mfp.prune_filters_([weight.clone() for weight in start], *arguments)  # warm-up on other tensors
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scores, keep = torch.ops.mfp.prune_filters_(static, *arguments)
    for seed in range(3):
        torch.manual_seed(seed)
        fresh = [torch.randn_like(weight) for weight in start]
        for weight, new in zip(static, fresh, strict=True):
            weight.copy_(new)
        graph.replay()
        expected = torch.ops.mfp.prune_filters_(fresh, *arguments)
        assert torch.equal(scores, expected[0]) and torch.equal(keep, expected[1])
        assert all(torch.equal(a, b) for a, b in zip(static, fresh, strict=True))


@pytest.mark.parametrize("name", BACKENDS)
def test_pruning_does_not_wait_for_the_device(name):
    weights = on_gpu(resnet_like())
    arguments = ([], [], [1] * len(weights), *split(PAPER), 0)
    ops.prune_filters_(weights, *arguments, backend=name)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.prune_filters_(weights, *arguments, backend=name)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", BACKENDS)
def test_nothing_is_zeroed_when_a_score_is_not_finite(name):
    weights = on_gpu(resnet_like())
    weights[3][7, 5] = float("nan")
    before = [weight.clone() for weight in weights]
    scores, keep = ops.prune_filters_(weights, [], [], [5] * len(weights), *split(PAPER), 3, backend=name)
    assert keep.all() and not scores.isfinite().all()
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(weights, before, strict=True))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_and_steps(name, dtype):
    module = mfp.kernels if name == "triton" else torch.ops.mfp
    for op, count, numbers in (
        ("masked_sgd_", 3, (0.1, 0.9, 0.1, 1e-4, True, False, False)),
        ("masked_adamw_", 4, (1e-3, 0.9, 0.999, 1e-8, 0.05, False, 7)),
    ):
        groups, keep, offsets, rows = step_case(dtype)
        ours = [on_gpu(group) for group in groups[:count]]
        theirs = [[tensor.clone() for tensor in group] for group in groups[:count]]
        getattr(module, op)(*ours, keep.cuda(), offsets, rows, *numbers)
        getattr(cuda_logic, op)(*theirs, keep, offsets, rows, *numbers)
        tolerance = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
        for own, other in zip(ours, theirs, strict=True):
            for tensor, expected in zip(own, other, strict=True):
                torch.testing.assert_close(tensor.cpu(), expected, rtol=tolerance, atol=tolerance)
        masked = [(tensor, o, r) for tensor, o, r in zip(groups[0], offsets, rows, strict=True) if o >= 0]
        device = [tensor.cuda() for tensor, *_ in masked]
        ops.mask_filters_(device, keep.cuda(), [o for _, o, _ in masked], [r for *_, r in masked], backend=name)
        reference.mask_filters_([t for t, *_ in masked], keep, [o for _, o, _ in masked], [r for *_, r in masked])
        assert all(torch.equal(a.cpu(), b) for a, (b, *_) in zip(device, masked, strict=True))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_scatter_add(name, relu, layout):
    add = (mfp.kernels if name == "triton" else torch.ops.mfp).scatter_add_
    for shape in ((2, 5, 3, 3), (8, 300, 28, 28), (4, 2048, 7, 7)):
        residual = torch.randn(shape, device="cuda").contiguous(memory_format=layout)
        index = torch.randperm(shape[1], device="cuda")[: shape[1] // 2].sort().values
        branch = torch.randn(shape[0], len(index), *shape[2:], device="cuda").contiguous(memory_format=layout)
        expected = residual.index_add(1, index, branch)
        actual = residual.clone(memory_format=torch.preserve_format)
        add(actual, branch, index, relu)
        assert torch.equal(actual, expected.relu() if relu else expected)


@pytest.mark.skipif("cuda" not in BACKENDS, reason="needs the compiled CUDA kernels")
def test_more_than_two_to_the_31_weights_in_a_layer():
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GB of GPU memory")
    weight = torch.zeros(600_000, 4096, dtype=torch.bfloat16, device="cuda")
    weight[-1, -1] = 3
    weight[-2] = 1
    scores = torch.ops.mfp.score_filters([weight], *split(ALL[:2]), [])
    assert scores[:, -1].tolist() == [3.0, 3.0] and scores[:, -2].tolist() == [4096.0, 64.0]
    assert (scores[:, :-2] == 0).all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", BACKENDS)
def test_tensors_on_two_gpus_are_an_error(name):
    weights = [torch.randn(4, 4, device="cuda:0"), torch.randn(4, 4, device="cuda:1")]
    with pytest.raises(ValueError, match=r"cuda:1.*cuda:0"):
        ops.score_filters(weights, *asked(weights, ALL), backend=name)
    second = [torch.randn(40, 40, device="cuda:1")]
    assert_close(ops.score_filters(second, *asked(second, ALL), backend=name).cpu(), oracle(second, ALL))


def test_a_pruner_on_the_gpu():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1)).cuda()
    pruner = mfp.FilterPruner(model, rate=0.5)
    decision = pruner.step(0)
    assert decision is not None and int((~pruner.mask.keep).sum()) == 12
    assert int((model[0].weight.flatten(1) == 0).all(1).sum()) == 8
