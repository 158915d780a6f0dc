"""What the compiler made of the CUDA kernels in mfp._C, for each architecture: docs/kernels.md has the numbers."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import mfp

ROOT = Path(__file__).parent.parent
CUDA = ROOT / "csrc" / "cuda"
DOCUMENT = (ROOT / "docs" / "kernels.md").read_text()
BUILT = mfp.backend.build_info() or {}
ARCHITECTURES = re.findall(r"\d+", (BUILT.get("cuda_architectures") or "").replace(".", ""))  # "8.0;10.0+PTX": 80, 100
# kernel: blocks a multiprocessor, at least
BLOCKS = {
    "score_kernel<1,1>": 2, "score_kernel<1,0>": 3, "score_kernel<0,1>": 3, "score_kernel<0,0>": 4, "mask_kernel": 8,
    "step_kernel<Sgd>": 2, "step_kernel<Adamw>": 2,
    **{f"{kernel}<{number}>": 8 for kernel in ("pixels_kernel", "planes_kernel")
       for number in ("Float32", "Float16", "Bfloat16")},
}  # fmt: skip

pytestmark = pytest.mark.skipif(not ARCHITECTURES, reason="the CUDA kernels are not built (mfp info says why)")


@pytest.fixture(scope="module")
def tool():
    """benchmarks/gpu_resources.py"""
    pytest.importorskip("triton")  # its package has cuobjdump
    spec = importlib.util.spec_from_file_location("gpu_resources", ROOT / "benchmarks" / "gpu_resources.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def library():
    return Path(mfp._C.__file__)


def test_no_kernel_spills_and_blocks_fit(tool, library):
    """What does not fit into registers goes to the stack, which is local memory."""
    found = tool.resources(library)
    assert set(found) == set(ARCHITECTURES)
    for architecture, kernels in found.items():
        assert set(kernels) == set(BLOCKS)
        assert {source for source, _ in kernels.values()} == {path.name for path in CUDA.glob("*.cu")}
        for kernel, (_, used) in kernels.items():
            assert used["STACK"] == used["LOCAL"] == 0, (architecture, kernel, used)
            assert used["SHARED"] <= 1024  # what the system takes; all of ours is dynamic
            assert tool.blocks(kernel, used["REG"], architecture) >= BLOCKS[kernel], (architecture, kernel, used)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_inner_loops_hold_nothing_but_the_arithmetic(tool, library, architecture):
    """Three instructions a pair element for all criteria, two for one distance; a shared load for ten or more."""
    loops = tool.inner_loops(library, architecture)
    for kernel, arithmetic in (("score_kernel<1,1>", 3), ("score_kernel<1,0>", 2)):
        loop = tool.longest_loop(loops, kernel)
        work = loop["FADD"] + loop["FFMA"]
        assert loop["FADD"] / (loop["FADD"] + loop["FFMA"]) == (2 / 3 if arithmetic == 3 else 1)
        assert loop["LDS"] <= work / (10 * arithmetic)
        assert loop.total() <= 1.07 * work, loop
        assert not loop["LDL"] and not loop["STL"]
    products = tool.longest_loop(loops, "score_kernel<0,1>")  # 8,192 pair elements of a warp
    assert products["HMMA"] == 24 and products.total() <= 120, products


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bytes_that_the_memory_bound_kernels_move(tool, library, architecture):
    """Four vectors of four numbers a thread: 16 bytes an access in float32, 8 in each of the two 16-bit formats."""
    code = {name: tool.accesses(text) for name, text in tool.disassembly(library, architecture).items()}
    adamw = code["step_kernel<Adamw>"]
    assert (adamw["LD.128"], adamw["ST.128"]) == (4 * 4, 4 * 3)  # weight, gradient, two means; all but the gradient
    assert adamw["ST.64"] == 2 * 4 * 3
    sgd = code["step_kernel<Sgd>"]
    assert sgd["LD.128"] == 4 * 3 + 4 * 2  # with a momentum, and without
    assert sgd["ST.128"] in (4 * 2, 4 * 2 + 4) and sgd["ST.64"] == 2 * sgd["ST.128"]
    assert code["mask_kernel"]["ST.128"] == 1 and code["mask_kernel"]["LD.128"] == 0  # pruned rows are not read
    for kernel in BLOCKS:
        if kernel.startswith("score"):
            assert code[kernel]["ST.128"] == 1  # rows to zero; sums go to slots by threads side by side


def test_the_tables_of_the_document(tool, library):
    """As the compiler that the document names made them."""
    release = None
    if shutil.which("nvcc"):
        told = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
        release = re.search(r"release (\d+\.\d+)", told)[1]
    if f"nvcc {release} on" not in DOCUMENT or ARCHITECTURES != ["80", "90", "100"]:
        pytest.skip(f"built with nvcc {release} for {ARCHITECTURES}")
    lines = tool.resource_table(library) + tool.predictions(library)
    lines += [line for architecture in ARCHITECTURES for line in tool.loop_table(library, architecture)]
    assert len(lines) == 2 + len(BLOCKS) + 3 + 3 * 3
    assert [line for line in lines if line not in DOCUMENT] == []


def test_arrivals_are_fenced_on_both_sides(tool, library):
    """The machine code between two barriers: a fence, the atomic, and a fence that drops what L1 holds."""
    for architecture in ARCHITECTURES:
        for kernel, text in tool.disassembly(library, architecture).items():
            if not kernel.startswith("score"):
                continue
            names = re.findall(r"\s(BAR\.SYNC|MEMBAR|ATOMG\.E\.(?:ADD|EXCH)|CCTL\.IVALL)", text)
            arrivals = [i for i, name in enumerate(names) if name == "ATOMG.E.ADD"]
            fenced = [i for i in arrivals if names[i - 2 : i] == ["MEMBAR", "CCTL.IVALL"]
                      and names[i + 1 : i + 3] == ["MEMBAR", "CCTL.IVALL"]]  # fmt: skip
            assert len(arrivals) == len(fenced) + 1, (architecture, kernel, names)  # the next item needs no order
