"""Scoring: every criterion alone, the paper's five in one call, and weights times gradients."""

import pytest

import mfp


@pytest.mark.parametrize("criterion", [*mfp.PAPER_CRITERIA, "weighted_hybrid", "l3_distance"])
def test_one_criterion(jobs, measure, criterion):
    measure(jobs.scoring((criterion,), []).contestants[0])


def test_five_criteria(jobs, measure):
    measure(jobs.scoring(mfp.PAPER_CRITERIA, []).contestants[0])


def test_weights_times_gradients(jobs, measure):
    measure(jobs.gradients().contestants[0])
