"""Meta-attributes: numbers that describe a network in its current state, by which its pruned neighbours are compared.

Two kinds. Without data, computed from scores and masks alone, for the whole network or per layer: ``weight_energy`` and
``sparsity``. With data, measured by running the network on fixed calibration batches: ``loss``, ``top1_error``,
``top5_error``. Any callable that takes the model and returns a number is an attribute of the second kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfp.errors import MfpError, did_you_mean

Batches = Sequence[tuple[Tensor, Tensor]]
ONE_VALUE = (
    "{} sees one value per channel, which has no variance: give more than one calibration image, or recalibrate=False"
)


def weight_energy(scores: Mapping[str, Tensor], keep: Tensor) -> float:
    """Share of the squared weights that the mask keeps; 1 for the unpruned network."""
    return _share(scores["l2_norm"].double().square(), keep)


def sparsity(scores: Mapping[str, Tensor], keep: Tensor) -> float:
    """Share of the l1 mass that the mask keeps; 1 for the unpruned network."""
    return _share(scores["l1_norm"].double(), keep)


def _share(mass: Tensor, keep: Tensor) -> float:
    total = mass.sum()
    return float(mass[keep].sum() / total) if total > 0 else 1.0


@torch.no_grad()
def measure(model: nn.Module, batches: Batches) -> dict[str, float]:
    """Cross-entropy, top-1 and top-5 error in [0, 1] on the batches, in the mode the model is in.

    With torch.distributed running, each process brings its own batches and all get the totals over all of them.
    """
    device = next(model.parameters()).device
    totals = torch.zeros(4, dtype=torch.float64, device=device)
    for inputs, targets in batches:
        totals += tally(model(inputs.to(device, non_blocking=True)), targets.to(device, non_blocking=True))
    return metrics(totals)


def tally(logits: Tensor, targets: Tensor) -> Tensor:
    """Sums over a batch: cross-entropy, images not in the first place, not among the first five, images; float64."""
    logits = logits.float()
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = best == targets[:, None]
    loss = F.cross_entropy(logits, targets, reduction="sum")
    return torch.stack([loss, (~hits[:, :1]).sum(), (~hits.any(1)).sum(), targets.new_tensor(len(targets))]).double()


def metrics(totals: Tensor) -> dict[str, float]:
    """Means from the sums of :func:`tally`, over all processes where torch.distributed is running."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(totals)
    if totals[3] == 0:
        raise MfpError("calibration batches hold no samples")
    loss, top1, top5 = (totals[:3] / totals[3]).tolist()
    return {"loss": loss, "top1_error": top1, "top5_error": top5}


def mean_over_processes(values: Tensor) -> Tensor:
    """The same on every process of torch.distributed, where that is running."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
        values /= torch.distributed.get_world_size()
    return values


WithoutData = Callable[[Mapping[str, Tensor], Tensor], float]
WITHOUT_DATA: dict[str, WithoutData] = {
    "weight_energy": weight_energy,
    "sparsity": sparsity,
}
#: Criteria that the attributes without data are computed from.
NEEDED_SCORES = {"weight_energy": "l2_norm", "sparsity": "l1_norm"}
WITH_DATA = ("loss", "top1_error", "top5_error")


def looks_at_data(attribute: str | Callable[[nn.Module], float]) -> bool:
    """Whether an attribute is measured by running the network."""
    return callable(attribute) or attribute in WITH_DATA


def check(attribute: str | Callable[[nn.Module], float], calibration: Batches | None) -> None:
    """Raise for an unknown attribute, or one that needs calibration batches when there are none."""
    if callable(attribute) or attribute in WITHOUT_DATA:
        return
    if attribute not in WITH_DATA:
        raise MfpError(
            f"unknown attribute {attribute!r}: known are {', '.join((*WITHOUT_DATA, *WITH_DATA))}, "
            f"or any callable that takes the model and returns a number"
            f"{did_you_mean(attribute, (*WITHOUT_DATA, *WITH_DATA))}"
        )
    if not calibration:
        raise MfpError(f"attribute {attribute!r} is measured on data: give calibration=[(inputs, targets), ...]")


@torch.no_grad()
def recalibrate_batchnorm(model: nn.Module, batches: Batches) -> None:
    """Estimate the running statistics of all BatchNorm layers anew, as averages over the batches.

    Everything else stays: weights, random state (dropout is off), the training flag of every module.

    Args:
        model: any module.
        batches: ``(inputs, targets)`` pairs; the targets are not used.

    Raises:
        MfpError: no batches, or one in which a BatchNorm sees one value per channel; the statistics are untouched then.
    """
    batches = list(batches)
    if not batches:
        raise MfpError("recalibrate_batchnorm: no batches")
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return
    device = next(model.parameters()).device
    momenta = [norm.momentum for norm in norms]
    before = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    with training_flags(model):
        model.eval()
        try:
            for norm in norms:
                norm.train()
                norm.reset_running_stats()
                norm.momentum = None  # cumulative average
            for inputs, _ in batches:
                model(inputs.to(device, non_blocking=True))
        except BaseException as error:
            for buffer, value in before:
                buffer.copy_(value)
            if isinstance(error, ValueError) and "more than 1 value per channel" in str(error):  # torch's own words
                raise MfpError(ONE_VALUE.format("a BatchNorm")) from error
            raise
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


@contextmanager
def training_flags(model: nn.Module):
    """Gives every module its own training flag back at the end."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
