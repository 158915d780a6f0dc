"""A part of a model that cannot be captured whole: submodule=."""

import copy
from pathlib import Path

import pytest
import torch
from compact_cases import difference, masked
from torch import nn

import mfp
from mfp.errors import CaptureError

torch.set_num_threads(1)


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU())

    def forward(self, x, *, scale=1.0):
        low = self.stem(x) * scale
        return {"low": low, "high": self.down(low)}


class Detector(nn.Module):
    """Keeps the places where its score is high: their number depends on the image."""

    def __init__(self):
        super().__init__()
        self.backbone = Backbone()
        self.score, self.box, self.unused = nn.Conv2d(16, 1, 1), nn.Linear(16, 4), nn.Conv2d(3, 3, 1)

    def forward(self, images):
        x = torch.stack([image - image.mean() for image in images])
        features = self.backbone(x, scale=2.0)["high"]
        found = []
        for scores, feature in zip(self.score(features)[:, 0], features, strict=True):
            if scores.max() < -1e3:
                found.append(None)
            found.append(self.box(feature[:, scores > scores.median()].t()))
        return found


@pytest.fixture
def detector():
    torch.manual_seed(0)
    model = Detector()
    masked(model.backbone, layer_rates={"stem.0": 0.4, "down.0": 0.4})  # both are outputs of this part
    return model.eval()


def images(count=2, height=12, width=8):
    return [torch.randn(3, height, width) for _ in range(count)]


def test_a_decision_on_values_is_one_readable_error(detector, capfd):
    lines = Path(__file__).read_text().splitlines()
    line = next(i for i, text in enumerate(lines, 1) if "if scores.max()" in text)
    with pytest.raises(CaptureError) as caught:
        mfp.compact(detector, (images(),))
    message = str(caught.value)
    assert f"{__file__}:{line} (`if scores.max() < -1e3:`)" in message
    assert 'mfp.compact(model, example, submodule="...")' in message
    assert "\n" not in message and len(message) < 700
    assert capfd.readouterr() == ("", ""), "nothing is printed"


@pytest.mark.parametrize("fold_bn", [False, True])
def test_the_part_alone_is_compacted(detector, fold_bn):
    before = copy.deepcopy(detector)
    example = images()
    small = mfp.compact(detector, (example,), fold_bn, submodule="backbone")
    assert type(small) is Detector and type(detector.backbone) is Backbone
    assert small.backbone.stem.get_submodule("0").out_channels < 16
    assert small.report.flops_saved > 0.3
    for other in (example, images(3, 16, 20)):
        with torch.no_grad():
            assert difference(detector(other), small(other)) < 1e-5
    for key, value in detector.state_dict().items():
        assert torch.equal(value, before.state_dict()[key])
    assert not {p.data_ptr() for p in detector.parameters()} & {p.data_ptr() for p in small.parameters()}


def test_a_part_of_a_part(detector):
    small = mfp.compact(detector, {"images": images()}, submodule="backbone.down")
    assert type(small.backbone) is Backbone and isinstance(small.backbone.down, torch.fx.GraphModule)
    with torch.inference_mode():
        small = mfp.compact(detector, (images(),), submodule="backbone")
        assert difference(detector(example := images()), small(example)) < 1e-5
    small.train()
    assert small.backbone.stem.get_submodule("1").training


def test_a_part_in_train_mode_stays_so(detector):
    detector.train()
    detector.backbone.stem.eval()
    small = mfp.compact(detector, (images(),), submodule="backbone")
    assert small.training and small.backbone.training and detector.training
    assert not small.backbone.stem.get_submodule("1").training
    assert small.backbone.down.get_submodule("1").training


def test_the_whole_can_go_on_from_a_smaller_part(detector):
    small = mfp.compact(detector, (images(),), submodule="backbone.stem")
    again = mfp.compact(small, (images(),), submodule="backbone")
    assert again.backbone.down.get_submodule("0").out_channels < 16
    with torch.no_grad():
        assert difference(detector(example := images()), again(example)) < 1e-5


def test_names_that_do_not_fit(detector):
    with pytest.raises(mfp.MfpError, match="no submodule 'neck'; its parts are backbone, score, box, unused"):
        mfp.compact(detector, (images(),), submodule="neck")
    with pytest.raises(mfp.MfpError, match="does not call its submodule 'unused'"):
        mfp.compact(detector, (images(),), submodule="unused")
