"""A compact network leaves for the engine that serves it: ONNX, OpenVINO IR, torch.export's program.

What leaves has BatchNorm folded into the convolutions, and plain additions instead of joins by index (widen.py); all
operators are standard ones. engines.py runs and times the files.
"""

from __future__ import annotations

import copy
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from mfp.atomic import write_atomically
from mfp.capture import eval_mode, example_arguments, exported_program, plain_tensors, program_bytes
from mfp.compact import plain_compact
from mfp.compact.check import check
from mfp.compact.count import flops
from mfp.compact.report import described, example_of
from mfp.errors import MfpError
from mfp.export.widen import CHANNELS_AT_ONCE, Widened, widen
from mfp.plan import unwrap
from mfp.serving.fold import fold_batchnorm
from mfp.serving.modules import SERVING_MODULES

__all__ = ["FORMATS", "ExportReport", "export"]


@dataclass
class ExportReport:
    """What was written; ``str(report)`` says it in words.

    Attributes:
        files: the files, the one that was asked for first.
        inputs: shapes and dtypes by argument, as in ``CompactReport.inputs``.
        flops_compact: multiply-adds of the compact network, for the batch of the example.
        flops_exported: the same with filters of zeros for plain additions.
        grown: layers that got such filters, with their filters before and after.
        filled: layers that were filled up to a multiple of 8 filters, with their filters before and after.
        left: joins by index in front of which no layer could grow: the engine puts zeros between the channels.
        free_batch: whether the batch size is free.
        difference: of the outputs on the example, relative to the largest.
    """

    files: list[Path]
    inputs: dict[str, list]
    flops_compact: int
    flops_exported: int
    grown: dict[str, tuple[int, int]] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    filled: dict[str, tuple[int, int]] = field(default_factory=dict)
    free_batch: bool = True
    difference: float = 0.0

    def __str__(self) -> str:
        lines = [f"{file}: {file.stat().st_size:,} bytes" for file in self.files if file.exists()]
        lines += [f"input {name}: {dtype} {size_in_words(shape, self.free_batch)}" for name, (shape, dtype) in self.inputs.items()]  # fmt: skip  # noqa: E501
        share = self.flops_exported / self.flops_compact - 1
        lines.append(f"multiply-adds {self.flops_compact:,} compact, {self.flops_exported:,} exported ({share:+.1%})")
        if self.grown:
            examples = [f"{name} {before} → {after}" for name, (before, after) in list(self.grown.items())[:3]]
            lines.append(
                f"{len(self.grown)} layers in front of additions or groups got filters of zeros ({', '.join(examples)}"
                f'{", ..." if len(self.grown) > 3 else ""}); with residual="keep" or "coupled" additions need none'
            )
        if self.filled:
            lines.append(f"{len(self.filled)} layers were filled up to a multiple of {CHANNELS_AT_ONCE} filters")
        if self.left:
            lines.append(
                f"no layer in front of {', '.join(self.left[:3])}{', ...' if len(self.left) > 3 else ''} could grow: "
                f"the engine puts zeros between the channels when it runs ({len(self.left)} such places)"
            )
        lines.append(f"largest relative difference of the outputs {self.difference:.1e}")
        return "\n".join(lines)


def size_in_words(shape: list[int], free_batch: bool) -> str:
    return " x ".join(["any batch" if free_batch else str(shape[0]), *map(str, shape[1:])])


def export(model: nn.Module, file: str | Path, example_input: Any = None) -> ExportReport:
    """Writes a network for another engine; the format follows from the file's ending.

    >>> small = mfp.compact(model, torch.zeros(1, 3, 224, 224))
    >>> print(mfp.export(small, "small.onnx"))

    Filters that are zero are removed on the way, so a masked network can be given as well.

    Args:
        model: the result of ``mfp.compact``, or any network that ``mfp.compact`` takes. It is left as it is.
        file: ``.onnx``; ``.xml`` (OpenVINO IR, with a ``.bin`` beside it); ``.pt2`` (torch.export).
        example_input: as for ``mfp.compact``; a compact network knows it. The batch size is free in the file, where the
            model allows it; image sizes are those of the example.

    Raises:
        MfpError: another ending, a package that is missing, an operator that the format does not have (named), no
            example, a file that cannot be written. Nothing is half written.
    """
    return export_and_arguments(model, Path(file), example_input)[0]


def export_and_arguments(model: nn.Module, file: Path, example_input: Any) -> tuple[ExportReport, dict[str, Any]]:
    """:func:`export`, and forward's arguments as it used them."""
    if file.suffix not in FORMATS:
        raise MfpError(f"{file}: the ending says the format, one of {', '.join(FORMATS)}")
    require(*FORMATS[file.suffix].packages)
    network, arguments, report = prepare(model, example_input)
    program, report.free_batch = exported_program(network, arguments)
    form = FORMATS[file.suffix]
    try:
        report.files = form.write(program, file)
    except CannotExpress as error:
        raise MfpError(f"{file}: cannot be expressed in {form.name}: {error}{place_of(str(error), network)}") from error
    return report, arguments


class CannotExpress(Exception):
    """What a converter says of an operator that its format lacks, in one line."""


def place_of(message: str, network: fx.GraphModule) -> str:
    """Where the operator that a message names stands: the layers it comes after."""
    named = re.search(r"aten[.:]+(\w+)", message)
    for node in network.graph.nodes:
        packet = getattr(node.target, "overloadpacket", None)
        if named and getattr(packet, "__name__", None) == named.group(1):
            layers = list(layers_before(node))
            return f" (behind {', '.join(layers)})" if layers else ""
    return ""


def layers_before(node: fx.Node) -> Iterator[str]:
    """The nearest modules in front of a node."""
    seen, waiting = {node}, [node]
    while waiting:
        for source in waiting.pop(0).all_input_nodes:
            if source.op == "call_module":
                yield str(source.target)
            elif source not in seen:
                seen.add(source)
                waiting.append(source)


def prepare(model: nn.Module, example_input: Any = None) -> tuple[fx.GraphModule, dict[str, Any], ExportReport]:
    """(the network as it is exported, forward's arguments, what was done); no file is written."""
    model = unwrap(model)
    example = example_input if example_input is not None else example_of(getattr(model, "report", None))
    if example is None:
        raise MfpError(f"give mfp.export an example input: this {type(model).__name__} does not say what it takes")
    with plain_tensors(), eval_mode(model):
        arguments = example_arguments(model, example)
        network, compact_flops, widened = _prepared(model, arguments)
        difference = check(
            network, model, arguments, lambda: "it begins in the exported form",
            lambda *like: _prepared(*like)[0],
        )  # fmt: skip
        report = ExportReport(
            [], described(arguments), compact_flops, flops(network, arguments), widened.grown, widened.left,
            widened.filled, difference=difference,
        )  # fmt: skip
    return network, arguments, report


def _prepared(model: nn.Module, arguments: dict[str, Any]) -> tuple[fx.GraphModule, int, Widened]:
    """(the network as it is exported, its multiply-adds before it was widened, what widening did)"""
    if is_compact(model):
        network = copy.deepcopy(model).eval()
    else:
        network = plain_compact(model, arguments).eval()
    fold_batchnorm(network)
    before = flops(network, arguments)
    widened = widen(network, arguments)
    return fx.GraphModule(network, network.graph, type(network).__name__), before, widened


def is_compact(model: nn.Module) -> bool:
    """Whether a model is a result of mfp.compact, other than in serving form."""
    compact = isinstance(model, fx.GraphModule) and hasattr(model, "report")
    return compact and not any(isinstance(module, SERVING_MODULES) for module in model.modules())


def dense_like(masked: nn.Module) -> nn.Module:
    """A copy of a masked network of which nothing can be removed, for comparisons of time."""
    full = copy.deepcopy(masked)
    for parameter in full.parameters():
        parameter.data[parameter.data == 0] = 1e-3
    return full


def require(*packages: str) -> None:
    """Raises one line about the first package that is not there."""
    import importlib.util

    for package in packages:
        if importlib.util.find_spec(package) is None:
            extra = "openvino" if package == "openvino" else "onnx"
            raise MfpError(f"{package} is not installed; it comes with: pip install 'mfp[{extra}]'")


# ---- formats


def write_onnx(program: Any, file: Path) -> list[Path]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            made = torch.onnx.export(program, (), None, dynamo=True, verbose=False)
            data = made.model_proto.SerializeToString()
        except Exception as error:  # the exporter's errors have no common class
            raise CannotExpress(_reason(error)) from error
    write_atomically(file, data)
    return [file]


def write_openvino(program: Any, file: Path) -> list[Path]:
    import openvino

    with tempfile.TemporaryDirectory() as directory:
        try:
            made = openvino.convert_model(program)
        except Exception as error:
            raise CannotExpress(_reason(error)) from error
        openvino.save_model(made, Path(directory) / "model.xml", compress_to_fp16=False)
        for suffix in (".bin", ".xml"):
            write_atomically(file.with_suffix(suffix), (Path(directory) / f"model{suffix}").read_bytes())
    return [file, file.with_suffix(".bin")]


def write_program(program: Any, file: Path) -> list[Path]:
    write_atomically(file, program_bytes(program))
    return [file]


def _reason(error: BaseException) -> str:
    """The innermost cause, in one line: the one that names an operator, if one does."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = next((line for line in lines if "aten." in line), lines[0] if lines else "")
    return f"{type(error).__name__}: {line}"


@dataclass(frozen=True)
class Format:
    """A kind of file: its name, how it is written (raises CannotExpress), and the packages that it takes."""

    name: str
    write: Callable[[Any, Path], list[Path]]
    packages: tuple[str, ...] = ()


FORMATS = {
    ".onnx": Format("ONNX", write_onnx, ("onnx", "onnxscript")),
    ".xml": Format("OpenVINO IR", write_openvino, ("openvino",)),
    ".pt2": Format("torch.export's program", write_program),
}
