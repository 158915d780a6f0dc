"""Loads the compiled part and chooses, per device, who computes: cpu, cuda, triton or the plain-torch reference."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from dataclasses import dataclass
from types import ModuleType

import torch

from mfp.errors import MfpError, did_you_mean

REBUILD = "python -m pip install --no-build-isolation --force-reinstall --no-deps . (in a checkout of mfp)"


@functools.cache
def _compiled() -> tuple[ModuleType | None, str | None]:
    """The extension module, or None and the reason. Importing it registers the compiled ops."""
    try:
        module = importlib.import_module("mfp._C")
    except ModuleNotFoundError:
        return None, "mfp._C was not built (no compiler, or MFP_EXTENSION=0); plain torch computes instead"
    except ImportError as error:  # an undefined symbol: built against another torch
        reason = f"mfp._C does not load into torch {torch.__version__} ({error}); rebuild with: {REBUILD}"
        warnings.warn(reason, stacklevel=2)
        return None, reason
    built = module.build_info()["torch"]
    if built != torch.__version__:
        reason = f"mfp._C was built for torch {built}, running {torch.__version__}; rebuild with: {REBUILD}"
        warnings.warn(reason, stacklevel=2)
        return None, reason
    return module, None


def build_info() -> dict | None:
    """How the compiled part was built: torch, compiler, CUDA architectures, CPU instruction set. None without it."""
    module, _ = _compiled()
    return module.build_info() if module else None


@dataclass(frozen=True)
class Backend:
    """One way to run the ops.

    Attributes:
        name: what ``MFP_BACKEND`` takes.
        devices: the device types whose tensors it accepts; empty means any.
        unusable: the reason why it cannot run here, or None.
        remedy: what to do about that.
    """

    name: str
    devices: tuple[str, ...]
    unusable: str | None = None
    remedy: str | None = None

    def accepts(self, device: torch.device) -> bool:
        return not self.devices or device.type in self.devices


NO_DEVICE = "torch sees no CUDA device"
WITH_A_GPU = "nothing, without an NVIDIA GPU; with one: nvidia-smi must list it, and torch must be built with CUDA"


def _cuda_unusable() -> tuple[str | None, str | None]:
    """Why the compiled CUDA kernels cannot run, and what to do."""
    module, reason = _compiled()
    if module is None:
        return reason, "build the compiled part (see cpu)"
    if module.build_info()["cuda_architectures"] is None:
        what = (
            f"nvcc of CUDA {torch.version.cuda.split('.')[0]}" if torch.version.cuda else "a torch with CUDA, and nvcc"
        )
        return "mfp was built without CUDA kernels", f"install {what}, then MFP_CUDA=1 {REBUILD}"
    return (None, None) if torch.cuda.is_available() else (NO_DEVICE, WITH_A_GPU)


def _triton_unusable() -> tuple[str | None, str | None]:
    """Why the Triton kernels cannot run, and what to do."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton does not import: {error}", "python -m pip install triton"
    if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available():
        return None, None
    return NO_DEVICE, f"{WITH_A_GPU}; TRITON_INTERPRET=1 runs it on a CPU, slowly"


@functools.cache
def backends() -> dict[str, Backend]:
    """All backends by name, in the order in which they are preferred."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    records = (
        Backend("cpu", ("cpu",), _compiled()[1], f"install a C++ compiler if there is none, then {REBUILD}"),
        Backend("cuda", ("cuda",), *_cuda_unusable()),
        Backend("triton", ("cuda", "cpu") if interpreted else ("cuda",), *_triton_unusable()),
        Backend("reference", ()),
    )
    return {record.name: record for record in records}


def choose(device: torch.device, requested: str | None = None) -> Backend:
    """The backend for tensors on ``device``.

    A backend that is asked for, by argument or by ``MFP_BACKEND``, is the one that runs or an error.

    Raises:
        MfpError: the requested backend is unknown, cannot run here, or does not accept the device.
    """
    requested = requested or os.environ.get("MFP_BACKEND")
    if requested is None:
        return next(b for b in backends().values() if b.unusable is None and b.accepts(device))
    if requested not in backends():
        near = did_you_mean(requested, backends())
        raise MfpError(f"unknown backend {requested!r}: known are {', '.join(backends())}{near}")
    backend = backends()[requested]
    if backend.unusable:
        raise MfpError(f"backend {requested!r} was requested and cannot run: {backend.unusable}")
    if not backend.accepts(device):
        raise MfpError(
            f"backend {requested!r} was requested for tensors on {device}; it takes {', '.join(backend.devices)}"
        )
    return backend
