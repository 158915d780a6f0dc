"""Rates from targets: exact counts, the smallest rate that does it, and what cannot be reached."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import mfp
from mfp import targets
from mfp.compact import count_parameters
from mfp.export import prepare
from mfp.targets import RateForTarget, _search, absolute

EXAMPLE = torch.zeros(1, 3, 32, 32)


class Network(nn.Module):
    """One residual block, and a conv behind it."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 16, 3, padding=1))
        self.conv2, self.fc = nn.Conv2d(16, 32, 3, 2), nn.Linear(32, 10)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = (x + self.layer1(x)).relu()
        return self.fc(self.conv2(x).relu().mean((2, 3)))


def network():
    torch.manual_seed(0)
    return Network()


def compacted(rate, **plan_arguments):
    model = network().eval()
    mfp.prune_filters_(mfp.FilterPlan.from_model(model, rate, **plan_arguments), "l2_norm")
    return mfp.compact(model, EXAMPLE)


def count_flops(model):
    return mfp.flops(model, EXAMPLE)


@pytest.mark.parametrize(("what", "count"), [("flops", count_flops), ("parameters", count_parameters)])
def test_the_smallest_rate_that_reaches_half_the_cost(what, count):
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = mfp.find_rate(model, EXAMPLE, **{f"target_{what}": "50%"})
    dense = count(network())
    assert found.dense == dense and found.asked == dense / 2
    assert count(compacted(found.rate)) == found.reached <= found.asked < count(compacted(found.rate - 0.001))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items()) and model.training
    assert f"rate {found.rate:g}: " in str(found) and "asked for 50.0%" in str(found)


def test_plan_arguments_count():
    model = network()
    plain = mfp.find_rate(model, EXAMPLE, target_flops="60%")
    rounded = mfp.find_rate(model, EXAMPLE, target_flops="60%", channel_multiple=8, layer_rates={"conv1": 0.0})
    assert rounded.rate > plain.rate and rounded.reached <= rounded.asked


def test_an_absolute_target_and_one_that_is_there_already():
    model = network()
    assert mfp.find_rate(model, EXAMPLE, target_parameters=6e3).reached <= 6e3
    already = mfp.find_rate(model, EXAMPLE, target_flops="100%")
    assert already.rate == 0.0 and already.reached == already.dense


def test_time_is_measured():
    """No time is asserted: only that the search ran on measured networks and reports what it measured."""
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 8, 3), nn.Flatten())
    found = mfp.find_rate(
        model, torch.zeros(1, 3, 32, 32), milliseconds="99.9%", layer_rates={"3": 0.0}, channel_multiple=1
    )
    assert 0.0 < found.reached <= found.asked < found.dense and 0.0 < found.rate < 1.0


def test_time_in_another_engine_and_the_rounding_that_suits_it(monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(targets, "MEASURED_STEP", 0.25)
    monkeypatch.setattr(targets, "MULTIPLES", (1, 16))
    measured, said, export = [], [], targets.export

    def export_one(small, file, example):
        """The first is written to a file, the others only made ready for one."""
        measured.append(sum(m.out_channels for m in prepare(small, example)[0].modules() if isinstance(m, nn.Conv2d)))
        if len(measured) == 1:
            export(small, file, example)

    def run_file(engine, file, inputs, *, batches, seconds):
        """A real file in the real engine; the times are made up, so that the answer is known."""
        if file.exists():
            session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
            for batch in batches:
                session.run(None, {name: np.concatenate([value] * batch) for name, value in inputs.items()})
            assert measured == [sum(v.dims[0] for v in onnx.load(file).graph.initializer if len(v.dims) == 4)]
        return {batch: float(measured[-1]) for batch in batches}, {}

    monkeypatch.setattr(targets, "export", export_one)
    monkeypatch.setattr(targets, "run_file", run_file)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 72, 3), nn.BatchNorm2d(72), nn.ReLU(), nn.Conv2d(72, 4, 3), nn.Flatten())
    asked = {"milliseconds": 60.0, "engine": "onnxruntime", "layer_rates": {"3": 0.0}}
    found = mfp.find_rate(model, torch.zeros(2, 3, 16, 16), say=said.append, **asked)
    # 72 filters less a quarter are 54, which the file fills up to 56; in multiples of 16 they are 64: too many
    assert (found.rate, found.reached, found.dense, found.channel_multiple) == (0.25, 60.0, 76.0, 1)
    assert len(found.tried) == 2 and "multiples of 16" in found.tried[1] and len(said) == len(measured)
    found = mfp.find_rate(model, torch.zeros(2, 3, 16, 16), channel_multiple=16, **asked)
    assert (found.rate, found.reached, found.channel_multiple, found.tried) == (0.5, 52.0, 16, ())


def test_a_search_that_begins_nearby_finds_the_same():
    for asked in (4.0, 37.0, 50.0, 93.0):
        for start in (0.02, 0.5, 0.95):
            cost = lambda rate: 100 * (1 - rate)  # noqa: E731
            near = RateForTarget(start, "milliseconds", asked, 0.0, 100.0)
            plain = _search("milliseconds", asked, 100.0, 0.01, cost)
            assert _search("milliseconds", asked, 100.0, 0.01, cost, near) == plain


def test_the_search_takes_the_smallest_rate():
    costs = []
    found = _search("target_flops", 50.0, 100.0, 0.01, lambda rate: costs.append(rate) or 100 * (1 - rate))
    assert found.rate == pytest.approx(0.5) and found.reached == pytest.approx(50.0) and len(costs) <= 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give exactly one of target_flops, target_parameters and milliseconds"),
        ({"target_flops": "50%", "milliseconds": "50%"}, "give exactly one of"),
        ({"target_flops": "half"}, "target_flops must be a share like '50%' or a number above 0, not 'half'"),
        ({"target_parameters": -3}, "target_parameters must be a share"),
        ({"target_flops": "0%"}, "target_flops must be a share"),
        (
            {"target_flops": "1%", "skip": ("layer1.*", "downsample")},
            r"target_flops of .* cannot be reached: at rate 0.999 the network still takes .*%\); what stays",
        ),
    ],
)
def test_targets_that_cannot_be(arguments, message):
    with pytest.raises(mfp.MfpError, match=message):
        mfp.find_rate(network(), EXAMPLE, **arguments)


def test_absolute():
    assert absolute("target_flops", "25%", 200.0) == 50.0
    assert absolute("target_flops", "7", 200.0) == absolute("target_flops", 7, 1.0) == 7.0
