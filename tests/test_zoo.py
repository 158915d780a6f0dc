"""A fast selection of the zoo, of every family and every kind of operator; `make zoo` measures all of it."""

from dataclasses import replace

import pytest
import torch
from small_networks import NETWORKS
from zoo import ENTRIES, EXACT, TIMES_LIVE, measure
from zoo_networks import Entry

#: timm's model files that a compaction can be measured on: those whose networks have convs to prune.
MODEL_FILES = 60

#: What each stands for is what makes it unlike the others.
FAST = {
    "torchvision: alexnet": "no norms, adaptive pooling, flatten before linear layers",
    "torchvision: squeezenet1_1": "concatenation, a conv as classifier",
    "timm: fasternet_t0": "convs of a part of the channels",
    "timm: hgnetv2_b0": "learned scalar affine, padding by one side, concatenation of many",
    "timm: resnetv2_18": "norm before conv",
    "timm: starnet_s050": "products of two branches",
    "timm: vgg11": "linear layers written as convs, shape-dependent branch",
    "timm: test_byobnet": "several kinds of block",
    "timm: test_convnext3": "LayerNorm, layer scale, linear layers as 1x1 convs, channels last inside",
    "timm: test_efficientnet": "squeeze-excite, depthwise convs",
    "timm: test_efficientnet_evos": "a norm of timm's own",
    "timm: test_nfnet": "standardized weights",
    "timm: test_resnet": "residual streams, average pooling in shortcuts",
    "transformers: ResNet-basic": "named arguments, ModelOutput",
    "segmentation_models_pytorch: PSPNet/resnet18": "pyramid of poolings, bilinear upsampling",
    "segmentation_models_pytorch: Unet/resnet18": "skip connections, nearest upsampling",
    "one-stage detector: C2f, distances, head per level": "decoding of boxes, several outputs",
}
#: Of tests/small_networks.py, where the real one takes long and no small one is in the zoo.
SMALL = ("shufflenet", "regnet_y", "densenet")
#: In serving form: norms before convs and behind concatenations, squeeze-excite, SiLU, groups, several outputs.
SERVED = (
    "timm: resnetv2_18", "timm: test_efficientnet", "timm: test_byobnet", "transformers: ResNet-basic",
    "one-stage detector: C2f, distances, head per level",
)  # fmt: skip
#: BatchNorm is left as it is: pruned channels become constants that are not zero.
UNMASKED = ("timm: test_resnet", "timm: test_efficientnet", "transformers: RegNet-x")


@pytest.mark.parametrize("name", FAST)
def test_exact_and_as_small_as_an_observer_sees(name):
    assert not ENTRIES[name].known
    check(measure(ENTRIES[name]))


@pytest.mark.parametrize("name", SMALL)
def test_small_networks(name):
    check(measure(Entry(name, "small", NETWORKS[name])))


@pytest.mark.parametrize("name", SERVED)
def test_serving_form_read_recorded_and_replayed(name):
    result = measure(ENTRIES[name], serving=True)
    assert not result["failed"], result.get("traceback", result["failed"])
    assert result["replayed"]


@pytest.mark.parametrize("name", UNMASKED)
def test_with_batchnorm_unmasked(name):
    check(measure(replace(ENTRIES[name], mask_bn=False)))


def check(result):
    assert "error" not in result, result["traceback"]
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
    assert len(families["torchvision, BatchNorm not masked"]) >= 56
    files = {_registry._model_to_module[name] for name in families["timm"]}
    assert len(files) >= MODEL_FILES
    assert len(families["segmentation_models_pytorch"]) == 27
