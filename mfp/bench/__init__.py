"""`mfp bench`: what pruning costs on this machine, beside what it costs by other means, each result checked first."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from rich.console import Console

ENGINES_HELP = (
    "dense against compact in the engines that serve, instead: names with commas, of onnxruntime, openvino, mfp, "
    "torch.compile, tensorrt (default: the first three, as far as installed)"
)


def main(arguments: Sequence[str]) -> None:
    """Run `mfp bench` with these command-line arguments."""
    parser = argparse.ArgumentParser(prog="mfp bench", description=__doc__)
    parser.add_argument("--arch", help="network (default: resnet50; for --compact ResNet-18, 34, 50 and 101)")
    parser.add_argument("--rate", type=float, default=0.4, help="share of filters pruned (default: 0.4)")
    parser.add_argument("--json", action="store_true", help="print the numbers for machines")
    parser.add_argument("--overhead", action="store_true", help="what pruning adds to an ImageNet epoch, instead")
    parser.add_argument("--compact", action="store_true", help="dense against compact networks, instead")
    parser.add_argument("--layers", action="store_true", help="the serving form layer by layer, instead")
    parser.add_argument("--engines", nargs="?", const="", metavar="NAMES", help=ENGINES_HELP)
    parser.add_argument("--batch", help="images in a batch of --overhead, --compact (default: 8), of the others (1,8)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda, for --engines (default: cpu)")
    options = parser.parse_args(arguments)
    usual = "1,8" if options.layers or options.engines is not None else "8"
    try:
        batches = [int(part) for part in (options.batch or usual).split(",")]
    except ValueError:
        parser.error(f"--batch {options.batch}: write a number, or several with commas")
    console = Console(stderr=options.json, highlight=False)
    if not console.is_terminal:
        console.width = 120
    if options.engines is not None:
        from mfp.bench import engines

        archs = [options.arch] if options.arch else engines.NETWORKS
        chosen = options.engines.split(",") if options.engines else engines.usual_engines()
        report = engines.measure_networks(archs, chosen, options.rate, batches, console, options.device)
        printer = engines.print_table
    elif options.layers:
        from mfp.bench import layers

        report = layers.measure(options.arch or "resnet50", options.rate, batches, console)
        printer = layers.print_table
    elif options.compact:
        from mfp.bench import compaction

        archs = [options.arch] if options.arch else compaction.NETWORKS
        report = compaction.measure(archs, options.rate, batches[0], console)
        printer = compaction.print_table
    elif options.overhead:
        from mfp.bench import overhead

        report = overhead.measure(options.arch or "resnet50", options.rate, batches[0], console)
        printer = overhead.print_table
    else:
        from mfp.bench import table

        report = table.measure(options.arch or "resnet50", options.rate, console)
        printer = table.print_table
    print(json.dumps(report, indent=1)) if options.json else printer(report, console)
