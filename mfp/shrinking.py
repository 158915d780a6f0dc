"""Shrinking in the middle of training: the network without its pruned filters, and all that goes on with it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mfp.capture import example_arguments, plain_tensors
from mfp.compact.optimizer import Origin, check_optimizer, cut_optimizer_
from mfp.compact.part import recorded_call
from mfp.compact.training import NotEqual, Smaller, keep_zero, make_smaller
from mfp.errors import CaptureError, MfpError
from mfp.mask import FilterMask
from mfp.plan import FilterPlan
from mfp.structure import guesses

if TYPE_CHECKING:
    from mfp.pruner import FilterPruner


def shrink(pruner: FilterPruner, optimizer: Optimizer | None, averaged: Any, submodule: str | None) -> nn.Module:
    """What :meth:`mfp.FilterPruner.shrink_` does."""
    if pruner.smaller is not None:
        return pruner.smaller.network
    model, mask, mask_bn = pruner.model, pruner.mask, pruner.mask_bn
    if mask is None or pruner.mode != "hard":
        state = "there is no mask yet" if mask is None else "pruned filters may still come back"
        raise MfpError(f"shrink_: {state}; call pruner.hold_() when its mask is to hold, or prune with mode='hard'")
    if optimizer is not None:
        check_optimizer(optimizer, model)
    held = held_entries(mask, mask_bn)
    zero_(model, held, optimizer)
    try:
        with plain_tensors():
            original, smaller = _smaller(pruner, held, submodule)
    except (CaptureError, NotEqual) as error:
        warnings.warn(f"training goes on with the masked network, which cannot be shrunk: {error}", stacklevel=3)
        return model
    keep_zero(smaller, held)
    for average in averaged if isinstance(averaged, list | tuple) else [averaged] if averaged is not None else []:
        _shrink_average(average, held, smaller)
    if optimizer is not None:
        cut_optimizer_(optimizer, original, smaller.network, smaller.origins)
    original.zero_grad(set_to_none=True)
    (original.get_submodule(submodule) if submodule else original).to("cpu")
    plan = FilterPlan(original, mask.plan.layers, mask.plan.channel_multiple)
    pruner.smaller, pruner.mask = smaller, FilterMask(plan, mask.keep)
    pruner.model = smaller.network
    return smaller.network


def held_entries(mask: FilterMask, mask_bn: bool) -> dict[str, Tensor]:
    """By name of a parameter, which of its entries the mask holds at zero: bool of the parameter's shape."""
    names = {id(parameter): name for name, parameter in mask.plan.model.named_parameters()}
    held = {}
    for parameter, offset, rows in mask.parameters(mask_bn):
        pruned = ~mask.keep[offset : offset + rows].to(parameter.device).repeat_interleave(len(parameter) // rows)
        held[names[id(parameter)]] = pruned.view(-1, *[1] * (parameter.dim() - 1)).expand(parameter.shape)
    return held


@torch.no_grad()
def zero_(model: nn.Module, held: dict[str, Tensor], optimizer: Optimizer | None = None) -> None:
    """What a mask holds at zero is zero, in the optimiser's state too."""
    for name, parameter in model.named_parameters():
        if name in held:
            state = optimizer.state.get(parameter, {}) if optimizer is not None else {}
            for tensor in (parameter, *state.values()):
                if isinstance(tensor, Tensor) and tensor.shape == parameter.shape:
                    tensor.masked_fill_(held[name].to(tensor.device), 0)


def _smaller(pruner: FilterPruner, held: dict[str, Tensor], submodule: str | None) -> tuple[nn.Module, Smaller]:
    """(the network as it was, the smaller one); the error of the first example where none will do."""
    model, first_error = pruner.model, None
    for example in _examples(pruner):
        try:
            arguments = example_arguments(model, example)
            if submodule is None:
                return model, make_smaller(model, arguments, held)
            return _with_smaller_part(model, arguments, held, submodule)
        except (CaptureError, NotEqual) as error:
            first_error = first_error or error
    raise first_error or CaptureError(f"{type(model).__name__} needs example_input=... to be captured")


def _examples(pruner: FilterPruner) -> Iterator[Any]:
    if pruner.example_input is not None:
        yield pruner.example_input
    else:
        yield from guesses(pruner.model)


def _with_smaller_part(
    model: nn.Module, arguments: dict[str, Any], held: dict[str, Tensor], name: str
) -> tuple[nn.Module, Smaller]:
    """The model itself with a smaller part in it, and a copy that shares all but the part with it."""
    part, part_arguments = recorded_call(model, arguments, name)
    own = {key.removeprefix(f"{name}."): value for key, value in held.items() if key.startswith(f"{name}.")}
    smaller = make_smaller(part, part_arguments, own)
    original = _sharing(model, name)
    path, _, last = name.rpartition(".")
    setattr(model.get_submodule(path), last, smaller.network)
    origins = {f"{name}.{key}": replace(o, name=f"{name}.{o.name}") for key, o in smaller.origins.items()}
    rest = [*model.named_parameters(), *model.named_buffers()]
    origins |= {key: Origin(key, torch.clone) for key, _ in rest if not key.startswith(f"{name}.")}
    return original, Smaller(model, origins)


def _sharing(model: nn.Module, name: str) -> nn.Module:
    """A copy with modules of its own down to a part; the part and everything beside the way are the model's."""
    first, _, rest = name.partition(".")
    new = copy.copy(model)
    new._modules = dict(model._modules)
    if rest:
        new._modules[first] = _sharing(model._modules[first], rest)
    return new


@torch.no_grad()
def _shrink_average(average: Any, held: dict[str, Tensor], smaller: Smaller) -> None:
    """An average of the weights (torch's AveragedModel, timm's ModelEma: a copy of the network in ``module``)."""
    old = average.module
    zero_(old, held)
    new = smaller.load_(copy.deepcopy(smaller.network), old).train(old.training)
    if not any(parameter.requires_grad for parameter in old.parameters()):
        new.requires_grad_(False)
    average.module = new
