"""The observer of tests/observer.py against tiny networks whose live multiply-adds are counted by hand."""

import pytest
import torch
from observer import live_multiply_adds, multiply_adds
from torch import nn

IMAGES = torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def dead(conv: nn.Module, *filters: int, bias: bool = False) -> nn.Module:
    conv.weight.data[list(filters)] = 0
    if not bias and conv.bias is not None:
        conv.bias.data[list(filters)] = 0
    return conv


def counts(model: nn.Module, images=IMAGES) -> tuple[float, float]:
    return multiply_adds(model, images), live_multiply_adds(model, images)


def test_filters_and_the_inputs_after_them():
    model = nn.Sequential(dead(nn.Conv2d(4, 8, 3), 0, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    whole, live = counts(model)
    assert whole == 16 * (4 * 9 * 8 + 8 * 2)
    assert live == 16 * (4 * 9 * 6 + 6 * 2)


def test_a_constant_that_is_not_zero_is_dead_unless_a_border_shows():
    for padding, inputs in ((0, 5), (1, 8)):
        first = dead(nn.Conv2d(4, 8, 1, padding=padding), 0, 1, 2, bias=True)
        padded = nn.Sequential(nn.ConstantPad2d(padding, 0.0), nn.Conv2d(8, 2, 1))
        whole, live = counts(nn.Sequential(first, padded))
        edge = 6 + 4 * padding
        assert whole == pytest.approx((6 + 2 * padding) ** 2 * 32 + edge**2 * 16)
        # the border: zeros of the padding beside the constant, so that the channel varies
        assert live == pytest.approx((6 + 2 * padding) ** 2 * 20 + edge**2 * inputs * 2)


def test_a_dead_batchnorm_and_a_channel_of_one_value_in_each_image():
    norm = nn.BatchNorm2d(8)
    norm.weight.data[:3] = 0  # constant: the bias
    assert counts(nn.Sequential(nn.Conv2d(4, 8, 1), norm, nn.Conv2d(8, 1, 1)))[1] == 36 * (32 + 5)
    # pooled to one pixel, channels still vary from image to image
    assert counts(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 2, 1)))[1] == 8


def test_a_constant_up_to_rounding_is_dead():
    model = nn.Sequential(
        dead(nn.Conv2d(4, 8, 1), 0, 1, bias=True), nn.Upsample(scale_factor=1.7, mode="bilinear"), nn.Conv2d(8, 1, 1)
    )
    assert counts(model)[1] == 36 * 4 * 6 + 100 * 6


def test_a_group_goes_only_whole():
    grouped = dead(nn.Conv2d(4, 8, 1, groups=2), 0, 1, 4)  # one group keeps 2 of 4 filters, the other 3
    assert counts(grouped) == (36 * 16, 36 * 16)
    grouped = dead(nn.Conv2d(4, 8, 1, groups=2), 0, 1, 2, 3)
    assert counts(grouped) == (36 * 16, 36 * 8)
    # a group whose inputs are all dead goes as well
    model = nn.Sequential(dead(nn.Conv2d(4, 4, 1), 0, 1), nn.Conv2d(4, 8, 1, groups=2))
    assert counts(model)[1] == 36 * (4 * 2 + 8)


def test_depthwise_convs_lose_single_channels():
    model = nn.Sequential(dead(nn.Conv2d(4, 4, 1), 3), dead(nn.Conv2d(4, 4, 3, groups=4), 0), nn.Conv2d(4, 2, 1))
    assert counts(model) == (36 * 16 + 16 * (36 + 8), 36 * 12 + 16 * (18 + 4))


def test_transposed_convs():
    conv = nn.ConvTranspose2d(4, 6, 2, stride=2)
    conv.weight.data[:, :2] = 0
    model = nn.Sequential(dead(nn.Conv2d(4, 4, 1), 0), conv)
    assert counts(model) == (36 * (16 + 4 * 6 * 4), 36 * (12 + 3 * 4 * 4))
    grouped = nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2)
    grouped.weight.data[2:] = 0  # the second group's three filters
    assert counts(grouped) == (36 * 2 * 6 * 4, 36 * 6 * 4)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers(bias):
    model = nn.Sequential(nn.Flatten(2), dead(nn.Linear(36, 5, bias=bias), 1), nn.ReLU(), nn.Linear(5, 3, bias=bias))
    assert counts(model) == (4 * (36 * 5 + 15), 4 * (36 * 4 + 12))
    flat = nn.Sequential(dead(nn.Conv2d(4, 4, 1), 0), nn.Flatten(), nn.Linear(144, 2, bias=bias))
    assert counts(flat)[1] == 36 * 12 + 108 * 2


class Twice(nn.Module):
    """One conv reads a channel that is dead in the first call only, and one that is dead in both."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = dead(nn.Conv2d(4, 4, 1), 0)

    def forward(self, x):
        mask = torch.tensor([0.0, 0.0, 1.0, 1.0])
        return self.shared(x * mask[:, None, None]) + self.shared(x * mask.roll(1)[:, None, None])


def test_a_module_that_is_called_twice_keeps_what_varies_in_either_call():
    # the second mask is [1, 0, 0, 1]: channels 0, 2 and 3 vary in one of the calls
    assert counts(Twice()) == (2 * 36 * 16, 2 * 36 * 9)


class Attention(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)[:, None]
        if self.fused:
            return nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
        return (tokens @ tokens.transpose(-1, -2)).softmax(-1) @ tokens


@pytest.mark.parametrize("fused", [True, False])
def test_products_of_activations_count_whole(fused):
    images = IMAGES.clone()
    images[:, 0] = 0
    assert counts(Attention(fused), images) == (2 * 36 * 36 * 4, 2 * 36 * 36 * 4)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 2, 1)
        self.drop = nn.Dropout()

    def forward(self, *, pixels, scale):
        assert not self.drop.training
        return {"out": self.conv(pixels) * scale}


def test_named_arguments_and_the_modes_come_back():
    model = Named().train()
    model.conv.eval()
    assert counts(model, {"pixels": IMAGES, "scale": 2.0}) == (36 * 8, 36 * 8)
    assert counts(nn.Conv2d(4, 2, 1), (IMAGES,)) == (36 * 8, 36 * 8)
    assert (model.training, model.conv.training, model.drop.training) == (True, False, True)


class AsksForAShape(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = dead(nn.Conv2d(4, 4, 1, groups=2), 0, 1)

    def forward(self, x):
        assert nn.functional.conv2d(x.to("meta"), self.conv.weight.to("meta"), groups=2).shape == x.shape
        return self.conv(x)


def test_what_computes_a_shape_alone_costs_nothing():
    assert counts(AsksForAShape()) == (36 * 8, 36 * 4)


def test_what_cannot_be_counted_is_an_error():
    lstm = nn.LSTM(4, 4)
    with pytest.raises(NotImplementedError, match="does not know how to count"):
        multiply_adds(lstm, torch.randn(3, 2, 4))
