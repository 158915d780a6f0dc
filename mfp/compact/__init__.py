"""Hard pruning: dead-channel elimination on the operator graph, exact by construction.

capture.py has the graph, analysis.py finds what is dead, writer.py and the rules write what is left, check.py compares.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import fx, nn

from mfp.capture import Captured, capture, example_arguments, plain_tensors
from mfp.compact.analysis import analyse
from mfp.compact.channels import Network
from mfp.compact.check import check, first_difference
from mfp.compact.count import count_parameters, flops
from mfp.compact.optimizer import compact_optimizer
from mfp.compact.part import recorded_call
from mfp.compact.report import CompactReport, make_report
from mfp.compact.write import finish, modes_of, origins, restore_modes, write
from mfp.compact.writer import Writer
from mfp.plan import unwrap
from mfp.serving import SERVING_BYTES, prepare_for_serving

__all__ = ["CompactReport", "compact", "compact_optimizer", "count_parameters", "flops"]


def compact(model: nn.Module, example_input: Any, fold_bn: bool = False, *, submodule: str | None = None) -> nn.Module:
    """Removes every channel that is constant or that nobody reads; the result computes what ``model.eval()`` does.

    >>> small = mfp.compact(masked_resnet50, torch.zeros(1, 3, 224, 224))
    >>> small.conv1.weight.shape, small.report.flops_saved
    (torch.Size([45, 3, 7, 7]), 0.42)

    The model is left as it is. The result is an ordinary module (a torch.fx.GraphModule) whose convs, linear layers,
    norms and dropouts have their old names; it can be trained on. ``small.report`` says what was removed.

    Args:
        model: a network some of whose filters are zero (a masked one).
        example_input: a tensor, a tuple of positional arguments or a dict of named ones (tensors may be nested in
            them), on the model's device. It fixes shapes, not sizes: the result takes any batch size, and any image
            size that the model takes; where the model's forward makes one a constant, the report says so.
        fold_bn: the serving form: BatchNorm folded into the convs before it, channels_last weights, fused joins,
            numbers of filters filled up with zeroed ones to a multiple of 16 bytes (odd numbers take longer).
        submodule: dotted name of the part to compact, where the whole cannot be captured: the model runs on the
            example, the part is compacted for what it is given there, and a copy of the model with the smaller part in
            its place is the result.

    Raises:
        MfpError: the model cannot be captured or run on the example, or returns something that cannot be built.
    """
    model = unwrap(model)
    with plain_tensors():
        if submodule is not None:
            return _with_compact_part(model, example_input, fold_bn, submodule)
        return _compact(model, example_arguments(model, example_input), fold_bn)


def _with_compact_part(model: nn.Module, example_input: Any, fold_bn: bool, name: str) -> nn.Module:
    part, arguments = recorded_call(model, example_arguments(model, example_input), name)
    small = _compact(part, arguments, fold_bn)
    whole = copy.deepcopy(model, {id(part): small})
    whole.report = small.report
    return whole


def compact_captured(
    model: nn.Module, arguments: dict[str, Any], captured: Captured, fold_bn: bool = False
) -> fx.GraphModule:
    """:func:`compact` for those that compact one model many times, with other values in the same parameters."""
    with plain_tensors():
        return _compact(model, arguments, fold_bn, captured)


def _compact(
    model: nn.Module, arguments: dict[str, Any], fold_bn: bool, captured: Captured | None = None
) -> fx.GraphModule:
    modes, multiple = modes_of(model), serving_multiple(model) if fold_bn else 1

    def served(like: nn.Module, arguments: dict[str, Any]) -> fx.GraphModule:
        return prepare_for_serving(_written(like, arguments, multiple)[-1], arguments)

    captured = captured or capture(model, arguments)
    net, out, plain = _written(model, arguments, multiple, captured)
    difference = check(
        plain, model, arguments, lambda: locate(net, out, plain, arguments),
        lambda like, arguments: _written(like, arguments, multiple)[-1],
    )  # fmt: skip
    small = plain
    if fold_bn:
        small = prepare_for_serving(plain, arguments)
        restore_modes(small, modes)
        difference = max(difference, check(small, model, arguments, lambda: "it begins in the serving form", served))
    else:  # folded parameters mix several
        small.origins = origins(small, out)
    small.report = make_report(model, small, net, out, captured.fixed, arguments, difference)
    if small.report.nothing_removed and not fold_bn:  # the serving form of a whole network is a use of its own
        warnings.warn(f"mfp.compact removed nothing: {small.report.nothing_removed}", stacklevel=3)
    return small


def _written(
    model: nn.Module, arguments: dict[str, Any], multiple: int, captured: Captured | None = None
) -> tuple[Network, Writer, fx.GraphModule]:
    with torch.no_grad():
        net = analyse(captured or capture(model, arguments))
        out = write(net, multiple)
    return net, out, finish(out, type(model).__name__, modes_of(model))


def plain_compact(model: nn.Module, arguments: dict[str, Any]) -> fx.GraphModule:
    """The compact network alone, for those that go on with it: no report, no comparison, no warning."""
    return _written(model, arguments, 1)[-1]


def serving_multiple(model: nn.Module) -> int:
    """What numbers of filters are filled up to in the serving form."""
    sizes = [parameter.element_size() for parameter in model.parameters()]
    return SERVING_BYTES // min([4, *sizes])


def locate(net: Network, out: Writer, small: fx.GraphModule, arguments: dict[str, Any]) -> str:
    return first_difference(net.graph, net.tensors, out.pieces, lambda node: net.channels[node].dim, small, arguments)
