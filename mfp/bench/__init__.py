"""`mfp bench`: what pruning costs on this machine, beside what it costs by other means, each result checked first."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence

from rich.console import Console

from mfp.bench import results
from mfp.plan import RESIDUAL

ENGINES_HELP = (
    "dense against compact in the engines that serve, instead: names with commas, of onnxruntime, openvino, mfp, "
    "torch.compile, tensorrt (default: the first three, as far as installed)"
)
# Of the environment: they change speeds.
SWITCHES = ("MFP_CPU_ISA", "MFP_WINOGRAD", "MFP_BACKEND", "ONEDNN_MAX_CPU_ISA")


def main(arguments: Sequence[str]) -> None:
    """Run `mfp bench` with these command-line arguments."""
    parser = argparse.ArgumentParser(prog="mfp bench", description=__doc__)
    parser.add_argument("--arch", help="network; several with commas for --compact and --engines (default: resnet50, "
                        "or those of the documents)")  # fmt: skip
    parser.add_argument("--rate", type=float, default=0.4, help="share of filters pruned (default: 0.4)")
    parser.add_argument("--json", metavar="FILE", help="also write a result file, as those of benchmarks/results/")
    parser.add_argument("--overhead", action="store_true", help="what pruning adds to an ImageNet epoch, instead")
    parser.add_argument("--compact", action="store_true", help="dense against compact networks, instead")
    parser.add_argument("--layers", action="store_true", help="each layer, dense and pruned, also in engines, instead")
    parser.add_argument("--training", action="store_true", help="training steps of the smaller network, instead")
    parser.add_argument("--engines", nargs="?", const="", metavar="NAMES", help=ENGINES_HELP)
    parser.add_argument("--batch", help="images in a batch, with commas (default: 8; of --engines and --layers 1,8)")
    parser.add_argument("--residual", choices=RESIDUAL, default="index", help="form, for --layers (default: index)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda, for --engines (default: cpu)")
    options = parser.parse_args(arguments)
    usual = "1,8" if options.layers or options.engines is not None else "8"
    try:
        batches = [int(part) for part in (options.batch or usual).split(",")]
    except ValueError:
        parser.error(f"--batch {options.batch}: write a number, or several with commas")
    archs = options.arch.split(",") if options.arch else None
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    if options.engines is not None:
        from mfp.bench import engines

        chosen = options.engines.split(",") if options.engines else engines.usual_engines()
        networks = archs or engines.NETWORKS
        report = engines.measure_networks(networks, chosen, options.rate, batches, console, options.device)
        printer = engines.print_table
    elif options.layers:
        from mfp.bench import layers

        report = layers.measure(options.arch or "resnet50", options.rate, batches, console, options.residual)
        printer = layers.print_table
    elif options.compact:
        from mfp.bench import compaction

        report = compaction.measure(archs or compaction.NETWORKS, options.rate, batches, console)
        printer = compaction.print_table
    elif options.training:
        from mfp.bench import training

        report = training.measure(options.arch or "resnet50", options.rate, batches[0], console)
        printer = training.print_table
    elif options.overhead:
        from mfp.bench import overhead

        report = overhead.measure(options.arch or "resnet50", options.rate, batches[0], console)
        printer = overhead.print_table
    else:
        from mfp.bench import table

        report = table.measure(options.arch or "resnet50", options.rate, console)
        printer = table.print_table
    printer(report, console)
    if options.json:
        results.write(options.json, _command(arguments), _with_settings(report))


def _command(arguments: Sequence[str]) -> str:
    """As it was typed, but for --json, which changes no number; with the switches that do."""
    kept, skip = [], False
    for argument in arguments:
        if not (skip or argument.startswith("--json")):
            kept.append(argument)
        skip = argument == "--json"
    switches = [f"{name}={os.environ[name]}" for name in SWITCHES if name in os.environ]
    return shlex.join([*switches, "mfp", "bench", *kept])


def _with_settings(report: dict) -> list[dict]:
    """The rows, each with the settings that hold for all of them."""
    settings = report | report.get("network", {})
    shared = {key: value for key, value in settings.items() if isinstance(value, str | int | float)}
    return [shared | row for row in report["rows"]]
