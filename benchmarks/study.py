"""Does switching between criteria help, and do rates that suit the layers? A study that anyone can repeat.

    python benchmarks/study.py --data fashion-mnist:PATH --output runs/study
    python benchmarks/study.py --data cifar10:PATH --output runs/cifar --epochs 30
    python benchmarks/study.py --data imagenet:PATH --arch resnet50 --weights pretrained --output runs/imagenet
    python benchmarks/study.py --output runs/study --page docs/accuracy.md     # only the page, from what is there

Every run's rows are added to OUTPUT/results.csv when it is done, whole or not at all; started again, the command does
what is missing (training goes on from its last checkpoint). The page is written at the end of each call with --page.

The settings of a row: "dense" (the trained network), "once" (pruned once, nothing trained after), "finetune" (pruned
once, the mask held), "scratch" (trained and pruned softly by turns from the start). What MFP chooses among networks
that were pruned once follows from the attributes of the candidates, which stand in the rows of "once".
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from study_page import write_page
from study_runs import ALLOCATED_BY, BASELINES, CRITERIA, SCRATCH, STAGES, SWITCHING, Job, Table, planned
from torch import nn
from torch.utils.data import Subset

import mfp
from mfp.atomic import write_atomically
from mfp.attributes import WITHOUT_DATA, measure
from mfp.bench.measure import machine
from mfp.errors import MfpError
from mfp.neighbours import trying
from mfp.scores import FilterScores
from mfp.sensitivity import Sensitivities
from mfp.targets import Costs
from mfp.train.config import RunConfig
from mfp.train.data import ImageData, SeededDataset, derive_seed, epoch_order, load_data
from mfp.train.datasets import short_name
from mfp.train.distributed import World
from mfp.train.engine import Interrupted, Trainer
from mfp.train.evaluation import evaluate
from mfp.train.progress import Reporter
from mfp.train.run import calibration_batches, make_network, make_pruner
from mfp.variants import Variants


class Baseline(mfp.FilterPruner):
    """Prunes by what no criterion says: at each pruning point, filters drawn anew, or those with the highest norms."""

    def __init__(self, method: str, seed: int, model: nn.Module, rate: float, example, calibration) -> None:
        # with a single criterion its score would not be asked for; here both get the same ones
        two = ("l1_norm", "l2_norm")
        super().__init__(model, rate, criteria=two, calibration=calibration, recalibrate=True, example_input=example)
        self.method, self.seed = method, seed

    def score(self, plan: mfp.FilterPlan | None = None, more: Sequence[str] = ()) -> FilterScores:
        found = super().score(plan, more)
        scores = baselines(found["l2_norm"], derive_seed(self.seed, "random", len(self.decisions)))[self.method]
        return FilterScores(found.plan, {name: scores.clone() for name in found})


def baselines(norms: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
    """Scores ``[F]`` of each of BASELINES, from the filters' norms."""
    drawn = torch.rand(len(norms), generator=torch.Generator().manual_seed(seed))
    return {"random": drawn.to(norms.device), "worst": -norms}


class Study:
    """All runs on one data set and network; how each is done."""

    def __init__(self, options: argparse.Namespace, reporter: Reporter) -> None:
        self.options, self.reporter = options, reporter
        self.directory = Path(options.output)
        self.world = World(device=torch.device(options.device))
        self.data = lru_cache(1)(self._data)
        self.dense = lru_cache(1)(self._dense)
        self.calibration = lru_cache(1)(self._calibration)
        self.table = Table(self.directory / "results.csv")

    def run(self) -> None:
        """Does what is missing."""
        jobs, on = list(planned(self.options)), "{processor}, {date}, commit {commit}".format(**describe(self.options))
        missing = [job for job in jobs if not self.table.has(job)]
        self.reporter.say(f"{len(jobs) - len(missing)} of {len(jobs)} runs are there")
        for number, job in enumerate(missing, len(jobs) - len(missing) + 1):
            start = time.perf_counter()
            rows = getattr(self, f"run_{job.setting}")(job)
            seconds = time.perf_counter() - start
            self.table.add([{**vars(job), **row, "seconds": seconds / len(rows), "on": on} for row in rows])
            about = f"{job.setting} {job.rates} {job.method}, seed {job.seed}, {seconds:.0f} s"
            self.reporter.say(f"{number} of {len(jobs)}: {about}")

    # ---- the runs: each returns its rows

    def run_dense(self, job: Job) -> list[dict[str, Any]]:
        return [{"method": "unpruned", "accuracy": self.accuracy(self.dense(job.seed), job.seed)}]

    def run_once(self, job: Job) -> list[dict[str, Any]]:
        """Every method at the same rates: the attributes with the dense network's BatchNorm statistics ("raw"), and the
        attributes and the accuracy with re-estimated ones."""
        model, calibration = self.dense(job.seed), self.calibration(job.seed)
        rates, flops = self.rates(job.seed, job.rates)
        scores, masks = self.masks(model, job, rates)
        variants = Variants(model, calibration)
        with self.autocast():
            found = variants.run([None, *masks.values()], calibration)
        rows = []
        with trying(model, list(masks.values()), mask_bn=True) as trial:
            for method, variant in zip(("unpruned", *masks), found, strict=True):
                row = {"method": method, "flops": flops if method in masks else 1.0}
                keep = masks[method].keep if method in masks else torch.ones_like(next(iter(masks.values())).keep)
                row |= {name: attribute(scores, keep) for name, attribute in WITHOUT_DATA.items()} | variant.metrics

                def look(_, row=row, statistics=variant.statistics) -> float:
                    with self.autocast():
                        row |= {f"{name} raw": value for name, value in measure(model, calibration).items()}
                    variants.settle_(statistics, calibration)
                    row["accuracy"] = self.accuracy(model, job.seed)
                    return 0.0

                trial.measure(masks.get(method), look)
                rows.append(row)
        return rows

    def run_finetune(self, job: Job) -> list[dict[str, Any]]:
        """The mask of the pruned network holds for some images more."""
        model = make_network(self.config(job.seed), self.data(job.seed), self.world)
        model.load_state_dict(self.dense(job.seed).state_dict())
        rates, flops = self.rates(job.seed, job.rates)
        mask = self.masks(model, job, rates)[1][job.method]
        data = self.some_of(job, self.options.finetune_images)
        config = self.config(job.seed, epochs=1, lr=self.options.finetune_lr)
        pruner = mfp.FilterPruner(model, **rates, criteria=(ALLOCATED_BY,), mode="hard", example_input=data.example())
        pruner.mask = mfp.FilterMask(pruner.plan, mask.keep)
        pruner.step(0)  # zeroes what the mask says
        trainer = self.train(config, data, model, job, pruner)
        return [{"flops": flops, "accuracy": self.accuracy(trainer.masked_model, job.seed)}]

    def run_scratch(self, job: Job) -> list[dict[str, Any]]:
        """Trained from the start, pruned softly after each epoch; in the last epochs the mask holds."""
        how = {"criteria": (job.method,)} if job.method in CRITERIA else {}
        if job.method in SWITCHING:
            name, _, papers = job.method.removeprefix("mfp ").partition(", ")
            how = {"criteria": mfp.PAPER_CRITERIA, "attribute": name, "recalibrate": False if papers else None}
        config = self.config(job.seed, epochs=self.options.scratch_epochs, rate=float(job.rates), settle=0.5, **how)
        data = self.some_of(job, self.options.scratch_images)
        model = make_network(config, data, self.world)
        if job.method in BASELINES:
            example = data.example().to(self.world.device)
            calibration = calibration_batches(config, data, self.world)
            pruner: mfp.FilterPruner = Baseline(job.method, job.seed, model, config.rate, example, calibration)
        else:
            pruner = make_pruner(config, model, data, self.world)
        trainer = self.train(config, data, model, job, pruner)
        chosen = [row["criterion"] for row in trainer.history if "criterion" in row and job.method not in BASELINES]
        return [{"accuracy": self.accuracy(trainer.masked_model, job.seed), "chosen": " ".join(chosen)}]

    # ---- what the runs share

    def config(self, seed: int, **settings: Any) -> RunConfig:
        options = self.options
        common = {"arch": options.arch, "data": options.data, "weights": options.weights, "batch": options.batch}
        common |= {"epochs": options.epochs, "lr": options.lr, "precision": options.precision, "seed": seed}
        return RunConfig(**common | {"workers": options.workers, "device": options.device} | settings)

    def _data(self, seed: int) -> ImageData:
        return load_data(self.options.data, seed, validation=self.options.validation, download=self.options.download)

    def some_of(self, job: Job, count: int) -> ImageData:
        """The data with that many of the training images, drawn by the seed; 0: with all."""
        full = self.data(job.seed)
        some = epoch_order(len(full.train), derive_seed(job.seed, job.setting), 0)[: count or len(full.train)]
        return replace(full, train=SeededDataset(Subset(full.train.source, some), full.train.transform, job.seed))

    def _calibration(self, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        size = min(128, self.options.calibration)
        config = self.config(seed, batch=size, calibration_batches=self.options.calibration // size)
        batches = calibration_batches(config, self.data(seed), self.world)
        return [(images.contiguous(memory_format=torch.channels_last), targets) for images, targets in batches]

    def _dense(self, seed: int) -> nn.Module:
        """The trained network of a seed; with --weights the given one: then seeds differ in the calibration images."""
        config, data = self.config(seed), self.data(seed)
        model = make_network(config, data, self.world)
        if self.options.weights is None:
            trainer = Trainer(config, data, model, self.directory / f"dense-{seed}", world=self.world,
                              reporter=self.reporter)  # fmt: skip
            trainer.resume()
            trainer.fit()
        return model.eval()

    def train(self, config: RunConfig, data: ImageData, model: nn.Module, job: Job, pruner: Any) -> Trainer:
        """Trains with a pruner, from a checkpoint where the same run was stopped; what it leaves on the disk goes."""
        directory = self.directory / "-".join(map(str, vars(job).values())).replace(" ", "_")
        trainer = Trainer(config, data, model, directory, pruner, self.world, self.reporter)
        trainer.optimizer.mask = pruner.mask
        trainer.resume()
        trainer.fit()
        shutil.rmtree(directory)
        return trainer

    def masks(self, model: nn.Module, job: Job, rates: dict[str, Any]) -> tuple[FilterScores, dict[str, Any]]:
        """Scores and masks of all methods; at rates for a share of the FLOPs of one criterion alone."""
        data = self.data(job.seed)
        plan = mfp.FilterPlan.from_model(model, example_input=data.example().to(self.world.device), **rates)
        needed = (job.method, "l2_norm") if job.method in CRITERIA and job.method != "l2_norm" else ("l2_norm",)
        needed = CRITERIA if job.setting == "once" else needed
        scores = mfp.score_filters(plan, needed, calibration=self.calibration(job.seed))
        others = baselines(scores["l2_norm"], derive_seed(job.seed, "random", job.rates))
        everything = FilterScores(plan, scores.by_name | others)
        methods = (ALLOCATED_BY,) if "FLOPs" in job.rates else everything
        return scores, {method: mfp.select_filters(everything, method) for method in methods}

    def rates(self, seed: int, rates: str) -> tuple[dict[str, Any], float | None]:
        """Arguments of the plan, and the share of the FLOPs that is left where it was counted; kept in a file."""
        file = self.directory / f"dense-{seed}" / f"rates {rates}.json".replace(" ", "_")
        if not file.exists():
            found, flops = self._find_rates(seed, rates)
            write_atomically(file, json.dumps({"arguments": found, "flops": flops}).encode())
        content = json.loads(file.read_text())
        return content["arguments"], content["flops"]

    def _find_rates(self, seed: int, rates: str) -> tuple[dict[str, Any], float | None]:
        model, example = self.dense(seed), self.data(seed).example().to(self.world.device)
        if "FLOPs" not in rates:
            if seed:  # the same number of filters goes in every seed
                return {"rate": float(rates)}, None
            costs = Costs(model, example, {"flops": 1.0}, "mfp", ALLOCATED_BY, lambda text: None, {})
            return {"rate": float(rates)}, costs.of(1, rate=float(rates)) / costs.dense
        way, share = rates.removesuffix(" of FLOPs").split(", ")
        if way == "uniform":
            found = mfp.find_rate(model, example, target_flops=float(share), criterion=ALLOCATED_BY)
            return {"rate": found.rate}, found.reached / found.dense
        found = mfp.find_rates(
            model, example, calibration=self.calibration(seed), flops=float(share), criterion=ALLOCATED_BY,
            sensitivities=self._sensitivities(seed),
        )  # fmt: skip
        return {"rate": 0.0, "layer_rates": found.layer_rates}, found.reached / found.dense

    def _sensitivities(self, seed: int) -> Sensitivities:
        file = self.directory / f"dense-{seed}" / "sensitivities.json"
        if not file.exists():
            example = self.data(seed).example().to(self.world.device)
            with self.reporter.bar("sensitivities", 1, 0) as bar:
                found = mfp.measure_sensitivities(
                    self.dense(seed), example, self.calibration(seed), criterion=ALLOCATED_BY, advance=bar.at
                )
            write_atomically(file, json.dumps({"loss": found.loss, "losses": found.losses}).encode())
        content = json.loads(file.read_text())
        losses = {name: {float(rate): loss for rate, loss in row.items()} for name, row in content["losses"].items()}
        return Sensitivities(content["loss"], losses)

    def accuracy(self, model: nn.Module, seed: int) -> float:
        """Percent of the test images, or of --test-images of them, the same for all runs."""
        test = self.data(seed).test
        count = self.options.test_images or len(test)
        some = SeededDataset(Subset(test.source, epoch_order(len(test), 0, 0)[:count]), test.transform, seed)
        with self.autocast():
            return evaluate(model, some, 250, self.options.workers, self.world)["top1"]

    def autocast(self) -> torch.autocast:
        """The precision that everything runs in, not only training."""
        low = self.options.precision != "float32"
        return torch.autocast(self.world.device.type, getattr(torch, self.options.precision) if low else None, low)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--output", required=True, help="directory of the results")
    add("--data", help="as for mfp prune: fashion-mnist:PATH, imagenet:PATH, dataset:package:function, ...")
    add("--download", action="store_true", help="allow fetching the data")
    add("--arch", default="resnet20", help="as for mfp prune")
    add("--weights", help="a trained network to start from, as for mfp prune; without, one is trained for each seed")
    add("--stages", nargs="*", choices=STAGES, default=STAGES, help="what to do: all of them by default")
    add("--methods", nargs="*", choices=SCRATCH, default=SCRATCH, help="of what is pruned from scratch: all by default")
    add("--seeds", type=int, default=10, help="where nothing is trained after pruning")
    add("--training-seeds", type=int, default=3, help="where something is")
    add("--first-seed", type=int, default=0, help="to share the seeds among machines, each with an OUTPUT of its own")
    add("--rates", type=float, nargs="*", default=(0.2, 0.3, 0.4, 0.5, 0.6), help="the same for all layers")
    add("--flops", type=float, nargs="*", default=(0.5, 0.4), help="shares, for rates that suit the layers")
    add("--epochs", type=int, default=2, help="of the dense networks")
    add("--batch", type=int, default=128, help="images per optimiser step")
    add("--lr", type=float, default=0.1, help="highest learning rate")
    add("--finetune-images", type=int, default=12800, help="in one pass after pruning")
    add("--finetune-lr", type=float, default=0.02, help="highest learning rate there")
    add("--scratch-epochs", type=int, default=8, help="of those pruned from scratch; in the last half the mask holds")
    add("--scratch-images", type=int, default=12800, help="in each of these epochs")
    add("--calibration", type=int, default=1024, help="training images that attributes and taylor look at")
    add("--test-images", type=int, default=0, help="how many of them to test on; 0: all")
    add("--validation", type=float, default=0.01, help="share of the training images that show how training goes")
    add("--precision", default="float32", help="float32, or bfloat16 by autocast, for training and measuring")
    add("--workers", type=int, default=0, help="processes that load images")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--page", help="the Markdown file to write; its plots go into a folder of the same name")
    return parser.parse_args(arguments)


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """What the numbers must stand with."""
    git = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False)
    shown = {
        name: value for name, value in vars(options).items() if name not in ("page", "output", "stages", "methods")
    }
    shown["data"] = short_name(options.data)  # a path is of this machine
    return {"options": shown, "commit": git.stdout.strip() or "unknown", **machine()}


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    directory, reporter = Path(options.output), Reporter()
    try:
        if options.data:
            study = Study(options, reporter)
            require_same(directory / "study.json", describe(options))
            study.run()
        if options.page:
            table, runs = Table(directory / "results.csv"), {}
            everything = argparse.Namespace(**vars(options) | {"stages": STAGES, "methods": SCRATCH})
            for job in planned(everything):
                done, there_will_be = runs.get(job.setting, (0, 0))
                runs[job.setting] = done + table.has(job), there_will_be + 1
            write_page(directory, Path(options.page), runs)
    except Interrupted as stopped:
        reporter.say(f"{stopped}; the same command goes on")
        return 128 + stopped.number
    except MfpError as error:
        reporter.say(f"error: {error}")
        return 2
    return 0


def require_same(file: Path, about: dict[str, Any]) -> None:
    """Refuses to mix runs of other settings into a table; more seeds, rates or shares are no other settings.

    Raises:
        MfpError: with the settings that differ.
    """
    free = ("seeds", "first_seed", "training_seeds", "rates", "flops", "workers", "device", "download")
    if file.exists():
        there, here = json.loads(file.read_text())["options"], json.loads(json.dumps(about["options"]))
        names = [name for name in here if name not in free and there.get(name, here[name]) != here[name]]
        differ = [f"{name} {there[name]!r} instead of {here[name]!r}" for name in names]
        if differ:
            raise MfpError(f"{file} is of another study: {'; '.join(differ)}")
    else:
        write_atomically(file, json.dumps(about, indent=2).encode())


if __name__ == "__main__":
    sys.exit(main())
