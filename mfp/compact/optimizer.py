"""Trains a compact network on where the masked one stopped: the optimiser's state goes with the kept channels."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer

from mfp.errors import MfpError
from mfp.plan import unwrap


@dataclass(frozen=True)
class Origin:
    """Where a parameter or buffer of a compact network comes from.

    Attributes:
        name: the parameter or buffer of the original model.
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
    sources = [origins[name].name for name, _ in small.named_parameters() if name in origins]
    if not all(name in olds for name in sources) or not any(id(olds[name]) in owned for name in sources):
        raise MfpError("compact_optimizer: the optimiser, the model and the compact network do not belong together")
    groups, state = _moved(optimizer, olds, small, origins, void_zeros=True)
    new = copy.copy(optimizer)
    if hasattr(new, "mask"):
        new.mask = None
    new.param_groups = [
        {**group, "params": params} for group, params in zip(optimizer.param_groups, groups, strict=True)
    ]
    new.state = state
    return new


@torch.no_grad()
def cut_optimizer_(optimizer: Optimizer, model: nn.Module, small: nn.Module, origins: Mapping[str, Origin]) -> None:
    """The optimiser goes on with the smaller network's parameters, in place: what holds it (learning rate schedules,
    gradient scalers, trainers) goes on with it. It passed :func:`check_optimizer`, and its state of pruned filters is
    zero; parameters of others stay as they are.
    """
    groups, state = _moved(optimizer, dict(model.named_parameters()), small, origins, void_zeros=False)
    if hasattr(optimizer, "mask"):
        optimizer.mask = None
    for group, parameters in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = parameters
    optimizer.state = state
    if hasattr(optimizer, "mask"):
        optimizer.mask = None  # looks at its parameters anew


def check_optimizer(optimizer: Optimizer, model: nn.Module) -> None:
    """Raises MfpError for parameters that the model does not have, and for state that is no tensor of a parameter's
    shape and no number: how to cut that is not known."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    kind = type(optimizer).__name__
    strange = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in names]
    if strange:
        raise MfpError(
            f"{kind} has {len(strange)} parameters that {type(model).__name__} has not, the first of shape "
            f"{tuple(strange[0].shape)}: give within=... the module that has them all"
        )
    for parameter, state in optimizer.state.items():
        for key, value in state.items() if isinstance(parameter, Tensor) else ():
            if not _is_known(value, parameter):
                raise MfpError(
                    f"{kind} keeps {key!r} for {names[id(parameter)]}, which is neither a number nor of the weight's "
                    f"shape {tuple(parameter.shape)}: how to cut it is not known; use an optimiser such as SGD or AdamW"
                )


def _is_known(value: object, parameter: Tensor) -> bool:
    if isinstance(value, Tensor):
        return value.shape == parameter.shape or value.numel() == 1
    return value is None or isinstance(value, bool | int | float | str)


def _moved(
    optimizer: Optimizer, olds: Mapping[str, nn.Parameter], small: nn.Module, origins: Mapping[str, Origin],
    void_zeros: bool,
) -> tuple[list[list[nn.Parameter]], dict[nn.Parameter, dict]]:  # fmt: skip
    """The smaller network's parameters by parameter group, and what is left of the state."""
    owned = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    mine = {id(parameter) for parameter in olds.values()}
    groups = [[p for p in group["params"] if id(p) not in mine] for group in optimizer.param_groups]
    state: dict[nn.Parameter, dict] = defaultdict(dict)
    state |= {p: state for p, state in optimizer.state.items() if id(p) not in mine}
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
                key: _left(value, old, origins[name], void_zeros) for key, value in optimizer.state[old].items()
            }
    return groups, state


def _left(value: object, old: nn.Parameter, origin: Origin, void_zeros: bool) -> object:
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    if value.shape != old.shape:
        return value.clone()
    return origin.left(torch.where(old == 0, 0, value) if void_zeros else value)  # zeroed since the last step: void
