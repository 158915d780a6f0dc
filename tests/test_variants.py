"""Variants run side by side: the same numbers as each alone, statistics that fit the pruned network, shared work."""

import copy

import pytest
import torch
from test_attributes import data
from torch import nn

import mfp
from mfp.errors import CaptureError
from mfp.variants import Variants

aten = torch.ops.aten


class Depthwise(nn.Module):
    """Everything that is masked with a filter: a bias, BatchNorms, a depthwise conv; and a shortcut around it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.inner = nn.BatchNorm2d(12)
        self.point = nn.Conv2d(12, 12, 1)
        self.last = nn.BatchNorm2d(12, momentum=None)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(12, 7)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        x = x + self.last(self.point(torch.relu(self.inner(self.depthwise(x)))))
        return self.fc(self.dropout(x.mean((2, 3))))


def masks_of(model):
    """By five criteria, and of one layer alone."""
    plan = mfp.FilterPlan.from_model(model, 0.4)
    scores = mfp.score_filters(plan)
    found = [mfp.select_filters(scores, criterion) for criterion in scores]
    keep = torch.ones(plan.num_filters, dtype=torch.bool)
    keep[plan.layers[-1].slice.start + 1] = False
    return [None, *found, mfp.FilterMask(plan, keep)]


def same(a, b):
    statistics = a.statistics.keys() == b.statistics.keys() and all(
        torch.equal(x, y) for name in a.statistics for x, y in zip(a.statistics[name], b.statistics[name], strict=True)
    )
    return statistics and a.metrics == b.metrics


@pytest.mark.parametrize("mask_bn", [True, False])
def test_together_gives_the_same_bits_as_alone_and_leaves_no_trace(mask_bn):
    model, batches = Depthwise(), data()
    masks, before = masks_of(model), copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    variants = Variants(model, batches)
    together = variants.run(masks, batches, mask_bn=mask_bn)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state()) and all(module.training for module in model.modules())
    for mask, found in zip(masks, together, strict=True):
        assert same(found, variants.run([mask], batches, mask_bn=mask_bn)[0])
    digests = {mask.digest for mask in masks[1:]}
    assert len({found.metrics["loss"] for found in together}) == 1 + len(digests) >= 6


@pytest.mark.parametrize("mask_bn", [True, False])
@pytest.mark.parametrize("sizes", [(8, 8, 8), (8, 8, 3)])
def test_statistics_are_those_of_the_inputs_in_the_pruned_network(mask_bn, sizes):
    """Checked on the pruned module itself, in float64: each BatchNorm holds the statistics of what it is given."""
    model = Depthwise()
    batches = [pair for number, size in enumerate(sizes) for pair in data(number + 1, size)[number:]]
    mask = masks_of(model)[2]
    found = Variants(model, batches).run([mask], batches, mask_bn=mask_bn)[0]
    mask.apply_(mask_bn)
    Variants(model, batches).settle_(found.statistics, batches)
    measured = mfp.attributes.measure(model.eval(), batches)
    assert found.metrics == pytest.approx(measured, rel=1e-5)
    seen = {}
    for name in ("norm", "inner", "last"):
        module = model.get_submodule(name)
        module.register_forward_hook(lambda m, inputs, _, name=name: seen.update({name: inputs[0]}))
        assert int(module.num_batches_tracked) == len(batches)
    with torch.no_grad():
        model.double()(torch.cat([inputs for inputs, _ in batches]).double())
    for name, given in seen.items():
        module = model.get_submodule(name)
        torch.testing.assert_close(module.running_mean, given.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(module.running_var, given.var((0, 2, 3)), rtol=1e-5, atol=1e-6)


def test_what_variants_share_is_computed_once():
    model, batches = Depthwise(), data()
    plan = mfp.FilterPlan.from_model(model, 0.0)
    masks = []
    for number in range(4):  # only the last conv differs
        keep = torch.ones(plan.num_filters, dtype=torch.bool)
        keep[plan["point"].slice.start + number] = False
        masks.append(mfp.FilterMask(plan, keep))
    ran = []
    Variants(model, batches).run(
        [None, *masks], batches, watch=lambda node, arguments, group: ran.append((node.name, tuple(group)))
    )
    convs = [group for name, group in ran if name.startswith("conv2d")]
    assert convs[:2] == [(0, 1, 2, 3, 4)] * 2 and sorted(convs[2:]) == [(0,), (1,), (2,), (3,), (4,)]


def test_weights_are_read_at_each_run():
    model, batches = Depthwise(), data()
    variants = Variants(model, batches)
    first = variants.run([None], batches)[0]
    with torch.no_grad():
        model.conv.weight.mul_(2.0)
    model.fc.bias = nn.Parameter(torch.ones(7))
    second = variants.run([None], batches)[0]
    assert not same(first, second) and same(second, Variants(model, batches).run([None], batches)[0])


class Twice(nn.Module):
    """One BatchNorm behind two convs: its statistics are not those of one input."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.norm = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 7)

    def forward(self, x):
        return self.fc(self.norm(self.b(self.norm(self.a(x)))).mean((2, 3)))


class Decides(Twice):
    """A decision on values, which torch.export does not follow."""

    def forward(self, x):
        return super().forward(x) if float(x.sum()) != 1.0 else x


@pytest.mark.parametrize("kind", [Twice, Decides])
@pytest.mark.filterwarnings("ignore:cannot capture")
def test_where_the_graph_does_not_serve_the_module_runs(kind):
    model, batches = kind(), data()
    with pytest.raises(CaptureError):
        Variants(model, batches)
    alone = copy.deepcopy(model)
    decision = mfp.FilterPruner(model, 0.4, attribute="loss", calibration=batches).step(0)
    mfp.FilterPruner(
        alone, 0.4, criteria=(decision.criterion,), attribute="loss", calibration=batches, recalibrate=True
    ).step(0)
    assert all(torch.equal(value, alone.state_dict()[name]) for name, value in model.state_dict().items())
    assert decision.attribute_after == mfp.attributes.measure(model.eval(), batches)["loss"]


def test_one_value_per_channel_has_no_variance():
    model = nn.Sequential(nn.Conv2d(3, 4, 6), nn.BatchNorm2d(4), nn.Flatten())
    one, two = data(1, 1, 4), data(2, 1, 4)
    with pytest.raises(mfp.MfpError, match="'1' sees one value per channel.*more than one calibration image"):
        Variants(model, one).run([None], one)
    assert Variants(model, two).run([None], two)[0].statistics["1"][1].min() > 0


@pytest.mark.parametrize("captured", [True, False])
def test_too_few_images_are_found_before_anything_is_trained(monkeypatch, captured):
    if not captured:
        monkeypatch.setattr("mfp.neighbours.Variants", refuse)
    model = nn.Sequential(nn.Conv2d(3, 4, 6), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 7))
    before = copy.deepcopy(model.state_dict())
    for criteria in (("l2_norm",), mfp.PAPER_CRITERIA):
        with pytest.raises(mfp.MfpError, match="sees one value per channel.*more than one calibration image"):
            mfp.FilterPruner(model, criteria=criteria, attribute="loss", calibration=data(1, 1))
    with pytest.raises(mfp.MfpError, match="sees one value per channel"):
        mfp.recalibrate_batchnorm(model, data(1, 1))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items()) and model.training
    mfp.FilterPruner(model, attribute="loss", calibration=data(1, 1), recalibrate=False).step(0)
    places = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 7)
    )
    decision = mfp.FilterPruner(places, attribute="loss", calibration=data(1, 1)).step(0)
    assert decision.attribute_after > 0  # one image has many values where BatchNorm sees many places


def refuse(*arguments):
    raise CaptureError("no graph")
