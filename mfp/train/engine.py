"""The training loop: one network, trained with or without a pruner, from any point of it to the end.

What a step does depends on the weights, the optimiser's state and its position (epoch, batch) alone: order and
augmentation come from mfp.train.data, the learning rate is a function of the step, and the random state (for
dropout) is seeded anew for every part of every step. So a checkpoint needs no random states, and a run resumed from any
step ends with the same bits as one that was never stopped (on CPU).
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Subset

import mfp
from mfp.atomic import WriteError, write_atomically
from mfp.errors import MfpError
from mfp.optim import MaskedSGD
from mfp.train.checkpoints import digest_of, load_newest, save_checkpoint
from mfp.train.config import RunConfig
from mfp.train.data import EpochBatches, ImageData, SeededDataset, derive_seed, make_loader
from mfp.train.distributed import World
from mfp.train.evaluation import evaluate, regret_of
from mfp.train.progress import Bar, Reporter

NOTE_SECONDS = 0.5  # how often the loss is fetched from the device, shown, and checked to be a number


class Interrupted(Exception):
    """A signal ended the run after the step it came in; the checkpoint is written."""

    def __init__(self, number: int, path: Path | None) -> None:
        self.number, self.path = number, path
        super().__init__(f"stopped by {signal.Signals(number).name}")


class Clock:
    """Where the time of an epoch goes, by the host's clock (a GPU works on while the host prepares)."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.parts: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.parts[part] = self.parts.get(part, 0.0) + time.perf_counter() - start

    def shares(self) -> dict[str, float]:
        total = time.perf_counter() - self.start
        return {f"share_{part}": round(seconds / total, 4) for part, seconds in self.parts.items()}


class Trainer:
    """Trains one network and prunes it on the way.

    >>> trainer = Trainer(RunConfig(epochs=2), load_data("digits"), model, Path("run/pruned"), pruner)
    >>> trainer.fit()
    >>> trainer.history[-1]["top1"]

    Args:
        config: the settings.
        data: what to train on.
        model: trained in place; afterwards it is masked, if there is a pruner.
        directory: where checkpoints and epochs.csv go.
        pruner: an mfp.FilterPruner of the model, or None.
        world: the processes of the run.
    """

    def __init__(
        self,
        config: RunConfig,
        data: ImageData,
        model: nn.Module,
        directory: Path,
        pruner: mfp.FilterPruner | None = None,
        world: World | None = None,
        reporter: Reporter | None = None,
    ) -> None:
        self.world = world or World()
        if config.batch % (self.world.size * config.accumulate):
            parts = f"{self.world.size} processes x {config.accumulate} accumulated parts"
            raise MfpError(f"--batch {config.batch} cannot be cut into equal parts for {parts}")
        self.steps_per_epoch = len(data.train) // config.batch
        if not self.steps_per_epoch:
            raise MfpError(f"--batch {config.batch} is more than the {len(data.train)} images there are to train on")
        self.config, self.data, self.directory, self.pruner = config, data, directory, pruner
        self.reporter = reporter or Reporter(quiet=not self.world.first)
        self.model = model
        self.averaged = (
            AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)
            if config.ema
            else None
        )
        self.parallel = self.world.wrap(model)
        self.optimizer = self._make_optimizer()
        self.scaler = torch.amp.GradScaler(self.world.device.type, enabled=config.precision == "float16")
        self.epoch = self.batch = 0
        self.totals = torch.zeros(3, dtype=torch.float64, device=self.world.device)  # loss, correct, images of rank 0
        self.history: list[dict[str, Any]] = []
        self.board = self._make_board()
        self._signal = 0

    @property
    def step(self) -> int:
        """Optimiser steps done since the start of the run."""
        return self.epoch * self.steps_per_epoch + self.batch

    @property
    def final_model(self) -> nn.Module:
        """The network that is evaluated and handed on: the averaged one, where an average is kept."""
        return self.averaged.module if self.averaged else self.model

    def fit(self) -> list[dict[str, Any]]:
        """Trains from where it stands to the end, and returns a record per epoch.

        Raises:
            Interrupted: SIGINT or SIGTERM came; the step was finished and a checkpoint written.
            MfpError: the loss is no longer finite, ranks differ, or the last checkpoint could not be written.
        """
        title = "pruned" if self.pruner else "dense"
        total = self.config.epochs * self.steps_per_epoch
        with self._signals(), self.reporter.bar(title, total, self.step) as bar:
            while self.epoch < self.config.epochs:
                clock = Clock()
                done = self._train_epoch(bar, clock)
                self._end_epoch(clock, done)
        return self.history

    # ---- one epoch

    def _train_epoch(self, bar: Bar, clock: Clock) -> int:
        batches = EpochBatches(
            len(self.data.train),
            self.config.batch,
            self.config.seed,
            self.epoch,
            self.batch,
            self.world.rank,
            self.world.size,
        )
        loader = iter(make_loader(self.data.train, batches, self.config.workers, self.world.device.type == "cuda"))
        self.parallel.train()
        shown, steps = 0.0, len(batches)
        for _ in range(steps):
            with clock("data"):
                images, targets = (tensor.to(self.world.device, non_blocking=True) for tensor in next(loader))
                if self.config.channels_last:
                    images = images.contiguous(memory_format=torch.channels_last)
            with clock("forward_backward"):
                self._forward_backward(images, targets)
            with clock("optimiser"):
                self._update()
            self.batch += 1
            note = None
            if time.perf_counter() - shown > NOTE_SECONDS:
                note = f"epoch {self.epoch + 1}/{self.config.epochs}, loss {self._mean_loss():.3f}"
                shown = time.perf_counter()
            bar.advance(1, note)
            self._save_if_due(clock)
        self._mean_loss()
        return steps * self.config.batch

    def _forward_backward(self, images: Tensor, targets: Tensor) -> None:
        count, last = self.config.accumulate, self.config.accumulate - 1
        self.optimizer.zero_grad(set_to_none=True)
        parts = zip(images.chunk(count), targets.chunk(count), strict=True)
        for number, (part, wanted) in enumerate(parts):
            self._seed_part(self.world.rank * count + number)
            waits = number < last and self.world.size > 1
            with self.parallel.no_sync() if waits else contextlib.nullcontext():
                with self._autocast():
                    outputs = self.parallel(part)
                    loss = F.cross_entropy(outputs, wanted, label_smoothing=self.config.label_smoothing)
                self.scaler.scale(loss / count).backward()
            hits = (outputs.detach().argmax(1) == wanted).sum()
            self.totals += torch.stack([loss.detach() * len(wanted), hits, hits.new_tensor(len(wanted))]).double()

    def _seed_part(self, part: int) -> None:
        """Parts are counted over the ranks, so that two ranks draw what one draws that accumulates two parts."""
        seed = derive_seed(self.config.seed, "step", self.epoch, self.batch, part)
        torch.manual_seed(seed)
        random.seed(seed)

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.config.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.world.device.type, getattr(torch, self.config.precision))

    def _update(self) -> None:
        rate = self.config.learning_rate(self.step, self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.config.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.averaged:
            self.averaged.update_parameters(self.model)

    def _mean_loss(self) -> float:
        loss, _, count = self.totals.tolist()
        if not math.isfinite(loss):
            raise MfpError(
                f"the loss is {loss} at epoch {self.epoch + 1}, batch {self.batch}: nothing was saved since the last "
                f"checkpoint; try a lower --lr (now {self.config.lr}) or --warmup-epochs"
            )
        return loss / max(count, 1)

    # ---- the end of an epoch

    def _end_epoch(self, clock: Clock, images: int) -> None:
        loss, correct, count = self.totals.tolist()
        record = {"epoch": self.epoch, "lr": self.optimizer.param_groups[0]["lr"]}
        record |= {"train_loss": loss / count, "train_top1": 100 * correct / count}
        trained = time.perf_counter() - clock.start
        self.world.broadcast_(self.model.buffers())  # the ranks' batch statistics differ; rank 0's are the truth
        with clock("pruning"):
            record |= self._prune()
        with clock("evaluation"):
            metrics = evaluate(self.final_model, self.data.watched, 128, self.config.workers, self.world)
        record |= {key: metrics[key] for key in ("loss", "top1", "top5")}
        seconds = time.perf_counter() - clock.start
        record |= {
            "images_per_second": round(images / trained, 1),
            "seconds": round(seconds, 3),
            **clock.shares(),
        }
        self.history.append(record)
        self.epoch, self.batch = self.epoch + 1, 0
        self.totals.zero_()
        self._say(record)
        if self.world.first:
            self._write_csv()
            self._write_board(record)
        self._save(must=self.epoch == self.config.epochs)

    def _prune(self) -> dict[str, Any]:
        """Prunes if the schedule says so; the ranks do it alike, or the run stops before anything is saved.

        Each rank takes the decision itself, from the same weights and from calibration losses that are summed over the
        ranks. Then the digests of (criterion, mask) are compared. Nothing is broadcast: a decision that passes the
        comparison is rank 0's bit for bit, and a broadcast one could not show that a rank would have chosen another.
        """
        if self.pruner is None:
            return {}
        # before the decision: ranks that differ could otherwise try different neighbours, and wait for each other
        self._require_equal_weights()
        holds = self.pruner.mode == "hard" and self.pruner.mask is not None
        if not holds and (self.pruner.mask is None or self.epoch == self.config.choosing_epochs - 1):
            self._write_scores()
        watched = self.config.hindsight and self.data.validation
        decision = self.pruner.step(self.epoch, self._accuracy if watched else None)
        if decision is None:
            return {}
        self.world.require_equal(
            digest_of([decision.criterion, decision.mask.keep]), f"the pruning decision of epoch {self.epoch + 1}"
        )
        self.world.broadcast_(self.model.buffers())  # re-estimated by each rank on its share
        self._hold_mask(self.epoch + 1)
        if self.averaged:
            self._mask_average()
        return decision_record(decision)

    def _accuracy(self, model: nn.Module) -> float:
        """On some of the held-out images, spread evenly over them: a folder's stand class by class."""
        held = self.data.validation
        count = min(self.config.hindsight, len(held))
        some = Subset(held.source, [number * len(held) // count for number in range(count)])
        few = SeededDataset(some, held.transform, held.seed)
        return evaluate(model, few, 128, self.config.workers, self.world)["top1"]

    def _hold_mask(self, epoch: int) -> None:
        """In `hard` mode and in the last epochs, which `settle` counts, the mask holds from this epoch on."""
        if self.pruner and self.pruner.mask and epoch >= self.config.choosing_epochs and self.config.settle:
            self.pruner.hold_()
        if self.pruner and self.pruner.mode == "hard":
            self.optimizer.mask = self.pruner.mask

    def _require_equal_weights(self) -> None:
        if self.world.size > 1:
            self.world.require_equal(digest_of(self.model.state_dict()), f"the weights after epoch {self.epoch + 1}")

    def _write_scores(self) -> None:
        """All scores as they are before the last pruning, for the report. All ranks score, the first one writes."""
        scores = self.pruner.score()
        if not self.world.first:
            return
        names = {layer.name: [layer.offset, layer.num_filters] for layer in self.pruner.plan.layers}
        tensors = {name: value.cpu() for name, value in scores.items()}
        self._write("scores.safetensors", to_safetensors(tensors, {"layers": json.dumps(names)}))

    def _mask_average(self) -> None:
        own = self.pruner.plan
        plan = mfp.FilterPlan(self.averaged.module, own.layers, own.channel_multiple)
        mfp.FilterMask(plan, self.pruner.mask.keep).apply_(mask_bn=self.config.mask_bn)

    def _say(self, record: dict[str, Any]) -> None:
        line = f"epoch {record['epoch'] + 1}/{self.config.epochs}  train loss {record['train_loss']:.4f}"
        watched = "test" if self.data.validation is None else "validation"
        line += f"  {watched} loss {record['loss']:.4f}  accuracy {record['top1']:.2f} %"
        if "criterion" in record:
            line += f"  pruned by {record['criterion']}"
        line += f"  {record['images_per_second']:.0f} images/s"
        if not self.reporter.console.is_terminal:  # a log: the rest is in epochs.csv
            self.reporter.say(line)
            return
        if "criterion" in record:
            line += f"  churn {record['churn']:.2f}"
        shares = [
            f"{key[6:].replace('_', '/')} {100 * value:.0f} %"
            for key, value in record.items()
            if key.startswith("share_")
        ]
        self.reporter.say(f"{line}  ({', '.join(shares)})")

    def _write_csv(self) -> None:
        """Writes the whole table anew, so that a resumed run never leaves a row twice."""
        names = list(dict.fromkeys(key for record in self.history for key in record))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.history)
        self._write("epochs.csv", text.getvalue().encode())

    def _write(self, name: str, data: bytes) -> None:
        try:
            write_atomically(self.directory / name, data)
        except WriteError as error:
            self.reporter.say(f"warning: {error}; training goes on")

    # ---- checkpoints

    def state(self) -> dict[str, Any]:
        """All that the rest of the run depends on."""
        return {
            "config": self.config.identity(),
            "num_classes": self.data.num_classes,
            "image_shape": self.data.image_shape,
            "images": self.data.counts,
            "kind": "pruned" if self.pruner else "dense",
            "epoch": self.epoch,
            "batch": self.batch,
            "totals": self.totals,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "averaged": self.averaged.state_dict() if self.averaged else None,
            "pruner": self.pruner.state_dict() if self.pruner else None,
            "keep": self.pruner.mask.keep if self.pruner and self.pruner.mask else None,
            "history": self.history,
        }

    def load_state(self, state: dict[str, Any], source: str) -> None:
        """Goes back to a state; refuses one of another run."""
        self.config.require_same(state["config"], source)
        if state["images"] != self.data.counts:
            counts = "{} training, {} validation and {} test images"
            there, here = (counts.format(*images) for images in (state["images"], self.data.counts))
            raise MfpError(f"{source} is of a run on {there}; there are now {here}: go on with the data it began with")
        self.epoch, self.batch, self.history = state["epoch"], state["batch"], state["history"]
        self.totals.copy_(state["totals"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.averaged:
            self.averaged.load_state_dict(state["averaged"])
        if self.pruner:
            self.pruner.load_state_dict(state["pruner"])
            self._hold_mask(self.epoch)

    def resume(self) -> bool:
        """Goes back to the newest usable checkpoint of the directory; False where there is none.

        Raises:
            CheckpointError: there are checkpoints but none can be used, or they are of another run.
        """
        checkpoint = load_newest(self.directory, self.reporter.say)
        self.world.require_equal(f"{checkpoint.step if checkpoint else 0:016x}", "the newest checkpoint")
        if checkpoint is None:
            return False
        self.load_state(checkpoint.state, str(checkpoint.path))
        self.reporter.say(f"resuming {checkpoint.path} at epoch {self.epoch + 1}, batch {self.batch}")
        return True

    def _save_if_due(self, clock: Clock) -> None:
        stop, every = self._signal, self.config.checkpoint_every
        if stop or (every and self.step % every == 0 and self.batch < self.steps_per_epoch):
            self._mean_loss()  # never a checkpoint of a network that is not finite
            with clock("checkpoint"):
                path = self._save(must=bool(stop))
            # the other ranks wait for rank 0's next all-reduce, which fails when it has left: they then leave too
            if stop and self.world.first:
                raise Interrupted(stop, path)

    def _save(self, must: bool) -> Path | None:
        """Rank 0 writes; where that fails the run goes on, with a warning, unless the checkpoint is the last."""
        if not self.world.first:
            return None
        try:
            return save_checkpoint(self.directory, self.step, self.state())
        except WriteError as error:
            if must:
                raise
            self.reporter.say(f"warning: {error}; training goes on")
            return None

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM let the step finish; a second one ends the run at once."""

        def note(number: int, frame: object) -> None:
            if self._signal:
                raise KeyboardInterrupt
            self._signal = number

        try:
            before = [(number, signal.signal(number, note)) for number in (signal.SIGINT, signal.SIGTERM)]
        except ValueError:  # not the main thread: whoever owns that one handles signals
            before = []
        try:
            yield
        except Exception as error:
            if self._signal and not isinstance(error, (Interrupted, MfpError)):  # rank 0 has left
                raise Interrupted(self._signal, None) from error
            raise
        finally:
            for number, handler in before:
                signal.signal(number, handler)

    # ---- what it is made of

    def _make_optimizer(self) -> MaskedSGD:
        config = self.config
        return MaskedSGD(
            self.model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay,
            nesterov=config.nesterov, mask_bn=config.mask_bn,
        )  # fmt: skip

    def _make_board(self):
        if not (self.config.tensorboard and self.world.first):
            return None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MfpError("--tensorboard needs the package tensorboard: pip install 'mfp[train]'") from error
        return SummaryWriter(self.directory / "tensorboard", purge_step=self.epoch)

    def _write_board(self, record: dict[str, Any]) -> None:
        if self.board is None:
            return
        for key, value in record.items():
            if isinstance(value, float):
                self.board.add_scalar(key, value, record["epoch"])
        if "criterion" in record:
            self.board.add_text("criterion", record["criterion"], record["epoch"])
            for name, kept in self.pruner.mask.kept.items():
                self.board.add_scalar(f"filters_kept/{name}", kept, record["epoch"])
        self.board.flush()


def make_plan(config: RunConfig, model: nn.Module) -> mfp.FilterPlan:
    """The plan that a configuration describes, for a model."""
    return mfp.FilterPlan.from_model(
        model,
        config.rate,
        skip=config.skip,
        layer_rates=config.layer_rates,
        residual=config.residual,
        channel_multiple=config.channel_multiple,
    )


def decision_record(decision: mfp.Decision) -> dict[str, Any]:
    """One pruning point as columns of the table of epochs."""
    criterion = decision.neighbour
    if isinstance(criterion, dict):  # chosen per layer: name them by how often they won
        counts = sorted(
            ((list(criterion.values()).count(name), name) for name in set(criterion.values())), reverse=True
        )
        criterion = " ".join(f"{name}:{count}" for count, name in counts)
    record = {"rate_factor": decision.rate_factor, "criterion": criterion, "attribute": decision.attribute}
    record |= {"attribute_before": decision.attribute_before, "attribute_after": decision.attribute_after}
    record |= {"churn": decision.churn, "filters_pruned": decision.num_pruned}
    record |= {f"neighbour_{name}": value for name, value in decision.neighbours.items()}
    if decision.hindsight:
        record["regret"], record["ahead_of_mean"] = regret_of(decision.hindsight, decision.neighbour)
    return record | {f"hindsight_{name}": value for name, value in decision.hindsight.items()}
