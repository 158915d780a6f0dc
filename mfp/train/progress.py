"""What a run says while it goes on: a bar with an estimate on a terminal, plain lines anywhere else."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Reporter:
    """Says things on standard error; with `quiet` (all ranks but the first) nothing.

    >>> with Reporter().bar("dense", total=100) as bar:
    ...     bar.advance(1, "loss 2.3")
    """

    def __init__(self, quiet: bool = False, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, quiet=quiet, highlight=False)

    def say(self, line: str) -> None:
        self.console.print(line, markup=False, soft_wrap=True)

    def bar(self, title: str, total: int, done: int = 0) -> Bar:
        return Bar(self, title, total, done)


class Bar:
    """One progress bar, as a context manager; where there is no terminal it stays silent."""

    def __init__(self, reporter: Reporter, title: str, total: int, done: int) -> None:
        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
        self.progress = Progress(
            *columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            console=reporter.console, disable=not reporter.console.is_terminal,
        )  # fmt: skip
        self.task = self.progress.add_task(title, total=total, completed=done, note="")

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def at(self, done: int, total: int) -> None:
        """For work whose extent turns out on the way."""
        self.progress.update(self.task, completed=done, total=total)

    def advance(self, steps: int = 1, note: str | None = None) -> None:
        fields: dict[str, Any] = {} if note is None else {"note": note}
        self.progress.update(self.task, advance=steps, **fields)
