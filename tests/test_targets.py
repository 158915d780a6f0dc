"""Rates from targets: exact counts, the smallest rate that does it, and what cannot be reached."""

import pytest
import torch
from torch import nn

import mfp
from mfp.compact import count_parameters
from mfp.targets import _search, absolute
from mfp.train.models import CifarResNet

EXAMPLE = torch.zeros(1, 3, 32, 32)


def network():
    torch.manual_seed(0)
    return CifarResNet(8)


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
    rounded = mfp.find_rate(model, EXAMPLE, target_flops="60%", channel_multiple=16, layer_rates={"conv1": 0.0})
    assert rounded.rate > plain.rate and rounded.reached <= rounded.asked


def test_an_absolute_target_and_one_that_is_there_already():
    model = network()
    assert mfp.find_rate(model, EXAMPLE, target_parameters=3e4).reached <= 3e4
    already = mfp.find_rate(model, EXAMPLE, target_flops="100%")
    assert already.rate == 0.0 and already.reached == already.dense


def test_time_is_measured():
    """No time is asserted: only that the search ran on measured networks and reports what it measured."""
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 8, 3), nn.Flatten())
    found = mfp.find_rate(
        model, torch.zeros(1, 3, 32, 32), milliseconds="99.9%", layer_rates={"3": 0.0}, channel_multiple=1
    )
    assert 0.0 < found.reached <= found.asked < found.dense and 0.0 < found.rate < 1.0


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
