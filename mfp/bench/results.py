"""Result files: what was measured, with the machine, the date and the command; documents take their numbers from them.

A file is JSON: ``machine``, ``cpu_flags``, ``torch``, ``date``, ``command``, ``commit``, ``rows`` and, where there is
something to add, ``note``. A row is a flat dict of texts and numbers. `make figures` (benchmarks/figures.py) turns the
files of benchmarks/results/ into the tables and charts of README and docs.
"""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch

from mfp.atomic import write_atomically
from mfp.errors import MfpError

KEYS = ("machine", "cpu_flags", "torch", "date", "command", "commit", "rows")
VECTOR_FLAGS = ("avx", "f16c", "fma", "amx", "asimd", "sve")  # the ones that decide which kernels run
BUILT_FROM = ("mfp", "csrc", "kernels", "setup.py")  # a change to anything else changes no measurement


def write(
    path: str | Path, command: str, rows: Iterable[Mapping[str, Any]], *, note: str | None = None, **about: str
) -> None:
    """Write what was measured here and now.

    Args:
        path: of the file, whole or not at all.
        command: that gives these numbers, as a user types it in the root of the repository.
        rows: flat dicts of texts, numbers, booleans and None.
        note: what a reader must know beside it.
        about: overrides ``machine``, ``cpu_flags``, ``torch``, ``date`` or ``commit``, for what was measured elsewhere.

    Raises:
        MfpError: a row that is not flat, no rows, or a file that cannot be written.
    """
    rows = [dict(row) for row in rows]
    if not rows:
        raise MfpError(f"{path}: no rows to write")
    for row in rows:
        for key, value in row.items():
            if not isinstance(value, str | int | float | None):
                raise MfpError(f"{path}: {key} of a row is a {type(value).__name__}; write texts and numbers")
    here = {"machine": machine(), "cpu_flags": cpu_flags(), "torch": torch.__version__,
            "date": date.today().isoformat(), "command": command, "commit": commit()}  # fmt: skip
    content = here | about | {"rows": rows} | ({"note": note} if note else {})
    lines = [f'"{key}": {json.dumps(value, ensure_ascii=False)}' for key, value in content.items() if key != "rows"]
    each = ",\n  ".join(json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)
    text = "{\n" + ",\n".join([*lines, f'"rows": [\n  {each}\n]']) + "\n}\n"  # a row a line: readable in a diff
    write_atomically(Path(path), text.encode())


def read(path: str | Path) -> dict[str, Any]:
    """What a result file holds.

    Raises:
        MfpError: it is missing, not JSON, or lacks one of the keys.
    """
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise MfpError(f"{path} is not a result file: {error}") from error
    missing = [key for key in KEYS if not isinstance(content, dict) or key not in content]
    if missing:
        raise MfpError(f"{path} is not a result file: it lacks {', '.join(missing)}")
    return content


def machine() -> str:
    """The processor, and how many threads torch uses: ``"Intel(R) Xeon(R) Platinum 8480+, 2 threads"``."""
    names = _cpuinfo("model name")
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def cpu_flags() -> str:
    """The vector instructions that the processor has, separated by spaces."""
    flags = [*_cpuinfo("flags"), *_cpuinfo("Features"), ""][0].split()
    return " ".join(sorted(flag for flag in flags if flag.startswith(VECTOR_FLAGS)))


def _cpuinfo(key: str) -> list[str]:
    path = Path("/proc/cpuinfo")
    pairs = (line.partition(":") for line in (path.read_text().splitlines() if path.exists() else ()))
    return [value.strip() for name, _, value in pairs if name.strip() == key]


def commit() -> str:
    """The commit of this checkout, with ``-changed`` where its code differs from it; ``"unknown"`` outside git."""
    root = Path(__file__).parents[2]

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        if head.returncode or not (root / "pyproject.toml").exists():
            return "unknown"
        return head.stdout.strip() + (
            "-changed" if git("diff", "--quiet", "HEAD", "--", *BUILT_FROM).returncode else ""
        )
    except OSError:  # no git here
        return "unknown"
