"""When to prune and at which rate."""

import itertools

import pytest

import mfp
from mfp import schedule


def test_every_interval_and_after_the_last():
    points = [epoch for epoch in range(11) if schedule.prune_now(epoch, interval=3, epochs=11)]
    assert points == [2, 5, 8, 10]
    assert [epoch for epoch in range(6) if schedule.prune_now(epoch, interval=2)] == [1, 3, 5]
    assert schedule.prune_now(-1, interval=5)  # before the first epoch


def test_constant_rates():
    assert {schedule.rate_factor(mode, epoch) for mode in ("soft", "hard") for epoch in range(5)} == {1.0}


@pytest.mark.parametrize("mode", ["asymptotic", "cubic"])
def test_growing_rates_rise_to_one(mode):
    factors = [schedule.rate_factor(mode, epoch, 80) for epoch in range(-1, 80)]
    assert factors[0] == 0.0 and factors[-1] == pytest.approx(1.0, abs=1e-12)
    assert all(a < b for a, b in itertools.pairwise(factors))


def test_asymptotic_passes_three_quarters_after_an_eighth():
    assert schedule.rate_factor("asymptotic", 9, 80) == pytest.approx(0.75, abs=1e-9)


def test_cubic_formula():
    assert schedule.rate_factor("cubic", 39, 80) == pytest.approx(1 - 0.5**3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sfot", 1, None), "unknown mode 'sfot': known are soft, hard, asymptotic, cubic"),
        (("soft", 0, None), "interval must be a whole number of epochs, at least 1; got 0"),
        (("soft", 1, 0), "epochs must be a whole number of at least 1, got 0"),
        (("cubic", 1, None), "mode 'cubic' lets the rate grow until the last epoch: give epochs="),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(mfp.MfpError, match=message):
        schedule.check(*arguments)
