"""Loads the compiled part and chooses, per device, who computes: cpu, cuda, triton or the plain-torch reference."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from dataclasses import dataclass
from types import ModuleType

import torch

from mfp.errors import MfpError

REBUILD = "python -m pip install --no-build-isolation --force-reinstall --no-deps mfp (or `.` in a checkout)"


@functools.cache
def _compiled() -> tuple[ModuleType | None, str | None]:
    """The extension module, or None and the reason. Importing it registers the compiled ops."""
    try:
        module = importlib.import_module("mfp._C")
    except ModuleNotFoundError:
        return None, "mfp._C was not built; install mfp with pip (README, Install)"
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
    """

    name: str
    devices: tuple[str, ...]
    unusable: str | None

    def accepts(self, device: torch.device) -> bool:
        return not self.devices or device.type in self.devices


def _cuda_unusable() -> str | None:
    module, reason = _compiled()
    if module is None:
        return reason
    if module.build_info()["cuda_architectures"] is None:
        return "mfp was built without CUDA kernels (see the line `CUDA kernels:` of the build)"
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def _triton_unusable() -> str | None:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton does not import: {error}"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return None if torch.cuda.is_available() else "torch sees no CUDA device (TRITON_INTERPRET=1 runs it on a CPU)"


@functools.cache
def backends() -> dict[str, Backend]:
    """All backends by name, in the order in which they are preferred."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    records = (
        Backend("cpu", ("cpu",), _compiled()[1]),
        Backend("cuda", ("cuda",), _cuda_unusable()),
        Backend("triton", ("cuda", "cpu") if interpreted else ("cuda",), _triton_unusable()),
        Backend("reference", (), None),
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
        raise MfpError(f"unknown backend {requested!r}: known are {', '.join(backends())}")
    backend = backends()[requested]
    if backend.unusable:
        raise MfpError(f"backend {requested!r} was requested and cannot run: {backend.unusable}")
    if not backend.accepts(device):
        raise MfpError(
            f"backend {requested!r} was requested for tensors on {device}; it takes {', '.join(backend.devices)}"
        )
    return backend
