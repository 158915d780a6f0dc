"""Trains a compact network on where the masked one stopped: the optimiser's state goes with the kept channels."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer

from mfp.errors import MfpError
from mfp.plan import unwrap


@dataclass(frozen=True)
class Origin:
    """Where a parameter of a compact network comes from.

    Attributes:
        name: the parameter of the original model.
        left: gives what is left of a tensor of the original parameter's shape.
    """

    name: str
    left: Callable[[Tensor], Tensor]


@torch.no_grad()
def compact_optimizer(optimizer: Optimizer, model: nn.Module, small: fx.GraphModule) -> Optimizer:
    """An optimiser for a compact network that goes on where the masked network's stopped.

    >>> small = mfp.compact(model, torch.zeros(1, 3, 224, 224))
    >>> optimizer = mfp.compact_optimizer(optimizer, model, small)

    Momentum and other state of a weight's shape is cut as the weight was, and is zero where the weight is; parameter
    groups keep their settings, and parameters that were not optimised still are not. Parameters that the compact
    network has anew, for the constants of removed channels, join the first group without state. A ``mfp.optim``
    optimiser has no mask any more. Learning rate schedulers belong to the old optimiser: make a new one, with
    ``last_epoch`` to continue.

    Args:
        optimizer: any ``torch.optim`` optimiser, or one of ``mfp.optim``, of ``model``'s parameters; left as it is.
        model: the masked network that was given to :func:`mfp.compact`.
        small: what :func:`mfp.compact` returned, with ``fold_bn=False``.

    Raises:
        MfpError: ``small`` is in serving form, was loaded from a file, or comes from another model than ``optimizer``.
    """
    origins = getattr(small, "origins", None)
    if not origins:
        raise MfpError(
            "compact_optimizer needs the result of mfp.compact(model, ...) with fold_bn=False, as it was returned: a "
            "network in serving form or one loaded from a file does not know where its parameters come from"
        )
    olds = dict(unwrap(model).named_parameters())
    owned = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    unknown = [origin.name for origin in origins.values() if origin.name not in olds]
    if unknown or not any(id(olds[origin.name]) in owned for origin in origins.values()):
        raise MfpError("compact_optimizer: the optimiser, the model and the compact network do not belong together")

    groups: list[list[nn.Parameter]] = [[] for _ in optimizer.param_groups]
    state: dict[nn.Parameter, dict] = defaultdict(dict)
    for name, parameter in small.named_parameters():
        if name not in origins:
            groups[0].append(parameter)
            continue
        old = olds[origins[name].name]
        if id(old) not in owned:
            continue
        groups[owned[id(old)]].append(parameter)
        if old in optimizer.state:
            state[parameter] = {
                key: _left(value, old, origins[name]) for key, value in optimizer.state[old].items()
            }  # fmt: skip
    new = copy.copy(optimizer)
    if hasattr(new, "mask"):
        new.mask = None
    new.param_groups = [
        {**group, "params": params} for group, params in zip(optimizer.param_groups, groups, strict=True)
    ]
    new.state = state
    return new


def _left(value: object, old: nn.Parameter, origin: Origin) -> object:
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    if value.shape != old.shape:
        return value.clone()
    return origin.left(torch.where(old == 0, 0, value))  # zeroed since the last step, so what led there is void
