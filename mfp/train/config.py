"""What a run is: every setting with its default, checked before anything is done, and stored with the run."""

# ruff: noqa: RUF009 (a setting and its help stand in one line)
from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any

from mfp.criteria import PAPER_CRITERIA
from mfp.errors import MfpError, did_you_mean
from mfp.plan import RESIDUAL
from mfp.schedule import GROWING, MODES
from mfp.train.datasets import KNOWN

ALLOCATIONS = ("uniform", "sensitivity", "each-point")
SCHEDULES = ("cosine", "step", "constant")
PRECISIONS = ("float32", "bfloat16", "float16")
# These may change when a run is resumed: they do not change what it computes on a CPU.
FREE = (
    "download", "workers", "device", "timeout", "checkpoint_every", "tensorboard", "compile", "dense",
    # the rates that these led to are part of the run
    "target_flops", "target_parameters", "target_milliseconds", "engine",
    "allocate",
)  # fmt: skip


def _option(default: Any, text: str) -> Any:
    """A setting with the text that `mfp prune --help` shows for it."""
    if isinstance(default, dict):
        return field(default_factory=dict, metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class RunConfig:
    """Settings of `mfp prune`; the defaults suit a short run on a small data set.

    >>> RunConfig(epochs=3, lr=0.1).learning_rate(step=0, steps_per_epoch=10)
    0.1

    Raises:
        MfpError: a value out of its range, with the option that it belongs to.
    """

    arch: str = _option("resnet20", "network: a CIFAR ResNet or any torchvision classification network")
    weights: str | None = _option(None, "start from 'pretrained', 'pretrained:NAME' or a file of weights")
    data: str = _option("digits", KNOWN)
    validation: float = _option(
        0.1,
        "share of the training images to hold out and evaluate every epoch on; 0: none, test images are used instead",
    )
    download: bool = _option(False, "allow fetching data or pretrained weights that are not here")

    rate: float = _option(0.4, "share of the filters of every layer to prune")
    target_flops: str | None = _option(None, "find the rate: FLOPs that may remain, as 50% or a number")
    target_parameters: str | None = _option(None, "find the rate: parameters that may remain, as 50% or a number")
    target_milliseconds: str | None = _option(None, "find the rate: time that may remain, as 7 (one image) or 60%")
    engine: str = _option("mfp", "where that time is measured: mfp, onnxruntime, openvino, torch.compile")
    allocate: str = _option(
        "uniform", "uniform: one rate; sensitivity: for a target, each layer's by how the loss rises, found once; "
        "each-point: such rates anew at each pruning point, tried beside the uniform ones",
    )  # fmt: skip
    criteria: tuple[str, ...] = _option(PAPER_CRITERIA, "candidate criteria, separated by commas")
    attribute: str = _option("loss", "what the chosen criterion must keep: weight_energy, sparsity, loss, ...")
    mode: str = _option("soft", f"one of {', '.join(MODES)}")
    one_way: bool = _option(
        False, "asymptotic and cubic: filters never come back, and the network shrinks at every pruning point"
    )
    interval: int = _option(1, "epochs from one pruning point to the next")
    settle: float = _option(0.55, "share of the epochs, at the end, in which the mask holds and kept filters learn")
    shrink: bool = _option(True, "go on with the smaller network from where the mask holds; the papers do not")
    per_layer: bool = _option(False, "choose the criterion per layer (attributes without data)")
    mask_bn: bool = _option(True, "zero the BatchNorm of a pruned filter with it (the papers do not)")
    recalibrate: bool | None = _option(
        None, "re-estimate BatchNorm statistics for each neighbour and after each pruning; if not given, where the "
        "attribute looks at data (the papers do not)",
    )  # fmt: skip
    residual: str = _option("index", "filters before additions: index (any go), keep (none go), coupled (together)")
    channel_multiple: int = _option(1, "round the filters kept per layer up to a multiple of this")
    skip: tuple[str, ...] | None = _option(
        None, "parts of layer names that are not pruned, by commas; downsample if not given, none where coupled"
    )
    layer_rates: dict[str, float] = _option({}, "rates of single layers, as conv1=0,fc=0.2")
    calibration_batches: int = _option(2, "batches of training images for attributes that need data, and for taylor")

    hindsight: int = _option(
        512, "held-out images on which every candidate is evaluated at each pruning point too, without a say; 0: none"
    )

    epochs: int = _option(15, "epochs")
    batch: int = _option(64, "images per optimiser step, over all processes")
    accumulate: int = _option(1, "parts in which a process computes its share of a batch, to save memory")
    lower_accumulate: bool = _option(
        False, "lower --accumulate when the smaller network needs no more memory in fewer parts"
    )
    lr: float = _option(0.1, "highest learning rate")
    momentum: float = _option(0.9, "momentum of SGD")
    nesterov: bool = _option(False, "Nesterov momentum")
    weight_decay: float = _option(5e-4, "weight decay")
    schedule: str = _option("cosine", f"learning rate over time: {', '.join(SCHEDULES)}")
    milestones: tuple[int, ...] = _option((), "epochs at which 'step' multiplies the rate by gamma, by commas")
    gamma: float = _option(0.1, "factor of 'step'")
    warmup_epochs: float = _option(0.0, "epochs in which the learning rate rises linearly")
    clip: float = _option(1.0, "largest norm of all gradients together; 0: no limit")
    label_smoothing: float = _option(0.0, "label smoothing")
    ema: float = _option(0.0, "decay of an average of the weights that is evaluated instead; 0: none")
    precision: str = _option("float32", f"{', '.join(PRECISIONS)}: the last two with automatic mixed precision")
    channels_last: bool = _option(True, "memory format of images and weights")
    compile: bool = _option(False, "compile the network with torch.compile")

    seed: int = _option(0, "of weights, order, augmentation and dropout")
    dense: bool = _option(True, "also train the same way without pruning, to compare")
    workers: int = _option(0, "processes that load images, for each process that trains")
    device: str = _option("auto", "auto, cpu, cuda or cuda:N")
    timeout: float = _option(600.0, "seconds after which a silent process counts as lost")
    checkpoint_every: int = _option(0, "steps between checkpoints; there is always one after an epoch")
    tensorboard: bool = _option(False, "write TensorBoard files too")

    def __post_init__(self) -> None:
        for name in ("criteria", "skip", "milestones"):  # lists, when they come from JSON
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        self._check("rate", 0 <= self.rate < 1, "at least 0 and below 1")
        for name, choices in (
            ("mode", MODES), ("schedule", SCHEDULES), ("precision", PRECISIONS), ("residual", RESIDUAL),
            ("allocate", ALLOCATIONS),
        ):  # fmt: skip
            value = getattr(self, name)
            self._check(name, value in choices, f"one of {', '.join(choices)}", did_you_mean(value, choices))
        self._check("validation", 0 <= self.validation < 1, "at least 0 and below 1")
        for name in ("epochs", "batch", "accumulate", "interval", "calibration_batches", "channel_multiple"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("workers", "hindsight", "checkpoint_every", "clip", "warmup_epochs", "weight_decay", "momentum"):
            self._check(name, getattr(self, name) >= 0, "at least 0")
        self._check("lr", self.lr > 0 and math.isfinite(self.lr), "above 0")
        self._check("timeout", self.timeout > 0, "above 0 seconds")
        self._check("ema", 0 <= self.ema < 1, "at least 0 and below 1")
        self._check("label_smoothing", 0 <= self.label_smoothing < 1, "at least 0 and below 1")
        self._check("warmup_epochs", self.warmup_epochs < self.epochs, f"below --epochs {self.epochs}")
        self._check("settle", 0 <= self.settle < 1, "at least 0 and below 1")
        self._check("criteria", bool(self.criteria), "at least one name")
        if self.by_sensitivity and not self.targets:
            raise MfpError("--allocate sensitivity needs a target: --target-flops, -parameters or -milliseconds")
        if self.by_sensitivity and not (self.weights or self.dense):
            raise MfpError("--allocate sensitivity needs a trained network to look at: --weights, or no --no-dense")
        if self.one_way and self.mode not in GROWING:
            why = "filters come back" if self.mode == "soft" else "no filter comes back anyway"
            raise MfpError(f"--one-way goes with --mode {' or '.join(GROWING)}: in mode {self.mode} {why}")
        if self.lower_accumulate and (self.accumulate == 1 or not self.shrink):
            raise MfpError("--lower-accumulate needs an --accumulate above 1 to start from, and no --no-shrink")
        if self.batch % self.accumulate:
            raise MfpError(f"--batch {self.batch} cannot be cut into --accumulate {self.accumulate} equal parts")

    def _check(self, name: str, good: bool, wanted: str, hint: str = "") -> None:
        if not good:
            raise MfpError(f"--{name.replace('_', '-')} must be {wanted}, not {getattr(self, name)}{hint}")

    @property
    def targets(self) -> dict[str, str]:
        """What was asked for instead of a rate, as arguments of ``mfp.find_rate``."""
        names = {"target_flops": "target_flops", "target_parameters": "target_parameters"}
        names |= {"target_milliseconds": "milliseconds"}
        return {name: getattr(self, own) for own, name in names.items() if getattr(self, own) is not None}

    @property
    def by_sensitivity(self) -> bool:
        """Whether the layers get rates of their own, once there is a trained network."""
        return self.allocate == "sensitivity"

    @property
    def allocates(self) -> str | None:
        """What rates are exchanged for at each pruning point: FilterPruner's ``allocate``."""
        return ("parameters" if self.target_parameters else "flops") if self.allocate == "each-point" else None

    @property
    def choosing_epochs(self) -> int:
        """The epochs before the mask holds; the last pruning point is at their end."""
        return self.epochs - int(self.epochs * self.settle)

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of a step, counted from the start of the run: a pure function, nothing to save."""
        epoch = step / steps_per_epoch
        if epoch < self.warmup_epochs:
            return self.lr * (step + 1) / (self.warmup_epochs * steps_per_epoch)
        if self.schedule == "cosine":
            done = (epoch - self.warmup_epochs) / (self.epochs - self.warmup_epochs)
            return self.lr * (1 + math.cos(math.pi * done)) / 2
        if self.schedule == "step":
            return self.lr * self.gamma ** sum(epoch >= milestone for milestone in self.milestones)
        return self.lr

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str, source: str = "config.json") -> RunConfig:
        """Reads what `to_json` wrote. Nothing in it is looked up or run, except as the options of the same name.

        Raises:
            MfpError: not JSON, or settings that this version does not know.
        """
        try:
            values = json.loads(text)
            known = {entry.name for entry in dataclasses.fields(cls)}
            unknown = sorted(set(values) - known)
            if unknown:
                raise MfpError(f"{source}: unknown settings {', '.join(unknown)}")
            return cls(**values)
        except (json.JSONDecodeError, TypeError) as error:
            raise MfpError(f"{source} is not the configuration of a run: {error}") from error

    def identity(self) -> dict[str, Any]:
        """What a checkpoint and the run that resumes it must have in common."""
        values = json.loads(self.to_json())
        return {name: value for name, value in values.items() if name not in FREE}

    def require_same(self, stored: dict[str, Any], source: str) -> None:
        """Refuses a checkpoint of another run.

        Raises:
            MfpError: with the settings that differ.
        """
        mine = self.identity()
        differ = [f"{key} {stored.get(key)!r} instead of {mine[key]!r}" for key in mine if stored.get(key) != mine[key]]
        if differ:
            raise MfpError(
                f"{source} is of another run: it has {'; '.join(differ[:4])}. Go on with its settings, or give another "
                "directory"
            )
