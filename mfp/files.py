"""Saving and loading compact networks: safetensors with a description of the graph. No pickle, no code in the file.

graph_json.py has the description and the lists of what it may name; this module is about the file around it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, fx, nn

from mfp.atomic import write_atomically
from mfp.compact.report import CompactReport, LayerChange
from mfp.errors import MfpError
from mfp.graph_json import CONSTANTS, ModelFileError, describe_modules, describe_nodes, make_graph, make_module, path
from mfp.layouts import memory_format_of
from mfp.serving import ServingNetwork
from mfp.serving.modules import SERVING_MODULES, ServingConv2d, ServingPointwiseDepthwise2d

VERSION = 2
KINDS = ("parameter", "frozen", "buffer")


def save(small: fx.GraphModule, file: str | os.PathLike[str]) -> None:
    """Writes a compact network to one file that ``mfp.load`` reads without the original model's code.

    >>> mfp.save(small, "small.mfp")

    Outputs that the model returns as a dataclass (transformers' ModelOutput) are a dict with the same keys in the
    loaded network, named tuples are tuples, as their classes are code of the original model.

    The file is written under another name, flushed to the disk and then renamed: a crash leaves the old file or the new
    one, never a part. Raises MfpError for what cannot be described (the layer is named) or written.
    """
    if not isinstance(small, fx.GraphModule):
        raise MfpError(f"mfp.save writes the result of mfp.compact, not a {type(small).__name__}")
    tensors, table = _tensors_of(small)
    description = {
        "version": VERSION,
        "name": type(small).__name__,
        "training": small.training,
        "nodes": describe_nodes(small.graph),
        "modules": describe_modules(small),
        "tensors": table,
    }
    report = getattr(small, "report", None)
    if report is not None:
        description["report"] = dataclasses.asdict(report)
    text = json.dumps(description, allow_nan=False)
    metadata = {"format": "mfp", "graph": text, "digest": _digest(text, tensors)}
    write_atomically(Path(file), to_bytes(tensors, metadata))


def load(file: str | os.PathLike[str]) -> fx.GraphModule:
    """Reads a compact network written by ``mfp.save``; runs no code from the file.

    >>> small = mfp.load("small.mfp")

    Its tensors are in the CPU's memory, and so is what its graph makes anew: move it with ``to``.

    Raises ModelFileError (an MfpError) for a file that is missing, cut short, altered, of another version, or that asks
    for anything that is not on the lists of graph_json.py.
    """
    file = Path(file)
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            names = list(opened.keys())
            tensors = {name: opened.get_tensor(name).clone() for name in names}  # aligned memory, not the file
    except (SafetensorError, OSError) as error:
        raise ModelFileError(f"{file}: cannot be read as a model file ({error})") from error
    if metadata.get("format") != "mfp" or "graph" not in metadata:
        raise ModelFileError(f"{file}: a safetensors file, but not one of mfp.save")
    if metadata.get("digest") != _digest(metadata["graph"], tensors):
        raise ModelFileError(f"{file}: the contents do not match their checksum; the file was altered or damaged")
    try:
        description = json.loads(metadata["graph"])
        _check_version(description["version"])
        return _build(description, tensors)
    except ModelFileError as error:
        raise ModelFileError(f"{file}: {error}") from error
    except Exception as error:  # a description that fits the checksum but makes no sense
        what = f"{type(error).__name__}: {error}"
        raise ModelFileError(f"{file}: the graph's description is not valid ({what})") from error


def _check_version(version: Any) -> None:
    if version == 1:
        raise ModelFileError("written by mfp 0.1; make it again from the checkpoint with `mfp compact`")
    if version != VERSION:
        raise ModelFileError(f"format version {version}, this mfp reads version {VERSION}; use a newer mfp")


def _tensors_of(small: fx.GraphModule) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """What the file stores, and for all parameters and buffers in their order {name: [kind, stored as, memory format]}.

    One tensor that appears under several names is stored once. The order of a weight's memory decides which kernel
    runs, and with that the last bits of a result.
    """
    tensors: dict[str, Tensor] = {}
    table: dict[str, list[str]] = {}
    first: dict[int, str] = {}
    for name, tensor in [*small.named_parameters(remove_duplicate=False), *small.named_buffers(remove_duplicate=False)]:
        kind = "buffer" if not isinstance(tensor, nn.Parameter) else "parameter" if tensor.requires_grad else "frozen"
        order = str(memory_format_of(tensor)).removeprefix("torch.")
        table[name] = [kind, first.setdefault(id(tensor), name), order]
        if table[name][1] == name:
            tensors[name] = tensor.detach().cpu().contiguous().clone()
    return tensors, table


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _build(description: dict[str, Any], stored: dict[str, Tensor]) -> fx.GraphModule:
    name, table = description["name"], description["tensors"]
    if not isinstance(name, str) or not name.isidentifier():
        raise ModelFileError(f"'{name}' is no class name")
    kinds = {kind.__name__ for kind in SERVING_MODULES}
    serving = any(described["class"] in kinds for described in description["modules"].values())
    small = (ServingNetwork if serving else fx.GraphModule)(nn.Module(), fx.Graph(), name)
    tensors = _in_order(table, stored)
    for name, described in description["modules"].items():
        _put(small, path(name), make_module(name, described, tensors))
    for name, layer in small.named_modules():
        parts = [type(part) for part in layer.children()]
        if isinstance(layer, ServingPointwiseDepthwise2d) and parts != [ServingConv2d, ServingConv2d]:
            raise ModelFileError(f"layer '{name}' is not made of two convolutions")
    _fill(small, table, tensors, description["nodes"])
    unknown = sorted(stored.keys() - {source for _, source, _ in table.values()})
    if unknown:
        raise ModelFileError(f"the tensors {unknown[:5]} belong to no layer")
    graph = make_graph(description["nodes"], set(description["modules"]), set(tensors))
    graph.owning_module = small
    graph.lint()
    small.graph = graph
    small.training = bool(description["training"])
    if "report" in description:
        values = dict(description["report"])
        values["layers"] = [LayerChange(**layer) for layer in values["layers"]]
        small.report = CompactReport(**values)
        for shape, dtype in small.report.inputs.values():
            sizes = all(type(size) is int and 0 <= size < 2**24 for size in shape)
            if not sizes or not isinstance(CONSTANTS.get(dtype), torch.dtype):
                raise ModelFileError(f"the inputs {small.report.inputs} make no sense")
    return small


def _in_order(table: dict[str, list[str]], stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The stored tensors under all their names, in their order of memory."""
    first: dict[str, Tensor] = {}
    for _, source, order in table.values():
        if source not in first:
            first[source] = stored[source].contiguous(memory_format=CONSTANTS[order])
    return {path(name): first[source] for name, (_, source, _) in table.items()}


def _put(small: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    parts = small.get_submodule(parent)
    parts._modules.pop(last, None)  # a border map's conv, of which the constructor made a stand-in
    parts.add_module(last, module)


def _fill(small: nn.Module, table: dict[str, list[str]], tensors: dict[str, Tensor], nodes: list[dict]) -> None:
    """Puts the file's tensors in; each must be expected by its layer or read by the graph, fit, and none be missing."""
    read = {node["target"] for node in nodes if node["op"] == "get_attr"}
    made: dict[int, nn.Parameter] = {}
    for name, (kind, _, _) in table.items():
        parent, _, last = name.rpartition(".")
        layer, tensor = small.get_submodule(parent), tensors[name]
        expected = layer._parameters.get(last, layer._buffers.get(last))
        if (expected is None and name not in read) or kind not in KINDS:
            raise ModelFileError(f"tensor '{name}' ({kind}) belongs to no layer")
        if expected is not None and expected.shape != tensor.shape:
            raise ModelFileError(f"tensor '{name}' is {list(tensor.shape)}, its layer needs {list(expected.shape)}")
        if kind == "buffer":
            layer._parameters.pop(last, None)
            layer.register_buffer(last, tensor)
        else:
            layer._buffers.pop(last, None)
            layer.register_parameter(last, made.setdefault(id(tensor), nn.Parameter(tensor, kind == "parameter")))
    missing = [name for name, t in [*small.named_parameters(), *small.named_buffers()] if t.is_meta]
    if missing:
        raise ModelFileError(f"the tensors {missing[:5]} are missing")
