"""Exported files in the engines that serve them: are the outputs right, and how long do they take?

Each measurement is a process of its own (worker.py): the threads of one engine slow down whatever runs beside them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mfp.compact.check import largest_difference
from mfp.errors import MfpError, did_you_mean

WORKER = Path(__file__).with_name("worker.py")
ROUNDS = 3


@dataclass(frozen=True)
class Engine:
    """The kind of file that an engine runs, and what must be installed for it."""

    suffix: str
    package: str
    install: str


ENGINES = {
    "onnxruntime": Engine(".onnx", "onnxruntime", "mfp[onnx]"),
    "openvino": Engine(".xml", "openvino", "mfp[openvino]"),
    "torch.compile": Engine(".pt2", "torch", "torch"),
    "torch": Engine(".pt2", "torch", "torch"),
    "tensorrt": Engine(".pt2", "torch_tensorrt", "torch-tensorrt"),
    "mfp": Engine(".mfp", "mfp", "mfp"),  # its own serving form
}
SERVES = {".onnx": "onnxruntime", ".xml": "openvino", ".pt2": "torch.compile", ".mfp": "mfp"}


def installed(engine: str) -> bool:
    return find_spec(ENGINES[engine].package) is not None


def check_engine(engine: str) -> None:
    """Raises MfpError for an engine that is unknown or not installed."""
    if engine not in ENGINES:
        raise MfpError(f"engine must be one of {', '.join(ENGINES)}, not {engine!r}{did_you_mean(engine, ENGINES)}")
    if not installed(engine):
        raise MfpError(f"{engine} is not installed; it comes with: pip install '{ENGINES[engine].install}'")


def one_image(arguments: dict[str, Any]) -> dict[str, np.ndarray]:
    """Forward's arguments as arrays, the first image of each."""
    if not all(isinstance(value, Tensor) for value in arguments.values()):
        raise MfpError("engines are given tensors; this network takes nested arguments")
    return {name: value[:1].detach().cpu().numpy() for name, value in arguments.items()}


def run_file(
    engine: str, file: Path, inputs: dict[str, np.ndarray], *, batches: Iterable[int] = (1,), seconds: float = 0.0,
    device: str = "cpu",
) -> tuple[dict[int, float], dict[int, list[np.ndarray]]]:  # fmt: skip
    """One process: ({batch: milliseconds a call}, {batch: outputs}).

    Args:
        inputs: arrays for one image, by argument; a batch repeats it.
        seconds: how long each batch size is measured; 0: not at all.
    """
    check_engine(engine)
    with tempfile.TemporaryDirectory() as directory:
        given, made = Path(directory) / "inputs.npz", Path(directory) / "outputs.npz"
        np.savez(given, **inputs)  # type: ignore[arg-type]  # numpy has a flag of another type
        command = [sys.executable, WORKER, engine, file, given, made, ",".join(map(str, batches)), seconds, device]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment())
        if done.returncode:
            raise MfpError(f"{engine} cannot run {file}: {last_line(done)}")
        times = json.loads(done.stdout.splitlines()[-1])
        outputs: dict[int, list[np.ndarray]] = {batch: [] for batch in batches}
        with np.load(made) as stored:
            for name in stored.files:
                outputs[int(name.partition(" ")[0])].append(stored[name])
        return {int(batch): time for batch, time in times.items()}, outputs


def last_line(done: subprocess.CompletedProcess) -> str:
    """What a process that failed has said at last."""
    lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"status {done.returncode}"]
    return lines[-1].strip()


def environment() -> dict[str, str]:
    """This process's, with the package that is running where the worker finds it."""
    home = str(Path(__file__).parents[2])
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))}


def measure(
    contestants: dict[str, tuple[str, Path]], inputs: dict[str, np.ndarray], batches: Iterable[int] = (1,), *,
    rounds: int = ROUNDS, seconds: float = 1.0, device: str = "cpu", advance: Callable[[], None] = lambda: None,
) -> dict[str, dict[int, float]]:  # fmt: skip
    """{label: {batch: milliseconds}}: the fastest call of some rounds in which all have their turn.

    What else runs on a machine makes calls slower, never faster.

    Args:
        contestants: {label: (engine, file)}.
        advance: called after each process, for a progress bar.
    """
    batches = tuple(batches)
    times: dict[str, dict[int, list[float]]] = {label: {batch: [] for batch in batches} for label in contestants}
    for _ in range(rounds):
        for label, (engine, file) in contestants.items():
            found, _ = run_file(engine, file, inputs, batches=batches, seconds=seconds, device=device)
            for batch, time in found.items():
                times[label][batch].append(time)
            advance()
    return {label: {batch: min(each) for batch, each in found.items()} for label, found in times.items()}


@torch.no_grad()
def verify(
    file: Path, network: nn.Module, arguments: dict[str, Any], engine: str | None = None,
    batches: tuple[int, ...] = (1, 3),
) -> dict[int, float]:  # fmt: skip
    """{batch: largest difference between the engine's outputs and torch's, relative to the largest output}."""
    engine = engine or SERVES[file.suffix]
    inputs, found = one_image(arguments), {}
    _, outputs = run_file(engine, file, inputs, batches=batches)
    for batch, ours in outputs.items():
        given = [torch.from_numpy(np.concatenate([value] * batch)) for value in inputs.values()]
        theirs = [value for value in tree_leaves(network(*given)) if isinstance(value, Tensor)]
        if len(ours) != len(theirs):
            raise MfpError(f"{file}: {len(ours)} outputs in {engine}, {len(theirs)} in torch")
        for mine, its in zip(ours, theirs, strict=True):
            if mine.shape != its.shape:
                raise MfpError(f"{file}: an output is {mine.shape} in {engine}, {tuple(its.shape)} in torch")
        found[batch] = largest_difference([torch.from_numpy(a) for a in ours], [value.double() for value in theirs])
    return found
