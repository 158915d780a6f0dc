"""Rates that suit the layers: sensitivities that are true losses, targets that are met, the layers that give way."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

import mfp
from mfp import allocation
from mfp.allocation import _path, _shares, _two_images
from mfp.compact import count_parameters
from mfp.sensitivity import Sensitivities, measure_sensitivities, plan_of, units_of
from mfp.variants import Variants

EXAMPLE = torch.zeros(1, 3, 16, 16)
RATES = (0.3, 0.75)


class Small(nn.Module):
    """A residual block between two convs."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.outer, self.last = nn.Conv2d(32, 16, 3, padding=1), nn.Conv2d(16, 32, 3)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for channels in (16, 32, 16, 32))
        self.fc = nn.Linear(32, 10)

    def forward(self, x):
        x = torch.relu(self.norms[0](self.stem(x)))
        x = torch.relu(x + self.norms[2](self.outer(torch.relu(self.norms[1](self.inner(x))))))
        return self.fc(torch.relu(self.norms[3](self.last(x))).mean((2, 3)))


def network():
    torch.manual_seed(0)
    return Small()


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(24, 3, 16, 16, generator=generator)
    return [(images[:16], network()(images[:16]).argmax(1)), (images[16:], network()(images[16:]).argmax(1))]


@pytest.fixture(scope="module")
def measured(batches):
    return measure_sensitivities(network(), EXAMPLE, batches, rates=RATES)


def test_a_sensitivity_is_the_loss_of_the_network_with_that_layer_pruned(batches, measured):
    assert list(measured.losses) == [layer.name for layer in mfp.FilterPlan.from_model(network()).layers]
    for name, rate in (("stem", 0.3), ("inner", 0.75), ("last", 0.3)):
        model = network()
        arguments = {"criteria": ("l2_distance",), "attribute": "loss", "calibration": batches}
        mfp.FilterPruner(model, 0.0, layer_rates={name: rate}, **arguments).step(0)
        loss = mfp.attributes.measure(model.eval(), batches)["loss"]
        assert measured.losses[name][rate] == pytest.approx(loss, rel=1e-5) != measured.loss


def test_around_a_pruned_network_it_is_the_loss_of_pruning_a_layer_further(batches):
    around = {"stem": 0.3, "outer": 0.5}
    found = measure_sensitivities(network(), EXAMPLE, batches, rates=RATES, around=around)
    assert found.around == around and list(found.losses["outer"]) == [0.75] and list(found.losses["inner"]) == [*RATES]
    for name, rate in ((None, 0.0), ("inner", 0.3), ("outer", 0.75)):
        model = network()
        arguments = {"criteria": ("l2_distance",), "attribute": "loss", "calibration": batches}
        rates = around | ({name: rate} if name else {})
        mfp.FilterPruner(model, 0.0, layer_rates=rates, **arguments).step(0)
        loss = mfp.attributes.measure(model.eval(), batches)["loss"]
        assert (found.losses[name][rate] if name else found.loss) == pytest.approx(loss, rel=1e-5)
    assert found.added("outer", 0.5) == 0.0
    assert found.added("outer", 0.625) == pytest.approx(max(found.losses["outer"][0.75] - found.loss, 0.0) / 2)


def test_the_loss_is_measured_anew_on_the_way_to_the_target(batches, measured, monkeypatch):
    seen, measure = [], allocation.measure_sensitivities

    def watched(*arguments, around, **named):
        seen.append(around)
        return measure(*arguments, around=around, rates=RATES, **named)

    monkeypatch.setattr(allocation, "measure_sensitivities", watched)
    found = mfp.find_rates(network(), EXAMPLE, calibration=batches, sensitivities=measured, flops=0.4, rounds=3)
    assert len(seen) == 2 and found.sensitivities is measured and 0.35 * found.dense < found.reached <= found.asked
    for earlier, later in itertools.pairwise([dict.fromkeys(found.layer_rates, 0.0), *seen, found.layer_rates]):
        assert all(earlier[name] <= later[name] for name in later) and earlier != later
    whole = mfp.find_rates(network(), EXAMPLE, calibration=batches, sensitivities=measured, flops=1e12, rounds=2)
    assert not any(whole.layer_rates.values())


def test_the_added_loss_is_interpolated_and_never_falls():
    found = Sensitivities(1.0, {"a": {0.2: 1.5, 0.4: 1.2, 0.6: 2.0}, "b": {0.5: 0.5}, "c": {0.5: math.nan}})
    assert [found.added("a", rate) for rate in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)] == pytest.approx(
        [0.0, 0.25, 0.5, 0.5, 0.5, 0.75, 1.0]
    )
    assert found.added("b", 0.5) == 0.0 and found.added("c", 0.5) > 1e6


@pytest.mark.parametrize("what", ["flops", "parameters"])
def test_the_target_is_met_and_not_by_much(batches, measured, what):
    model = network()
    before = copy.deepcopy(model.state_dict())
    found = mfp.find_rates(model, EXAMPLE, calibration=batches, sensitivities=measured, rounds=1, **{what: 0.5})
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items()) and model.training
    assert found.asked == found.dense / 2 and 0.45 * found.dense < found.reached <= found.asked
    assert found.layer_rates.keys() == measured.losses.keys() and len(set(found.layer_rates.values())) > 2
    mfp.FilterPruner(model, layer_rates=found.layer_rates, criteria=("l2_distance",)).step(0)
    small = mfp.compact(model.eval(), EXAMPLE)
    count = mfp.flops(small, EXAMPLE) if what == "flops" else count_parameters(small)
    assert count == found.reached
    assert f"{found.reached:,.6g} of {found.dense:,.6g}" in str(found) and "asked for 50.0%" in str(found)


def test_layers_that_do_not_matter_lose_most(batches, measured):
    """With made-up losses the answer is known: one layer is free of charge, one is dear."""
    losses = {name: {rate: 1.0 + rate for rate in RATES} for name in measured.losses}
    losses["inner"] = dict.fromkeys(RATES, 1.0)
    losses["last"] = dict.fromkeys(RATES, 50.0)
    found = mfp.find_rates(
        network(), EXAMPLE, calibration=batches, sensitivities=Sensitivities(1.0, losses), flops="40%", rounds=1
    )
    assert found.layer_rates["inner"] == 0.75 and found.layer_rates["last"] == 0.0


def test_costs_are_predicted_as_compaction_counts_them(batches):
    """Multiply-adds from the shares that were seen, against the compact network's own, where no addition is in between
    (counts and not shares are pruned, so filter numbers are chosen that the rates divide)."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip
    plan, units = plan_of(model, EXAMPLE, {}), units_of(model, EXAMPLE, {})
    images = _two_images(batches)
    cost, filters, inputs = _shares(Variants(model, images), images, plan, units, "flops")
    rates = torch.tensor([0.25, 0.5], dtype=torch.float64)
    predicted = float((cost * (1 - filters @ rates) * (1 - inputs @ rates)).sum())
    mfp.prune_filters_(plan.with_rates({"0": 0.25, "6": 0.5}), "l2_norm")
    assert float(cost.sum()) == 2 * mfp.flops(model, EXAMPLE)  # two images
    assert predicted == 2 * mfp.flops(mfp.compact(model.eval(), EXAMPLE), EXAMPLE)


def test_the_path_rises_from_nothing_to_everything(batches, measured):
    units = [[name] for name in measured.losses]
    plan = mfp.FilterPlan.from_model(network(), 0.0)
    images = _two_images(batches)
    path = _path(measured, units, *_shares(Variants(network(), images), images, plan, units, "flops"))
    assert path[0] == [0.0] * len(units) and path[-1] == [0.75] * len(units)
    assert all(0 <= b - a <= 0.0101 for x, y in itertools.pairwise(path) for a, b in zip(x, y, strict=True))


def test_settled_and_coupled_layers(batches, monkeypatch):
    monkeypatch.setattr(allocation, "RATES", RATES)
    found = mfp.find_rates(
        network(), EXAMPLE, calibration=batches, flops=0.7, residual="coupled", layer_rates={"inner": 0.5}
    )
    assert found.layer_rates["inner"] == 0.5 and "inner" not in found.sensitivities.losses
    assert found.layer_rates["stem"] == found.layer_rates["outer"]
    mfp.FilterPlan.from_model(network(), layer_rates=found.layer_rates, residual="coupled")


def test_a_time_is_a_target(batches, measured, monkeypatch):
    """The times are made up, a thousandth of the parameters, so that the answer is known."""
    monkeypatch.setattr(mfp.targets, "MULTIPLES", (1, 4))
    monkeypatch.setattr(mfp.targets, "_time", lambda small, *_: sum(p.numel() for p in small.parameters()) / 1000)
    found = mfp.find_rates(
        network(), EXAMPLE, calibration=batches, sensitivities=measured, milliseconds="60%", rounds=1
    )
    assert found.what == "milliseconds" and 0.5 * found.dense < found.reached <= found.asked and len(found.tried) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give exactly one of flops, parameters and milliseconds"),
        ({"flops": 0.5, "parameters": 0.5}, "give exactly one of"),
        ({"flops": "half"}, "flops must be a share like '50%'"),
        (
            {"flops": 0.02, "skip": ("inner", "outer")},
            r"flops of .* cannot be reached: the nearest is .*%\), with rate 0.75",
        ),
        ({"flops": 0.5, "calibration": []}, r"give calibration=\[\(inputs, targets\), ...\]"),
        ({"flops": 0.5, "layer_rates": {"*": 0.1}}, "settles the rates of all layers"),
        ({"flops": 0.5, "sensitivities": Sensitivities(1.0, {"a": {0.5: 1.0}})}, "of another plan: layer 'stem'"),
        ({"flops": 0.5, "criterion": "best"}, "unknown criterion 'best'"),
    ],
)
def test_what_cannot_be(batches, measured, arguments, message):
    losses = Sensitivities(measured.loss, measured.losses)
    if "calibration" in arguments:
        losses = None
    with pytest.raises(mfp.MfpError, match=message):
        mfp.find_rates(network(), EXAMPLE, **{"calibration": batches, "sensitivities": losses} | arguments)


def test_one_image_is_enough_where_batchnorm_sees_many_places():
    one = [(torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([3]))]
    found = measure_sensitivities(network(), EXAMPLE, one, rates=(0.5,))
    assert found.loss > 0 and len({losses[0.5] for losses in found.losses.values()}) == 4


def test_at_each_pruning_point_neighbours_differ_in_both(batches, monkeypatch):
    """Two of each criterion, at about the same cost; each is what pruning by these rates and that criterion gives."""
    monkeypatch.setattr(allocation, "RATES", RATES)
    model = network()
    start = copy.deepcopy(model.state_dict())
    criteria = ("l1_norm", "l2_distance")
    asked = {"criteria": criteria, "attribute": "loss", "calibration": batches}
    pruner = mfp.FilterPruner(model, 0.4, allocate="flops", layer_rates={"inner": 0.5}, **asked)
    decision = pruner.step(0)
    assert list(decision.neighbours) == [*criteria, *(name + " by sensitivity" for name in criteria)]
    assert decision.neighbours[decision.neighbour] == min(decision.neighbours.values())
    rates = decision.layer_rates
    assert (
        rates
        and decision.neighbour.endswith("by sensitivity")
        and rates["inner"] == 0.5
        and len(set(rates.values())) > 2
    )
    assert decision.mask.kept["last"] == 32 - int(32 * rates["last"])
    for name, layer_rates in (("l2_distance", {"inner": 0.5}), ("l2_distance by sensitivity", rates)):
        alone = network()
        alone.load_state_dict(start)
        given = {**asked, "criteria": ("l2_distance",)}
        mfp.FilterPruner(alone, 0.4, layer_rates=layer_rates, **given).step(0)
        loss = mfp.attributes.measure(alone.eval(), batches)["loss"]
        assert decision.neighbours[name] == pytest.approx(loss, rel=1e-5)
    copied = copy.deepcopy(model)
    restored = mfp.FilterPruner(copied, 0.4, allocate="flops", layer_rates={"inner": 0.5}, **asked)
    restored.load_state_dict(pruner.state_dict())
    assert restored.decisions == pruner.decisions and torch.equal(restored.mask.keep, decision.mask.keep)
    for each in (model, copied):
        each.train()(batches[0][0])  # restores what was set aside
    assert restored.step(1) == pruner.step(1)


@pytest.mark.parametrize("what", ["flops", "parameters"])
@pytest.mark.parametrize("residual", ["index", "coupled"])
def test_rates_that_suit_save_what_the_plans_own_would(batches, monkeypatch, what, residual):
    """What is predicted for both is counted on compact networks: within a tenth for a network of few filters."""
    monkeypatch.setattr(allocation, "RATES", RATES)

    def cost(rate, **arguments):
        model = network()
        mfp.FilterPruner(model, rate, criteria=("l2_distance",), residual=residual, **arguments).step(0)
        return count(mfp.compact(model.eval(), EXAMPLE))

    def count(model):
        return mfp.flops(model, EXAMPLE) if what == "flops" else count_parameters(model)

    pruner = mfp.FilterPruner(
        network(),
        0.4,
        criteria=("l2_distance",),
        attribute="loss",
        calibration=batches,
        residual=residual,
        allocate=what,
    )
    scores = pruner.score()
    suited = pruner.allocator.suited(scores, "l2_distance", pruner.comparison)
    rates = {layer.name: layer.rate for layer in suited.layers}
    assert len(set(rates.values())) > 1
    uniform, own, whole = cost(0.4), cost(0.4, layer_rates=rates), count(network())
    assert own == pytest.approx(uniform, rel=0.1) and own < 0.9 * whole


def test_rates_beyond_those_that_are_measured(batches):
    with pytest.raises(mfp.MfpError, match="allocate raises no rate above 0.75: rate must be at most that, not 0.8"):
        mfp.FilterPruner(network(), 0.8, allocate="flops", calibration=batches)


def test_a_network_without_a_graph_has_no_sensitivities(batches):
    class Branches(Small):
        def forward(self, x):
            return super().forward(x) if float(x.sum()) > 0 else super().forward(-x)

    torch.manual_seed(0)
    model = Branches()
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match="Without the graph"):
        pruner = mfp.FilterPruner(model, 0.4, allocate="flops", calibration=batches)
    with pytest.raises(mfp.MfpError):
        pruner.step(0)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items()) and pruner.mask is None
