"""A compact network is trained on exactly as the masked one would have been."""

import pickle

import pytest
import torch
from compact_cases import randomize
from torch import nn

import mfp


class Network(nn.Module):
    """A residual block, a depthwise and a grouped conv, a transposed conv, a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.branch = nn.Conv2d(16, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 24, 1, groups=4)
        self.up = nn.ConvTranspose2d(24, 12, 2, stride=2)
        self.last = nn.Conv2d(12, 8, 3, bias=False)
        self.act = nn.PReLU(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.bn(self.stem(x)).relu()
        x = x + self.bn2(self.depthwise(self.branch(x).relu()))
        x = self.up(self.grouped(x)).relu()
        return self.fc(self.act(self.last(x)).mean((2, 3)))


OPTIMIZERS = {
    "SGD": lambda groups, mask: torch.optim.SGD(groups, 0.05, momentum=0.9, weight_decay=1e-3),
    "AdamW": lambda groups, mask: torch.optim.AdamW(groups, 0.01),
    "MaskedSGD": lambda groups, mask: mfp.optim.MaskedSGD(groups, 0.05, momentum=0.9, weight_decay=1e-3, mask=mask),
    "MaskedAdamW": lambda groups, mask: mfp.optim.MaskedAdamW(groups, 0.01, mask=mask),
}


def step(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    images, labels = torch.randn(8, 3, 9, 9, generator=generator), torch.randint(5, (8,), generator=generator)
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    return loss.item()


def trained(name):
    """A masked network after three steps, its optimiser, and its mask."""
    torch.manual_seed(0)
    model = Network()
    randomize(model)
    # A compact grouped conv can have filters that only fill up a group, and they may learn; so it is left whole here.
    mask = mfp.prune_filters_(mfp.FilterPlan.from_model(model, 0.4, skip=("grouped",)), "l2_norm")
    norms = [p for p in model.parameters() if p.dim() == 1]
    others = [p for p in model.parameters() if p.dim() != 1]
    optimizer = OPTIMIZERS[name]([{"params": others}, {"params": norms, "weight_decay": 0.0}], mask)
    for seed in range(3):
        step(model, optimizer, seed)
        mask.apply_()
    return model, optimizer, mask


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_it_would_have(name):
    model, optimizer, mask = trained(name)
    small = mfp.compact(model, torch.zeros(1, 3, 9, 9))
    new = mfp.compact_optimizer(optimizer, model, small)
    assert type(new) is type(optimizer) and not getattr(new, "mask", None)
    before = {key: value.clone() for key, value in small.state_dict().items()}
    for seed in range(3, 8):
        assert step(small, new, seed) == pytest.approx(step(model, optimizer, seed), rel=1e-4)
        mask.apply_()
    wanted = mfp.compact(model, torch.zeros(1, 3, 9, 9)).state_dict()
    assert wanted.keys() == before.keys()
    moving = dict(small.named_parameters())
    for key, value in small.state_dict().items():
        torch.testing.assert_close(value, wanted[key], rtol=2e-3, atol=2e-5, msg=lambda m, key=key: f"{key}: {m}")
        assert key not in moving or not torch.equal(value, before[key]), key
    assert all(p.grad is not None and p.grad.any() for p in small.parameters())


def test_groups_keep_their_settings_and_the_old_optimiser_its_state():
    model, optimizer, _ = trained("SGD")
    kept = pickle.dumps(optimizer.state_dict())
    small = mfp.compact(model, torch.zeros(1, 3, 9, 9))
    new = mfp.compact_optimizer(optimizer, model, small)
    assert [group["weight_decay"] for group in new.param_groups] == [1e-3, 0.0]
    assert sum(len(group["params"]) for group in new.param_groups) == len(list(small.parameters()))
    assert all(p.dim() == 1 for p in new.param_groups[1]["params"])
    for parameter, state in new.state.items():
        assert state["momentum_buffer"].shape == parameter.shape
    step(small, new, 0)
    assert pickle.dumps(optimizer.state_dict()) == kept
    new.load_state_dict(new.state_dict())  # it can be saved and resumed


def test_parameters_for_constants_are_new_and_frozen_ones_stay_out():
    """With live BatchNorm, removed channels leave constants: biases and border maps without a past."""
    torch.manual_seed(0)
    model = Network()
    randomize(model)
    mfp.prune_filters_(mfp.FilterPlan.from_model(model, 0.4), "l2_norm", mask_bn=False)
    model.fc.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01, momentum=0.9)
    step(model, optimizer, 0)
    mfp.prune_filters_(mfp.FilterPlan.from_model(model, 0.4), "l2_norm", mask_bn=False)
    small = mfp.compact(model, torch.zeros(1, 3, 9, 9))
    new = mfp.compact_optimizer(optimizer, model, small)
    (group,) = new.param_groups
    owned = {id(p) for p in group["params"]}
    names = {name for name, p in small.named_parameters() if id(p) in owned}
    fresh = {name for name, p in small.named_parameters() if id(p) in owned and p not in new.state}
    assert fresh == {"add_expand.fill", "add_join.bias", "branch.border", "relu_expand.fill", "up.border"}
    assert names == {name for name, _ in small.named_parameters() if not name.startswith("fc.")}
    step(small, new, 1)
    assert all(p.grad is not None and p.grad.any() for p in group["params"])


def test_what_does_not_belong_together_is_an_error():
    model, optimizer, _ = trained("SGD")
    example = torch.zeros(1, 3, 9, 9)
    with pytest.raises(mfp.MfpError, match="fold_bn=False"):
        mfp.compact_optimizer(optimizer, model, mfp.compact(model, example, fold_bn=True))
    other = torch.optim.SGD(Network().parameters(), 0.1)
    with pytest.raises(mfp.MfpError, match="do not belong together"):
        mfp.compact_optimizer(other, model, mfp.compact(model, example))
