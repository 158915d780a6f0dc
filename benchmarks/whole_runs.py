"""Whole runs of training, dense, masked to the end, and smaller from where the mask holds: how long they take and how
they end.

    python benchmarks/whole_runs.py --fashion-mnist PATH --json benchmarks/results/whole-runs.json

"demo" is what `mfp prune` does without options, with two seeds. "ten epochs" is a schedule whose mask holds
after the fourth of ten epochs (as after the 40th of 100), on a part of Fashion-MNIST. Nothing else
should run on the machine.
"""

import argparse
import csv
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import track

from mfp.bench import results
from mfp.train.config import RunConfig
from mfp.train.data import load_data
from mfp.train.recipes import recipe
from mfp.train.run import run

TRAIN, TEST = 12800, 1000  # images of Fashion-MNIST
PATH = "FASHION_MNIST"  # the environment variable that tells the run's --dataset where they are


def part_of_fashion_mnist() -> dict:
    data = load_data(f"fashion-mnist:{os.environ[PATH]}")
    train, test = ([part[0, i] for i in range(n)] for part, n in ((data.plain, TRAIN), (data.test, TEST)))
    return {"train": train, "test": test, "num_classes": data.num_classes}


def schedules() -> Iterator[tuple[str, RunConfig]]:
    """Names and settings of the runs, each to be done with and without shrinking."""
    for seed in (0, 1):
        yield "demo", RunConfig(**recipe("demo").settings, seed=seed)
    own = {"data": "dataset:whole_runs:part_of_fashion_mnist", "epochs": 10, "settle": 0.6, "validation": 0.02}
    yield "ten epochs", RunConfig(arch="resnet18", residual="coupled", **own)


def rows_of(name: str, config: RunConfig, directory: Path) -> Iterator[dict]:
    """One run in both ways: a row for the dense network, the masked one and the one that shrinks."""
    for shrink in (False, True):
        where = directory / f"{config.arch}-{config.residual}-{config.seed}-{shrink}"
        found = run(replace(config, shrink=shrink, dense=not shrink), where)
        about = {"schedule": name, "arch": config.arch, "residual": config.residual, "seed": config.seed}
        for network, key in (("dense", "dense"), ("smaller" if shrink else "masked", "pruned")):
            if (where / key / "epochs.csv").exists():
                with (where / key / "epochs.csv").open() as file:
                    seconds = sum(float(row["seconds"]) for row in csv.DictReader(file))
                end = found["dense" if key == "dense" else "masked"]
                flops = found["dense" if key == "dense" else "compact"]["flops"]
                yield about | {"network": network, "seconds": seconds, "top1": end["top1"], "flops": flops}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fashion-mnist", metavar="PATH", required=True, help="the directory of its files")
    parser.add_argument("--json", required=True, metavar="FILE", help="the result file")
    options = parser.parse_args()
    os.environ[PATH] = options.fashion_mnist
    todo, rows = list(schedules()), []
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as directory:
        for i, (name, config) in enumerate(track(todo, "runs", console=console)):
            rows += rows_of(name, config, Path(directory) / str(i))
            for row in rows[-3:]:
                console.print(row)
    results.write(options.json, f"python benchmarks/whole_runs.py --fashion-mnist PATH --json {options.json}", rows)


if __name__ == "__main__":
    main()
