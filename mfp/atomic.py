"""Writing a file so that its name means the old content or the new at every moment: every file of mfp is written so."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

from mfp.errors import MfpError


class WriteError(MfpError):
    """A file that could not be written."""


def write_atomically(path: Path, data: bytes) -> None:
    """Writes under another name, flushes to the disk and renames, so that even a power cut leaves no part of a file.

    The directory is made if need be.

    Raises:
        WriteError: it could not be written; what had the name before still has it.
    """
    # two writers of one file never share a temporary one; what a killed writer leaves behind ends in .tmp
    temporary = path.with_name(f"{path.name}.{threading.get_native_id()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(temporary, data)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        raise WriteError(
            f"cannot write {path} ({len(data):,} bytes): {error.strerror or error}; nothing older was touched"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # it has its new name by now, unless the writing failed
            os.unlink(temporary)


def _write(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        rest = memoryview(data)
        while rest:  # a write may take only a part
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync(directory: Path) -> None:
    """Makes a rename durable: the entry is in the directory, which is a file of its own."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
