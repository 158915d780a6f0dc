"""Runs whose network gets smaller on the way: resumed from any step, killed before, at and after the point."""

from __future__ import annotations

import csv
import itertools
import os
import signal

import pytest
import torch
from ranks import outcome, run_ranks, train
from train_helpers import copied_checkpoints, cut_and_resumed, one_thread, tiny_config, tiny_data, tiny_trainer  # noqa: F401

import mfp
from mfp.compact.training import make_smaller
from mfp.errors import MfpError
from mfp.shrinking import held_entries
from mfp.train.checkpoints import checkpoint_files
from mfp.train.distributed import World
from mfp.train.evaluation import evaluate
from mfp.train.load import load_masked

pytestmark = pytest.mark.usefixtures("one_thread")
HALF = {"epochs": 4, "settle": 0.5, "checkpoint_every": 1, "batch": 24}  # two steps an epoch; small from step 4 on
ONE_WAY = {**HALF, "mode": "cubic", "one_way": True, "rate": 0.5, "settle": 0.25}  # smaller after each of three epochs
LOWER = {**ONE_WAY, "epochs": 8, "batch": 40, "rate": 0.75, "accumulate": 5, "lower_accumulate": True}  # one step each


@pytest.fixture(scope="module")
def data():
    return tiny_data()


def test_from_the_point_on_the_network_is_small_and_ends_as_the_masked_one(tmp_path, data):
    runs = {}
    for shrink in (False, True):
        trainer = tiny_trainer(tmp_path / str(shrink), tiny_config(**HALF, shrink=shrink, clip=1.0), data)
        trainer.model.dropout.p = 0.0  # it draws as many numbers as there are channels
        trainer.fit()
        runs[shrink] = trainer
    masked, small = runs[False], runs[True]
    assert (masked.small_from, small.small_from) == (None, 2)
    rows = list(csv.DictReader((tmp_path / "True" / "epochs.csv").open()))
    counts = [int(row["parameters"]) for row in rows]
    assert counts[1] == counts[-1] < counts[0] == masked.history[-1]["parameters"]
    assert small.pruner.mask.digest == masked.pruner.mask.digest
    for name, value in masked.model.state_dict().items():
        kept = small.masked_model.state_dict()[name]
        if not name.endswith(("running_mean", "running_var")) and name != "fc.weight" and "conv2.weight" not in name:
            torch.testing.assert_close(kept, value, rtol=1e-3, atol=1e-5)
    for mine, its in zip(small.history, masked.history, strict=True):
        assert mine["train_loss"] == pytest.approx(its["train_loss"], rel=1e-4)
        assert mine["loss"] == pytest.approx(its["loss"], rel=1e-4)


@pytest.mark.parametrize(
    "settings",
    [{}, {"ema": 0.9, "clip": 0.5, "nesterov": True}, {"mode": "hard", "settle": 0.0, "precision": "bfloat16"},
     {"channels_last": True, "mask_bn": False, "accumulate": 2}, ONE_WAY,
     {**ONE_WAY, "recalibrate": True, "ema": 0.9, "clip": 0.5, "criteria": ("taylor", "l1_distance")},
     {**LOWER, "channels_last": True, "nesterov": True, "settle": 0.0},
     {**ONE_WAY, "shrink": False, "mode": "asymptotic", "ema": 0.5}],
    ids=str,
)  # fmt: skip
def test_cut_at_every_step_and_resumed_to_the_same_bits(tmp_path, data, settings):
    config = tiny_config(**{**HALF, **settings})
    whole = cut_and_resumed(tmp_path, config, data, which=slice(1, 7, 2) if settings else slice(None))
    assert whole.small_from == (None if not config.shrink else 1 if "mode" in settings else 2)
    assert whole.switch.accumulate == (4 if config.lower_accumulate else config.accumulate)


def test_on_the_one_way_the_network_shrinks_at_every_point(tmp_path, data):
    runs = {}
    for shrink in (False, True):
        trainer, said = tiny_trainer(tmp_path / str(shrink), tiny_config(**ONE_WAY, shrink=shrink), data), []
        trainer.reporter.say = said.append
        trainer.fit()
        runs[shrink] = trainer
        masks = [decision.mask.keep for decision in trainer.pruner.decisions]
        assert all((before | ~after).all() for before, after in itertools.pairwise(masks))
        rows = list(csv.DictReader((tmp_path / str(shrink) / "epochs.csv").open()))
        assert [row["filters_pruned"] for row in rows] == ["6", "8", "10", ""]
        kept = runs[shrink].masked_model
        for name, zero in held_entries(trainer.pruner.mask, True).items():
            assert not kept.get_parameter(name)[zero].any()
    counts = [int(row["parameters"]) for row in rows]
    assert counts[0] > counts[1] > counts[2] == counts[3] == sum(p.numel() for p in trainer.model.parameters())
    assert [line.split()[2] for line in said if "the network that is left" in line] == ["2", "3", "4"]
    assert len([line for line in said if line.startswith("memory freed: ")]) == 3
    assert runs[False].small_from is None and runs[False].optimizer.mask is runs[False].pruner.mask
    assert trainer.small_from == 1 and trainer.optimizer.mask is None


def test_where_a_second_switch_fails_the_run_goes_on_masked(tmp_path, data, monkeypatch):
    real, calls = make_smaller, []

    def refuse(*arguments):
        calls.append(arguments)
        if len(calls) > 1:
            raise mfp.errors.CaptureError("cannot capture TinyNet: a decision on values")
        return real(*arguments)

    monkeypatch.setattr("mfp.shrinking.make_smaller", refuse)
    trainer, said = tiny_trainer(tmp_path, tiny_config(**ONE_WAY, ema=0.5), data), []
    trainer.reporter.say = said.append
    assert len(trainer.fit()) == 4 and len(calls) == 2
    assert len([line for line in said if "goes on with the masked network" in line]) == 1
    assert trainer.small_from is None and trainer.optimizer.mask is trainer.pruner.mask
    assert trainer.history[0]["parameters"] < trainer.history[1]["parameters"] == trainer.history[3]["parameters"]
    for name, zero in held_entries(trainer.pruner.mask, True).items():
        assert not trainer.model.get_parameter(name)[zero].any()
        assert not trainer.averaged.module.get_parameter(name)[zero].any()


@pytest.mark.parametrize("settings", [HALF, ONE_WAY])
def test_what_a_run_directory_gives_back(tmp_path, data, settings):
    trainer = tiny_trainer(tmp_path / "pruned", tiny_config(**settings, ema=0.5), data)
    trainer.fit()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mfp.train.load.build_model", lambda arch, classes: type(trainer.pruner.plan.model)(classes))
        masked, shape = load_masked(tmp_path)
    assert shape == (3, 32, 32) and masked.conv2.weight.shape == (12, 8, 3, 3)
    assert not masked.conv1.weight[~trainer.pruner.mask.layer("conv1")].any()
    images = torch.stack([data.test[0, i][0] for i in range(8)])
    torch.testing.assert_close(masked(images), trainer.final_model.eval()(images), rtol=1e-4, atol=1e-5)
    small = mfp.compact(masked, images[:1])
    assert small.conv2.weight.shape == trainer.model.conv2.weight.shape
    assert evaluate(small, data.test)["top1"] == trainer.history[-1]["top1"]


def test_a_network_that_cannot_be_shrunk_goes_on_masked(tmp_path, data, monkeypatch):
    def refuse(*arguments):
        raise mfp.errors.CaptureError("cannot capture TinyNet: a decision on values")

    monkeypatch.setattr("mfp.shrinking.make_smaller", refuse)
    trainer, said = tiny_trainer(tmp_path, tiny_config(**HALF), data), []
    trainer.reporter.say = said.append
    assert len(trainer.fit()) == 4
    assert [line for line in said if "masked network, which cannot be shrunk: cannot capture TinyNet" in line]
    assert trainer.small_from is None and trainer.optimizer.mask is trainer.pruner.mask
    monkeypatch.undo()
    tiny_trainer(tmp_path / "small", tiny_config(**HALF), data).fit()
    monkeypatch.setattr("mfp.shrinking.make_smaller", refuse)
    with pytest.raises(MfpError, match="is of the smaller network, which cannot be made here"):
        tiny_trainer(tmp_path / "small", tiny_config(**HALF), data).resume()


def test_compiled_anew(tmp_path, data, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(type(module).__name__))
    tiny_trainer(tmp_path, tiny_config(**HALF, compile=True), data).fit()
    assert compiled == ["CompactTinyNet"]


RANKS = {**HALF, "attribute": "weight_energy"}


@pytest.mark.parametrize("settings", [RANKS, {**RANKS, **LOWER}])
def test_two_ranks_are_cut_at_every_step(tmp_path, data, settings):
    def all_runs(world: World) -> list:
        trainer = tiny_trainer(tmp_path / "whole", tiny_config(**settings), data, world=world)
        with copied_checkpoints(tmp_path / "copies"):
            trainer.fit()
        world.barrier()
        cuts = sorted((tmp_path / "copies").iterdir())[1::2]
        ends = [train(cut, data, world, **settings)["digest"] for cut in cuts]
        assert trainer.switch.accumulate == (4 if trainer.config.lower_accumulate else 1)
        return [trainer.small_from, outcome(trainer)["digest"], *ends]

    for code, message, (small_from, *digests) in run_ranks(tmp_path / "m", 2, all_runs):
        assert code == 0, message
        assert small_from == (2 if settings is RANKS else 1)
        assert len(digests) == 5
        assert len(set(digests)) == 1


EVENTS = ("before", "while it shrinks", "while its checkpoint is written", "after")


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("settings", [RANKS, {**RANKS, **ONE_WAY}], ids=["once", "one way"])
def test_killed_before_at_and_after_the_point(tmp_path, data, size, settings):
    """One run that is killed at each of the moments, one after the other, and resumed: the end is the same."""

    def killed_at(event: str, world: World) -> dict:
        trainer = tiny_trainer(tmp_path / "killed", tiny_config(**settings), data, world=world)

        def kill() -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        if event == "while it shrinks":
            real_one = trainer.pruner.shrink_
            trainer.pruner.shrink_ = lambda *a, **k: kill() if trainer.batch == 2 else real_one(*a, **k)
        elif event == "while its checkpoint is written":
            real = os.replace
            os.replace = lambda *paths: kill() if trainer.small_from is not None else real(*paths)
        else:
            at, update = {"before": 3, "after": 6}[event], trainer._update
            trainer._update = lambda: kill() if trainer.step == at else update()
        trainer.resume()
        trainer.fit()
        return outcome(trainer)

    undisturbed = run_ranks(tmp_path / "m", size, lambda world: train(tmp_path / "whole", data, world, **settings))
    for event in EVENTS:
        ends = run_ranks(tmp_path / "m", size, lambda world, e=event: killed_at(e, world), timeout=5)
        assert -signal.SIGKILL in [code for code, _, _ in ends], (event, ends)
        assert checkpoint_files(tmp_path / "killed")
    ends = run_ranks(tmp_path / "m", size, lambda world: train(tmp_path / "killed", data, world, **settings))
    assert ends == undisturbed
    assert [code for code, _, _ in ends] == [0] * size
