"""Networks of torchvision's families with a block or two a stage and few channels: a capture takes a second.

Each holds what makes its family unlike the others. The real networks, at their size, are in tests/zoo.py.
"""

from collections.abc import Callable
from functools import partial

from torch import nn
from torchvision import models
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.segmentation.lraspp import LRASPP

from mfp.train.models import CifarResNet

CLASSES = 10


def resnet_of(block: type[nn.Module], **options: int) -> nn.Module:
    """Three stages of torchvision's four: shortcuts without and with a conv."""
    network = models.ResNet(block, [2, 1, 1, 1], CLASSES, **options)
    network.layer4, network.fc = nn.Identity(), nn.Linear(256 * block.expansion, CLASSES)
    return network


def vgg_bn() -> nn.Module:
    """Convs without a residual stream, and an image flattened to 49 pixels a channel before the linear layers."""
    layers = models.vgg.make_layers([16, "M", 24, 24, "M", 32, "M"], batch_norm=True)
    classifier = nn.Sequential(nn.Linear(32 * 49, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, CLASSES))
    network = nn.Sequential()
    network.features, network.pool = layers, nn.AdaptiveAvgPool2d(7)
    network.flatten, network.classifier = nn.Flatten(), classifier
    return network


def mobilenet_v3() -> models.MobileNetV3:
    """Depthwise convs, squeeze-excite, hardswish; blocks with and without expansion, with and without a sum."""
    block = partial(models.mobilenetv3.InvertedResidualConfig, width_mult=1.0, dilation=1)
    blocks = [
        block(16, 3, 16, 16, True, "RE", 2), block(16, 3, 40, 24, False, "RE", 2), block(24, 5, 56, 24, True, "HS", 1),
        block(24, 5, 64, 32, True, "HS", 2),
    ]  # fmt: skip
    network = models.MobileNetV3(blocks, 64, CLASSES)
    for layer in network.classifier.children():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()  # torchvision begins with weights so small that the image hardly matters
    return network


def efficientnet_b() -> models.EfficientNet:
    """Squeeze-excite, SiLU, stochastic depth."""
    block = partial(models.efficientnet.MBConvConfig, width_mult=1.0, depth_mult=1.0)
    blocks = [block(1, 3, 1, 32, 16, 1), block(4, 3, 2, 16, 24, 2), block(4, 5, 2, 24, 40, 1)]
    return models.EfficientNet(blocks, 0.2, num_classes=CLASSES, last_channel=96)


def convnext_() -> models.ConvNeXt:
    """LayerNorm, layer scale, linear layers as 1x1 convs, channels last inside."""
    block = models.convnext.CNBlockConfig
    return models.ConvNeXt(
        [block(24, 48, 2), block(48, 64, 1), block(64, None, 1)], layer_scale=0.5, num_classes=CLASSES
    )


def regnet_of(squeeze: float | None) -> models.RegNet:
    """Convs with groups, and squeeze-excite (RegNetY) or none (RegNetX)."""
    return models.RegNet(
        models.regnet.BlockParams([1, 2, 1], [32, 48, 96], [16] * 3, [1.0] * 3, [2] * 3, squeeze), CLASSES
    )


def feature_pyramid() -> nn.Module:
    """The backbone of a detection network: several levels, upsampled and added."""
    widths = {"layer1": 64, "layer2": 128, "layer3": 256}
    levels = {name: str(i) for i, name in enumerate(widths)}
    return BackboneWithFPN(resnet_of(models.resnet.BasicBlock), levels, list(widths.values()), 32)


def lraspp() -> nn.Module:
    """A segmentation network: a gate from pooled pixels, two levels, an upsampling to the image's size."""
    backbone = IntermediateLayerGetter(mobilenet_v3().features, {"2": "low", "5": "high"})
    return LRASPP(backbone, 24, 192, 5, inter_channels=32)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "cifar resnet": lambda: CifarResNet(8),
    "resnet": lambda: resnet_of(models.resnet.BasicBlock),
    "resnet bottleneck": lambda: resnet_of(models.resnet.Bottleneck),
    "resnext": lambda: resnet_of(models.resnet.Bottleneck, groups=8, width_per_group=8),
    "vgg_bn": vgg_bn,
    "densenet": lambda: models.DenseNet(8, (2, 2, 2), 16, num_classes=CLASSES),
    "mobilenet_v2": lambda: models.MobileNetV2(CLASSES, 0.25, [[1, 32, 1, 1], [6, 64, 2, 2], [6, 96, 2, 1]]),
    "mobilenet_v3": mobilenet_v3,
    "efficientnet": efficientnet_b,
    "regnet_x": lambda: regnet_of(None),
    "regnet_y": lambda: regnet_of(0.25),
    "shufflenet": lambda: models.ShuffleNetV2([2, 2, 1], [24, 24, 48, 64, 96], CLASSES),
    "convnext": convnext_,
    "feature pyramid": feature_pyramid,
    "lraspp": lraspp,
}
