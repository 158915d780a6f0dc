"""The jobs of `mfp bench`: what is done, by whom, and how much arithmetic and memory it takes at least."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import mfp
from mfp import ops, optim, reference
from mfp.bench import peers
from mfp.bench.measure import Contestant, Limits
from mfp.bench.oracle import OUR_TOLERANCE, PEER_TOLERANCE, Sample
from mfp.criteria import PAPER_CRITERIA, Kind, criterion
from mfp.errors import MfpError

FIVE = "all five criteria"
SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}


@dataclass(frozen=True)
class Job:
    """One block of the table.

    Attributes:
        name: for the table.
        contestants: ours first.
        pair_elements: weights of filter pairs that must be looked at, N(N-1)/2 * K summed over layers.
        nbytes: memory that must be read and written at least.
        limit: seconds that the machine needs at least.
    """

    name: str
    contestants: list[Contestant]
    pair_elements: float = 0.0
    nbytes: float = 0.0
    limit: Callable[[Limits], float] = field(default=lambda limits: 0.0)


class Jobs:
    """All jobs on one network."""

    def __init__(self, model: nn.Module, rate: float, image_size: int) -> None:
        self.model, self.rate, self.image_size = model, rate, image_size
        self.plan = mfp.FilterPlan.from_model(model, rate, skip=())  # all conv layers, shortcuts too
        self.weights = [weight.detach() for weight in self.plan.weights()]
        self.sample = Sample(self.weights)
        self.pair_elements = sum(len(w) * (len(w) - 1) / 2 * w[0].numel() for w in self.weights)
        self.weight_bytes = sum(w.nbytes for w in self.weights)

    def scoring(self, names: Sequence[str], others: Sequence[Contestant | None], title: str | None = None) -> Job:
        """Scores by some criteria, in one call of ours."""
        known = [criterion(name) for name in names]
        ours = Contestant(
            "mfp",
            lambda: list(mfp.score_filters(self.plan, names).values()),
            self.sample.check(known, OUR_TOLERANCE),
        )
        relations = [c for c in known if c.family == "relation"]
        return Job(
            title or ", ".join(names),
            [ours, *(other for other in others if other)],
            self.pair_elements if relations else 0.0,
            0.0 if relations else self.weight_bytes,
            lambda limits: self._arithmetic(names, limits) if relations else self.weight_bytes / limits.copy,
        )

    def _arithmetic(self, names: Sequence[str], limits: Limits) -> float:
        """One subtraction serves all relations of a pair; l1 adds its absolute value, the others an FMA."""
        squares = any(criterion(n).family == "relation" and n != "l1_distance" for n in names)
        first = self.pair_elements / limits.adds if "l1_distance" in names else 0.0
        return first + self.pair_elements / (limits.adds_and_fmas if squares else limits.adds)

    def single_criteria(self) -> list[Job]:
        """Each criterion alone, against the loops."""
        named = (*PAPER_CRITERIA, "weighted_hybrid", "l3_distance")
        loop = {name: peers.torch_loop(criterion(name), self.sample) for name in named}
        copied = copy.deepcopy(self.model)
        scores = mfp.score_filters(self.plan, ("l2_distance",))
        expected = [scores["l2_distance"][layer.slice] for layer in self.plan.layers]
        names = [layer.name for layer in self.plan.layers]
        convs = [self.model.get_submodule(name) for name in names]
        return [
            self.scoring(("l1_norm",), [loop["l1_norm"]]),
            self.scoring(("l2_norm",), [loop["l2_norm"]]),
            self.scoring(
                ("l2_distance",),
                [
                    loop["l2_distance"],
                    peers.torch_ao_fpgm(copied, names, self.rate, expected),
                    peers.torch_pruning_fpgm(self.model, convs, self.image_size),
                    peers.scipy_loop(criterion("l2_distance"), self.sample),
                ],
            ),
            self.scoring(("l1_distance",), [loop["l1_distance"]]),
            self.scoring(("cosine_distance",), [loop["cosine_distance"]]),
            self.scoring(("weighted_hybrid",), [loop["weighted_hybrid"]]),
            *([self.scoring(("l3_distance",), [loop["l3_distance"]])] if self.pair_elements < 1e9 else []),
        ]  # torch.cdist takes minutes for a general p on a large network

    def all(self) -> Iterator[Job]:
        """In the order of the table; each is made when it is due."""
        yield from self.single_criteria()
        yield self.scoring(PAPER_CRITERIA, [], FIVE)
        yield self.gradients()
        yield self.masking()
        yield self.pruning_step()
        yield from self.optimizer_steps()

    def gradients(self) -> Job:
        """Score by taylor once the gradients are there: weights times gradients."""
        generator = torch.Generator().manual_seed(2)
        gradients = [torch.empty_like(weight).normal_(generator=generator) for weight in self.weights]
        kinds = [Kind.TAYLOR], [2.0]
        expected = reference.score_filters(self.weights, *kinds, gradients, out_dtype=torch.float64)[0]

        def check(scores: Tensor, tolerance: float = OUR_TOLERANCE, cancelled: float = 0.0) -> None:
            error = (scores.double() - expected).abs() - cancelled * expected.amax()
            if not (error <= tolerance * expected).all():
                raise MfpError(f"taylor: relative error {(error / expected).amax():.1e} against the oracle")

        def loop() -> Tensor:
            pairs = zip(self.weights, gradients, strict=True)
            return torch.cat([(weight * gradient).flatten(1).sum(1).square() for weight, gradient in pairs])

        contestants = [
            Contestant("mfp", lambda: ops.score_filters(self.weights, *kinds, gradients)[0], check),
            Contestant(peers.LOOPS[0], loop, lambda scores: check(scores, PEER_TOLERANCE, 1e-6)),  # in float32
        ]
        nbytes = 2 * self.weight_bytes
        return Job("taylor, given the gradients", contestants, nbytes=nbytes, limit=lambda ls: nbytes / ls.copy)

    def masking(self) -> Job:
        """Zero the pruned rows of all weights."""
        mask = mfp.select_filters(mfp.score_filters(self.plan, ("l2_norm",)))
        pruned = [~mask.keep[layer.slice] for layer in self.plan.layers]
        originals = [weight.clone() for weight in self.weights]

        def check(_: object) -> None:
            for weight, rows, original in zip(self.weights, pruned, originals, strict=True):
                if weight[rows].any() or not torch.equal(weight[~rows], original[~rows]):
                    raise MfpError("masking: other rows than the pruned ones were changed")

        def loop() -> None:
            for weight, rows in zip(self.weights, pruned, strict=True):
                weight[rows] = 0

        contestants = [
            Contestant("mfp", lambda: mask.apply_(mask_bn=False), check, lambda: self._restore(originals)),
            Contestant("torch loop", loop, check, lambda: self._restore(originals)),
        ]
        nbytes = sum(w[rows].nbytes for w, rows in zip(self.weights, pruned, strict=True))
        return Job("mask", contestants, nbytes=nbytes, limit=lambda limits: nbytes / limits.copy)

    def _restore(self, originals: Sequence[Tensor]) -> None:
        torch._foreach_copy_(self.weights, list(originals))

    def pruning_step(self) -> Job:
        """Score by l2_distance, select, zero."""
        originals = [weight.clone() for weight in self.weights]
        counts = [layer.num_pruned for layer in self.plan.layers]

        def loop() -> None:
            for weight, count in zip(self.weights, counts, strict=True):
                filters = weight.flatten(1)
                scores = torch.cdist(filters, filters).sum(0)
                weight[scores.topk(count, largest=False).indices] = 0

        def check(_: object) -> None:
            for weight, count in zip(self.weights, counts, strict=True):
                if int((weight.flatten(1) == 0).all(1).sum()) != count:
                    raise MfpError(f"pruning step: not {count} filters of {len(weight)} were zeroed")

        contestants = [
            Contestant("mfp", lambda: mfp.prune_filters_(self.plan, "l2_distance", mask_bn=False), check,
                       lambda: self._restore(originals)),
            Contestant("torch.cdist, topk, zero", loop, check, lambda: self._restore(originals)),
        ]  # fmt: skip
        job = Job("score by l2_distance, select, zero", contestants, self.pair_elements,
                  limit=lambda limits: self._arithmetic(("l2_distance",), limits))  # fmt: skip
        return job

    def optimizer_steps(self) -> list[Job]:
        """SGD with momentum on all parameters, masked and with an empty mask, against torch's fused SGD without one."""
        plan = mfp.FilterPlan.from_model(self.model, self.rate)  # as it is trained: without the shortcuts
        mask = mfp.select_filters(mfp.score_filters(plan, ("l2_norm",)))
        plain = torch.optim.SGD(_with_gradients(self.model), fused=True, **SGD)
        plain.step()  # momentum is made here
        jobs = []
        for title, keep in ((f"SGD step, rate {self.rate:g} masked", mask.keep),
                            ("SGD step, empty mask", torch.ones_like(mask.keep))):  # fmt: skip
            model = copy.deepcopy(self.model)  # of its own: the other's steps would bring pruned filters back
            chosen = mfp.FilterMask(mfp.FilterPlan(model, plan.layers), keep)
            ours = optim.MaskedSGD(_with_gradients(model), mask=chosen, **SGD)
            ours.step()
            contestants = [
                Contestant("mfp.optim.MaskedSGD", ours.step, _check_step(ours, chosen)),
                Contestant("torch.optim.SGD(fused=True), no mask", plain.step, _check_step(plain, None)),
            ]
            parameters = ours.param_groups[0]["params"]
            skipped = sum(int((~keep[o : o + n]).sum()) * p.numel() // n for p, o, n in chosen.parameters())
            nbytes = 5 * 4 * (sum(p.numel() for p in parameters) - skipped)  # read 3, write 2
            jobs.append(Job(title, contestants, nbytes=nbytes, limit=lambda limits, n=nbytes: n / limits.copy))
        return jobs


def _with_gradients(model: nn.Module) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return list(model.parameters())


def _check_step(optimizer: torch.optim.Optimizer, mask: mfp.FilterMask | None) -> Callable[[object], None]:
    """A check of one more step against the float64 oracle: the checked step is made here, from a known state."""

    def check(_: object) -> None:
        parameters = optimizer.param_groups[0]["params"]
        wide = [p.detach().double() for p in parameters]
        buffers = [optimizer.state[p]["momentum_buffer"].double() for p in parameters]
        spans = {id(p): (o, n) for p, o, n in mask.parameters()} if mask else {}
        offsets, rows = zip(*(spans.get(id(p), (-1, 1)) for p in parameters), strict=True)
        keep = mask.keep if mask else None
        optimizer.step()
        reference.masked_sgd_(wide, [p.grad.double() for p in parameters], buffers, keep, offsets, rows, SGD["lr"],
                              SGD["momentum"], 0.0, SGD["weight_decay"], False, False, False)  # fmt: skip
        for parameter, expected in zip(parameters, wide, strict=True):
            torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-6)

    return check
