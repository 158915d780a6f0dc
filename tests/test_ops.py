"""opcheck on samples of every op: schema, fake kernel, registration. Numbers are tested with each op's own file."""

import pytest
import torch

from mfp import ops  # noqa: F401  (defines the ops)

KEEP = torch.tensor([True, False, True, True, False])


def weights(dtype=torch.float32):
    return [torch.randn(3, 2, 3, 3).to(dtype), torch.randn(2, 4).to(dtype)]


SCORE_SAMPLES = [
    (weights(), [0], [1.0]),
    (weights(), [0, 0, 1, 1, 2, 3], [1.0, 2.0, 1.0, 2.0, 2.0, 2.0]),
    (weights(torch.bfloat16), [2], [2.0]),
    (weights(torch.float16), [1], [1.5]),
    ([torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)], [1], [2.0]),
    ([torch.randn(1, 1)], [3], [2.0]),
    ([torch.randn(7, 2, 3)], [0], [3.0]),
    ([torch.randn(2, 2, 1, 2, 3)], [1, 0], [2.0, 2.0]),
    ([torch.zeros(5, 9)], [2, 3], [2.0, 2.0]),
    ([torch.randn(65, 257)], [1, 1], [1.0, 2.0]),
]
TAYLOR_SAMPLES = [
    (weights(), [0, 4], [1.0, 2.0], weights()),
    (weights(torch.float16), [4], [2.0], weights()),
]
MASK_SAMPLES = [
    ([torch.randn(3, 2), torch.randn(2, 4), torch.randn(4)], KEEP, [0, 3, 3], [3, 2, 2]),
    ([torch.randn(5, 2, 3, 3).to(memory_format=torch.channels_last)], KEEP, [0], [5]),
    ([torch.randn(5).bfloat16()], KEEP, [0], [5]),
    ([torch.randn(0, 3)], KEEP, [2], [0]),
]
PRUNE_SAMPLES = [
    (weights(), [torch.randn(3), torch.randn(4)], [0, 1], [1, 1], [0, 1], [1.0, 2.0], 1, []),
    (weights(torch.float16), [], [], [0, 0], [2], [2.0], 0, []),
    (weights(), [], [], [1, 1], [4], [2.0], 0, weights()),
]


@pytest.mark.parametrize(
    ("name", "sample"),
    [("score_filters", (*sample, [])) for sample in SCORE_SAMPLES]
    + [("score_filters", sample) for sample in TAYLOR_SAMPLES]
    + [("mask_filters_", sample) for sample in MASK_SAMPLES]
    + [("prune_filters_", sample) for sample in PRUNE_SAMPLES],
)
def test_opcheck(name, sample):
    op = getattr(torch.ops.mfp, name).default
    results = torch.library.opcheck(op, sample)
    assert set(results.values()) == {"SUCCESS"} and len(results) == 4


def test_ops_work_on_the_meta_device():
    """Shapes without data: the fake kernels."""
    scores = torch.ops.mfp.score_filters([torch.empty(6, 3, 3, 3, device="meta")], [0, 1], [1.0, 2.0], [])
    assert scores.shape == (2, 6) and scores.dtype == torch.float32 and scores.device.type == "meta"
