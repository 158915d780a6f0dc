"""The processes of one run: under torchrun several, else one. All of them hold the same weights and masks."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mfp.errors import MfpError


class RanksDiffer(MfpError):
    """The ranks of a run no longer hold the same network, or did not take the same decision."""


@dataclass(frozen=True)
class World:
    """This process among the `size` processes of the run; every method does nothing where there is only one."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Adds a tensor up over the ranks, in place; all get the same bits."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        """Gives all ranks the values of rank 0."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def require_equal(self, digest: str, what: str) -> None:
        """Stops the run if a digest is not the same on all ranks.

        Raises:
            RanksDiffer: on every rank, with the ranks that differ from rank 0.
        """
        if self.size == 1:
            return
        mine = torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8, device=self.device)
        all_digests = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(all_digests, mine)
        others = [rank for rank, other in enumerate(all_digests) if not torch.equal(other, all_digests[0])]
        if others:
            ranks = ", ".join(map(str, others))
            raise RanksDiffer(
                f"{what}: differs from rank 0 on rank {ranks}. The ranks no longer hold the same network (other "
                "hardware or library versions, or a bug); nothing was saved after it: resume from the last checkpoint"
            )

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.size > 1:
            dist.barrier()

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model itself, or in DistributedDataParallel; buffers are those of rank 0 at every forward."""
        if self.size == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids)


def join(device: str = "auto", timeout: float = 600.0) -> World:
    """Joins the processes that torchrun started; alone where it did not.

    Args:
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N".
        timeout: seconds after which a rank that does not answer counts as lost, and all others stop.
    Raises:
        MfpError: a device that is not there.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = _device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if size == 1:
        return World(device=chosen)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    if not dist.is_initialized():
        limit = datetime.timedelta(seconds=timeout)
        store, rank, _ = next(dist.rendezvous("env://", timeout=limit))
        store = dist.PrefixStore(f"attempt{_attempt()}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    return World(dist.get_rank(), size, chosen)


def _attempt() -> str:
    """Torchrun's count of restarts, which sets this start apart from those before it.

    Torchrun keeps one store over all restarts. Without a prefix of their own, processes find the addresses there of
    those that are gone, and cannot connect. Several nodes count their restarts each for itself, so there the number is
    of no use: docs/training.md says what to set.
    """
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        return "0"
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def leave() -> None:
    """Ends what `join` began."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise MfpError(f"unknown device {name!r}: cpu, cuda, cuda:N or auto") from error
    if device.type == "cuda":
        index = local_rank if device.index is None else device.index
        if index >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise MfpError(f"no device cuda:{index}: torch sees {count} GPUs (start at most as many processes)")
        return torch.device("cuda", index)
    if device.type != "cpu":
        raise MfpError(f"device {name!r} is not supported: cpu or cuda")
    return device
