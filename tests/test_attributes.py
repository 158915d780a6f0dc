"""Meta-attributes and the re-estimation of BatchNorm statistics."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mfp
from mfp import attributes


def data(batches=3, size=8, classes=7):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 3, 6, 6, generator=generator), torch.randint(0, classes, (size,), generator=generator))
        for _ in range(batches)
    ]


def network(classes=7):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(192, classes),
    )


def test_shares_of_energy_and_mass():
    scores = {"l2_norm": torch.tensor([1.0, 2.0, 3.0]), "l1_norm": torch.tensor([1.0, 2.0, 5.0])}
    keep = torch.tensor([False, True, True])
    assert attributes.weight_energy(scores, keep) == pytest.approx(13 / 14)
    assert attributes.sparsity(scores, keep) == pytest.approx(7 / 8)
    nothing = {"l2_norm": torch.zeros(3), "l1_norm": torch.zeros(3)}
    assert attributes.weight_energy(nothing, keep) == attributes.sparsity(nothing, keep) == 1.0


def test_measures_are_those_of_all_samples_together():
    model, batches = network().eval(), [*data(), *data(1, size=3)]
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    with torch.no_grad():
        logits = model(inputs)
    measured = attributes.measure(model, batches)
    assert measured["loss"] == pytest.approx(float(F.cross_entropy(logits, targets)), rel=1e-5)
    ranks = (logits > logits.gather(1, targets[:, None])).sum(1)
    assert measured["top1_error"] == pytest.approx(float((ranks >= 1).float().mean()))
    assert measured["top5_error"] == pytest.approx(float((ranks >= 5).float().mean()))
    assert 0 < measured["top5_error"] < measured["top1_error"] < 1


def test_fewer_than_five_classes():
    assert attributes.measure(network(3).eval(), data(classes=3))["top5_error"] == 0.0


def test_batchnorm_statistics_are_averages_over_the_batches():
    model, batches = network(), data()
    model[1].running_mean.fill_(100.0)
    outputs = [model[0](inputs).detach() for inputs, _ in batches]
    mean = torch.stack([out.mean((0, 2, 3)) for out in outputs]).mean(0)
    variance = torch.stack([out.var((0, 2, 3)) for out in outputs]).mean(0)
    mfp.recalibrate_batchnorm(model, batches)
    torch.testing.assert_close(model[1].running_mean, mean)
    torch.testing.assert_close(model[1].running_var, variance)


def test_recalibration_touches_nothing_else():
    model = network()
    model[0].eval()
    model[1].momentum = 0.3
    weights = {name: value.clone() for name, value in model.named_parameters()}
    random = torch.get_rng_state()
    flags = [module.training for module in model.modules()]
    mfp.recalibrate_batchnorm(model, data())
    assert torch.equal(random, torch.get_rng_state())
    assert flags == [module.training for module in model.modules()] and not all(flags)
    assert all(torch.equal(weights[name], value) for name, value in model.named_parameters())
    assert model[1].momentum == 0.3


def test_recalibration_without_batches_changes_nothing():
    model = network()
    model[1].running_mean.fill_(5.0)
    with pytest.raises(mfp.MfpError, match="recalibrate_batchnorm: no batches"):
        mfp.recalibrate_batchnorm(model, [])
    assert (model[1].running_mean == 5.0).all()
    mfp.recalibrate_batchnorm(nn.Sequential(nn.Linear(2, 2)), [(torch.ones(1, 2), None)])  # no BatchNorm: nothing to do


@pytest.mark.parametrize(
    ("attribute", "calibration", "message"),
    [
        ("los", None, "unknown attribute 'los': known are weight_energy, sparsity, loss, top1_error, top5_error"),
        ("loss", None, "attribute 'loss' is measured on data: give calibration="),
        ("top5_error", [], "attribute 'top5_error' is measured on data: give calibration="),
    ],
)
def test_bad_arguments(attribute, calibration, message):
    with pytest.raises(mfp.MfpError, match=message):
        attributes.check(attribute, calibration)
