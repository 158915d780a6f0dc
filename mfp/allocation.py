"""Rates that suit the layers: how much each one may lose, from how the loss rises when it alone is pruned."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from mfp.attributes import Batches, mean_over_processes
from mfp.errors import MfpError
from mfp.neighbours import Comparison
from mfp.plan import FilterPlan, unwrap
from mfp.scores import FilterScores, score_filters
from mfp.selection import select_filters
from mfp.sensitivity import (
    RATES,
    Sensitivities,
    checked_batches,
    measure_sensitivities,
    plan_of,
    sensitivities_of,
    units_of,
)
from mfp.targets import UNITS, Costs, Unreachable, cost_in_words, first_within
from mfp.variants import Variants

STEP = 0.01  # how finely rates are chosen
ROUNDS = 5  # of measuring: on the way to the target the loss fell up to the fifth, and not beyond (ResNet-20)
CONTRACTIONS = {getattr(torch.ops.aten, name) for name in ("conv1d", "conv2d", "conv3d", "linear")}


@dataclass(frozen=True)
class RatesForTarget:
    """A rate for each layer, so that the target is met where pruning costs the least calibrated loss.

    Attributes:
        layer_rates: for ``FilterPlan.from_model`` or ``FilterPruner``; every layer of the plan is in it.
        what: ``"flops"``, ``"parameters"`` or ``"milliseconds"``.
        asked: the target as an absolute cost.
        reached: the cost of the compact network at these rates.
        dense: the cost without pruning.
        sensitivities: of the unpruned network.
        channel_multiple: for the plan too: as given, or chosen by measuring where time is the target.
        tried: what was measured for each multiple that was tried, in words.
    """

    layer_rates: dict[str, float]
    what: str
    asked: float
    reached: float
    dense: float
    sensitivities: Sensitivities
    channel_multiple: int = 1
    tried: tuple[str, ...] = ()

    def __str__(self) -> str:
        low, high = min(self.layer_rates.values()), max(self.layer_rates.values())
        return f"rates {low:g} to {high:g}{cost_in_words(self)}"


def find_rates(
    model: nn.Module,
    example_input: Any,
    *,
    calibration: Batches,
    flops: str | float | None = None,
    parameters: str | float | None = None,
    milliseconds: str | float | None = None,
    engine: str = "mfp",
    criterion: str = "l2_distance",
    sensitivities: Sensitivities | None = None,
    rounds: int = ROUNDS,
    say: Callable[[str], None] = lambda text: None,
    advance: Callable[[int, int], None] = lambda done, total: None,
    **plan_arguments: Any,
) -> RatesForTarget:
    """A rate for each layer of a trained network: those whose pruning raises the loss least lose most.

    >>> found = mfp.find_rates(model, torch.zeros(1, 3, 224, 224), calibration=batches, flops=0.5)
    >>> pruner = mfp.FilterPruner(model, layer_rates=found.layer_rates)

    First each layer alone is pruned at the rates 0.15, 0.3, 0.45, 0.6 and 0.75, and the loss measured on the
    calibration batches, after BatchNorm's statistics were re-estimated on them. Then rates rise step by step, each time
    of the layer whose next rise adds least loss per multiply-add saved. The cost of a step follows from the rates so
    far, since a filter less also saves inputs of the layers behind. In equal steps on the way to the target the loss is
    measured anew, of pruning one layer further in the network as the rates so far leave it: layers that are pruned
    together cost more loss than each alone. The rates end where the compact network costs what was asked for. The model
    is left as it is.

    Args:
        calibration: ``[(inputs, targets), ...]``; a thousand images are a good number. All of them are held at once.
        flops, parameters, milliseconds: exactly one; what may remain, as a share of the unpruned network (``0.5`` or
            ``"50%"``) or as a number (multiply-adds, parameters, milliseconds a forward pass).
        engine: where time is measured, as for :func:`mfp.find_rate`.
        criterion: which filters of a layer go.
        sensitivities: of :func:`mfp.measure_sensitivities` or an earlier result, which are not measured again.
        rounds: how often the loss is measured on the way to the target.
        say: is given a line about each network whose time was measured.
        advance: is given the number of networks tried so far, and of all, in each round.
        plan_arguments: ``skip``, ``layer_rates`` (of layers whose rate is settled), ``channel_multiple``, ``residual``
            of ``FilterPlan.from_model``.

    Raises:
        MfpError: not exactly one target, one that no rates reach (names the nearest), no calibration images, a model
            that cannot be captured.
    """
    model = unwrap(model)
    targets = {"flops": flops, "parameters": parameters, "milliseconds": milliseconds}
    calibration = checked_batches(calibration)
    costs = Costs(model, example_input, targets, engine, criterion, say, plan_arguments)
    plan = plan_of(model, example_input, plan_arguments)
    units = units_of(model, example_input, plan_arguments)

    def cost(multiple: int, rates: Sequence[float]) -> float:
        return costs.of(multiple, rate=0.0, layer_rates=_layer_rates(plan, units, rates))

    _check_reachable(costs, plan, units)  # before the long part
    if sensitivities is None:
        sensitivities = measure_sensitivities(
            model, example_input, calibration, criterion=criterion, advance=advance, **plan_arguments
        )
    images = _two_images(calibration)
    shares = _shares(Variants(model, images), images, plan, units, costs.what)
    path = _path(sensitivities, units, *shares)
    for number in range(1, rounds):
        enough = (costs.asked / costs.dense) ** (number / rounds) * float(shares[0].sum())
        around = _layer_rates(plan, units, path[_first_predicted(enough, path, *shares)])
        further = measure_sensitivities(
            model, example_input, calibration, criterion=criterion, around=around, advance=advance, **plan_arguments
        )
        path = _path(further, units, *shares)
    start: list[int] = []

    def search(multiple: int, near: RatesForTarget | None) -> RatesForTarget:
        index, reached = 0, cost(multiple, path[0])
        if reached > costs.asked:
            first = start[0] if near else None
            index, reached = first_within(costs.asked, len(path) - 1, lambda i: cost(multiple, path[i]), first)
        _check_reached(costs, reached, max(path[-1]))
        start[:1] = [index]
        return RatesForTarget(
            _layer_rates(plan, units, path[index]),
            costs.what,
            costs.asked,
            reached,
            costs.dense,
            sensitivities,
            multiple,
        )

    return costs.best_multiple(search, lambda found: {"rate": 0.0, "layer_rates": found.layer_rates})


class Allocator:
    """For a pruner: at each pruning point, rates that save what its plan's would, where the loss rises least.

    What is saved is predicted from what each layer's filters take along, the same way for both, and not counted on
    compact networks, which takes seconds each.

    Args:
        what: ``"flops"`` or ``"parameters"``.
        calibration, per_layer: the pruner's.
    """

    def __init__(self, what: str, calibration: Batches | None, per_layer: bool) -> None:
        if what not in ("flops", "parameters"):
            raise MfpError(f"allocate must be 'flops' or 'parameters', not {what!r}")
        if per_layer:
            raise MfpError("allocate chooses one criterion for all layers: leave out per_layer")
        self.what, self.calibration = what, checked_batches(calibration)
        self._few: Variants | None = None

    def look_at(self, plan: FilterPlan, example_input: Any, plan_arguments: Mapping[str, Any]) -> None:
        """Find the layers whose rates may change: those whose rate ``layer_rates`` does not settle."""
        arguments = {name: value for name, value in plan_arguments.items() if name != "rate"}
        self.units = units_of(plan.model, example_input, arguments)
        highest = max(plan[names[0]].rate for names in self.units)
        if highest > max(RATES):
            raise MfpError(f"allocate raises no rate above {max(RATES)}: rate must be at most that, not {highest:g}")

    def suited(self, scores: FilterScores, criterion: str, comparison: Comparison) -> FilterPlan:
        """The plan of the scores with rates that suit the network as it is now; all processes take part.

        Raises CaptureError where the network has no graph.
        """
        plan, images = scores.plan, _two_images(self.calibration)
        variants = comparison.variants() or Variants(plan.model, self.calibration)  # raises, and says why
        found = sensitivities_of(
            scores, criterion, self.units, variants, self.calibration, mask_bn=comparison.mask_bn
        )  # fmt: skip
        if self._few is None or not self._few.fits():
            self._few = Variants(plan.model, images)
        shares = [mean_over_processes(s) for s in _shares(self._few, images, plan, self.units, self.what)]
        path = _path(found, self.units, *shares)

        def at(index: int) -> FilterPlan:
            pairs = zip(path[index], self.units, strict=True)
            return plan.with_rates({name: rate for rate, names in pairs for name in names})

        asked = _predicted(plan, self.units, *shares)
        if asked >= _predicted(at(0), self.units, *shares):
            return at(0)
        return at(first_within(asked, len(path) - 1, lambda index: _predicted(at(index), self.units, *shares))[0])


def _first_predicted(enough: float, path: list[list[float]], *shares: Tensor) -> int:
    """The first place of a path where the network is predicted to cost no more than enough; else the last one."""
    if _cost(path[0], *shares) <= enough:
        return 0
    return first_within(enough, len(path) - 1, lambda index: _cost(path[index], *shares))[0]


def _predicted(plan: FilterPlan, units: list[list[str]], cost: Tensor, filters: Tensor, inputs: Tensor) -> float:
    """What a plan's compact network costs, from the results of :func:`_shares`."""
    first = [plan[names[0]] for names in units]
    return _cost([layer.num_pruned / layer.num_filters for layer in first], cost, filters, inputs)


def _cost(rates: Sequence[float], cost: Tensor, filters: Tensor, inputs: Tensor) -> float:
    gone = torch.tensor(rates, dtype=torch.float64)
    return float((cost * (1 - filters @ gone) * (1 - inputs @ gone)).sum())


def check_target(model: nn.Module, example_input: Any, targets: dict[str, Any], **plan_arguments: Any) -> None:
    """Raise MfpError for a target of :func:`find_rates` that no rates reach."""
    model = unwrap(model)
    costs = Costs(model, example_input, targets, "mfp", "l2_norm", lambda text: None, plan_arguments)
    given = model, example_input, plan_arguments
    _check_reachable(costs, plan_of(*given), units_of(*given))


def _check_reachable(costs: Costs, plan: FilterPlan, units: list[list[str]]) -> None:
    rates = _layer_rates(plan, units, [max(RATES)] * len(units))
    _check_reached(costs, costs.of(plan.channel_multiple, rate=0.0, layer_rates=rates), max(RATES))


def _layer_rates(plan: FilterPlan, units: list[list[str]], rates: Sequence[float]) -> dict[str, float]:
    """Rates by name: those of the units, and those that the plan has settled."""
    found = {name: rate for rate, names in zip(rates, units, strict=True) for name in names}
    return {layer.name: found.get(layer.name, layer.rate) for layer in plan.layers}


def _check_reached(costs: Costs, reached: float, rate: float) -> None:
    if reached > costs.asked:
        raise Unreachable(
            f"{costs.name} of {costs.asked:,.6g} {UNITS[costs.what]} cannot be reached: the nearest is "
            f"{reached:,.6g} of {costs.dense:,.6g} ({reached / costs.dense:.1%}), with rate {rate:g} for every layer "
            "that may be pruned"
        )


def _two_images(calibration: Batches) -> list[tuple[Tensor, None]]:
    return [(torch.cat([inputs[:2] for inputs, _ in calibration])[:2], None)]


def _shares(
    variants: Variants, images: list[tuple[Tensor, None]], plan: FilterPlan, units: list[list[str]], what: str
) -> tuple[Tensor, Tensor, Tensor]:
    """What each conv or linear layer costs, and the share of its filters and of its inputs that each unit takes along
    when it loses all of its own: ``[J]``, ``[J, U]``, ``[J, U]``. Seen, not derived: on two images, unit by unit."""
    whole = plan.with_rates(dict.fromkeys((layer.name for layer in plan.layers), 0.0))
    halved = [whole.with_rates(dict.fromkeys(names, 0.5)) for names in units]
    scores = score_filters(plan, ("l2_norm",)).by_name
    masks = [None, *(select_filters(FilterScores(half, scores)) for half in halved)]
    cost: dict[fx.Node, float] = {}
    filters: dict[fx.Node, dict[int, Tensor]] = {}  # bool, which are there
    inputs: dict[fx.Node, dict[int, Tensor]] = {}

    def watch(node: fx.Node, arguments: list[tuple], group: list[int]) -> None:
        if getattr(node.target, "overloadpacket", None) not in CONTRACTIONS:
            return
        value, weight = arguments[0][:2]
        out, linear = node.meta["val"].shape, node.target.overloadpacket is torch.ops.aten.linear
        places = out.numel() // out[-1] if linear else out[0] * math.prod(out[2:])
        cost[node] = weight.numel() * (1 if what == "parameters" else places)
        channels = value.flatten(0, -2).T if linear else value.transpose(0, 1).flatten(1)
        grouped = len(channels) != weight.shape[1]  # then inputs go with the filters of their group
        for number in group:
            filters.setdefault(node, {})[number] = weight.flatten(1).any(1)
            inputs.setdefault(node, {})[number] = channels.any(1) | grouped

    variants.run(masks, images, measure=False, watch=watch)

    def lost(there: dict[fx.Node, dict[int, Tensor]]) -> Tensor:
        shares = torch.zeros(len(cost), len(units), dtype=torch.float64)
        for row, node in enumerate(cost):
            for number, half in enumerate(halved):
                layer = half[units[number][0]]
                gone = (there[node][0] & ~there[node][number + 1]).double().mean()
                shares[row, number] = gone * layer.num_filters / max(layer.num_pruned, 1)
        return shares.clamp(0, 1)

    return torch.tensor(list(cost.values()), dtype=torch.float64), lost(filters), lost(inputs)


def _path(
    sensitivities: Sensitivities, units: list[list[str]], cost: Tensor, filters: Tensor, inputs: Tensor
) -> list[list[float]]:
    """Rates of the units, rising in steps from those that they have to the highest: at each place the unit rises next
    that adds least loss for what it saves, to whichever measured rate is best."""
    missing = [names[0] for names in units if names[0] not in sensitivities.losses]
    if missing:
        raise MfpError(f"the sensitivities are of another plan: layer {missing[0]!r} is not among them")
    path = [[sensitivities.around.get(names[0], 0.0) for names in units]]
    rates = torch.tensor(path[0], dtype=torch.float64)
    added = [
        {path[0][number]: 0.0} | {rate: sensitivities.added(names[0], rate) for rate in sensitivities.losses[names[0]]}
        for number, names in enumerate(units)
    ]
    while True:
        left_filters, left_inputs = 1 - filters @ rates, 1 - inputs @ rates
        per_rate = filters.T @ (cost * left_inputs) + inputs.T @ (cost * left_filters)
        saves = per_rate.clamp(min=1e-9).tolist()
        rises = [
            ((loss - added[number][now]) / (saves[number] * (rate - now)), -saves[number] * (rate - now), number, rate)
            for number, now in enumerate(path[-1])
            for rate, loss in added[number].items() if rate > now
        ]  # fmt: skip
        if not rises:
            return path
        *_, number, rate = min(rises)
        now = path[-1][number]
        for step in range(1, round((rate - now) / STEP) + 1):
            path.append([*path[-1][:number], round(now + step * STEP, 6), *path[-1][number + 1 :]])
        path[-1][number] = rate
        rates[number] = rate
