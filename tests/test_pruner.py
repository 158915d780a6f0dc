"""FilterPruner: the switch, that trying leaves no trace, the modes, and its state."""

import copy
import json
import math
import pickle

import pytest
import torch
from test_attributes import data
from torch import nn

import mfp
from mfp.choice import closest

CLASSES = 7


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 20, 3), nn.BatchNorm2d(20), nn.ReLU(), nn.Dropout(0.3),
        nn.Conv2d(20, 15, 3, bias=False), nn.BatchNorm2d(15), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(60, CLASSES),
    )  # fmt: skip


def train(model, mask_gradients=lambda: None, steps=2, seed=3, optimizer=None):
    model.train()
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        inputs = torch.randn(8, 3, 6, 6, generator=generator)
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        mask_gradients()
        optimizer.step()


def greedy(model):
    """An attribute that disturbs what it can: random numbers, BatchNorm statistics, gradients."""
    model.train()
    with torch.enable_grad():
        model(torch.randn(4, 3, 6, 6)).sum().backward()
    return float(model[4].weight.detach().abs().sum())


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("recalibrate", [None, False])
@pytest.mark.parametrize("attribute", ["loss", "top1_error", "top5_error"])
def test_the_chosen_neighbour_is_the_closest(attribute, recalibrate):
    """Checked by pruning copies with each criterion alone and measuring them."""
    model, batches = network(), data()
    train(model)
    start = state_of(model)
    pruner = mfp.FilterPruner(model, 0.4, attribute=attribute, calibration=batches, recalibrate=recalibrate)
    assert pruner.recalibrate is (recalibrate is None)
    decision = pruner.step(0)

    def measured(rate, criterion):
        alone = network()
        alone.load_state_dict(start)
        mfp.FilterPruner(
            alone, rate, criteria=(criterion,), attribute=attribute, calibration=batches, recalibrate=recalibrate
        ).step(0)
        return mfp.attributes.measure(alone.eval(), batches)[attribute]

    values = {criterion: measured(0.4, criterion) for criterion in mfp.PAPER_CRITERIA}
    before = measured(0.0, "l2_norm")
    assert decision.attribute_before == pytest.approx(before, rel=1e-6)
    assert decision.neighbours == pytest.approx(values, rel=1e-6) and len(values) == 5
    assert decision.criterion == min(values, key=lambda c: abs(values[c] - before))
    assert decision.attribute_after == decision.neighbours[decision.criterion]


@pytest.mark.parametrize("attribute", ["loss", "weight_energy", greedy])
def test_hindsight_is_each_criterion_alone_and_leaves_no_trace(attribute):
    batches = data()
    model, other = network(), network()
    train(model)
    other.load_state_dict(model.state_dict())
    start = state_of(model)
    asked = {"attribute": attribute, "calibration": batches}

    def error(model):
        assert not model.training
        return mfp.attributes.measure(model, batches)["top1_error"] + mfp.attributes.measure(model, batches)["loss"]

    torch.manual_seed(11)
    decision = mfp.FilterPruner(model, 0.4, **asked).step(0, hindsight=error)
    after = trace_of(model)
    torch.manual_seed(11)
    plain = mfp.FilterPruner(other, 0.4, **asked).step(0)
    assert equal(state_of(model), state_of(other)) and torch.equal(after[2], torch.get_rng_state())
    assert decision.criterion == plain.criterion == decision.neighbour and plain.hindsight == {}
    values = {}
    for criterion in mfp.PAPER_CRITERIA:
        alone = network()
        alone.load_state_dict(start)
        recalibrate = attribute != "weight_energy"
        mfp.FilterPruner(alone, 0.4, criteria=(criterion,), calibration=batches, recalibrate=recalibrate).step(0)
        values[criterion] = error(alone.eval())
    assert decision.hindsight == pytest.approx(values, rel=1e-6) and len(set(values.values())) > 2


def test_statistics_are_re_estimated_where_the_attribute_looks_at_data():
    batches = data()
    for attribute, calibration, expected in (
        ("loss", batches, True), (greedy, batches, True), (greedy, None, False), ("weight_energy", batches, False),
    ):  # fmt: skip
        assert mfp.FilterPruner(network(), attribute=attribute, calibration=calibration).recalibrate is expected


def trace_of(model):
    """All that trying could disturb: gradients, training flags, random state."""
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return gradients, [m.training for m in model.modules()], torch.get_rng_state()


def same_trace(a, b):
    gradients = all(
        (x is None) == (y is None) and (x is None or torch.equal(x, y)) for x, y in zip(a[0], b[0], strict=True)
    )
    return gradients and a[1] == b[1] and torch.equal(a[2], b[2])


@pytest.mark.parametrize("mask_bn", [True, False])
@pytest.mark.parametrize("recalibrate", [True, False])
@pytest.mark.parametrize("attribute", ["loss", "weight_energy", greedy])
def test_trying_leaves_no_trace(attribute, recalibrate, mask_bn):
    """After a step that chose c, everything is bit for bit what pruning with c alone would have left."""
    batches = data()
    settings = {"calibration": batches, "recalibrate": recalibrate, "mask_bn": mask_bn}
    tried = network()
    train(tried)
    tried[1].eval()
    start, gradients = state_of(tried), [p.grad.clone() for p in tried.parameters()]
    torch.manual_seed(11)
    decision = mfp.FilterPruner(tried, 0.4, attribute=attribute, **settings).step(0)
    after_trying = trace_of(tried)

    alone = network()
    alone.load_state_dict(start)
    alone.train()
    alone[1].eval()
    for parameter, gradient in zip(alone.parameters(), gradients, strict=True):
        parameter.grad = gradient
    torch.manual_seed(11)
    mfp.FilterPruner(alone, 0.4, criteria=(decision.criterion,), **settings).step(0)
    assert equal(state_of(tried), state_of(alone))
    assert same_trace(after_trying, trace_of(alone))
    assert not equal(state_of(tried), start)


def test_an_attribute_that_fails_leaves_the_network_as_it_was():
    model = network()
    train(model)
    start, before = state_of(model), trace_of(model)

    def broken(model):
        greedy(model)
        raise RuntimeError("no such luck")

    pruner = mfp.FilterPruner(model, attribute=broken)
    with pytest.raises(RuntimeError, match="no such luck"):
        pruner.step(0)
    assert equal(state_of(model), start) and same_trace(before, trace_of(model))
    assert pruner.mask is None and pruner.decisions == []


def test_trying_copies_the_weights_once(monkeypatch):
    model = network()
    copies = []
    clone = torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda t, *a, **k: copies.append(t.numel()) or clone(t, *a, **k))
    mfp.FilterPruner(model, attribute="loss", calibration=data(), recalibrate=False).step(0)
    assert 0 < sum(copies) <= sum(value.numel() for value in model.state_dict().values())


def test_one_candidate_is_not_tried():
    calls = []
    pruner = mfp.FilterPruner(network(), criteria=("l2_distance",), attribute=lambda model: calls.append(1) or 0.0)
    decision = pruner.step(0)
    assert decision.criterion == "l2_distance" and decision.attribute_after is None and not calls
    assert decision.num_pruned == 8 + 6


def test_ties_go_to_the_first_candidate_and_nan_never_wins():
    assert closest(1.0, {"a": 1.5, "b": 0.5, "c": 1.5}) == "a"
    assert closest(1.0, {"a": math.nan, "b": 7.0}) == "b"
    assert closest(math.nan, {"a": 1.0, "b": 2.0}) == "a"
    decision = mfp.FilterPruner(network(), criteria=("l1_distance", "l2_norm"), attribute=lambda model: 3.0).step(0)
    assert decision.criterion == "l1_distance" and decision.neighbours == {"l1_distance": 3.0, "l2_norm": 3.0}


@pytest.mark.parametrize(("attribute", "winner"), [("weight_energy", "l2_norm"), ("sparsity", "l1_norm")])
def test_attributes_without_data(attribute, winner):
    """Each is kept best by its own norm; that they are the best of the pool is checked, not assumed."""
    model = network()
    plan = mfp.FilterPlan.from_model(model, 0.4)
    scores = mfp.score_filters(plan)
    expected = {c: mfp.attributes.WITHOUT_DATA[attribute](scores, mfp.select_filters(scores, c).keep) for c in scores}
    decision = mfp.FilterPruner(model, attribute=attribute, criteria=tuple(reversed(mfp.PAPER_CRITERIA))).step(0)
    assert decision.neighbours == pytest.approx(expected)
    assert decision.attribute_before == 1.0
    assert decision.neighbours[winner] == max(expected.values()) == decision.attribute_after


def test_choice_per_layer():
    model = network()
    pruner = mfp.FilterPruner(model, attribute="sparsity", per_layer=True, criteria=("l2_distance", "l1_norm"))
    decision = pruner.step(0)
    assert decision.criterion == {"0": "l1_norm", "4": "l1_norm"}
    assert 0.6 < decision.attribute_after < 1.0
    assert decision.mask.kept == {"0": 12, "4": 9}


def test_layers_that_lose_filters_together_are_ranked_by_one_criterion():
    front, behind = nn.Conv2d(3, 12, 3, bias=False), nn.Conv2d(12, 12, 3, groups=4, bias=False)
    front.weight.data[9:] = 10 * front.weight.data[:9].sum(0)  # large, and in the middle of all directions
    behind.weight.data.sign_()  # alone it would take the first criterion, since its filters weigh the same
    model = nn.Sequential(front, behind, nn.Conv2d(12, 2, 1))
    pruner = mfp.FilterPruner(model, attribute="sparsity", per_layer=True, criteria=("cosine_distance", "l1_norm"))
    assert pruner.step(0).criterion == {"0": "l1_norm", "1": "l1_norm"}


@pytest.mark.parametrize("mask_bn", [True, False])
def test_soft_pruned_filters_learn_on_and_are_chosen_anew(mask_bn):
    """Also behind a zeroed BatchNorm and a ReLU, where no gradient would come through: its entries are restored."""
    model = network()
    nn.init.constant_(model[1].bias, 0.1)
    pruner = mfp.FilterPruner(model, criteria=("l2_norm",), mask_bn=mask_bn)
    first = pruner.step(0)
    pruned = ~first.mask.layer("0")
    assert (model[1].bias[pruned] == (0.0 if mask_bn else 0.1)).all()
    train(model, pruner.mask_gradients_)
    assert model[0].weight[pruned].flatten(1).any(1).all()
    second = pruner.step(1)
    assert first.churn == 1.0 and 0.0 <= second.churn < 1.0
    assert pruner.mask is second.mask and pruner.decisions == [first, second]


def test_values_set_aside_are_restored_with_training_only():
    model = network()
    nn.init.uniform_(model[1].bias, 0.5, 1.0)
    before = state_of(model)
    pruner = mfp.FilterPruner(model, criteria=("l2_norm",))
    pruned = ~pruner.step(0).mask.layer("0")
    inputs = torch.randn(4, 3, 6, 6)
    model.eval()(inputs)
    assert not model[1].bias[pruned].any() and not model[1].weight[pruned].any() and not model[0].bias[pruned].any()
    model.train()(inputs)
    for name in ("1.bias", "1.weight", "0.bias"):
        assert torch.equal(model.get_parameter(name), before[name])
    assert not model[0].weight[pruned].any()


def test_a_second_step_without_training_between_forgets_nothing():
    model = network()
    before = state_of(model)
    pruner = mfp.FilterPruner(model, criteria=("l2_norm",))
    pruner.step(0)
    pruner.step(1)
    assert not torch.equal(model[1].weight, before["1.weight"])
    model.train()(torch.randn(4, 3, 6, 6))
    assert torch.equal(model[1].weight, before["1.weight"])


def test_copies_and_pickles_of_the_model_do_not_carry_the_pruner():
    model = network()
    pruner = mfp.FilterPruner(model, criteria=("l2_norm",))
    pruner.step(0)
    set_aside = model[1].weight.clone()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied.train()(torch.randn(4, 3, 6, 6))
        assert torch.equal(copied[1].weight, set_aside) and torch.equal(model[1].weight, set_aside)
    del pruner
    model.train()(torch.randn(4, 3, 6, 6))
    assert torch.equal(model[1].weight, set_aside)


def test_values_set_aside_survive_a_restart():
    def run(restart):
        model = network()
        pruner = mfp.FilterPruner(model, criteria=("l2_norm",))
        pruner.step(0)
        if restart:
            weights, state = state_of(model), pruner.state_dict()
            model = network(seed=5)
            model.load_state_dict(weights)
            pruner = mfp.FilterPruner(model, criteria=("l2_norm",))
            pruner.load_state_dict(state)
        torch.manual_seed(3)
        train(model)
        return state_of(model)

    assert equal(run(restart=False), run(restart=True))


def test_hard_pruned_filters_stay_zero_and_chosen():
    model = network()
    pruner = mfp.FilterPruner(model, mode="hard", criteria=("l2_distance",))
    first = pruner.step(-1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    kept = model[0].weight[first.mask.layer("0")].clone()
    for epoch in range(3):
        train(model, pruner.mask_gradients_, optimizer=optimizer)
        assert not model[0].weight[~first.mask.layer("0")].any()
        assert not model[1].bias[~first.mask.layer("0")].any()
        assert pruner.step(epoch) is None
    assert not torch.equal(model[0].weight[first.mask.layer("0")], kept)
    assert pruner.mask is first.mask


@pytest.mark.parametrize("mode", ["asymptotic", "cubic"])
def test_growing_rates_end_at_the_goal(mode):
    model = network()
    pruner = mfp.FilterPruner(model, 0.5, mode=mode, epochs=4, criteria=("l1_norm",))
    counts = [pruner.step(epoch).num_pruned for epoch in range(4)]
    assert counts == sorted(counts) and counts[0] < counts[-1] == 10 + 7
    assert pruner.decisions[-1].rate_factor == pytest.approx(1.0)


def test_interval_and_the_last_epoch():
    pruner = mfp.FilterPruner(network(), interval=3, epochs=5, criteria=("l1_norm",))
    assert [pruner.step(epoch) is not None for epoch in range(5)] == [False, False, True, False, True]


def test_weights_that_are_not_finite_stop_the_step_and_lose_nothing():
    for criteria in (("l2_norm",), mfp.PAPER_CRITERIA):
        model = network()
        with torch.no_grad():
            model[4].weight[2] = math.inf
        start = state_of(model)
        with pytest.raises(mfp.MfpError, match="layer '4': filter 2 has weights that are not finite"):
            mfp.FilterPruner(model, criteria=criteria).step(0)
        assert equal(start, state_of(model))


def test_state_round_trips_through_json():
    model = network()
    pruner = mfp.FilterPruner(model, attribute="loss", calibration=data())
    pruner.step(0)
    train(model)
    pruner.step(1)
    state = pruner.state_dict()
    tensors = {name: state.pop(name) for name in ("keep", "affine_backup")}
    again = json.loads(json.dumps(state)) | tensors
    resumed = mfp.FilterPruner(model, attribute="loss", calibration=data())
    resumed.load_state_dict(again)
    assert resumed.decisions == pruner.decisions and torch.equal(resumed.mask.keep, pruner.mask.keep)
    assert resumed.decisions[-1].digest == resumed.mask.digest
    fresh = mfp.FilterPruner(model)
    fresh.load_state_dict(mfp.FilterPruner(model).state_dict())
    assert fresh.mask is None and fresh.decisions == []


def test_state_of_another_network_or_version_is_refused():
    pruner = mfp.FilterPruner(network())
    pruner.step(0)
    other = mfp.FilterPruner(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)))
    with pytest.raises(
        mfp.MfpError, match=r"state is of another network: its layers are \['0', '4'\], this plan's \['0'\]"
    ):
        other.load_state_dict(pruner.state_dict())
    with pytest.raises(mfp.MfpError, match="version 99, this mfp reads 1"):
        pruner.load_state_dict(pruner.state_dict() | {"version": 99})
    assert other.mask is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rate": 1.2}, r"rate must be in \[0, 1\)"),
        ({"criteria": ("l2_norm", "hessian")}, "unknown criterion 'hessian': known are l1_norm"),
        ({"criteria": ("l2_norm", "taylor")}, "criterion 'taylor' is measured on data: give calibration="),
        ({"attribute": "accuracy"}, "unknown attribute 'accuracy': known are weight_energy"),
        ({"attribute": "loss"}, "give calibration="),
        ({"mode": "medium"}, "unknown mode 'medium'"),
        ({"mode": "cubic"}, "give epochs="),
        (
            {"per_layer": True, "attribute": "loss", "calibration": [1]},
            "per_layer=True needs an attribute without data",
        ),
        ({"recalibrate": True}, "recalibrate=True needs calibration batches"),
        ({"allocate": "time", "calibration": [1]}, "allocate must be 'flops' or 'parameters', not 'time'"),
        ({"allocate": "flops"}, r"give calibration=\[\(inputs, targets\), ...\]"),
        ({"allocate": "flops", "calibration": [1], "per_layer": True}, "leave out per_layer"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(mfp.MfpError, match=message):
        mfp.FilterPruner(network(), **arguments)
