"""A fast selection of the zoo, of every family and every kind of operator; `make zoo` measures all of it."""

import pytest
import torch
from zoo import ENTRIES, EXACT, TIMES_LIVE, measure

#: timm's model files that a compaction can be measured on: those whose networks have convs to prune.
MODEL_FILES = 60

#: What each stands for is what makes it unlike the others.
FAST = {
    "torchvision: alexnet": "no norms, adaptive pooling, flatten before linear layers",
    "torchvision: resnet18": "residual streams",
    "torchvision: shufflenet_v2_x0_5": "channel shuffle, chunk and concatenation",
    "torchvision: squeezenet1_1": "concatenation, a conv as classifier",
    "timm: fasternet_t0": "convs of a part of the channels",
    "timm: hgnetv2_b0": "learned scalar affine, padding by one side, concatenation of many",
    "timm: mobilenetv4_conv_small_035": "depthwise convs",
    "timm: resnetv2_18": "norm before conv",
    "timm: starnet_s050": "products of two branches",
    "timm: vgg11": "linear layers written as convs, shape-dependent branch",
    "timm: test_byobnet": "several kinds of block",
    "timm: test_convnext3": "LayerNorm, layer scale, linear layers as 1x1 convs",
    "timm: test_efficientnet": "squeeze-excite, inverted residuals",
    "timm: test_efficientnet_evos": "a norm of timm's own",
    "timm: test_nfnet": "standardized weights",
    "timm: test_resnet": "average pooling in shortcuts",
    "transformers: ConvNext": "named arguments, ModelOutput, channels last inside",
    "transformers: RegNet-x": "convs with groups",
    "transformers: ResNet-basic": "named arguments, ModelOutput",
    "segmentation_models_pytorch: PSPNet/resnet18": "pyramid of poolings, bilinear upsampling",
    "segmentation_models_pytorch: Unet/resnet18": "skip connections, nearest upsampling",
    "one-stage detector: C2f, distances, head per level": "decoding of boxes, several outputs",
}
#: BatchNorm is left as it is: pruned channels become constants that are not zero.
UNMASKED = ("torchvision: resnet18", "timm: test_efficientnet", "transformers: RegNet-x")


@pytest.mark.parametrize("name", FAST)
def test_exact_and_as_small_as_an_observer_sees(name):
    check(measure(ENTRIES[name]))


@pytest.mark.parametrize("name", UNMASKED)
def test_with_batchnorm_unmasked(name):
    check(measure(ENTRIES[name], mask_bn=False))


def check(result):
    assert "error" not in result, result["traceback"]
    assert not result["known"]
    assert result["float32"] <= EXACT[torch.float32]
    assert result["float64"] <= EXACT[torch.float64]
    assert result["live"] < 0.99 * result["before"]  # else there was nothing to remove
    assert result["times_live"] <= TIMES_LIVE
    assert not result["failed"]


def test_a_result_that_is_not_exact_or_not_small_is_a_failure(monkeypatch):
    """The zoo itself can fail: on a network that lost nothing, and on one that computes something else."""
    entry = ENTRIES["timm: test_byobnet"]

    def dense(model, example):
        report = type("Report", (), {"kept_because": []})
        changed = torch.nn.Sequential(model, torch.nn.Hardtanh(-0.5, 0.5))
        changed.report = report
        return changed

    monkeypatch.setattr("mfp.compact", dense)
    failed = measure(entry)["failed"]
    assert len(failed) == 3
    assert "times live" in failed[0]
    assert "float32" in failed[1]
    assert "float64" in failed[2]


def test_an_error_is_a_result(monkeypatch):
    monkeypatch.setattr("mfp.compact", lambda *_, **__: 1 / 0)
    result = measure(ENTRIES["timm: test_byobnet"])
    assert result["error"].startswith("ZeroDivisionError: division by zero (test_zoo.py:")
    assert result["failed"] == [result["error"]]


def test_the_zoo_is_as_wide_as_it_says():
    from timm.models import _registry

    families = {}
    for entry in ENTRIES.values():
        families.setdefault(entry.family, set()).add(entry.name)
    assert len(families["torchvision"]) >= 68
    files = {_registry._model_to_module[name] for name in families["timm"]}
    assert len(files) >= MODEL_FILES
    assert len(families["segmentation_models_pytorch"]) == 27
