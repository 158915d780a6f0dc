"""BatchNorm for training narrow networks: the ops at every level of SIMD, and the module that uses them."""

import copy

import pytest
import torch
from torch import nn

import mfp
from mfp import backend, layer_ops, reference
from mfp.batch_norm import NarrowBatchNorm2d

CL = torch.channels_last
pytestmark = [
    pytest.mark.usefixtures("three_threads"),
    pytest.mark.skipif(backend.backends()["cpu"].unusable is not None, reason="mfp._C is not built"),
]


def sample(channels, shape=(3, 13, 11), away=0.0):
    generator = torch.Generator().manual_seed(channels)
    batch, *size = shape
    x, gradient = torch.randn(2, batch, channels, *size, generator=generator).unbind()
    x = x * (1 + torch.arange(channels)[:, None, None] % 3) + away
    vectors = torch.rand(4, channels, generator=generator) + 0.5
    return x.contiguous(memory_format=CL), gradient.contiguous(memory_format=CL), list(vectors.unbind())


def close(ours, right, share=2e-6):
    return all((a.double() - b).abs().max() <= share * (b.abs().max() + 1) for a, b in zip(ours, right, strict=True))


@pytest.mark.parametrize("away", [0.0, 300.0])
@pytest.mark.parametrize("channels", [1, 3, 10, 16, 17, 40, 63, 64, 65, 130])
def test_ops_equal_the_oracle(isa, channels, away):
    x, gradient, vectors = sample(channels, away=away)
    ours, right = [v.clone() for v in vectors], [v.double() for v in vectors]
    results = layer_ops.batch_norm_training_(x, *ours, 0.1, 1e-5)
    expected = reference.batch_norm_training_(x.double(), *right, 0.1, 1e-5)
    assert results[0].is_contiguous(memory_format=CL)
    assert close([*results, *ours], [*expected, *right], 2e-6 if not away else 2e-5)
    gradients = layer_ops.batch_norm_gradients(gradient, x, vectors[0], *results[1:])
    assert close(
        gradients, reference.batch_norm_gradients(gradient.double(), x.double(), right[0], *expected[1:]), 2e-5
    )
    alone = [torch.zeros_like(v) for v in vectors]
    torch.set_num_threads(1)  # the fixture sets it back
    again = layer_ops.batch_norm_training_(x, vectors[0], vectors[1], *alone[2:], 0.1, 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(again, results, strict=True))
    more = layer_ops.batch_norm_gradients(gradient, x, vectors[0], *results[1:])
    assert all(torch.equal(a, b) for a, b in zip(more, gradients, strict=True))


def test_the_oracle_is_what_torch_computes():
    x, gradient, (weight, bias, mean, var) = sample(10)
    x, gradient = x.double().requires_grad_(), gradient.double()
    norm = nn.BatchNorm2d(10).double().train()
    tensors = dict(zip(("weight", "bias", "running_mean", "running_var"), (weight, bias, mean, var), strict=True))
    norm.load_state_dict(tensors, strict=False)
    right = norm(x)
    right.backward(gradient)
    mine = [t.double() for t in (weight, bias, mean, var)]
    out, *kept = reference.batch_norm_training_(x.detach(), *mine, 0.1, 1e-5)
    gradients = reference.batch_norm_gradients(gradient, x.detach(), mine[0], *kept)
    theirs = [right.detach(), norm.running_mean, norm.running_var, x.grad, norm.weight.grad, norm.bias.grad]
    for ours, its in zip([out, mine[2], mine[3], *gradients], theirs, strict=True):
        torch.testing.assert_close(ours, its, rtol=1e-12, atol=1e-12)


def test_opcheck():
    x, gradient, vectors = sample(10)
    torch.library.opcheck(torch.ops.mfp.batch_norm_training_.default, (x, *vectors, 0.1, 1e-5))
    torch.library.opcheck(torch.ops.mfp.batch_norm_gradients.default, (gradient, x, *vectors[:3]))


@pytest.mark.parametrize(("change", "message"), [
    ({"input": torch.zeros(2, 4, 3)}, "expected float32"),
    ({"input": torch.zeros(2, 4, 3, 3, dtype=torch.float64)}, "expected float32"),
    ({"input": torch.zeros(1, 4, 1, 1)}, "more than one value"),
    ({"input": torch.zeros(0, 4, 3, 3)}, "more than one value"),
    ({"weight": torch.ones(3)}, "weight is"),
    ({"running_var": torch.ones(4, dtype=torch.float64)}, "running_var is"),
])  # fmt: skip
def test_wrong_arguments_are_refused(change, message):
    names = ("weight", "bias", "running_mean", "running_var")
    given = {"input": torch.zeros(2, 4, 3, 3), **{name: torch.ones(4) for name in names}, "momentum": 0.1, "eps": 1e-5}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.mfp.batch_norm_training_(**{**given, **change})


@pytest.mark.parametrize(("gradient", "mean", "message"), [
    (torch.zeros(2, 4, 3, 2), torch.ones(4), "gradient is"),
    (torch.zeros(2, 4, 3, 3, dtype=torch.float16), torch.ones(4), "gradient is"),
    (torch.zeros(2, 4, 3, 3), torch.ones(5), "mean is"),
])  # fmt: skip
def test_wrong_arguments_of_the_gradients_are_refused(gradient, mean, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.mfp.batch_norm_gradients(gradient, torch.zeros(2, 4, 3, 3), torch.ones(4), mean, torch.ones(4))


def calls_of_the_op(norm, x):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        norm(x)
    return sum(event.count for event in profile.key_averages() if event.key == "mfp::batch_norm_training_")


def narrow(channels, **options):
    norm = nn.BatchNorm2d(channels, **options)
    norm.__class__ = NarrowBatchNorm2d
    return norm.train()


@pytest.mark.parametrize("channels", [3, 20, 64])
def test_a_module_trains_as_torchs_does(channels):
    x, gradient, vectors = sample(channels)
    ours, theirs = narrow(channels), nn.BatchNorm2d(channels).double().train()
    with torch.no_grad():
        for norm in (ours, theirs):
            norm.weight.copy_(vectors[0]), norm.bias.copy_(vectors[1])
    assert calls_of_the_op(ours, x) == 1
    theirs(x.double())
    optimizers = [torch.optim.SGD(norm.parameters(), lr=0.1) for norm in (ours, theirs)]
    for _ in range(3):
        inputs = [x.clone().requires_grad_(), x.double().requires_grad_()]
        for norm, optimizer, data in zip((ours, theirs), optimizers, inputs, strict=True):
            optimizer.zero_grad()
            norm(data).backward(gradient.to(data.dtype))
            optimizer.step()
        assert close([inputs[0].grad], [inputs[1].grad], 1e-5)
    assert ours.num_batches_tracked == theirs.num_batches_tracked == 4
    state = theirs.state_dict()
    assert all(close([value.double()], [state[name].double()], 1e-5) for name, value in ours.state_dict().items())
    ours.eval(), theirs.eval()
    assert close([ours(x)], [theirs(x.double())], 1e-5)


def with_changes(norm, **changes):
    for name, value in changes.items():
        setattr(norm, name, value)
    return norm


@pytest.mark.parametrize(("norm", "change"), [
    (with_changes(narrow(10), track_running_stats=False), lambda x: x),
    (with_changes(narrow(10), weight=nn.Parameter(torch.ones(20)[::2])), lambda x: x),
    (narrow(10), lambda x: x.contiguous()),
    (narrow(10).double(), lambda x: x.double()),
    (narrow(10, affine=False), lambda x: x),
    (narrow(10, track_running_stats=False), lambda x: x),
    (narrow(10, momentum=None), lambda x: x),
    (narrow(10).eval(), lambda x: x),
    (narrow(80), lambda x: x.repeat(1, 8, 1, 1).contiguous(memory_format=CL)),
])  # fmt: skip
def test_what_torch_does_well_or_alone_is_left_to_it(norm, change):
    x = change(sample(10)[0])
    plain = copy.deepcopy(norm)
    plain.__class__ = nn.BatchNorm2d
    assert calls_of_the_op(norm, x) == 0
    plain(x)
    torch.testing.assert_close(norm(x), plain(x), rtol=1e-5, atol=1e-5)
    for name, value in norm.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name])


def test_gradients_of_gradients_are_torchs():
    x, gradient, vectors = sample(10)
    results = []
    for norm, dtype in ((narrow(10), torch.float32), (nn.BatchNorm2d(10).train().double(), torch.float64)):
        with torch.no_grad():
            norm.weight.copy_(vectors[0])
        given = x.clone().to(dtype).requires_grad_()
        first = torch.autograd.grad((norm(given) * gradient.to(dtype)).sum(), given, create_graph=True)[0]
        first.square().sum().backward()
        results.append([first.detach(), given.grad, norm.weight.grad])
    assert close(*results, 1e-4)


def test_transforms_and_forward_mode_are_torchs():
    x, gradient, _ = sample(10)
    norm, plain = narrow(10), nn.BatchNorm2d(10).train()
    plain.load_state_dict(norm.state_dict())

    def value(x, module):
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        return (torch.func.functional_call(module, buffers, (x,)) * gradient).sum()

    assert torch.equal(*(torch.func.grad(value)(x, module) for module in (norm, plain)))
    with torch.autograd.forward_ad.dual_level():
        tangents = [
            torch.autograd.forward_ad.unpack_dual(module(torch.autograd.forward_ad.make_dual(x, gradient))).tangent
            for module in (norm, plain)
        ]
    assert torch.equal(*tangents)


def test_no_counter_is_no_error():
    norm, (x, *_) = narrow(10), sample(10)
    norm.num_batches_tracked = None
    assert calls_of_the_op(norm, x) == 1


def test_the_reference_backend_is_heard(monkeypatch):
    monkeypatch.setenv("MFP_BACKEND", "reference")
    assert calls_of_the_op(narrow(10), sample(10)[0]) == 0


def test_one_value_a_channel_is_torchs_error():
    with pytest.raises(ValueError, match="more than 1 value"):
        narrow(10)(torch.zeros(1, 10, 1, 1))


def test_a_shrunk_network_uses_it_is_saved_with_it_and_compacts_to_plain_modules(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    ).to(memory_format=CL)  # fmt: skip
    x = torch.randn(4, 3, 12, 12).contiguous(memory_format=CL)
    pruner = mfp.FilterPruner(model, 0.4, mode="hard", criteria=("l2_norm",), example_input=x[:2])
    pruner.step(0)
    small = pruner.shrink_(torch.optim.SGD(model.parameters(), lr=0.1))
    norms = [module for module in small.modules() if isinstance(module, nn.BatchNorm2d)]
    assert [type(norm) for norm in norms] == [NarrowBatchNorm2d] * 2 and norms[0].num_features == 10
    assert calls_of_the_op(small.train(), x) == 2
    mfp.save(small, tmp_path / "small.mfp")
    again = mfp.load(tmp_path / "small.mfp").to(memory_format=CL)
    assert again.training and calls_of_the_op(copy.deepcopy(again), x) == 2
    for network in (small, again):
        network(x).square().sum().backward()
    for ours, its in zip(again.parameters(), small.parameters(), strict=True):
        assert torch.equal(ours.grad, its.grad)
    with pytest.warns(UserWarning, match="removed nothing"):
        compact = mfp.compact(small.eval(), x)
    assert NarrowBatchNorm2d not in {type(module) for module in compact.modules()}
    torch.testing.assert_close(compact(x), small(x), rtol=1e-5, atol=1e-6)
