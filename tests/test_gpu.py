"""The ops on a GPU, both backends, against the float64 oracle. Run by `make gpu`; skipped where there is no GPU.

MFP_TEST_DEVICE=cpu runs on a CPU what needs nothing of a GPU, so that no test ends on a slip of the pen in its first
minute on a device (test_gpu_steps.py does that).
"""

import os

import pytest
import test_versions
import torch
from test_cuda_logic import ALL, DTYPES, MIXED, PAPER, POWERS, SHAPES, asked, assert_close, awkward, split, step_case
from torch import nn

import mfp
from mfp import backend, ops, reference
from mfp.train.models import CifarResNet

DEVICE = os.environ.get("MFP_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no GPU here"),
]
needs_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU, not a CPU in its place")
BACKENDS = [
    name
    for name, record in backend.backends().items()
    if record.unusable is None and record.accepts(torch.device(DEVICE)) and name != "reference"
]
LAUNCHES = 1000 if DEVICE == "cuda" else 3
LARGE = [(512, 4608), (1000, 257), (2048, 512), (300, 1152)] if DEVICE == "cuda" else [(70, 40)]


def module_of(name):
    """Where the functions of a backend are."""
    if name != "triton":
        return torch.ops.mfp
    from mfp import kernels

    return kernels


def on_gpu(tensors):
    return [tensor.to(DEVICE, copy=True) for tensor in tensors]


def asked_on_gpu(weights, criteria):
    kinds, exponents, gradients = asked(weights, criteria)
    return kinds, exponents, on_gpu(gradients)


def score(weights, criteria, name):
    return ops.score_filters(on_gpu(weights), *asked_on_gpu(weights, criteria), backend=name).cpu()


def oracle(weights, criteria):
    device = on_gpu(weights)  # float64 in plain torch; only the device is shared
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
    constant = torch.linspace(0.1, 0.7, 70)[:, None].expand(70, 20_000 if DEVICE == "cuda" else 200).contiguous()
    for weight, noise in ((small, 1e-24), (copies, 1e-24), (close, 1e-24), (constant, 1e-18)):  # the oracle's own
        assert_close(score([weight], ALL, name), oracle([weight], ALL), noise=noise)
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
    shapes = shapes if DEVICE == "cuda" else [(13, 27), (256, 5), (33, 50)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("chosen", range(len(ALL)))
def test_pruning_is_that_of_the_reference(name, chosen):
    weights = resnet_like()
    num_pruned = [int(0.4 * len(weight)) for weight in weights]
    results = []
    for which in (name, "reference"):
        own, follower = on_gpu(weights), torch.ones(256, 3, device=DEVICE)
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
        (ops.score_filters(weights, *asked(weights, ALL), backend=name) != first).any() for _ in range(LAUNCHES)
    )
    assert int(different) == 0


@needs_gpu
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


@needs_gpu
@pytest.mark.parametrize("name", BACKENDS)
def test_a_cuda_graph_prunes_what_the_weights_are_at_replay(name):
    start = on_gpu(resnet_like())
    static = [weight.clone() for weight in start]
    num_pruned = [int(0.4 * len(weight)) for weight in static]

    def prune(weights):
        return ops.prune_filters_(weights, [], [], num_pruned, *split(PAPER), 3, backend=name)

    prune(static)  # Triton wants to have met the tensors before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scores, keep = prune(static)
    if name == "triton":
        module_of(name).table._cache.clear()  # the graph must have kept what it reads
    torch.cuda.empty_cache()
    garbage = [torch.full((size,), -1, device=DEVICE) for size in (64, 512, 4096) for _ in range(50)]
    for seed in range(3):
        torch.manual_seed(seed)
        fresh = [torch.randn_like(weight) for weight in start]
        for weight, new in zip(static, fresh, strict=True):
            weight.copy_(new)
        graph.replay()
        expected = prune(fresh)
        assert torch.equal(scores, expected[0]) and torch.equal(keep, expected[1])
        assert all(torch.equal(a, b) for a, b in zip(static, fresh, strict=True))
    del garbage


@needs_gpu
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
    weights[2][7, 5] = float("nan")
    before = [weight.clone() for weight in weights]
    scores, keep = ops.prune_filters_(weights, [], [], [5] * len(weights), *split(PAPER), 3, backend=name)
    assert keep.all() and not scores.isfinite().all()
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(weights, before, strict=True))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_and_steps(name, dtype):
    module = module_of(name)
    for op, count, numbers in (
        ("masked_sgd_", 3, (0.1, 0.9, 0.1, 1e-4, True, False, False)),
        ("masked_adamw_", 4, (1e-3, 0.9, 0.999, 1e-8, 0.05, False, 7)),
    ):
        groups, keep, offsets, rows = step_case(dtype)
        ours = [on_gpu(group) for group in groups[:count]]
        theirs = [[tensor.clone() for tensor in group] for group in groups[:count]]
        getattr(module, op)(*ours, keep.to(DEVICE), offsets, rows, *numbers)
        getattr(reference, op)(*theirs, keep, offsets, rows, *numbers)
        tolerance = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
        for own, other in zip(ours, theirs, strict=True):
            for tensor, expected in zip(own, other, strict=True):
                torch.testing.assert_close(tensor.cpu(), expected, rtol=tolerance, atol=tolerance)
        masked = [(tensor, o, r) for tensor, o, r in zip(groups[0], offsets, rows, strict=True) if o >= 0]
        device = on_gpu([tensor for tensor, *_ in masked])
        ops.mask_filters_(device, keep.to(DEVICE), [o for _, o, _ in masked], [r for *_, r in masked], backend=name)
        reference.mask_filters_([t for t, *_ in masked], keep, [o for _, o, _ in masked], [r for *_, r in masked])
        assert all(torch.equal(a.cpu(), b) for a, (b, *_) in zip(device, masked, strict=True))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_scatter_add(name, relu, layout):
    add = module_of(name).scatter_add_
    for shape in ((2, 5, 3, 3), (8, 300, 28, 28), (4, 2048, 7, 7)):
        residual = torch.randn(shape, device=DEVICE).contiguous(memory_format=layout)
        index = torch.randperm(shape[1], device=DEVICE)[: shape[1] // 2].sort().values
        branch = torch.randn(shape[0], len(index), *shape[2:], device=DEVICE).contiguous(memory_format=layout)
        expected = residual.index_add(1, index, branch)
        actual = residual.clone(memory_format=torch.preserve_format)
        add(actual, branch, index, relu)
        assert torch.equal(actual, expected.relu() if relu else expected)


@pytest.mark.skipif("cuda" not in BACKENDS, reason="needs the compiled CUDA kernels")
def test_more_than_two_to_the_31_weights_in_a_layer():
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GB of GPU memory")
    weight = torch.zeros(600_000, 4096, dtype=torch.bfloat16, device=DEVICE)
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
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1)).to(DEVICE)
    pruner = mfp.FilterPruner(model, rate=0.5)
    decision = pruner.step(0)
    assert decision is not None and int((~pruner.mask.keep).sum()) == 8  # the last conv is the output
    assert int((model[0].weight.flatten(1) == 0).all(1).sum()) == 8


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("op", test_versions.CASES)
def test_autograd_notices(op, name):
    test_versions.assert_noticed(module_of(name), op, DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", ["index", "keep", "coupled"])
def test_compact_networks(residual, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    model, images = CifarResNet(8, 10).to(DEVICE), torch.randn(4, 3, 32, 32, device=DEVICE)
    model(images)  # BatchNorm statistics
    mfp.prune_filters_(mfp.FilterPlan.from_model(model.eval(), 0.4, residual=residual), "l2_norm")
    expected = model(images)
    model, images = model.to(dtype), images.to(dtype, memory_format=torch.channels_last)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 1e-2}[dtype]
    for fold_bn in (False, True):
        small = mfp.compact(model, images, fold_bn=fold_bn)
        with torch.no_grad():
            difference = (small(images).float() - expected).abs().max() / expected.abs().max()
        assert difference <= tolerance
