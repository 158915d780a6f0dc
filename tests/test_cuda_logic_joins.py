"""The kernel that adds a branch into a residual stream by index, run on the CPU as in test_cuda_logic.py."""

import cuda_logic
import pytest
import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _device():
    cuda_logic.configure()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 3, 3), (1, 300, 2, 5), (3, 64, 1, 1), (2, 7, 50, 45), (1, 1, 4, 70)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_scatter_add(shape, relu, dtype, channels_last):
    generator = torch.Generator().manual_seed(6)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    residual = torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=layout)
    for count in {0, 1, shape[1] // 2, shape[1]}:
        index = torch.randperm(shape[1], generator=generator)[:count].sort().values
        branch = torch.randn(shape[0], count, *shape[2:], generator=generator).to(dtype)
        branch = branch.contiguous(memory_format=layout)
        expected = residual.float().index_add(1, index, branch.float())
        expected = (expected.relu() if relu else expected).to(dtype)
        actual = residual.clone(memory_format=torch.preserve_format)
        cuda_logic.scatter_add_(actual, branch, index, relu)
        assert torch.equal(actual, expected)


def test_scatter_add_keeps_nan():
    residual = torch.tensor([float("nan"), -1.0, 2.0]).view(1, 3, 1, 1)
    cuda_logic.scatter_add_(residual, torch.ones(1, 1, 1, 1), torch.tensor([1]), True)
    assert residual.flatten()[0].isnan() and residual.flatten()[1:].tolist() == [0.0, 2.0]
