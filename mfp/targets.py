"""From a cost that a user has in mind to the rate that reaches it: FLOPs, parameters, or time on this device."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mfp.capture import example_arguments
from mfp.compact import compact, count_parameters, flops
from mfp.errors import MfpError
from mfp.plan import FilterPlan, unwrap
from mfp.scores import FilterScores, score_filters
from mfp.selection import select_filters

HIGHEST_RATE = 0.999
COUNTED_STEP, MEASURED_STEP = 0.001, 0.01  # how finely rates are searched
UNITS = {"flops": "multiply-adds", "parameters": "parameters", "latency": "ms"}


@dataclass(frozen=True)
class RateForTarget:
    """The smallest uniform rate that brings a cost down to a target.

    Attributes:
        rate: for ``FilterPlan.from_model`` or ``FilterPruner``.
        what: ``"flops"``, ``"parameters"`` or ``"latency"``.
        asked: the target as an absolute cost.
        reached: the cost of the compact network at this rate.
        dense: the cost without pruning.
    """

    rate: float
    what: str
    asked: float
    reached: float
    dense: float

    def __str__(self) -> str:
        return (
            f"rate {self.rate:g}: {self.reached:,.6g} of {self.dense:,.6g} {UNITS[self.what]} "
            f"({self.reached / self.dense:.1%}; asked for {self.asked / self.dense:.1%})"
        )


def find_rate(
    model: nn.Module,
    example_input: Any,
    *,
    target_flops: str | float | None = None,
    target_parameters: str | float | None = None,
    target_latency: str | float | None = None,
    criterion: str = "l2_norm",
    **plan_arguments: Any,
) -> RateForTarget:
    """The smallest uniform rate whose compact network costs no more than the target.

    >>> found = mfp.find_rate(model, torch.zeros(1, 3, 224, 224), target_flops="50%")
    >>> pruner = mfp.FilterPruner(model, rate=found.rate)

    FLOPs and parameters are counted on the compact network itself; latency is measured on it in serving form, on the
    device of the model, for the batch that the example holds. The model is left as it is.

    Args:
        target_flops, target_parameters, target_latency: exactly one; what may remain, as a share of the unpruned
            network (``"50%"``) or as a number (multiply-adds, parameters, milliseconds a forward pass).
        criterion: which filters go while searching; counts hardly depend on it.
        plan_arguments: ``skip``, ``layer_rates``, ``channel_multiple``, ``residual`` of ``FilterPlan.from_model``.

    Raises:
        MfpError: not exactly one target, one that is no cost, or one that no rate reaches: says how near it came.
    """
    targets = {"flops": target_flops, "parameters": target_parameters, "latency": target_latency}
    given = {what: target for what, target in targets.items() if target is not None}
    if len(given) != 1:
        raise MfpError("give exactly one of target_flops, target_parameters and target_latency")
    ((what, target),) = given.items()
    model = copy.deepcopy(unwrap(model)).eval()
    measure: Callable[[nn.Module], float] = {
        "flops": lambda small: float(flops(small, tuple(example_arguments(model, example_input).values()))),
        "parameters": lambda small: float(count_parameters(small)),
        "latency": lambda small: milliseconds(small, tuple(example_arguments(model, example_input).values())),
    }[what]
    candidates = _Candidates(model, example_input, criterion, fold_bn=what == "latency", plan_arguments=plan_arguments)
    dense = measure(candidates.compact_at(0.0))
    asked = absolute(f"target_{what}", target, dense)
    step = MEASURED_STEP if what == "latency" else COUNTED_STEP
    return _search(what, asked, dense, step, lambda rate: measure(candidates.compact_at(rate)))


def absolute(argument: str, target: str | float, dense: float) -> float:
    """The target as a cost: ``"50%"`` of the dense one, or the number itself."""
    try:
        value = float(target[:-1]) / 100 * dense if isinstance(target, str) and target.endswith("%") else float(target)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise MfpError(f"{argument} must be a share like '50%' or a number above 0, not {target!r}")
    return value


def _search(what: str, asked: float, dense: float, step: float, cost: Callable[[float], float]) -> RateForTarget:
    """Bisection over the rates 0, step, 2 step, ...; cost falls as the rate grows."""
    if dense <= asked:
        return RateForTarget(0.0, what, asked, dense, dense)
    low, high = 0, int(HIGHEST_RATE / step)
    reached = cost(high * step)
    if reached > asked:
        raise MfpError(
            f"target_{what} of {asked:,.6g} {UNITS[what]} cannot be reached: at rate {high * step:g} the network still "
            f"takes {reached:,.6g} of {dense:,.6g} ({reached / dense:.1%}); what stays are layers that are not pruned"
        )
    while high - low > 1:
        middle = (low + high) // 2
        value = cost(middle * step)
        if value <= asked:
            high, reached = middle, value
        else:
            low = middle
    return RateForTarget(round(high * step, 6), what, asked, reached, dense)


class _Candidates:
    """Compact networks of one model at any rate; filters are scored once."""

    def __init__(
        self, model: nn.Module, example_input: Any, criterion: str, fold_bn: bool, plan_arguments: dict
    ) -> None:
        self.model, self.example_input, self.fold_bn = model, example_input, fold_bn
        self.plan_arguments = plan_arguments | {"example_input": example_input}
        self.state = {name: value.clone() for name, value in model.state_dict().items()}
        self.scores = score_filters(FilterPlan.from_model(model, 0.0, **self.plan_arguments), (criterion,))

    def compact_at(self, rate: float) -> nn.Module:
        plan = FilterPlan.from_model(self.model, rate, **self.plan_arguments)
        select_filters(FilterScores(plan, self.scores.by_name)).apply_()
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "mfp.compact removed nothing")  # at rate 0 that is meant
                return compact(self.model, self.example_input, fold_bn=self.fold_bn)
        finally:
            self.model.load_state_dict(self.state)


@torch.no_grad()
def milliseconds(network: nn.Module, arguments: tuple, seconds: float = 0.5) -> float:
    """The fastest of the forward passes that fit into the time, after one to warm up."""
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    best, end = math.inf, None
    while end is None or time.perf_counter() < end:
        start = time.perf_counter()
        network(*arguments)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if end is None:
            end = time.perf_counter() + seconds
        else:
            best = min(best, time.perf_counter() - start)
    return 1000 * best
