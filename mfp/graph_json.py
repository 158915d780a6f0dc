"""A compact network's graph and modules as plain JSON values, and back: names on fixed lists, and nothing else.

Everything that ends up in generated Python source (node names, paths, default values) is checked first.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import operator
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from mfp import modules as own
from mfp.batch_norm import NarrowBatchNorm2d
from mfp.errors import MfpError
from mfp.serving import modules as serving
from mfp.serving.prepare import IN_PLACE

# Operators by name, each with all its overloads that write to nothing. They compute from their inputs alone: no
# randomness, files, uninitialised memory, strides or indices without a check.
ATEN = set("""abs acos acosh add addcdiv addcmul all any arcsin arctan arctan2 asin asinh atan atan2 atanh bitwise_and
    bitwise_not bitwise_or bitwise_xor ceil celu clamp clamp_max clamp_min clip clone cos cosh div divide elu eq
    erf erfc exp exp2 expm1 floor floor_divide fmax fmin fmod frac ge gelu glu greater greater_equal gt hardshrink
    hardsigmoid hardswish hardtanh isfinite isinf isnan le leaky_relu lerp less less_equal log log10 log1p log2
    log_sigmoid logaddexp logical_and logical_not logical_or logical_xor logit lt masked_fill maximum minimum mish mul
    multiply nan_to_num ne neg negative positive pow reciprocal relu relu6 remainder round rsqrt rsub selu sgn sigmoid
    sign silu sin sinc sinh softplus softshrink sqrt square sub subtract tan tanh threshold true_divide trunc where
    xlogy

    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution linear matmul bmm mm mv
    addmm baddbmm einsum bilinear outer scaled_dot_product_attention
    batch_norm instance_norm group_norm layer_norm rms_norm native_group_norm native_layer_norm
    prelu cosine_similarity

    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d
    adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d
    max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices
    upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d
    upsample_trilinear3d _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d
    _upsample_bilinear2d_aa _upsample_bicubic2d_aa grid_sampler grid_sampler_2d grid_sampler_3d affine_grid_generator
    amax amin argmax argmin aminmax count_nonzero cumprod cumsum linalg_vector_norm logsumexp max mean median min
    nanmean nansum norm prod std std_mean sum var var_mean softmax _softmax log_softmax _log_softmax sort argsort topk

    alias broadcast_tensors cat channel_shuffle chunk concat concatenate constant_pad_nd contiguous detach diagonal
    expand expand_as flatten flip hstack im2col col2im lift_fresh lift_fresh_copy meshgrid movedim moveaxis narrow
    native_channel_shuffle pad permute pixel_shuffle pixel_unshuffle reflection_pad1d
    reflection_pad2d reflection_pad3d repeat repeat_interleave replication_pad1d replication_pad2d replication_pad3d
    reshape reshape_as roll rot90 select slice split split_with_sizes squeeze stack swapaxes swapdims t tensor_split
    tile to _to_copy transpose tril triu type_as unbind unflatten unfold
    unsqueeze _unsafe_view view view_as vstack
    embedding gather index index_select one_hot take_along_dim index_add index_copy index_fill masked_scatter scatter
    scatter_add select_scatter slice_scatter
    arange eye full full_like linspace new_full new_ones new_zeros ones ones_like scalar_tensor zeros zeros_like
    sym_numel sym_size""".split())  # fmt: skip
PYTHON: dict[str, Callable[..., Any]] = {
    **{f"operator.{name}": getattr(operator, name) for name in """add and_ eq floordiv ge getitem gt le lt mod mul ne
        neg or_ pow sub truediv""".split()},
    **{f"torch.{name}": getattr(torch, name) for name in "sym_float sym_int sym_ite sym_max sym_min sym_not".split()},
    **{f"math.{name}": getattr(math, name) for name in "ceil floor trunc".split()},
    "round": round, "OrderedDict": OrderedDict,
}  # fmt: skip
MODULES: dict[str, type[nn.Module]] = {cls.__name__: cls for cls in (
    nn.Module, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear,
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, NarrowBatchNorm2d,
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
    own.AddConstants, own.ConvWithBorder, own.ExpandChannels, own.InputSizes, own.ResidualJoin, own.SelectChannels,
    *serving.SERVING_MODULES,
)}  # fmt: skip
CONSTANTS: dict[str, Any] = {str(value).removeprefix("torch."): value for value in (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.strided, torch.contiguous_format, torch.preserve_format, torch.channels_last,
    torch.channels_last_3d, torch.device("cpu"),
)}  # fmt: skip
_NAMES = {function: name for name, function in PYTHON.items()}
_IN_PLACE = {packet.__name__ for packet in IN_PLACE.values()}
_PATH = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\Z")


class ModelFileError(MfpError):
    """A file that is no compact network of this package, or not a whole one."""


def function_named(name: Any) -> Callable[..., Any] | None:
    """The function that a name of the form "aten.NAME.OVERLOAD" or of the table stands for; None if it may not run."""
    if name in PYTHON:
        return PYTHON[name]
    _, packet, overload = (*name.split("."), "", "")[:3]
    if name != f"aten.{packet}.{overload}" or packet not in ATEN | _IN_PLACE:
        return None
    overloads = getattr(torch.ops.aten, packet, None)
    if overloads is None or overload not in overloads.overloads():
        return None
    found = getattr(overloads, overload)
    return None if found._schema.is_mutable and packet not in _IN_PLACE else found


# ---- writing


def describe_nodes(graph: fx.Graph) -> list[dict[str, Any]]:
    """Raises MfpError for a node that no file can hold, by name."""
    return [_describe_node(node) for node in graph.nodes if not _is_plain_result(node)]


def _describe_node(node: fx.Node) -> dict[str, Any]:
    target = node.target
    if node.op == "call_function":
        target = _NAMES.get(target) or str(target)
        if function_named(target) is not node.target:
            raise MfpError(f"cannot save: operation {node.name} ({node.target}) is not on the list of mfp.graph_json")
    elif node.op == "call_method":
        raise MfpError(f"cannot save: {node.name} calls a method, which no graph of mfp.compact does")
    try:
        return {"op": node.op, "name": node.name, "target": target, "args": [_encode(part) for part in node.args],
                "kwargs": {key: _encode(part) for key, part in node.kwargs.items()}}  # fmt: skip
    except TypeError as error:
        raise MfpError(f"cannot save: {node.name} has an argument that is no plain value ({error})") from error


def _is_plain_result(node: Any) -> bool:
    """Whether a node builds a dataclass or a named tuple: a file has its contents, as a loading program need not have
    the class."""
    kind = node.target if isinstance(node, fx.Node) else None
    return isinstance(kind, type) and (dataclasses.is_dataclass(kind) or hasattr(kind, "_fields"))


def _encode(value: Any) -> Any:
    if _is_plain_result(value):
        return _encode(tuple(value.args) if hasattr(value.target, "_fields") else dict(value.kwargs))
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
    if isinstance(value, dict):
        return {"dict": [[_encode(key), _encode(part)] for key, part in value.items()]}
    name = "cpu" if isinstance(value, torch.device) else str(value).removeprefix("torch.")  # a file's tensors are there
    if isinstance(value, torch.device) or CONSTANTS.get(name) is value:
        return {"constant": name}
    raise TypeError(type(value).__name__)


def describe_modules(small: nn.Module) -> dict[str, dict[str, Any]]:
    """Every module but the network itself, in an order that gives the parameters back in theirs."""
    return {name: {"class": type(module).__name__, "config": _config(name, module), "training": module.training}
            for name, module in small.named_modules() if name}  # fmt: skip


def _config(name: str, module: nn.Module) -> dict[str, Any]:
    """The constructor arguments that make an equal module; tensors come from the file's tensors."""
    cls = type(module)
    if MODULES.get(cls.__name__) is not cls:
        kind = f"{cls.__module__}.{cls.__name__}"
        raise MfpError(f"cannot save: layer '{name}' is a {kind}, which mfp.load could not build")
    kinds = [kind for kind in cls.__mro__ if kind is cls or issubclass(kind, nn.Conv2d | nn.Linear)]
    keys = [key for kind in kinds for key in inspect.signature(kind.__init__).parameters]
    # bias is True or False there
    takes_flag = cls.__module__.startswith("torch.") or isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d)
    config: dict[str, Any] = {}
    for key in keys:
        value = getattr(module, key, inspect.Parameter.empty)
        if key in ("self", "args", "kwargs", "device", "dtype", "process_group") or value is inspect.Parameter.empty:
            continue
        if key == "bias" and takes_flag:
            config[key] = value is not None
        elif isinstance(value, Tensor):
            config[key] = {"tensor": True}
        elif not isinstance(value, nn.Module):
            config[key] = _encode(value)
    return config


# ---- reading


def make_module(name: str, described: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    """The module without memory: sizes come from the file, nothing is allocated before they match the tensors."""
    cls = MODULES.get(described["class"])
    if cls is None:
        raise ModelFileError(f"layer '{name}' asks for the class {described['class']!r}, which is not on the list")
    config = {}
    for key, value in described["config"].items():
        config[key] = tensors[f"{name}.{key}"].to("meta") if value == {"tensor": True} else _decode(value, {})
    if cls is own.ConvWithBorder:
        config["conv"] = nn.Identity()  # replaced by the module of that name
    with torch.device("meta"):
        module = cls(**config)
    module.training = bool(described["training"])
    return module


def make_graph(described: list[dict[str, Any]], modules: set[str], tensors: set[str]) -> fx.Graph:
    """The graph that calls these modules and reads these tensors."""
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for entry in described:
        op, name, target = entry["op"], entry["name"], _target(entry, {"call_module": modules, "get_attr": tensors})
        known = {} if op == "placeholder" else nodes  # the default of an input refers to nothing
        args = tuple(_decode(part, known) for part in entry["args"])
        kwargs = {identifier(key): _decode(part, known) for key, part in entry["kwargs"].items()}
        if op == "placeholder" and (len(args) > 1 or kwargs):
            raise ModelFileError(f"input {name} has more than a default value")
        if op == "output":
            graph.output(args[0])
        else:
            nodes[name] = graph.create_node(op, target, args, kwargs, identifier(name))
    return graph


def _target(entry: dict[str, Any], known: dict[str, set[str]]) -> Any:
    op, target = entry["op"], entry["target"]
    if op == "call_function":
        found = function_named(target)
        if found is not None:
            return found
    elif op == "placeholder":
        return identifier(target)
    elif op == "output" or target in known.get(op, ()):
        return target
    raise ModelFileError(f"operation {target!r} ({op}) is not on the list")


def path(name: Any) -> str:
    """A dotted name that is safe in generated source."""
    if not isinstance(name, str) or not _PATH.match(name) or any(p.startswith("__") for p in name.split(".")):
        raise ModelFileError(f"{name!r} is no valid module or tensor name")
    return name


def identifier(name: Any) -> str:
    if not isinstance(name, str) or not name.isidentifier() or name.startswith("__"):
        raise ModelFileError(f"{name!r} is no valid name")
    return name


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
    if kind == "dict":
        if any(isinstance(key, dict | list) for key, _ in content):
            raise ModelFileError("a dictionary has a key that is no plain value")
        return {key: _decode(part, nodes) for key, part in content}
    if kind == "float":
        return float(content)
    if kind == "constant":
        return CONSTANTS[content]
    raise ModelFileError(f"unknown kind of argument {kind!r}")
