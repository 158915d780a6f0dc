"""`make gpu` without a GPU: every step's code runs on the CPU, and a step that hangs leaves the others their time."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def gpu():
    """benchmarks/gpu.py"""
    spec = importlib.util.spec_from_file_location("benchmark_gpu", ROOT / "benchmarks" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.long
def test_a_dry_run_takes_every_step(tmp_path):
    """compute-sanitizer is played by a script that runs what it is given."""
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\nshift 4; exec "$@"\n')
    tool.chmod(0o755)
    environment = os.environ | {"PATH": f"{tool.parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--dry-run", "--output", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    (file,) = tmp_path.glob("gpu-dry-run-*.json")
    content = json.loads(file.read_text())
    assert content["command"] == "make gpu ARGS=--dry-run" and "dry run" in content["machine"]
    steps = {row["step"]: row for row in content["rows"] if "outcome" in row}
    assert {name: row["outcome"] for name, row in steps.items()} == dict.fromkeys(
        ("tests", "kernels", "networks", "memcheck", "racecheck", "compiled"), "ok"
    )
    assert steps["tests"]["passed"] > 10 and steps["tests"]["failed"] == 0 and steps["memcheck"]["passed"] > 0
    rows = content["rows"]
    assert {row["form"] for row in rows if row["step"] == "compiled" and "form" in row} == {
        "dense", "coupled", "keep", "index",
    }  # fmt: skip
    right = [row for row in rows if row.get("job") == "outputs against masked float32"]
    assert len(right) == 12 and all(row["right"] for row in right)
    contestants = {row["contestant"] for row in rows if row.get("job") == "SGD step, mask of 40 %"}
    assert contestants == {"cpu", "torch fused, then a product"}
    assert all(row["share_of_epoch"] > 0 for row in rows if "pruning point" in row.get("job", ""))


def test_the_budget(gpu):
    assert sum(step.seconds for step in gpu.STEPS if step.name != "study") <= 540
    assert [step.name for step in gpu.STEPS[:3]] == ["build", "tests", "kernels"]


def test_a_step_that_hangs_is_ended_with_its_children(gpu, tmp_path):
    log, ticks = tmp_path / "log", []
    program = "echo begun; sleep 60; echo ended"
    outcome = gpu.run(["sh", "-c", program], 1.0, log, lambda: ticks.append(1), dict(os.environ))
    assert outcome == "ended after 1 s" and log.read_text() == "begun\n" and ticks
    outcome = gpu.run([sys.executable, "-c", "raise SystemExit(3)"], 30.0, log, ticks.clear, dict(os.environ))
    assert outcome == "status 3"


def test_outcomes_of_a_run_that_was_ended(gpu, tmp_path):
    log = tmp_path / "log"
    log.write_text(
        "tests/test_gpu.py::test_a[cuda] PASSED [ 1%]\n[gw1] [ 3%] PASSED tests/test_gpu.py::test_b[x-cuda] \n"
        "tests/test_gpu.py::test_c FAILED [ 4%]\ntests/test_gpu.py::test_hangs \n"
    )
    assert gpu.outcomes(log) == {"passed": 2, "failed": 1, "skipped": 0, "failures": "tests/test_gpu.py::test_c"}


def test_goals_stand_beside_what_was_measured(gpu):
    rows = [
        {"job": "l2_distance", "contestant": "cuda", "ms": 0.5},
        {"job": "l2_distance", "contestant": "torch loops", "ms": 9.0},
        {"job": "SGD step, mask of 40 %", "contestant": "cuda", "ms": 0.7},
        {"job": "SGD step, no mask", "contestant": "torch fused", "ms": 1.0},
    ]
    assert gpu.goals(rows) == [
        "l2_distance: 0.50 ms, goal 0.4 ms; torch loops 9.00 ms",
        "masked SGD step: 0.70 of torch's fused one without a mask, goal 0.8",
    ]
