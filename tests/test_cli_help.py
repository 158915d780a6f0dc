"""What the command line says before it does anything: help in groups, answers to mistyped names, completion."""

import os
import subprocess
import sys

import pytest

from mfp import cli
from mfp.train.config import RunConfig


def test_the_options_are_in_groups_and_the_five_that_matter_come_first(command):
    out = command("prune", "--help")[1]
    places = [out.index(title) for title in cli.PANELS]
    assert places == sorted(places)
    first = out[places[0] : places[1]]
    assert [line.split()[1] for line in first.splitlines() if "--" in line and "──" not in line] == [
        "--arch", "--data", "--rate", "--epochs", "--output",
    ]  # fmt: skip
    grouped = [name for names in cli.PANELS.values() for name in names]
    assert len(grouped) == len(set(grouped))
    own = {"output", "recipe", "model", "dataset", "resume"}
    assert set(grouped) <= set(RunConfig.__dataclass_fields__) | own


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (("--criteria", "l2_nrom"), "l2_norm"),
        (("--mode", "sotf"), "soft"),
        (("--residual", "copled"), "coupled"),
        (("--data", "digit"), "digits"),
        (("--recipe", "resnet20-cifar"), "resnet20-cifar10"),
        (("--attribute", "lss"), "loss"),
        (("--layer-rates", "layer1.0.conv9=0.2", "--no-dense"), "layer1.0.conv"),
        (("--target-milliseconds", "60%", "--engine", "openvin"), "openvino"),
    ],
)
def test_a_mistyped_name_is_answered_with_the_nearest(command, tmp_path, given, meant):
    code, _, err = command("prune", *given, "--output", tmp_path / "run")
    assert code == 2
    assert f"did you mean '{meant}" in err.splitlines()[-1]


def test_a_mistyped_network_is_answered_with_those_near_it(command, tmp_path):
    code, _, err = command("prune", "--arch", "resnet5O", "--output", tmp_path / "run")
    assert code == 2 and "near it: resnet56, resnet50, " in err.splitlines()[-1]


def test_a_mistyped_option_or_command_is_answered_with_the_nearest(command):
    code, _, err = command("prune", "--rte", "0.3")
    assert code == 2 and "--rate" in err
    code, _, err = command("prnue")
    assert code == 2 and "prune" in err


def test_the_shell_completes(monkeypatch):
    words = {"_MFP_COMPLETE": "complete_bash", "COMP_WORDS": "mfp prune --target-m", "COMP_CWORD": "2"}
    program = "import sys; sys.argv = ['mfp']; from mfp.cli import main; main()"
    process = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env={**os.environ, **words}
    )
    assert process.stdout.split() == ["--target-milliseconds"]


def test_every_setting_is_an_option(command):
    code, out, _ = command("prune", "--help")
    assert code == 0
    for name in RunConfig.__dataclass_fields__:
        assert f"--{name.replace('_', '-')} " in out.replace("\n", " ")
