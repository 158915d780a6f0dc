"""Runs whose network gets smaller on the way: resumed from any step, killed before, at and after the point."""

from __future__ import annotations

import csv
import os
import shutil
import signal

import pytest
import torch
from ranks import outcome, run_ranks, train
from test_engine import essence
from train_helpers import one_thread, tiny_config, tiny_data, tiny_trainer  # noqa: F401

import mfp
from mfp.errors import MfpError
from mfp.train import engine
from mfp.train.checkpoints import checkpoint_files, save_checkpoint
from mfp.train.distributed import World
from mfp.train.evaluation import evaluate
from mfp.train.load import load_masked

pytestmark = pytest.mark.usefixtures("one_thread")
HALF = {"epochs": 4, "settle": 0.5, "checkpoint_every": 1, "batch": 24}  # two steps an epoch; small from step 4 on


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
     {"channels_last": True, "mask_bn": False, "accumulate": 2}],
    ids=str,
)  # fmt: skip
def test_cut_at_every_step_and_resumed_to_the_same_bits(tmp_path, data, settings):
    config = tiny_config(**{**HALF, **settings})
    whole, copies = tiny_trainer(tmp_path / "whole", config, data), tmp_path / "copies"

    def save_and_copy(directory, step, state):
        path = save_checkpoint(directory, step, state)
        (copies / path.stem).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copies / path.stem)
        return path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "save_checkpoint", save_and_copy)
        whole.fit()
    assert whole.small_from == (1 if "mode" in settings else 2)
    cuts = sorted(copies.iterdir())
    assert len(cuts) == 8
    for cut in cuts if not settings else cuts[1:7:2]:
        resumed = tiny_trainer(cut, config, data)
        assert resumed.resume()
        resumed.fit()
        assert essence(resumed) == essence(whole), cut.name


def test_what_a_run_directory_gives_back(tmp_path, data):
    trainer = tiny_trainer(tmp_path / "pruned", tiny_config(**HALF, ema=0.5), data)
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


def test_two_ranks_are_cut_at_every_step(tmp_path, data):
    copies = tmp_path / "copies"

    def save_and_copy(directory, step, state):
        path = save_checkpoint(directory, step, state)
        (copies / path.stem).mkdir(parents=True)
        shutil.copy(path, copies / path.stem)
        return path

    def all_runs(world: World) -> list:
        engine.save_checkpoint = save_and_copy  # in this child only
        trainer = tiny_trainer(tmp_path / "whole", tiny_config(**RANKS), data, world=world)
        trainer.fit()
        engine.save_checkpoint = save_checkpoint
        world.barrier()
        cuts = sorted(copies.iterdir())[1::2]
        ends = [train(cut, data, world, **RANKS)["digest"] for cut in cuts]
        return [trainer.small_from, outcome(trainer)["digest"], *ends]

    for code, message, (small_from, *digests) in run_ranks(tmp_path / "m", 2, all_runs):
        assert code == 0, message
        assert small_from == 2
        assert len(digests) == 5
        assert len(set(digests)) == 1


EVENTS = ("before", "while it shrinks", "while its checkpoint is written", "after")


@pytest.mark.parametrize("size", [1, 2])
def test_killed_before_at_and_after_the_point(tmp_path, data, size):
    """One run that is killed at each of the moments, one after the other, and resumed: the end is the same."""

    def killed_at(event: str, world: World) -> dict:
        trainer = tiny_trainer(tmp_path / "killed", tiny_config(**RANKS), data, world=world)

        def kill() -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        if event == "while it shrinks":
            trainer.pruner.shrink_ = lambda *arguments, **keywords: kill()
        elif event == "while its checkpoint is written":
            real = os.replace
            os.replace = lambda *paths: kill() if trainer.small_from is not None else real(*paths)
        else:
            at, update = {"before": 3, "after": 6}[event], trainer._update
            trainer._update = lambda: kill() if trainer.step == at else update()
        trainer.resume()
        trainer.fit()
        return outcome(trainer)

    undisturbed = run_ranks(tmp_path / "m", size, lambda world: train(tmp_path / "whole", data, world, **RANKS))
    for event in EVENTS:
        ends = run_ranks(tmp_path / "m", size, lambda world, e=event: killed_at(e, world), timeout=5)
        assert -signal.SIGKILL in [code for code, _, _ in ends], (event, ends)
        assert checkpoint_files(tmp_path / "killed")
    ends = run_ranks(tmp_path / "m", size, lambda world: train(tmp_path / "killed", data, world, **RANKS))
    assert ends == undisturbed
    assert [code for code, _, _ in ends] == [0] * size
