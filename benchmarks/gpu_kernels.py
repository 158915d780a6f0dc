"""A step of `make gpu`: the ops on ResNet-50's conv weights, each backend beside torch's own operators, and what a
pruning point takes.

python benchmarks/gpu_kernels.py [--device cpu]

Inputs are renewed before each call, so that they are not in L2 and a pruned network is never pruned again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
from gpu_resources import RESNET50
from gpu_timing import Bench
from torch import Tensor, nn
from torch.nn.functional import normalize

import mfp
from mfp import backend, criteria, ops

RATE = 0.4
FIVE = criteria.PAPER_CRITERIA
JOB = "five criteria, selection and zeroing"
EPOCH = 300.0  # seconds, of an epoch that a pruning point is held against
SGD = (0.1, 0.9, 0.0, 1e-4, False, False, False)
ADAMW = (1e-3, 0.9, 0.999, 1e-8, 0.01, False, 10)
TORCH_WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "l1_norm": lambda w: w.abs().sum(1),
    "l2_norm": lambda w: torch.linalg.vector_norm(w, dim=1),
    "l1_distance": lambda w: torch.cdist(w, w, p=1).sum(1),
    "l2_distance": lambda w: torch.cdist(w, w).sum(1),
    "cosine_distance": lambda w: (1 - normalize(w) @ normalize(w).T).sum(1),
}


class Weights:
    """A network's conv weights with random values, gradients and optimiser states, and copies to renew them from."""

    def __init__(self, bench: Bench) -> None:
        shapes = [(8, 27), (12, 8), (9, 30)] if bench.dry else RESNET50
        torch.manual_seed(0)
        self.start = [torch.randn(n, k, device=bench.device) * k**-0.5 for n, k in shapes]
        self.weights = [weight.clone() for weight in self.start]
        self.grads = [torch.randn_like(weight) for weight in self.start]
        self.states = [[torch.zeros_like(weight) for weight in self.start] for _ in range(2)]
        self.counts = [n for n, _ in shapes]
        self.num_pruned = [int(n * RATE) for n in self.counts]
        self.offsets = [sum(self.counts[:i]) for i in range(len(self.counts))]
        self.keep = torch.rand(sum(self.counts), device=bench.device) >= RATE
        self.flush = torch.empty(1 if bench.dry else 256 << 20, dtype=torch.uint8, device=bench.device)

    def renew(self) -> None:
        torch._foreach_copy_(self.weights, self.start)
        self.flush.zero_()


def asked(names) -> tuple[list[int], list[float]]:
    known = [criteria.criterion(name) for name in names]
    return [int(c.kind) for c in known], [c.exponent for c in known]


def module_of(name: str):
    """Where the functions of a backend are."""
    if name != "triton":
        return torch.ops.mfp
    from mfp import kernels

    return kernels


def usable_backends(bench: Bench) -> list[str]:
    device = torch.device(bench.device)
    found = [r.name for r in backend.backends().values() if r.unusable is None and r.accepts(device)]
    return [name for name in found if name != "reference"]


def torch_prune(weights: Weights) -> None:
    for name in FIVE:
        for weight in weights.weights:
            TORCH_WAYS[name](weight)
    for weight, count in zip(weights.weights, weights.num_pruned, strict=True):
        weight[TORCH_WAYS["l1_norm"](weight).argsort()[:count]] = 0


def scoring(bench: Bench, weights: Weights, backends: list[str]) -> None:
    def add(job, contestant, run, repeats=21):
        bench.add(job=job, contestant=contestant, ms=bench.median_ms(run, weights.renew, repeats))

    for name in backends:
        add(JOB, name, lambda name=name: ops.prune_filters_(
            weights.weights, [], [], weights.num_pruned, *asked(FIVE), 3, backend=name))  # fmt: skip
    for names in (("l2_distance",), ("l1_distance",), ("cosine_distance",), ("l1_norm", "l2_norm"), ("l3_distance",)):
        for name in backends:
            add(" + ".join(names), name, lambda name=name, names=names: ops.score_filters(
                weights.weights, *asked(names), backend=name), 9)  # fmt: skip
        if set(names) <= set(FIVE):
            add(" + ".join(names), "torch loops", lambda names=names: [
                TORCH_WAYS[n](w) for n in names for w in weights.weights], 5)  # fmt: skip
    add(JOB, "torch loops", lambda: torch_prune(weights), 3)


def stepping(bench: Bench, weights: Weights, backends: list[str]) -> None:
    def add(job, contestant, run):
        bench.add(job=job, contestant=contestant, ms=bench.median_ms(run, weights.renew))

    masks = (weights.keep, weights.offsets, weights.counts)
    tensors = (weights.weights, weights.grads, weights.states[0])
    for name in backends:
        module = module_of(name)
        add("mask all weights", name, lambda name=name: ops.mask_filters_(weights.weights, *masks, backend=name))
        for keep, what in ((masks, "mask of 40 %"), ((None, *masks[1:]), "no mask")):
            add(f"SGD step, {what}", name, lambda m=module, k=keep: m.masked_sgd_(*tensors, *k, *SGD))
            add(f"AdamW step, {what}", name, lambda m=module, k=keep: m.masked_adamw_(
                *tensors, weights.states[1], *k, *ADAMW))  # fmt: skip
    for weight, grad in zip(weights.weights, weights.grads, strict=True):
        weight.grad = grad
    sgd = torch.optim.SGD(weights.weights, lr=0.1, momentum=0.9, weight_decay=1e-4, fused=True)
    adamw = torch.optim.AdamW(weights.weights, lr=1e-3, fused=True)
    rows = [part[:, None].float() for part in weights.keep.split(weights.counts)]

    def step_and_mask():
        sgd.step()
        torch._foreach_mul_(weights.weights, rows)

    add("SGD step, no mask", "torch fused", sgd.step)
    add("AdamW step, no mask", "torch fused", adamw.step)
    add("SGD step, mask of 40 %", "torch fused, then a product", step_and_mask)


def joining(bench: Bench, backends: list[str]) -> None:
    shape = (2, 8, 3, 3) if bench.dry else (64, 2048, 14, 14)

    def add(job, contestant, run):
        bench.add(job=job, contestant=contestant, ms=bench.median_ms(run))

    index = torch.arange(0, shape[1], 2, device=bench.device)
    for dtype in (torch.float32, torch.float16):
        residual = torch.randn(shape, device=bench.device).to(dtype).contiguous(memory_format=torch.channels_last)
        branch = residual[:, ::2].contiguous(memory_format=torch.channels_last)
        job = f"join of half of {shape[1]} channels + ReLU, {str(dtype)[6:]}"
        for name in backends:
            add(job, name, partial(module_of(name).scatter_add_, residual, branch, index, True))
        add(job, "torch", lambda x=residual, y=branch: x.index_add_(1, index, y).relu_())


def limits(bench: Bench) -> None:
    """What the device can do at most, measured in this run."""
    source = torch.empty(1 << (10 if bench.dry else 28), device=bench.device)
    target = torch.empty_like(source)
    seconds = bench.median_ms(lambda: target.copy_(source)) / 1e3
    terabytes = 2 * source.nbytes / 1e12
    bench.add(job="copy, bytes read and written", contestant="torch", terabytes_a_second=terabytes / seconds)
    size = 16 if bench.dry else 8192
    a = torch.randn(size, size, device=bench.device)
    seconds = bench.median_ms(lambda: a @ a, repeats=5) / 1e3
    bench.add(job="float32 matrix product", contestant="torch", tera_fma_a_second=size**3 / seconds / 1e12)


def pruning_point(bench: Bench) -> None:
    """FilterPruner.step with the loss of 256 images for each of five candidates, against an epoch of five minutes."""
    from mfp.train.models import build_model

    arch, images, batch, size = ("resnet20", 4, 2, 32) if bench.dry else ("resnet50", 256, 64, 224)
    torch.manual_seed(0)
    model: nn.Module = build_model(arch, 10).to(bench.device)
    calibration = [
        (torch.randn(batch, 3, size, size, device=bench.device), torch.randint(10, (batch,), device=bench.device))
        for _ in range(images // batch)
    ]
    pruner = mfp.FilterPruner(model, rate=RATE, attribute="loss", calibration=calibration)
    for epoch, which in enumerate(("first", "second")):
        seconds = bench.seconds(lambda epoch=epoch: pruner.step(epoch))
        job = f"pruning point, {images} images"
        bench.add(job=job, contestant=which, ms=1e3 * seconds, share_of_epoch=seconds / EPOCH)


def main() -> None:
    bench = Bench.from_arguments(__doc__)
    backends, weights = usable_backends(bench), Weights(bench)
    if not backends:
        sys.exit(f"no backend runs on {bench.device} (mfp info says why)")
    scoring(bench, weights, backends)
    stepping(bench, weights, backends)
    pruning_point(bench)
    joining(bench, backends)
    limits(bench)


if __name__ == "__main__":
    main()
