"""Checkpoints that are either whole or not there, whenever the process, the disk or the power fails.

One checkpoint is one safetensors file: the tensors, and in its header everything else as JSON, with a digest
over both. It is written under another name, flushed to the disk and renamed; then an older one is deleted.
Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from mfp.atomic import write_atomically
from mfp.errors import MfpError

FORMAT = 1
KEPT = 2


class CheckpointError(MfpError):
    """A checkpoint that cannot be used."""


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    step: int
    state: dict[str, Any]


def save_checkpoint(directory: Path, step: int, state: dict[str, Any]) -> Path:
    """Writes nested dicts of tensors and JSON-able values as one checkpoint; the last two are kept.

    >>> save_checkpoint(Path("run"), 7, {"model": model.state_dict(), "epoch": 1})
    PosixPath('run/step-00000007.safetensors')

    Raises:
        WriteError: the file could not be written; earlier checkpoints are as they were.
    """
    plain, tensors = pack(state)
    content = {"format": FORMAT, "step": step, "state": plain}
    content["digest"] = _digest(content, tensors)
    path = directory / f"step-{step:08d}.safetensors"
    write_atomically(path, to_safetensors(tensors, {"mfp": json.dumps(content)}))
    _rotate(directory, step)
    return path


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads one checkpoint and checks every byte of it against its digest.

    Raises:
        CheckpointError: not a checkpoint, cut short, altered, or of a later format.
    """
    try:
        data = path.read_bytes()
        tensors = parse_safetensors(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        content = json.loads(header["__metadata__"]["mfp"])
        version, step, digest = content["format"], content["step"], content.pop("digest")
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is no checkpoint of mfp, or it is damaged: {error!r}"[:300]) from error
    if version != FORMAT:
        raise CheckpointError(f"{path} has format {version}, this mfp reads {FORMAT}: use the mfp that wrote it")
    if digest != _digest(content, tensors):
        raise CheckpointError(f"{path} is damaged: its content does not have the digest that it was written with")
    return Checkpoint(path, step, unpack(content["state"], tensors))


def load_newest(directory: Path, say: Callable[[str], None] = print) -> Checkpoint | None:
    """The newest usable checkpoint of a directory, None where there is none; says which it had to pass over.

    Raises:
        CheckpointError: there are checkpoints, but none can be used.
    """
    reasons = []
    for path in reversed(checkpoint_files(directory)):
        try:
            checkpoint = load_checkpoint(path)
        except CheckpointError as error:
            reasons.append(str(error))
            continue
        for reason in reasons:
            say(f"warning: {reason}; going back to {path.name}")
        return checkpoint
    if reasons:
        raise CheckpointError(f"no checkpoint in {directory} can be used: {'; '.join(reasons)}")
    return None


def checkpoint_files(directory: Path) -> list[Path]:
    """The checkpoints of a directory, oldest first."""
    return sorted(directory.glob("step-*.safetensors"))


def _rotate(directory: Path, step: int) -> None:
    """Keeps the checkpoint just written and those before it; later ones are of a past that was given up."""
    this = directory / f"step-{step:08d}.safetensors"
    earlier = [path for path in checkpoint_files(directory) if path < this]
    keep = {this, *earlier[-(KEPT - 1) :]}
    for path in [*checkpoint_files(directory), *directory.glob("step-*.tmp")]:
        if path not in keep:
            with contextlib.suppress(OSError):  # it only takes up room; the next rotation tries again
                os.unlink(path)


def pack(value: Any, name: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Splits nested dicts and lists into a JSON-able part and the tensors, named by the path to them."""
    if isinstance(value, Tensor):
        # a copy: the original may share memory with others, which safetensors refuses
        return {"__tensor__": name}, {name: value.detach().to("cpu", copy=True).contiguous()}
    tensors: dict[str, Tensor] = {}

    def inner(item: Any, key: object) -> Any:
        plain, found = pack(item, f"{name}/{key}")
        tensors.update(found)
        return plain

    if isinstance(value, dict):  # as pairs, since JSON would turn whole-number keys into strings
        return {"__dict__": [[key, inner(item, key)] for key, item in value.items()]}, tensors
    if isinstance(value, (list, tuple)):
        return [inner(item, number) for number, item in enumerate(value)], tensors
    if value is None or isinstance(value, (bool, int, float, str)):
        return value, tensors
    raise TypeError(f"cannot store {name}, a {type(value).__name__}, in a checkpoint")


def unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `pack`; tuples come back as lists."""
    if isinstance(value, dict):
        if "__tensor__" in value:
            return tensors[value["__tensor__"]]
        return {key: unpack(item, tensors) for key, item in value["__dict__"]}
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    return value


def digest_of(state: Any) -> str:
    """A digest over all values and all bytes of a nested state, to compare ranks and runs by."""
    return _digest(*pack(state))


def _digest(content: Any, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
