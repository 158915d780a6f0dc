"""Convolutions of the serving form, layer by layer: mfp's op against oneDNN's with packed weights, as torch runs it."""

import pytest
import torch

from mfp import layer_ops
from mfp.serving.modules import ONEDNN, ServingConv2d

# (image size, inputs, filters, kernel, stride, channels of the residual or 0): ResNet-50, dense and at rate 0.4
LAYERS = [
    (224, 3, 64, 7, 2, 0), (224, 3, 40, 7, 2, 0),
    (56, 64, 64, 3, 1, 0), (56, 40, 40, 3, 1, 0), (56, 256, 64, 1, 1, 0), (56, 256, 40, 1, 1, 0),
    (56, 64, 256, 1, 1, 256), (56, 40, 160, 1, 1, 256), (56, 80, 80, 3, 2, 0), (28, 80, 320, 1, 1, 512),
    (14, 256, 256, 3, 1, 0), (14, 160, 160, 3, 1, 0), (14, 256, 1024, 1, 1, 1024), (14, 160, 616, 1, 1, 1024),
    (7, 512, 512, 3, 1, 0), (7, 312, 312, 3, 1, 0), (7, 2048, 312, 1, 1, 0), (7, 312, 1232, 1, 1, 2048),
]  # fmt: skip


def text(layer) -> str:
    size, inputs, filters, kernel, stride, residual = layer
    join = f"-into-{residual}" if residual else ""
    return f"{inputs}-to-{filters}{join}-{kernel}x{kernel}-stride{stride}-at{size}"


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("layer", LAYERS, ids=text)
@pytest.mark.parametrize("who", ["mfp", "oneDNN"])
def test_conv(benchmark, who, layer, batch):
    if not ONEDNN:
        pytest.skip("this torch has no packed convolutions of oneDNN")
    size, inputs, filters, kernel, stride, channels = layer
    torch.manual_seed(0)
    conv = ServingConv2d(inputs, filters, kernel, stride, kernel // 2, activation="none" if channels else "relu").eval()
    x = torch.randn(batch, inputs, size, size).contiguous(memory_format=torch.channels_last)
    index = torch.randperm(max(channels, filters))[:filters].sort().values
    with torch.inference_mode():
        right = conv(x)
        residual = torch.randn(batch, max(channels, filters), *right.shape[2:])
        residual = residual.contiguous(memory_format=torch.channels_last)
        winograd = conv.is_for_winograd(x)
        weight, bias = conv.pack(winograd)
        geometry = conv.stride, conv.padding, conv.dilation
        packed = conv.pack_for_onednn(x.shape)

        def mfp():
            if channels:
                return layer_ops.conv2d_join_(residual, x, weight, bias, index, *geometry, True, winograd)
            return layer_ops.conv2d(x, weight, bias, filters, *geometry, "relu", winograd)

        def onednn():
            activation = "none" if channels else "relu"
            branch = torch.ops.mkldnn._convolution_pointwise(
                x, packed, conv.bias, conv.padding, conv.stride, conv.dilation, 1, activation, [], ""
            )
            return layer_ops.scatter_add_(residual, branch, index, True) if channels else branch

        run = mfp if who == "mfp" else onednn
        if channels:
            expected = residual.index_add(1, index, right).relu()
            run()
            assert (residual - expected).abs().max() < 1e-5 * expected.abs().max()
        else:
            assert (run() - right).abs().max() < 1e-5 * right.abs().max()
        benchmark.extra_info["multiply-adds"] = right.numel() * conv.weight[0].numel()
        benchmark.pedantic(run, rounds=20, warmup_rounds=2)


# (image size, channels, of a group, stride): MobileNetV2's, RegNetY-400MF's, ResNeXt-50's, RegNetX-400MF's and -1.6GF's
GROUPED = [
    (112, 32, 1, 1), (112, 96, 1, 2), (56, 144, 1, 1), (56, 88, 1, 1), (14, 384, 1, 1), (14, 232, 1, 1), (7, 960, 1, 1),
    (112, 48, 8, 2), (28, 104, 8, 1), (14, 208, 8, 1), (14, 128, 8, 1), (7, 440, 8, 1), (56, 128, 4, 1),
    (14, 512, 4, 1), (14, 160, 16, 1), (7, 400, 16, 1), (28, 168, 24, 1), (14, 408, 24, 1),
]  # fmt: skip


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize(("size", "channels", "width", "stride"), GROUPED)
@pytest.mark.parametrize("who", ["mfp", "oneDNN"])
def test_conv_with_groups(benchmark, who, size, channels, width, stride, batch):
    if not ONEDNN:
        pytest.skip("this torch has no packed convolutions of oneDNN")
    torch.manual_seed(0)
    groups = channels // width
    conv = ServingConv2d(channels, channels, 3, stride, 1, groups=groups, activation="relu6").eval()
    x = torch.randn(batch, channels, size, size).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        packed = conv.pack_for_onednn(x.shape)
        assert conv.runs_op(x)

        def mfp():
            return conv(x)

        def onednn():
            return torch.ops.mkldnn._convolution_pointwise(
                x, packed, conv.bias, conv.padding, conv.stride, conv.dilation, groups, "hardtanh", [0.0, 6.0], ""
            )

        assert (mfp() - onednn()).abs().max() < 1e-5 * onednn().abs().max()
        benchmark.extra_info["multiply-adds"] = mfp().numel() * 9 * width
        benchmark.pedantic(mfp if who == "mfp" else onednn, rounds=20, warmup_rounds=2)
