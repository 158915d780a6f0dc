"""The command line: mfp prune | compact | export | evaluate | bench | report | info.

Everything but `info` needs the extra `train`, so each command imports what it needs when it runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mfp.errors import MfpError

if TYPE_CHECKING:
    from mfp.train.config import RunConfig

USERS_MISTAKE, FAILURE = 2, 1
SWITCHES = (
    "MFP_BACKEND",
    "MFP_CPU_ISA",
    "MFP_WINOGRAD",
    "MFP_DEBUG",
    "MFP_CUDA",
    "TORCH_CUDA_ARCH_LIST",
)  # setup.py explains them
NAMES = {"flops": "FLOPs", "parameters": "parameters", "milliseconds": "time"}

app = typer.Typer(
    help="Filter pruning of convolutional networks, down to a smaller network that is really faster.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip


def main() -> None:
    """Runs the command line. A mistake of the user's is one line on standard error and exit code 2."""
    with _readable_errors():
        app()


@contextlib.contextmanager
def _readable_errors() -> Iterator[None]:
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        yield
    except MfpError as error:
        _leave(f"error: {_first_line(error)}", USERS_MISTAKE)
    except KeyboardInterrupt:
        _leave("stopped", 130)
    except ImportError as error:
        _leave(f"error: {error}: this command needs the extra: pip install 'mfp[train]'", USERS_MISTAKE)
    except (OSError, RuntimeError) as error:  # a full disk, no memory, a rank that was lost
        if os.environ.get("MFP_DEBUG"):
            raise
        rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
        _leave(f"error: {rank}{_first_line(error)} (MFP_DEBUG=1 shows where)", FAILURE)


def _first_line(error: Exception) -> str:
    """The message in one line; an error from a loading process carries its traceback, whose last line it is."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = lines[-1] if lines[0].startswith("Caught ") else lines[0]
    return line.removeprefix("mfp.errors.MfpError: ")


def _leave(message: str, code: int) -> None:
    print(message, file=sys.stderr, flush=True)
    sys.exit(code)


# ---- mfp prune


def prune(
    ctx: typer.Context,
    model: Annotated[str | None, typer.Option(help="package:function of yours that builds the network")] = None,
    dataset: Annotated[str | None, typer.Option(help="package:function of yours that returns the data")] = None,
    recipe: Annotated[str | None, typer.Option(help="settings by name, which other options override")] = None,
    output: Annotated[Path | None, typer.Option(help="run directory; runs/ARCH-DATA if not given")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in --output")] = False,
    **options: Any,
) -> None:
    """Train a network while pruning it, remove the pruned filters, and show what was gained.

    Without --arch and --data it is the recipe `demo`: ResNet-20 on the handwritten digits inside scikit-learn. Under
    torchrun it uses all the processes.
    """
    from mfp.train.engine import Interrupted
    from mfp.train.run import run

    given = {name: options[name] for name in options if _was_given(ctx, name)}
    if ":" in given.get("arch", ""):
        raise MfpError(f"--arch {given['arch']}: code of yours is imported only by --model package:function")
    if model:
        given["arch"] = _function(model)
    if dataset or "data" in given:
        given["data"] = _data(given.get("data"), dataset)
    config = _make_config(given, recipe, output if resume else None)
    output = output or _free_directory(config)
    try:
        result = run(config, output, resume)
    except Interrupted as stop:
        kept = f"; {stop.path} is complete" if stop.path else ""
        _leave(f"{stop}{kept}; go on with: mfp prune --output {output} --resume", 128 + stop.number)
    if result:
        _print_result(result, output, recipe)


def _was_given(ctx: typer.Context, name: str) -> bool:
    return ctx.get_parameter_source(name).name == "COMMANDLINE"


def _make_config(given: dict[str, Any], recipe_name: str | None, resumed: Path | None) -> RunConfig:
    """Defaults, then the recipe, then the stored run when one is resumed, then what was given."""
    from mfp.train.config import RunConfig
    from mfp.train.datasets import OWN
    from mfp.train.recipes import recipe

    values = {name: _parse(name, value) for name, value in given.items()}
    stored = resumed / "config.json" if resumed else None
    if stored and stored.exists():
        config = RunConfig.from_json(stored.read_text(), str(stored))
        if ":" in config.arch and "arch" not in values:
            raise MfpError(f"{stored} names a function of yours; it is imported only if you say --model {config.arch}")
        if config.data.startswith(OWN) and "data" not in values:
            function = config.data.removeprefix(OWN)
            raise MfpError(f"{stored} names a function of yours; it is imported only if you say --dataset {function}")
        return dataclasses.replace(config, **values)
    if not recipe_name and not values.keys() & {"arch", "data"}:
        recipe_name = "demo"
    settings = recipe(recipe_name).settings if recipe_name else {}
    if recipe_name and recipe(recipe_name).data.endswith(":PATH") and "data" not in values:
        raise MfpError(f"--recipe {recipe_name} needs --data {recipe(recipe_name).data}")
    return RunConfig(**{**settings, **values})


def _parse(name: str, value: Any) -> Any:
    """Lists and tables of settings are written with commas."""
    if name in ("criteria", "skip"):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    try:
        if name == "milestones":
            return tuple(int(part) for part in value.split(",") if part.strip())
        if name == "layer_rates":
            pairs = (part.split("=") for part in value.split(",") if part.strip())
            return {layer.strip(): float(rate) for layer, rate in pairs}
    except ValueError as error:
        wanted = {
            "milestones": "whole numbers, as 60,120,160",
            "layer_rates": "layer=rate, as conv1=0,layer1.0.conv2=0.2",
        }
        raise MfpError(f"--{name.replace('_', '-')} {value!r}: write {wanted[name]}") from error
    return value


def _free_directory(config: RunConfig) -> Path:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise MfpError("several processes need --output DIRECTORY, so that all of them (and a restart) use the same")
    from mfp.train.datasets import short_name

    name = f"{config.arch.rpartition(':')[2]}-{short_name(config.data)}"
    candidates = (Path("runs") / (name if number == 1 else f"{name}-{number}") for number in range(1, 10**6))
    return next(path for path in candidates if not path.exists())


def _options() -> Iterator[inspect.Parameter]:
    """One command-line option per setting of RunConfig, with its default and its help."""
    from mfp.train.config import RunConfig

    for setting in dataclasses.fields(RunConfig):
        default = getattr(RunConfig(), setting.name)
        kind: Any = type(default) if default is not None else bool | None if "bool" in setting.type else str | None
        if isinstance(default, (tuple, dict)):
            kind, default = str, ",".join(default)
        option = Annotated[kind, typer.Option(help=setting.metadata["help"])]
        yield inspect.Parameter(setting.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=option)


def _function(name: str, option: str = "--model", names: str = "networks go to --arch") -> str:
    if ":" not in name:
        raise MfpError(f"{option} {name}: write package:function (names of {names})")
    return name


def _data(data: str | None, dataset: str | None) -> str | None:
    """What --data or --dataset says, as one specification."""
    from mfp.train.datasets import OWN

    if dataset and data:
        raise MfpError(f"--data {data} and --dataset {dataset}: give one of the two")
    if data and data.startswith(OWN):
        raise MfpError(f"--data {data}: code of yours is imported only by --dataset package:function")
    return OWN + _function(dataset, "--dataset", "data sets go to --data") if dataset else data


parameters = [
    parameter
    for parameter in inspect.signature(prune, eval_str=True).parameters.values()
    if parameter.kind is not inspect.Parameter.VAR_KEYWORD
]
prune.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # typer reads it
    [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters] + list(_options())
)
prune.__annotations__ = {name: p.annotation for name, p in prune.__signature__.parameters.items()}
app.command()(prune)


def _print_result(result: dict[str, Any], output: Path, recipe_name: str | None) -> None:
    from mfp.train.datasets import short_name
    from mfp.train.recipes import recipe

    console = Console(highlight=False)
    table = Table(title=f"{result['config']['arch']} on {short_name(result['config']['data'])}")
    for column in ("", "dense", "masked", "compact"):
        table.add_column(column, justify="left" if not column else "right")
    networks = [result[name] for name in ("dense", "masked", "compact")]

    def row(title: str, key: str, form: str) -> None:
        table.add_row(title, *(form.format(network[key]) if key in network else "-" for network in networks))

    row("test accuracy, % (top-1)", "top1", "{:.2f}")
    if result["masked"]["top5"] < 100:
        row("test accuracy, % (top-5)", "top5", "{:.2f}")
    row("FLOPs (multiply-adds)", "flops", "{:,}")
    row("parameters", "parameters", "{:,}")
    row(f"ms per image (batch {result['timing_batch']})", "milliseconds", "{:.3f}")
    console.print(table)
    _print_choice(console, result["choice"])
    dense, compact = result["dense"], result["compact"]
    saved = {key: 1 - compact[key] / dense[key] for key in ("flops", "parameters", "milliseconds")}
    trained, validation, tested = result["images"]
    lines = [
        f"images: {trained:,} for training, {validation:,} for validation, {tested:,} for testing",
        "saved: " + ", ".join(f"{100 * share:.1f} % of the {NAMES[key]}" for key, share in saved.items())
        + " (both with BatchNorm folded, in their faster memory format)",
        f"largest difference between masked and compact outputs: {result['difference']:.1e} of the largest output",
        f"criterion chosen at each pruning point: {_runs(result['criteria'])}",
        f"run directory: {output} (the smaller network: {output / 'compact.mfp'})",
    ]  # fmt: skip
    published = recipe(recipe_name).published if recipe_name else {}
    if published:
        numbers = ", ".join(f"{key} {value:g} %" for key, value in published.items())
        lines.append(f"published for {recipe_name}: {numbers} (FPGM, tables 1 and 2)")
    for line in lines:
        console.print(line, soft_wrap=True)


def _print_choice(console: Console, choice: dict[str, Any]) -> None:
    """What each candidate alone would have given at the last pruning point."""
    values, accuracies = choice["neighbours"], choice["hindsight"]
    if not values:
        return
    table = Table(title=f"by each criterion alone, after epoch {choice['epoch'] + 1} (→ chosen)")
    for column in ("", f"calibration {choice['attribute']}", "validation accuracy, %"):
        table.add_column(column, justify="right" if column else "left", no_wrap=not column)
    for name in sorted(values, key=lambda name: abs(values[name] - choice["before"])):
        mark = "→ " if name == choice["chosen"] else "  "
        table.add_row(mark + name, f"{values[name]:.4g}", f"{accuracies[name]:.2f}" if accuracies else "-")
    console.print(table)
    if accuracies:
        from mfp.train.evaluation import regret_of

        regret, ahead = regret_of(accuracies, choice["chosen"])
        console.print(f"the choice was {regret:.2f} points behind the best of them and {ahead:.2f} ahead of their mean "
                      f"(before pruning: {choice['attribute']} {choice['before']:.4g})", soft_wrap=True)  # fmt: skip


def _runs(names: list[str]) -> str:
    """["a", "a", "b"] as "a x2, b"."""
    groups: list[list[Any]] = []
    for name in names:
        if groups and groups[-1][0] == name:
            groups[-1][1] += 1
        else:
            groups.append([name, 1])
    return ", ".join(name if count == 1 else f"{name} x{count}" for name, count in groups)


# ---- the other commands


@app.command()
def compact(
    checkpoint: Annotated[Path, typer.Argument(help="a run directory, or a checkpoint of one")],
    output: Annotated[Path, typer.Option(help="file to write")] = Path("small.mfp"),
    fold_bn: Annotated[bool, typer.Option("--fold-bn", help="fold BatchNorm into the convolutions")] = False,
    model: Annotated[str | None, typer.Option(help="package:function that built the network of the run")] = None,
) -> None:
    """Remove the pruned filters of a checkpoint: write the smaller network, say what was removed and what it saves."""
    import torch

    import mfp
    from mfp.export import dense_like
    from mfp.train.evaluation import milliseconds_per_image
    from mfp.train.load import load_masked

    masked, image_shape = load_masked(checkpoint, _function(model) if model else None)
    example = torch.zeros(1, *image_shape)
    small = mfp.compact(masked, example, fold_bn=fold_bn)
    mfp.save(small, output)
    serving = {
        name: mfp.compact(network, example, fold_bn=True)
        for name, network in (("full", dense_like(masked)), ("masked", masked))
    }
    times = milliseconds_per_image(serving, torch.randn(8, *image_shape))
    print(small.report)
    print(f"milliseconds per image {times['full']:.3g} → {times['masked']:.3g} (8 at a time, BatchNorm folded)")
    print(f"{output}: {output.stat().st_size:,} bytes")


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="a run directory, a checkpoint of one, or a file of mfp.save")],
    output: Annotated[Path, typer.Argument(help="file to write: .onnx, .xml (OpenVINO) or .pt2 (torch.export)")],
    verify: Annotated[bool, typer.Option("--verify", help="compare the engine's outputs with torch's")] = False,
    measure: Annotated[bool, typer.Option("--measure", help="time the dense and the compact network")] = False,
    engine: Annotated[str | None, typer.Option(help="that runs the file: onnxruntime, openvino, torch.compile")] = None,
    batch: Annotated[str, typer.Option(help="images at a time for --measure, with commas")] = "1,8",
    model: Annotated[str | None, typer.Option(help="package:function that built the network of the run")] = None,
) -> None:
    """Write a pruned network for the engine that serves it: BatchNorm folded, plain additions, any batch size."""
    import torch

    import mfp
    from mfp.export import engines, export_and_arguments
    from mfp.train.load import load_masked

    engine = engine or engines.SERVES.get(output.suffix)
    if (verify or measure) and engine:
        engines.check_engine(engine)
    batches = _whole_numbers("--batch", batch)
    if source.suffix == ".mfp":
        network, example = mfp.load(source), None
    else:
        network, image_shape = load_masked(source, _function(model) if model else None)
        example = torch.zeros(1, *image_shape)
    report, arguments = export_and_arguments(network, output, example)
    print(report)
    if verify:
        sizes = (1, 3) if report.free_batch else (len(next(iter(arguments.values()))),)
        for size, apart in engines.verify(output, network.eval(), arguments, engine, sizes).items():
            print(f"{engine}, batch {size}: outputs differ from torch's by {apart:.1e} of the largest")
    if measure:
        _print_times(engine, output, None if source.suffix == ".mfp" else network, arguments, report, batches)


def _whole_numbers(name: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise MfpError(f"{name} {text!r}: write whole numbers, as 1,8")
    return numbers


def _print_times(engine: str, file: Path, masked: Any, arguments: dict, report: Any, batches: list[int]) -> None:
    import tempfile

    import mfp
    from mfp.export import dense_like, engines

    with tempfile.TemporaryDirectory() as directory:
        contestants, counts = {"compact": (engine, file)}, {"compact": report.flops_exported}
        if masked is not None:
            dense = mfp.export(dense_like(masked), Path(directory) / f"dense{file.suffix}", arguments)
            contestants = {"dense": (engine, dense.files[0]), **contestants}
            counts["dense"] = dense.flops_exported
        with Progress(transient=True) as progress:
            task = progress.add_task(f"measuring in {engine}", total=len(contestants) * engines.ROUNDS)
            advance = lambda: progress.advance(task)  # noqa: E731
            times = engines.measure(contestants, engines.one_image(arguments), batches, advance=advance)
    table = Table(title=f"ms a call in {engine}, medians of {engines.ROUNDS} rounds, each in a process of its own")
    for column in ("", "multiply-adds", *(f"batch {size}" for size in batches)):
        table.add_column(column, justify="right" if column else "left")
    for label, found in times.items():
        table.add_row(label, f"{counts[label]:,}", *(f"{found[size]:.2f}" for size in batches))
    if masked is not None:
        saved = (1 - times["compact"][size] / times["dense"][size] for size in batches)
        table.add_row("saved", f"{1 - counts['compact'] / counts['dense']:.1%}", *(f"{share:.1%}" for share in saved))
    Console(highlight=False).print(table)
    if masked is None:
        print("a file of mfp.save does not hold the dense network: give the run to measure both")


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="a file of mfp.save, a run directory, or a checkpoint of one")],
    data: Annotated[str | None, typer.Option(help="as for mfp prune; digits if not given")] = None,
    dataset: Annotated[str | None, typer.Option(help="package:function of yours that returns the data")] = None,
    batch: Annotated[int, typer.Option(help="images at a time")] = 128,
    workers: Annotated[int, typer.Option(help="processes that load images")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    function: Annotated[str | None, typer.Option("--model", help="package:function of the run's network")] = None,
) -> None:
    """Accuracy of a masked or a compact network on the test images."""
    import mfp
    from mfp.train.data import load_data
    from mfp.train.distributed import join
    from mfp.train.evaluation import evaluate as measure
    from mfp.train.load import load_network

    spec = _data(data, dataset) or "digits"
    network = load_network(model, _function(function) if function else None)
    images = load_data(spec)
    network.to(join(device).device)
    metrics = measure(network, images.test, batch, workers)
    flops = mfp.flops(network, images.example().to(next(network.parameters()).device))
    print(f"{model}: top-1 {metrics['top1']:.2f} %, top-5 {metrics['top5']:.2f} %, loss {metrics['loss']:.4f} "
          f"on {metrics['images']:,} images; {flops:,} FLOPs")  # fmt: skip


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="a run directory")],
    output: Annotated[Path | None, typer.Option(help="file to write; RUN/report.html if not given")] = None,
) -> None:
    """One self-contained HTML page about a run."""
    from mfp.report import write_report

    print(write_report(run, output))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def bench(ctx: typer.Context) -> None:
    """Measure this machine: see `mfp bench --help`."""
    from mfp.bench import main as measure

    measure(ctx.args)


@app.command()
def info() -> None:
    """What runs here, and why the rest does not."""
    import platform

    import torch

    import mfp
    from mfp import backend

    print(f"mfp {mfp.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"{torch.get_num_threads()} threads, {torch.cuda.device_count()} GPUs")
    for name, entry in backend.backends().items():
        print(f"backend {name}: {entry.unusable or 'runs'}")
    for key, value in (backend.build_info() or {}).items():
        print(f"built with {key}: {value}")
    for switch in SWITCHES:
        print(f"switch {switch}: {os.environ.get(switch, 'not set')}")
