"""How sensitive the layers of a network are to pruning: how the calibrated loss rises with the rate of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from mfp.attributes import Batches
from mfp.errors import MfpError
from mfp.plan import FilterPlan, unwrap
from mfp.scores import FilterScores, score_filters
from mfp.selection import select_filters
from mfp.variants import Variants

RATES = (0.15, 0.3, 0.45, 0.6, 0.75)  # at which the loss is measured; straight lines between them
BROKEN = 1e9  # added by a rate whose loss is no number


@dataclass(frozen=True)
class Sensitivities:
    """The calibrated loss of a network in which one layer is pruned, the others as they are.

    Attributes:
        loss: of the network with all layers as they are, with BatchNorm statistics estimated in the same way.
        losses: layer -> rate -> loss; layers that lose the same filters are pruned together.
        around: the rates that layers have already; the others are whole.
    """

    loss: float
    losses: dict[str, dict[float, float]]
    around: Mapping[str, float] = field(default_factory=dict)

    def added(self, layer: str, rate: float) -> float:
        """How much the loss rises at any rate up to the highest that was measured; never less than at a lower rate."""
        below, risen = self.around.get(layer, 0.0), 0.0
        for measured, loss in sorted(self.losses[layer].items()):
            higher = max(risen, loss - self.loss if math.isfinite(loss) else BROKEN)
            if rate <= measured:
                share = (rate - below) / (measured - below)
                return risen + share * (higher - risen) if share > 0 else risen
            below, risen = measured, higher
        return risen


def measure_sensitivities(
    model: nn.Module,
    example_input: Any,
    calibration: Batches,
    *,
    criterion: str = "l2_distance",
    rates: Sequence[float] = RATES,
    around: Mapping[str, float] | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
    **plan_arguments: Any,
) -> Sensitivities:
    """The loss with one layer pruned, for each layer and rate; other arguments as for :func:`find_rates`.

    Args:
        rates: at which the loss is measured.
        around: rates of layers, of a network that is pruned already: the loss is that of pruning a layer further.

    What lies in front of the pruned layer is computed once for all of them. With torch.distributed running, each
    process brings its own batches, and all get the same losses.
    """
    model, calibration = unwrap(model), checked_batches(calibration)
    plan = plan_of(model, example_input, plan_arguments)
    scores = score_filters(plan, (criterion,))
    units = units_of(model, example_input, plan_arguments)
    variants = Variants(model, calibration)
    return sensitivities_of(scores, criterion, units, variants, calibration, rates, around or {}, advance=advance)


def sensitivities_of(
    scores: FilterScores, criterion: str, units: list[list[str]], variants: Variants, calibration: Batches,
    rates: Sequence[float] = RATES, around: Mapping[str, float] = MappingProxyType({}), mask_bn: bool = True,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Sensitivities:  # fmt: skip
    plan = scores.plan
    start = plan.with_rates({layer.name: around.get(layer.name, 0.0) for layer in plan.layers})
    masks = [select_filters(FilterScores(start, scores.by_name), criterion)]
    of_mask = {}  # equal ones (few filters, or rounded to the same number) are tried once
    seen = {masks[0].digest: 0}
    for names in units:
        for rate in rates:
            if rate > around.get(names[0], 0.0):
                rates_here = FilterScores(start.with_rates(dict.fromkeys(names, rate)), scores.by_name)
                mask = select_filters(rates_here, criterion)
                of_mask[names[0], rate] = number = seen.setdefault(mask.digest, len(masks))
                masks += [mask] if number == len(masks) else []
    done = iter(range(1, len(masks) + 1))
    report = lambda: advance(next(done), len(masks))  # noqa: E731
    found = variants.run(masks, calibration, mask_bn=mask_bn, advance=report)
    losses = {
        name: {rate: found[of_mask[names[0], rate]].metrics["loss"] for rate in rates if (names[0], rate) in of_mask}
        for names in units for name in names
    }  # fmt: skip
    return Sensitivities(found[0].metrics["loss"], losses, dict(around))


def checked_batches(calibration: Batches | None) -> list[tuple[Tensor, Tensor]]:
    batches = list(calibration or ())
    if not batches:
        raise MfpError("sensitivities are measured on data: give calibration=[(inputs, targets), ...]")
    return batches


def plan_of(model: nn.Module, example_input: Any, plan_arguments: Mapping[str, Any]) -> FilterPlan:
    return FilterPlan.from_model(model, 0.0, example_input=example_input, **plan_arguments)


def units_of(model: nn.Module, example_input: Any, plan_arguments: Mapping[str, Any]) -> list[list[str]]:
    """The layers whose rate is to be found; those that must lose the same filters stand together."""
    plan = plan_of(model, example_input, plan_arguments)
    other = FilterPlan.from_model(model, 0.5, example_input=example_input, **plan_arguments)
    units: dict[Any, list[str]] = {}
    for layer, moved in zip(plan.layers, other.layers, strict=True):
        if layer.rate != moved.rate:  # else the user has settled it
            units.setdefault(layer.name if layer.group is None else layer.group, []).append(layer.name)
    if not units:
        raise MfpError("layer_rates settles the rates of all layers: there is none to be found")
    return list(units.values())
