from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import functools
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from train_helpers import one_thread, tiny_config, tiny_data, tiny_structure, tiny_trainer  # noqa: F401

import mfp
from mfp.errors import MfpError
from mfp.train import engine
from mfp.train.checkpoints import checkpoint_files, digest_of, save_checkpoint
from mfp.train.config import RunConfig
from mfp.train.distributed import World, join, leave
from mfp.train.evaluation import evaluate
from mfp.train.progress import Reporter
from mfp.train.run import calibration_batches, run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data():
    return tiny_data()


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
    tiny_structure()
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


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_train_as_one_process_on_the_same_global_batches(tmp_path, data, size):
    settings = {"attribute": "weight_energy", "epochs": 3}
    outcomes = run_ranks(tmp_path / "m", size, lambda w: train(tmp_path / "a", data, w, **settings))
    assert [code for code, *_ in outcomes] == [0] * size, outcomes
    ranks = [result for _, _, result in outcomes]
    one = train(tmp_path / "b", data, World(), accumulate=size, **settings)
    assert all(result["digest"] == ranks[0]["digest"] for result in ranks)
    assert ranks[0]["masks"] == one["masks"]
    assert len(set(one["masks"])) > 1
    if size == 2:  # halves are exact, thirds are rounded
        assert ranks[0]["parameters"] == one["parameters"]
    torch.testing.assert_close(torch.tensor(ranks[0]["weight"]), torch.tensor(one["weight"]), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("size", [2, 3])
def test_gradients_of_ranks_are_those_of_all_samples(tmp_path, data, size):
    """Ranks with shares of different sizes; one wraps the model in DistributedDataParallel, which must not join in."""
    criteria = ("bn_scale", "taylor")

    def scores(world: World) -> list[list[float]]:
        model = tiny_trainer(tmp_path, tiny_config(batch=16), data, prune=False).model
        wrapped = torch.nn.parallel.DistributedDataParallel(model) if world.size > 1 else model
        batches = calibration_batches(tiny_config(batch=16), data, world)
        plan = mfp.FilterPlan.from_model(wrapped)
        return [row.tolist() for row in mfp.score_filters(plan, criteria, calibration=batches).values()]

    outcomes = run_ranks(tmp_path / "m", size, scores)
    assert [code for code, *_ in outcomes] == [0] * size, outcomes
    assert all(result == outcomes[0][2] for _, _, result in outcomes)
    alone = scores(World())
    assert max(alone[1]) > 0
    torch.testing.assert_close(torch.tensor(outcomes[0][2]), torch.tensor(alone), rtol=1e-3, atol=1e-12)


def test_ranks_find_the_same_rates_and_the_same_hindsight(tmp_path, data):
    held = dataclasses.replace(data, validation=data.test)

    def decisions(world: World) -> list[dict]:
        trainer = tiny_trainer(tmp_path / "run", tiny_config(allocate="each-point"), held, world=world)
        trainer.fit()
        return [decision.to_dict() for decision in trainer.pruner.decisions]

    (code, message, first), (_, _, second) = run_ranks(tmp_path / "m", 2, decisions)
    assert code == 0, message
    assert first == second and len(first) == 2
    assert len(first[0]["hindsight"]) == 10 and any(decision["layer_rates"] for decision in first)


@pytest.mark.parametrize("size", [2, 3])
def test_evaluation_is_that_of_one_process(tmp_path, data, size):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10))
    alone = evaluate(model, data.test, 7)
    for code, message, result in run_ranks(tmp_path, size, lambda world: evaluate(model, data.test, 7, world=world)):
        assert code == 0, message
        assert result["images"] == alone["images"] == 20
        assert result["top1"] == alone["top1"]
        assert result["loss"] == pytest.approx(alone["loss"], rel=1e-6)


def test_cut_at_every_step_and_resumed_on_two_ranks(tmp_path, data):
    settings = {"checkpoint_every": 1, "attribute": "loss", "criteria": ("l2_norm", "taylor", "l2_distance")}
    copies = tmp_path / "copies"

    def save_and_copy(directory, step, state):
        path = save_checkpoint(directory, step, state)
        (copies / path.stem).mkdir(parents=True)
        shutil.copy(path, copies / path.stem)
        return path

    def all_runs(world: World) -> list[str]:
        engine.save_checkpoint = save_and_copy  # in this child only
        whole = train(tmp_path / "whole", data, world, **settings)
        engine.save_checkpoint = save_checkpoint
        world.barrier()
        cuts = sorted(copies.iterdir())
        return [whole["digest"], *(train(cut, data, world, **settings)["digest"] for cut in cuts)]

    for code, message, digests in run_ranks(tmp_path / "m", 2, all_runs):
        assert code == 0, message
        assert len(digests) == 9
        assert len(set(digests)) == 1


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


def test_ranks_that_drift_apart_are_stopped(tmp_path, data):
    """One unit in the last place on one rank: its scores, and with them its choice, could be others."""

    def drifts(world: World) -> None:
        trainer = tiny_trainer(tmp_path / "run", tiny_config(), data, world=world)
        if world.rank == 1:
            with torch.no_grad():
                weight = trainer.model.conv2.weight.view(-1)
                weight[0] = torch.nextafter(weight[0], weight.new_tensor(9.0))
        trainer.fit()

    for code, message, _ in run_ranks(tmp_path / "m", 2, drifts):
        assert code == 1
        assert message.startswith("RanksDiffer: the weights after epoch 1: differs from rank 0 on rank 1.")
    assert not checkpoint_files(tmp_path / "run")


def test_a_decision_that_differs_is_named(tmp_path, data):
    def differs(world: World) -> None:
        trainer = tiny_trainer(tmp_path / "run", tiny_config(attribute="weight_energy"), data, world=world)
        trainer._require_equal_weights = lambda: None
        if world.rank == 2:  # as if its scores had been rounded differently
            trainer.pruner.criteria = trainer.pruner.criteria[4:]
        trainer.fit()

    for code, message, _ in run_ranks(tmp_path / "m", 3, differs):
        assert code == 1
        assert "RanksDiffer: the pruning decision of epoch 1: differs from rank 0 on rank 2." in message


def trainer_at_a_tie(directory: Path, data, world: World, drifted: bool):
    """Two filters of conv2 are equal and only one of them is pruned: one unit in the last place decides which."""
    trainer = tiny_trainer(directory, tiny_config(criteria=("l2_norm",)), data, world=world)
    weight = trainer.model.conv2.weight.detach()
    order = weight.flatten(1).norm(dim=1).argsort().tolist()
    pruned = trainer.pruner.plan["conv2"].num_pruned
    first, second = sorted(order[pruned - 1 : pruned + 1])
    weight[second] = weight[first]
    if drifted:
        weight[first] = torch.nextafter(weight[first], weight[first] * 2)
    return trainer


@pytest.mark.parametrize("weights_are_compared", [True, False])
def test_a_choice_that_one_ulp_would_flip_stops_all_ranks(tmp_path, data, weights_are_compared):
    alone = [trainer_at_a_tie(tmp_path, data, World(), drifted).pruner.step(0).digest for drifted in (False, True)]
    assert alone[0] != alone[1]  # it does flip

    def drifts(world: World) -> None:
        trainer = trainer_at_a_tie(tmp_path, data, world, drifted=world.rank == 1)
        if not weights_are_compared:
            trainer._require_equal_weights = lambda: None
        trainer._prune()

    what = "the weights after" if weights_are_compared else "the pruning decision of"
    for code, message, _ in run_ranks(tmp_path / "m", 2, drifts):
        assert code == 1
        assert message.startswith(f"RanksDiffer: {what} epoch 1: differs from rank 0 on rank 1.")


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


def test_devices_that_are_not_there():
    with pytest.raises(MfpError, match="unknown device 'gpu9'"):
        join("gpu9")
    with pytest.raises(MfpError, match="device 'mps' is not supported"):
        join("mps")
    if not torch.cuda.is_available():
        with pytest.raises(MfpError, match="no device cuda:0: torch sees 0 GPUs"):
            join("cuda")
