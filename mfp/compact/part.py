"""One part of a model that cannot be captured whole: what it is given when the model runs."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from mfp.capture import eval_mode
from mfp.errors import MfpError


class _Recorded(Exception):
    """Raised to leave the model as soon as its part was called."""


def recorded_call(model: nn.Module, arguments: dict[str, Any], name: str) -> tuple[nn.Module, dict[str, Any]]:
    """The submodule of that name, and the arguments by name of its first call when the model runs on ``arguments``.

    Raises MfpError for a name that the model does not have, and for a part that the model does not call.
    """
    try:
        part = model.get_submodule(name)
    except AttributeError:
        children = ", ".join(child for child, _ in model.named_children())
        raise MfpError(f"{type(model).__name__} has no submodule {name!r}; its parts are {children}") from None
    calls: list[tuple[tuple, dict]] = []

    def record(module: nn.Module, args: tuple, kwargs: dict) -> None:
        calls.append((args, kwargs))
        raise _Recorded

    handle = part.register_forward_pre_hook(record, with_kwargs=True)
    try:
        with eval_mode(model), torch.no_grad():
            model(**arguments)
    except _Recorded:
        pass
    finally:
        handle.remove()
    if not calls:
        raise MfpError(f"{type(model).__name__} does not call its submodule {name!r} on the example input")
    args, kwargs = calls[0]
    by_position = dict(zip(inspect.signature(part.forward).parameters, args, strict=False))
    return part, by_position | kwargs
