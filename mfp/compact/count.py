"""Exact counting of multiply-adds and parameters."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from mfp.capture import eval_mode, example_arguments

aten = torch.ops.aten


class _Counter(TorchDispatchMode):
    """Adds up the multiply-adds of every convolution and matrix product that runs inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet is aten.convolution:
            weight, transposed = args[1], args[6]
            positions = args[0] if transposed else result  # each one meets every weight of its group once
            self.total += math.prod(positions.shape[:1] + positions.shape[2:]) * weight.numel()
        elif packet in (aten.mm, aten.bmm):
            self.total += args[0].numel() * args[1].shape[-1]
        elif packet in (aten.addmm, aten.baddbmm):
            self.total += args[1].numel() * args[2].shape[-1]
        elif packet is aten.linear:
            self.total += args[0].numel() * args[1].shape[0]
        elif func.namespace in ("mfp", "mkldnn") and "conv" in packet.__name__:
            raise NotImplementedError(f"the multiply-adds of {func} are not counted")
        return result


def flops(model: nn.Module, example_input: Any) -> int:
    """Multiply-adds of one forward pass in eval mode: convolutions and matrix products, counted as they run.

    >>> mfp.flops(torchvision.models.resnet50(), torch.zeros(1, 3, 224, 224))
    4089184256

    Args:
        example_input: a tensor, a tuple of positional arguments or a dict of named ones; the count is for the
            whole batch that it holds.
    """
    arguments = example_arguments(model, example_input)
    try:  # shapes alone suffice, unless the model keeps tensors that are no parameters or buffers
        return _count(model, arguments, torch.device("meta"))
    except (RuntimeError, NotImplementedError):
        return _count(model, arguments, None)


def _count(model: nn.Module, arguments: dict[str, Any], device: torch.device | None) -> int:
    # Each module once: where one has two names, functional_call with the tensors of both leaves those of the first in
    # the model.
    tensors = {}
    for name, module in model.named_modules() if device else ():
        for key, tensor in (module._parameters | module._buffers).items():
            if tensor is not None:
                tensors[f"{name}.{key}" if name else key] = torch.empty_like(tensor, device=device)
    if device:
        arguments = tree_map_only(Tensor, lambda tensor: tensor.to(device), arguments)
    counter = _Counter()
    # with gradients a serving form runs as torch's own operators
    with eval_mode(model), torch.set_grad_enabled(device is None), counter:
        torch.func.functional_call(model, tensors, (), arguments, tie_weights=False)
    return counter.total


def count_parameters(model: nn.Module) -> int:
    """Number of parameter entries, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
