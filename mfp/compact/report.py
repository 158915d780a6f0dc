"""What a compaction did, in numbers and words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from mfp.compact.channels import Network
from mfp.compact.contraction import layer_name, layer_of, nonzero_weights
from mfp.compact.count import count_parameters, flops
from mfp.compact.operators import rule_for
from mfp.compact.writer import Writer


@dataclass(frozen=True)
class LayerChange:
    """One conv or linear layer: filters before and after, and inputs before and after."""

    name: str
    filters_before: int
    filters_after: int
    inputs_before: int
    inputs_after: int


@dataclass
class CompactReport:
    """Result of a compaction; ``str(report)`` is a table.

    ``kept_because`` lists what the pass did not understand or had to leave at full width, each with the reason.
    ``max_difference`` is the largest difference between masked and compact outputs on the example, relative to
    the largest output. ``nothing_removed`` says why, where the compact network is as large as the model. ``inputs`` has
    the example's shapes and dtypes by argument, ``{"x": [[1, 3, 224, 224], "float32"]}``; empty where they are nested.
    """

    layers: list[LayerChange]
    flops_before: int
    flops_after: int
    parameters_before: int
    parameters_after: int
    max_difference: float
    kept_because: list[str] = field(default_factory=list)
    nothing_removed: str = ""
    inputs: dict[str, list] = field(default_factory=dict)

    @property
    def flops_saved(self) -> float:
        """Share of the multiply-adds that is gone, 0 to 1."""
        return 1 - self.flops_after / self.flops_before if self.flops_before else 0.0

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers] + [5])
        lines = [f"{'layer':{width}}  filters         inputs"]
        for layer in self.layers:
            lines.append(
                f"{layer.name:{width}}  {layer.filters_before:5} → {layer.filters_after:5}"
                f"   {layer.inputs_before:5} → {layer.inputs_after:5}"
            )
        saved = 100 * self.flops_saved
        lines.append(f"multiply-adds {self.flops_before:,} → {self.flops_after:,} ({saved:.1f} % saved)")
        lines.append(f"parameters {self.parameters_before:,} → {self.parameters_after:,}")
        lines.append(f"largest relative difference of the outputs {self.max_difference:.1e}")
        lines += [f"kept: {line}" for line in self.kept_because]
        return "\n".join(lines)


def make_report(
    model: nn.Module, small: fx.GraphModule, net: Network, out: Writer, fixed: list[str], arguments: dict[str, Any],
    difference: float,
) -> CompactReport:  # fmt: skip
    """What became of every layer, and why some stayed whole."""
    left, layers, seen, zero, filled = dict(small.named_modules()), [], set(), 0, []
    for node in net.graph.nodes:
        layer = layer_of(node)
        if layer is None or net.value(layer.weight) is None or layer.weight.target in seen:
            continue
        seen.add(layer.weight.target)
        nonzero = nonzero_weights(net, layer)
        zero += int((~nonzero.any(-1)).sum())
        before = (nonzero.shape[0] * nonzero.shape[1], layer.inputs)
        cut = out.cuts.get(layer.weight.target)
        module = None if cut is None else left.get(cut.name)
        after = sizes_of(getattr(module, "conv", module)) if module is not None else (0, 0) if cut else before
        if cut is not None and layer.groups > 1:
            stay = int((~nonzero.any(-1)).flatten()[cut.rows[cut.rows >= 0]].sum())
            filled += [f"{where(net, node)}: {stay} zero filters stay, to fill up its groups"] if stay else []
        layers.append(LayerChange(layer_name(net, node, layer), before[0], after[0], before[1], after[1]))
    changed = any((c.filters_before, c.inputs_before) != (c.filters_after, c.inputs_after) for c in layers)
    nothing = "no filter of the model is zero; was the mask applied?" if not zero else "see report.kept_because"
    return CompactReport(
        layers, flops(model, arguments), flops(small, arguments), count_parameters(model), count_parameters(small),
        difference, [*fixed, *reasons(net, out), *filled], "" if changed or not layers else nothing,
        described(arguments),
    )  # fmt: skip


def described(arguments: dict[str, Any]) -> dict[str, list]:
    """Shapes and dtypes of arguments that are tensors, all of them; nothing otherwise."""
    if not all(isinstance(value, Tensor) for value in arguments.values()):
        return {}
    return {name: [list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in arguments.items()}


def example_of(report: CompactReport | None) -> dict[str, Tensor] | None:
    """Random inputs like those that a network was made with; None where that is not known."""
    if report is None or not report.inputs:
        return None
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator).to(getattr(torch, dtype))
        for name, (shape, dtype) in report.inputs.items()
    }


def sizes_of(module: nn.Module) -> tuple[int, int]:
    """(filters, inputs)"""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return module.out_channels, module.in_channels


def reasons(net: Network, out: Writer) -> list[str]:
    lines = [f"{where(net, node)} stays whole: {reason}" for node, reason in net.whole.items()]
    for reader, sources in out.expanded.items():
        names = ", ".join(dict.fromkeys(where(net, s) for s in net.graph.nodes if s.name in sources))
        if reader.op == "output":
            why = "the network's outputs keep their width"
        elif rule_for(net, reader).understood:
            why = f"{reader.target} reads across channels"
        else:
            why = f"{reader.target} is not understood"
        lines.append(f"{where(net, reader)}: {why}; the result of {names} is widened for it")
    for name, module in net.modules.items():
        if name and (module._forward_hooks or module._forward_pre_hooks):
            lines.append(f"{name}: what its forward hooks compute is part of the network now, what else they do is not")
    return lines


def where(net: Network, node: fx.Node) -> str:
    """The module a node came from, and the node's own name in it."""
    return f"{node.meta['module']} ({node.name})" if node.meta.get("module") else node.name
