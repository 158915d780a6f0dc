"""CUDA kernels compile for sm_80, sm_90 and sm_100 without spilling; the inner loop is what it should be."""

import functools
import hashlib
import importlib.util
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


def object_of(name: str) -> Path:
    """Where `report` leaves a file's object; it is made anew when the sources change."""
    files = [*sorted(SOURCES.glob("*.h")), *sorted((SOURCES / "cuda").iterdir())]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    folder = Path(tempfile.gettempdir()) / f"mfp_cuda_objects_{digest[:16]}"
    folder.mkdir(exist_ok=True)
    return folder / f"{name}.o"


@functools.cache
def report(name: str) -> str:
    """What ptxas says of a file; the compiler runs only if the sources have changed."""
    built = object_of(name)
    saved = built.with_suffix(".txt")
    if not saved.exists():
        targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
        command = ["nvcc", "-O3", "-std=c++17", "--threads", "2", f"-I{SOURCES}", *targets, "-Xptxas", "-v", "-c",
                   str(SOURCES / "cuda" / name), "-o", str(built)]  # fmt: skip
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


def test_the_inner_loops_hold_nothing_but_the_arithmetic():
    """Three instructions a pair element for all criteria, two for one distance; a shared load for ten or more."""
    pytest.importorskip("triton")  # its package has cuobjdump
    report("score.cu")
    path = SOURCES.parent / "benchmarks" / "gpu_resources.py"
    spec = importlib.util.spec_from_file_location("gpu_resources", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    loops = tool.inner_loops(object_of("score.cu"))
    for kernel, arithmetic in (("score_kernel<1,1>", 3), ("score_kernel<1,0>", 2)):
        loop = max(loops[kernel], key=lambda counts: counts["FADD"] + counts["FFMA"])
        work = loop["FADD"] + loop["FFMA"]
        assert loop["FADD"] / (loop["FADD"] + loop["FFMA"]) == (2 / 3 if arithmetic == 3 else 1)
        assert loop["LDS"] <= work / (10 * arithmetic)
        assert loop.total() <= 1.07 * work, loop
        assert not loop["LDL"] and not loop["STL"]
    products = max(loops["score_kernel<0,1>"], key=lambda counts: counts["HMMA"])  # 8,192 pair elements of a warp
    assert products["HMMA"] == 24 and products.total() <= 120, products
