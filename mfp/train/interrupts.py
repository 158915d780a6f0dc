"""Ctrl-C and SIGTERM: the step is finished and a checkpoint written before the run ends."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

from mfp.errors import MfpError


class Interrupted(Exception):
    """A signal ended the run after the step it came in; the checkpoint is written."""

    def __init__(self, number: int, path: Path | None) -> None:
        self.number, self.path = number, path
        super().__init__(f"stopped by {signal.Signals(number).name}")


@contextlib.contextmanager
def noting_signals(seen: Callable[[], int], note: Callable[[int], None]) -> Iterator[None]:
    """SIGINT and SIGTERM let the step finish; a second one ends the run at once.

    Args:
        seen: the signal that came before, or 0.
        note: keeps the number of one that comes.
    """

    def handle(number: int, frame: object) -> None:
        if seen():
            raise KeyboardInterrupt
        note(number)

    try:
        before = [(number, signal.signal(number, handle)) for number in (signal.SIGINT, signal.SIGTERM)]
    except ValueError:  # not the main thread: whoever owns that one handles signals
        before = []
    try:
        yield
    except Exception as error:
        if seen() and not isinstance(error, (Interrupted, MfpError)):  # rank 0 has left
            raise Interrupted(seen(), None) from error
        raise
    finally:
        for number, handler in before:
            signal.signal(number, handler)
