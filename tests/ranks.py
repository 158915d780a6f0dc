"""Several ranks for tests: processes forked from this one and joined by gloo, and a training run on each."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import itertools
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from train_helpers import TinyNet, tiny_config, tiny_trainer

from mfp.structure import structure_of
from mfp.train.checkpoints import digest_of
from mfp.train.distributed import World, join, leave


@functools.cache
def ports() -> Iterator[int]:
    """Ports that no other worker of pytest tries, and that the system gives to nobody by itself."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = 10000 + 200 * (worker % 100)
    return itertools.cycle(range(first, first + 200))


def free_port() -> int:
    for port in ports():
        with socket.socket() as attempt, contextlib.suppress(OSError):
            attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            attempt.bind(("127.0.0.1", port))
            return port


def run_ranks(
    directory: Path,
    size: int,
    body: Callable[[World], object],
    seconds: float = 60,
    timeout: float = 20,
    disturb: Callable[[list[int]], None] = lambda children: None,
):
    """Runs `body` in `size` processes joined by gloo: (exit code or minus the signal, message, result) of each.

    The processes are forked, so that they need not import torch again. `disturb` gets their ids when all have started.
    """
    directory.mkdir(parents=True, exist_ok=True)
    structure_of(TinyNet(), {"x": torch.zeros(2, 3, 32, 32)})  # captured here, it is known in every rank
    port = free_port()
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            faulthandler.disable()
            code = 1
            with (directory / f"message{rank}").open("w") as message:
                try:
                    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
                    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                    result = body(join("cpu", timeout))
                    (directory / f"result{rank}").write_text(json.dumps(result))
                    leave()
                    code = 0
                except BaseException as error:
                    message.write(f"{type(error).__name__}: {error}")
            os._exit(code)
        children.append(child)
    disturb(children)
    ends = [_wait(child, time.monotonic() + seconds) for child in children]
    outcomes = []
    for rank, end in enumerate(ends):
        result = directory / f"result{rank}"
        outcomes.append(
            (end, (directory / f"message{rank}").read_text(), json.loads(result.read_text()) if end == 0 else None)
        )
    return outcomes


def _wait(child: int, until: float) -> int | None:
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None  # it hung


def outcome(trainer) -> dict:
    return {
        "digest": digest_of({key: trainer.state()[key] for key in ("model", "optimizer", "pruner", "totals")}),
        "parameters": digest_of([parameter.detach() for parameter in trainer.model.parameters()]),
        "masks": [decision.digest for decision in trainer.pruner.decisions],
        "weight": trainer.model.conv2.weight.flatten().tolist(),
        "top1": trainer.history[-1]["top1"],
    }


def train(directory: Path, data, world: World, **settings) -> dict:
    trainer = tiny_trainer(directory, tiny_config(**settings), data, world=world)
    trainer.resume()
    trainer.fit()
    return outcome(trainer)
