"""When to prune and how much: pure functions of the epoch."""

from __future__ import annotations

from mfp.errors import MfpError, did_you_mean

GROWING = ("asymptotic", "cubic")
MODES = ("soft", "hard", *GROWING)

# ASFP (arXiv 1808.07471) lets the rate pass three quarters of its goal after an eighth of the epochs:
# (1 - x) / (1 - x^8) = 3/4, where x is what is left of the distance to the limit after that eighth.
_ASYMPTOTIC_EIGHTH = 0.250011448284956


def check(mode: str, interval: int, epochs: int | None, one_way: bool = False) -> None:
    """Raise for an unknown mode, an interval below 1, a growing rate without a last epoch, or one way without one."""
    if mode not in MODES:
        raise MfpError(f"unknown mode {mode!r}: known are {', '.join(MODES)}{did_you_mean(mode, MODES)}")
    if not isinstance(interval, int) or interval < 1:
        raise MfpError(f"interval must be a whole number of epochs, at least 1; got {interval!r}")
    if epochs is not None and (not isinstance(epochs, int) or epochs < 1):
        raise MfpError(f"epochs must be a whole number of at least 1, got {epochs!r}")
    if epochs is None and mode in GROWING:
        raise MfpError(f"mode {mode!r} lets the rate grow until the last epoch: give epochs=")
    if one_way and mode not in GROWING:
        why = "filters are to come back" if mode == "soft" else "no filter comes back anyway"
        raise MfpError(f"one_way=True goes with a rate that grows ({' or '.join(GROWING)}); in mode {mode!r} {why}")


def prune_now(epoch: int, interval: int = 1, epochs: int | None = None) -> bool:
    """Whether the end of this epoch (from 0) is a pruning point: every ``interval`` epochs, and after the last.

    >>> [epoch for epoch in range(10) if prune_now(epoch, interval=4, epochs=10)]
    [3, 7, 9]
    """
    return (epoch + 1) % interval == 0 or (epochs is not None and epoch == epochs - 1)


def rate_factor(mode: str, epoch: int, epochs: int | None = None) -> float:
    """Share of the final rate in force at the end of an epoch (from 0): 1 for ``soft`` and ``hard``.

    ``asymptotic`` follows ASFP, 1 - exp(-kt) scaled to end at 1; ``cubic`` is 1 - (1 - t)^3 (arXiv 1710.01878); t is
    the share of the epochs that is over.
    """
    if mode in ("soft", "hard"):
        return 1.0
    done = min(max((epoch + 1) / epochs, 0.0), 1.0)
    if mode == "cubic":
        return 1.0 - (1.0 - done) ** 3
    return (1.0 - _ASYMPTOTIC_EIGHTH ** (8.0 * done)) / (1.0 - _ASYMPTOTIC_EIGHTH**8)
