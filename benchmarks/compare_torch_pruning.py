"""mfp's compact networks, and Torch-Pruning's: `compare_torch_pruning.py [NAME ...] [--json FILE]`.

Both prune by FPGM importance, ours layer by layer and with coupled layers. Torch-Pruning is given the rate at which its
network has the FLOPs of our coupled one; both leave filter counts in multiples of 8. All networks are then timed in the
same serving form, mfp's (BatchNorm folded).
"""

import argparse
import copy
from importlib.metadata import version

import torch
import torch_pruning as tp
import torchvision
from rich.console import Console
from rich.table import Table
from torch import nn

import mfp
from mfp.bench import results
from mfp.train.evaluation import milliseconds_per_image

NETWORKS = ("resnet18", "resnet50", "vgg16_bn", "mobilenet_v2", "densenet121", "regnet_y_400mf")
RATE, MULTIPLE, BATCH = 0.4, 8, 8


def ours(model: nn.Module, example: torch.Tensor, **plan) -> nn.Module:
    masked = copy.deepcopy(model)
    mfp.prune_filters_(mfp.FilterPlan.from_model(masked, RATE, channel_multiple=MULTIPLE, **plan), "l2_distance")
    return mfp.compact(masked, example)


def theirs(model: nn.Module, example: torch.Tensor, flops: int) -> nn.Module:
    """The rate whose FLOPs come nearest, by bisection."""
    low, high, best = 0.0, 0.9, model
    for _ in range(7):
        rate, pruned = (low + high) / 2, copy.deepcopy(model)
        last = [m for m in pruned.modules() if isinstance(m, nn.Linear)][-1:]
        tp.pruner.BasePruner(
            pruned, example, importance=tp.importance.FPGMImportance(), pruning_ratio=rate, ignored_layers=last,
            round_to=MULTIPLE,
        ).step()  # fmt: skip
        count = mfp.flops(pruned, example)
        low, high = (rate, high) if count > flops else (low, rate)
        if abs(count - flops) < abs(mfp.flops(best, example) - flops):
            best = pruned
    return best


def compare(name: str) -> list[dict]:
    """A row for each network: its share of the FLOPs and its time, or what its making raised."""
    torch.manual_seed(0)
    example = torch.randn(1, 3, 224, 224)
    model = torchvision.models.get_model(name).eval()
    networks = {
        "dense": model,
        "mfp": ours(model, example),
        "mfp, coupled": ours(model, example, residual="coupled"),
    }
    failed = None
    try:
        networks["Torch-Pruning"] = theirs(model, example, mfp.flops(networks["mfp, coupled"], example))
    except Exception as error:  # whatever it raises is the result
        failed = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    serving = {who: mfp.compact(network.eval(), example, fold_bn=True) for who, network in networks.items()}
    with torch.inference_mode():
        times = milliseconds_per_image(serving, torch.randn(BATCH, 3, 224, 224), seconds=2.0)
    whole = mfp.flops(model, example)
    rows = [
        {"arch": name, "batch": BATCH, "by": who, "flops_kept": mfp.flops(network, example) / whole,
         "ms": BATCH * times[who], "failed": None}
        for who, network in networks.items()
    ]  # fmt: skip
    if failed:
        rows.append({"arch": name, "batch": BATCH, "by": "Torch-Pruning", "flops_kept": None, "ms": None,
                     "failed": failed})  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", metavar="NAME", default=NETWORKS, help="of torchvision")
    parser.add_argument("--json", metavar="FILE", help="also write a result file")
    options = parser.parse_args()
    table = Table(title=f"rate {RATE}, batch {BATCH}, 224 x 224, filters in multiples of {MULTIPLE}")
    for column in ("network", "by", "FLOPs", "ms", "time", "time saved / FLOPs saved"):
        table.add_column(column)
    rows = []
    for name in options.networks:
        rows += (found := compare(name))
        for row in found:
            table.add_row(name, row["by"], *([row["failed"]] if row["failed"] else _numbers(row, found[0])))
        table.add_section()
    console = Console()
    console.print(table)
    note = f"Torch-Pruning {version('torch-pruning')}"
    console.print(f"{results.machine()}, torch {torch.__version__}, {note}")
    if options.json:
        command = " ".join(["python benchmarks/compare_torch_pruning.py", *options.networks])
        results.write(options.json, command, rows, note=note)


def _numbers(row: dict, dense: dict) -> list[str]:
    share, time = row["flops_kept"], row["ms"] / dense["ms"]
    ratio = f"{(1 - time) / (1 - share):.2f}" if share < 1 else ""
    return [f"{share:.1%}", f"{row['ms']:.1f}", f"{time:.1%}", ratio]


if __name__ == "__main__":
    main()
