"""Networks back from the files of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mfp
from mfp.capture import example_arguments
from mfp.compact.training import make_smaller
from mfp.errors import MfpError
from mfp.shrinking import held_entries
from mfp.train.checkpoints import Checkpoint, load_checkpoint, load_newest
from mfp.train.config import RunConfig
from mfp.train.models import build_model


def load_network(path: str | Path, function: str | None = None) -> nn.Module:
    """A network from a file of `mfp.save`, a run directory (its newest pruned checkpoint) or one checkpoint.

    >>> load_network("runs/resnet20-digits/compact.mfp")

    Args:
        path: the file or directory.
        function: "package:function" for a run that was made with --model; a file alone never causes an import.
    Raises:
        MfpError: not such a file, or damaged.
    """
    path = Path(path)
    if path.suffix == ".mfp":
        return mfp.load(path)
    return load_masked(path, function)[0]


def load_masked(path: str | Path, function: str | None = None) -> tuple[nn.Module, tuple[int, ...]]:
    """The masked network of a checkpoint, in evaluation mode, and the shape of its images.

    A checkpoint from the middle of an epoch has pruned filters that were moving again: they are zeroed.

    Raises:
        MfpError: no checkpoint there, or one that was not pruned yet.
    """
    checkpoint = _find(Path(path))
    state = checkpoint.state
    config = RunConfig(**state["config"])
    if ":" in config.arch and function != config.arch:
        raise MfpError(
            f"{checkpoint.path} was made by {config.arch}; it is imported only if you say --model {config.arch}"
        )
    model = build_model(config.arch, state["num_classes"])
    shape = tuple(state["image_shape"])
    if state["keep"] is None:
        raise MfpError(f"{checkpoint.path} is from before the first pruning: there is nothing to remove")
    mask = mfp.FilterMask(make_plan(config, model), state["keep"])
    if state["small_from"] is None:
        model.load_state_dict(_weights(state))
    else:
        _load_smaller(model, _weights(state), mask, config.mask_bn, shape)
    mask.apply_(mask_bn=config.mask_bn)
    return model.eval(), shape


def _load_smaller(
    model: nn.Module, weights: dict[str, Tensor], mask: mfp.FilterMask, mask_bn: bool, shape: tuple[int, ...]
) -> None:
    """Weights of the network that was left without the pruned filters."""
    example = example_arguments(model, torch.zeros(1, *shape))
    smaller = make_smaller(model, example, held_entries(mask, mask_bn))
    smaller.network.load_state_dict(weights)
    smaller.widen_(model, smaller.network)


def _find(path: Path) -> Checkpoint:
    if not path.is_dir():
        return load_checkpoint(path)
    for directory in (path / "pruned", path):
        checkpoint = load_newest(directory)
        if checkpoint:
            return checkpoint
    raise MfpError(f"no checkpoint in {path} or {path / 'pruned'}: give a run directory or a checkpoint of one")


def _weights(state: dict[str, Any]) -> dict[str, Tensor]:
    averaged = state["averaged"]
    if averaged is None:
        return state["model"]
    return {name.removeprefix("module."): value for name, value in averaged.items() if name.startswith("module.")}


def make_plan(config: RunConfig, model: nn.Module) -> mfp.FilterPlan:
    """The plan that a configuration describes, for a model."""
    return mfp.FilterPlan.from_model(
        model,
        config.rate,
        skip=config.skip,
        layer_rates=config.layer_rates,
        residual=config.residual,
        channel_multiple=config.channel_multiple,
    )
