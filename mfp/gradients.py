"""Gradients of a plan's weights on calibration batches, for the criteria that look at data."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mfp.attributes import Batches
from mfp.errors import MfpError
from mfp.neighbours import trying
from mfp.plan import FilterPlan

#: ``(outputs, targets) -> scalar``, an average over the samples.
Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """The loss where none is given: that of a classifier."""
    return F.cross_entropy(outputs.float(), targets)


def weight_gradients(plan: FilterPlan, batches: Batches, loss: Loss | None = None) -> list[Tensor]:
    """The gradient of the mean loss over all samples for each layer's weight: float32, laid out like the weight.

    The network runs in evaluation mode. In training mode a BatchNorm takes the size of the filters before it out again:
    the loss would not change with it, and the sum of weight times gradient of each such filter would be zero.

    Gradients, buffers, training flags, ``requires_grad`` and random state of the model are left as they were; hooks of
    DistributedDataParallel do not run. With torch.distributed running, each process brings its own batches and all get
    the gradients over all of them.

    Args:
        plan: whose weights; frozen ones (``requires_grad=False``) have gradients, too.
        batches: ``[(inputs, targets), ...]``.
        loss: an average over the samples of a batch; :func:`cross_entropy` for None.

    Raises:
        MfpError: no samples.
    """
    loss = loss or cross_entropy
    weights = plan.weights()
    totals = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    samples = torch.zeros((), dtype=torch.float64, device=weights[0].device)
    learning = [weight.requires_grad for weight in weights]
    with trying(plan.model, [], mask_bn=False) as trial:
        plan.model.eval()
        try:
            for weight in weights:
                weight.requires_grad_()
            for inputs, targets in batches:
                with torch.enable_grad():
                    value = loss(plan.model(inputs.to(samples.device)), targets.to(samples.device))
                    # not backward(): that would run the hooks with which DistributedDataParallel waits for others
                    parts = torch.autograd.grad(value, weights, allow_unused=True, materialize_grads=True)
                for total, part in zip(totals, parts, strict=True):
                    total.add_(part, alpha=len(targets))
                samples += len(targets)
        finally:
            for weight, value in zip(weights, learning, strict=True):
                weight.requires_grad_(value)
            trial.restore()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for tensor in (samples, *totals):
            torch.distributed.all_reduce(tensor)
    if samples == 0:
        raise MfpError("calibration batches hold no samples")
    for total in totals:
        total.div_(samples)
    return totals
