"""The networks that people prune, each measured: is the compact one exact, and as small as an observer says it can be?

    python tests/zoo.py [--only PATTERN] [--fast] [--jobs N] [--json FILE]
    python tests/zoo.py --serving    # the serving forms, replayed and not, instead

Every network is filled with random parameters, pruned at rate 0.3 by l2_norm and compacted. *Times live* is the
multiply-adds of the compact network over those that tests/observer.py sees alive in the masked one: 1.00 is fully
shrunk, less means that channels went which vary and which nobody reads. Ends with status 1 if a network fails a bound.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import math
import os
import re
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from fnmatch import fnmatchcase
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from observer import live_multiply_adds, multiply_adds, run
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils._pytree import tree_leaves, tree_map_only
from zoo_networks import ZOO, Entry

import mfp
from mfp.bench import results
from mfp.serving.network import Recording, _tapes

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from figures import networks

RATE = 0.3
TIMES_LIVE = 1.05
EXACT = {torch.float32: 1e-4, torch.float64: 1e-5}  # of the largest output
#: How a report says that other images than of the example's shape are not to be given (multiples of 32 are asked here).
FIXED_SIZE = re.compile(r"(input|image) sizes?:|size of dimension \d+ of the input: (is|equal|multiple) ")
OBSERVED = 8  # images the observer looks at
#: Means of channels, in units of their spread. Around zero, rounding grows from layer to layer as in no trained network
#: (BatchNorm with random weights: https://arxiv.org/abs/1902.08129): ResNet-152's float32 output is then off by 5e-4.
SHIFT = (0.3, 1.2)
LONGEST = 600  # seconds of the processor for one network: what does not end is a failure, and the others go on


def images(count: int, height: int, width: int, seed: int) -> Tensor:
    """Random images that vary at every scale: white noise alone averages out before the last stage of a network."""
    generator = torch.Generator().manual_seed(seed)
    coarse = (torch.randn(count, 3, n, n, generator=generator) for n in (1, 3, 9))
    coarse = (interpolate(x, (height, width), mode="bilinear", align_corners=True) for x in coarse)
    return sum(coarse, torch.randn(count, 3, height, width, generator=generator))


def fill(model: nn.Module) -> None:
    """Random values for every trainable parameter: nothing starts at zero, as residual scales do in many networks."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        low, high = 0.5, 1.0  # scales: of norms, of residual branches
        if name.endswith("bias"):
            low, high = SHIFT
        elif parameter.numel() > max(parameter.shape, default=1):
            high = math.sqrt(6 / parameter[0].numel())  # keeps the size of activations through ReLUs
            low = -high
        parameter.data.uniform_(low, high, generator=generator)


def settle(model: nn.Module, call: Callable[[int], Any]) -> None:
    """BatchNorm statistics, and biases of other layers, that suit the activations of the masked network.

    Without it many ReLUs see one sign only, and an observer would take channels for dead that merely look so.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    norms = [module for module in norms if module.track_running_stats]
    momenta = [module.momentum for module in norms]
    model.eval()
    for module in norms:
        module.reset_running_stats()
        module.train()
        module.momentum = None  # the average over all batches
    handles = list(centred(model))
    with torch.no_grad():
        run(model, call(0))
        for handle in handles:
            handle.remove()
        for module in norms:
            module.reset_running_stats()
        for seed in (1, 2) if norms else ():
            run(model, call(seed))
    for module, momentum in zip(norms, momenta, strict=True):
        module.momentum = momentum
    model.eval()


def centred(model: nn.Module) -> Iterator[Any]:
    """Hooks that shift a layer's bias, at its first call, such that a channel's mean suits its spread."""
    layers = (nn.Linear, nn.modules.conv._ConvNd, nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)
    for layer in model.modules():
        bias = getattr(layer, "bias", None)
        if isinstance(layer, layers) and isinstance(bias, nn.Parameter) and bias.requires_grad and bias.dim() == 1:
            seen: list[nn.Module] = []
            activation = getattr(layer, "act", None)  # timm's norms with an activation inside
            if isinstance(activation, nn.Module):
                hook = functools.partial(lambda layer, seen, _, args: (centre(layer, args[0], seen),), layer, seen)
                yield activation.register_forward_pre_hook(hook)
            else:
                hook = functools.partial(lambda seen, layer, _, out: centre(layer, out, seen), seen)
                yield layer.register_forward_hook(hook)


def centre(layer: nn.Module, out: Tensor, seen: list[nn.Module]) -> Tensor:
    last = isinstance(layer, nn.Linear | nn.LayerNorm) and "2d" not in type(layer).__name__
    last &= getattr(layer, "data_format", "") != "channels_first"
    channels = -1 if last else 1
    if seen or out.shape[channels] != len(layer.bias):
        return out
    seen.append(layer)
    flat = out.movedim(channels, 0).flatten(1)
    shift = flat.std(1, correction=0) * torch.empty(len(flat)).uniform_(*SHIFT) - flat.mean(1)
    shift[(flat.amax(1) == flat.amin(1)) | (layer.bias == 0)] = 0  # masked: what is zero stays so
    layer.bias += shift
    return out + (shift if last else shift.view(-1, *[1] * (out.dim() - 2)))


def given(model: nn.Module, part: nn.Module, arguments: Any) -> Any:
    """What a part of the model is called with when the model is."""
    if part is model:
        return arguments
    calls: list[Any] = []
    handle = part.register_forward_pre_hook(lambda _, args: calls.append(args))
    with torch.no_grad():
        run(model, arguments)
    handle.remove()
    return calls[0]


def difference(a: Any, b: Any) -> float:
    """Largest difference over all tensors of two nested outputs, each relative to its tensor's largest value."""
    first, second = tree_leaves(a), tree_leaves(b)
    assert len(first) == len(second) > 0, f"{len(second)} outputs instead of {len(first)}"
    largest = 0.0
    for x, y in zip(first, second, strict=True):
        if isinstance(x, Tensor):
            assert x.shape == y.shape, f"an output of shape {list(y.shape)} instead of {list(x.shape)}"
            assert x.dtype == y.dtype, f"an output of {y.dtype} instead of {x.dtype}"
            assert x.isfinite().all(), "the masked network's output is not finite"
            assert x.std() > 1e-3 * x.abs().max(), "all outputs equal: the comparison would show nothing"
            largest = max(largest, ((x - y).abs().max() / x.abs().max()).item())
        else:
            assert x == y, f"an output {y!r} instead of {x!r}"
    return largest


def cast(arguments: Any, dtype: torch.dtype) -> Any:
    return tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, arguments)


def measure(entry: Entry, dtypes: Iterable[torch.dtype] = tuple(EXACT), serving: bool = False) -> dict[str, Any]:
    """Prunes and compacts one network; ``failed`` lists the bounds it misses, ``error`` what was raised.

    ``serving``: looks at its serving form instead.
    """
    result: dict[str, Any] = {"name": entry.name, "family": entry.family, "failed": []}
    if entry.known:
        result["note"] = entry.known
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if serving:
                replay(entry, result)
            else:
                compare(entry, result, dtypes)
    except (Exception, TooLong) as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        first = (str(error).strip().splitlines() or [""])[0]
        result["error"] = f"{type(error).__name__}: {first} ({Path(where.filename).name}:{where.lineno})"
        result["traceback"] = traceback.format_exc()
        result["failed"].append(result["error"])
    return result


def pruned(entry: Entry) -> tuple[nn.Module, nn.Module, Any]:
    """The masked network, its part that is compacted, and an example for the network."""
    size = entry.size
    torch.manual_seed(0)
    model = entry.build().eval()
    fill(model)
    part = model.get_submodule(entry.submodule) if entry.submodule else model
    example = entry.example(images(1, size, size, 3))
    plan = mfp.FilterPlan.from_model(part, RATE, example_input=given(model, part, example))
    mfp.prune_filters_(plan, "l2_norm", mask_bn=entry.mask_bn)
    settle(model, lambda seed: entry.example(images(OBSERVED, size, size, seed)))
    return model, part, example


def replay(entry: Entry, result: dict[str, Any]) -> None:
    """The serving form gives what the masked network gives, read node by node (once), recorded and replayed."""
    model, part, example = pruned(entry)
    serving = mfp.compact(part, given(model, part, example), fold_bn=True)
    fresh, other = (given(model, part, entry.example(images(3, entry.size, entry.size, seed))) for seed in (5, 6))
    with torch.inference_mode():
        expected = run(part, copy.copy(fresh))
        read = [run(serving.forward, copy.copy(x)) for x in (fresh, other)]
        found = [run(serving, copy.copy(x)) for x in 3 * [fresh, other]]
    result["float32"] = difference(expected, read[0])
    if not result["float32"] <= max(EXACT[torch.float32], 4 * rounding(part, fresh, expected)):
        result["failed"].append(f"differs by {result['float32']:.1e}")
    for right, later in zip(3 * read, found, strict=True):
        if not all(torch.equal(a, b) for a, b in zip(tree_leaves(right), tree_leaves(later), strict=True)):
            result["failed"].append("a later call gives something else")
    tapes = _tapes.get(serving)
    result["replayed"] = tapes is not None and any(isinstance(found, Recording) for found in tapes.replays.all())


@torch.no_grad()
def rounding(part: nn.Module, arguments: Any, found: Any) -> float:
    """How far a network's own results in float32 are from those in float64; 0 where it does not run in float64."""
    try:
        return difference(cast(run(copy.deepcopy(part).double(), cast(arguments, torch.float64)), torch.float32), found)
    except RuntimeError:
        return 0.0


def compare(entry: Entry, result: dict[str, Any], dtypes: Iterable[torch.dtype]) -> None:
    size, (model, part, example) = entry.size, pruned(entry)
    start = time.process_time()
    whole = mfp.compact(model, example, **({"submodule": entry.submodule} if entry.submodule else {}))
    result["seconds"] = time.process_time() - start
    small = whole.get_submodule(entry.submodule) if entry.submodule else whole
    small.eval()

    observed = given(model, part, entry.example(images(OBSERVED, size, size, 4)))
    result["before"], result["after"] = multiply_adds(part, observed), multiply_adds(small, observed)
    result["live"] = live_multiply_adds(part, observed)
    result["times_live"] = result["after"] / result["live"]
    if round(result["times_live"], 2) > TIMES_LIVE and not entry.known:
        result["failed"].append(f"{result['times_live']:.2f} times live")

    free = not any(FIXED_SIZE.match(line) for line in whole.report.kept_because)
    result["image_size"] = "free" if free else "fixed"
    wider = size + 32 if free and entry.resize else size
    fresh = given(model, part, entry.example(images(3, size, wider, 5)))
    for dtype in dtypes:
        with torch.no_grad():
            try:
                expected = run(part.to(dtype), cast(copy.copy(fresh), dtype))
                ours = run(small.to(dtype), cast(copy.copy(fresh), dtype))
            except RuntimeError as error:
                if dtype is torch.float32 or (
                    "scalar type" not in str(error) and "should be the same" not in str(error)
                ):
                    raise
                result["note"] = "float32 alone: the model itself casts to it"
                continue
            apart = difference(expected, ours)
        result[str(dtype).removeprefix("torch.")] = apart
        if not apart <= EXACT[dtype]:
            result["failed"].append(f"differs by {apart:.1e} in {dtype}")


def key(family: str, name: str) -> str:
    return f"{family}: {name}"


ENTRIES = {key(entry.family, entry.name): entry for entry in ZOO}


def measure_named(name: str, serving: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    gc.collect()
    signal.signal(signal.SIGPROF, too_long)
    signal.setitimer(signal.ITIMER_PROF, LONGEST)
    try:
        return measure(ENTRIES[name], serving=serving)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


class TooLong(BaseException):
    """No Exception: torch.export and the like would go on after one."""


def too_long(*_: Any) -> None:
    raise TooLong(f"not done after {LONGEST} s")


def end_with_parent() -> None:
    """In a worker: whoever kills `make zoo`, by whatever signal, ends its processes too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def measure_all(names: list[str], jobs: int, serving: bool) -> Iterator[dict[str, Any]]:
    """Results as they come. A process that dies (of memory) takes no other network's result with it."""
    if jobs == 1:
        yield from (measure_named(name, serving) for name in names)
        return
    left = list(names)
    for start in range(0, len(names), 16 * jobs):  # processes anew now and then, for the memory that they keep
        with ProcessPoolExecutor(jobs, get_context("spawn"), end_with_parent) as pool:
            futures = {pool.submit(measure_named, name, serving): name for name in names[start : start + 16 * jobs]}
            for future in as_completed(futures):
                if not isinstance(future.exception(), BrokenExecutor):
                    left.remove(futures[future])
                    yield future.result()
    for name in left:
        with ProcessPoolExecutor(1, get_context("spawn"), end_with_parent) as pool:
            try:
                yield pool.submit(measure_named, name, serving).result()
            except BrokenExecutor:
                entry, error = ENTRIES[name], "the process was killed"
                yield {"name": entry.name, "family": entry.family, "failed": [error]}


def as_row(result: dict[str, Any]) -> dict[str, Any]:
    """A result as a line of a result file."""
    return {key: value for key, value in result.items() if key not in ("error", "traceback")} | {
        "failed": "; ".join(result["failed"])
    }


def stop(*_: Any) -> None:
    print("\ninterrupted; with --json FILE the same command goes on from there", file=sys.stderr, flush=True)
    os._exit(128 + signal.SIGINT)  # the pool would wait for its networks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="*", help="part of 'family: name', with * and ? as in file names")
    parser.add_argument("--fast", action="store_true", help="without the largest networks")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    parser.add_argument("--json", type=Path, help="result file; networks that it has without a fault are not run again")
    parser.add_argument("--serving", action="store_true", help="the serving forms, replayed and not, instead")
    options = parser.parse_args()
    if options.serving and options.json:
        parser.error("--serving keeps no results: without --json")
    pattern = f"*{options.only}*"
    chosen = [
        name for name, entry in ENTRIES.items() if fnmatchcase(name, pattern) and not (options.fast and entry.slow)
    ]
    if not chosen:
        parser.error(f"no network is called {options.only!r}")
    signal.signal(signal.SIGINT, stop)
    old = results.read(options.json)["rows"] if options.json and options.json.exists() else []
    rows = {key(row["family"], row["name"]): row for row in old if not row["failed"]}
    left, start = [name for name in chosen if name not in rows], time.perf_counter()
    for done, result in enumerate(measure_all(left, options.jobs, options.serving), 1):
        rows[key(result["family"], result["name"])] = as_row(result)
        good = ("replayed" if result.get("replayed") else "not replayed") if options.serving else ""
        outcome = "; ".join(result["failed"]) or good or f"{result['times_live']:.2f} times live"
        clock = f"{time.perf_counter() - start:5.0f} s"
        print(f"{clock} {done}/{len(left)} {result['family']}: {result['name']}: {outcome}", file=sys.stderr)
        if options.json:
            results.write(options.json, "make zoo", [rows[name] for name in ENTRIES if name in rows])
    if not options.serving:
        print(networks([rows[name] for name in chosen]))
    failed = [name for name in chosen if rows[name]["failed"]]
    print(f"\n{len(chosen)} networks, {len(failed)} fail, {time.perf_counter() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
