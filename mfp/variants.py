"""Pruned variants of one network, run side by side on calibration batches, without touching the network.

What variants have in common is computed once: they go through the operator graph together, and part where they reach a
layer in which their masks differ. BatchNorm statistics are estimated on the way: all batches reach a layer before any
goes on, so that a single pass gives each layer the statistics of its input in the pruned network, over all the batches
taken together, and the network's outputs with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mfp import ops
from mfp.attributes import ONE_VALUE, Batches, metrics, tally
from mfp.capture import capture, example_arguments
from mfp.errors import CaptureError, MfpError
from mfp.mask import FilterMask

aten = torch.ops.aten
Statistics = dict[str, tuple[Tensor, Tensor]]  # name of a BatchNorm: mean and variance, float64 [C]


@dataclass
class Variant:
    """A network as one mask would leave it.

    Attributes:
        statistics: what its BatchNorms see of their inputs.
        metrics: ``loss``, ``top1_error`` and ``top5_error`` with these statistics; empty if not asked for.
    """

    statistics: Statistics = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


class Variants:
    """The operator graph of a network, for running variants of it.

    Args:
        model: the network; its weights are read at each run.
        batches: ``(inputs, targets)`` pairs like those of the runs.

    Raises:
        CaptureError: the network cannot be captured for these batches, its result is not one tensor, or a BatchNorm is
            called more than once (its statistics then depend on all the calls).
    """

    def __init__(self, model: nn.Module, batches: Batches) -> None:
        inputs = [inputs for inputs, _ in batches]
        if not inputs or not all(isinstance(value, Tensor) for value in inputs):
            raise CaptureError("variants run on batches of one tensor each")
        self.model = model
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        differ = len({value.shape for value in inputs}) > 1
        captured = capture(model, example_arguments(model, inputs[0].to(self.device)), free_sizes=differ)
        if differ and captured.fixed:
            raise CaptureError(f"the calibration batches have different sizes: {captured.fixed[0]}")
        self.nodes = [node for node in captured.graph.nodes if node.op != "get_attr"]
        if not isinstance(self.nodes[-1].args[0], fx.Node):
            raise CaptureError(f"{type(model).__name__} returns no single tensor")
        self._captured = captured.tensors
        self._norms = _find_norms(model, captured.graph)
        self._done_after = _last_uses(captured.graph)

    def fits(self) -> bool:
        """Whether the model is still where it was captured."""
        parameter = next(self.model.parameters())
        return (parameter.device, parameter.dtype) == (self.device, self.dtype)

    @torch.no_grad()
    def run(
        self,
        masks: Sequence[FilterMask | None],
        batches: Batches,
        *,
        mask_bn: bool = True,
        measure: bool = True,
        watch: Callable[[fx.Node, list[tuple], list[int]], None] | None = None,
        advance: Callable[[], None] = lambda: None,
    ) -> list[Variant]:
        """One variant per mask; None is the network as it is.

        All batches are held at once: memory for the two or three largest activations of all the images.

        Args:
            masks: of one plan.
            mask_bn: as for :meth:`mfp.FilterMask.apply_`.
            measure: False where the targets are not to be looked at.
            watch: is shown each operator with its arguments (a tuple per batch) and the masks that it is run for.
            advance: is called for every mask whose variant is done.

        Raises:
            MfpError: a BatchNorm sees a single value per channel in all the batches.
        """
        run = _Run(self, masks, batches, mask_bn, measure, watch, advance)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            run.go(0, {}, {}, {}, list(range(len(masks))))
        return run.results

    @torch.no_grad()
    def settle_(self, statistics: Statistics, batches: Batches) -> None:
        """Give the network's own BatchNorms these statistics."""
        for name, (mean, variance) in statistics.items():
            norm = self.model.get_submodule(name)
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)
            norm.num_batches_tracked.fill_(len(batches))


class _Run:
    """One walk of some masks through the graph."""

    def __init__(self, owner: Variants, masks, batches, mask_bn, measure, watch, advance) -> None:
        self.owner, self.masks, self.batches = owner, masks, batches
        self.measure, self.watch, self.advance = measure, watch, advance
        self.results = [Variant() for _ in masks]
        current = dict(owner.model.named_parameters()) | dict(owner.model.named_buffers())
        self.tensors = {name: current.get(name, value) for name, value in owner._captured.items()}
        names = {id(value): name for name, value in self.tensors.items()}
        self.rows: dict[tuple[int, int], list[str]] = {}  # a layer's part of the filter axis: what is masked with it
        for mask in [mask for mask in masks if mask is not None][:1]:
            for parameter, offset, count in mask.parameters(mask_bn):
                if id(parameter) in names:
                    self.rows.setdefault((offset, count), []).append(names[id(parameter)])
        self.layer_of = {name: layer for layer, found in self.rows.items() for name in found}

    def go(self, start: int, values: dict, masked: dict, statistics: Statistics, group: list[int]) -> None:
        """Runs the graph from node ``start`` on for the masks of ``group``, which are one so far.

        Args:
            values: results of the nodes before that are still needed, one per batch.
            masked: weights of the layers before with their pruned filters zeroed, where they are still needed.
        """
        for index in range(start, len(self.owner.nodes)):
            node = self.owner.nodes[index]
            for layer in {self.layer_of[n.target]: None for n in node.all_input_nodes if n.target in self.layer_of}:
                group, *others = self._parted(layer, group)
                for other in others:
                    self.go(index, dict(values), dict(masked), dict(statistics), other)
                self._mask(layer, masked, group)
            if node.op == "output":
                return self._finish(values[node.args[0]], statistics, group)
            values[node] = self._result(node, values, masked, statistics, group)
            for done in self.owner._done_after[node]:
                values.pop(done, None)
                masked.pop(done.target, None)

    def _parted(self, layer: tuple[int, int], group: list[int]) -> list[list[int]]:
        """The masks by what they leave of a layer, the largest part first."""
        if len(group) == 1:
            return [group]
        parts: dict[bytes, list[int]] = {}
        for number in group:
            keep = self._keep(layer, number)
            key = b"" if keep is None else keep.cpu().numpy().tobytes()
            parts.setdefault(key, []).append(number)
        return sorted(parts.values(), key=len, reverse=True)

    def _keep(self, layer: tuple[int, int], number: int) -> Tensor | None:
        mask, (offset, count) = self.masks[number], layer
        keep = None if mask is None else mask.keep[offset : offset + count]
        return None if keep is None or keep.all() else keep

    def _mask(self, layer: tuple[int, int], masked: dict[str, Tensor], group: list[int]) -> None:
        keep = self._keep(layer, group[0])
        names = [name for name in self.rows[layer] if name not in masked]
        if keep is None or not names:
            return
        copies = [self.tensors[name].detach().clone() for name in names]
        ops.mask_filters_(copies, keep.to(copies[0].device), [0] * len(copies), [layer[1]] * len(copies))
        masked.update(zip(names, copies, strict=True))

    def _result(self, node: fx.Node, values: dict, masked: dict, statistics: Statistics, group: list[int]) -> list[Any]:
        if node.op == "placeholder":
            return [inputs.to(self.owner.device, non_blocking=True) for inputs, _ in self.batches]

        def value(source: fx.Node, batch: int) -> Any:
            if source.op == "get_attr":
                return masked.get(source.target, self.tensors[source.target])
            return values[source][batch]

        def call(batch: int) -> tuple[tuple, dict]:
            return tuple(fx.map_arg(part, lambda source: value(source, batch)) for part in (node.args, node.kwargs))

        calls = [call(batch) for batch in range(len(self.batches))]
        if self.watch is not None:
            self.watch(node, [arguments for arguments, _ in calls], group)
        name = self.owner._norms.get(node)
        if name is None:
            return [node.target(*arguments, **named) for arguments, named in calls]
        statistics[name] = _statistics([arguments[0] for arguments, _ in calls], name)
        mean, variance = (part.to(calls[0][0][3].dtype) for part in statistics[name])
        return [node.target(*arguments[:3], mean, variance, *arguments[5:], **named) for arguments, named in calls]

    def _finish(self, logits: list[Tensor], statistics: Statistics, group: list[int]) -> None:
        found = {}
        if self.measure:
            pairs = zip(logits, self.batches, strict=True)
            found = metrics(sum(tally(own, targets.to(own.device)) for own, (_, targets) in pairs))
        for number in group:
            self.results[number] = Variant(statistics, found)
            self.advance()


def _find_norms(model: nn.Module, graph: fx.Graph) -> dict[fx.Node, str]:
    """The operators whose statistics are re-estimated, with the name of their module."""
    reads = {node.target: node for node in graph.nodes if node.op == "get_attr"}
    found = {}
    for name, module in model.named_modules():
        mean, variance = (reads.get(f"{name}.{part}".lstrip(".")) for part in ("running_mean", "running_var"))
        if not isinstance(module, _BatchNorm) or (mean is None and variance is None):
            continue
        users = {*(mean.users if mean else ()), *(variance.users if variance else ())}
        norm = next(iter(users))
        if len(users) > 1 or getattr(norm.target, "overloadpacket", None) is not aten.batch_norm:
            raise CaptureError(f"the statistics of {name!r} are used more than once, or not by BatchNorm alone")
        found[norm] = name
    return found


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """What nobody needs after a node has run."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        last.update(dict.fromkeys(node.all_input_nodes, node))
    after: dict[fx.Node, list[fx.Node]] = {node: [] for node in graph.nodes}
    for source, node in last.items():
        after[node].append(source)
    return after


def _statistics(inputs: list[Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance per channel over all batches ``[B, C, ...]``."""
    counts = [value.numel() // value.shape[1] for value in inputs]
    total = sum(counts)
    if total < 2:
        raise MfpError(ONE_VALUE.format(f"BatchNorm {name!r}"))
    # of each batch with the variance around its own mean: much faster on a CPU than torch.var_mean
    own = [aten.batch_norm_update_stats(_wide(value), None, None, 0.0) for value in inputs]
    mean = sum(count * m.double() for count, (m, _) in zip(counts, own, strict=True)) / total
    spread = sum(n * (v.double() + (m.double() - mean).square()) for n, (m, v) in zip(counts, own, strict=True))
    return mean, spread / (total - 1)


def _wide(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()
