"""When two models are of one build: equal classes, settings and shapes, so that one graph describes both.

Copies of a model, and models made by the same code, need not be captured again: only their weights differ.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from types import BuiltinFunctionType, FunctionType, NoneType
from typing import Any

import torch
from torch import Tensor, nn

from mfp.capture import example_arguments

PLAIN = (
    int, float, complex, str, bytes, NoneType, type, FunctionType, BuiltinFunctionType,
    torch.dtype, torch.device, torch.memory_format, torch.layout,
)  # fmt: skip
TENSORS = ("_parameters", "_buffers")
LEFT_OUT = {*TENSORS, "_modules", "training"}  # graphs are captured in eval mode


class _NotPlain(TypeError):
    pass


def build_of(model: nn.Module, example_input: Any = None) -> Hashable:
    """A key that is equal for models with equal graphs; None where more may decide than can be compared.

    That is any attribute of a module (a hook, too) other than numbers, texts, classes, functions, and lists and dicts
    of them.
    """
    try:
        example = None if example_input is None else _plain(example_arguments(model, example_input))
        first: dict[int, str] = {}  # what is shared is shared in both
        return example, tuple(
            (first.setdefault(id(module), name), name, type(module), _settings(module), _tensors(module, name, first))
            for name, module in model.named_modules(remove_duplicate=False)
        )
    except _NotPlain:
        return None


def _settings(module: nn.Module) -> Hashable:
    return _plain({name: value for name, value in vars(module).items() if name not in LEFT_OUT})


def _tensors(module: nn.Module, path: str, first: dict[int, str]) -> Hashable:
    return tuple(
        (name, None if tensor is None else (first.setdefault(id(tensor), f"{path}.{name}"), _plain(tensor)))
        for kind in TENSORS
        for name, tensor in getattr(module, kind).items()
    )


def _plain(value: Any) -> Hashable:
    """The value as a key; what is not plain raises."""
    if isinstance(value, Tensor):
        return type(value), value.shape, value.dtype, value.device
    if type(value) in (tuple, list, torch.Size):
        return type(value), tuple(map(_plain, value))
    if type(value) in (dict, OrderedDict):
        return type(value), tuple((_plain(key), _plain(each)) for key, each in value.items())
    if type(value) in (set, frozenset):
        return type(value), frozenset(map(_plain, value))
    if isinstance(value, PLAIN) or type(value) is bool:
        return type(value), value
    raise _NotPlain
