"""Growing rates on one way: masks only grow, and the network shrinks again and again."""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch
from small_networks import NETWORKS
from test_shrink import OPTIMIZERS, assert_equal, hold, masked, step, tiny
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import mfp
from mfp.shrinking import held_entries, zero_

ONE_WAY = {"mode": "cubic", "one_way": True, "epochs": 6}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> None:
    for seed in range(2):
        step(model.train(), optimizer, 10 * epoch + seed)


@pytest.mark.parametrize("mode", ["cubic", "asymptotic"])
@pytest.mark.parametrize(
    "arguments",
    [{"criteria": ("l2_distance",)}, {"criteria": ("l1_norm", "cosine_distance")}, {"criteria": ("bn_scale",)},
     {"residual": "coupled", "criteria": ("l2_norm", "l2_distance")},
     {"per_layer": True, "attribute": "sparsity", "channel_multiple": 4}],
    ids=str,
)  # fmt: skip
def test_masks_grow_as_the_schedule_says(mode, arguments):
    torch.manual_seed(0)
    model = NETWORKS["cifar resnet"]()
    pruner = mfp.FilterPruner(model, 0.5, **{**ONE_WAY, "mode": mode, **arguments})
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    masks = []
    for epoch in range(6):
        train(model, optimizer, epoch)
        decision = pruner.step(epoch)
        wanted = pruner.plan.scaled(decision.rate_factor)
        assert [int((~decision.mask.layer(layer.name)).sum()) for layer in wanted.layers] == [
            layer.num_pruned for layer in wanted.layers
        ]
        masks.append(decision.mask.keep)
        assert pruner.holds and not pruner.state_dict()["affine_backup"]
    assert all((before | ~after).all() for before, after in itertools.pairwise(masks))
    assert masks[0].sum() > masks[2].sum() > masks[-1].sum()


@pytest.mark.parametrize("criterion", ["l2_distance", "weighted_hybrid", "l1_norm"])
def test_further_filters_are_chosen_among_those_that_are_left(criterion):
    """As a layer is judged that has the others only; distances to filters that are gone count nowhere."""
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 12, 3, bias=False)
    model = nn.Sequential(layer, nn.ReLU(), nn.Conv2d(12, 4, 3))
    with torch.no_grad():
        layer.weight.mul_(torch.linspace(0.5, 2, 12)[torch.randperm(12)].view(-1, 1, 1, 1))
    pruner = mfp.FilterPruner(model, 0.5, criteria=(criterion,), mode="cubic", one_way=True, epochs=4)
    pruner.step(0)
    left = pruner.mask.layer("0").nonzero().flatten()
    assert len(left) == 12 - int(12 * 0.5 * (1 - 0.75**3))
    alone = nn.Sequential(nn.Conv2d(3, len(left), 3, bias=False), nn.ReLU(), nn.Conv2d(len(left), 4, 3))
    with torch.no_grad():
        alone[0].weight.copy_(layer.weight[left])
    scores = mfp.score_filters(mfp.FilterPlan.from_model(alone), (criterion,))[criterion][: len(left)]
    torch.testing.assert_close(pruner.score()[criterion][left], scores)
    assert not pruner.score()[criterion][:12][~pruner.mask.layer("0")].any()
    more = int(12 * 0.5 * (1 - 0.5**3)) - (12 - len(left))
    pruner.step(1)
    gone = set(range(12)) - set(pruner.mask.layer("0").nonzero().flatten().tolist())
    assert gone - (set(range(12)) - set(left.tolist())) == set(left[scores.argsort()[:more]].tolist())


def test_what_is_pruned_stays_zero_between_the_points():
    model, pruner = tiny(**ONE_WAY)
    optimizer = mfp.optim.MaskedSGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-2)
    for epoch in range(6):
        train(model, optimizer, epoch)
        held = held_entries(pruner.mask, True) if pruner.mask else {}
        assert not any(model.get_parameter(name)[zero].any() for name, zero in held.items())
        pruner.step(epoch)
        optimizer.mask = pruner.mask
    plain, pruner = tiny(**ONE_WAY)
    pruner.step(3)
    plain(torch.randn(2, 3, 32, 32)).sum().backward()
    pruner.mask_gradients_()
    assert not plain.conv1.weight.grad[~pruner.mask.layer("conv1")].any() and plain.conv1.weight.grad.any()


def grown(mask: mfp.FilterMask) -> mfp.FilterMask:
    """Two filters less of each layer."""
    keep = mask.keep.clone()
    for layer in mask.plan.layers:
        keep[layer.offset + mask.layer(layer.name).nonzero().flatten()[:2]] = False
    return mfp.FilterMask(mask.plan, keep)


CASES = {
    "cifar resnet": ("Nesterov", {}),
    "resnet": ("AdamW", {}),
    "resnet bottleneck": ("Nesterov", {"residual": "coupled"}),
    "mobilenet_v2": ("Nesterov", {"mask_bn": False}),
    "densenet": ("SGD", {}),
    "resnext": ("Nesterov", {}),
    "efficientnet": ("Nesterov", {}),
}


@pytest.mark.parametrize("family", CASES)
def test_steps_after_each_shrinking_are_the_masked_networks(family):
    """Against a network that trains masked all along."""
    name, arguments = CASES[family]
    model, pruner = masked(NETWORKS[family](), **arguments)
    reference = hold(copy.deepcopy(model), pruner.mask, pruner.mask_bn)
    optimizer, other = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](reference.parameters())
    average, wide = (AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.5)) for m in (model, reference))
    parameters = []
    for point in range(3):
        small = pruner.shrink_(optimizer, averaged=average)
        assert pruner.shrink_(optimizer, averaged=average) is small is pruner.model
        parameters.append(sum(p.numel() for p in small.parameters()))
        for seed in (10 * point + 1, 10 * point + 2):
            assert step(small, optimizer, seed) == pytest.approx(step(reference, other, seed), rel=1e-9)
            average.update_parameters(small)
            wide.update_parameters(reference)
        if family != "efficientnet":  # there the one keeps columns of zero inputs in its squeeze layers
            assert_equal(small, reference, pruner)
            assert_equal(average.module, wide.module, pruner)
        images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
        torch.testing.assert_close(small.eval()(images), reference.eval()(images), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(average.module.eval()(images), wide.module.eval()(images), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(pruner.masked().eval()(images), small(images))
        small.train(), reference.train()
        pruner.mask = grown(pruner.mask)
        held = held_entries(
            mfp.FilterMask(mfp.FilterPlan(reference, pruner.plan.layers), pruner.mask.keep), pruner.mask_bn
        )
        zero_(reference, held, other)
        zero_(wide.module, held)
        hold(reference, mfp.FilterMask(mfp.FilterPlan(reference, pruner.plan.layers), pruner.mask.keep), pruner.mask_bn)
    assert parameters[0] > parameters[1] > parameters[2]


class Whole(nn.Module):
    """A network in something bigger."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net, self.scale = net, nn.Parameter(torch.ones(10))

    def forward(self, x):
        return self.net(x) * self.scale


def test_a_loop_with_groups_an_average_and_a_bigger_module():
    torch.manual_seed(0)
    network = NETWORKS["cifar resnet"]()
    model = Whole(network)
    pruner = mfp.FilterPruner(network, 0.5, criteria=("l2_norm", "l1_distance"), **ONE_WAY)
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": [p for p in model.parameters() if p.dim() > 1]}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, 0.05, momentum=0.9, weight_decay=1e-2)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    states = []
    for epoch in range(6):
        train(model, optimizer, epoch)
        average.update_parameters(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            decision = pruner.step(epoch)
            zero = held_entries(pruner.mask, True)
            if pruner.smaller is not None:  # also where it is small already
                for name, value in pruner.smaller.cut(zero).items():
                    assert not network.get_parameter(name)[value].any()
            network = pruner.shrink_(optimizer, averaged=average, within=model)
        assert decision.mask is pruner.mask and model.net is network is pruner.model
        owned = [p for group in optimizer.param_groups for p in group["params"]]
        assert {id(p) for p in owned} == {id(p) for p in model.parameters()} and len(owned) == len(set(owned))
        assert all(p.dim() == 1 for p in optimizer.param_groups[1]["params"])
        assert all(optimizer.state[p]["momentum_buffer"].shape == p.shape for p in owned)
        assert all(a.shape == b.shape for a, b in zip(average.module.parameters(), model.parameters(), strict=True))
        states.append((sum(p.numel() for p in owned), copy.deepcopy([pruner.state_dict(), network.state_dict()])))
    assert states[0][0] > states[2][0] > states[-1][0]
    pruner.hold_()
    assert pruner.step(6) is None and pruner.shrink_(optimizer, averaged=average, within=model) is network
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(pruner.masked().eval()(images), network.eval()(images), rtol=1e-4, atol=1e-5)
    for _, (own, weights) in states[::2]:  # resumed from there
        other = NETWORKS["cifar resnet"]()
        resumed = mfp.FilterPruner(other, 0.5, criteria=("l2_norm", "l1_distance"), **ONE_WAY)
        resumed.load_state_dict(own)
        small = resumed.shrink_()
        small.load_state_dict(weights)
        assert resumed.mode == "cubic" and resumed.masked().conv1.weight.shape == (16, 3, 3, 3)


def test_a_mask_that_takes_too_little_yet_is_no_reason_to_warn():
    model = NETWORKS["resnet"]()
    pruner = mfp.FilterPruner(model, 0.4, criteria=("l2_norm",), mode="cubic", one_way=True, epochs=10000)
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for epoch in (-1, 0):
            pruner.step(epoch)
            assert pruner.shrink_(optimizer) is model
        pruner.step(5000)
        assert pruner.shrink_(optimizer) is not model


def test_where_it_cannot_be_shrunk_again_training_goes_on_masked(monkeypatch):
    model, pruner = tiny(**ONE_WAY)
    optimizer = OPTIMIZERS["Nesterov"](model.parameters())
    average = AveragedModel(model)
    step(model, optimizer, 0)
    pruner.step(2)
    small = pruner.shrink_(optimizer, averaged=average)
    step(small, optimizer, 1)
    strange = OPTIMIZERS["SGD"]([*small.parameters(), nn.Parameter(torch.zeros(3))])
    pruner.step(4)
    before = copy.deepcopy(small.state_dict())
    with pytest.raises(mfp.MfpError, match="has 1 parameters that CompactTinyNet has not"):
        pruner.shrink_(strange)
    assert pruner.model is small and all(torch.equal(value, before[key]) for key, value in small.state_dict().items())
    buffer = optimizer.state[small.fc.weight]["momentum_buffer"]

    def refuse(*arguments):
        raise mfp.errors.CaptureError("cannot capture TinyNet: a decision on values")

    monkeypatch.setattr("mfp.shrinking.make_smaller", refuse)
    with pytest.warns(UserWarning, match="masked network, which cannot be shrunk: cannot capture TinyNet"):
        wide = pruner.shrink_(optimizer, averaged=average)
    assert wide is model is pruner.model and pruner.smaller is None
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in wide.parameters()}
    moved = optimizer.state[wide.fc.weight]["momentum_buffer"]
    assert moved.shape == (10, 12) and moved.norm() == pytest.approx(buffer.norm().item(), rel=1e-5)
    assert average.module.fc.weight.shape == (10, 12)
    for name, zero in held_entries(pruner.mask, True).items():
        assert not wide.get_parameter(name)[zero].any() and not average.module.get_parameter(name)[zero].any()
    step(wide, optimizer, 2)
    average.update_parameters(wide)
    monkeypatch.undo()
    assert pruner.shrink_(optimizer, averaged=average) is not wide


@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_one_way_is_for_rates_that_grow(mode):
    why = {"soft": "filters are to come back", "hard": "no filter comes back anyway"}[mode]
    with pytest.raises(mfp.MfpError, match=rf"one_way=True goes with a rate that grows \(asymptotic or cubic\).*{why}"):
        tiny(mode=mode, one_way=True)
