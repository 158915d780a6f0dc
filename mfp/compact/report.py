"""What a compaction did, in numbers and words."""

from __future__ import annotations

from dataclasses import dataclass, field


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
    the largest output.
    """

    layers: list[LayerChange]
    flops_before: int
    flops_after: int
    parameters_before: int
    parameters_after: int
    max_difference: float
    kept_because: list[str] = field(default_factory=list)

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
