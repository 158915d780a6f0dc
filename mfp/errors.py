"""The one exception class for mistakes a user can mend; every message says what was wrong and what to do."""

import difflib
from collections.abc import Iterable


class MfpError(ValueError):
    """A wrong argument, file or model. Nothing was changed when it is raised."""


class CaptureError(MfpError):
    """A model that torch.export cannot follow, or that does not run on the example."""


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: ``"; did you mean 'l2_norm'?"``, or nothing where none is near."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
