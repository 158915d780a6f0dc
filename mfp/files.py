"""Saving and loading compact networks: safetensors with a description of the graph. No pickle, no code in the file.

A file names operations and module classes; only names on the lists below mean anything, and everything that ends up in
generated Python source (node names, paths) is checked first.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import math
import operator
import os
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, fx, nn

from mfp.atomic import write_atomically
from mfp.compact import modules as own
from mfp.compact.report import CompactReport, LayerChange
from mfp.errors import MfpError

VERSION = 1

_LISTS = {
    "torch": (torch, """abs add amax amin bmm cat chunk clamp concat cos cumsum div exp flatten float16 floor_divide
        index_select log log_softmax matmul mean mul narrow neg permute pow relu reshape rsqrt sigmoid sin softmax split
        sqrt square squeeze stack sub sum tanh transpose unsqueeze"""),
    "functional": (F, """adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
        adaptive_max_pool2d adaptive_max_pool3d avg_pool1d avg_pool2d avg_pool3d celu elu gelu hardsigmoid hardswish
        hardtanh interpolate layer_norm leaky_relu linear log_softmax logsigmoid max_pool1d max_pool2d max_pool3d mish
        normalize pad pixel_shuffle pixel_unshuffle prelu relu relu6 scaled_dot_product_attention selu sigmoid silu
        softmax softplus softsign tanh"""),
    "operator": (operator, "add eq floordiv getitem matmul mod mul neg pow sub truediv"),
    "mfp": (own, "channel_permute"),
}  # fmt: skip
FUNCTIONS = {
    f"{prefix}.{name}": getattr(source, name)
    for prefix, (source, names) in _LISTS.items() for name in names.split() if callable(getattr(source, name))
}  # fmt: skip
FUNCTIONS["getattr"] = getattr
READABLE_ATTRIBUTES = {"shape", "dtype", "device", "ndim"}
METHODS = set("""abs add amax amin chunk clamp clone contiguous detach div dim exp expand expand_as flatten float
    index_select matmul mean mul narrow neg permute pow relu repeat reshape sigmoid size softmax split sqrt square
    squeeze sub sum t tanh transpose type_as unflatten unsqueeze view view_as""".split())  # fmt: skip
MODULES: dict[str, type[nn.Module]] = {
    name: getattr(nn, name)
    for name in """Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d Linear BatchNorm1d BatchNorm2d
        BatchNorm3d InstanceNorm1d InstanceNorm2d InstanceNorm3d GroupNorm LayerNorm LocalResponseNorm ReLU ReLU6
        LeakyReLU PReLU ELU CELU SELU GELU SiLU Mish Hardswish Hardsigmoid Hardtanh Hardshrink Softshrink Sigmoid
        LogSigmoid Tanh Tanhshrink Softplus Softsign Softmax LogSoftmax Softmax2d GLU Identity Dropout Dropout1d
        Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout MaxPool1d MaxPool2d MaxPool3d AvgPool1d AvgPool2d AvgPool3d
        LPPool1d LPPool2d AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d AdaptiveAvgPool1d AdaptiveAvgPool2d
        AdaptiveAvgPool3d ZeroPad1d ZeroPad2d ZeroPad3d ConstantPad1d ConstantPad2d ConstantPad3d ReflectionPad1d
        ReflectionPad2d ReflectionPad3d ReplicationPad1d ReplicationPad2d ReplicationPad3d CircularPad1d CircularPad2d
        CircularPad3d Upsample UpsamplingNearest2d UpsamplingBilinear2d PixelShuffle PixelUnshuffle ChannelShuffle
        Flatten Unflatten""".split()
}  # fmt: skip
OWN_MODULES = {cls.__name__: cls for cls in (
    own.AddConstants, own.ConvWithBorder, own.ExpandChannels, own.FusedJoin, own.ResidualJoin, own.SelectChannels,
    own.ServingConv2d, own.ServingJoin2d,
)}  # fmt: skip
DTYPES = {str(d).removeprefix("torch."): d for d in (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool,
)}  # fmt: skip
_NAMES_OF_FUNCTIONS = {function: name for name, function in reversed(FUNCTIONS.items())}
_PATH = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\Z")


class ModelFileError(MfpError):
    """A file that is no compact network of this package, or not a whole one."""


def save(small: fx.GraphModule, path: str | os.PathLike[str]) -> None:
    """Writes a compact network to one file that ``mfp.load`` reads without the original model's code.

    >>> mfp.save(small, "small.mfp")

    The file is written under another name, flushed to the disk and then renamed: a crash leaves the old file or the new
    one, never a part. Raises MfpError for what cannot be described (the layer is named) or written.
    """
    if not isinstance(small, fx.GraphModule):
        raise MfpError(f"mfp.save writes the result of mfp.compact, not a {type(small).__name__}")
    tensors, aliases = _tensors_of(small)
    description = {
        "version": VERSION,
        "name": type(small).__name__,
        "training": small.training,
        "nodes": [_describe_node(node) for node in small.graph.nodes],
        "modules": _describe_modules(small),
        "aliases": aliases,
        "frozen": [name for name, parameter in small.named_parameters() if not parameter.requires_grad],
        "buffers": [name for name, _ in small.named_buffers()],
    }
    report = getattr(small, "report", None)
    if report is not None:
        description["report"] = dataclasses.asdict(report)
    text = json.dumps(description, allow_nan=False)
    metadata = {"format": "mfp", "graph": text, "digest": _digest(text, tensors)}
    write_atomically(Path(path), to_bytes(tensors, metadata))


def load(path: str | os.PathLike[str]) -> fx.GraphModule:
    """Reads a compact network written by ``mfp.save``; runs no code from the file.

    >>> small = mfp.load("small.mfp")

    Raises ModelFileError (an MfpError) for a file that is missing, cut short, altered, of a newer version, or that asks
    for anything that is not on this module's lists.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
            tensors = {name: file.get_tensor(name).clone() for name in names}  # aligned memory, not the file
    except (SafetensorError, OSError) as error:
        raise ModelFileError(f"{path}: cannot be read as a model file ({error})") from error
    if metadata.get("format") != "mfp" or "graph" not in metadata:
        raise ModelFileError(f"{path}: a safetensors file, but not one of mfp.save")
    if metadata.get("digest") != _digest(metadata["graph"], tensors):
        raise ModelFileError(f"{path}: the contents do not match their checksum; the file was altered or damaged")
    try:
        description = json.loads(metadata["graph"])
        version = description["version"]
        if version != VERSION:
            raise ModelFileError(f"format version {version}, this mfp reads version {VERSION}; use a newer mfp")
        return _build(description, tensors)
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from error
    except Exception as error:  # a description that fits the checksum but makes no sense
        what = f"{type(error).__name__}: {error}"
        raise ModelFileError(f"{path}: the graph's description is not valid ({what})") from error


# ---- writing


def _tensors_of(small: fx.GraphModule) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All parameters and buffers; one that appears under several names is stored once."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    named = [*small.named_parameters(remove_duplicate=False), *small.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            tensors[name] = tensor.detach().cpu().contiguous().clone()
    return tensors, aliases


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _describe_node(node: fx.Node) -> dict[str, Any]:
    target = node.target
    if node.op == "call_function":
        target = _NAMES_OF_FUNCTIONS.get(node.target)
        if target is None or (target == "getattr" and node.args[1] not in READABLE_ATTRIBUTES):
            raise MfpError(f"cannot save: operation {node.name} ({node.target}) is not on the list of mfp.files")
    elif node.op == "call_method" and target not in METHODS:
        raise MfpError(f"cannot save: the method {target!r} of {node.name} is not on the list of mfp.files")
    try:
        return {"op": node.op, "name": node.name, "target": target,
                "args": [_encode(part) for part in node.args],
                "kwargs": {key: _encode(part) for key, part in node.kwargs.items()}}  # fmt: skip
    except TypeError as error:
        raise MfpError(f"cannot save: {node.name} has an argument that is no plain value ({error})") from error


def _encode(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, tuple):
        return {"tuple": [_encode(part) for part in value]}
    if isinstance(value, list):
        return [_encode(part) for part in value]
    if isinstance(value, slice):
        return {"slice": [_encode(part) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, dict):
        return {"dict": [[_encode(key), _encode(part)] for key, part in value.items()]}
    if value is Ellipsis:
        return {"ellipsis": True}
    if isinstance(value, torch.dtype) and str(value).removeprefix("torch.") in DTYPES:
        return {"dtype": str(value).removeprefix("torch.")}
    raise TypeError(type(value).__name__)


def _describe_modules(small: fx.GraphModule) -> dict[str, dict[str, Any]]:
    called = {node.target for node in small.graph.nodes if node.op == "call_module"}
    described: dict[str, dict[str, Any]] = {}
    for name, module in small.named_modules():  # this order: parameters must come back in it
        if name in called or name.rpartition(".")[0] in described:
            described[name] = {"class": type(module).__name__, "config": _config(name, module),
                               "training": module.training}  # fmt: skip
    return described


def _config(name: str, module: nn.Module) -> dict[str, Any]:
    """The constructor arguments that make an equal module; tensors come from the file's tensors."""
    cls = type(module)
    if MODULES.get(cls.__name__) is not cls and OWN_MODULES.get(cls.__name__) is not cls:
        kind = f"{cls.__module__}.{cls.__name__}"
        raise MfpError(f"cannot save: layer '{name}' is a {kind}, which mfp.load could not build")
    config = {}
    keys = list(inspect.signature(cls.__init__).parameters)
    if isinstance(module, own.ServingConv2d):
        keys = [key for kind in cls.__mro__ if issubclass(kind, nn.Conv2d)
                for key in inspect.signature(kind.__init__).parameters if key not in ("args", "kwargs")]  # fmt: skip
    for key in keys:
        value = getattr(module, key, inspect.Parameter.empty)
        if key in ("self", "device", "dtype") or value is inspect.Parameter.empty:
            continue
        if key == "bias" and (cls.__name__ in MODULES or isinstance(module, own.ServingConv2d)):
            config[key] = value is not None
        elif isinstance(value, Tensor):
            config[key] = {"tensor": True}
        elif not isinstance(value, nn.Module):
            config[key] = _encode(value)
    return config


# ---- reading


def _build(description: dict[str, Any], tensors: dict[str, Tensor]) -> fx.GraphModule:
    for name, source in description["aliases"].items():
        tensors[_path(name)] = tensors[source]
    root = nn.Module()
    for name in description["modules"]:
        _add(root, _path(name), _make_module(name, description["modules"][name], tensors))
    _fill(root, tensors, set(description["frozen"]), set(description["buffers"]))
    name = description["name"]
    if not isinstance(name, str) or not name.isidentifier():
        raise ModelFileError(f"'{name}' is no class name")
    small = fx.GraphModule(root, _make_graph(root, description["nodes"], tensors), name)
    small.training = bool(description["training"])
    if "report" in description:
        values = dict(description["report"])
        values["layers"] = [LayerChange(**layer) for layer in values["layers"]]
        small.report = CompactReport(**values)
    return small


def _path(name: Any) -> str:
    """A dotted name that is safe in generated source."""
    if not isinstance(name, str) or not _PATH.match(name) or any(p.startswith("__") for p in name.split(".")):
        raise ModelFileError(f"{name!r} is no valid module or tensor name")
    return name


def _add(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, (*path, last) = root, name.split(".")
    for part in path:
        if part not in parent._modules:
            parent.add_module(part, nn.Module())
        parent = parent._modules[part]
    parent._modules.pop(last, None)
    parent.add_module(last, module)


def _make_module(name: str, described: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    cls = MODULES.get(described["class"]) or OWN_MODULES.get(described["class"])
    if cls is None:
        raise ModelFileError(f"layer '{name}' asks for the class {described['class']!r}, which is not on the list")
    config = {}
    for key, value in described["config"].items():
        if value == {"tensor": True}:
            config[key] = tensors[f"{name}.{key}"].to("meta")
        else:
            config[key] = _decode(value, {})
    if cls is own.ConvWithBorder:
        config["conv"] = nn.Identity()  # replaced by the module of that name
    with torch.device("meta"):  # sizes come from the file: nothing is allocated before they match the tensors
        module = cls(**config)
    module.training = bool(described["training"])
    return module


def _fill(root: nn.Module, tensors: dict[str, Tensor], frozen: set[str], buffers: set[str]) -> None:
    """Puts the file's tensors in; each must be expected, fit, and none may be missing."""
    made: dict[int, nn.Parameter] = {}
    for name, tensor in tensors.items():
        parent, (*path, last) = root, _path(name).split(".")
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent._modules[part]
        expected = parent._parameters.get(last, parent._buffers.get(last))
        if expected is None and type(parent) is not nn.Module:
            raise ModelFileError(f"tensor '{name}' belongs to no layer")
        if expected is not None and expected.shape != tensor.shape:
            raise ModelFileError(f"tensor '{name}' is {list(tensor.shape)}, its layer needs {list(expected.shape)}")
        if name in buffers:
            parent._parameters.pop(last, None)
            parent.register_buffer(last, tensor)
        else:
            parameter = made.setdefault(id(tensor), nn.Parameter(tensor, name not in frozen))
            parent.register_parameter(last, parameter)
    missing = [name for name, t in [*root.named_parameters(), *root.named_buffers()] if t.is_meta]
    if missing:
        raise ModelFileError(f"the tensors {missing[:5]} are missing")


def _make_graph(root: nn.Module, described: list[dict[str, Any]], tensors: dict[str, Tensor]) -> fx.Graph:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    modules = dict(root.named_modules())
    for entry in described:
        op, name, target = entry["op"], entry["name"], _target(entry, modules, tensors)
        args = tuple(_decode(part, nodes) for part in entry["args"])
        kwargs = {_identifier(key): _decode(part, nodes) for key, part in entry["kwargs"].items()}
        if target is getattr and (len(args) != 2 or args[1] not in READABLE_ATTRIBUTES or kwargs):
            raise ModelFileError(f"{name} reads an attribute that is not on the list")
        if op == "placeholder" and (args or kwargs):
            raise ModelFileError(f"input {name} has a default value")
        if op == "output":
            graph.output(args[0])
        else:
            nodes[name] = graph.create_node(op, target, args, kwargs, _identifier(name))
    graph.lint()
    return graph


def _identifier(name: Any) -> str:
    if not isinstance(name, str) or not name.isidentifier() or name.startswith("__"):
        raise ModelFileError(f"{name!r} is no valid name")
    return name


def _target(entry: dict[str, Any], modules: dict[str, nn.Module], tensors: dict[str, Tensor]) -> Any:
    op, target = entry["op"], entry["target"]
    if op == "call_function" and target in FUNCTIONS:
        return FUNCTIONS[target]
    known = {
        "call_method": METHODS, "call_module": modules, "get_attr": tensors, "output": {"output"},
    }  # fmt: skip
    if op == "placeholder" or (op in known and target in known[op]):
        return _identifier(target) if op == "placeholder" else target
    raise ModelFileError(f"operation {target!r} ({op}) is not on the list")


def _decode(value: Any, nodes: dict[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(part, nodes) for part in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return nodes[content]
    if kind == "tuple":
        return tuple(_decode(part, nodes) for part in content)
    if kind == "slice":
        return slice(*(_decode(part, nodes) for part in content))
    if kind == "dict":
        return {_decode(key, nodes): _decode(part, nodes) for key, part in content}
    if kind == "float":
        return float(content)
    if kind == "dtype":
        return DTYPES[content]
    if kind == "ellipsis":
        return ...
    raise ModelFileError(f"unknown kind of argument {kind!r}")
