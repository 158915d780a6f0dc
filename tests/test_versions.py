"""Autograd notices every write of every op in place, whichever backend does the work.

The compiled ops, on any device, have it from one kernel before the backends (csrc/versions.cpp), so that the CPU and
the meta device stand for CUDA, too. Triton's functions are called directly: triton_cases.py has the same cases.
"""

import pytest
import torch

from mfp import backend, reference

backend.build_info()  # loads the compiled part
KEEP = torch.tensor([True, False, True, True])
SGD = (0.1, 0.9, 0.0, 0.0, False, False, False)
ADAMW = (1e-3, 0.9, 0.999, 1e-8, 0.01, False, 1)
# op: the arguments that follow the tensors it writes to, given a function that makes a tensor of the same size
CASES = {
    "mask_filters_": (1, lambda make: (KEEP, [0], [4])),
    "prune_filters_": (2, lambda make: ([0], [2], [0], [2.0], 0, [])),
    "masked_sgd_": (2, lambda make: (KEEP, [0], [4], *SGD)),
    "masked_adamw_": (3, lambda make: (KEEP, [0], [4], *ADAMW)),
    "scatter_add_": (1, lambda make: (make()[:, :2].contiguous(), torch.tensor([0, 2]), True)),
}  # fmt: skip


def assert_noticed(module, name, device="cpu"):
    """The versions rise, also of what the tensor is a view of, and backward refuses to use what was overwritten."""

    def make():
        return torch.ones(4, 3, 2, 2, device=device)

    count, rest = CASES[name]
    leaf = make().requires_grad_()
    first = leaf * 1
    result = (first * first).sum()
    written = [first.detach(), *(make() for _ in range(count - 1))]
    untouched, before = make(), [tensor._version for tensor in (first, *written)]
    given = [tensor.to(device) if isinstance(tensor, torch.Tensor) else tensor for tensor in rest(make)]
    lists = [[tensor] for tensor in written] if name != "scatter_add_" else written
    if name.startswith("masked"):
        lists.insert(1, [untouched])
    getattr(module, name)(*lists, *given)
    assert all(tensor._version > old for tensor, old in zip((first, *written), before, strict=True))
    assert untouched._version == 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", CASES)
def test_compiled_ops(name, device):
    assert_noticed(torch.ops.mfp, name, device)


@pytest.mark.parametrize("name", CASES)
def test_reference(name):
    assert_noticed(reference, name)


def test_every_op_that_writes_is_among_the_cases():
    writing = {
        name.removeprefix("mfp::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("mfp::") and any(a.is_write for a in torch._C._get_schema(name, "").arguments)
    }
    assert writing == {*CASES, "conv2d_join_", "squeeze_excite_", "batch_norm_training_"}
    for name in writing:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"mfp::{name}", "ADInplaceOrView"), name


def test_inference_tensors_have_no_version():
    with torch.inference_mode():
        weight = torch.ones(4, 3)
        torch.ops.mfp.mask_filters_([weight], KEEP, [0], [4])
    assert weight[1].eq(0).all() and weight[0].eq(1).all()
