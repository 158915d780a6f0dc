from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import mfp
from mfp.export import engines
from mfp.train.checkpoints import checkpoint_files
from mfp.train.config import RunConfig

TINY = (
    "--model",
    "train_helpers:TinyNet",
    "--epochs",
    "2",
    "--batch",
    "100",
    "--lr",
    "0.05",
    "--settle",
    "0",
    "--calibration-batches",
    "1",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of the tiny network, and what it printed."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    arguments = [sys.executable, "-m", "mfp", "prune", *TINY, "--output", directory]
    process = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False)
    assert process.returncode == 0, process.stderr
    return directory, process


def test_prune_end_to_end(finished):
    directory, process = finished
    result = json.loads((directory / "result.json").read_text())
    assert result["masked"]["top1"] == result["compact"]["top1"]
    assert result["difference"] < 1e-5
    assert result["compact"]["flops"] < 0.8 * result["dense"]["flops"] == 0.8 * result["masked"]["flops"]
    assert result["compact"]["parameters"] < 0.8 * result["dense"]["parameters"]
    assert result["compact"]["milliseconds"] > 0 < result["dense"]["milliseconds"]
    assert result["kept"] == {"conv1": [5, 8], "conv2": [8, 12]}
    assert len(result["criteria"]) == 2
    for text in ("accuracy, % (top-1)", "FLOPs (multiply-adds)", "parameters", "ms per image", "criterion chosen"):
        assert text in process.stdout
    assert f"{result['dense']['flops']:,}" in process.stdout
    assert process.stderr.count("epoch 1/2") == process.stderr.count("epoch 2/2") == 2  # dense and pruned
    names = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    assert {"config.json", "compact.mfp", "dense/epochs.csv", "pruned/epochs.csv", "pruned/scores.safetensors"} <= names
    assert len(checkpoint_files(directory / "pruned")) == 2


def test_evaluate_masked_and_compact(finished, command):
    directory, _ = finished
    result = json.loads((directory / "result.json").read_text())
    accuracy = f"top-1 {result['compact']['top1']:.2f} %"
    code, out, _ = command("evaluate", directory / "compact.mfp")
    assert code == 0
    assert accuracy in out
    assert f"{result['compact']['flops']:,} FLOPs" in out
    code, out, err = command("evaluate", directory, "--model", "train_helpers:TinyNet")
    assert code == 0, err
    assert accuracy in out
    assert f"{result['masked']['flops']:,} FLOPs" in out


def test_compact_a_checkpoint(finished, command, tmp_path):
    directory, _ = finished
    newest = checkpoint_files(directory / "pruned")[-1]
    code, out, err = command("compact", newest, "--output", tmp_path / "s.mfp", "--model", "train_helpers:TinyNet")
    assert code == 0, err
    small, ours = mfp.load(tmp_path / "s.mfp"), mfp.load(directory / "compact.mfp")
    assert [p.shape for p in small.parameters()] == [p.shape for p in ours.parameters()]
    assert f"{(tmp_path / 's.mfp').stat().st_size:,} bytes" in out
    assert str(small.report) in out and "milliseconds per image" in out


@pytest.mark.parametrize("source", ["run", "file"])
def test_export_verified_and_measured(finished, command, tmp_path, source, monkeypatch):
    directory, _ = finished
    monkeypatch.setattr(engines, "measure", functools.partial(engines.measure, rounds=1, seconds=0.01))
    given = (directory, "--model", "train_helpers:TinyNet") if source == "run" else (directory / "compact.mfp",)
    code, out, err = command(
        "export", given[0], tmp_path / "s.onnx", "--verify", "--measure", "--batch", "1,2", *given[1:]
    )
    assert code == 0, err
    assert f"{tmp_path / 's.onnx'}: {(tmp_path / 's.onnx').stat().st_size:,} bytes" in out.replace("\n", "")
    assert re.search(r"onnxruntime, batch 3: outputs differ from torch's by \d\.\de-0[6-9]", out)
    rows = {line.split()[1] for line in out.splitlines() if line.startswith("│")}
    assert {"compact", "dense", "saved"} & rows == ({"compact", "dense", "saved"} if source == "run" else {"compact"})
    assert ("does not hold the dense network" in out) == (source == "file")


@pytest.mark.parametrize(("arguments", "said"), [
    (("s.tflite",), "s.tflite: the ending says the format, one of .onnx, .xml, .pt2"),
    (("s.onnx", "--measure", "--batch", "none"), "--batch 'none': write whole numbers, as 1,8"),
    (("s.onnx", "--measure", "--engine", "tvm"), "engine must be one of"),
])  # fmt: skip
def test_mistakes_of_export(finished, command, tmp_path, arguments, said):
    directory, _ = finished
    code, out, err = command("export", directory / "compact.mfp", tmp_path / arguments[0], *arguments[1:])
    assert code == 2 and len(err.splitlines()) == 1 and said in err and not out
    assert not list(tmp_path.iterdir())


def test_only_networks_are_exported(command, tmp_path):
    (tmp_path / "other.mfp").write_bytes(b"nothing")
    code, _, err = command("export", tmp_path / "other.mfp", tmp_path / "s.onnx")
    assert code == 2 and "other.mfp: cannot be read as a model file" in err


def test_a_file_never_causes_an_import(finished, command):
    directory, _ = finished
    code, _, err = command("compact", directory)
    assert code == 2
    assert "is imported only if you say --model train_helpers:TinyNet" in err
    code, _, err = command("prune", "--output", directory, "--resume")
    assert code == 2
    assert "names a function of yours; it is imported only if you say --model train_helpers:TinyNet" in err


def test_resuming_a_finished_run_gives_the_same(finished, command):
    directory, _ = finished
    before = json.loads((directory / "result.json").read_text())
    code, _, err = command("prune", "--output", directory, "--resume", "--model", "train_helpers:TinyNet")
    assert code == 0, err
    after = json.loads((directory / "result.json").read_text())
    assert after["digest"] == before["digest"]
    assert after["masked"] == before["masked"]


def test_data_of_ones_own(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = ("--dataset", "train_helpers:few_digits")
    arguments = ("prune", *TINY, *own, "--batch", 12, "--epochs", 1, "--no-dense", "--validation", 0.25)
    code, out, err = command(*arguments)
    assert code == 0, err
    assert "TinyNet on few_digits" in out and "images: 48 for training, 16 for validation, 20 for testing" in out
    assert "validation loss" in err and "test loss" not in err
    directory = Path("runs") / "TinyNet-few_digits"
    result = json.loads((directory / "result.json").read_text())
    assert (result["masked"]["images"], result["images"]) == (20, [48, 16, 20])
    code, out, err = command("evaluate", directory / "compact.mfp", *own)
    assert code == 0, err
    assert f"top-1 {result['compact']['top1']:.2f} %" in out and "on 20 images" in out
    code, _, err = command("prune", "--output", directory, "--resume", "--model", "train_helpers:TinyNet")
    assert code == 2
    assert "names a function of yours; it is imported only if you say --dataset train_helpers:few_digits" in err
    code, _, err = command("prune", "--output", directory, "--resume", "--model", "train_helpers:TinyNet", *own)
    assert code == 0, err
    assert json.loads((directory / "result.json").read_text())["digest"] == result["digest"]


def test_networks_by_name_take_three_channels(command, tmp_path):
    code, _, err = command("prune", "--dataset", "train_helpers:few_grey", "--output", tmp_path / "run")
    assert code == 2
    assert err.splitlines() == ["error: resnet20 takes images of 3 channels, not 1: give a network of yours by --model"]


def test_runs_are_kept_apart(finished, command):
    directory, _ = finished
    code, _, err = command("prune", *TINY, "--output", directory)
    assert code == 2
    assert f"{directory} already holds a run: go on with it by --resume, or give another --output" in err
    code, _, err = command("prune", *TINY, "--output", directory, "--resume", "--lr", "0.3")
    assert code == 2
    assert "config.json is of another run: it has lr 0.05 instead of 0.3. Go on with its settings, or" in err


def test_resuming_where_nothing_is_says_so(command, tmp_path):
    code, _, err = command("prune", *TINY, "--epochs", "1", "--settle", "0", "--mode", "hard", "--no-dense",
                           "--output", tmp_path / "run", "--resume")  # fmt: skip
    assert code == 0
    assert f"nothing to resume in {tmp_path / 'run'}: a new run begins there" in err
    assert "at the end the network that is left: " in err and "from epoch 2" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("prune --rate 1", "error: --rate must be at least 0 and below 1, not 1.0"),
        ("prune --rate 0", "--rate 0.0 with --channel-multiple 1 prunes no filter of any of the 13 layers of resnet20"),
        ("prune --arch resnet21", "unknown network 'resnet21'; near it: "),
        ("prune --arch os:getcwd", "code of yours is imported only by --model package:function"),
        ("prune --model resnet20", "write package:function (names of networks go to --arch)"),
        ("prune --model os.path:nothing", "--model os.path:nothing: cannot find it"),
        ("prune --data mnist", "unknown data 'mnist'; known are digits, fashion-mnist:PATH, cifar10:PATH"),
        ("prune --data dataset:os:getcwd", "code of yours is imported only by --dataset package:function"),
        ("evaluate nowhere --data dataset:os:getcwd", "code of yours is imported only by --dataset package:function"),
        ("prune --dataset digits", "--dataset digits: write package:function (names of data sets go to --data)"),
        ("prune --dataset a:b --data digits", "--data digits and --dataset a:b: give one of the two"),
        ("prune --validation 1", "--validation must be at least 0 and below 1, not 1.0"),
        ("prune --data cifar10:/nowhere", "no folder /nowhere/cifar-10-batches-py"),
        ("prune --criteria l3", "unknown criterion 'l3': known are l1_norm"),
        ("prune --attribute beauty", "unknown attribute 'beauty': known are weight_energy, sparsity, loss"),
        ("prune --mode firm", "--mode must be one of soft, hard, asymptotic, cubic, not firm"),
        ("prune --weights nowhere.pt", "no weights file nowhere.pt"),
        ("prune --weights pretrained", "no pretrained weights for resnet20"),
        ("prune --milestones a,b", "--milestones 'a,b': write whole numbers, as 60,120,160"),
        ("prune --layer-rates conv1", "--layer-rates 'conv1': write layer=rate"),
        ("prune --layer-rates convx=0.2", "convx"),
        ("prune --batch 5000", "--batch 5000 is more than the 1294 images there are to train on"),
        ("prune --recipe best", "unknown recipe 'best'; known are demo, resnet20-fashion-mnist, resnet20-cifar10"),
        ("prune --recipe resnet56-cifar10", "--recipe resnet56-cifar10 needs --data cifar10:PATH"),
        ("prune --device tpu", "unknown device 'tpu'"),
        ("prune --per-layer", "per_layer=True needs an attribute without data"),
        ("compact nowhere", "cannot read nowhere: No such file"),
        ("evaluate nowhere.mfp", "nowhere.mfp"),
        ("report nowhere", "nowhere"),
    ],
)
def test_mistakes_are_one_readable_line(command, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(*arguments.split())
    assert code == 2
    assert message in err
    assert len([line for line in err.splitlines() if not line.startswith("warning:")]) == 1
    assert "Traceback" not in err + out


def test_a_damaged_checkpoint_is_named(finished, command, tmp_path):
    directory, _ = finished
    short = tmp_path / "short.safetensors"
    short.write_bytes(checkpoint_files(directory / "pruned")[-1].read_bytes()[:-9])
    code, _, err = command("compact", short)
    assert code == 2
    assert f"{short} is no checkpoint of mfp, or it is damaged" in err
    (tmp_path / "compact.mfp").write_bytes((directory / "compact.mfp").read_bytes()[:-9])
    code, _, err = command("evaluate", tmp_path / "compact.mfp")
    assert code == 2
    assert "compact.mfp" in err


def test_nothing_pruned_is_an_error(command, tmp_path):
    code, _, err = command("prune", *TINY, "--epochs", 1, "--rate", 0.05, "--no-dense", "--output", tmp_path / "run")
    assert code == 2
    assert "prunes no filter of any of the 2 layers" in err


def test_a_target_instead_of_a_rate(command, tmp_path):
    directory = tmp_path / "run"
    arguments = ("prune", *TINY, "--no-dense", "--target-parameters", "70%", "--output", directory)
    code, out, err = command(*arguments, "--epochs", 1)
    assert code == 0, err
    found = RunConfig.from_json((directory / "config.json").read_text()).rate
    assert f"for the target: rate {found:g}: " in out + err
    assert "asked for 70.0%" in out + err
    result = json.loads((directory / "result.json").read_text())
    assert result["compact"]["parameters"] <= 0.7 * result["dense"]["parameters"]
    code, out, err = command(*arguments, "--epochs", 1, "--resume")  # takes the stored rate, and is at the end
    assert code == 0, err
    code, _, err = command("prune", *TINY, "--target-flops", "0.001%", "--output", tmp_path / "other")
    assert code == 2
    assert "cannot be reached" in err
    assert not (tmp_path / "other").exists()


def test_rates_by_sensitivity(command, tmp_path):
    directory = tmp_path / "run"
    arguments = (
        "prune",
        *TINY,
        "--epochs",
        1,
        "--target-flops",
        "60%",
        "--allocate",
        "sensitivity",
        "--output",
        directory,
    )
    code, out, err = command(*arguments)
    assert code == 0, err
    found = json.loads((directory / "rates.json").read_text())
    assert "for the target: rates " in out + err and len(set(found["layer_rates"].values())) == 2
    result = json.loads((directory / "result.json").read_text())
    assert result["compact"]["flops"] == found["reached"] <= 0.6 * result["dense"]["flops"]
    assert result["config"]["layer_rates"] == found["layer_rates"]
    assert result["kept"]["conv1"] == [8 - int(8 * found["layer_rates"]["conv1"]), 8]
    # killed after the rates were found: they are taken from the file, and the run ends with the same bits
    for path in (directory / "pruned").iterdir():
        path.unlink()
    (directory / "result.json").unlink()
    code, _, err = command(*arguments, "--resume")
    assert code == 0 and "for the target" not in err, err
    assert json.loads((directory / "result.json").read_text())["digest"] == result["digest"]
    assert command("compact", directory, "--model", TINY[1], "--output", tmp_path / "small.mfp")[0] == 0
    (directory / "rates.json").write_text("{")
    code, _, err = command(*arguments, "--resume")
    assert code == 2 and "does not hold the rates of a run" in err
    for wrong, said in (
        (("--target-flops", "60%", "--no-dense"), "needs a trained network"),
        (("--target-flops", "0.1%"), "cannot be reached: the nearest is"),  # found before anything is trained
        ((), "needs a target"),
    ):
        code, _, err = command("prune", *TINY, "--allocate", "sensitivity", *wrong, "--output", tmp_path / "other")
        assert code == 2 and said in err and not (tmp_path / "other").exists()


def test_rates_and_criterion_at_each_pruning_point(command, tmp_path):
    directory = tmp_path / "run"
    arguments = ("prune", *TINY, "--allocate", "each-point", "--criteria", "l1_norm,l2_distance", "--no-dense")
    code, out, err = command(*arguments, "--output", directory)
    assert code == 0, err
    choice = json.loads((directory / "result.json").read_text())["choice"]
    candidates = {"l1_norm", "l2_distance", "l1_norm by sensitivity", "l2_distance by sensitivity"}
    assert choice["neighbours"].keys() == choice["hindsight"].keys() == candidates and choice["chosen"] in candidates
    shown = [line for line in out.splitlines() if any(name in line for name in candidates) and "%" not in line]
    for name in candidates:
        (line,) = [line for line in shown if re.search(rf"{name} *│", line)]
        assert f"{choice['hindsight'][name]:.2f}" in line and f"{choice['neighbours'][name]:.4g}" in line
        assert ("→ " in line) == (name == choice["chosen"])
    behind = max(choice["hindsight"].values()) - choice["hindsight"][choice["chosen"]]
    assert f"the choice was {behind:.2f} points behind the best of them" in out
    code, out, err = command(*arguments, "--hindsight", 0, "--epochs", 1, "--output", tmp_path / "other")
    assert code == 0 and "behind the best" not in out and "by each criterion alone" in out, err


def test_too_few_calibration_images_are_found_before_anything_is_written(command, tmp_path):
    arguments = (
        "--model",
        "test_cli:one_place",
        "--batch",
        1,
        "--calibration-batches",
        1,
        "--output",
        tmp_path / "run",
    )
    code, _, err = command("prune", *arguments)
    assert code == 2 and "sees one value per channel" in err and len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def one_place(num_classes):
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 32), torch.nn.BatchNorm2d(8), torch.nn.Flatten(), torch.nn.Linear(8, num_classes)
    )


def test_ctrl_c_leaves_a_run_that_can_be_resumed(command, tmp_path):
    directory = tmp_path / "run"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    arguments = [sys.executable, "-m", "mfp", "prune", *TINY, "--no-dense", "--output", directory]
    process = subprocess.Popen([*arguments, "--epochs", "400"], stderr=subprocess.PIPE, text=True, env=environment)
    for _ in range(600):
        time.sleep(0.1)
        if checkpoint_files(directory / "pruned"):
            break
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "Traceback" not in error
    newest = checkpoint_files(directory / "pruned")[-1]
    last = error.splitlines()[-1]
    assert last == f"stopped by SIGINT; {newest} is complete; go on with: mfp prune --output {directory} --resume"
    code, _, err = command("compact", directory, "--output", tmp_path / "s.mfp", *TINY[:2])
    assert code == 0, err
    assert mfp.load(tmp_path / "s.mfp") is not None


def test_info_works_without_the_extra():
    code = (
        "import sys; sys.modules.update(torchvision=None, sklearn=None, matplotlib=None); sys.argv = ['mfp', 'info']\n"
        "from mfp.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code\n"
        "sys.argv[1] = 'prune'; main()"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 2, process.stderr
    assert f"mfp {mfp.__version__}" in process.stdout
    assert "backend reference: runs" in process.stdout
    listed = [line for line in process.stdout.splitlines() if line.startswith("backend ")]
    remedies = [line.split()[2] for line in process.stdout.splitlines() if line.startswith("to run ")]
    assert remedies == [line.split()[1] for line in listed if not line.endswith(": runs")]
    assert "pip install 'mfp[train]'" in process.stderr
    assert len(process.stderr.splitlines()) == 1
