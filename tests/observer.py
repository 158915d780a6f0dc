"""An observer who knows no rules of compaction: he watches a network run and sees which channels never vary.

He judges how small a compact network could be. He shares no code with mfp and knows neither its graph nor its masks: a
filter is dead when its weights are zero, an input channel of a layer is dead when it has one and the same value in all
images and at all places. What a layer costs then falls by the live share of its inputs and the live share of its
filters; in a conv with groups a group goes only whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
#: A constant that was computed (by a bilinear upsampling, say) differs from place to place in its last bits.
ROUNDING = 1e-6
#: Operators that multiply and add, but not in a way that is watched here: better no count than a wrong one.
UNWATCHED = ("mv", "addmv", "dot", "mkldnn_rnn_layer", "_native_multi_head_attention")


@dataclass
class Call:
    """One convolution or matrix product that ran.

    Attributes:
        multiply_adds: as it ran.
        weight: filter by filter, ``[N, ...]``; None for a product of two activations, which counts whole.
        inputs: bool ``[C]``, True for channels that vary.
        layer: equal for all calls that read the same weight.
    """

    multiply_adds: int
    weight: Tensor | None = None
    inputs: Tensor | None = None
    groups: int = 1
    layer: Any = None


class Observer(TorchDispatchMode):
    """Writes down every convolution and matrix product that runs inside the block.

    Args:
        model: whose parameters tell a linear layer from a product of two activations.
        look: whether channels that vary are looked for, or calls only counted.
    """

    def __init__(self, model: nn.Module, look: bool) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.look = look
        self.parameters = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if isinstance(result, Tensor) and result.is_meta:  # only a shape was asked for
            return result
        if packet is aten.convolution:
            self.convolution(*args[:2], result, transposed=args[6], groups=args[8])
        elif packet is aten.linear:
            self.product(args[0], args[1].t())
        elif packet in (aten.mm, aten.bmm):
            self.product(*args[:2])
        elif packet in (aten.addmm, aten.baddbmm):
            self.product(*args[1:3])
        elif packet is aten._scaled_dot_product_flash_attention_for_cpu:
            query, key, value = args[:3]
            self.calls.append(Call(query.numel() * key.shape[-2] + query[..., 0].numel() * value.shape[-2:].numel()))
        elif packet.__name__ in UNWATCHED or (func.namespace == "mfp" and "conv" in packet.__name__):
            raise NotImplementedError(f"the observer does not know how to count {func}")
        return result

    def convolution(self, x: Tensor, weight: Tensor, result: Tensor, transposed: bool, groups: int) -> None:
        batched = x.dim() == weight.dim()
        x, result = (x, result) if batched else (x[None], result[None])
        positions = x if transposed else result  # each one meets every weight of its group once
        multiply_adds = positions.shape[0] * math.prod(positions.shape[2:]) * weight.numel()
        filters = weight
        if transposed:  # [C, N/groups, ...] -> [N, C/groups, ...]
            filters = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
        self.note(multiply_adds, weight, filters, x, groups)

    def product(self, x: Tensor, weight: Tensor) -> None:
        multiply_adds = x.numel() * weight.shape[-1]
        if weight.dim() == 2 and weight.untyped_storage().data_ptr() in self.parameters:
            self.note(multiply_adds, weight, weight.t(), x.movedim(-1, 1), 1)
        else:
            self.calls.append(Call(multiply_adds))

    def note(self, multiply_adds: int, weight: Tensor, filters: Tensor, x: Tensor, groups: int) -> None:
        if not self.look:
            self.calls.append(Call(multiply_adds))
            return
        others = [axis for axis in range(x.dim()) if axis != 1]
        low, high = x.amin(others), x.amax(others)
        inputs = high - low > ROUNDING * torch.maximum(low.abs(), high.abs())
        # the storage is kept by the call, so that no other weight can come to lie at its address
        layer = weight.untyped_storage().data_ptr(), weight.storage_offset(), weight.shape
        self.calls.append(Call(multiply_adds, filters, inputs, groups, layer))


def multiply_adds(model: nn.Module, images: Any) -> float:
    """Multiply-adds per image of one forward pass in eval mode: convolutions and matrix products, as they run.

    Args:
        images: a tensor ``[B, ...]``, a tuple of positional arguments or a dict of named ones.
    """
    return sum(call.multiply_adds for call in watch(model, images, look=False)) / number_of(images)


def live_multiply_adds(model: nn.Module, images: Any) -> float:
    """Multiply-adds per image that are left when all that is dead in this network is gone.

    Args:
        images: random ones, enough of them that what varies is seen to vary (eight).
    """
    calls = watch(model, images, look=True)
    vary: dict[Any, Tensor] = {}  # a layer that is called several times keeps the inputs that vary in any call
    for call in calls:
        if call.inputs is not None:
            vary[call.layer] = vary.get(call.layer, call.inputs) | call.inputs
    return sum(call.multiply_adds * live_share(call, vary.get(call.layer)) for call in calls) / number_of(images)


def live_share(call: Call, inputs: Tensor | None) -> float:
    """What is left of a call: live inputs times live filters, or live groups."""
    if call.weight is None or inputs is None:
        return 1.0
    filters = call.weight.flatten(1).ne(0).any(1)
    if call.groups == 1:
        return float(inputs.double().mean() * filters.double().mean())
    groups = inputs.view(call.groups, -1).any(1) & filters.view(call.groups, -1).any(1)
    return float(groups.double().mean())


def watch(model: nn.Module, images: Any, look: bool) -> list[Call]:
    observer = Observer(model, look)
    with evaluating(model), torch.no_grad(), observer:
        run(model, images)
    return observer.calls


def run(model: nn.Module, images: Any) -> Any:
    """Calls a model with a tensor, a tuple of positional arguments or a dict of named ones."""
    if isinstance(images, dict):
        return model(**images)
    return model(*images) if isinstance(images, tuple) else model(images)


def number_of(images: Any) -> int:
    return next(leaf.shape[0] for leaf in tree_leaves(images) if isinstance(leaf, Tensor))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
