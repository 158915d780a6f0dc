"""A model and an example in, a functional graph of ATen operators out: the only module that names torch.export.

What comes out is plain torch.fx: inputs are placeholders with the names of forward's arguments, parameters and buffers
are get_attr nodes with their dotted names, everything else is a call of an ATen operator without side effects (or of
Python's arithmetic on sizes). Each node has its fake result in ``meta["val"]`` and its module in ``meta["module"]``.
"""

from __future__ import annotations

import inspect
import io
import itertools
import logging
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils import _pytree as pytree

from mfp.capture.call_form import unlift
from mfp.capture.fast_shapes import fast_shapes, without_layouts
from mfp.capture.functional import DROPOUTS, aliased_arguments, decompose, inline_blocks, make_functional
from mfp.capture.sizes import MULTIPLE, TooInvolved, holds_sizes, in_words, refuse_involved_sizes, size_rules
from mfp.errors import CaptureError, MfpError

__all__ = [
    "DROPOUTS", "Captured", "aliased_arguments", "capture", "drops_whole_samples", "eval_mode", "example_arguments",
    "exported_program", "plain_tensors", "program_bytes",
]  # fmt: skip
HERE = str(Path(__file__).parent)


@dataclass
class Captured:
    """A model's eval-mode computation.

    Attributes:
        graph: functional; see the module's docstring.
        tensors: what the get_attr nodes read, the model's own parameters and buffers among them, not copied.
        modules: the model's modules by name.
        fixed: what about the inputs' sizes holds for the example alone, in words.
    """

    graph: fx.Graph
    tensors: dict[str, Tensor]
    modules: dict[str, nn.Module]
    fixed: list[str] = field(default_factory=list)


def capture(
    model: nn.Module, arguments: dict[str, Any], free_sizes: bool = True, for_training: bool = False
) -> Captured:
    """The computation of ``model.eval()`` as a graph; the model is left as it is.

    Args:
        arguments: forward's arguments by name, as :func:`example_arguments` gives them; tensors inside may be nested.
            The batch size of the example is no constant of the graph, nor is its image size, where the model allows.
        free_sizes: False leaves all sizes as in the example, for a graph that is only looked at: half the time.
        for_training: stochastic depth is an operator of the graph too (a dropout that names its module), though it does
            nothing in eval mode.

    Raises:
        CaptureError: torch.export cannot follow the model (a decision on tensor values): names the line.
        MfpError: the model's outputs cannot be built, it writes its buffers, or was made in inference mode.
    """
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_inference():
            raise MfpError(
                f"{name} was made inside torch.inference_mode(), and only there can it be changed: make the model "
                "outside of it, and load the state into it"
            )
    marked = _marked_drops(model) if for_training else nullcontext()
    with plain_tensors(), eval_mode(model), torch.no_grad(), _quiet(), without_layouts(), marked:
        program, fixed = _export(model, arguments, free_sizes)
        inline_blocks(program)
        functional = make_functional(program.graph, set(program.graph_signature.inputs_to_buffers))
        if not functional:  # a view of an overwritten tensor is read later: torch sorts that out, at thrice the time
            program = decompose(program)
        graph, tensors = unlift(program, model, arguments)
        if not holds_sizes(graph):
            fixed = []
            for node in graph.nodes:
                node.meta.pop("is_input", None)
    return Captured(graph, tensors, dict(model.named_modules()), fixed)


def exported_program(model: nn.Module, arguments: dict[str, Any]) -> tuple[torch.export.ExportedProgram, bool]:
    """torch.export's own program of ``model.eval()`` for other tools, and whether its batch size is free.

    Raises CaptureError as :func:`capture` does.
    """
    batch = _batch_size(arguments)
    example = pytree.tree_map_only(Tensor, lambda t: _two_of(t, batch), arguments)
    with plain_tensors(), eval_mode(model), torch.no_grad(), _quiet():
        try:
            program = _try_export(model, example, max(batch, 2), "batch")
            inputs = [node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
            rules = [rule for node in inputs for rule in size_rules(node.meta["val"])]
            if batch and not any(dim == 0 and kind == "is" for dim, kind, _ in rules):
                return program, True
            return _try_export(model, arguments, batch, "none"), False
        except Exception as error:  # whatever user code raises
            raise CaptureError(_refusal(model, arguments, error)) from error


def program_bytes(program: torch.export.ExportedProgram) -> bytes:
    """The file that torch.export.load reads."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def example_arguments(model: nn.Module, example_input: Any) -> dict[str, Any]:
    """The example (a tensor, a tuple of positional arguments or a dict of named ones) as {argument name: value}.

    Raises MfpError when the example does not fit the model's forward.
    """
    parameters = list(inspect.signature(model.forward).parameters.values())
    names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    name = type(model).__name__
    if isinstance(example_input, dict):
        unknown = [key for key in example_input if key not in names]
        if unknown:
            raise MfpError(f"{name}.forward has no argument {unknown}; it has {names}")
        found = {key: example_input[key] for key in names if key in example_input}
    else:
        values = example_input if isinstance(example_input, tuple | list) else (example_input,)
        if len(values) > len(names):
            raise MfpError(f"{name}.forward takes {len(names)} arguments {names}, the example gives {len(values)}")
        found = dict(zip(names, values, strict=False))
    missing = [p.name for p in parameters if p.name in names and p.default is p.empty and p.name not in found]
    if missing:
        raise MfpError(f"{name}.forward needs the argument '{missing[0]}', which the example input does not give")
    return found


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switches all modules to eval inside the block and gives each its own mode back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def drops_whole_samples(module: nn.Module | None) -> bool:
    """Whether a module is stochastic depth, by the name that torchvision's, timm's and transformers' have."""
    return type(module).__name__.endswith(("StochasticDepth", "DropPath"))


@contextmanager
def _marked_drops(model: nn.Module) -> Iterator[None]:
    """Inside the block stochastic depth in eval mode calls a dropout that does nothing, which the graph then holds."""

    def mark(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        return torch.dropout(output, 0.5, False)

    handles = [module.register_forward_hook(mark) for module in model.modules() if drops_whole_samples(module)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.export reports what it tried and gave up; what matters of it ends up in Captured.fixed or in an error."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def plain_tensors() -> Iterator[None]:
    """No inference mode inside the block: what it makes can be trained on."""
    with torch.inference_mode(False):
        yield


def _export(model: nn.Module, arguments: dict[str, Any], free: bool) -> tuple[torch.export.ExportedProgram, list[str]]:
    """The exported program, with as many sizes free as the model allows, and the sizes that are not."""
    batch = _batch_size(arguments)
    example = pytree.tree_map_only(Tensor, lambda t: _two_of(t, batch), arguments) if batch else arguments
    attempts = [(example, kind) for kind in ("any", "multiples", "batch")] if batch and free else []
    failures: list[Exception] = []
    for values, kind in [*attempts, (arguments, "none")]:
        try:
            program = _try_export(model, values, max(batch, 2), kind)
        except Exception as failure:  # whatever user code raises when it meets a symbolic size
            failures.append(failure)
            continue
        inputs = [node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
        rules = [rule for node in inputs for rule in size_rules(node.meta["val"])]
        if kind == "none" or not any(dim == 0 and number != 1 for dim, _, number in rules):
            fixed = [] if not free else [line for node in inputs for line in in_words(node.meta["val"])]
            return program, list(dict.fromkeys(fixed))
    error = next((failure for failure in failures if not isinstance(failure, TooInvolved)), failures[-1])
    raise CaptureError(_refusal(model, arguments, error)) from error


def _batch_size(arguments: dict[str, Any]) -> int:
    """The first size of the first tensor with more than one dimension; 0 without such a tensor."""
    tensors = [t for t in pytree.tree_leaves(arguments) if isinstance(t, Tensor) and t.dim() > 1]
    return len(tensors[0]) if tensors else 0


def _two_of(tensor: Tensor, batch: int) -> Tensor:
    """A batch of one would make the batch size a constant."""
    if batch != 1 or tensor.dim() == 0 or len(tensor) != 1:
        return tensor
    return torch.cat([tensor, tensor])


def _try_export(model: nn.Module, values: dict[str, Any], batch: int, kind: str) -> Any:
    """``kind`` says what is free beside the batch size: images of "any" size, of "multiples" of 32 (smaller ones and
    others in between do not fit then), no size ("batch"); or nothing at all ("none")."""
    numbers = itertools.count()

    def free(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        dims = {0: torch.export.Dim.AUTO} if value.dim() and len(value) == batch else {}
        for dim in range(2, value.dim()) if kind in ("any", "multiples") else ():
            if kind == "any" and value.shape[dim] > 1:
                dims[dim] = torch.export.Dim.AUTO
            elif kind == "multiples" and value.shape[dim] > MULTIPLE and value.shape[dim] % MULTIPLE == 0:
                dims[dim] = MULTIPLE * torch.export.Dim(f"size{next(numbers)}", min=1)
        return dims

    positional, named = _call_form(model, values)
    shapes = None if kind == "none" else pytree.tree_map(free, values)
    involved = kind in ("any", "multiples")
    hook = register_module_forward_pre_hook(partial(refuse_involved_sizes, kind)) if involved else None
    try:
        with fast_shapes():
            return torch.export.export(model, positional, named, dynamic_shapes=shapes, strict=False)
    finally:
        if hook is not None:
            hook.remove()


def _call_form(model: nn.Module, values: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Positional arguments as far as they go without a gap, the others by name."""
    positional: list[Any] = []
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.name not in values or parameter.kind is parameter.KEYWORD_ONLY:
            break
        positional.append(values[parameter.name])
    return tuple(positional), dict(list(values.items())[len(positional) :])


def _refusal(model: nn.Module, arguments: dict[str, Any], error: Exception) -> str:
    """Says which line of the user's code torch.export could not follow, or that the model does not run."""
    name = type(model).__name__
    try:
        positional, named = _call_form(model, pytree.tree_map_only(Tensor, Tensor.clone, arguments))
        model(*positional, **named)
    except Exception as failure:
        shapes = {key: tuple(v.shape) for key, v in arguments.items() if isinstance(v, Tensor)}
        return f"the model does not run on the example input {shapes}: {str(failure).splitlines()[0]}"
    home = str(Path(torch.__file__).parent)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((home, HERE))]
    frames = frames or _frames_in_text(str(error))
    where = f"{frames[-1].filename}:{frames[-1].lineno} (`{frames[-1].line}`)" if frames else "an unknown line"
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return (
        f"cannot capture {name}: {where}: {reason} torch.export follows no decision on tensor values. Rewrite that "
        'line, or compact the part of the model that has the convolutions: mfp.compact(model, example, submodule="...")'
    )


def _frames_in_text(text: str) -> list[traceback.FrameSummary]:
    """Frames of a traceback that torch.export quotes in its message."""
    home, found = str(Path(torch.__file__).parent), []
    lines = text.splitlines()
    for line, code in zip(lines, [*lines[1:], ""], strict=True):
        parts = line.strip().split('"')
        if line.strip().startswith('File "') and not parts[1].startswith((home, HERE)):
            number = "".join(c for c in parts[2].split(",")[1] if c.isdigit())
            found.append(traceback.FrameSummary(parts[1], int(number or 0), "", line=code.strip()))
    return found
