"""The training loop: one network, trained with or without a pruner, from any point of it to the end.

What a step does depends on the weights, the optimiser's state and its position (epoch, batch) alone: order and
augmentation come from mfp.train.data, the learning rate is a function of the step, and the random state (for
dropout) is seeded anew for every part of every step. So a checkpoint needs no random states, and a run resumed from any
step ends with the same bits as one that was never stopped (on CPU).
"""

from __future__ import annotations

import contextlib
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import mfp
from mfp.atomic import WriteError, write_atomically
from mfp.errors import MfpError
from mfp.optim import MaskedSGD
from mfp.shrinking import held_entries, zero_
from mfp.train.checkpoints import digest_of, load_newest, save_checkpoint
from mfp.train.config import RunConfig
from mfp.train.data import EpochBatches, ImageData, derive_seed, make_loader, spread_over
from mfp.train.distributed import World
from mfp.train.evaluation import evaluate
from mfp.train.interrupts import Interrupted, noting_signals
from mfp.train.progress import Bar, Reporter
from mfp.train.records import Clock, decision_record, epoch_line, make_board, scores_file, to_csv, write_board
from mfp.train.switch import Switch

NOTE_SECONDS = 0.5  # how often the loss is fetched from the device, shown, and checked to be a number


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
        self.board = make_board(directory, self.epoch) if config.tensorboard and self.world.first else None
        self.switch = Switch(config, data.image_shape, self.world, self.reporter, self._autocast)
        self._signal = 0

    @property
    def step(self) -> int:
        """Optimiser steps done since the start of the run."""
        return self.epoch * self.steps_per_epoch + self.batch

    @property
    def small_from(self) -> int | None:
        """The epoch from which the network was small."""
        return self.switch.small_from

    @property
    def final_model(self) -> nn.Module:
        """The network that is evaluated and handed on: the averaged one, where an average is kept."""
        return self.averaged.module if self.averaged else self.model

    @property
    def masked_model(self) -> nn.Module:
        """The final network in its original shape, pruned filters zero."""
        return self.pruner.masked(self.final_model) if self.small_from is not None else self.final_model

    def fit(self) -> list[dict[str, Any]]:
        """Trains from where it stands to the end, and returns a record per epoch.

        Raises:
            Interrupted: SIGINT or SIGTERM came; the step was finished and a checkpoint written.
            MfpError: the loss is no longer finite, ranks differ, or the last checkpoint could not be written.
        """
        total = self.config.epochs * self.steps_per_epoch
        signals = noting_signals(lambda: self._signal, lambda number: setattr(self, "_signal", number))
        with signals, self.reporter.bar("pruned" if self.pruner else "dense", total, self.step) as bar:
            while self.epoch < self.config.epochs:
                clock = Clock()
                done = self._train_epoch(bar, clock)
                self._end_epoch(clock, done)
        return self.history

    # ---- one epoch

    def _train_epoch(self, bar: Bar, clock: Clock) -> int:
        batches = EpochBatches(
            len(self.data.train), self.config.batch, self.config.seed, self.epoch, self.batch, self.world.rank,
            self.world.size,
        )  # fmt: skip
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
        count, last = self.switch.accumulate, self.switch.accumulate - 1
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
            if self.pruner:
                self.pruner.mask_gradients_()  # of filters that are gone: no part of the norm
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
            self._shrink(self.epoch + 1)
        record["parameters"] = sum(parameter.numel() for parameter in self.model.parameters())
        with clock("evaluation"):
            metrics = evaluate(self.final_model, self.data.watched, 128, self.config.workers, self.world)
        record |= {key: metrics[key] for key in ("loss", "top1", "top5")}
        seconds = time.perf_counter() - clock.start
        record |= {"images_per_second": round(images / trained, 1), "seconds": round(seconds, 3), **clock.shares()}
        self.history.append(record)
        self.epoch, self.batch = self.epoch + 1, 0
        self.totals.zero_()
        watched = "test" if self.data.validation is None else "validation"
        short = not self.reporter.console.is_terminal
        self.reporter.say(epoch_line(record, self.config.epochs, watched, short))
        if self.world.first:
            self._write("epochs.csv", to_csv(self.history))
            if self.board is not None:
                write_board(self.board, record, self.pruner.mask if self.pruner else None)
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
        if self.averaged and self.small_from is None:
            zero_(self.averaged.module, held_entries(self.pruner.mask, self.config.mask_bn))
        return decision_record(decision)

    def _accuracy(self, model: nn.Module) -> float:
        """On some of the held-out images."""
        few = spread_over(self.data.validation, self.config.hindsight)
        return evaluate(model, few, 128, self.config.workers, self.world)["top1"]

    def _hold_mask(self, epoch: int) -> None:
        """In the last epochs, which `settle` counts, the mask holds from this epoch on."""
        if self.pruner and self.pruner.mask and epoch >= self.config.choosing_epochs and self.config.settle:
            self.pruner.hold_()
        if self.pruner and self.pruner.holds and self.pruner.smaller is None:
            self.optimizer.mask = self.pruner.mask

    def _shrink(self, epoch: int) -> None:
        """Goes on with the smaller network from this epoch on, where the mask holds."""
        if self.pruner:
            model = self.switch.shrink_(self.pruner, self.optimizer, self.averaged, epoch)
            if model is not self.model:
                self.model, self.parallel = model, self.world.wrap(model)

    def _require_equal_weights(self) -> None:
        if self.world.size > 1:
            self.world.require_equal(digest_of(self.model.state_dict()), f"the weights after epoch {self.epoch + 1}")

    def _write_scores(self) -> None:
        """All scores as they are before the last pruning, for the report. All ranks score, the first one writes."""
        scores = self.pruner.score()
        if self.world.first:
            self._write("scores.safetensors", scores_file(scores))

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
            "small_from": self.small_from,
            "accumulate": self.switch.accumulate,
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
        if state["small_from"] is not None:
            self.pruner.load_state_dict(state["pruner"])
            self._shrink(state["small_from"])
            if self.small_from is None:
                raise MfpError(
                    f"{source} is of the smaller network, which cannot be made here: use the mfp that wrote it"
                )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.averaged:
            self.averaged.load_state_dict(state["averaged"])
        if self.pruner:
            self.pruner.load_state_dict(state["pruner"])
            self._hold_mask(self.epoch)
        self.switch.accumulate = state["accumulate"]

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

    # ---- what it is made of

    def _make_optimizer(self) -> MaskedSGD:
        config = self.config
        return MaskedSGD(
            self.model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay,
            nesterov=config.nesterov, mask_bn=config.mask_bn,
        )  # fmt: skip
