"""Selection: exact counts, ties by index, the mix of two criteria, and the one-op path."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import mfp
from mfp import ops, reference
from mfp.selection import lowest_pruned

pytestmark = pytest.mark.usefixtures("three_threads")


def model(filters=(16, 10)):
    torch.manual_seed(0)
    first, second = filters
    return nn.Sequential(
        nn.Conv2d(3, first, 3), nn.BatchNorm2d(first), nn.ReLU(), nn.Conv2d(first, second, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(second, 2),
    )  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(scores=st.lists(st.integers(0, 5), min_size=1, max_size=60), data=st.data())
def test_the_lowest_go_and_of_equals_the_lower_index(scores, data):
    count = data.draw(st.integers(0, len(scores) - 1))
    expected = sorted(range(len(scores)), key=lambda j: (scores[j], j))[:count]
    keep = lowest_pruned(torch.tensor(scores).float(), count)
    assert (~keep).nonzero().flatten().tolist() == sorted(expected)
    assert torch.equal(keep, reference.lowest(torch.tensor(scores).float(), count))


def test_select_by_one_criterion_and_per_layer():
    plan = mfp.FilterPlan.from_model(model(), 0.4)
    scores = mfp.score_filters(plan, ("l1_norm", "cosine_distance"))
    one = mfp.select_filters(scores, "cosine_distance")
    assert one.kept == {"0": 10, "3": 6}
    mixed = mfp.select_filters(scores, {"0": "l1_norm", "3": "cosine_distance"})
    assert torch.equal(mixed.layer("3"), one.layer("3"))
    assert torch.equal(mixed.layer("0"), mfp.select_filters(scores, "l1_norm").layer("0"))
    with pytest.raises(mfp.MfpError, match="name the criterion to select by: scored were l1_norm, cosine_distance"):
        mfp.select_filters(scores)


@pytest.mark.parametrize("criterion", [*mfp.PAPER_CRITERIA, "weighted_hybrid", "l3_distance"])
@pytest.mark.parametrize("mask_bn", [True, False])
def test_one_op_does_what_three_calls_do(criterion, mask_bn):
    one, three = model(), model()
    mask = mfp.prune_filters_(mfp.FilterPlan.from_model(one), criterion, mask_bn=mask_bn)
    plan = mfp.FilterPlan.from_model(three)
    expected = mfp.select_filters(mfp.score_filters(plan, (criterion,)))
    expected.apply_(mask_bn)
    assert torch.equal(mask.keep, expected.keep) and mask.num_pruned == 10
    for ours, theirs in zip(one.state_dict().values(), three.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_only_pruned_rows_are_written():
    net = model()
    before = {
        name: value.clone()
        for name, value in net.named_parameters()
        if not isinstance(value, nn.UninitializedParameter)
    }
    mask = mfp.prune_filters_(mfp.FilterPlan.from_model(net), "l2_norm")
    keep = mask.layer("0")
    assert torch.equal(net[0].weight[keep], before["0.weight"][keep])
    assert not net[0].weight[~keep].any() and not net[1].bias[~keep].any() and not net[1].weight[~keep].any()
    assert torch.equal(net[1].weight[keep], before["1.weight"][keep])


def test_nothing_is_zeroed_when_a_weight_is_not_finite():
    net = model()
    with torch.no_grad():
        net[3].weight[4] = float("nan")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(mfp.MfpError, match="layer '3': filter 4 has weights that are not finite"):
        mfp.prune_filters_(mfp.FilterPlan.from_model(net), "l2_distance")
    assert all(torch.equal(before[name].nan_to_num(), net.state_dict()[name].nan_to_num()) for name in before)


def test_mix_takes_distances_among_the_filters_left():
    # Filter 0 has the smallest norm. Among all four, filter 1 is closest to the others; without filter 0, filter 2 is.
    net = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 1, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([0.5, 1.0, 4.0, 6.0]).view(4, 1, 1, 1))
    plan = mfp.FilterPlan.from_model(net, 0.4)
    assert mfp.select_filters(mfp.score_filters(plan, ("l2_distance",))).layer("0").tolist() == [
        True,
        False,
        True,
        True,
    ]
    mask = mfp.select_mix(plan, rate_norm=0.25, rate_distance=0.25)
    assert mask.layer("0").tolist() == [False, True, False, True]


@pytest.mark.parametrize(("rate_norm", "rate_distance"), [(0.1, 0.3), (0.3, 0.1), (0.0, 0.5), (0.25, 0.0)])
def test_mix_counts(rate_norm, rate_distance):
    plan = mfp.FilterPlan.from_model(model((37, 23)), 0.4)
    mask = mfp.select_mix(plan, rate_norm, rate_distance)
    for layer in plan.layers:
        expected = int(layer.num_filters * rate_norm) + int(layer.num_filters * rate_distance)
        assert layer.num_filters - mask.kept[layer.name] == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rate_norm": 1.0, "rate_distance": 0.0}, "rate_norm must be in"),
        ({"rate_norm": 0.5, "rate_distance": 0.5}, r"layer '0' has 16 filters.*prune 8 \+ 8 and leave none"),
        ({"rate_norm": 0.1, "rate_distance": 0.1, "norm": "l2_distance"}, "not a magnitude criterion"),
        ({"rate_norm": 0.1, "rate_distance": 0.1, "distance": "l2_norm"}, "not a relation criterion"),
    ],
)
def test_mix_refuses(arguments, message):
    with pytest.raises(mfp.MfpError, match=message):
        mfp.select_mix(mfp.FilterPlan.from_model(model()), **arguments)


def test_backends_choose_the_same_filters():
    """Unless two scores differ by less than a millionth of their size: such near-ties are counted, here none."""
    net = model((64, 48))
    plan = mfp.FilterPlan.from_model(net)
    near_ties = 0
    for criterion in (*mfp.PAPER_CRITERIA, "weighted_hybrid"):
        ours = mfp.select_filters(mfp.score_filters(plan, (criterion,)))
        theirs = mfp.select_filters(mfp.score_filters(plan, (criterion,), backend="reference"))
        near_ties += int((ours.keep != theirs.keep).sum())
    assert near_ties == 0


def test_the_op_refuses_what_does_not_fit():
    weight = torch.randn(4, 3)
    with pytest.raises(mfp.MfpError, match="layer 0 has 4 filters; cannot prune 4"):
        ops.prune_filters_([weight], [], [], [4], [0], [1.0], 0)
    with pytest.raises(mfp.MfpError, match=r"followers\[0\] \(5,\) does not fit layer 0"):
        ops.prune_filters_([weight], [torch.ones(5)], [0], [1], [0], [1.0], 0)
    with pytest.raises(mfp.MfpError, match="chosen must be an index into 1 criteria, got 1"):
        ops.prune_filters_([weight], [], [], [1], [0], [1.0], 1)
    with pytest.raises(mfp.MfpError, match=r"weights\[0\] is torch.float64"):
        ops.score_filters([weight.double()], [0], [1.0])
    with pytest.raises(mfp.MfpError, match=r"must be one dense block"):
        ops.score_filters([weight.T], [0], [1.0])
    with pytest.raises(mfp.MfpError, match="kind 4 needs one gradient a weight, got 0 for 1"):
        ops.score_filters([weight], [0, 4], [1.0, 2.0])
    images = torch.randn(4, 3, 2, 2)
    for gradient in (images[:3], images.to(memory_format=torch.channels_last)):
        with pytest.raises(mfp.MfpError, match=r"gradients\[0\] has shape .* expected those of its weight, \(4, 3"):
            ops.score_filters([images], [4], [2.0], [gradient])
    with pytest.raises(mfp.MfpError, match=r"gradients\[0\] is torch.float64"):
        ops.prune_filters_([weight], [], [], [1], [4], [2.0], 0, [weight.double()])
