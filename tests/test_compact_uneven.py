"""What is constant or unread in one of two calls, copies or operands, and live and read in the other."""

import pytest
import torch
from compact_cases import compacted, difference, killed, randomize
from torch import nn

import mfp

torch.set_num_threads(1)


class Net(nn.Module):
    """Two convs on the image, the first with a dead filter 1, the second with a dead filter 4; a function of both."""

    def __init__(self, function, **layers):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = killed(nn.Conv2d(3, 8, 3), 1), killed(nn.Conv2d(3, 8, 3), 4)
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.function(self, self.a(x), self.b(x))


def without_inputs(layer, *inputs):
    """The layer, which does not read these inputs."""
    layer.weight.data[:, list(inputs)] = 0
    return layer


def test_a_norm_that_two_tensors_go_through_keeps_what_either_needs():
    net = Net(lambda net, a, b: (net.c(net.norm(a)), net.d(net.norm(b))),
              norm=nn.BatchNorm2d(8), c=nn.Conv2d(8, 5, 1), d=nn.Conv2d(8, 5, 1))  # fmt: skip
    small = compacted(randomize(net), 3, 9, 8)
    assert small.norm.num_features == 8 and small.d.in_channels >= 7
    net = Net(lambda net, a, b: (net.c(net.norm(a)), net.d(net.norm(b))), norm=nn.BatchNorm2d(8),
              c=without_inputs(nn.Conv2d(8, 5, 1), 2, 6), d=without_inputs(nn.Conv2d(8, 5, 1), 3, 6))  # fmt: skip
    assert compacted(randomize(net), 3, 9, 8).norm.num_features == 7  # 6 alone is read by neither


@pytest.mark.parametrize("fold_bn", [False, True])
def test_a_norm_twice_in_a_row_that_gives_constants(fold_bn):
    """None of its channels is needed in the first call, and in the second all are constant."""
    net = Net(lambda net, a, b: (net.norm(net.norm(a)).flatten(2).transpose(1, 2), b), norm=nn.BatchNorm2d(8))
    randomize(net).norm.weight.data.zero_()
    assert compacted(net, 3, 9, 8, fold_bn=fold_bn).report.flops_saved > 0.3


def test_a_conv_that_is_called_twice_keeps_what_lives_in_one_call():
    """Filters 0 to 3 read channels that are constant in the second call."""

    def function(net, a, b):
        return net.c(net.r(a)), net.c(net.r(b))

    r, first = nn.Conv2d(8, 6, 1), [0, 1, 2, 3]
    with torch.no_grad():
        r.weight[:4, 4:], r.weight[4:, :4] = 0, 0
    net = Net(function, r=r, c=nn.Conv2d(6, 5, 1))
    killed(net.b, *first)
    net.b.bias.data[first] = 0.5
    small = compacted(net, 3, 9, 8)
    assert small.a.out_channels == 7 and small.r.out_channels == 6


def test_channels_merged_with_what_stands_before_them_are_needed_if_one_copy_is():
    """[N, 2, 8, H, W] seen as 16 channels: of a reader's inputs, some come from one copy alone."""

    def function(net, a, b):
        pair = torch.stack([a, a * 2], 1)
        return net.c(pair.flatten(1, 2))

    net = Net(function, c=without_inputs(nn.Conv2d(16, 5, 1), 3, 8 + 5, 6, 8 + 6))
    small = compacted(net, 3, 9, 8)
    assert small.a.out_channels == 6  # without the dead 1, and 6 that neither copy is read of


def test_a_stack_is_constant_where_all_of_it_is_the_same():
    def function(net, a, b):
        return net.c(torch.stack([a, b], 2).flatten(2, 3))

    net = Net(function, c=nn.Conv2d(8, 5, 1))
    killed(net.a, 4, 6), killed(net.b, 6)
    assert compacted(net, 3, 9, 8).c.in_channels == 6  # 1 is dead in one of them alone
    net.b.bias.data[6] = 1.0  # constant in both, but not the same
    assert compacted(net, 3, 9, 8).c.in_channels == 7


@pytest.mark.parametrize("base_live", [False, True])
def test_index_copy_into_a_base_that_is_constant_in_part(base_live):
    def function(net, a, b):
        base = a if base_live else a.new_zeros(a.shape)
        return net.c(base.index_copy(1, torch.tensor([0, 2, 3]), b[:, 4:7]))

    net = Net(function, c=nn.Conv2d(8, 5, 1))  # where it shows the base is constant at 1 and live at 4 to 7
    small = compacted(net, 3, 9, 8)
    assert small.c.in_channels == (8 if base_live else 2)


def test_a_product_is_constant_only_where_nothing_of_it_lives():
    small = compacted(Net(lambda net, a, b: net.c(a * (b + 2)), c=nn.Conv2d(8, 5, 1)), 3, 9, 8)
    assert small.a.out_channels == 7 and small.c.in_channels == 7


@pytest.mark.parametrize("fold_bn", [False, True])
@pytest.mark.parametrize(
    "function",
    [
        lambda a, b: a / (b.abs() + 1),  # a slot of zeros below
        lambda a, b: (a * b).abs().log(),  # and of one that was computed
        lambda a, b: (a.abs() + 1).pow(-b.abs()),
        lambda a, b: (a + (a.abs() + b.abs() + 1)).sqrt(),  # what a alone is may be negative
        lambda a, b: torch.atan2(a, b.exp()) + (b.abs() + 0.5).rsqrt(),
    ],
)
def test_slots_that_nobody_reads_never_reach_a_result(function, fold_bn):
    """Channel 5 goes into a reader of its own, but not into that of what is computed from it: zero times infinity."""
    net = Net(lambda net, a, b: (net.r(function(a, b)), net.q(a)), r=without_inputs(nn.Conv2d(16, 4, 3), 5),
              q=nn.Conv2d(16, 4, 3))  # fmt: skip
    net.a, net.b = nn.Conv2d(3, 16, 3), nn.Conv2d(3, 16, 3)
    small = compacted(net, 3, 12, 12, fold_bn=fold_bn)
    net.float()
    x = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        assert difference(net(x), mfp.compact(net, x, fold_bn=fold_bn)(x)) < 1e-5
    assert fold_bn or small.b.out_channels == 15


def test_of_a_quotient_that_nobody_reads_a_real_channel_is_left():
    """Channel 0 is read of neither operand: divided there would be zero by zero."""
    net = Net(lambda net, a, b: (net.r(a / (b.abs() + 1)), net.q(a), net.s(b)), r=nn.Conv2d(8, 4, 1),
              q=without_inputs(nn.Conv2d(8, 4, 1), 0), s=without_inputs(nn.Conv2d(8, 4, 1), 0))  # fmt: skip
    net.r.weight.data.zero_()
    for fold_bn in (False, True):
        small = mfp.compact(net.eval(), torch.randn(1, 3, 9, 9), fold_bn=fold_bn)
        assert small(torch.randn(1, 3, 9, 9))[0].isfinite().all()
