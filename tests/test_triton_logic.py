"""Runs tests/triton_cases.py in Triton's interpreter, which needs a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

triton = pytest.importorskip("triton")
TESTS = Path(__file__).parent


def version(package):
    return tuple(map(int, package.__version__.split(".")[:2]))


# It takes arrays of one element for numbers, which numpy has not allowed since 2.4.
OLD_INTERPRETER = version(triton) <= (3, 6) and version(numpy) >= (2, 4)


@pytest.mark.long
@pytest.mark.skipif(OLD_INTERPRETER, reason="Triton 3.6's interpreter needs numpy < 2.4 (make oldest has it)")
def test_kernels_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(TESTS / "triton_cases.py")]
    run = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout, run.stdout[-500:]


def test_the_folder_of_kernels_is_not_taken_for_another_package():
    """transformers asks for the version of a package of this name wherever Python starts, in this repository too."""
    command = "import kernels; assert kernels.__version__ == '0' and not hasattr(kernels, 'score_filters')"
    subprocess.run([sys.executable, "-c", command], cwd=TESTS.parent, check=True)
