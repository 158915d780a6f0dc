"""Triton kernels compile for GPUs that are not here, and a new network compiles nothing new."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
TESTS = Path(__file__).parent
DOCUMENT = (TESTS.parent / "docs" / "kernels.md").read_text()
ARCHITECTURES = ("80", "90", "100")
KERNELS = (
    "_direct_kernel", "_power_kernel", "_taylor_kernel", "_select_kernel", "_mask_kernel", "_sgd_kernel",
    "_adamw_kernel", "_scatter_kernel",
)  # fmt: skip


def run(*what):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(TESTS / "triton_compile.py"), *what]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.mark.long
def test_every_kernel_compiles_without_spilling():
    lines = [line.split() for line in run("resources", *ARCHITECTURES).splitlines()]
    assert {(line[0].split("[")[0], line[1]) for line in lines} == set(itertools.product(KERNELS, ARCHITECTURES))
    assert [line for line in lines if line[3] != "0"] == []
    if f"Triton {triton.__version__}," in DOCUMENT:
        rows = re.findall(r"^\| `(_\w+\[\d*\])` \| (\d+) \| (\d+) \| (\d+) \|$", DOCUMENT, re.MULTILINE)
        table = {(row[0], architecture): row[i + 1] for row in rows for i, architecture in enumerate(ARCHITECTURES)}
        assert table == {(line[0], line[1]): line[2] for line in lines}


def test_another_network_compiles_nothing_new():
    first, *others = map(int, run("networks").split())
    assert first == 8  # one of each kernel
    assert others == [0, 0, 0]
