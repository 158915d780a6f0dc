"""Tensors of more than 2^31 elements: every CPU op finds the right ones.

The memory is virtual: numpy's zeros come from pages that exist only when they are written, and reading them costs no
memory either. So a few weights are written at the far end of 2.3 billion, and what the ops compute from them is known
exactly; with 32-bit indices they would be looked for elsewhere, and zeros (or nothing) be found.
"""

import numpy as np
import pytest
import torch

from mfp import ops

pytestmark = pytest.mark.usefixtures("three_threads")

N, K = 5, 2**29  # N * K, and where the last filter starts, are not below 2^31


def virtual(rows: int, size: int) -> torch.Tensor:
    """Zeros in bfloat16, ``[rows, size]``, that take no memory until they are written."""
    try:
        return torch.from_numpy(np.zeros((rows, size), dtype=np.int16)).view(torch.bfloat16)
    except MemoryError:
        pytest.skip("this machine does not lend as much virtual memory")


def test_scores():
    weight = virtual(N, K)
    assert weight[-1].storage_offset() >= 2**31
    weight[-1, -1], weight[-1, -2], weight[-2, -1] = 3.0, -4.0, 3.0  # filters 0, ..., 0, (0, 3) and (-4, 3)
    norm, distance, cosine, hybrid = range(4)
    kinds = [norm, norm, distance, distance, cosine, hybrid]
    scores = ops.score_filters([weight], kinds, [1.0, 2.0, 1.0, 2.0, 2.0, 2.0])
    zeros = N - 2
    expected = [
        [0.0] * zeros + [3.0, 7.0],
        [0.0] * zeros + [3.0, 5.0],
        [3.0 + 7.0] * zeros + [3.0 * zeros + 4.0, 7.0 * zeros + 4.0],
        [3.0 + 5.0] * zeros + [3.0 * zeros + 4.0, 5.0 * zeros + 4.0],
        [2.0] * zeros + [zeros + 0.4, zeros + 0.4],
        [0.0] * zeros + [3.0 * 5.0 * 0.4, 3.0 * 5.0 * 0.4],
    ]
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-5, atol=0)


def test_masking_and_optimizer_steps():
    size = 2**12
    rows = N * K // size
    weight = virtual(rows, size)
    weight[-1], weight[-2] = 2.0, 8.0
    keep = torch.ones(rows, dtype=torch.bool)
    keep[-2] = False
    ops.mask_filters_([weight], keep, [0], [rows])
    assert not weight[-2].any()
    assert (weight[-1] == 2).all()

    keep.logical_not_()  # all pruned but one: only its pages are touched
    keep[-1], keep[-2] = True, False
    keep[:-2] = False
    gradient = virtual(rows, size)
    gradient[-1], gradient[0] = 4.0, 1.0
    ops.masked_sgd_([weight], [gradient], [], keep, [0], [rows], 0.25, 0.0, 0.0, 0.0, False, False, True)
    assert (weight[-1] == 1).all()
    assert not weight[0].any()
