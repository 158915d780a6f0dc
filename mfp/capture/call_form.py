"""From torch.export's calling convention to the model's: named parameters, inputs and outputs in their own form."""

from __future__ import annotations

import dataclasses
import operator
from collections import OrderedDict
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from mfp.errors import MfpError


def unlift(program: Any, model: nn.Module, arguments: dict[str, Any]) -> tuple[fx.Graph, dict[str, Tensor]]:
    """Parameters as get_attr nodes, inputs and outputs in the form that the model's forward has."""
    graph, signature = program.graph, program.graph_signature
    placeholders = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    first = next(iter(placeholders.values()), None)
    names = {id(t): n for n, t in reversed([*model.named_parameters(remove_duplicate=False), *model.named_buffers()])}
    tensors: dict[str, Tensor] = {}
    reads: dict[str, fx.Node] = {}
    leaves: list[Any] = []
    for spec in signature.input_specs:
        node = placeholders[spec.arg.name]
        if spec.kind.name == "USER_INPUT":
            leaves.append(spec.arg.value if hasattr(spec.arg, "value") else node)
            continue
        if spec.kind.name not in ("PARAMETER", "BUFFER", "CONSTANT_TENSOR") or not node.users:
            continue
        value = _tensor_named(model, program, spec.target)
        name = names.get(id(value), spec.target)
        if name not in reads:
            with graph.inserting_before(first):
                reads[name] = graph.create_node("get_attr", name, name=node.name.removeprefix("p_"))
            reads[name].meta["val"] = node.meta["val"]
            tensors[name] = value
        node.replace_all_uses_with(reads[name])
    _write_inputs(graph, first, program, leaves, arguments)
    for node in placeholders.values():
        graph.erase_node(node)
    _write_outputs(graph, program, reads, tensors)
    _tidy(graph)
    return graph, tensors


def _tensor_named(model: nn.Module, program: Any, name: str) -> Tensor:
    try:
        path, _, last = name.rpartition(".")
        value = getattr(model.get_submodule(path), last)
        if isinstance(value, Tensor):
            return value
    except AttributeError:
        pass
    value = program.constants.get(name, program.state_dict.get(name))
    return value.detach()


def _write_inputs(graph: fx.Graph, first: fx.Node | None, program: Any, leaves: list[Any], arguments: dict) -> None:
    """One placeholder per argument of forward; tensors inside nested arguments are picked out of it."""
    with_paths, _ = pytree.tree_flatten_with_path(arguments)
    if len(with_paths) != len(leaves):
        raise AssertionError(f"torch.export saw {len(leaves)} inputs, the example has {len(with_paths)}")
    of_argument: dict[str, list[tuple[tuple, Any]]] = {name: [] for name in arguments}
    for (path, _), leaf in zip(with_paths, leaves, strict=True):
        of_argument[path[0].key].append((path[1:], leaf))
    constants = [name for name, found in of_argument.items() if not any(isinstance(n, fx.Node) for _, n in found)]
    before = first if first is not None else next(iter(graph.nodes))
    only_constants = False
    nodes: dict[str, fx.Node] = {}
    for name in reversed(list(arguments)):  # a default may stand behind the last tensor only
        only_constants = (only_constants or not nodes) and name in constants
        with graph.inserting_before(before):
            default = {"default_value": arguments[name]} if only_constants else {}
            nodes[name] = before = graph.placeholder(f"{name}", **default)
    anchor = first if first is not None else next(n for n in graph.nodes if n.op != "placeholder")
    for name, found in of_argument.items():
        for path, leaf in found:
            if not isinstance(leaf, fx.Node):
                continue
            value = nodes[name]
            with graph.inserting_before(anchor):
                for key in path:
                    value = graph.call_function(
                        operator.getitem, (value, getattr(key, "key", getattr(key, "idx", None)))
                    )
            value.meta["val"], value.meta["is_input"] = leaf.meta["val"], True
            leaf.replace_all_uses_with(value)


def _write_outputs(graph: fx.Graph, program: Any, reads: dict[str, fx.Node], tensors: dict[str, Tensor]) -> None:
    """The results in the model's own form; a buffer that forward writes is written by the graph, too."""
    output = next(node for node in graph.nodes if node.op == "output")
    leaves = []
    for spec, value in zip(program.graph_signature.output_specs, output.args[0], strict=True):
        if spec.kind.name == "USER_OUTPUT":
            leaves.append(value)
        elif spec.kind.name == "BUFFER_MUTATION":
            raise MfpError(
                f"the model's forward writes its buffer '{spec.target}' in eval mode; a compact network keeps no such "
                "state. Switch that off, or compact a part of the model: mfp.compact(model, example, submodule=...)"
            )
    structure = pytree.tree_unflatten(leaves, program.call_spec.out_spec)
    with graph.inserting_before(output):
        output.args = (_written(graph, structure),)


def _written(graph: fx.Graph, value: Any) -> Any:
    """A nested result as torch.fx can write it; dataclasses and ordered dictionaries are built by a call."""
    if isinstance(value, fx.Node) or value is None or isinstance(value, int | float | bool | str):
        return value
    if isinstance(value, OrderedDict) and type(value) is OrderedDict:
        return graph.call_function(OrderedDict, ([(key, _written(graph, part)) for key, part in value.items()],))
    if dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        kwargs = {key: _written(graph, part) for key, part in fields.items() if part is not None}
        return graph.call_function(type(value), (), kwargs)
    if isinstance(value, dict):
        return {key: _written(graph, part) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return graph.call_function(type(value), tuple(_written(graph, part) for part in value))
    if isinstance(value, tuple | list):
        return type(value)(_written(graph, part) for part in value)
    raise MfpError(f"the model returns a {type(value).__name__}, which a compact network cannot build")


def _tidy(graph: fx.Graph) -> None:
    """No checks and constraints of torch.export, no dead code; each node says which module it came from."""
    for node in reversed(list(graph.nodes)):
        if node.op not in ("placeholder", "output") and not node.users:
            graph.erase_node(node)
    for node in graph.nodes:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        node.meta["module"] = stack[-1][0].partition("@")[0] if stack and stack[-1][0].isprintable() else ""
        if node.meta["module"].startswith("_empty_nn"):
            node.meta["module"] = ""
