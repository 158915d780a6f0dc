from __future__ import annotations

import csv
import json
import os
import signal

import pytest
import torch
from safetensors import safe_open
from train_helpers import cut_and_resumed, essence, one_thread, tiny_config, tiny_data, tiny_trainer  # noqa: F401

from mfp.atomic import WriteError
from mfp.errors import MfpError
from mfp.train import engine
from mfp.train.checkpoints import checkpoint_files, save_checkpoint
from mfp.train.config import RunConfig
from mfp.train.data import load_data
from mfp.train.engine import Interrupted
from mfp.train.evaluation import evaluate

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data():
    return tiny_data()


def test_training_learns_and_prunes(tmp_path, data):
    trainer = tiny_trainer(tmp_path, tiny_config(epochs=12, lr=0.1), data)
    history = trainer.fit()
    assert history[-1]["train_loss"] < 0.92 * history[0]["train_loss"]
    assert history[-1]["filters_pruned"] == int(8 * 0.4) + int(12 * 0.4)
    for name, module in (("conv1", trainer.model.conv1), ("conv2", trainer.model.conv2)):
        zero = module.weight.flatten(1).abs().sum(1) == 0
        assert torch.equal(zero, ~trainer.pruner.mask.layer(name))
    rows = list(csv.DictReader((tmp_path / "epochs.csv").open()))
    assert len(rows) == 12
    assert rows[-1]["criterion"] in trainer.config.criteria
    assert float(rows[-1]["top1"]) == history[-1]["top1"]
    shares = [float(value) for key, value in rows[-1].items() if key.startswith("share_")]
    assert len(shares) == 5
    assert 0.3 < sum(shares) <= 1.001
    with safe_open(tmp_path / "scores.safetensors", "pt") as file:
        assert set(file.keys()) == set(trainer.config.criteria)
        assert json.loads(file.metadata()["layers"])["conv2"] == [8, 12]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mode": "hard"},
        {"settle": 0.5, "recalibrate": True, "clip": 0.5},
        {"mode": "asymptotic", "ema": 0.9},
        {"precision": "bfloat16", "mask_bn": False},
        {"precision": "float16", "recalibrate": True},
        {"accumulate": 3, "label_smoothing": 0.1, "warmup_epochs": 1, "nesterov": True},
        {"workers": 2},
        {"criteria": ("taylor", "bn_scale", "l2_norm")},
    ],
    ids=str,
)
def test_cut_at_every_step_and_resumed_to_the_same_bits(tmp_path, data, settings):
    config = tiny_config(checkpoint_every=1, **settings)
    cut_and_resumed(tmp_path, config, data, which=slice(None, None, 3 if settings else 1))


def held_out(directory):
    """A trainer whose data are read, and split, anew."""
    data = load_data("dataset:train_helpers:few_digits", validation=0.25)
    return tiny_trainer(directory, tiny_config(validation=0.25), data)


def test_a_resumed_run_holds_out_the_same_images(tmp_path):
    whole, cut = held_out(tmp_path / "whole"), held_out(tmp_path / "cut")
    assert whole.data.counts == [48, 16, 20] and whole.steps_per_epoch == 4
    whole.fit()
    cut._signal = signal.SIGTERM  # it came before the first step, which is finished
    with pytest.raises(Interrupted):
        cut.fit()
    resumed = held_out(tmp_path / "cut")
    assert resumed.resume() and (resumed.epoch, resumed.batch) == (0, 1)
    resumed.fit()
    assert essence(resumed) == essence(whole)


def test_every_epoch_is_evaluated_on_what_was_held_out(tmp_path):
    trainer = held_out(tmp_path)
    said = []
    trainer.reporter.say = said.append
    trainer.fit()
    by_view = {name: evaluate(trainer.model, getattr(trainer.data, name)) for name in ("validation", "test", "plain")}
    assert (
        trainer.history[-1]["loss"]
        == by_view["validation"]["loss"]
        not in (
            by_view["test"]["loss"],
            by_view["plain"]["loss"],
        )
    )
    assert "validation loss" in said[-1] and "test" not in said[-1]


def test_data_that_changed_since_are_refused(tmp_path):
    tiny_trainer(tmp_path, tiny_config(epochs=1), tiny_data(48)).fit()
    wanted = "is of a run on 48 training, 0 validation and 20 test images; there are now 49 training"
    with pytest.raises(MfpError, match=wanted):
        tiny_trainer(tmp_path, tiny_config(epochs=1), tiny_data(49)).resume()


def test_workers_do_not_change_the_result(tmp_path, data):
    results = []
    for workers in (0, 2):
        trainer = tiny_trainer(tmp_path / str(workers), tiny_config(workers=workers, epochs=1), data)
        trainer.fit()
        results.append(essence(trainer))
    assert results[0] == results[1]


def test_one_epoch_more_is_not_the_same(tmp_path, data):
    """Guards the comparisons above: what they compare does change with every step."""
    seen = set()
    trainer = tiny_trainer(tmp_path, tiny_config(checkpoint_every=1), data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "save_checkpoint", lambda *args: seen.add(essence(trainer)))
        trainer.fit()
    assert len(seen) == 8


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [1, 4, 6])
def test_a_signal_leaves_a_usable_checkpoint(tmp_path, data, number, at, monkeypatch):
    whole = tiny_trainer(tmp_path / "whole", tiny_config(), data)
    whole.fit()
    trainer = tiny_trainer(tmp_path / "cut", tiny_config(), data)
    update = trainer._update

    def update_and_signal():
        if trainer.step + 1 == at:
            os.kill(os.getpid(), number)
        update()

    monkeypatch.setattr(trainer, "_update", update_and_signal)
    handler = signal.getsignal(number)
    with pytest.raises(Interrupted, match=f"stopped by {signal.Signals(number).name}") as stop:
        trainer.fit()
    assert stop.value.path.exists()
    assert signal.getsignal(number) == handler
    resumed = tiny_trainer(tmp_path / "cut", tiny_config(), data)
    assert resumed.resume()
    assert resumed.step == at
    resumed.fit()
    assert essence(resumed) == essence(whole)


def test_a_corrupt_newest_checkpoint_falls_back(tmp_path, data):
    config = tiny_config()
    whole = tiny_trainer(tmp_path, config, data)
    whole.fit()
    newest = checkpoint_files(tmp_path)[-1]
    newest.write_bytes(newest.read_bytes()[:-1])
    resumed = tiny_trainer(tmp_path, config, data)
    assert resumed.resume()
    assert resumed.epoch == 1
    resumed.fit()
    assert essence(resumed) == essence(whole)


def test_a_full_disk_does_not_end_the_run(tmp_path, data, capsys):
    trainer = tiny_trainer(tmp_path, tiny_config(checkpoint_every=1), data)
    trainer.reporter = engine.Reporter()
    calls = []

    def fails_at_first(directory, step, state):
        calls.append(step)
        if step < 8:
            raise WriteError(f"cannot write {directory} (9 bytes): No space left on device; nothing older was touched")
        return save_checkpoint(directory, step, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "save_checkpoint", fails_at_first)
        trainer.fit()
    assert calls == list(range(1, 9))
    assert "No space left on device; nothing older was touched; training goes on" in capsys.readouterr().err
    assert [path.name for path in checkpoint_files(tmp_path)] == ["step-00000008.safetensors"]
    with pytest.MonkeyPatch.context() as patch:  # but the last one must be written
        patch.setattr(engine, "save_checkpoint", lambda *args: fails_at_first(args[0], 0, {}))
        with pytest.raises(WriteError, match="No space left"):
            tiny_trainer(tmp_path / "2", tiny_config(), data).fit()


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, data):
    trainer = tiny_trainer(tmp_path, tiny_config(lr=1e20, checkpoint_every=1), data)
    with pytest.raises(
        MfpError, match=r"the loss is (nan|inf) at epoch 1, batch \d: .* try a lower --lr \(now 1e\+20\)"
    ):
        trainer.fit()
    for path in checkpoint_files(tmp_path):  # what was saved before is finite
        state = engine.load_newest(path.parent).state
        assert all(torch.isfinite(value).all() for value in state["totals"])


def test_a_checkpoint_of_another_run_is_refused(tmp_path, data):
    tiny_trainer(tmp_path, tiny_config(epochs=1), data).fit()
    with pytest.raises(MfpError, match=r"is of another run: it has lr 0.05 instead of 0.2"):
        tiny_trainer(tmp_path, tiny_config(epochs=1, lr=0.2), data).resume()
    assert tiny_trainer(tmp_path, tiny_config(epochs=1, device="cpu", timeout=5.0), data).resume()
    assert not tiny_trainer(tmp_path / "empty", tiny_config(), data).resume()


def test_a_batch_larger_than_the_data(tmp_path, data):
    with pytest.raises(MfpError, match="--batch 96 is more than the 48 images"):
        tiny_trainer(tmp_path, tiny_config(batch=96), data, prune=False)


def test_evaluation_counts_every_image_once(data):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10)).train()
    metrics = evaluate(model, data.test, batch=7)
    assert metrics["images"] == 20
    assert model.training
    images = torch.stack([data.test[0, i][0] for i in range(20)])
    targets = torch.tensor([data.test[0, i][1] for i in range(20)])
    outputs = model(images)
    assert metrics["top1"] == pytest.approx(100 * (outputs.argmax(1) == targets).double().mean().item())
    assert metrics["loss"] == pytest.approx(torch.nn.functional.cross_entropy(outputs, targets).item(), rel=1e-5)


def test_learning_rates():
    def rates(**settings):
        config = RunConfig(epochs=4, lr=1.0, **settings)
        return [config.learning_rate(step, 2) for step in range(8)]

    assert rates(schedule="constant") == [1.0] * 8
    assert rates(schedule="step", milestones=(1, 3), gamma=0.1) == pytest.approx([1, 1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01])
    cosine = rates()
    assert cosine[0] == 1.0
    assert cosine == sorted(cosine, reverse=True)
    assert cosine[4] == pytest.approx(0.5)
    assert rates(warmup_epochs=2)[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rate": 1.0}, "--rate must be at least 0 and below 1, not 1.0"),
        ({"rate": -0.1}, "--rate must be"),
        ({"validation": 1.0}, "--validation must be at least 0 and below 1, not 1.0"),
        ({"mode": "firm"}, "--mode must be one of soft, hard, asymptotic, cubic, not firm"),
        ({"epochs": 0}, "--epochs must be at least 1, not 0"),
        ({"lr": float("nan")}, "--lr must be above 0, not nan"),
        ({"criteria": ()}, "--criteria must be at least one name"),
        ({"precision": "int8"}, "--precision must be one of float32, bfloat16, float16, not int8"),
        ({"batch": 10, "accumulate": 3}, "--batch 10 cannot be cut into --accumulate 3 equal parts"),
        ({"one_way": True}, "--one-way goes with --mode asymptotic or cubic: in mode soft filters come back"),
        ({"one_way": True, "mode": "hard"}, "in mode hard no filter comes back anyway"),
        ({"lower_accumulate": True}, "--lower-accumulate needs an --accumulate above 1 to start from"),
        ({"lower_accumulate": True, "accumulate": 2, "shrink": False}, "to start from, and no --no-shrink"),
        ({"schedule": "cosine", "warmup_epochs": 20}, "--warmup-epochs must be below --epochs"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(MfpError, match=message):
        RunConfig(**settings)


def test_configuration_round_trips_and_knows_its_own():
    config = tiny_config(layer_rates={"conv1": 0.1}, milestones=(1, 2))
    assert RunConfig.from_json(config.to_json()) == config
    with pytest.raises(MfpError, match="unknown settings colour"):
        RunConfig.from_json('{"colour": 1}')
    with pytest.raises(MfpError, match="c.json is not the configuration of a run"):
        RunConfig.from_json("{", "c.json")


def test_tensorboard_gets_what_the_table_has(tmp_path, data):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = tiny_trainer(tmp_path, tiny_config(tensorboard=True), data)
    trainer.fit()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train_loss", "top1", "lr", "churn", "neighbour_l2_norm", "attribute_before", "filters_kept/conv1"} <= tags
    assert [event.value for event in events.Scalars("top1")] == pytest.approx([row["top1"] for row in trainer.history])
    assert [event.value for event in events.Scalars("filters_kept/conv1")] == [5, 5]


def test_a_compiled_run_is_the_plain_one(tmp_path, data):
    """The hook of mfp/affine_backup.py runs in a compiled network too (today's torch runs it uncompiled)."""
    runs = []
    for compiled in (False, True):
        trainer = tiny_trainer(tmp_path / str(compiled), tiny_config(epochs=4), data)
        trainer.model.dropout.p = 0.0  # compiled code draws other random numbers
        if compiled:
            trainer.model.compile(backend="aot_eager")  # all of torch.compile but the C++ compiler, which takes 20 s
        trainer.fit()
        assert trainer.pruner.state_dict()["affine_backup"]  # there was something to restore in each epoch
        runs.append(trainer)
    plain, compiled = ([decision.digest for decision in trainer.pruner.decisions] for trainer in runs)
    assert plain == compiled
    assert len(set(plain)) > 1
    torch.testing.assert_close(runs[1].model.state_dict(), runs[0].model.state_dict(), rtol=1e-4, atol=1e-5)
