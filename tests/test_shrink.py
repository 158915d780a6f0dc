"""Training goes on with the smaller network, and takes the steps that the masked one would have taken."""

from __future__ import annotations

import copy

import pytest
import torch
from compact_cases import randomize
from small_networks import NETWORKS
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from train_helpers import TinyNet

import mfp
from mfp.compact.count import count_parameters
from mfp.modules import ExpandChannels, ResidualJoin, SelectChannels
from mfp.shrinking import held_entries

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-3),
    "Nesterov": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-3, nesterov=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.05),
}


def hold(model: nn.Module, mask: mfp.FilterMask, mask_bn: bool) -> nn.Module:
    """What mask_gradients_() and MaskedSGD do, in float64 too."""
    held = held_entries(mask, mask_bn)
    for name, parameter in model.named_parameters():
        if name in held:
            parameter.register_hook(lambda gradient, zero=held[name]: gradient.masked_fill(zero, 0))
    return model


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(4, 3, 32, 32, generator=generator).to(next(model.parameters()).dtype)
    torch.manual_seed(seed)  # stochastic depth
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(images), torch.randint(10, (4,), generator=generator))
    loss.backward()
    optimizer.step()
    return loss.item()


def masked(network: nn.Module, **arguments) -> tuple[nn.Module, mfp.FilterPruner]:
    """A network in float64 with a mask that holds."""
    torch.manual_seed(0)
    model = randomize(network).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # it draws as many numbers as there are channels
    pruner = mfp.FilterPruner(model, 0.4, **{"mode": "hard", "criteria": ("l2_norm",), **arguments})
    pruner.step(0)
    return hold(model.double(), pruner.mask, pruner.mask_bn), pruner


def assert_equal(small: nn.Module, model: nn.Module, pruner: mfp.FilterPruner) -> None:
    """Weights and statistics of a smaller network are what is left of the masked one's."""
    own, cut = small.state_dict(), pruner.smaller.cut(model.state_dict())
    assert cut.keys() == {name for name in own if not name.endswith((".index", ".source"))}
    for name, wanted in cut.items():
        difference = (own[name] - wanted).double().abs().max().item()
        assert difference <= 1e-6 * wanted.double().abs().max().item(), name


CASES = {
    "cifar resnet": ("SGD", {}),
    "resnet bottleneck": ("Nesterov", {"residual": "coupled"}),
    "resnext": ("SGD", {}),
    "mobilenet_v2": ("AdamW", {}),
    "densenet": ("Nesterov", {}),
    "efficientnet": ("SGD", {}),
    "resnet": ("SGD", {"mask_bn": False}),
}


@pytest.mark.parametrize("family", CASES)
def test_steps_are_the_masked_networks(family):
    name, arguments = CASES[family]
    model, pruner = masked(NETWORKS[family](), **arguments)
    optimizer = OPTIMIZERS[name](model.parameters())
    step(model, optimizer, 0)
    reference = hold(copy.deepcopy(model), pruner.mask, pruner.mask_bn)
    other = OPTIMIZERS[name](reference.parameters())
    other.load_state_dict(optimizer.state_dict())
    small = pruner.shrink_(optimizer)
    assert count_parameters(small) < 0.9 * count_parameters(reference)
    before = {key: value.clone() for key, value in small.state_dict().items()}
    for seed in (1, 2):
        assert step(small, optimizer, seed) == pytest.approx(step(reference, other, seed), rel=1e-9)
        assert_equal(small, reference, pruner)
    learnt = [key for key, value in small.named_parameters() if not torch.equal(before[key], value)]
    assert len(learnt) > 0.9 * len(list(small.parameters()))
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(pruner.masked().eval()(images), small.eval()(images))
    assert all(not pruner.masked().get_parameter(key)[zero].any() for key, zero in held_of(pruner).items())


def held_of(pruner: mfp.FilterPruner) -> dict[str, Tensor]:
    return held_entries(pruner.mask, pruner.mask_bn)


def test_zeros_that_may_learn_are_no_reason_to_go():
    """A branch that begins with a scale of zero (zero_init_residual) is there after shrinking, and learns."""
    network = NETWORKS["resnet"]()
    model, pruner = masked(network)
    with torch.no_grad():
        model.layer1[0].bn2.weight.zero_()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    step(model, optimizer, 0)
    with torch.no_grad():
        model.layer1[0].bn2.weight.zero_()
    small = pruner.shrink_(optimizer)
    assert not small.get_parameter("layer1.0.bn2.weight").any()
    step(small, optimizer, 1)
    assert small.get_parameter("layer1.0.bn2.weight").any()


def test_filters_that_fill_up_groups_stay_zero():
    # with a rate of its own a grouped conv loses single filters, so that its groups are no longer alike
    model, pruner = masked(NETWORKS["resnext"](), layer_rates={"layer1.0.conv2": 0.3})
    optimizer = OPTIMIZERS["AdamW"](model.parameters())
    small = pruner.shrink_(optimizer)
    step(small, optimizer, 0)
    held, fillers = held_of(pruner), 0
    for name, parameter in small.named_parameters():
        origin = pruner.smaller.origins[name]
        if origin.name in held:
            zero = origin.left(held[origin.name])
            fillers += int(zero.sum())
            assert not parameter[zero].any()
    assert fillers


def tiny(**arguments) -> tuple[nn.Module, mfp.FilterPruner]:
    torch.manual_seed(0)
    model = TinyNet()
    model.dropout.p = 0.0
    return model, mfp.FilterPruner(model, 0.4, **{"criteria": ("l2_norm",), **arguments})


def test_schedule_groups_and_averages_go_on():
    model, pruner = tiny()
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": [p for p in model.parameters() if p.dim() > 1]}, {"params": norms, "weight_decay": 0.0}]
    optimizer = mfp.optim.MaskedSGD(groups, 0.1, momentum=0.9, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    for seed in range(2):
        step(model, optimizer, seed)
        average.update_parameters(model)
    schedule.step()
    pruner.step(0)
    pruner.hold_()
    optimizer.mask = pruner.mask
    wide = copy.deepcopy(average.module)
    small = pruner.shrink_(optimizer, averaged=average)
    assert optimizer.mask is None and pruner.shrink_(optimizer) is small
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-2, 0.0]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(small.parameters()))
    assert all(optimizer.state[p]["momentum_buffer"].shape == p.shape for p in small.parameters())
    for name, value in pruner.smaller.cut(wide.state_dict()).items():
        torch.testing.assert_close(average.module.state_dict()[name], value)
    before = average.module.get_parameter("fc.weight").clone()
    step(small, optimizer, 2)
    average.update_parameters(small)
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.1 * 0.5**2
    torch.testing.assert_close(average.module.fc.weight, (before + small.fc.weight) / 2)


def test_state_resumes_across_the_point():
    model, pruner = tiny(mode="hard")
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    step(model, optimizer, 0)
    pruner.step(0)
    model = pruner.shrink_(optimizer)
    step(model, optimizer, 1)
    state = copy.deepcopy([pruner.state_dict(), model.state_dict(), optimizer.state_dict()])
    other, resumed = tiny(mode="hard")
    again = OPTIMIZERS["SGD"](other.parameters())
    resumed.load_state_dict(state[0])
    other = resumed.shrink_(again)
    other.load_state_dict(state[1])
    again.load_state_dict(state[2])
    for network, optimiser in ((model, optimizer), (other, again)):
        step(network, optimiser, 2)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())
    assert resumed.step(3) is None and [d.digest for d in resumed.decisions] == [d.digest for d in pruner.decisions]
    resumed.load_state_dict(resumed.state_dict())


class Gated(nn.Module):
    """A part that can be captured behind a decision on values."""

    def __init__(self):
        super().__init__()
        self.net, self.head = TinyNet(), nn.Conv2d(3, 4, 1)
        self.net.dropout.p = 0.0

    def forward(self, x):
        return self.net(x) if x.mean() < 9 else self.head(x).mean()


def test_a_part_of_a_model_that_cannot_be_captured():
    torch.manual_seed(0)
    model = Gated()
    with pytest.warns(UserWarning, match="cannot capture Gated"):
        pruner = mfp.FilterPruner(model, 0.4, criteria=("l2_norm",), example_input=torch.zeros(2, 3, 32, 32))
    pruner.step(0)
    pruner.hold_()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    with pytest.warns(UserWarning, match="goes on with the masked network, which cannot be shrunk: cannot capture"):
        assert pruner.shrink_(optimizer) is model
    step(model, optimizer, 0)
    average, part = AveragedModel(model), mfp.FilterPruner(model.net, 0.4, mode="hard", criteria=("l2_norm",))
    part.step(0)
    momentum = optimizer.state[model.head.weight]["momentum_buffer"] = torch.ones_like(model.head.weight)
    with pytest.raises(mfp.MfpError, match="no part of ReLU"):
        part.shrink_(optimizer, within=nn.ReLU())
    small = part.shrink_(optimizer, within=model, averaged=average)
    assert model.net is small and small.conv2.weight.shape == (8, 5, 3, 3)
    assert average.module.net.conv2.weight.shape == (8, 5, 3, 3)
    assert optimizer.state[model.head.weight]["momentum_buffer"] is momentum
    owned = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in owned} == {id(p) for p in model.parameters()}
    step(model, optimizer, 0)
    average.update_parameters(model)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(part.masked().eval()(images), model.eval()(images))


class OtherInTraining(TinyNet):
    def forward(self, x):
        return super().forward(x) * (2 if self.training else 1)


def test_a_network_that_would_not_train_alike_stays_masked():
    model = OtherInTraining()
    pruner = mfp.FilterPruner(model, 0.4, mode="hard", criteria=("l2_norm",))
    pruner.step(0)
    with pytest.warns(UserWarning, match="in training mode it computes something else than in eval mode"):
        assert pruner.shrink_() is model
    step(model, OPTIMIZERS["SGD"](model.parameters()), 0)


class Strange(torch.optim.SGD):
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["rows"] = parameter.flatten(1).sum(1) if parameter.dim() > 1 else torch.ones(2)


def test_bad_input_is_one_line_and_changes_nothing():
    model, pruner = tiny()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    with pytest.raises(mfp.MfpError, match="there is no mask yet"):
        pruner.shrink_(optimizer)
    pruner.step(0)
    with pytest.raises(mfp.MfpError, match=r"may still come back; call pruner.hold_\(\)"):
        pruner.shrink_(optimizer)
    pruner.hold_()
    before = copy.deepcopy(model.state_dict())
    more = OPTIMIZERS["SGD"]([*model.parameters(), nn.Parameter(torch.zeros(3))])
    with pytest.raises(mfp.MfpError, match="has 1 parameters that TinyNet has not, the first of shape"):
        pruner.shrink_(more)
    strange = Strange(model.parameters(), 0.0)
    step(model, strange, 0)
    with pytest.raises(mfp.MfpError, match="Strange keeps 'rows' for conv1.weight, which is neither a number nor"):
        pruner.shrink_(strange)
    assert pruner.smaller is None
    assert all(torch.equal(value, before[key]) for key, value in model.named_parameters())


def test_what_learns_on_behind_a_pruned_filter_stays():
    _, pruner = tiny(mode="hard", mask_bn=False)
    pruner.step(0)
    small = pruner.shrink_()
    assert small.conv1.out_channels < 8 and small.bn1.num_features == 8
    biased = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    pruner = mfp.FilterPruner(biased, 0.4, mode="hard", criteria=("l2_norm",), mask_bn=False)
    pruner.step(0)
    with pytest.warns(UserWarning, match="nothing would get smaller: what follows the pruned filters learns on"):
        assert pruner.shrink_() is biased


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moves_by_index_and_their_gradients_are_torchs(layout, dtype):
    """On whole numbers, bit for bit; in the layout that they were given."""
    generator = torch.Generator().manual_seed(0)

    def numbers(channels: int) -> Tensor:
        values = torch.randint(-9, 10, (3, channels, 5, 4), generator=generator).to(dtype)
        return values.contiguous(memory_format=layout).requires_grad_()

    index = torch.tensor([0, 3, 4, 9, 16])
    wide, narrow = numbers(17), numbers(5)
    modules = {
        "join": (ResidualJoin(index, 1), (wide, narrow), lambda a, b: a.index_add(1, index, b)),
        "take": (SelectChannels(index, 1), (wide,), lambda a: a.index_select(1, index)),
        "spread": (
            ExpandChannels(torch.arange(5), index, 17, 1, in_order=True), (narrow,),
            lambda a: torch.zeros_like(wide).index_copy(1, index, a),
        ),
    }  # fmt: skip
    for name, (module, inputs, wanted) in modules.items():
        ours, theirs = module(*inputs), wanted(*inputs)
        assert torch.equal(ours, theirs), name
        assert ours.is_contiguous(memory_format=layout), name
        gradient = torch.randint(-9, 10, ours.shape, generator=generator).to(dtype).contiguous(memory_format=layout)
        for mine, its in zip(*(torch.autograd.grad(y, inputs, gradient) for y in (ours, theirs)), strict=True):
            assert torch.equal(mine, its), name
    backwards = torch.tensor([4, 1])
    assert torch.equal(SelectChannels(backwards, 1)(wide), wide.index_select(1, backwards))


class ReadTwice(nn.Module):
    """A BatchNorm whose result is read behind its ReLU and as it is."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 10, 3)

    def forward(self, x):
        x = self.norm(self.first(x).relu())
        return self.last(x.relu() + x.sigmoid()).relu().mean((2, 3))


def test_what_nobody_else_reads_is_rectified_in_place():
    model, pruner = masked(ReadTwice())
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    reference = copy.deepcopy(model)
    other = OPTIMIZERS["SGD"](reference.parameters())
    hold(reference, mfp.FilterMask(mfp.FilterPlan(reference, pruner.plan.layers), pruner.mask.keep), pruner.mask_bn)
    small = pruner.shrink_(optimizer)
    found = [node.target for node in small.graph.nodes if "relu" in str(node.target)]
    relu, relu_ = torch.ops.aten.relu.default, torch.ops.aten.relu_.default
    assert found == [relu_, relu, relu_]
    for seed in (1, 2):
        assert step(small, optimizer, seed) == pytest.approx(step(reference, other, seed), rel=1e-9)
    assert_equal(small, reference, pruner)
