"""Whether a compact network computes what the model does, judged by what rounding can do."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from mfp.capture import eval_mode
from mfp.compact.writer import Piece
from mfp.errors import MfpError

CLOSE = {torch.float16: 1e-2, torch.bfloat16: 1e-1}  # of the largest output, in the network's own precision
CLOSE_FLOAT32 = 1e-4
CLOSE_FLOAT64 = 1e-6
FINER = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
MARGIN = 1000  # two orders of summation that round by chance


def check(
    small: nn.Module, model: nn.Module, arguments: dict[str, Any], locate: Callable[[], str],
    compacted: Callable[[nn.Module, dict[str, Any]], nn.Module],
) -> float:  # fmt: skip
    """The largest difference of the outputs on the example, relative to the largest output.

    A difference that rounding could make is looked at again in float64, and if need be on the model compacted in
    float64: there the two may differ by what the model's own outputs move between the precisions, times what float64
    is finer than float32 (outputs that are rounding noise themselves move by any multiple of the largest).

    Args:
        locate: says where the two begin to differ; called for an error only.
        compacted: compacts a model, without a check.

    Raises:
        MfpError: a difference beyond all rounding, which is a fault of this package.
    """
    ours, theirs = run(small, arguments), run(model, arguments)
    difference = largest_difference(ours, theirs)
    dtypes = {t.dtype for t in theirs if t.is_floating_point()} or {torch.float32}
    if difference <= max(CLOSE.get(dtype, CLOSE_FLOAT32) for dtype in dtypes):
        return difference
    try:
        difference = difference_in_float64(small, model, arguments, compacted)
    except (RuntimeError, TypeError, NotImplementedError):  # a network that runs in its own precision alone
        pass
    else:
        if difference <= CLOSE_FLOAT64:
            return difference
    raise MfpError(
        f"compact {type(model).__name__}: an output differs by {difference:.1e} of the largest, which rounding does "
        f"not explain; {locate()}. Please report it"
    )


def difference_in_float64(
    small: nn.Module, model: nn.Module, arguments: dict[str, Any], compacted: Callable[..., nn.Module]
) -> float:
    """How far the two are apart without the rounding of float32; 0 where it is what rounding does in float64."""
    arguments = pytree.tree_map_only(Tensor, to_double, arguments)
    exact_model = copy.deepcopy(model).double()
    exact = run(exact_model, arguments)
    difference = largest_difference(run(copy.deepcopy(small).double(), arguments), exact)
    if difference > CLOSE_FLOAT64:  # the constants that were folded are rounded, too
        difference = largest_difference(run(compacted(exact_model, arguments), arguments), exact)
    if difference > CLOSE_FLOAT64:
        lower = pytree.tree_map_only(Tensor, lambda t: t.float() if t.is_floating_point() else t, arguments)
        noise = largest_difference(run(copy.deepcopy(model).float(), lower), exact)
        if difference <= noise * FINER * MARGIN < math.inf:
            return 0.0
    return difference


def run(network: nn.Module, arguments: dict[str, Any]) -> list[Tensor]:
    """The tensors of a network's outputs on copies of the arguments, which it may overwrite."""
    with eval_mode(network), torch.no_grad():
        result = network(**pytree.tree_map_only(Tensor, Tensor.clone, arguments))
    return [leaf for leaf in leaves_of(result) if isinstance(leaf, Tensor)]


def leaves_of(value: Any) -> list[Any]:
    return pytree.tree_leaves(value)


def to_double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def largest_difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Relative to the largest value of each tensor; infinite where ours is not finite and theirs is.

    What is not finite in theirs is not compared.
    """
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape:
            raise AssertionError(f"the compact network gives {tuple(a.shape)}, the model {tuple(b.shape)}")
        finite = b.isfinite()
        if b.is_floating_point() and finite.any():
            scale = b[finite].abs().max().item() or 1.0
            apart = (a.to(b) - b)[finite].abs().max().item() / scale
            worst = max(worst, apart if math.isfinite(apart) else math.inf)
    return worst


class _Values(fx.Interpreter):
    """Runs a graph and keeps the results of some nodes."""

    def __init__(self, module: nn.Module, graph: fx.Graph, tensors: dict[str, Tensor] | None = None) -> None:
        super().__init__(module, graph=graph)
        self.tensors = tensors
        self.values: dict[Any, Any] = {}

    def fetch_attr(self, target: str) -> Any:
        return super().fetch_attr(target) if self.tensors is None else self.tensors[target]

    def run_node(self, node: fx.Node) -> Any:
        self.values[node.name] = result = super().run_node(node)
        return result


def first_difference(
    captured: fx.Graph, tensors: dict[str, Tensor], pieces: dict[fx.Node, Any], channel_dim: Callable[[fx.Node], int],
    small: fx.GraphModule, arguments: dict[str, Any],
) -> str:  # fmt: skip
    """Names the layer where the compact network begins to differ from the captured one."""
    inputs = [arguments[node.target] for node in captured.nodes if node.op == "placeholder"]
    before, after = _Values(nn.Module(), captured, tensors), _Values(small, small.graph)
    with torch.no_grad():
        before.run(*pytree.tree_map_only(Tensor, Tensor.clone, inputs))
        after.run(*pytree.tree_map_only(Tensor, Tensor.clone, inputs))
    for node in captured.nodes:
        piece = pieces.get(node)
        if not isinstance(piece, Piece):  # not written, or several results
            continue
        ours, theirs = after.values.get(piece.node.name), before.values.get(node.name)
        if not isinstance(ours, Tensor) or not isinstance(theirs, Tensor) or not theirs.is_floating_point():
            continue
        if piece.ids is not None:
            dim, valid = channel_dim(node), (piece.ids >= 0).nonzero().flatten()
            ours, theirs = ours.index_select(dim, valid), theirs.index_select(dim, piece.ids[valid])
        if ours.shape != theirs.shape or largest_difference([ours], [theirs]) > 1e-3:
            return f"it begins in {node.meta['module'] or 'the network itself'} ({node.target})"
    return "no single layer differs that much"
