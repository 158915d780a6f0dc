"""The first batch that a model sees, for whoever needs an example of what the model takes."""

from __future__ import annotations

import inspect
import weakref
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree


class FirstBatch:
    """Keeps two samples of the first batch that a model is called with.

    Attributes:
        example: forward's arguments by name; None until the model was called.
    """

    def __init__(self, model: nn.Module) -> None:
        self.example: dict[str, Any] | None = None
        self._handle = model.register_forward_pre_hook(_Recorder(self), with_kwargs=True)

    def forget(self) -> None:
        """Take the hook off the model."""
        self._handle.remove()

    @staticmethod
    def part_of(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Two samples of a call's arguments, by name."""
        named = dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) | kwargs
        tensors = [t for t in pytree.tree_leaves(named) if isinstance(t, Tensor) and t.dim() > 1]
        batch = len(tensors[0]) if tensors else 0

        def first_two(tensor: Tensor) -> Tensor:
            return (tensor[:2] if tensor.dim() and len(tensor) == batch else tensor).detach().clone()

        return pytree.tree_map_only(Tensor, first_two, named)


class _Recorder:
    """The hook. It holds no strong reference, and copies and pickles of the model carry it as one that does nothing."""

    def __init__(self, owner: FirstBatch | None = None) -> None:
        self._owner = weakref.ref(owner) if owner is not None else lambda: None

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        owner = self._owner()
        if owner is not None and owner.example is None:
            owner.example = FirstBatch.part_of(module, args, kwargs)

    def __deepcopy__(self, memo: dict) -> _Recorder:
        return _Recorder()

    def __reduce__(self) -> tuple:
        return _Recorder, ()
