"""Which conv weights are pruned, by how much, and where their filters lie on one flat axis."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from mfp.errors import CaptureError, MfpError, did_you_mean
from mfp.layouts import is_row_dense
from mfp.structure import CONVS, Structure, structure_of

#: Projection shortcuts of residual networks, not pruned by default, as in the papers.
DEFAULT_SKIP = ("downsample",)

#: What may become of the filters at the end of a residual branch; see :meth:`FilterPlan.from_model`.
RESIDUAL = ("index", "keep", "coupled")


@dataclass(frozen=True)
class Follower:
    """A parameter whose rows go with the filters of a layer: row block j is masked with filter j.

    Attributes:
        module: dotted name of the module that holds it.
        parameter: ``"weight"`` or ``"bias"``.
        is_weight: True for a depthwise conv's weight, which goes even when ``mask_bn=False``.
    """

    module: str
    parameter: str
    is_weight: bool


@dataclass(frozen=True)
class PlannedLayer:
    """One conv layer of a plan: N filters of K weights.

    Attributes:
        name: dotted module name.
        num_filters: N.
        filter_size: K = C/groups * kh * kw.
        rate: share of the filters to prune.
        num_pruned: how many that are: int(N * rate), fewer only by ``channel_multiple`` and ``unit``.
        offset: of its first filter on the plan's flat axis.
        followers: parameters masked together with its filters.
        group: layers of one group lose the same filters; None for a layer that is pruned alone.
        unit: so many filters in a row go together: a group of a conv with groups.
    """

    name: str
    num_filters: int
    filter_size: int
    rate: float
    num_pruned: int
    offset: int
    followers: tuple[Follower, ...]
    group: int | None = None
    unit: int = 1

    @property
    def slice(self) -> slice:
        """The layer's part of the flat filter axis."""
        return slice(self.offset, self.offset + self.num_filters)

    def count_pruned(self, rate: float, channel_multiple: int) -> int:
        """How many filters go at a rate."""
        return count_pruned(self.num_filters, rate, math.lcm(channel_multiple, self.unit))


class FilterPlan:
    """The layers to prune, in the order of the model's modules; made by :meth:`from_model`.

    A plan holds names, not tensors: parameters are looked up in the model at each use, so weights that were replaced or
    moved are found, and a layer whose shape changed since is an error.

    Attributes:
        model: the module the plan belongs to.
        layers: the planned layers.
        num_filters: F, the length of the flat filter axis.
        channel_multiple: the kept filters of a layer are rounded up to a multiple of this.
    """

    def __init__(self, model: nn.Module, layers: Sequence[PlannedLayer], channel_multiple: int = 1) -> None:
        self.model = model
        self.layers = tuple(layers)
        self.num_filters = sum(layer.num_filters for layer in layers)
        self.channel_multiple = channel_multiple
        self._by_name = {layer.name: layer for layer in layers}

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        rate: float = 0.4,
        *,
        skip: Sequence[str] | None = None,
        layer_rates: Mapping[str, float] | None = None,
        channel_multiple: int = 1,
        residual: str = "index",
        example_input: Any = None,
    ) -> FilterPlan:
        """Plan all Conv1d/2d/3d layers of a model, and the 1x1 convs that it writes as Linear layers (ConvNeXt).

        >>> plan = mfp.FilterPlan.from_model(torchvision.models.resnet50(), rate=0.4, layer_rates={"conv1": 0.0})
        >>> plan["layer1.0.conv1"].num_pruned     # int(64 * 0.4)
        25

        Left out by default: layers that match ``skip``; convs whose channels are the network's output (a classifier
        written as a conv); depthwise convs that read one planned conv only (they follow its mask).

        Args:
            rate: share of filters pruned per layer, in [0, 1).
            skip: patterns of layers to leave out: a layer's dotted name (``"conv1"`` is then that layer alone), else a
                part of names (``"downsample"``) or a glob for whole names (``"layer4.*"``). None: the projection
                shortcuts (``"downsample"``), as in the papers; nothing where layers are coupled.
            layer_rates: rates for single layers, by the same patterns, a full name before a pattern, a later pattern
                before an earlier one; stronger than ``rate`` and ``skip``.
            channel_multiple: round the kept filters of a layer up to a multiple, never beyond the layer.
            residual: which filters may go where layers meet in an addition. ``"index"``: any; what is left of a branch
                is added to the stream by index, which mfp's serving form does for nothing and other engines do not.
                ``"keep"``: none; layers that end in an addition stay whole, and so do the gates of squeeze-excite, so
                that all that is left are plain layers.
                ``"coupled"``: layers that meet in an addition or a product lose the same filters (their scores are
                summed): plain additions of fewer channels. A group is left out as a whole when one of its layers is.
                Convs with groups lose whole groups, together with the layer in front of them. One that reads something
                else (a shuffle, a concatenation) stays whole; with ``"index"`` it loses filters one by one, as do
                layers of which one has another rate or is left out, and groups too wide for the rate.
            example_input: what the model takes, as for :func:`mfp.compact`; needed where that is not one image.

        Raises:
            MfpError: a rate outside [0, 1), a pattern that matches no layer, a model without conv layers, a weight
                that is not laid out filter by filter.
        """
        model = unwrap(model)
        layer_rates = dict(layer_rates or {})
        check_plan_arguments(rate, skip, layer_rates, channel_multiple, residual)
        if skip is None:
            skip = () if residual == "coupled" else DEFAULT_SKIP
        structure = _structure(model, example_input, must_have=residual != "index")
        convs = {n: m for n, m in model.named_modules() if isinstance(m, CONVS) or n in structure.pointwise}
        skipped = set().union(*_match_all("skip", skip, convs).values())
        rates = _resolve_rates(layer_rates, convs)
        group_of, fixed = _groups(structure, residual)
        followers, outputs = structure.followers, structure.outputs
        following = {name for names in followers.values() for name in names}

        if residual == "keep":
            skipped |= structure.bound
        left_out = {name for name in convs if name not in rates and (name in outputs or name in skipped)}
        if residual == "index":
            wanted = {name: rates.get(name, 0.0 if name in left_out else rate) for name in convs.keys() - following}
            group_of = _at_one_rate(group_of, structure.units, wanted, convs, channel_multiple)
        fixed |= {group_of[name] for name in left_out & group_of.keys()}
        left_out |= {name for name, group in group_of.items() if group in fixed}

        layers: list[PlannedLayer] = []
        seen: set[int] = set()
        offset = 0
        for name, conv in convs.items():
            if name in following or name in left_out or id(conv.weight) in seen:
                continue
            seen.add(id(conv.weight))
            share = rates.get(name, rate)
            group = group_of.get(name)
            unit = 1 if group is None else structure.units.get(group, 1)
            layer = _planned(model, name, conv, float(share), offset, channel_multiple, followers.get(name, ()), unit)
            layers.append(replace(layer, group=group))
            offset += len(conv.weight)
        if not layers:
            raise MfpError(
                f"{type(model).__name__} has no conv layer to prune: {len(convs)} in all, {len(outputs)} of them the "
                f"network's output, skip={tuple(skip)!r}; layer_rates={{name: rate}} plans a layer all the same"
            )
        _check_groups(layers)
        return cls(model, layers, channel_multiple)

    def __getitem__(self, name: str) -> PlannedLayer:
        if name not in self._by_name:
            raise MfpError(f"layer {name!r} is not in the plan; its layers are {', '.join(self._by_name)}")
        return self._by_name[name]

    def __repr__(self) -> str:
        pruned = sum(layer.num_pruned for layer in self.layers)
        return f"FilterPlan({len(self.layers)} layers, {self.num_filters} filters, {pruned} to prune)"

    def weight(self, layer: PlannedLayer) -> nn.Parameter:
        """The layer's weight as it is now, ``[N, ...]``."""
        module = _module(self.model, layer.name)
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or len(weight) != layer.num_filters:
            shape = tuple(weight.shape) if isinstance(weight, Tensor) else None
            raise MfpError(
                f"layer {layer.name!r} had {layer.num_filters} filters of {layer.filter_size} weights when "
                f"planned, its weight is {shape} now; make a new plan"
            )
        if weight.numel() != layer.num_filters * layer.filter_size or not is_row_dense(weight):
            raise MfpError(
                f"layer {layer.name!r}: shape {tuple(weight.shape)} and strides {weight.stride()} do not hold "
                f"each filter's {layer.filter_size} weights as one dense block; call "
                "model.to(memory_format=torch.contiguous_format), or make a new plan if the shape changed"
            )
        return weight

    def weights(self) -> list[nn.Parameter]:
        """The weights of all layers as they are now."""
        weights = [self.weight(layer) for layer in self.layers]
        devices = {str(weight.device) for weight in weights}
        if len(devices) > 1:
            raise MfpError(
                f"the plan's layers are on different devices: {', '.join(sorted(devices))}; move the model to one"
            )
        return weights

    def followers(self, mask_bn: bool = True) -> list[tuple[int, nn.Parameter]]:
        """(index of the layer, parameter) of everything that is masked with the filters, the weights themselves aside.

        Args:
            mask_bn: with biases and BatchNorm; without, only the weights of depthwise followers.
        """
        found = []
        for index, layer in enumerate(self.layers):
            for follower in layer.followers:
                if mask_bn or follower.is_weight:
                    found.append((index, getattr(_module(self.model, follower.module), follower.parameter)))
        return found

    def scaled(self, factor: float) -> FilterPlan:
        """The same layers with all rates times ``factor`` in [0, 1]: a point on the way to the final rates."""
        return self.with_rates({layer.name: layer.rate * factor for layer in self.layers})

    def with_rates(self, rates: Mapping[str, float]) -> FilterPlan:
        """The same layers, some with other rates, by name."""
        layers = [
            replace(layer, rate=rate, num_pruned=layer.count_pruned(rate, self.channel_multiple))
            for layer, rate in ((layer, rates.get(layer.name, layer.rate)) for layer in self.layers)
        ]
        return FilterPlan(self.model, layers, self.channel_multiple)


def _groups(structure: Structure, residual: str) -> tuple[dict[str, int], set[int]]:
    """(group of each layer that loses filters together with others, groups that can lose none)"""
    if residual == "coupled":
        return structure.groups, set(structure.fixed)
    whole_groups = {n: g for n, g in structure.groups.items() if g in structure.units and n not in structure.bound}
    if residual == "keep":
        return whole_groups, set(structure.fixed)
    return {name: group for name, group in whole_groups.items() if group not in structure.fixed}, set()


def _at_one_rate(
    group_of: Mapping[str, int], units: Mapping[int, int], rates: Mapping[str, float], convs: Mapping[str, nn.Module],
    channel_multiple: int,
) -> dict[str, int]:  # fmt: skip
    """The groups whose layers all have one rate, by which a unit goes at least: joins by index bind no others."""
    found: dict[int, set[tuple[float, int]]] = {}
    for name in group_of.keys() & rates.keys():
        group, filters = group_of[name], len(convs[name].weight)
        pruned = count_pruned(filters, rates[name], math.lcm(channel_multiple, units[group]))
        found.setdefault(group, set()).add((rates[name], pruned))
    return {n: g for n, g in group_of.items() if len(found[g]) == 1 and all(pruned for _, pruned in found[g])}


def _structure(model: nn.Module, example_input: Any, must_have: bool) -> Structure:
    """What the graph says; without one (a warning) the layers are planned all the same, where that is possible."""
    nothing = Structure({}, set(), set(), {}, set(), {}, set())
    if not any(isinstance(module, CONVS) for module in model.modules()):
        return nothing
    try:
        return structure_of(model, example_input)
    except CaptureError as error:
        if must_have:
            raise
        warnings.warn(
            f"{error}. Without the graph (give example_input=...) no BatchNorm or depthwise conv is masked together "
            "with its conv: compaction stays exact, but removes less",
            stacklevel=3,
        )
        return nothing


def unwrap(model: nn.Module) -> nn.Module:
    """The user's module inside DistributedDataParallel, DataParallel or torch.compile."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def count_pruned(num_filters: int, rate: float, channel_multiple: int = 1) -> int:
    """int(N * rate), less what rounding the kept ones up to a multiple takes away."""
    kept = num_filters - int(num_filters * rate)
    return num_filters - min(num_filters, math.ceil(kept / channel_multiple) * channel_multiple)


def matching(pattern: str, names: Collection[str]) -> set[str]:
    """The layers that a pattern names: the one with that dotted name, else by a part of the name or a glob."""
    if pattern in names:
        return {pattern}
    return {name for name in names if pattern in name.split(".") or fnmatchcase(name, pattern)}


def check_rate(what: str, rate: float) -> None:
    """Raise unless the rate is a number in [0, 1)."""
    if not isinstance(rate, int | float) or isinstance(rate, bool) or not 0.0 <= rate < 1.0:
        raise MfpError(f"{what} must be in [0, 1), so that at least one filter of a layer stays; got {rate!r}")


def check_plan_arguments(
    rate: float, skip: Sequence[str] | None, layer_rates: Mapping[str, float], multiple: int, residual: str
) -> None:
    """Raise MfpError for arguments that no model could make sense of."""
    check_rate("rate", rate)
    for pattern, value in layer_rates.items():
        check_rate(f"layer_rates[{pattern!r}]", value)
    if isinstance(skip, str):
        raise MfpError(f"skip must be a sequence of patterns, not the string {skip!r}; write ({skip!r},)")
    if not isinstance(multiple, int) or multiple < 1:
        raise MfpError(f"channel_multiple must be a whole number of at least 1, got {multiple!r}")
    if residual not in RESIDUAL:
        near = did_you_mean(residual, RESIDUAL)
        raise MfpError(f"residual must be one of {', '.join(map(repr, RESIDUAL))}, not {residual!r}{near}")


def _match_all(argument: str, patterns: Iterable[str], convs: Collection[str]) -> dict[str, set[str]]:
    """{pattern: layers}; a pattern that names none is a typing error of the user's, but for the default."""
    found = {pattern: matching(pattern, convs) for pattern in patterns}
    for pattern, layers in found.items():
        if convs and not layers and pattern not in DEFAULT_SKIP:
            near = did_you_mean(pattern, convs)
            raise MfpError(f"{argument}: {pattern!r} matches no conv layer; the layers are {', '.join(convs)}{near}")
    return found


def _resolve_rates(layer_rates: Mapping[str, float], convs: Collection[str]) -> dict[str, float]:
    patterns = _match_all("layer_rates", layer_rates, convs)
    by_pattern = {name: layer_rates[pattern] for pattern, names in patterns.items() for name in names}
    return by_pattern | {name: rate for name, rate in layer_rates.items() if name in convs}


def _check_groups(layers: Sequence[PlannedLayer]) -> None:
    first: dict[int, PlannedLayer] = {}
    for layer in layers:
        if layer.group is None:
            continue
        other = first.setdefault(layer.group, layer)
        if (other.num_filters, other.num_pruned) != (layer.num_filters, layer.num_pruned):
            raise MfpError(
                f"layers that lose filters together must lose equally many: {other.name!r} loses {other.num_pruned} of "
                f"{other.num_filters}, {layer.name!r} {layer.num_pruned} of {layer.num_filters}; give both one rate"
            )


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise MfpError(f"the model has no module {name!r} any more; make a new plan") from None


def _planned(model, name, conv, rate, offset, channel_multiple, follower_names, unit) -> PlannedLayer:
    filters = len(conv.weight)
    followers = [Follower(name, "bias", is_weight=False)] if conv.bias is not None else []
    for follower in follower_names:
        module = model.get_submodule(follower)
        depthwise = isinstance(module, CONVS)
        for parameter in ("weight", "bias"):
            if getattr(module, parameter, None) is not None:
                followers.append(Follower(follower, parameter, is_weight=depthwise and parameter == "weight"))
    layer = PlannedLayer(
        name=name,
        num_filters=filters,
        filter_size=conv.weight[0].numel(),
        rate=rate,
        num_pruned=0,
        offset=offset,
        followers=tuple(followers),
        unit=unit,
    )
    layer = replace(layer, num_pruned=layer.count_pruned(rate, channel_multiple))
    FilterPlan(model, [layer]).weight(layer)  # refuses a weight that is not laid out filter by filter
    return layer
