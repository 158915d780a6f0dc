"""Tracing of a model with torch.fx, and the modules that follow a conv's filters (BatchNorm, depthwise convs)."""

from __future__ import annotations

import inspect
import operator
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from mfp.errors import MfpError

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

# Per-channel operations that map a channel of zeros to a channel of zeros.
ZERO_KEEPING_MODULES = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU,
    nn.Mish, nn.Hardswish, nn.Tanh, nn.Tanhshrink, nn.Softsign, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip
ZERO_KEEPING_FUNCTIONS = {
    torch.relu, torch.relu_, torch.tanh, F.relu, F.relu6, F.leaky_relu, F.elu, F.celu, F.selu, F.gelu,
    F.silu, F.mish, F.hardswish, F.tanh, F.softsign, F.dropout, F.dropout1d, F.dropout2d, F.dropout3d,
    F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d,
    F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d,
}  # fmt: skip
ZERO_KEEPING_METHODS = {"relu", "relu_", "tanh", "contiguous", "clone"}


class _Tracer(fx.Tracer):
    """Symbolic tracer whose placeholders are only the given arguments; the others keep their defaults."""

    def __init__(self, given: dict[str, Any] | None, leaf_modules: Iterable[str | type[nn.Module]]) -> None:
        super().__init__()
        self.given = given
        self.leaf_names = {leaf for leaf in leaf_modules if isinstance(leaf, str)}
        self.leaf_types = tuple(leaf for leaf in leaf_modules if not isinstance(leaf, str))

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        # mfp.compact's own small modules carry the marker, so that a compact network can be traced again
        marked = getattr(type(module), "mfp_leaf", False)
        return (
            marked
            or name in self.leaf_names
            or isinstance(module, self.leaf_types)
            or super().is_leaf_module(module, name)
        )

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        values: list[Any] = []
        keywords: dict[str, Any] = {}
        for parameter in list(inspect.signature(root_fn).parameters.values())[1:]:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            has_default = parameter.default is not parameter.empty
            wanted = not has_default if self.given is None else parameter.name in self.given
            if not wanted and not has_default:
                raise MfpError(
                    f"{type(self.root).__name__}.forward needs the argument '{parameter.name}', "
                    "which the example input does not give"
                )
            value = self.create_proxy("placeholder", parameter.name, (), {}) if wanted else parameter.default
            if parameter.kind is parameter.KEYWORD_ONLY:
                keywords[parameter.name] = value
            else:
                values.append(value)
        return lambda: root_fn(self.root, *values, **keywords), []


def example_arguments(model: nn.Module, example_input: Any) -> dict[str, Any]:
    """The example (a tensor, a tuple of positional arguments or a dict of named ones) as {argument name: value}.

    Raises MfpError when the example does not fit the model's forward.
    """
    parameters = [
        p for p in inspect.signature(type(model).forward).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ][1:]  # fmt: skip
    names = [parameter.name for parameter in parameters]
    if isinstance(example_input, dict):
        unknown = [name for name in example_input if name not in names]
        if unknown:
            raise MfpError(f"{type(model).__name__}.forward has no argument {unknown}; it has {names}")
        return {name: example_input[name] for name in names if name in example_input}
    values = example_input if isinstance(example_input, tuple | list) else (example_input,)
    if len(values) > len(names):
        raise MfpError(
            f"{type(model).__name__}.forward takes {len(names)} arguments {names}, the example gives {len(values)}"
        )
    return dict(zip(names, values, strict=False))


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


def trace(
    model: nn.Module, arguments: dict[str, Any] | None = None, leaf_modules: Iterable[str | type[nn.Module]] = ()
) -> fx.GraphModule:
    """The model's eval-mode computation as a torch.fx graph; submodules are shared with the model, not copied.

    Args:
        model: any module; it is left as it is (its training flags too).
        arguments: the forward arguments that are inputs of the graph, the others keep their defaults;
            None makes the arguments without a default the inputs.
        leaf_modules: names or classes of submodules to leave as one opaque piece each.
    Raises MfpError when symbolic tracing refuses: it names the line and says what to do.
    """
    leaf_modules = tuple(leaf_modules)
    names = {name for name, _ in model.named_modules()}
    unknown = [leaf for leaf in leaf_modules if isinstance(leaf, str) and leaf not in names]
    if unknown:
        raise MfpError(f"leaf_modules names {unknown}, which {type(model).__name__} does not have")
    tracer = _Tracer(arguments, leaf_modules)
    try:
        with eval_mode(model):
            graph = tracer.trace(model)
    except MfpError:
        raise
    except Exception as error:  # whatever user code raises when it meets a symbolic value
        raise MfpError(_refusal(model, tracer, error)) from error
    return fx.GraphModule(tracer.root, graph, type(model).__name__)


def _refusal(model: nn.Module, tracer: _Tracer, error: Exception) -> str:
    """Says which line of the user's code tracing could not follow, and the way out."""
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__)
        if f"torch{'/'}fx" not in frame.filename.replace("\\", "/") and frame.filename != __file__
        and "/torch/nn/" not in frame.filename.replace("\\", "/")
    ]  # fmt: skip
    where = "an unknown line"
    if frames:
        where = f"{frames[-1].filename}:{frames[-1].lineno} (`{frames[-1].line}`)"
    inside = [name for name in tracer.module_stack if name]
    piece = f"'{inside[-1]}'" if inside else "the part with that line, moved into a module of its own,"
    return (
        f"cannot trace {type(model).__name__}: {where}: {type(error).__name__}: {error}. "
        f"Tracing follows no decision that depends on tensor values. Rewrite that line, or keep {piece} as "
        "one opaque piece with leaf_modules=(...); it then stays as it is"
    )


def find_followers(model: nn.Module) -> dict[str, list[str]]:
    """For each conv the modules whose rows are masked with its filters: they read it alone, channel by channel.

    >>> find_followers(torchvision.models.mobilenet_v2())["features.2.conv.0.0"]
    ['features.2.conv.0.1', 'features.2.conv.1.0', 'features.2.conv.1.1']

    These are the BatchNorms that read only this conv, and depthwise convs (with their BatchNorm) that read only
    it through operations that keep zero zero. Needs no example input. A model that cannot be traced gives {}
    and one warning.
    """
    try:
        traced = trace(model)
    except MfpError as error:
        warnings.warn(
            f"{error}. Without the graph no BatchNorm or depthwise conv is masked together with its conv: "
            "compaction stays exact, but removes less",
            stacklevel=2,
        )
        return {}
    modules = dict(traced.named_modules())
    calls: dict[int, int] = {}
    for node in traced.graph.nodes:
        if node.op == "call_module":
            calls[id(modules[node.target])] = calls.get(id(modules[node.target]), 0) + 1
    names = {id(module): name for name, module in reversed(list(model.named_modules()))}
    followers: dict[str, list[str]] = {}
    for node in traced.graph.nodes:
        module = modules.get(node.target) if node.op == "call_module" else None
        if isinstance(module, CONVS):
            found = followers.setdefault(names[id(module)], [])
            for follower in _followers_of(node, module.out_channels, modules, calls):
                if names[id(follower)] not in found:
                    found.append(names[id(follower)])
    return {name: found for name, found in followers.items() if found}


def _followers_of(
    node: fx.Node, width: int, modules: dict[str, nn.Module], calls: dict[int, int]
) -> Iterator[nn.Module]:
    """Walks the readers of a conv through per-channel operations; yields the BatchNorms and depthwise convs."""
    for user in node.users:
        module = modules.get(user.target) if user.op == "call_module" else None
        once = module is not None and calls[id(module)] == 1
        if once and isinstance(module, BATCH_NORMS) and module.affine:
            yield module
            yield from _followers_of(user, width, modules, calls)
        elif once and is_depthwise(module) and module.in_channels == width:
            yield module
            yield from _followers_of(user, module.out_channels, modules, calls)
        elif _keeps_zero(user, module):
            yield from _followers_of(user, width, modules, calls)


def is_depthwise(module: nn.Module) -> bool:
    """Each filter reads one input channel of its own (a conv with one input channel alone is not meant)."""
    return isinstance(module, CONVS) and module.groups > 1 and module.groups == module.in_channels


def _keeps_zero(node: fx.Node, module: nn.Module | None) -> bool:
    if node.op == "call_module":
        return isinstance(module, ZERO_KEEPING_MODULES) or (
            isinstance(module, nn.Hardtanh) and module.min_val <= 0 <= module.max_val
        )
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        return node.target in ZERO_KEEPING_FUNCTIONS or name == "stochastic_depth"
    return node.op == "call_method" and node.target in ZERO_KEEPING_METHODS


def find_output_convs(model: nn.Module) -> set[str]:
    """Names of the convs whose channels come out of the network, with no other layer between: its classifiers.

    >>> find_output_convs(torchvision.models.squeezenet1_1())
    {'classifier.1'}

    Needs no example input. A model that cannot be traced gives the empty set.
    """
    try:
        traced = trace(model)
    except MfpError:
        return set()
    modules = dict(traced.named_modules())
    names = {id(module): name for name, module in reversed(list(model.named_modules()))}
    found: set[str] = set()
    seen: set[fx.Node] = set()
    waiting = [node for node in traced.graph.nodes if node.op == "output"]
    while waiting:
        node = waiting.pop()
        module = modules.get(node.target) if node.op == "call_module" else None
        if isinstance(module, CONVS):
            depthwise = module.groups == module.in_channels
            found.add(names[id(module)])
            if not depthwise:
                continue
        if isinstance(module, nn.Linear) or node.target in (F.linear, torch.matmul, torch.bmm) or node in seen:
            continue
        seen.add(node)
        waiting.extend(node.all_input_nodes)
    return found


def find_pointwise_linears(model: nn.Module) -> set[str]:
    """Names of the Linear layers that are 1x1 convs in another notation: they read an image moved to channels-last.

    >>> sorted(find_pointwise_linears(torchvision.models.convnext_tiny()))[:2]
    ['features.1.0.block.3', 'features.1.0.block.5']

    Their input comes from permute(0, 2, 3, 1), with nothing but norms, activations and other Linear layers between.
    A model that cannot be traced gives the empty set.
    """
    try:
        traced = trace(model)
    except MfpError:
        return set()
    modules = dict(traced.named_modules())
    names = {id(module): name for name, module in reversed(list(model.named_modules()))}
    between = (nn.Linear, nn.LayerNorm, *ZERO_KEEPING_MODULES)
    pointwise: set[fx.Node] = set()
    for node in traced.graph.nodes:
        module = modules.get(node.target) if node.op == "call_module" else None
        moved = node.target in (torch.permute, "permute") and _moves_channels(node)
        passed = isinstance(module, between) or node.target in ZERO_KEEPING_FUNCTIONS
        if moved or (passed and node.args and node.args[0] in pointwise):
            pointwise.add(node)
    found = {modules[node.target] for node in pointwise if node.op == "call_module"}
    return {names[id(module)] for module in found if isinstance(module, nn.Linear)}


# Operations that leave every channel where it is; where they are not known, coupling stays on the safe side.
_ALIGNED_MODULES = (*ZERO_KEEPING_MODULES, *BATCH_NORMS, nn.Sigmoid, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus)
_ALIGNED_FUNCTIONS = {*ZERO_KEEPING_FUNCTIONS, torch.sigmoid, F.sigmoid, F.hardsigmoid, F.hardtanh, torch.mean}
_ALIGNED_METHODS = ZERO_KEEPING_METHODS | {"sigmoid", "mean"}
_JOINS = {operator.add, operator.iadd, torch.add, operator.sub, operator.mul, operator.imul, torch.mul, "add", "mul"}


def find_coupled(model: nn.Module) -> tuple[dict[str, int], set[int]]:
    """Which convs (and pointwise Linear layers) must lose the same channels so that no join needs an index.

    Convs whose outputs meet in an addition or a product, channel by channel, are one group.

    Returns:
        ``{layer name: group}``, and the groups that also meet a tensor whose channels come from no conv alone (the
        input, a concatenation, a padded shortcut): they cannot lose channels without an index.

    Raises:
        MfpError: the model cannot be traced.
    """
    traced = trace(model)
    modules = dict(traced.named_modules())
    names = {id(module): name for name, module in reversed(list(model.named_modules()))}
    parent: dict[str, str] = {}
    fixed: set[str] = set()
    owner: dict[fx.Node, str | None] = {}  # a conv that stands for the node's channels

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    for node in traced.graph.nodes:
        module = modules.get(node.target) if node.op == "call_module" else None
        inputs = [owner.get(source) for source in node.all_input_nodes if source.op != "get_attr"]
        if isinstance(module, (*CONVS, nn.Linear)):
            name = names[id(module)]
            parent.setdefault(name, name)
            if is_depthwise(module) and module.out_channels == module.in_channels and inputs[0]:
                parent[root(name)] = root(inputs[0])
            owner[node] = name
        elif node.target in _JOINS:
            known = [name for name in inputs if name]
            for name in known[1:]:
                parent[root(name)] = root(known[0])
            if known and len(known) < len(inputs):
                fixed.add(known[0])
            owner[node] = known[0] if len(known) == len(inputs) and known else None
        elif len(inputs) == 1 and (
            isinstance(module, _ALIGNED_MODULES)
            or node.target in _ALIGNED_FUNCTIONS
            or (node.op == "call_method" and node.target in _ALIGNED_METHODS)
            or getattr(node.target, "__name__", "") == "stochastic_depth"
            or (node.target in (torch.permute, "permute") and _moves_channels(node))
        ):
            owner[node] = inputs[0]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(root(name) for name in parent))}
    return {name: numbers[root(name)] for name in parent}, {numbers[root(name)] for name in fixed}


def _moves_channels(node: fx.Node) -> bool:
    """permute between [B, C, H, W] and [B, H, W, C]."""
    dims = node.args[1:] if len(node.args) != 2 else node.args[1]
    return tuple(dims) in ((0, 2, 3, 1), (0, 3, 1, 2))
