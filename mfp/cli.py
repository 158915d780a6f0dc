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
from rich.table import Table

from mfp import commands
from mfp.commands import data_name, function_name
from mfp.errors import MfpError

if TYPE_CHECKING:
    from mfp.train.config import RunConfig

USERS_MISTAKE, FAILURE = 2, 1
NAMES = {"flops": "FLOPs", "parameters": "parameters", "milliseconds": "time"}

app = typer.Typer(
    help="Filter pruning of convolutional networks, down to a smaller network that is really faster.",
    no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich",
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
        given["arch"] = function_name(model)
    if dataset or "data" in given:
        given["data"] = data_name(given.get("data"), dataset)
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
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


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


#: What `mfp prune --help` shows together. An option that is in no other group is in the last.
PANELS = {
    "What matters first": ("arch", "data", "rate", "epochs", "output"),
    "What is pruned, and how": (
        "criteria", "attribute", "mode", "one_way", "residual", "channel_multiple", "skip", "layer_rates", "interval",
        "settle", "per_layer", "mask_bn", "recalibrate", "calibration_batches",
    ),
    "A cost instead of a rate": ("target_flops", "target_parameters", "target_milliseconds", "engine", "allocate"),
    "Network and data": ("recipe", "weights", "model", "dataset", "validation", "download"),
    "Optimisation": (
        "batch", "accumulate", "lower_accumulate", "lr", "momentum", "nesterov", "weight_decay", "schedule",
        "milestones", "gamma", "warmup_epochs", "clip", "label_smoothing", "ema", "precision", "channels_last",
        "compile", "seed",
    ),
    "The run": ("resume", "dense", "workers", "device", "timeout", "checkpoint_every", "tensorboard"),
}  # fmt: skip


def _in_panels(parameters: list[inspect.Parameter]) -> list[inspect.Parameter]:
    """The options of `mfp prune` in the order of PANELS, each in its group."""
    places = {name: (panel, place) for panel, names in PANELS.items() for place, name in enumerate(names)}
    last, order = list(PANELS)[-1], list(PANELS)

    def place(parameter: inspect.Parameter) -> tuple[int, int]:
        panel, number = places.get(parameter.name, (last, len(parameters)))
        return (order.index(panel), number) if parameter.name != "ctx" else (-1, 0)

    for parameter in parameters:
        for option in getattr(parameter.annotation, "__metadata__", ()):
            option.rich_help_panel = places.get(parameter.name, (last, 0))[0]
    return sorted(parameters, key=place)


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


parameters = [
    parameter
    for parameter in inspect.signature(prune, eval_str=True).parameters.values()
    if parameter.kind is not inspect.Parameter.VAR_KEYWORD
]
prune.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # typer reads it
    _in_panels([parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters] + list(_options()))
)
prune.__annotations__ = {name: p.annotation for name, p in inspect.signature(prune).parameters.items()}
app.command()(prune)
for command in (commands.compact, commands.export, commands.evaluate, commands.report):
    app.command()(command)
through = {"allow_extra_args": True, "ignore_unknown_options": True}  # mfp/bench reads its options itself
app.command(context_settings=through, add_help_option=False)(commands.bench)
app.command()(commands.info)


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
