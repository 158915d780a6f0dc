"""The networks of the zoo: what people prune, each built without a download. tests/zoo.py measures them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from detector import Detector
from torch import Tensor, nn

CLASSES = 10


@dataclass(frozen=True)
class Entry:
    """One network.

    Attributes:
        build: makes it, with whatever parameters; :func:`measure` fills them anew.
        size: height and width of an image.
        example: images ``[B, 3, H, W]`` to what the model is called with, as ``mfp.compact`` takes it.
        submodule: the part that is compacted, where the whole cannot be captured.
        resize: the second batch has other heights and widths too, not only another number of images.
        slow: takes more than its share of the time, left out by ``--fast``.
        known: why *times live* is above its bound; exactness is asked for all the same.
        mask_bn: if not, pruned channels become constants that are not zero, which asks most of the rules.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    size: int = 64
    example: Callable[[Tensor], Any] = field(default=lambda images: images)
    submodule: str | None = None
    resize: bool = True
    slow: bool = False
    known: str | None = None
    mask_bn: bool = True


def torchvision_classifiers() -> Iterator[Entry]:
    import torchvision

    sizes = {"inception_v3": 96}
    for name in torchvision.models.list_models(module=torchvision.models):
        if name.startswith(("vit", "swin", "maxvit")):
            continue
        slow = name.startswith(("regnet_y_128gf", "regnet_y_32gf", "regnet_x_32gf", "wide_resnet101", "resnext101"))
        slow |= name in ("convnext_large", "convnext_base", "efficientnet_v2_l", "efficientnet_b7", "efficientnet_b6")
        entry = Entry(name, "torchvision", lambda n=name: classifier(n), sizes.get(name, 64), slow=slow)
        yield entry
        if not name.startswith(("alexnet", "squeezenet", "convnext")) and (not name.startswith("vgg") or "_bn" in name):
            yield replace(entry, family="torchvision, BatchNorm not masked", mask_bn=False)


def classifier(name: str) -> nn.Module:
    import torchvision

    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = getattr(torchvision.models, name)
    if name.startswith(("vgg", "alexnet")):  # a classifier of 64 instead of 4096 features: not what is tested here
        with torch.device("meta"):
            model = model(num_classes=CLASSES)
        wide = next(module for module in model.classifier if isinstance(module, nn.Linear)).in_features
        model.classifier = nn.Sequential(nn.Linear(wide, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, CLASSES))
        return model.to_empty(device="cpu")
    return model(num_classes=CLASSES, **options)


#: timm, nearly every model file with convs: name[:size]; ! marks networks built for one size, !! those of a fixed one.
TIMM = """
botnet26t_256:128! lambda_resnet26t:128 halonet26t:256 repvgg_a0 mobileone_s0 gernet_s gcresnet33ts coat_lite_tiny!
convmixer_1024_20_ks9_p14:70 convnextv2_atto convnext_atto cpubone_nano csatv2:128 cs3darknet_focus_s cs3darknet_s
cspresnet50 cspnext_tiny davit_tiny densenet121 dla46_c dpn48b edgenext_xx_small efficientformer_l1:224!!
efficientformerv2_s0! efficientnet_b0 tf_efficientnetv2_b0 mnasnet_small mobilenetv2_035 mixnet_s tinynet_e
efficientnet_b0_g16_evos mobilenetv4_conv_small_035 efficientvim_m1 efficientvit_b0 efficientvit_m0:128! fasternet_t0
fastvit_t8 focalnet_tiny_srf gcvit_xxtiny:64! ghostnet_100 ghostnetv3_050 hardcorenas_a hgnetv2_b0 hgnet_tiny
hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2:96 inception_v3:96 inception_v4:96 lcnetv2_small
levit_conv_128s:64! levit_128s:64! lowformer_b0 mambaout_femto coatnet_nano_rw_224:64! convformer_s18 poolformer_s12
mobilenetv3_small_050 lcnet_035 fbnetv3_b mobilevit_xxs mobilevitv2_050 nextvit_small nf_resnet50 nf_ecaresnet26
eca_nfnet_l0 nf_regnet_b0 pit_ti_224:64! pvt_v2_b0 rdnet_tiny regnetx_002 regnety_002 regnetz_005 repghostnet_050
repvit_m0_9 res2net50_26w_4s res2next50 resnest14d resnet10t resnet50d seresnet50 ecaresnet26t resnetblur50 resnetaa50
seresnext26d_32x4d resnetv2_18 resnetv2_50 resnetv2_50x1_bit rexnet_100 selecsls42 legacy_seresnet18 skresnet18
starnet_s050 swiftformer_xs tresnet_m vgg11 visformer_tiny:64! ese_vovnet19b_slim_dw ese_vovnet19b_dw legacy_xception
xception41 shvit_s1 tiny_vit_5m_224:64 nasnetalarge:96 pnasnet5large:96 mobilenetv5_base
test_byobnet test_convnext2 test_convnext3 test_efficientnet test_efficientnet_evos test_mambaout test_nfnet test_resnet
"""
TIMM_OPTIONS = {"vgg11": {"mlp_ratio": 1 / 16}}  # 256 features instead of 4096
TIMM_SLOW = ("nasnetalarge", "pnasnet5large", "mobilenetv5_base", "inception_resnet_v2")


def timm_networks() -> Iterator[Entry]:
    for line in TIMM.split():
        name, _, size = line.rstrip("!").partition(":")
        fixed = line.endswith("!")
        options = dict(TIMM_OPTIONS.get(name, {}))
        if fixed and not line.endswith("!!"):
            options["img_size"] = int(size or 64)
        yield Entry(
            name, "timm", lambda n=name, o=options: timm_network(n, o), int(size or 64),
            resize=not fixed, slow=name in TIMM_SLOW,
        )  # fmt: skip


def timm_network(name: str, options: dict[str, Any]) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=CLASSES, **options)


SMALL = {"hidden_sizes": [32, 64, 96, 128], "depths": [1, 1, 2, 1]}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "ResNet": {"embedding_size": 16, **SMALL},
    "ResNet-basic": {"embedding_size": 16, "layer_type": "basic", **SMALL},
    "RegNet": {"embedding_size": 16, "groups_width": 16, **SMALL},
    "RegNet-x": {"embedding_size": 16, "groups_width": 16, "layer_type": "x", **SMALL},
    "MobileNetV1": {"depth_multiplier": 0.5},
    "MobileNetV2": {"depth_multiplier": 0.5},
    "ConvNext": SMALL,
    "ConvNextV2": SMALL,
    "EfficientNet": {"width_coefficient": 0.5, "depth_coefficient": 1.0, "hidden_dim": 640},
    "Bit": {"embedding_size": 16, "num_groups": 8, **SMALL},
    "Bit-bottleneck": {"embedding_size": 16, "num_groups": 8, "layer_type": "bottleneck", **SMALL},
}


@contextlib.contextmanager
def without_own_folders() -> Iterator[None]:
    """transformers looks for a package `kernels`, and in this project's root it finds the folder of that name."""
    root, path = Path(__file__).resolve().parent.parent, list(sys.path)
    sys.path[:] = [folder for folder in path if Path(folder or ".").resolve() != root]
    try:
        yield
    finally:
        sys.path[:] = path


def transformers_network(name: str) -> nn.Module:
    with without_own_folders():
        import transformers

        kind = name.partition("-")[0]
        config = getattr(transformers, f"{kind}Config")(num_labels=CLASSES, **TRANSFORMERS[name])
        return getattr(transformers, f"{kind}ForImageClassification")(config)


def transformers_networks() -> Iterator[Entry]:
    for name in TRANSFORMERS:
        yield Entry(name, "transformers", lambda n=name: transformers_network(n), example=lambda x: {"pixel_values": x})


DECODERS = ("Unet", "UnetPlusPlus", "FPN", "PSPNet", "DeepLabV3Plus", "Linknet", "MAnet", "PAN", "UPerNet")
ENCODERS = ("resnet18", "efficientnet-b0", "timm-mobilenetv3_small_100")


def smp_network(decoder: str, encoder: str) -> nn.Module:
    import segmentation_models_pytorch as smp

    return getattr(smp, decoder)(encoder, encoder_weights=None, classes=4)


def smp_networks() -> Iterator[Entry]:
    for decoder in DECODERS:
        for encoder in ENCODERS:
            size = 128 if decoder == "PAN" else 64
            yield Entry(
                f"{decoder}/{encoder}",
                "segmentation_models_pytorch",
                lambda d=decoder, e=encoder: smp_network(d, e),
                size,
            )


SEGMENTATION = ("deeplabv3_resnet50", "fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large")
DETECTION = (
    "fasterrcnn_resnet50_fpn", "fasterrcnn_mobilenet_v3_large_fpn", "retinanet_resnet50_fpn", "fcos_resnet50_fpn",
    "ssdlite320_mobilenet_v3_large", "ssd300_vgg16", "maskrcnn_resnet50_fpn",
)  # fmt: skip


def segmentation(name: str) -> nn.Module:
    import torchvision

    return getattr(torchvision.models.segmentation, name)(weights=None, weights_backbone=None, num_classes=4)


def detection(name: str) -> nn.Module:
    import torchvision

    size = {} if name.startswith("ssd") else {"min_size": 64, "max_size": 128}
    return getattr(torchvision.models.detection, name)(weights=None, weights_backbone=None, num_classes=4, **size)


def torchvision_tasks() -> Iterator[Entry]:
    for name in SEGMENTATION:
        yield Entry(name, "torchvision segmentation", lambda n=name: segmentation(n))
    for name in DETECTION:
        yield Entry(
            name, "torchvision detection", lambda n=name: detection(n), example=lambda x: (list(x),),
            submodule="backbone", resize=False,
        )  # fmt: skip


def own_detectors() -> Iterator[Entry]:
    yield Entry("C2f, distances, head per level", "one-stage detector", Detector)
    yield Entry("CSP, anchors, shared head", "one-stage detector", lambda: Detector(shared=True))


ZOO: list[Entry] = [
    *torchvision_classifiers(), *timm_networks(), *transformers_networks(), *smp_networks(), *torchvision_tasks(),
    *own_detectors(),
]  # fmt: skip
