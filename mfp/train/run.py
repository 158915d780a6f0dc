"""A whole run: train without and with pruning, remove the pruned filters, show what changed and what was gained.

A run directory holds config.json, dense/ and pruned/ (each with epochs.csv and the last two checkpoints, pruned/
also with the scores at the last pruning point), compact.mfp and result.json; rates.json where layers got rates of their
own.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mfp
from mfp.allocation import ROUNDS, check_target
from mfp.atomic import write_atomically
from mfp.errors import MfpError
from mfp.train.checkpoints import digest_of
from mfp.train.config import RunConfig
from mfp.train.data import ImageData, derive_seed, epoch_order, load_data
from mfp.train.distributed import World, join, leave
from mfp.train.engine import Trainer
from mfp.train.evaluation import difference_on, evaluate, milliseconds_per_image
from mfp.train.models import build_model
from mfp.train.progress import Reporter

LARGEST_DIFFERENCE = 1e-4  # between masked and compact outputs, relative; float32 rounding stays far below


def run(
    config: RunConfig, directory: str | Path, resume: bool = False, reporter: Reporter | None = None
) -> dict[str, Any]:
    """Does what `mfp prune` does, and returns what result.json holds (on the first rank; {} on the others).

    >>> run(RunConfig(epochs=2, dense=False), "runs/try")["masked"]["top1"]

    Args:
        config: the settings.
        directory: made if need be; must not hold a run already, unless it is resumed.
        resume: go on from the newest checkpoint in the directory, or start anew where there is none.
    Raises:
        MfpError: settings, data or files that cannot be used; a run that pruned nothing.
        Interrupted: a signal came; the checkpoint is written.
    """
    world = join(config.device, config.timeout)
    directory = Path(directory)
    reporter = reporter or Reporter(quiet=not world.first)
    stored = directory / "config.json"
    if config.targets and resume and stored.exists():
        found = RunConfig.from_json(stored.read_text(), str(stored))
        config = dataclasses.replace(config, rate=found.rate, channel_multiple=found.channel_multiple)
    check_directory(config, directory, resume)
    if resume and not stored.exists():
        reporter.say(f"nothing to resume in {directory}: a new run begins there")
    data = load_data(config.data, config.seed, download=config.download, validation=config.validation)
    # all that can be wrong with the settings is found before anything is trained or written
    model = make_network(config, data, world)
    if config.targets and not config.by_sensitivity and not stored.exists():
        config = find_rate(config, model, data, world, reporter)
    if config.by_sensitivity and "milliseconds" not in config.targets and not stored.exists():
        example, targets, plan_arguments = rates_arguments(config, data, world)
        check_target(model, example, targets, **plan_arguments)
    pruner = make_pruner(config, model, data, world)
    pruned = Trainer(config, data, model, directory / "pruned", pruner, world, reporter)
    dense = make_network(config, data, world)
    world.barrier()  # every rank has looked at the directory
    if world.first:
        write_atomically(directory / "config.json", config.to_json().encode())
    if config.dense:
        trainer = Trainer(config, data, dense, directory / "dense", world=world, reporter=reporter)
        _train(trainer, resume)
        dense = trainer.final_model
    if config.by_sensitivity:
        config = find_rates(config, model if config.weights else dense, data, world, directory, reporter)
        pruned.config, pruned.pruner = config, make_pruner(config, model, data, world)
    _train(pruned, resume)
    result = {}
    if world.first:
        result = _finish(config, data, dense, pruned, directory, reporter)
    leave()
    return result


def check_directory(config: RunConfig, directory: Path, resume: bool) -> None:
    """Refuses a directory that holds another run.

    Raises:
        MfpError: with the settings that differ, or the way to go on.
    """
    file = directory / "config.json"
    if not file.exists():
        return
    if not resume:
        raise MfpError(f"{directory} already holds a run: go on with it by --resume, or give another --output")
    config.require_same(RunConfig.from_json(file.read_text(), str(file)).identity(), str(file))


def make_network(config: RunConfig, data: ImageData, world: World) -> nn.Module:
    """The network in its starting state, the same on every rank."""
    channels = data.image_shape[0]
    if channels != 3 and ":" not in config.arch:
        raise MfpError(f"{config.arch} takes images of 3 channels, not {channels}: give a network of yours by --model")
    torch.manual_seed(derive_seed(config.seed, "weights"))
    model = build_model(config.arch, data.num_classes, config.weights, download=config.download)
    model.to(world.device, memory_format=torch.channels_last if config.channels_last else torch.preserve_format)
    if config.compile:
        model.compile()
    return model


def find_rate(config: RunConfig, model: nn.Module, data: ImageData, world: World, reporter: Reporter) -> RunConfig:
    """The configuration with the rate that reaches the target, and with the rounding of filters that suits the engine
    where none was asked for; rank 0 decides, since times differ from rank to rank."""
    rounding = {"channel_multiple": config.channel_multiple}
    if "milliseconds" in config.targets and config.channel_multiple == 1:
        rounding = {}
    answer = torch.zeros(2, dtype=torch.float64, device=world.device)
    if world.first:
        found = mfp.find_rate(
            model, data.example().to(world.device), skip=config.skip, layer_rates=config.layer_rates or None,
            residual=config.residual, engine=config.engine, say=reporter.say, **rounding, **config.targets,
        )  # fmt: skip
        reporter.say(f"for the target: {found}")
        answer = torch.tensor([found.rate, found.channel_multiple], dtype=torch.float64, device=world.device)
    world.broadcast_([answer])
    return dataclasses.replace(config, rate=float(answer[0]), channel_multiple=int(answer[1]))


def find_rates(
    config: RunConfig, trained: nn.Module, data: ImageData, world: World, directory: Path, reporter: Reporter
) -> RunConfig:
    """The configuration with rates for the layers that suit the target and this network, from rates.json where they
    were found before. The ranks measure the losses together; rank 0 decides, since times differ from rank to rank."""
    file = directory / "rates.json"
    if not file.exists():
        calibration = calibration_batches(config, data, world)
        example, targets, plan_arguments = rates_arguments(config, data, world)
        with reporter.bar("sensitivities", 1, 0) as bar:
            sensitivities = mfp.measure_sensitivities(trained, example, calibration, advance=bar.at, **plan_arguments)
        if world.first:
            found = mfp.find_rates(
                trained, example, calibration=calibration, sensitivities=sensitivities, engine=config.engine,
                rounds=ROUNDS if world.size == 1 else 1, say=reporter.say, **plan_arguments, **targets,
            )  # fmt: skip
            reporter.say(f"for the target: {found}")
            write_atomically(file, json.dumps(dataclasses.asdict(found), indent=2).encode())
        world.barrier()
    try:
        found = json.loads(file.read_text())
        return dataclasses.replace(config, layer_rates=found["layer_rates"], channel_multiple=found["channel_multiple"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise MfpError(f"{file} does not hold the rates of a run: {error}; delete it to find them again") from error


def rates_arguments(config: RunConfig, data: ImageData, world: World) -> tuple[Tensor, dict[str, str], dict[str, Any]]:
    """What mfp.find_rates is to be given: an example, the target, arguments of the plan."""
    targets = {name.removeprefix("target_"): target for name, target in config.targets.items()}
    plan = {"skip": config.skip, "layer_rates": config.layer_rates or None, "residual": config.residual}
    if "milliseconds" not in targets or config.channel_multiple > 1:  # else the engine's own is looked for
        plan["channel_multiple"] = config.channel_multiple
    return data.example().to(world.device), targets, plan


def make_pruner(config: RunConfig, model: nn.Module, data: ImageData, world: World) -> mfp.FilterPruner:
    """The pruner that a configuration describes; refuses settings that would prune nothing."""
    pruner = mfp.FilterPruner(
        model, config.rate, criteria=config.criteria, attribute=config.attribute,
        calibration=calibration_batches(config, data, world), mode=config.mode, one_way=config.one_way,
        interval=config.interval, epochs=config.choosing_epochs, mask_bn=config.mask_bn,
        channel_multiple=config.channel_multiple, skip=config.skip, layer_rates=config.layer_rates or None,
        per_layer=config.per_layer, residual=config.residual, recalibrate=config.recalibrate,
        allocate=config.allocates, example_input=data.example().to(world.device),
    )  # fmt: skip
    if not any(layer.num_pruned for layer in pruner.plan.layers):
        raise MfpError(
            f"--rate {config.rate} with --channel-multiple {config.channel_multiple} prunes no filter of any of the "
            f"{len(pruner.plan.layers)} layers of {config.arch}: give a higher rate"
        )
    return pruner


def calibration_batches(config: RunConfig, data: ImageData, world: World) -> list[tuple[Tensor, Tensor]]:
    """Training images as they are, the same for every candidate and every epoch; each rank gets its share."""
    order = epoch_order(len(data.plain), derive_seed(config.seed, "calibration"), 0)
    batches = []
    for number in range(max(1, min(config.calibration_batches, len(order) // config.batch))):
        indices = order[number * config.batch : (number + 1) * config.batch][world.rank :: world.size]
        images, targets = zip(*(data.plain[0, index] for index in indices), strict=True)
        batches.append((torch.stack(images).to(world.device), torch.tensor(targets, device=world.device)))
    return batches


def _train(trainer: Trainer, resume: bool) -> None:
    if resume:
        trainer.resume()
    trainer.fit()


def _finish(
    config: RunConfig, data: ImageData, dense: nn.Module, pruned: Trainer, directory: Path, reporter: Reporter
) -> dict[str, Any]:
    masked, mask = pruned.masked_model.to(pruned.world.device).eval(), pruned.pruner.mask
    if mask is None or mask.keep.all():
        raise MfpError("nothing was pruned in the whole run: no pruning point came (see --interval and --epochs)")
    example = data.example().to(pruned.world.device)
    reporter.say("removing the pruned filters, and comparing")
    compact = mfp.compact(masked, example)
    mfp.save(compact, directory / "compact.mfp")
    difference = difference_on(data.test, masked, compact)
    batch = data.example(64 if data.image_shape[1] <= 64 else 8).to(pruned.world.device)
    serving = {
        "dense": mfp.compact(dense.eval(), example, fold_bn=True),
        "compact": mfp.compact(masked, example, fold_bn=True),
    }
    times = milliseconds_per_image(serving, batch)
    networks = {"dense": dense, "masked": masked, "compact": compact}
    result: dict[str, Any] = {
        "config": dataclasses.asdict(config),
        "difference": difference,
        "digest": digest_of(masked.state_dict()),
        "images": data.counts,  # for training, validation and testing
    }
    for name, network in networks.items():
        trained = name != "dense" or config.dense
        result[name] = evaluate(network, data.test) if trained else {}
        result[name]["flops"] = mfp.flops(network, example)
        result[name]["parameters"] = sum(parameter.numel() for parameter in network.parameters())
        if name in times:
            result[name]["milliseconds"] = times[name]
    result["small_from"] = pruned.small_from  # the epoch from which the network was small, from 0
    result["timing_batch"] = len(batch)
    result["criteria"] = [record["criterion"] for record in pruned.history if "criterion" in record]
    result["choice"] = _last_choice(pruned.pruner.decisions[-1])
    result["kept"] = {layer.name: [int(mask.layer(layer.name).sum()), layer.num_filters] for layer in mask.plan.layers}
    write_atomically(directory / "result.json", json.dumps(result, indent=2).encode())
    if difference > LARGEST_DIFFERENCE:
        raise MfpError(
            f"the compact network differs from the masked one by {difference:.1e} of its largest output (allowed "
            f"{LARGEST_DIFFERENCE:.0e}): do not use {directory / 'compact.mfp'}, and please report this"
        )
    return result


def _last_choice(decision: mfp.Decision) -> dict[str, Any]:
    """What the last pruning point chose from, and what each candidate alone would have given."""
    return {
        "epoch": decision.epoch,
        "chosen": decision.neighbour,
        "attribute": decision.attribute,
        "before": decision.attribute_before,
        "neighbours": decision.neighbours,
        "hindsight": decision.hindsight,
    }
