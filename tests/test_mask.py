"""FilterMask on weights, followers, gradients and optimiser state."""

import pytest
import torch
from torch import nn

import mfp
from mfp import ops, reference

pytestmark = pytest.mark.usefixtures("three_threads")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 16, 3, groups=8, padding=1)
        self.bn2 = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 3)
        for bn in (self.bn, self.bn2):
            nn.init.uniform_(bn.weight, 0.5, 1.5)
            nn.init.uniform_(bn.bias, 0.5, 1.5)

    def forward(self, x):
        return self.head(self.bn2(self.depthwise(self.bn(self.conv(x)).relu())).relu().mean((2, 3)))


def masked(mask_bn=True):
    net = Net()
    plan = mfp.FilterPlan.from_model(net, 0.5)
    mask = mfp.FilterMask(plan, torch.tensor([True, False, True, True, False, False, True, False]))
    mask.apply_(mask_bn)
    return net, mask


def zero_rows(parameter):
    return (parameter.detach().flatten(1) == 0).all(1).tolist()


def test_apply_zeroes_filters_and_all_that_follows_them():
    net, mask = masked()
    pruned = (~mask.keep).tolist()
    twice = (~mask.keep).repeat_interleave(2).tolist()
    assert zero_rows(net.conv.weight) == pruned
    assert zero_rows(net.depthwise.weight) == twice
    for parameter, expected in (
        (net.conv.bias, pruned), (net.bn.weight, pruned), (net.bn.bias, pruned),
        (net.depthwise.bias, twice), (net.bn2.weight, twice), (net.bn2.bias, twice),
    ):  # fmt: skip
        assert (parameter == 0).tolist() == expected
    out = net.bn2(net.depthwise(net.bn(net.conv(torch.randn(2, 3, 5, 5))).relu()))
    assert (out == 0).all((0, 2, 3)).tolist() == twice


def test_without_bn_only_weights_are_zeroed():
    net, mask = masked(mask_bn=False)
    assert zero_rows(net.conv.weight) == (~mask.keep).tolist()
    assert zero_rows(net.depthwise.weight) == (~mask.keep).repeat_interleave(2).tolist()
    for parameter in (net.conv.bias, net.bn.weight, net.bn.bias, net.bn2.weight, net.bn2.bias):
        assert parameter.all()


def test_masked_gradients_keep_pruned_filters_zero():
    net, mask = masked()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    kept_before = net.conv.weight[mask.keep].clone()
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.randn(4, 3, 5, 5)).square().sum().backward()
        mask.apply_to_gradients_()
        optimizer.step()
    assert zero_rows(net.conv.weight) == (~mask.keep).tolist()
    assert not net.bn.bias[~mask.keep].any()
    assert not torch.equal(net.conv.weight[mask.keep], kept_before)


def test_missing_gradients_are_skipped():
    net, mask = masked()
    mask.apply_to_gradients_()
    net.conv.weight.grad = torch.ones_like(net.conv.weight)
    mask.apply_to_gradients_()
    assert zero_rows(net.conv.weight.grad) == (~mask.keep).tolist()


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), lambda p: torch.optim.AdamW(p, 0.1)])
def test_optimizer_state_of_pruned_filters_is_zeroed(make):
    net = Net()
    optimizer = make(net.parameters())
    net(torch.randn(4, 3, 5, 5)).square().sum().backward()
    optimizer.step()
    plan = mfp.FilterPlan.from_model(net, 0.5)
    mask = mfp.select_filters(mfp.score_filters(plan, ("l2_norm",)))
    mask.apply_to_optimizer_(optimizer)
    states = [s for s in optimizer.state[net.conv.weight].values() if s.shape == net.conv.weight.shape]
    assert states and all(zero_rows(state) == (~mask.keep).tolist() for state in states)


def test_counts_digest_and_churn():
    _, mask = masked()
    assert mask.kept == {"conv": 4} and mask.num_pruned == 4
    same = mfp.FilterMask(mask.plan, mask.keep.clone())
    other = mfp.FilterMask(mask.plan, torch.tensor([True, True, True, True, False, False, False, False]))
    assert mask.digest == same.digest != other.digest
    assert mask.churn(None) == 1.0 and same.churn(mask) == 0.0 and other.churn(mask) == 0.25
    everything = mfp.FilterMask(mask.plan, torch.ones(8, dtype=torch.bool))
    assert everything.churn(None) == 0.0


def test_a_mask_of_the_wrong_length_or_type_is_refused():
    plan = mfp.FilterPlan.from_model(Net())
    with pytest.raises(mfp.MfpError, match=r"keep must be bool \[8\], got torch.bool \[7\]"):
        mfp.FilterMask(plan, torch.ones(7, dtype=torch.bool))
    with pytest.raises(mfp.MfpError, match=r"keep must be bool \[8\], got torch.float32"):
        mfp.FilterMask(plan, torch.ones(8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_the_op_zeroes_whole_rows_in_any_layout(dtype, backend):
    keep = torch.rand(11) < 0.5
    keep[:2] = torch.tensor([True, False])
    contiguous = torch.randn(11, 3, 5, 5).to(dtype)
    last = contiguous.to(memory_format=torch.channels_last)
    vector, pairs = torch.ones(11).to(dtype), torch.ones(22, 3).to(dtype)
    expected = contiguous * keep[:, None, None, None]
    ops.mask_filters_([contiguous, last, vector, pairs], keep, [0, 0, 0, 0], [11] * 4, backend)
    assert torch.equal(contiguous, expected) and torch.equal(last, expected) and expected.any()
    assert torch.equal(vector, keep.to(dtype))
    assert torch.equal(pairs, keep.repeat_interleave(2)[:, None].to(dtype).expand(22, 3))


def test_the_op_on_nothing_and_on_one_filter():
    ops.mask_filters_([], torch.ones(0, dtype=torch.bool), [], [])
    one = torch.ones(1, 4)
    ops.mask_filters_([one, torch.ones(0, 3)], torch.tensor([False]), [0, 0], [1, 0])
    assert not one.any()
    reference.mask_filters_([torch.ones(0, 3)], torch.tensor([False]), [0], [0])


def test_the_op_refuses_what_does_not_fit():
    keep = torch.ones(4, dtype=torch.bool)
    for tensor, offset, rows in ((torch.ones(4, 2), 1, 4), (torch.ones(5, 2), 0, 4), (torch.ones(4), -1, 4)):
        with pytest.raises(mfp.MfpError, match=r"tensors\[0\].*does not fit"):
            ops.mask_filters_([tensor], keep, [offset], [rows])
    with pytest.raises(mfp.MfpError, match="keep must be a contiguous bool vector"):
        ops.mask_filters_([torch.ones(4)], keep.float(), [0], [4])
    with pytest.raises(mfp.MfpError, match=r"tensors\[0\] is on meta, expected cpu|all must be on one device"):
        ops.mask_filters_([torch.ones(4, device="meta")], keep, [0], [4])
