"""The CUDA kernels in mfp._C do not spill, for any architecture; the inner loop is what it should be."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

import mfp

CUDA = Path(__file__).parent.parent / "csrc" / "cuda"
BUILT = mfp.backend.build_info() or {}
ARCHITECTURES = re.findall(r"\d+", (BUILT.get("cuda_architectures") or "").replace(".", ""))  # "8.0;10.0+PTX": 80, 100

pytestmark = pytest.mark.skipif(not ARCHITECTURES, reason="the CUDA kernels are not built (mfp info says why)")


@pytest.fixture(scope="module")
def tool():
    """benchmarks/gpu_resources.py"""
    pytest.importorskip("triton")  # its package has cuobjdump
    path = CUDA.parent.parent / "benchmarks" / "gpu_resources.py"
    spec = importlib.util.spec_from_file_location("gpu_resources", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_kernel_spills(tool):
    """What does not fit into registers goes to the stack, which is local memory."""
    command = [tool.cuobjdump(), "-res-usage", mfp._C.__file__]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    seen = {}
    for part in text.split("arch = sm_")[1:]:
        architecture, source = part.split()[0], re.search(r"identifier = .*/(\w+\.cu)", part)[1]
        for name, usage in re.findall(r"Function (\w+):\s+(REG.*)", part):
            seen.setdefault(architecture, set()).add((source, tool.readable(name)))
            assert "STACK:0 " in usage and "LOCAL:0 " in usage, (architecture, name, usage)
    assert set(seen) == set(ARCHITECTURES)
    for kernels in seen.values():
        assert kernels == seen[ARCHITECTURES[0]]
        assert {source for source, _ in kernels} == {path.name for path in CUDA.glob("*.cu")}


@pytest.mark.skipif("90" not in ARCHITECTURES, reason="the CUDA kernels are not built for sm_90")
def test_the_inner_loops_hold_nothing_but_the_arithmetic(tool):
    """Three instructions a pair element for all criteria, two for one distance; a shared load for ten or more."""
    loops = tool.inner_loops(Path(mfp._C.__file__))
    for kernel, arithmetic in (("score_kernel<1,1>", 3), ("score_kernel<1,0>", 2)):
        loop = max(loops[kernel], key=lambda counts: counts["FADD"] + counts["FFMA"])
        work = loop["FADD"] + loop["FFMA"]
        assert loop["FADD"] / (loop["FADD"] + loop["FFMA"]) == (2 / 3 if arithmetic == 3 else 1)
        assert loop["LDS"] <= work / (10 * arithmetic)
        assert loop.total() <= 1.07 * work, loop
        assert not loop["LDL"] and not loop["STL"]
    products = max(loops["score_kernel<0,1>"], key=lambda counts: counts["HMMA"])  # 8,192 pair elements of a warp
    assert products["HMMA"] == 24 and products.total() <= 120, products
