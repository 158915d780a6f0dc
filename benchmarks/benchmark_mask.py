"""Zeroing the pruned filters, alone and in the whole pruning step; each beside what a torch loop takes."""

import pytest


@pytest.mark.parametrize("who", [0, 1], ids=["mfp", "torch"])
def test_mask(jobs, measure, who):
    measure(jobs.masking().contestants[who])


@pytest.mark.parametrize("who", [0, 1], ids=["mfp", "torch"])
def test_pruning_step(jobs, measure, who):
    measure(jobs.pruning_step().contestants[who])
