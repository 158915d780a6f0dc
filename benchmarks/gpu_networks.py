"""Two steps of `make gpu`: dense ResNet-50 and its compact forms in half precision, channels_last.

python benchmarks/gpu_networks.py eager [--device cpu]      outputs against float32, then times in CUDA graphs
python benchmarks/gpu_networks.py compiled [--device cpu]   times through torch.compile, in CUDA graphs

The forms are those of the option `residual`: coupled, keep, index. All networks, the dense one too, have their
BatchNorm folded. `saved_of_flops` is the share of time saved over the share of FLOPs saved.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from gpu_timing import Bench
from torch import Tensor, nn

import mfp
from mfp.train.models import build_model

RATE, MULTIPLE = 0.4, 8
FORMS = ("dense", "coupled", "keep", "index")
# Largest difference to the masked network in float32 on this device, relative to its largest output.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass
class Form:
    name: str
    masked: nn.Module  # the whole network, pruned filters zero
    small: nn.Module  # what serves
    flops_kept: float


def settle(model: nn.Module, images: Tensor) -> None:
    """BatchNorm statistics of these images: with random weights and none, activations grow beyond float16."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the average of what it sees
    with torch.no_grad():
        model.train()(images)
    model.eval()


def forms(bench: Bench, names: Iterable[str] = FORMS) -> Iterator[Form]:
    arch, size = ("resnet20", 32) if bench.dry else ("resnet50", 224)
    torch.manual_seed(0)
    dense, images = build_model(arch, 1000), torch.randn(16, 3, size, size)
    settle(dense.to(bench.device), images.to(bench.device))
    dense.cpu()
    for name in names:
        masked = copy.deepcopy(dense)
        if name != "dense":
            mfp.prune_filters_(
                mfp.FilterPlan.from_model(masked, RATE, residual=name, channel_multiple=MULTIPLE), "l2_norm"
            )
        small = mfp.compact(masked, images[:1], fold_bn=True)
        kept = small.report.flops_after / small.report.flops_before
        yield Form(name, masked, small, kept)


def images_of(bench: Bench, batch: int, dtype: torch.dtype) -> Tensor:
    size = 32 if bench.dry else 224
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))
    return images.to(bench.device, dtype, memory_format=torch.channels_last)


def placed(bench: Bench, network: nn.Module, dtype: torch.dtype) -> nn.Module:
    return copy.deepcopy(network).to(bench.device, dtype, memory_format=torch.channels_last)


@torch.no_grad()
def compare(bench: Bench, form: Form) -> bool:
    """The compact network in each precision against the masked one in float32."""
    expected = placed(bench, form.masked, torch.float32)(images_of(bench, 4, torch.float32)).double()
    right = True
    for dtype, allowed in TOLERANCES.items():
        outputs = placed(bench, form.small, dtype)(images_of(bench, 4, dtype)).double()
        apart = float((outputs - expected).abs().max() / expected.abs().max())
        right &= apart <= allowed  # False for NaN, too
        bench.add(job="outputs against masked float32", form=form.name, dtype=str(dtype)[6:], difference=apart,
                  allowed=allowed, right=apart <= allowed)  # fmt: skip
    return right


def in_a_graph(bench: Bench, network: Callable[[Tensor], Tensor], images: Tensor) -> Callable[[], object]:
    """The call as one replay of a CUDA graph, so that the host's time is not measured."""
    if bench.dry:
        return lambda: network(images)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            network(images)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        network(images)
    return graph.replay


@torch.no_grad()
def measure(bench: Bench, found: list[Form], way: str, dtypes, batches, prepare: Callable) -> None:
    """A row a form, batch and dtype; the largest batch first, as its goal is the one that counts."""
    for dtype in dtypes:
        networks = {form.name: prepare(placed(bench, form.small, dtype)) for form in found}
        for batch in batches:
            dense = 0.0
            for form in found:
                call = in_a_graph(bench, networks[form.name], images_of(bench, batch, dtype))
                ms = bench.median_ms(call, repeats=11)
                dense = dense or ms
                saved = {} if form.name == "dense" else {"saved_of_flops": (1 - ms / dense) / (1 - form.flops_kept)}
                bench.add(job="ResNet-50 forward", way=way, form=form.name, dtype=str(dtype)[6:], batch=batch, ms=ms,
                          flops_kept=form.flops_kept, **saved)  # fmt: skip
                del call
                if not bench.dry:
                    torch.cuda.empty_cache()


def eager(bench: Bench) -> None:
    found, right = [], True
    for form in forms(bench):
        right &= compare(bench, form)
        found.append(form)
    batches = (2, 1) if bench.dry else (256, 32, 1)
    torch.backends.cudnn.benchmark = True
    measure(bench, found, "eager", (torch.float16, torch.bfloat16), batches, lambda network: network)
    if not right:
        sys.exit("outputs differ by more than is allowed")


def compiled(bench: Bench) -> None:
    import torch._inductor.config

    torch._inductor.config.freezing = True
    found = list(forms(bench))

    def prepare(network: nn.Module) -> Callable:
        return torch.compile(network, dynamic=False, backend="eager" if bench.dry else "inductor")

    for batch in (2,) if bench.dry else (256, 1, 32):  # each compiles anew
        measure(bench, found, "torch.compile", (torch.float16,), (batch,), prepare)


def main() -> None:
    way = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if way not in ("eager", "compiled"):
        print(__doc__)
        sys.exit(0 if way in ("-h", "--help") else 1)
    {"eager": eager, "compiled": compiled}[way](Bench.from_arguments(__doc__))


if __name__ == "__main__":
    main()
