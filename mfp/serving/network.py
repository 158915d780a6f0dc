"""The serving form as a module: its graph, read node by node at first, then replayed in one call.

The first call with some sizes of the inputs runs the graph, the second one also writes every operator that is called
on a tape (csrc/tape.cpp), and later ones replay the tape, with nothing at all between most layers. What must not be
replayed, or gains nothing by it, runs as the graph: gradients, compilation and export, other devices, hooks, layers of
other people, operators whose result decides about what comes next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from mfp import backend as backends

DATA_DECIDES = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
SIZES = (torch.ops.aten.sym_size.int, torch.ops.aten.sym_numel.default, torch.ops.aten.sym_stride.int)


class ServingNetwork(fx.GraphModule):
    """A graph whose calls without gradients on a CPU are replayed; ``forward`` is the readable form."""

    def __call__(self, *args, **kwargs):
        if torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)
        if kwargs:
            args, kwargs = in_order(self, args, kwargs)
        tapes = _tapes.get(self)
        if tapes is None:
            tapes = _tapes[self] = Tapes()
        found = tapes.replays.find(self, args) if tapes.replays and not kwargs else None
        if found is None:
            return super().__call__(*args, **kwargs)
        if found is not True:
            return found.replay(args)
        state = tapes.replays.state()
        result, recording = record(self, args, tapes.memory)
        tapes.replays.keep(self, args, recording, state)
        return result


def in_order(network: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a call by place, where they are those that ``forward`` has, each once; else as they are."""
    code = network.forward.__code__
    names = code.co_varnames[1 + len(args) : code.co_argcount]
    return ((*args, *(kwargs[name] for name in names)), {}) if kwargs.keys() == set(names) else (args, kwargs)


@dataclass(frozen=True)
class Recording:
    """A tape, the names of its steps' nodes, and what the network returns."""

    tape: Any
    steps: tuple[str, ...]
    leaves: tuple[Any, ...]
    spec: TreeSpec
    kept: tuple[Any, ...]  # the parameters' memory, not to be given to others

    def replay(self, args: Sequence[Tensor]) -> Any:
        made = self.tape.run(args)
        if made and self.spec.is_leaf():
            return made[0]
        results = iter(made)
        return tree_unflatten([next(results) if isinstance(x, Tensor) else x for x in self.leaves], self.spec)


class Tapes:
    """The recordings of one network, and the memory that they share; neither without the compiled part."""

    def __init__(self) -> None:
        self.memory = self.replays = None
        if backends.backends()["cpu"].unusable is None:
            from mfp import _C  # type: ignore[attr-defined]  # the compiled part

            self.memory, self.replays = _C.Memory(), _C.Replays()


_tapes: WeakKeyDictionary[nn.Module, Tapes] = WeakKeyDictionary()


def record(network: ServingNetwork, args: Sequence[Tensor], memory: Any) -> tuple[Any, Recording | None]:
    """What the network returns, and how to get it again from other inputs of these sizes; None where that cannot be."""
    from mfp import _C  # type: ignore[attr-defined]  # the compiled part
    from mfp.graph_json import MODULES  # the layers that are known to compute the same thing at each call

    recorder = Recorder(_C.Tape(memory, list(args)))
    recorder.possible = all(MODULES.get(type(part).__name__) is type(part) for part in list(network.modules())[1:])
    with recorder:
        result = NamedRun(network, recorder).run(*args)
    leaves, spec = tree_flatten(result)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not recorder.possible or any(isinstance(leaf, torch.SymInt) for leaf in leaves):
        return result, None
    recorder.tape.finish(tensors)
    shapes = tuple(leaf.new_empty(0) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
    kept = tuple(tensor.detach() for tensor in [*network.parameters(), *network.buffers()])
    return result, Recording(recorder.tape, tuple(recorder.steps), shapes, spec, kept)


class NamedRun(fx.Interpreter):
    """Runs the graph and tells the recorder which node is at work."""

    def __init__(self, network: fx.GraphModule, recorder: Recorder) -> None:
        super().__init__(network)
        self.recorder = recorder

    def run_node(self, node: fx.Node) -> Any:
        self.recorder.node = node.name
        return super().run_node(node)


class Recorder(TorchDispatchMode):
    """Writes each operator that is called on a tape."""

    def __init__(self, tape: Any) -> None:
        super().__init__()
        self.tape, self.node, self.possible = tape, "", True
        self.steps: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in SIZES:  # the same each time: a tape is for some sizes
            return result
        parts = [part for part in tree_leaves(result) if part is not None]
        if any(tag in func.tags for tag in DATA_DECIDES) or not all(isinstance(part, Tensor) for part in parts):
            self.possible = False
        if self.possible:
            self.tape.add(func._schema.name, func._schema.overload_name, args, kwargs or {}, parts)
            self.steps.append(self.node)
        return result
