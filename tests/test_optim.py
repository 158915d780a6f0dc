"""MaskedSGD and MaskedAdamW against torch's optimisers followed by masking."""

import copy

import pytest
import torch
from torch import nn

import mfp
from mfp.errors import MfpError
from mfp.optim import MaskedAdamW, MaskedSGD

pytestmark = pytest.mark.usefixtures("three_threads")

STEPS = 50
SGD_SETTINGS = [
    {"lr": 0.1},
    {"lr": 0.1, "weight_decay": 1e-2},
    {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2},
    {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2},
    {"lr": 0.1, "momentum": 0.8, "dampening": 0.3},
    {"lr": 0.1, "momentum": 0.9, "maximize": True, "weight_decay": 1e-2},
]
ADAMW_SETTINGS = [
    {"lr": 1e-2},
    {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1},
    {"lr": 1e-2, "betas": (0.3, 0.9), "weight_decay": 0.0, "maximize": True},
]


def network() -> nn.Module:
    """Rows of 27, 63, 1 and 5 weights: none of them a whole number of vectors."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), nn.ReLU(), nn.Conv2d(7, 37, 3, bias=False), nn.BatchNorm2d(37),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(37, 5),
    )  # fmt: skip


def mask_of(model: nn.Module, rate: float = 0.4) -> mfp.FilterMask:
    plan = mfp.FilterPlan.from_model(model, rate)
    return mfp.select_filters(mfp.score_filters(plan, ("l2_norm",)))


def give_gradients(models, seed: int) -> None:
    """The same random gradients for several copies of a model."""
    generator = torch.Generator().manual_seed(seed)
    for parameters in zip(*(model.parameters() for model in models), strict=True):
        gradient = torch.randn(parameters[0].shape, generator=generator)
        for parameter in parameters:
            parameter.grad = gradient.to(parameter.dtype).clone(memory_format=torch.preserve_format)


def torch_step_then_mask(optimizer, mask) -> None:
    mask.apply_to_gradients_()
    optimizer.step()
    mask.apply_()
    mask.apply_to_optimizer_(optimizer)


def assert_same(model, other, atol=0.0, rtol=0.0) -> None:
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=rtol, msg=lambda text, name=name: f"{name}: {text}")


def assert_pruned_are_zero(mask, *optimizers) -> None:
    assert mask.num_pruned > 0
    for parameter, offset, rows in mask.parameters():
        pruned = ~mask.keep[offset : offset + rows]
        states = [v for o in optimizers for v in o.state[parameter].values() if v.shape == parameter.shape]
        for tensor in (parameter, *states):
            assert not tensor[pruned].any()


def vectors_join_products() -> bool:
    """Whether the kernels that run here have FMA, as torch's have; without it the last bit differs."""
    compiled = mfp.backend.choose(torch.device("cpu")).name == "cpu"
    return compiled and mfp.backend.build_info()["cpu_isa"] != "portable"


@pytest.mark.parametrize("settings", SGD_SETTINGS, ids=str)
@pytest.mark.parametrize("masked", [True, False])
def test_sgd_is_torch_sgd_then_mask(settings, masked):
    model = network()
    twin = copy.deepcopy(model)
    optimizer, expected = MaskedSGD(model.parameters(), **settings), torch.optim.SGD(twin.parameters(), **settings)
    if masked:
        optimizer.mask, twin_mask = mask_of(model), mask_of(twin)
        twin_mask.apply_()
    for step in range(STEPS):
        give_gradients((model, twin), seed=step)
        optimizer.step()
        torch_step_then_mask(expected, twin_mask) if masked else expected.step()
    tolerance = 0.0 if vectors_join_products() else 1e-6
    assert_same(model, twin, atol=tolerance, rtol=tolerance)
    if masked:
        assert_pruned_are_zero(optimizer.mask, optimizer)


@pytest.mark.parametrize("settings", ADAMW_SETTINGS, ids=str)
@pytest.mark.parametrize("masked", [True, False])
def test_adamw_is_torch_adamw_then_mask(settings, masked):
    model = network()
    twin = copy.deepcopy(model)
    optimizer, expected = MaskedAdamW(model.parameters(), **settings), torch.optim.AdamW(twin.parameters(), **settings)
    if masked:
        optimizer.mask, twin_mask = mask_of(model), mask_of(twin)
        twin_mask.apply_()
    for step in range(STEPS):
        give_gradients((model, twin), seed=step)
        optimizer.step()
        torch_step_then_mask(expected, twin_mask) if masked else expected.step()
    assert_same(model, twin, atol=1e-6, rtol=1e-6)
    if masked:
        assert_pruned_are_zero(optimizer.mask, optimizer)


@pytest.mark.parametrize(
    ("ours", "theirs", "settings"),
    [(MaskedSGD, torch.optim.SGD, SGD_SETTINGS[2]), (MaskedAdamW, torch.optim.AdamW, ADAMW_SETTINGS[0])],
)
@pytest.mark.parametrize("direction", ["to torch", "from torch"])
def test_state_dict_is_interchangeable(ours, theirs, settings, direction):
    model = network()
    twin = copy.deepcopy(model)
    source, target = (ours, theirs) if direction == "to torch" else (theirs, ours)
    optimizer = source(model.parameters(), **settings)
    for step in range(3):
        give_gradients((model,), seed=step)
        optimizer.step()
    twin.load_state_dict(model.state_dict())
    other = target(twin.parameters(), lr=9.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(3, 6):
        give_gradients((model, twin), seed=step)
        optimizer.step()
        other.step()
    assert_same(model, twin, atol=1e-6, rtol=1e-6)
    assert other.state_dict()["param_groups"][0].keys() == optimizer.state_dict()["param_groups"][0].keys()


def test_a_new_mask_zeroes_and_no_mask_frees():
    model = network()
    optimizer = MaskedSGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(2):
        give_gradients((model,), seed=step)
        optimizer.step()
    mask = mask_of(model)
    weight = model[3].weight
    pruned = ~mask.layer("3")
    assert weight[pruned].all()
    optimizer.mask = mask
    optimizer.step()
    assert_pruned_are_zero(mask, optimizer)
    assert weight[~pruned].all()
    optimizer.mask = None
    optimizer.step()
    assert weight[pruned].all()


def test_pruned_rows_stay_zero_when_others_write_them():
    model = network()
    dense = copy.deepcopy(model.state_dict())
    optimizer = MaskedSGD(model.parameters(), lr=0.1, momentum=0.9, mask=mask_of(model))
    give_gradients((model,), seed=0)
    optimizer.step()
    model.load_state_dict(dense)
    assert model[3].weight[~optimizer.mask.layer("3")].any()
    optimizer.step()
    assert_pruned_are_zero(optimizer.mask, optimizer)
    optimizer.mask.keep[:3] = False  # in place
    optimizer.step()
    assert not model[0].weight[:3].any()


def test_gradients_of_pruned_rows_are_not_read():
    model = network()
    optimizer = MaskedSGD(model.parameters(), lr=0.1, momentum=0.9, mask=mask_of(model))
    give_gradients((model,), seed=0)
    model[3].weight.grad[~optimizer.mask.layer("3")] = float("nan")
    optimizer.step()
    assert model[3].weight.isfinite().all()


def test_without_batchnorm_only_weights_are_masked():
    model = network()
    mask = mask_of(model)
    optimizer = MaskedSGD(model.parameters(), lr=0.1, mask=mask, mask_bn=False)
    give_gradients((model,), seed=0)
    optimizer.step()
    pruned = ~mask.layer("3")
    assert not model[3].weight[pruned].any()
    assert model[4].weight[pruned].all()


def test_parameters_without_gradient_are_left_alone():
    model = network()
    optimizer = MaskedSGD(model.parameters(), lr=0.1, momentum=0.9, mask=mask_of(model))
    give_gradients((model,), seed=0)
    model[3].weight.grad = None
    before = model[3].weight.detach().clone()
    optimizer.step()
    kept = optimizer.mask.layer("3")
    assert torch.equal(model[3].weight[kept], before[kept])
    assert "momentum_buffer" not in optimizer.state[model[3].weight]
    give_gradients((model,), seed=1)  # now some parameters take their first step and others their second
    twin = copy.deepcopy(model)
    expected = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    expected.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    give_gradients((twin,), seed=1)
    optimizer.step()
    torch_step_then_mask(expected, mfp.FilterMask(mfp.FilterPlan.from_model(twin), optimizer.mask.keep))
    assert_same(model, twin, atol=1e-6)


def test_adamw_counts_steps_per_parameter():
    model = network()
    twin = copy.deepcopy(model)
    optimizer, expected = MaskedAdamW(model.parameters()), torch.optim.AdamW(twin.parameters())
    for step in range(4):
        give_gradients((model, twin), seed=step)
        if step % 2:
            model[0].weight.grad = twin[0].weight.grad = None
        optimizer.step()
        expected.step()
    assert_same(model, twin, atol=1e-6, rtol=1e-6)
    assert optimizer.state[model[0].weight]["step"] == 2
    assert optimizer.state[model[3].weight]["step"] == 4


def test_parameter_groups_and_schedulers():
    model = network()
    twin = copy.deepcopy(model)

    def make(cls, net):
        groups = [{"params": net[:3].parameters(), "lr": 0.5}, {"params": net[3].parameters(), "weight_decay": 0.1}]
        optimizer = cls(groups, lr=0.1, momentum=0.9)
        optimizer.add_param_group({"params": [*net[4].parameters(), *net[7].parameters()], "nesterov": True})
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)

    optimizer, schedule = make(MaskedSGD, model)
    expected, expected_schedule = make(torch.optim.SGD, twin)
    optimizer.mask, twin_mask = mask_of(model), mask_of(twin)
    twin_mask.apply_()
    for step in range(5):
        give_gradients((model, twin), seed=step)
        optimizer.step()
        torch_step_then_mask(expected, twin_mask)
        schedule.step()
        expected_schedule.step()
    assert_same(model, twin, atol=1e-6, rtol=1e-6)


def test_a_group_added_later_is_masked():
    model = network()
    optimizer = MaskedSGD(model[0].parameters(), lr=0.1, mask=mask_of(model))
    optimizer.add_param_group({"params": [*model[1:].parameters()]})
    give_gradients((model,), seed=0)
    optimizer.step()
    assert_pruned_are_zero(optimizer.mask)


def test_copies_keep_the_mask():
    model = network()
    optimizer = MaskedSGD(model.parameters(), lr=0.1, momentum=0.9, mask=mask_of(model))
    give_gradients((model,), seed=0)
    optimizer.step()
    twin_optimizer = copy.deepcopy(optimizer)
    twin = twin_optimizer.mask.plan.model
    assert twin is not model
    give_gradients((model, twin), seed=1)
    optimizer.step()
    twin_optimizer.step()
    assert_same(model, twin)
    assert_pruned_are_zero(twin_optimizer.mask, twin_optimizer)


def test_closure_is_called_with_gradients_enabled():
    model = nn.Linear(3, 1)
    optimizer = MaskedSGD(model.parameters(), lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 3)).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(20)]
    assert losses[-1] < losses[0] / 2


def test_gradient_scaler():
    model = network()
    twin = copy.deepcopy(model)
    optimizer, expected = MaskedSGD(model.parameters(), lr=0.1), torch.optim.SGD(twin.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(model(torch.ones(2, 3, 8, 8)).sum()).backward()
    twin(torch.ones(2, 3, 8, 8)).sum().backward()
    scaler.step(optimizer)
    expected.step()
    assert_same(model, twin, atol=1e-6, rtol=1e-5)


def test_autograd_notices_the_step():
    weight = nn.Parameter(torch.ones(3))
    optimizer = MaskedSGD([weight], lr=0.1)
    loss = (weight * weight).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_sparse_gradients_are_an_error():
    embedding = nn.Embedding(10, 3, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(MfpError, match=r"\(10, 3\) has a sparse gradient"):
        MaskedSGD(embedding.parameters(), lr=0.1).step()


def test_a_mask_of_another_model_is_an_error():
    model, other = network(), network()
    with pytest.raises(MfpError, match="no parameter is optimised here"):
        MaskedSGD(model.parameters(), lr=0.1, mask=mask_of(other))


def test_amsgrad_state_is_an_error():
    model = network()
    theirs = torch.optim.AdamW(model.parameters(), amsgrad=True)
    optimizer = MaskedAdamW(model.parameters())
    optimizer.load_state_dict(theirs.state_dict())
    give_gradients((model,), seed=0)
    with pytest.raises(MfpError, match="amsgrad"):
        optimizer.step()


def test_float64_parameters_are_an_error():
    if mfp.backend.choose(torch.device("cpu")).name != "cpu":
        pytest.skip("the reference takes any dtype")
    weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
    weight.grad = torch.ones_like(weight)
    with pytest.raises((RuntimeError, MfpError), match="float32, bfloat16 or float16"):
        MaskedSGD([weight], lr=0.1).step()
