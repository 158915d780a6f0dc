"""Every torchvision classification CNN by name, and the backbones of its segmentation and detection networks."""

import pytest
import torch
import torchvision
from compact_cases import difference, masked, slow
from torch import nn

import mfp

torch.set_num_threads(1)

NAMES = [
    name for name in torchvision.models.list_models(module=torchvision.models)
    if not name.startswith(("vit", "swin", "maxvit"))
]  # fmt: skip
SIZES = {"inception_v3": 80, "alexnet": 96}
LARGE = 60_000_000  # parameters; beyond this the test runs in float32 alone, for its time and memory
# One of each kind is left for every test run, in the form that asks most of the rules: BatchNorm is not masked.
FAST = {
    "alexnet", "convnext_tiny", "efficientnet_b0", "mobilenet_v3_small", "regnet_y_400mf", "resnet18",
    "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_1", "vgg11_bn",
}  # fmt: skip


def build(name: str) -> nn.Module:
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    # regnet computes its widths with tensors, which must have values
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        meta = getattr(torchvision.models, name)(num_classes=10, **options)
    if name.startswith(("vgg", "alexnet")):  # a classifier of 64 instead of 4096 features: not what is tested here
        wide = next(module for module in meta.classifier if isinstance(module, nn.Linear)).in_features
        meta.classifier = nn.Sequential(nn.Linear(wide, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 10))
    model = meta if name.startswith("regnet") else meta.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            fan = max(tensor[0].numel(), 1) if tensor.dim() > 1 else 1
            tensor.data.uniform_(-((3 / fan) ** 0.5), (3 / fan) ** 0.5, generator=generator)
        else:
            tensor.zero_()
    return model


def test_the_list_is_whole():
    assert len(NAMES) >= 68 and set(NAMES) > FAST


CASES = [
    pytest.param(name, mask_bn, marks=() if name in FAST and not mask_bn else slow, id=f"{name}-{mask_bn}")
    for name in NAMES for mask_bn in (True, False)
]  # fmt: skip


@pytest.mark.parametrize(("name", "mask_bn"), CASES)
def test_compact_equals_masked(name, mask_bn):
    size = SIZES.get(name, 40)
    x = torch.randn(1, 3, size, size + 16, generator=torch.Generator().manual_seed(1))
    model = masked(build(name), mask_bn=mask_bn)
    large = sum(parameter.numel() for parameter in model.parameters()) > LARGE
    if not (large or mask_bn):
        model, x = model.double(), x.double()
    small = mfp.compact(model, x[:, :, :, :size])
    with torch.no_grad():
        assert difference(model(x), small(x)) < (1e-5 if x.dtype is torch.float64 else 1e-4)
    # ConvNeXt: 98 % of its multiply-adds are in linear layers, and every depthwise conv is read by a LayerNorm
    assert small.report.flops_saved > (0.01 if name.startswith("convnext") else 0.3)


class Backbone(nn.Module):
    """The part of a detection network that is a CNN."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone = detector.backbone

    def forward(self, x):
        return self.backbone(x)


FAST_PARTS = {"lraspp_mobilenet_v3_large", "retinanet_resnet50_fpn"}


def segmentation(name):
    return getattr(torchvision.models.segmentation, name)(weights=None, weights_backbone=None, num_classes=5)


def detection(name):
    return Backbone(getattr(torchvision.models.detection, name)(weights=None, weights_backbone=None, num_classes=5))


@pytest.mark.parametrize(("kind", "name", "mask_bn"), [
    pytest.param(kind, name, mask_bn, marks=() if name in FAST_PARTS and not mask_bn else slow, id=f"{name}-{mask_bn}")
    for mask_bn in (True, False) for kind, name in [
        (segmentation, "fcn_resnet50"), (segmentation, "deeplabv3_mobilenet_v3_large"),
        (segmentation, "lraspp_mobilenet_v3_large"), (detection, "ssdlite320_mobilenet_v3_large"),
        (detection, "fasterrcnn_mobilenet_v3_large_fpn"), (detection, "retinanet_resnet50_fpn"),
    ]
])  # fmt: skip
def test_segmentation_networks_and_detection_backbones(kind, name, mask_bn):
    torch.manual_seed(0)
    model = masked(kind(name), mask_bn=mask_bn)
    small = mfp.compact(model, torch.randn(1, 3, 64, 64))
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        assert difference(model(x), small(x)) < 1e-4
    assert small.report.flops_saved > 0.3
