"""How good and how fast a network is: accuracy, time per image, and how far two networks' outputs lie apart."""

from __future__ import annotations

import copy
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfp.compact.check import largest_difference
from mfp.train.data import AllBatches, SeededDataset, make_loader
from mfp.train.distributed import World


@torch.no_grad()
def evaluate(
    model: nn.Module, dataset: SeededDataset, batch: int = 128, workers: int = 0, world: World | None = None
) -> dict[str, float]:
    """Mean loss and top-1/top-5 accuracy (percent) over a data set; every image counts exactly once, on any ranks.

    >>> evaluate(model, data.test)
    {'loss': 0.21, 'top1': 94.4, 'top5': 100.0, 'images': 360}
    """
    world = world or World(device=next(model.parameters()).device)
    was_training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=world.device)  # loss, top-1, top-5, images
    for images, targets in make_loader(dataset, AllBatches(len(dataset), batch, world.rank, world.size), workers):
        images, targets = images.to(world.device), targets.to(world.device)
        outputs = model(images).float()
        ranks = outputs.topk(min(5, outputs.shape[1])).indices == targets[:, None]
        loss = F.cross_entropy(outputs, targets, reduction="sum")
        sums += torch.stack([loss, ranks[:, 0].sum(), ranks.sum(), torch.tensor(len(targets))]).double()
    model.train(was_training)
    loss, top1, top5, count = world.sum_(sums).tolist()
    return {
        "loss": loss / count,
        "top1": 100 * top1 / count,
        "top5": 100 * top5 / count,
        "images": int(count),
    }


@torch.no_grad()
def difference_on(dataset: SeededDataset, masked: nn.Module, compact: nn.Module, batch: int = 128) -> float:
    """The largest difference between two networks' outputs over a data set, relative to the largest of its batch."""
    masked.eval(), compact.eval()
    device, worst = next(masked.parameters()).device, 0.0
    for images, _ in make_loader(dataset, AllBatches(len(dataset), batch)):
        images = images.to(device)
        worst = max(worst, largest_difference([compact(images)], [masked(images)]))
    return worst


@torch.no_grad()
def milliseconds_per_image(networks: dict[str, nn.Module], images: Tensor, seconds: float = 0.7) -> dict[str, float]:
    """The time each network takes per image, each in its faster memory format, measured in turns; the best of all.

    Args:
        images: one batch [B, C, H, W], on the device to measure.
        seconds: how long to measure each network; the slower format is soon left out.
    """
    runs = {}
    for name, network in networks.items():
        for layout in (torch.contiguous_format, torch.channels_last):
            laid_out = copy.deepcopy(network).eval().to(memory_format=layout)
            runs[name, layout] = (laid_out, images.contiguous(memory_format=layout))
            laid_out(runs[name, layout][1])  # the first call chooses and prepares kernels
    best = dict.fromkeys(runs, float("inf"))
    end = time.perf_counter() + seconds * len(networks)
    fastest: dict[str, float] = {}
    while time.perf_counter() < end or not fastest:
        for run in runs:
            best[run] = min(best[run], _seconds(*runs[run]), _seconds(*runs[run]))
        fastest = {name: min(t for (other, _), t in best.items() if other == name) for name in networks}
        runs = {run: parts for run, parts in runs.items() if best[run] < 1.2 * fastest[run[0]]}
    return {name: 1000 * value / len(images) for name, value in fastest.items()}


def _seconds(network: nn.Module, batch: Tensor) -> float:
    start = time.perf_counter()
    network(batch)
    if batch.is_cuda:
        torch.cuda.synchronize(batch.device)
    return time.perf_counter() - start


def regret_of(accuracies: dict[str, float], chosen: str) -> tuple[float, float]:
    """How many points the chosen candidate is behind the best one in hindsight, and ahead of the mean of all.

    >>> regret_of({"l1_norm": 90.0, "l2_norm": 94.0, "cosine_distance": 86.0}, "l1_norm")
    (4.0, 0.0)
    """
    own = accuracies[chosen]
    return max(accuracies.values()) - own, own - sum(accuracies.values()) / len(accuracies)
