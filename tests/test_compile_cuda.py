"""CUDA kernels compile for sm_80, sm_90 and sm_100 without spilling; the inner loop is what it should be."""

import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

SOURCES = Path(__file__).parent.parent / "csrc"
FILES = sorted((SOURCES / "cuda").glob("*.cu"))
ARCHITECTURES = (80, 90, 100)

pytestmark = pytest.mark.skipif(
    shutil.which("nvcc") is None or os.environ.get("MFP_CUDA") == "0", reason="nvcc is not here, or MFP_CUDA=0"
)


@functools.cache
def report(name: str) -> str:
    """What ptxas says of a file; objects and reports are kept as long as the sources stay the same."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted((SOURCES / "cuda").iterdir()))).hexdigest()
    folder = Path(tempfile.gettempdir()) / f"mfp_cuda_objects_{digest[:16]}"
    folder.mkdir(exist_ok=True)
    saved = folder / f"{name}.txt"
    if not saved.exists():
        targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
        command = ["nvcc", "-O3", "-std=c++17", "--threads", "2", f"-I{SOURCES}", *targets, "-Xptxas", "-v", "-c",
                   str(SOURCES / "cuda" / name), "-o", str(folder / f"{name}.o")]  # fmt: skip
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-4000:]
        saved.write_text(run.stderr + run.stdout)
    return saved.read_text()


@pytest.mark.parametrize("name", [path.name for path in FILES])
def test_no_kernel_spills(name):
    text = report(name)
    entries = re.findall(r"Compiling entry function '(\w+)' for 'sm_(\d+)'", text)
    assert {architecture for _, architecture in entries} == {str(a) for a in ARCHITECTURES}
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
    assert len(spills) >= len(entries) > 0
    assert {numbers for numbers in spills if numbers != ("0", "0", "0")} == set()
