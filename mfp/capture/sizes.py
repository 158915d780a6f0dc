"""Which sizes of the inputs a captured graph holds for: in words, and as rules that a network can check."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, fx

MULTIPLE = 32  # networks halve their images five times
MOST_EQUATIONS = 3  # that anyone reads
# In a size: (h - 1) // 32 + 1 has 4 operations; more is not worth its algebra. Multiples of 32 stay short by
# themselves, but for "same" padding (144 operations in a network of a few layers are a second, 350 in a deep one two
# minutes) and for windows of attention.
MOST_OPERATIONS = {"any": 16, "multiples": 160}


def size_rules(fake: Any) -> list[list]:
    """What must hold for the sizes of an input, as [dimension, "is" | "multiple of" | "equal to dimension", number].

    Empty where batch and image size are free. The number of channels, dimension 1, is not mentioned: a wrong one is
    the first layer's to refuse.
    """
    rules: list[list] = []
    seen: dict[str, int] = {}
    if not isinstance(fake, Tensor) or fake.dim() < 2:
        return rules
    for dim, size in enumerate(fake.shape):
        constant = _constant(size)
        if dim == 1 or (constant == 1 and dim > 0):
            continue
        if constant is not None:
            rules.append([dim, "is", constant])
        elif str(size) in seen:
            rules.append([dim, "equal to dimension", seen[str(size)]])
        else:
            seen[str(size)] = dim
            factor = size.node.expr.as_coeff_Mul()[0]
            if factor != 1:
                rules.append([dim, "multiple of", int(factor)])
    return rules


def in_words(fake: Any) -> list[str]:
    """The rules, and what else torch.export found that the sizes must fulfil, for the report."""
    lines = []
    for dim, kind, number in size_rules(fake):
        what = "batch size" if dim == 0 else f"size of dimension {dim} of the input"
        lines.append(f"{what}: {kind} {number}, as the example and the model's forward have it")
    return lines if lines or not isinstance(fake, Tensor) else _equations(list(fake.shape[2:]))


def _equations(sizes: list[Any]) -> list[str]:
    """What must hold for the sizes that were left free (a linear layer behind flatten: their product is given)."""
    free = [size for size in sizes if not isinstance(size, int)]
    names = dict(zip(map(str, sizes), ("height", "width") if len(sizes) == 2 else "xyz", strict=False))
    found = [guard.expr for size in free[:1] for guard in size.node.shape_env.guards]
    texts = [f"{e.lhs} = {e.rhs}" for e in found if e.is_Equality and {str(s) for s in e.free_symbols} <= names.keys()]
    for symbol, name in names.items():
        texts = [re.sub(rf"\b{symbol}\b", name, text) for text in texts]
    if len(texts) > MOST_EQUATIONS:
        return [f"image sizes: as in the example; the model's forward asks for {len(texts)} equations between them"]
    return [f"image sizes: {text}; the model's forward asks for it" for text in texts]


def _constant(size: Any) -> int | None:
    """A size that has one value, a symbolic one that turned out to (len(x), a comparison) included."""
    return size if isinstance(size, int) else size.node.maybe_as_int()


# Operators whose arguments say nothing of an image's size: a graph of these alone holds for any.
_NAMES = """conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear batch_norm instance_norm
    group_norm prelu max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d
    adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool2d cat flatten mean sum amax dropout softmax hardswish square
    channel_shuffle unsqueeze contiguous"""


def holds_sizes(graph: fx.Graph) -> bool:
    """Whether some argument in the graph may come from the sizes of its inputs."""
    plain = {getattr(torch.ops.aten, name) for name in _NAMES.split()}
    for node in graph.nodes:
        tags = getattr(node.target, "tags", ())
        known = torch.Tag.pointwise in tags or getattr(node.target, "overloadpacket", None) in plain
        if node.op == "call_function" and not known:
            return True
    return False


class TooInvolved(RuntimeError):
    """An image size that no free symbol should be carried for."""


def refuse_involved_sizes(kind: str, module: Any, inputs: tuple) -> None:
    """A hook for all modules: windows of attention make quotients of products of height and width, and minutes of
    algebra; so does "same" padding for images of any size, whose expressions double with every layer."""
    for value in inputs:
        if isinstance(value, Tensor) and any(is_involved(size, kind) for size in value.shape):
            raise TooInvolved


def is_involved(size: Any, kind: str) -> bool:
    if isinstance(size, int):
        return False
    operations = size.node.expr.count_ops()
    return operations > MOST_OPERATIONS["any" if len(size.node.expr.free_symbols) > 1 else kind]
