"""Hard pruning: dead-channel elimination on the torch.fx graph, exact by construction."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from mfp.compact.builder import Builder
from mfp.compact.channels import Network
from mfp.compact.contraction import Contraction
from mfp.compact.count import count_parameters, flops
from mfp.compact.fold import absorb_constants, fold_batchnorm
from mfp.compact.normalize import ShapeRecorder, normalize
from mfp.compact.optimizer import Origin, compact_optimizer
from mfp.compact.report import CompactReport, LayerChange
from mfp.compact.serve import prepare_for_serving
from mfp.compact.shrink import analyse, write
from mfp.compact.table import rule_for
from mfp.errors import MfpError
from mfp.graph import eval_mode, example_arguments, trace
from mfp.plan import unwrap

__all__ = ["CompactReport", "compact", "compact_optimizer", "count_parameters", "flops"]


BEYOND_ROUNDING = {torch.float16: 0.1, torch.bfloat16: 0.3}  # others: 1e-2
SERVING_BYTES = 16  # rows of channels should start at a multiple: 4 floats, 8 half floats as tensor cores take them


def compact(
    model: nn.Module,
    example_input: Any,
    fold_bn: bool = False,
    *,
    leaf_modules: Iterable[str | type[nn.Module]] = (),
) -> fx.GraphModule:
    """Removes every channel that is constant or that nobody reads; the result computes what ``model.eval()`` does.

    >>> small = mfp.compact(masked_resnet50, torch.zeros(1, 3, 224, 224))
    >>> small.conv1.weight.shape, small.report.flops_saved
    (torch.Size([45, 3, 7, 7]), 0.42)

    The model is left as it is. The result is an ordinary module with the same submodule names; it can be trained on.

    Args:
        model: a network some of whose filters are zero (a masked one).
        example_input: a tensor, a tuple of positional arguments or a dict of named ones, on the model's device.
            It fixes shapes, not sizes: the result takes any batch size, and any image size the model takes.
        fold_bn: the serving form: BatchNorm folded into the convs before it, channels_last weights, fused joins,
            numbers of filters filled up with zeroed ones to a multiple of 16 bytes (odd numbers take longer).
        leaf_modules: names or classes of submodules to leave as one opaque piece each.
    Raises MfpError when the model cannot be traced or run on the example.
    """
    model = unwrap(model)
    arguments = example_arguments(model, example_input)
    traced = trace(model, arguments, leaf_modules)
    modes = {name: module.training for name, module in model.named_modules()}
    with eval_mode(model), torch.no_grad():
        expected = record_shapes(traced, arguments)
        opaque = normalize(traced)
        net = analyse(traced.graph, dict(traced.named_modules()), opaque)
        build = write(net, serving_multiple(model) if fold_bn else 1)
    small = finish(build, type(model).__name__, arguments if fold_bn else None)
    restore_modes(small, modes)
    difference = check(small, arguments, expected, model)
    if not fold_bn:  # folded parameters mix several
        small.origins = origins(model, small, build)
    small.report = make_report(model, small, net, build, example_input, difference)
    return small


def serving_multiple(model: nn.Module) -> int:
    """What numbers of filters are filled up to in the serving form."""
    sizes = [parameter.element_size() for parameter in model.parameters()]
    return SERVING_BYTES // min([4, *sizes])


def origins(model: nn.Module, small: fx.GraphModule, build: Builder) -> dict[str, Origin]:
    """Where the parameters come from; those for constants, and those of weights that are computed, are not listed."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for name, parameter in small.named_parameters():
        old, left = build.origins.get(parameter, (None, None))
        if id(old) in names:
            found[name] = Origin(names[id(old)], left)
    return found


def copies(arguments: dict[str, Any]) -> list[Any]:
    """The example's values, for a network that may overwrite them."""
    return tree_map_only(Tensor, Tensor.clone, list(arguments.values()))


def record_shapes(traced: fx.GraphModule, arguments: dict[str, Any]) -> Any:
    try:
        return ShapeRecorder(traced).run(*copies(arguments))
    except Exception as error:
        shapes = {key: tuple(v.shape) for key, v in arguments.items() if isinstance(v, Tensor)}
        reason = str(error).split("\n")[0]
        raise MfpError(f"the model does not run on the example input {shapes}: {reason}") from error


def finish(build: Builder, name: str, serving: dict[str, Any] | None) -> fx.GraphModule:
    """The module around the written graph; ``serving`` has the example's arguments when BatchNorm is to be folded."""
    must_run = {node.name for node in build.must_run}
    small = fx.GraphModule(build.root, build.graph, f"Compact{name.removeprefix('Compact')}")
    small.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or node.name in must_run)
    small.graph.lint()
    absorb_constants(small)
    if serving is not None:
        fold_batchnorm(small)
        with eval_mode(small):
            prepare_for_serving(small, serving)
    return fx.GraphModule(small, small.graph, type(small).__name__)  # only what is used, in the graph's order


def restore_modes(small: fx.GraphModule, modes: dict[str, bool]) -> None:
    """Each module is in the mode of its original (a frozen BatchNorm stays in eval), new ones in the model's."""
    for name, module in small.named_modules():
        module.training = modes.get(name, modes.get(name.rpartition(".")[0], modes[""]))


def check(small: fx.GraphModule, arguments: dict[str, Any], expected: Any, model: nn.Module) -> float:
    """The largest difference of the outputs on the example, relative to the largest output.

    A difference beyond all rounding is a fault of this package, and an error.
    """
    with eval_mode(small), torch.no_grad():
        actual = small(*copies(arguments))
    worst = 0.0
    for a, b in zip(tensors_in(actual), tensors_in(expected), strict=True):
        if a.shape != b.shape:
            raise AssertionError(f"compact {type(model).__name__} gives {tuple(a.shape)}, the model {tuple(b.shape)}")
        if b.is_floating_point() and b.numel() and b.isfinite().all():
            scale = b.abs().max().item() or 1.0
            difference = (a - b).abs().max().item() / scale
            if not difference < BEYOND_ROUNDING.get(b.dtype, 1e-2):
                name = type(model).__name__
                raise MfpError(
                    f"compact {name}: an output differs by {difference:.1e} of the largest; please report it"
                )
            worst = max(worst, difference)
    return worst


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


def make_report(
    model: nn.Module, small: fx.GraphModule, net: Network, build: Builder, example_input: Any, difference: float
) -> CompactReport:
    layers = []
    left = dict(small.named_modules())
    for calls in net.calls.values():
        node, module = calls[0], net.module(calls[0])
        if not isinstance(rule_for(net, node), Contraction):
            continue
        new = left.get(node.target)
        new = getattr(new, "conv", new)
        after = (0, 0) if new is None else sizes(new)
        before = sizes(module)
        layers.append(LayerChange(node.target, before[0], after[0], before[1], after[1]))
    return CompactReport(
        layers, flops(model, example_input), flops(small, tuple(example_arguments(model, example_input).values())),
        count_parameters(model), count_parameters(small), difference, reasons(net, build),
    )  # fmt: skip


def sizes(module: nn.Module) -> tuple[int, int]:
    """(filters, inputs)"""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return module.out_channels, module.in_channels


def reasons(net: Network, build: Builder) -> list[str]:
    lines = [f"{node.name}: {reason}" for node, reason in net.opaque.items()]
    for reader, sources in build.expanded.items():
        what = reader.target if isinstance(reader.target, str) else getattr(reader.target, "__name__", reader.target)
        if reader.op == "output":
            why = "the network's outputs keep their width"
        elif rule_for(net, reader).understood:
            why = f"{what} reads across channels"
        else:
            why = f"{what} is not understood"
        lines.append(f"{reader.name}: {why}; {', '.join(sources)} widened for it")
    return lines
