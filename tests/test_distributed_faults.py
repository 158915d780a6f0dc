"""Ranks that are killed, crash, hang or fail: the others notice, say why, and the run goes on to the same end."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import run_ranks, train
from train_helpers import one_thread, tiny_config, tiny_data, tiny_trainer  # noqa: F401

from mfp.train.checkpoints import checkpoint_files
from mfp.train.config import RunConfig
from mfp.train.distributed import World
from mfp.train.progress import Reporter
from mfp.train.run import run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data():
    return tiny_data()


@pytest.mark.long
@pytest.mark.parametrize(("size", "kills"), [(1, 20), (2, 12)])
def test_killed_again_and_again(tmp_path, data, size, kills):
    """SIGKILL at random moments from the first to the last of a run: the end is that of one that was never stopped.

    Each run is killed and resumed until it gets to its end; then another begins, until there were enough kills. Of two
    ranks one or both are killed. Every third kill waits for a checkpoint that is being written, and hits all.
    """
    settings = {"checkpoint_every": 1, "epochs": 12}
    start = time.monotonic()
    undisturbed = run_ranks(tmp_path / "m", size, lambda world: train(tmp_path / "whole", data, world, **settings))
    seconds = time.monotonic() - start
    assert [code for code, _, _ in undisturbed] == [0] * size
    rng, killed, runs, in_write = random.Random(size), 0, 0, 0

    def being_written() -> set[Path]:
        return set(directory.glob("step-*.tmp")) - left_behind

    def kill(children: list[int]) -> None:
        if killed < kills:
            moment, waits = time.monotonic() + rng.uniform(0, seconds / 3), killed % 3 == 0
            while time.monotonic() < moment and not (waits and being_written()):
                time.sleep(0.0005)
            for child in children if waits else rng.choice([children, *([child] for child in children)]):
                os.kill(child, signal.SIGKILL)

    while True:
        directory = tmp_path / f"run{runs}"
        left_behind = set(directory.glob("step-*.tmp"))
        outcomes = run_ranks(
            tmp_path / "m", size, lambda world, d=directory: train(d, data, world, **settings), timeout=10, disturb=kill
        )
        if all(code == 0 for code, _, _ in outcomes):
            assert outcomes == undisturbed
            runs += 1
            if killed == kills:
                break
        else:
            assert -signal.SIGKILL in [code for code, _, _ in outcomes], outcomes
            assert None not in [code for code, _, _ in outcomes], outcomes
            killed += 1
            in_write += bool(being_written())
    assert in_write > 0


def inject(trainer, phase: str, at: int, fault: Callable[[], None]) -> None:
    """Makes a phase of the loop fail when it is reached at step `at` or later."""

    def guarded(owner, name):
        real = getattr(owner, name)

        def method(*args, **kwargs):
            if trainer.step >= at:
                fault()
            return real(*args, **kwargs)

        setattr(owner, name, method)

    if phase == "forward":
        guarded(trainer, "_autocast")
    elif phase == "all-reduce":  # inside backward, after the first gradients are there
        trainer.model.conv2.weight.register_hook(lambda gradient: fault() if trainer.step >= at else None)
    elif phase == "pruning":
        guarded(trainer.pruner.comparison, "attribute_of")
    else:
        guarded(trainer, "_save")


def stop_here(kind: str) -> None:
    if kind == "exception":
        raise RuntimeError("broken on purpose")
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "segv": signal.SIGSEGV, "stop": signal.SIGSTOP}[kind])


PHASES = ("forward", "all-reduce", "pruning", "checkpoint")
ENDS = {"kill": -signal.SIGKILL, "segv": -signal.SIGSEGV, "stop": None, "exception": 1}  # None: it hangs for ever
FAULT_SETTINGS = {"checkpoint_every": 1, "epochs": 2, "batch": 24}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, data) -> str:
    directory = tmp_path_factory.mktemp("undisturbed")
    outcomes = run_ranks(directory, 2, lambda world: train(directory / "run", data, world, **FAULT_SETTINGS))
    return outcomes[0][2]["digest"]


@pytest.mark.parametrize("kind", ENDS)
@pytest.mark.parametrize("phase", PHASES)
def test_a_rank_that_dies_or_hangs_stops_all_and_the_run_goes_on(tmp_path, data, undisturbed, phase, kind):
    """Every way in every place, on rank 0 and rank 1 in turn; only rank 0 writes checkpoints."""
    rank = 0 if phase == "checkpoint" else (PHASES.index(phase) + list(ENDS).index(kind)) % 2

    def disturbed(world: World) -> None:
        trainer = tiny_trainer(tmp_path / "run", tiny_config(**FAULT_SETTINGS), data, world=world)
        if world.rank == rank:
            inject(trainer, phase, 1, lambda: stop_here(kind))
        trainer.fit()

    def wait_for_the_other(children: list[int]) -> None:
        until, flags = time.monotonic() + 15, os.WEXITED | os.WNOWAIT | os.WNOHANG
        while time.monotonic() < until and not os.waitid(os.P_PID, children[1 - rank], flags):
            time.sleep(0.02)

    outcomes = run_ranks(tmp_path / "m", 2, disturbed, seconds=2, timeout=3, disturb=wait_for_the_other)
    code, message, _ = outcomes[1 - rank]
    assert code == 1, outcomes  # the other one noticed, within the time
    assert message  # and says why
    assert outcomes[rank][0] == ENDS[kind]
    ends = run_ranks(tmp_path / "r", 2, lambda world: train(tmp_path / "run", data, world, **FAULT_SETTINGS))
    assert [result["digest"] for _, _, result in ends] == [undisturbed] * 2


def workers_of(process: subprocess.Popen) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = status.read_text().rpartition(")")[2].split()
            if int(fields[1]) == process.pid:
                found.append(int(status.parent.name))
    return found


@pytest.mark.long
def test_torchrun_restarts_and_the_end_is_the_same(tmp_path):
    """`mfp prune` in two processes, one of them killed: torchrun starts both again, once, and they resume."""
    config = RunConfig(
        arch="train_helpers:TinyNet", epochs=2, batch=100, calibration_batches=1, checkpoint_every=1, dense=False
    )
    (code, message, undisturbed), _ = run_ranks(
        tmp_path / "m", 2, lambda _: run(config, tmp_path / "whole", reporter=Reporter(quiet=True))
    )
    assert code == 0, message
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "--max-restarts", "1", "-m", "mfp", "prune", "--no-dense", "--resume"]
    command += f"--model {config.arch} --epochs 2 --batch 100 --calibration-batches 1".split()
    command += ["--checkpoint-every", "1", "--timeout", "20", "--output", tmp_path / "killed"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    while not checkpoint_files(tmp_path / "killed" / "pruned"):
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(max(workers_of(process)), signal.SIGKILL)
    error = process.communicate(timeout=200)[1]
    assert process.returncode == 0, error[:3000]
    assert "resuming" in error
    assert json.loads((tmp_path / "killed" / "result.json").read_text())["digest"] == undisturbed["digest"]
