"""Builds the compiled part of mfp, `mfp._C`: C++ for the CPU always, CUDA where nvcc and a CUDA torch are there.

Switches, all of them:
  MFP_EXTENSION=0        build: no compiled part at all (no compiler needed); plain torch computes
  MFP_CUDA=auto|0|1      build: CUDA kernels if possible (default), never, or fail when impossible
  MFP_BACKEND=NAME       run time: force reference, cpu, cuda or triton; nothing falls back silently
  MFP_CPU_ISA=NAME       run time: cap the CPU kernels at portable, avx2 or avx512
  MFP_WINOGRAD=0         run time: no Winograd convolutions in the serving form on a CPU; plain sums
  MFP_DEBUG=1            run time: the command line shows tracebacks
  TORCH_CUDA_ARCH_LIST   build: GPU architectures (torch's own switch), default "8.0;9.0;10.0+PTX"

Install with `python -m pip install --no-build-isolation .`: a compiled extension loads only into the torch it was
built against, and an isolated build may fetch another one.
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

WITHOUT = "MFP_EXTENSION=0 installs mfp without its compiled part: plain torch computes then, slower"
# a source distribution needs neither torch nor a compiler
BUILDS = os.environ.get("MFP_EXTENSION") != "0" and not {"sdist", "egg_info"} & set(sys.argv[1:2])
try:
    import torch
except ImportError:
    if BUILDS:
        sys.exit(
            "mfp is compiled against your torch, and none is installed here: install torch first, then run "
            f"`python -m pip install --no-build-isolation .`; or: {WITHOUT}"
        )

ROOT = Path(__file__).parent
DEFAULT_ARCHITECTURES = "8.0;9.0;10.0+PTX"


def cuda_toolkit(nvcc: str) -> str | None:
    """The toolkit's folder as nvcc itself sees it: the nvcc on PATH may be a wrapper script."""
    run = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull, "-c", "-o", os.devnull],
        capture_output=True,
        text=True,
        check=False,
    )
    top = re.search(r"^#\$ TOP=(.+)$", run.stderr + run.stdout, re.MULTILINE)
    return os.path.realpath(top.group(1).strip()) if top else None


def why_no_cuda() -> str | None:
    """None when CUDA kernels can be built (CUDA_HOME is set then), else the reason."""
    if os.environ.get("MFP_CUDA", "auto") == "0":
        return "MFP_CUDA=0"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)
    if nvcc is None:
        return "nvcc was not found (PATH, CUDA_HOME)"
    version = re.search(
        r"release (\d+)\.\d+", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    )
    if version is None or version.group(1) != torch.version.cuda.split(".")[0]:
        return f"nvcc is of CUDA {version.group(1) if version else 'unknown'}, torch of CUDA {torch.version.cuda}"
    toolkit = home or cuda_toolkit(nvcc)
    if toolkit is None:
        return f"{nvcc} does not tell where its toolkit is; set CUDA_HOME"
    os.environ["CUDA_HOME"] = toolkit  # before torch.utils.cpp_extension is imported: it reads it once
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)
    return None


def require_compiler():
    """Stops with what is missing: the build's own message comes after a page of others."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        sys.exit(
            f"mfp has C++ parts, and the compiler {compiler!r} was not found: install g++ or clang "
            f"(Debian: apt install g++), or name one in CXX; or: {WITHOUT}"
        )


def extension():
    require_compiler()
    reason = why_no_cuda()
    if reason and os.environ.get("MFP_CUDA") == "1":
        sys.exit(f"MFP_CUDA=1, but CUDA kernels cannot be built: {reason}")
    print(f"CUDA kernels: {'no, because ' + reason if reason else 'yes, ' + os.environ['TORCH_CUDA_ARCH_LIST']}")
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    sources = sorted(ROOT.glob("csrc/*.cpp")) + sorted(ROOT.glob("csrc/cpu/**/*.cpp"))
    instruction_sets = ROOT / "csrc" / "cpu" / "instruction_sets.py"
    sources += runpy.run_path(str(instruction_sets))["write_sources"](ROOT / "build" / "kernels")
    cxx = ["-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wall"]
    macros = [("MFP_TORCH_VERSION", f'"{torch.__version__}"')]
    kind, arguments = CppExtension, {"cxx": cxx}
    if reason is None:
        sources += sorted(ROOT.glob("csrc/cuda/*.cpp")) + sorted(ROOT.glob("csrc/cuda/*.cu"))
        macros += [
            ("MFP_WITH_CUDA", None),
            ("MFP_CUDA_ARCHITECTURES", f'"{os.environ["TORCH_CUDA_ARCH_LIST"]}"'),
        ]
        kind, arguments = CUDAExtension, {"cxx": cxx, "nvcc": ["-O3", "-lineinfo"]}
    headers = [path for pattern in ("*.h", "*.cuh") for path in ROOT.glob(f"csrc/**/{pattern}")]
    import pybind11

    return kind(
        "mfp._C",
        sources=[str(path.relative_to(ROOT)) for path in sources],
        include_dirs=[str(ROOT / "csrc"), pybind11.get_include()],
        depends=[str(path.relative_to(ROOT)) for path in [*sorted(headers), instruction_sets]],
        define_macros=macros,
        extra_compile_args=arguments,
        extra_link_args=["-fopenmp"],
    )


def build_command():
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def finalize_options(self):
            # Kept: only what has changed is compiled again. Each python and torch has its own.
            objects = f"build/objects/{sys.implementation.cache_tag}-torch-{torch.__version__}"
            self.build_temp = self.build_temp or objects
            super().finalize_options()

    return Build.with_options(use_ninja=True)


setup(
    packages=[
        "mfp",
        "mfp.bench",
        "mfp.capture",
        "mfp.compact",
        "mfp.export",
        "mfp.serving",
        "mfp.train",
        "mfp.kernels",
    ],
    package_dir={"mfp": "mfp", "mfp.kernels": "kernels"},
    package_data={"mfp": ["py.typed"]},
    ext_modules=[extension()] if BUILDS else [],
    cmdclass={"build_ext": build_command()} if BUILDS else {},
)
