"""Compaction on trained weights, whose zeros, scales and BatchNorm statistics are not random."""

import copy

import pytest
import torch
from compact_cases import difference
from sklearn.datasets import load_digits
from torch import nn

import mfp
from mfp.train.models import CifarResNet


@pytest.fixture(scope="module")
def trained():
    """ResNet-8 after two epochs on handwritten digits, better than guessing, and the digits."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    images = nn.functional.interpolate(images, 16).expand(-1, 3, -1, -1).contiguous()
    labels = torch.tensor(digits.target)
    model = CifarResNet(8)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
    for _ in range(2):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        assert (model(images).argmax(1) == labels).float().mean() > 0.5
    return model, images


@pytest.mark.parametrize(("criterion", "rate", "mask_bn", "plan"), [
    ("l1_norm", 0.3, True, {}), ("l2_distance", 0.6, False, {}), ("l1_norm", 0.4, True, {"skip": ()}),
    ("l2_distance", 0.5, True, {"residual": "coupled"}), ("l1_norm", 0.4, False, {"channel_multiple": 8}),
])  # fmt: skip
def test_compact_equals_masked(trained, criterion, rate, mask_bn, plan):
    model, images = trained
    masked = copy.deepcopy(model)
    mfp.prune_filters_(mfp.FilterPlan.from_model(masked, rate, **plan), criterion, mask_bn=mask_bn)
    example = images[:1]
    small, serving = mfp.compact(masked, example), mfp.compact(masked, example, fold_bn=True)
    assert 0.2 < small.report.flops_saved < 0.9
    with torch.no_grad():
        assert difference(small(images[:256]), masked(images[:256])) < 1e-5
        assert difference(serving(images[:256]), masked(images[:256])) < 1e-5
        wide = mfp.compact(masked.double(), example.double())
        assert difference(wide(images[:64].double()), masked(images[:64].double())) < 1e-12
