"""Ranks that train together: as one process would, from any checkpoint, and never apart unnoticed."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from ranks import run_ranks, train
from train_helpers import one_thread, tiny_config, tiny_data, tiny_trainer  # noqa: F401

import mfp
from mfp.errors import MfpError
from mfp.train import engine
from mfp.train.checkpoints import checkpoint_files, save_checkpoint
from mfp.train.distributed import World, join
from mfp.train.evaluation import evaluate
from mfp.train.run import calibration_batches

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data():
    return tiny_data()


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


def test_devices_that_are_not_there():
    with pytest.raises(MfpError, match="unknown device 'gpu9'"):
        join("gpu9")
    with pytest.raises(MfpError, match="device 'mps' is not supported"):
        join("mps")
    if not torch.cuda.is_available():
        with pytest.raises(MfpError, match="no device cuda:0: torch sees 0 GPUs"):
            join("cuda")
