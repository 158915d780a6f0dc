"""The results' shapes of frequent operators, without arithmetic on sizes: a quarter to half of the time of a capture.

While torch.export runs a model with free sizes, it takes BatchNorm and activations apart into dozens of operators only
to find that the result is shaped like the input. torch has a table for operators where that is known, and lacks these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental import proxy_tensor

aten = torch.ops.aten

try:  # an internal of torch: without it captures are right as well, only slower
    from torch._subclasses.fake_impls import get_fast_op_impls
except ImportError:
    get_fast_op_impls = dict


def _alike(mode: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
    with mode:
        return torch.empty_like(x)


def _itself(mode: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def _batch_norm(mode: Any, x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    with mode:
        return torch.empty_like(x), x.new_empty(0), x.new_empty(0)


SHAPED_ALIKE: dict[Any, Callable[..., Any]] = {aten._native_batch_norm_legit_no_training.default: _batch_norm}
for _name in ("relu", "silu", "hardswish", "hardsigmoid", "gelu"):  # not sigmoid: integers become floats
    SHAPED_ALIKE[getattr(aten, _name).default] = _alike
    SHAPED_ALIKE[getattr(aten, f"{_name}_").default] = _itself


@contextmanager
def fast_shapes() -> Iterator[None]:
    """Inside the block, torch asks SHAPED_ALIKE."""
    table = get_fast_op_impls()
    added = {operator: function for operator, function in SHAPED_ALIKE.items() if operator not in table}
    table.update(added)
    try:
        yield
    finally:
        for operator in added:
            del table[operator]


@contextmanager
def without_layouts() -> Iterator[None]:
    """Inside the block, torch does not write down the layout of each result (``meta["tensor_meta"]``, "best effort"),
    which nothing here reads: to find out whether symbolic strides are contiguous is a tenth of the time of a capture,
    and more than half where layers pad by the size of their input."""
    known = getattr(proxy_tensor, "_extract_tensor_metadata", None)  # an internal, too
    if known is None:
        yield
        return
    proxy_tensor._extract_tensor_metadata = lambda *_, **__: None
    try:
        yield
    finally:
        proxy_tensor._extract_tensor_metadata = known
