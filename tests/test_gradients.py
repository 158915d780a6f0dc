"""Criteria that look at data or at BatchNorm: gradients measured without a trace, and what a pruner makes of them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_attributes import data
from test_pruner import CLASSES, equal, network, same_trace, state_of, trace_of, train
from torch import nn

import mfp
from mfp.gradients import weight_gradients


def trained():
    model = network()
    train(model, steps=4)
    return model


def uneven():
    """Batches of different sizes: every sample counts alike."""
    return [(images[: 8 - 3 * index], targets[: 8 - 3 * index]) for index, (images, targets) in enumerate(data(3))]


def mean_loss(model, batches, loss=F.cross_entropy):
    images, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return loss(model(images), targets)


@pytest.mark.parametrize("loss", [None, lambda outputs, targets: (outputs[:, 0] - targets).square().mean()])
def test_taylor_is_the_squared_slope_of_the_loss(loss):
    """What the mean loss over all samples loses when a filter shrinks by a little, in float64, filter by filter."""
    model = trained()
    plan = mfp.FilterPlan.from_model(model)
    scores = mfp.score_filters(plan, ("l2_norm", "taylor"), calibration=uneven(), loss=loss)
    precise = copy.deepcopy(model).double().eval()
    batches = [(images.double(), targets) for images, targets in uneven()]
    for layer in plan.layers:
        weight = precise.get_submodule(layer.name).weight.detach()
        for j in range(layer.num_filters):
            filter_ = weight[j].clone()
            values = []
            for factor in (1 - 1e-5, 1 + 1e-5):
                weight[j] = factor * filter_
                values.append(float(mean_loss(precise, batches, loss or F.cross_entropy).detach()))
            weight[j] = filter_
            slope = (values[1] - values[0]) / 2e-5
            assert float(scores["taylor"][layer.offset + j]) == pytest.approx(slope**2, rel=1e-3, abs=1e-11)
    assert scores["taylor"].max() > 1e-6
    norms = torch.cat([weight.detach().flatten(1).norm(dim=1) for weight in plan.weights()])
    torch.testing.assert_close(scores["l2_norm"], norms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_gradients_are_laid_out_like_weights(dtype, memory_format):
    model = trained().to(dtype).to(memory_format=memory_format)
    plan = mfp.FilterPlan.from_model(model)
    batches = [(images.to(dtype), targets) for images, targets in data()]
    gradients = weight_gradients(plan, batches)
    assert [g.stride() for g in gradients] == [w.stride() for w in plan.weights()]
    assert all(g.dtype == torch.float32 and g.abs().sum() > 0 for g in gradients)
    scores = mfp.score_filters(plan, ("taylor",), calibration=batches)["taylor"]
    ours = torch.cat([(w.double() * g).flatten(1).sum(1) for w, g in zip(plan.weights(), gradients, strict=True)])
    torch.testing.assert_close(scores, ours.square().float(), rtol=1e-5, atol=1e-20)


def test_in_training_mode_batchnorm_would_leave_nothing():
    """Why it is measured in evaluation mode: there the sums of weight times gradient would all be zero."""
    model = trained()
    plan = mfp.FilterPlan.from_model(model)
    shares = []
    for mode in (model.eval, model.train):
        mode()
        model.zero_grad()
        F.cross_entropy(model(data()[0][0]), data()[0][1]).backward()
        products = (model[4].weight.detach() * model[4].weight.grad).flatten(1)
        shares.append(float(products.sum(1).abs().sum() / products.abs().sum()))
        if not model.training:  # the one that is measured
            scores = mfp.score_filters(plan, ("taylor",), calibration=data()[:1])["taylor"][plan["4"].slice]
            torch.testing.assert_close(scores, products.sum(1).square(), rtol=1e-3, atol=1e-12)
    assert shares[0] > 0.05
    assert shares[1] < 1e-3


class Restless(nn.Module):
    """Draws random numbers and counts its calls, in evaluation mode, too."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, CLASSES)
        self.register_buffer("calls", torch.zeros(()))
        self.counts = False  # while the graph is captured, which refuses that

    def forward(self, x):
        if self.counts:
            self.calls += 1
        return self.head(F.dropout(self.conv(x).relu().mean((2, 3)), 0.5, training=True))


@pytest.mark.parametrize("make", [trained, Restless])
@pytest.mark.parametrize("fails", [False, True])
def test_measuring_leaves_no_trace(make, fails):
    model = make()
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    example = torch.zeros(2, 3, 6, 6)
    plan = mfp.FilterPlan.from_model(model, example_input=example)
    first.weight.requires_grad_(False)
    first.eval()
    model.counts = True
    F.cross_entropy(model(data()[0][0]), data()[0][1]).backward()  # some have gradients, some have none
    start, trace = state_of(model), trace_of(model)
    batches = data() + ([(torch.zeros(2, 4, 6, 6), torch.zeros(2))] if fails else [])
    if fails:
        with pytest.raises(RuntimeError):
            weight_gradients(plan, batches)
    else:
        assert all(gradient.abs().sum() > 0 for gradient in weight_gradients(plan, batches))
    assert equal(start, state_of(model)) and same_trace(trace, trace_of(model))
    assert [p.requires_grad for p in model.parameters()] == [p is not first.weight for p in model.parameters()]


def test_the_same_again():
    plan = mfp.FilterPlan.from_model(trained())
    first = mfp.score_filters(plan, ("taylor",), calibration=data())["taylor"]
    assert first.sum() > 0
    assert torch.equal(first, mfp.score_filters(plan, ("taylor",), calibration=data())["taylor"])


@pytest.mark.parametrize("criterion", ["taylor", "bn_scale"])
def test_pruning_by_one_criterion_is_score_and_select(criterion):
    model, batches = trained(), data()
    other = copy.deepcopy(model)
    mask = mfp.prune_filters_(mfp.FilterPlan.from_model(model), criterion, calibration=batches)
    plan = mfp.FilterPlan.from_model(other)
    expected = mfp.select_filters(mfp.score_filters(plan, (criterion,), calibration=batches))
    expected.apply_()
    assert torch.equal(mask.keep, expected.keep) and 0 < mask.num_pruned < len(mask.keep)
    assert equal(state_of(model), state_of(other))


@pytest.mark.parametrize("per_layer", [False, True])
def test_candidates_of_a_pruner(per_layer):
    """Whatever wins, the network is bit for bit what pruning with the winner alone would have left."""
    criteria = ("bn_scale", "l2_norm", "taylor")
    for index, name in enumerate(criteria):
        order = (*criteria[index:], *criteria[:index])
        model, alone = trained(), trained()
        attribute = {"attribute": "weight_energy"} if per_layer else {"attribute": lambda model: 0.0}  # all tie
        pruner = mfp.FilterPruner(
            model, criteria=order, calibration=data(), per_layer=per_layer, recalibrate=False, **attribute
        )
        decision = pruner.step(0)
        mask = mfp.select_filters(
            mfp.score_filters(mfp.FilterPlan.from_model(alone), criteria, calibration=data()), decision.criterion
        )
        mask.apply_()
        assert equal(state_of(model), state_of(alone))
        if per_layer:
            assert set(decision.criterion.values()) == {"l2_norm"}  # it keeps most energy
        else:
            assert decision.criterion == name and set(decision.neighbours) == set(criteria)


def test_softly_pruned_filters_compete_again():
    """A filter of zeros has score 0; training moves it, and then it has a slope like any other."""
    model = trained()
    pruner = mfp.FilterPruner(model, criteria=("taylor",), calibration=data())
    gone = ~pruner.step(0).mask.keep
    assert (pruner.score()["taylor"][gone] == 0).all()
    train(model)
    assert (pruner.score()["taylor"][gone] > 0).any()
    assert pruner.step(1).num_pruned == int(gone.sum())


def test_bn_scale_is_the_scale_of_the_batchnorm_that_follows():
    model = trained()
    with torch.no_grad():
        model[1].weight[3] = -5.0
    scores = mfp.score_filters(mfp.FilterPlan.from_model(model), ("bn_scale",))["bn_scale"]
    assert torch.equal(scores, torch.cat([model[1].weight.detach().abs(), model[5].weight.detach().abs()]))


def test_the_first_batchnorm_counts():
    """Of a depthwise separable block the one right behind the planned conv, not that of its depthwise follower."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2),
    )  # fmt: skip
    nn.init.uniform_(model[1].weight)
    plan = mfp.FilterPlan.from_model(model)
    assert [layer.name for layer in plan.layers] == ["0"]
    assert torch.equal(mfp.score_filters(plan, ("bn_scale",))["bn_scale"], model[1].weight.detach())


def without_batchnorm():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Flatten(),
                         nn.LazyLinear(2))  # fmt: skip


def test_a_layer_without_batchnorm_is_named():
    model = without_batchnorm()
    model(torch.zeros(2, 3, 8, 8))
    example = torch.zeros(2, 3, 8, 8)
    with pytest.raises(mfp.MfpError, match="no BatchNorm with a scale follows layer '3'; leave the layer out"):
        mfp.FilterPruner(model, criteria=("l2_norm", "bn_scale"), example_input=example)
    decision = mfp.FilterPruner(model, criteria=("bn_scale",), skip=("3",), example_input=example).step(0)
    assert decision.num_pruned == int(8 * 0.4)


def test_gradients_that_are_not_finite():
    model, batches = trained(), data()
    batches[0][0][0, 0, 0, 0] = torch.inf
    start = state_of(model)
    for prune in (
        lambda: mfp.prune_filters_(mfp.FilterPlan.from_model(model), "taylor", calibration=batches),
        lambda: mfp.FilterPruner(model, criteria=("l2_norm", "taylor"), calibration=batches).step(0),
    ):
        with pytest.raises(mfp.MfpError, match=r"layer '0': filter 0 has gradients that are not finite .* nothing was"):
            prune()
        assert equal(start, state_of(model))


def test_no_data():
    plan = mfp.FilterPlan.from_model(network())
    for batches in (None, []):
        with pytest.raises(mfp.MfpError, match="'taylor' is measured on data: give calibration="):
            mfp.score_filters(plan, ("taylor",), calibration=batches)
    empty = [(torch.zeros(0, 3, 6, 6), torch.zeros(0, dtype=torch.int64))]
    with pytest.raises(mfp.MfpError, match="calibration batches hold no samples"):
        mfp.score_filters(plan, ("taylor",), calibration=empty)
    with pytest.raises(mfp.MfpError, match="'taylor' is not a magnitude criterion"):
        mfp.select_mix(plan, 0.1, 0.1, norm="taylor")
