"""benchmarks/study.py on a few digits and a tiny network: every kind of run, killed and gone on with, and its page."""

import csv
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import mfp
from mfp.train.progress import Reporter

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
FLAGS = (
    "--data dataset:train_helpers:few_digits --arch train_helpers:TinyNet --seeds 1 --training-seeds 1 --rates 0.5 "
    "--flops 0.7 --epochs 2 --batch 16 --finetune-images 16 --scratch-epochs 2 --scratch-images 32 "
    "--calibration 32 --validation 0.1"
)
OPTIONS = FLAGS.split()


@pytest.fixture(scope="module")
def study():
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("study")
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def whole(study, tmp_path_factory):
    """The directory of a study that was never stopped."""
    directory = tmp_path_factory.mktemp("study")
    assert study.main([*OPTIONS, "--output", str(directory), "--page", str(directory / "page.md")]) == 0
    return directory


def rows_of(directory):
    """What must not differ between two studies: all but the seconds, and the columns that a row does not need."""
    with (directory / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{name: value for name, value in row.items() if value and name != "seconds"} for row in rows]


def results_of(directory):
    with (directory / "results.csv").open() as file:
        return importlib.import_module("study_page").Results(list(csv.DictReader(file)))


def test_every_run_has_its_rows(study, whole):
    rows = rows_of(whole)
    jobs = list(study.planned(study.parse([*OPTIONS, "--output", str(whole)])))
    methods = {"once": len(study.CRITERIA) + len(study.BASELINES) + 1}  # and the unpruned network
    expected = sum(
        methods.get(job.setting, 1) if "FLOPs" not in job.rates or job.setting != "once" else 2 for job in jobs
    )
    assert len(rows) == expected and {row["setting"] for row in rows} == {"dense", "once", "finetune", "scratch"}
    assert all(0 <= float(row["accuracy"]) <= 100 for row in rows)
    assert {row["accuracy"] for row in rows if row["method"] == "unpruned" and row["setting"] == "once"}
    shares = {
        row["rates"]: float(row["flops"]) for row in rows if row["method"] == "l2_distance" and "FLOPs" in row["rates"]
    }
    assert len(shares) == 2 and all(0 < share <= 0.7 for share in shares.values())


@pytest.mark.parametrize("setting", ["finetune", "scratch"])
def test_accuracy_is_that_of_the_network_that_training_ended_with(study, tmp_path, monkeypatch, setting):
    """Training goes on with a smaller network from where the mask holds; the one that was begun with stays behind."""
    options = study.parse([*OPTIONS, "--output", str(tmp_path), "--scratch-epochs", "4"])
    runs, trainers, tested = study.Study(options, Reporter(quiet=True)), [], []
    accuracy, train = runs.accuracy, runs.train
    monkeypatch.setattr(runs, "accuracy", lambda model, seed: tested.append(model) or accuracy(model, seed))
    monkeypatch.setattr(runs, "train", lambda *arguments: trainers.append(train(*arguments)) or trainers[-1])
    (row,) = getattr(runs, f"run_{setting}")(study.Job(setting, 0, "0.5", "l2_norm"))
    (trainer,) = trainers
    assert trainer.small_from is not None and trainer.small_from == (2 if setting == "scratch" else 1)
    images = runs.data(0).example(8)
    assert mfp.compact(tested[-1], images).report.flops_saved > 0.2
    with torch.no_grad():
        torch.testing.assert_close(tested[-1].eval()(images), trainer.final_model.eval()(images))
    assert row["accuracy"] == accuracy(trainer.final_model, 0)


def test_baselines_prune_what_they_say(study):
    """From scratch: as many filters as a criterion would, drawn anew each time, or those with the highest norms."""
    torch.manual_seed(0)
    model = importlib.import_module("train_helpers").TinyNet()
    example = torch.zeros(1, 3, 32, 32)
    batches = [(torch.rand(4, 3, 32, 32), torch.arange(4))]
    norms = {name: getattr(model, name).weight.detach().flatten(1).norm(dim=1) for name in ("conv1", "conv2")}
    worst = study.Baseline("worst", 0, model, 0.5, example, batches)
    worst.step(0)
    for layer in worst.plan.layers:
        kept, pruned = (norms[layer.name][worst.mask.keep[layer.slice] == kept] for kept in (True, False))
        assert len(pruned) == layer.num_pruned > 0 and kept.max() <= pruned.min()
    model = importlib.import_module("train_helpers").TinyNet()
    masks = []
    for seed in (0, 0, 1):
        drawn = study.Baseline("random", seed, model, 0.5, example, batches)
        masks += [drawn.step(epoch).mask for epoch in (0, 1)]
    assert {mask.num_pruned for mask in masks} == {worst.mask.num_pruned}
    assert len({mask.digest for mask in masks}) == 4 and masks[0].digest == masks[2].digest


def test_a_study_that_was_killed_goes_on_to_the_same_rows(whole, tmp_path):
    command = [sys.executable, str(BENCHMARKS / "study.py"), *OPTIONS, "--output", str(tmp_path)]
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parent),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / "results.csv").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    first = rows_of(tmp_path)
    assert 0 < len(first) < len(rows_of(whole))
    assert subprocess.run(command, env=environment, capture_output=True).returncode == 0
    assert rows_of(tmp_path)[: len(first)] == first
    assert rows_of(tmp_path) == rows_of(whole)


def test_other_settings_are_refused(study, whole, capsys):
    before = (whole / "results.csv").read_bytes()
    assert study.main([*OPTIONS, "--lr", "0.3", "--output", str(whole)]) == 2
    assert "lr 0.1 instead of 0.3" in capsys.readouterr().err
    assert (whole / "results.csv").read_bytes() == before


@pytest.mark.parametrize(("attribute", "recalibrate"), [("loss", True), ("loss", False), ("weight_energy", None)])
def test_the_page_tells_what_the_pruner_chooses(study, whole, attribute, recalibrate):
    made = study.Study(study.parse([*OPTIONS, "--output", str(whole)]), study.Reporter(quiet=True))
    pruner = mfp.FilterPruner(
        made.dense(0), 0.5, attribute=attribute, calibration=made.calibration(0), recalibrate=recalibrate
    )
    column = attribute if recalibrate is not False else f"{attribute} raw"
    results = results_of(whole)
    assert results.choice("0.5", 0, column, mfp.PAPER_CRITERIA) == pruner.step(-1).criterion


def test_the_page_is_made_from_the_rows(study, whole, tmp_path):
    results = results_of(whole)
    text = (whole / "page.md").read_text()
    accuracy = results.values("once", "0.5", "taylor")[0]
    assert f"| `taylor` | **{accuracy:.1f}** |" in text or f"| `taylor` | {accuracy:.1f} |" in text
    found = results.compared("once", "0.5", "loss", mfp.PAPER_CRITERIA)[0]
    own = [results.values("once", "0.5", name)[0] for name in mfp.PAPER_CRITERIA]
    assert found["accuracy"] + found["best"] == max(own) and found["accuracy"] - found["average"] == pytest.approx(
        sum(own) / 5
    )
    fixed = [results.values("scratch", "0.5", name)[0] for name in mfp.PAPER_CRITERIA]
    switched = results.values("scratch", "0.5", "mfp loss")[0]
    start = "- Pruned from scratch, rate 0.5 (seeds: 1): switching by the loss"
    (line,) = (line for line in text.splitlines() if line.startswith(start))
    drawn, worst = (results.values("scratch", "0.5", name)[0] for name in ("random", "worst"))
    assert (
        f"average {sum(fixed) / 5:.1f} %, random filters {drawn:.1f} %, pruning the highest norms {worst:.1f} %" in text
    )
    assert f"is {switched - max(fixed):+.1f} points" in line and f"{switched - sum(fixed) / 5:+.1f} from" in line
    plots = {path.name: path.read_bytes() for path in (whole / "page").iterdir()}
    assert set(plots) == {"once.svg", "finetune.svg", "scratch.svg", "allocation.svg"} and all(
        name in text for name in plots
    )
    arguments = [*OPTIONS, "--output", str(whole), "--page", str(tmp_path / "page.md")]
    assert study.main(arguments) == 0  # nothing is run again
    assert {path.name: path.read_bytes() for path in (tmp_path / "page").iterdir()} == plots
    assert (tmp_path / "page.md").read_text() == text
    assert study.main(["--output", str(tmp_path / "none"), "--page", str(tmp_path / "other.md")]) == 2
    assert not (tmp_path / "other.md").exists()
