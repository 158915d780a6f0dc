"""Shrinking in the middle of training: the network without its pruned filters, and all that goes on with it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mfp.capture import example_arguments, plain_tensors
from mfp.compact.optimizer import check_optimizer, cut_optimizer_
from mfp.compact.training import NotEqual, NothingSmaller, Smaller, keep_zero, make_smaller, rehearse
from mfp.compact.write import modes_of, restore_modes
from mfp.errors import CaptureError, MfpError
from mfp.mask import FilterMask
from mfp.structure import guesses

if TYPE_CHECKING:
    from mfp.pruner import FilterPruner


def shrink(pruner: FilterPruner, optimizer: Optimizer | None, averaged: Any, within: nn.Module | None) -> nn.Module:
    """What :meth:`mfp.FilterPruner.shrink_` does."""
    mask = pruner.mask
    if mask is None or not pruner.holds:
        state = "there is no mask yet" if mask is None else "pruned filters may still come back"
        raise MfpError(f"shrink_: {state}; call pruner.hold_() when its mask is to hold, or prune with mode='hard'")
    small, by = pruner.smaller, pruner.shrunk_by
    if small is not None and by is not None and torch.equal(mask.keep.cpu(), by.keep.cpu()):
        return small.network
    path = _path(pruner.model, within) if within is not None else ""
    if optimizer is not None:
        check_optimizer(optimizer, within or pruner.model)
    averages = averaged if isinstance(averaged, list | tuple) else [averaged] if averaged is not None else []
    if small is not None:
        _back_to_the_original_shape(pruner, small, optimizer, averages, within, path)
    model, held = pruner.model, held_entries(mask, pruner.mask_bn)
    zero_(model, held, optimizer)
    for average in averages:
        zero_(average.module.get_submodule(path), held)
    try:
        with plain_tensors():
            smaller = _smaller(pruner, held)
    except (CaptureError, NotEqual) as error:
        if not (isinstance(error, NothingSmaller) and pruner.mode != "hard"):
            warnings.warn(f"training goes on with the masked network, which cannot be shrunk: {error}", stacklevel=3)
        return model
    keep_zero(smaller, held)
    for average in averages:
        old = average.module.get_submodule(path)
        _replace_average(average, path, smaller.load_(copy.deepcopy(smaller.network), old))
    if optimizer is not None:
        cut_optimizer_(optimizer, model, smaller.network, smaller.origins)
    if within is not None:
        _replace(within, path, smaller.network)
    model.zero_grad(set_to_none=True)
    model.to("cpu")  # kept for the plan, and for FilterPruner.masked
    pruner.smaller, pruner.shrunk_by, pruner.model = smaller, mask, smaller.network
    return smaller.network


def _back_to_the_original_shape(
    pruner: FilterPruner, small: Smaller, optimizer: Optimizer | None, averages: Sequence[Any],
    within: nn.Module | None, path: str,
) -> None:  # fmt: skip
    """Undoes :func:`shrink`, to do it by another mask; only what it left has changed since."""
    device = next(small.network.parameters()).device
    model = pruner.masked().to(device)
    restore_modes(model, modes_of(small.network))
    for average in averages:
        _replace_average(average, path, small.widen_(copy.deepcopy(model), average.module.get_submodule(path)))
    if optimizer is not None:
        cut_optimizer_(optimizer, small.network, model, small.back(model))
    if within is not None:
        _replace(within, path, model)
    pruner.smaller, pruner.model = None, model


def _path(model: nn.Module, within: nn.Module) -> str:
    """The name of a part; parts of DistributedDataParallel and the like have names as well."""
    for name, module in within.named_modules():
        if module is model and name:
            return name
    raise MfpError(f"shrink_: {type(model).__name__}, the pruner's network, is no part of {type(within).__name__}")


def _replace(whole: nn.Module, path: str, part: nn.Module) -> None:
    parent, _, last = path.rpartition(".")
    setattr(whole.get_submodule(parent), last, part)


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


def _smaller(pruner: FilterPruner, held: dict[str, Tensor]) -> Smaller:
    """The smaller network; the error of the first example where none will do."""
    model, first_error = pruner.model, None
    for example in _examples(pruner):
        try:
            arguments = example_arguments(model, example)
            smaller = make_smaller(model, arguments, held)
            rehearse(model, smaller, arguments, held)
            return smaller
        except (CaptureError, NotEqual) as error:
            first_error = first_error or error
    raise first_error or CaptureError(f"{type(model).__name__} needs example_input=... to be captured")


def _examples(pruner: FilterPruner) -> Iterator[Any]:
    if pruner.example_input is not None:
        yield pruner.example_input
    else:
        yield from guesses(pruner.model)


def _replace_average(average: Any, path: str, new: nn.Module) -> None:
    """In an average of the weights (torch's AveragedModel, timm's ModelEma: a copy of the network in ``module``)."""
    old = average.module.get_submodule(path)
    new.train(old.training)
    if not any(parameter.requires_grad for parameter in old.parameters()):
        new.requires_grad_(False)
    if path:
        _replace(average.module, path, new)
    else:
        average.module = new
