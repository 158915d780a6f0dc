"""From a cost that a user has in mind to the rate that reaches it: FLOPs, parameters, or time in an engine."""

from __future__ import annotations

import contextlib
import copy
import math
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mfp.capture import capture, example_arguments
from mfp.compact import compact_captured, count_parameters, flops
from mfp.errors import MfpError
from mfp.export import export
from mfp.export.engines import ENGINES, check_engine, one_image, run_file
from mfp.plan import FilterPlan, unwrap
from mfp.scores import FilterScores, score_filters
from mfp.selection import select_filters

HIGHEST_RATE = 0.999
COUNTED_STEP, MEASURED_STEP = 0.001, 0.01  # how finely rates are searched
MULTIPLES = (1, 4, 8, 16)  # of filters kept, that are tried where time is the target
NEARBY = 6  # steps: where the rate for another multiple is looked for first
UNITS = {"flops": "multiply-adds", "parameters": "parameters", "milliseconds": "ms"}


class Unreachable(MfpError):
    """A target that no rates reach."""


@dataclass(frozen=True)
class RateForTarget:
    """The smallest uniform rate that brings a cost down to a target.

    Attributes:
        rate: for ``FilterPlan.from_model`` or ``FilterPruner``.
        what: ``"flops"``, ``"parameters"`` or ``"milliseconds"``.
        asked: the target as an absolute cost.
        reached: the cost of the compact network at this rate.
        dense: the cost without pruning.
        channel_multiple: for the plan too: as given, or chosen by measuring where time is the target.
        tried: what was measured for each multiple that was tried, in words.
    """

    rate: float
    what: str
    asked: float
    reached: float
    dense: float
    channel_multiple: int = 1
    tried: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"rate {self.rate:g}{cost_in_words(self)}"


def cost_in_words(found: Any) -> str:
    """What a result of find_rate or find_rates reaches, to stand behind its rates."""
    multiple = f", filters in multiples of {found.channel_multiple}" if found.channel_multiple > 1 else ""
    return (
        f"{multiple}: {found.reached:,.6g} of {found.dense:,.6g} {UNITS[found.what]} "
        f"({found.reached / found.dense:.1%}; asked for {found.asked / found.dense:.1%})"
    )


def find_rate(
    model: nn.Module,
    example_input: Any,
    *,
    target_flops: str | float | None = None,
    target_parameters: str | float | None = None,
    milliseconds: str | float | None = None,
    engine: str = "mfp",
    criterion: str = "l2_norm",
    say: Callable[[str], None] = lambda text: None,
    **plan_arguments: Any,
) -> RateForTarget:
    """The smallest uniform rate whose compact network costs no more than the target.

    >>> found = mfp.find_rate(model, torch.zeros(1, 3, 224, 224), target_flops="50%")
    >>> pruner = mfp.FilterPruner(model, rate=found.rate)
    >>> found = mfp.find_rate(model, example, milliseconds=7.0, engine="openvino", residual="keep")
    >>> pruner = mfp.FilterPruner(model, found.rate, channel_multiple=found.channel_multiple, residual="keep")

    FLOPs and parameters are counted on the compact network itself. Time is measured, for the batch that the example
    holds. How the numbers of filters are best rounded depends on the engine: where ``channel_multiple`` is not given,
    1, 4, 8 and 16 are measured, and the one is taken that keeps most multiply-adds in the time asked for. The model is
    left as it is.

    Args:
        target_flops, target_parameters, milliseconds: exactly one; what may remain, as a share of the unpruned
            network (``"50%"``) or as a number (multiply-adds, parameters, milliseconds a forward pass).
        engine: where time is measured: ``"mfp"``, the serving form on the model's device; ``"onnxruntime"``,
            ``"openvino"``, ``"torch.compile"``, on exported files, in processes of their own.
        criterion: which filters go while searching; counts hardly depend on it.
        say: is given a line about each network that was measured.
        plan_arguments: ``skip``, ``layer_rates``, ``channel_multiple``, ``residual`` of ``FilterPlan.from_model``.

    Raises:
        MfpError: not exactly one target, one that is no cost, one that no rate reaches (says how near it came), an
            engine that is not there.
    """
    targets = {"target_flops": target_flops, "target_parameters": target_parameters, "milliseconds": milliseconds}
    costs = Costs(model, example_input, targets, engine, criterion, say, plan_arguments)

    def search(multiple: int, near: RateForTarget | None) -> RateForTarget:
        cost = lambda rate: costs.of(multiple, rate=rate)  # noqa: E731
        return replace(_search(costs.name, costs.asked, costs.dense, costs.step, cost, near), channel_multiple=multiple)

    return costs.best_multiple(search, lambda found: {"rate": found.rate})


class Costs:
    """What compact networks of one model cost, and what they may: FLOPs, parameters, or time in an engine.

    Attributes:
        name, what: the argument that the target was given by, and what it limits.
        asked, dense: what the network may cost, and what it costs unpruned.
        step: how finely rates are searched.
    """

    def __init__(
        self, model: nn.Module, example_input: Any, targets: dict[str, Any], engine: str, criterion: str,
        say: Callable[[str], None], plan_arguments: dict[str, Any],
    ) -> None:  # fmt: skip
        given = {name: target for name, target in targets.items() if target is not None}
        if len(given) != 1:
            *others, last = targets
            raise MfpError(f"give exactly one of {', '.join(others)} and {last}")
        ((self.name, target),) = given.items()
        self.what = self.name.removeprefix("target_")
        check_engine(engine)
        self.model = copy.deepcopy(unwrap(model)).eval()
        self.example_input, self.plan_arguments = example_input, plan_arguments
        self._arguments = tuple(example_arguments(self.model, example_input).values())
        self._measure: Callable[[nn.Module], float] = {
            "flops": lambda small: float(flops(small, self._arguments)),
            "parameters": lambda small: float(count_parameters(small)),
            "milliseconds": lambda small: _time(small, self.model, example_input, engine, say),
        }[self.what]
        self.step = MEASURED_STEP if self.what == "milliseconds" else COUNTED_STEP
        serving = self.what == "milliseconds" and engine == "mfp"
        self._candidates = _Candidates(self.model, example_input, criterion, serving, plan_arguments)
        self.dense = self.of(1, rate=0.0, layer_rates=None)
        self.asked = absolute(self.name, target, self.dense)

    def of(self, multiple: int, **rates: Any) -> float:
        """The cost of the compact network at these arguments of the plan."""
        return self._measure(self._candidates.compact_at(multiple, **rates))

    def best_multiple(self, search: Callable[[int, Any], Any], rates_of: Callable[[Any], dict[str, Any]]) -> Any:
        """What ``search(multiple, what another multiple found)`` finds, for the multiple that suits the engine best
        where time is the target and none was given: the one that keeps most multiply-adds."""
        if self.what != "milliseconds" or "channel_multiple" in self.plan_arguments or self.dense <= self.asked:
            return search(self.plan_arguments.get("channel_multiple", 1), None)
        first = search(MULTIPLES[0], None)
        found = [first]
        for multiple in MULTIPLES[1:]:
            with contextlib.suppress(Unreachable):  # rounded up that far, too much stays
                found.append(search(multiple, first))
        small = (self._candidates.compact_at(each.channel_multiple, **rates_of(each)) for each in found)
        kept = [flops(network, self._arguments) for network in small]
        best = found[max(range(len(found)), key=kept.__getitem__)]
        tried = tuple(f"{each} and {count:,} multiply-adds" for each, count in zip(found, kept, strict=True))
        return replace(best, tried=tried)


def absolute(argument: str, target: str | float, dense: float) -> float:
    """The target as a cost: ``"50%"`` of the dense one, or the number itself; a count below 1 is meant as a share."""
    try:
        value = float(target[:-1]) / 100 * dense if isinstance(target, str) and target.endswith("%") else float(target)
        value = value * dense if value < 1 and argument != "milliseconds" and not isinstance(target, str) else value
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise MfpError(f"{argument} must be a share like '50%' or a number above 0, not {target!r}")
    return value


def _search(
    argument: str, asked: float, dense: float, step: float, cost: Callable[[float], float],
    near: RateForTarget | None = None,
) -> RateForTarget:  # fmt: skip
    """Bisection over the rates 0, step, 2 step, ...; cost falls as the rate grows. ``near``: where to look first."""
    what = argument.removeprefix("target_")
    if dense <= asked:
        return RateForTarget(0.0, what, asked, dense, dense)
    highest = int(HIGHEST_RATE / step)
    start = None if near is None else round(near.rate / step)
    index, reached = first_within(asked, highest, lambda number: cost(number * step), start)
    if reached > asked:
        raise Unreachable(
            f"{argument} of {asked:,.6g} {UNITS[what]} cannot be reached: at rate {index * step:g} the network still "
            f"takes {reached:,.6g} of {dense:,.6g} ({reached / dense:.1%}); what stays are layers that are not pruned"
        )
    return RateForTarget(round(index * step, 6), what, asked, reached, dense)


def first_within(asked: float, last: int, cost: Callable[[int], float], start: int | None = None) -> tuple[int, float]:
    """The smallest number up to ``last`` whose cost is at most ``asked``, and that cost; costs fall, and the one of 0
    is too high. Where even the cost of ``last`` is, that one. ``start``: where to look first."""
    low, high, reached = 0, last, None
    if start is not None:
        for middle in (min(start + NEARBY, high), max(start - NEARBY, low)):
            value = cost(middle)
            if value <= asked:
                high, reached = middle, value
            else:
                low = middle
                break
    if reached is None:
        reached = cost(high)
    while reached <= asked and high - low > 1:
        middle = (low + high) // 2
        value = cost(middle)
        if value <= asked:
            high, reached = middle, value
        else:
            low = middle
    return high, reached


class _Candidates:
    """Compact networks of one model at any rate; it is captured once, and its filters are scored once."""

    def __init__(
        self, model: nn.Module, example_input: Any, criterion: str, serving: bool, plan_arguments: dict
    ) -> None:
        self.model, self.serving = model, serving
        self.arguments = example_arguments(model, example_input)
        self.captured = capture(model, self.arguments)
        self.plan_arguments = plan_arguments | {"example_input": example_input}
        self.state = {name: value.clone() for name, value in model.state_dict().items()}
        self.scores = score_filters(FilterPlan.from_model(model, 0.0, **self.plan_arguments), (criterion,))

    def compact_at(self, multiple: int, **rates: Any) -> nn.Module:
        plan = FilterPlan.from_model(self.model, **{"channel_multiple": multiple} | self.plan_arguments | rates)
        select_filters(FilterScores(plan, self.scores.by_name)).apply_()
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "mfp.compact removed nothing")  # at rate 0 that is meant
                return compact_captured(self.model, self.arguments, self.captured, self.serving)
        finally:
            self.model.load_state_dict(self.state)


def _time(small: nn.Module, model: nn.Module, example_input: Any, engine: str, say: Callable[[str], None]) -> float:
    arguments = example_arguments(model, example_input)
    if engine == "mfp":
        found = time_of(small, tuple(arguments.values()))
    else:
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / f"small{ENGINES[engine].suffix}"
            export(small, file, example_input)
            batch = len(next(iter(arguments.values())))
            found = run_file(engine, file, one_image(arguments), batches=(batch,), seconds=1.0)[0][batch]
    say(f"{engine}: {found:.3g} ms at {small.report.flops_after:,} multiply-adds")
    return found


@torch.no_grad()
def time_of(network: nn.Module, arguments: tuple, seconds: float = 0.5) -> float:
    """Milliseconds of the fastest of the forward passes that fit into the time, after one to warm up."""
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
