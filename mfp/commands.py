"""The commands beside `mfp prune`: compact, export, evaluate, report, bench, info; mfp/cli.py registers them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mfp.errors import MfpError

SWITCHES = (
    "MFP_BACKEND",
    "MFP_CPU_ISA",
    "MFP_WINOGRAD",
    "MFP_DEBUG",
    "MFP_CUDA",
    "MFP_EXTENSION",
    "TORCH_CUDA_ARCH_LIST",
)  # setup.py explains them


def function_name(name: str, option: str = "--model", names: str = "networks go to --arch") -> str:
    if ":" not in name:
        raise MfpError(f"{option} {name}: write package:function (names of {names})")
    return name


def data_name(data: str | None, dataset: str | None) -> str | None:
    """What --data or --dataset says, as one specification."""
    from mfp.train.datasets import OWN

    if dataset and data:
        raise MfpError(f"--data {data} and --dataset {dataset}: give one of the two")
    if data and data.startswith(OWN):
        raise MfpError(f"--data {data}: code of yours is imported only by --dataset package:function")
    return OWN + function_name(dataset, "--dataset", "data sets go to --data") if dataset else data


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

    masked, image_shape = load_masked(checkpoint, function_name(model) if model else None)
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

    engine = engine or engines.SERVES.get(output.suffix, "")
    if (verify or measure) and engine:
        engines.check_engine(engine)
    batches = _whole_numbers("--batch", batch)
    if source.suffix == ".mfp":
        network, example = mfp.load(source), None
    else:
        network, image_shape = load_masked(source, function_name(model) if model else None)
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
    table = Table(title=f"ms a call in {engine}, the fastest of {engines.ROUNDS} rounds, each in a process of its own")
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

    spec = data_name(data, dataset) or "digits"
    network = load_network(model, function_name(function) if function else None)
    images = load_data(spec)
    network.to(join(device).device)
    metrics = measure(network, images.test, batch, workers)
    flops = mfp.flops(network, images.example().to(next(network.parameters()).device))
    print(f"{model}: top-1 {metrics['top1']:.2f} %, top-5 {metrics['top5']:.2f} %, loss {metrics['loss']:.4f} "
          f"on {metrics['images']:,} images; {flops:,} FLOPs")  # fmt: skip


def report(
    run: Annotated[Path, typer.Argument(help="a run directory")],
    output: Annotated[Path | None, typer.Option(help="file to write; RUN/report.html if not given")] = None,
) -> None:
    """One self-contained HTML page about a run."""
    from mfp.report import write_report

    print(write_report(run, output))


def bench(ctx: typer.Context) -> None:
    """Measure this machine: see `mfp bench --help`."""
    from mfp.bench import main as measure

    measure(ctx.args)


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
    for name, entry in backend.backends().items():
        if entry.unusable:
            print(f"to run {name}: {entry.remedy}")
