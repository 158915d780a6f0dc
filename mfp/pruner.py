"""FilterPruner: what a training loop calls. At each pruning point it picks the criterion and zeroes the filters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from mfp import attributes, schedule
from mfp.affine_backup import AffineBackup
from mfp.allocation import Allocator
from mfp.attributes import Batches
from mfp.choice import BY_SENSITIVITY, Choice, choose
from mfp.compact.training import Smaller
from mfp.criteria import PAPER_CRITERIA
from mfp.errors import MfpError
from mfp.example import FirstBatch
from mfp.gradients import Loss
from mfp.mask import FilterMask
from mfp.neighbours import Comparison
from mfp.plan import FilterPlan, check_plan_arguments, unwrap
from mfp.scores import FilterScores, batchnorm_scales, check_calibration, check_criteria, score_filters
from mfp.selection import prune_filters_
from mfp.shrinking import shrink
from mfp.structure import takes_images

STATE_VERSION = 1


@dataclass(frozen=True)
class Decision:
    """What happened at one pruning point.

    Attributes:
        epoch: the epoch that had just ended, from 0.
        rate_factor: share of the plan's final rates that was in force.
        criterion: the chosen one, or ``{layer: criterion}`` when chosen per layer.
        attribute: name of the meta-attribute.
        attribute_before: of the unpruned network; None when there was only one candidate, so that nothing was tried.
        attribute_after: of the network pruned with the chosen criterion; None likewise.
        neighbours: attribute of each candidate's network (chosen per layer: empty). With ``allocate`` there are two of
            each criterion; the one with rates that suit the layers is called ``"l2_norm by sensitivity"``.
        churn: share of the pruned filters that the mask before did not prune.
        num_pruned: filters pruned.
        digest: fingerprint of the mask.
        mask: the mask, with its plan; None in decisions that were loaded from a file.
        layer_rates: those in force, where they are not the plan's own.
        hindsight: what :meth:`FilterPruner.step` was asked to measure besides, of each candidate's network.
    """

    epoch: int
    rate_factor: float
    criterion: str | dict[str, str]
    attribute: str
    attribute_before: float | None
    attribute_after: float | None
    neighbours: dict[str, float]
    churn: float
    num_pruned: int
    digest: str
    mask: FilterMask | None = field(default=None, repr=False, compare=False)
    layer_rates: dict[str, float] | None = None
    hindsight: dict[str, float] = field(default_factory=dict)

    @property
    def neighbour(self) -> str | dict[str, str]:
        """The chosen one's name in ``neighbours`` and ``hindsight``."""
        return self.criterion + BY_SENSITIVITY if self.layer_rates else self.criterion

    def to_dict(self) -> dict:
        """Everything but the mask, as plain values for JSON."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "mask"}


class FilterPruner:
    """Prunes a network while it trains, switching to the criterion whose neighbour stays closest (arXiv 1904.03961).

    >>> pruner = mfp.FilterPruner(model, rate=0.4, attribute="loss", calibration=batches)
    >>> for epoch in range(epochs):
    ...     train_one_epoch(model)
    ...     decision = pruner.step(epoch)
    >>> small = mfp.compact(model, example_input)

    Args:
        model: the network; DistributedDataParallel and torch.compile wrappers are looked through.
        rate: share of filters pruned per layer, in [0, 1).
        criteria: candidates; with one, nothing is tried out. ``taylor`` is measured on the calibration batches at each
            pruning point, without a trace; where filters are pruned softly, those that were zero compete again with
            what training has made of them since.
        attribute: ``weight_energy`` or ``sparsity`` (no data), ``loss``, ``top1_error``, ``top5_error`` (measured on
            the calibration batches), or a callable ``model -> float``.
        calibration: ``[(inputs, targets), ...]``, the same batches for all candidates.
        loss: what ``taylor`` takes gradients of, ``(outputs, targets) -> scalar``, an average over the samples;
            cross-entropy for None.
        mode: ``soft`` (pruned filters learn on), ``hard`` (the first choice holds; gradients are masked),
            ``asymptotic`` or ``cubic`` (soft, with a growing rate).
        one_way: with a growing rate, filters never come back: each mask contains the one before, and holds until the
            next (as in ``hard`` mode). Further filters are chosen among those that are left.
        interval: prune every so many epochs, and after the last.
        epochs: how many there will be; needed by growing rates, and to prune after the last.
        mask_bn: zero biases and BatchNorm entries with the filters. Where pruned filters learn on, the values come back
            with the next forward pass in training mode, since no gradient would reach a filter behind a zeroed one.
        channel_multiple: round the kept filters per layer up to a multiple of this.
        skip, layer_rates, residual: see :meth:`mfp.FilterPlan.from_model`.
        example_input: what the model takes (as for :func:`mfp.compact`): its graph is captured for the plan. Without it
            the calibration batches serve, or a plain image, or the first batch that the model sees from now on.
        per_layer: choose the criterion for each layer; only for attributes without data.
        recalibrate: estimate BatchNorm statistics anew on the calibration batches, for the network and each neighbour
            before they are measured, and after each pruning. A pruned network with the statistics of the whole one is
            near chance whatever was pruned. None: where the attribute looks at data and there are calibration batches.
            False is the papers' way.
        allocate: ``"flops"`` or ``"parameters"``: at each pruning point every criterion is tried with the plan's rates
            and with rates that save about as much of these where the calibrated loss rises least, as
            :func:`mfp.find_rates` chooses them (for rates that are found once, give its result as ``layer_rates``).
            The losses are measured anew each time, by the criterion that was chosen last. It takes calibration batches,
            and per pruning point one forward pass for each layer at each of five rates.

    Raises:
        MfpError: any argument that does not fit; nothing was changed then.
    """

    def __init__(
        self,
        model: nn.Module,
        rate: float = 0.4,
        *,
        criteria: Sequence[str] = PAPER_CRITERIA,
        attribute: str | Callable[[nn.Module], float] = "weight_energy",
        calibration: Batches | None = None,
        loss: Loss | None = None,
        mode: str = "soft",
        one_way: bool = False,
        interval: int = 1,
        epochs: int | None = None,
        mask_bn: bool = True,
        channel_multiple: int = 1,
        skip: Sequence[str] | None = None,
        layer_rates: Mapping[str, float] | None = None,
        residual: str = "index",
        example_input: Any = None,
        per_layer: bool = False,
        recalibrate: bool | None = None,
        allocate: str | None = None,
    ) -> None:
        self.model = unwrap(model)
        known = check_criteria(criteria)
        self.criteria = tuple(c.name for c in known)
        calibration = list(calibration) if calibration is not None else None
        check_calibration(known, calibration)
        attributes.check(attribute, calibration)
        schedule.check(mode, interval, epochs, one_way)
        if per_layer and attribute not in attributes.WITHOUT_DATA:
            raise MfpError(
                f"per_layer=True needs an attribute without data ({', '.join(attributes.WITHOUT_DATA)}), "
                f"not {attribute!r}"
            )
        if recalibrate is None:
            recalibrate = attributes.looks_at_data(attribute) and bool(calibration)
        if recalibrate and not calibration:
            raise MfpError("recalibrate=True needs calibration batches")
        self.allocator = None if allocate is None else Allocator(allocate, calibration, per_layer)
        self.attribute, self.calibration, self.loss = attribute, calibration, loss
        self.mode, self.one_way, self.interval, self.epochs = mode, one_way, interval, epochs
        self.mask_bn, self.per_layer, self.recalibrate = mask_bn, per_layer, recalibrate
        check_plan_arguments(rate, skip, layer_rates or {}, channel_multiple, residual)
        self._plan_arguments = {
            "rate": rate, "skip": skip, "layer_rates": layer_rates,
            "channel_multiple": channel_multiple, "residual": residual,
        }  # fmt: skip
        self._plan: FilterPlan | None = None
        self._affine_backup: AffineBackup | None = None
        self.comparison = Comparison(self.model, attribute, calibration, recalibrate, mask_bn)
        self.comparison.check()  # now, and not after an epoch of training
        self._first_batch: FirstBatch | None = None
        if example_input is None and calibration:
            example_input = FirstBatch.part_of(self.model, (calibration[0][0],), {})
        if example_input is not None or takes_images(self.model):
            self._make_plan(example_input)
        else:
            self._first_batch = FirstBatch(self.model)
        self.example_input = example_input
        self.smaller: Smaller | None = None  # the network after shrink_
        self.shrunk_by: FilterMask | None = None  # the mask that it was made by
        self.mask: FilterMask | None = None
        self.decisions: list[Decision] = []

    def _make_plan(self, example_input: Any) -> None:
        plan = FilterPlan.from_model(self.model, example_input=example_input, **self._plan_arguments)
        if "bn_scale" in self.criteria:
            batchnorm_scales(plan)  # raises where a layer has none
        if self.allocator:
            self.allocator.look_at(plan, example_input, self._plan_arguments)
        self._plan = plan
        self._affine_backup = AffineBackup(self._plan)

    @property
    def plan(self) -> FilterPlan:
        """The layers to prune. Raises MfpError where it takes an example to know them, and none was seen yet."""
        if self._plan is None:
            if self._first_batch.example is None:
                raise MfpError(
                    f"{type(self.model).__name__} takes no plain image and has seen no batch yet, so its graph is not "
                    "known: give example_input=..., or call the model first"
                )
            self.example_input = self._first_batch.example
            self._make_plan(self.example_input)
            self._first_batch.forget()
        return self._plan

    @property
    def affine_backup(self) -> AffineBackup:
        """The biases and BatchNorm entries of pruned filters, set aside until training goes on; made with the plan."""
        return self._affine_backup if self.plan is not None else None

    @property
    def attribute_name(self) -> str:
        """The attribute's name, a callable's own included."""
        return self.attribute if isinstance(self.attribute, str) else getattr(self.attribute, "__name__", "attribute")

    @property
    def holds(self) -> bool:
        """Whether what the mask prunes stays zero: in ``hard`` mode, and on the one way."""
        return self.mask is not None and (self.mode == "hard" or self.one_way)

    @torch.no_grad()
    def step(self, epoch: int, hindsight: Callable[[nn.Module], float] | None = None) -> Decision | None:
        """Call at the end of each epoch (from 0), or with -1 before the first to prune a trained network at once.

        Args:
            hindsight: measured for each candidate's network too, without a say in the choice: with the accuracy on
                images that were held out, the decision shows what each candidate alone would have given.

        Returns:
            the decision, or None when the schedule says not now. In ``hard`` mode only the first call decides; later
            ones zero the same filters again, in case something moved them. On the one way a smaller network has zero
            filters then: call :meth:`shrink_` again.

        Raises:
            MfpError: weights that are not finite; nothing is zeroed then.
        """
        if self.mode == "hard" and self.mask is not None:
            if self.smaller is None:
                self.mask.apply_(self.mask_bn)
            return None
        if not schedule.prune_now(epoch, self.interval, self.epochs):
            return None
        self._widen()
        self.affine_backup.restore_()  # does something only when no training came between two calls
        values = self.affine_backup.snapshot()
        factor = schedule.rate_factor(self.mode, epoch, self.epochs)
        plan = self.plan if factor == 1.0 else self.plan.scaled(factor)
        if len(self.criteria) == 1 and not self.allocator:
            mask = prune_filters_(plan, self.criteria[0], mask_bn=self.mask_bn, **self._scored_on())
            choice = Choice(self.criteria[0], mask, None, None, {})
        else:
            choice = choose(self, plan, hindsight)
            choice.mask.apply_(self.mask_bn)
        if self.mask_bn and self.mode != "hard" and not self.one_way:
            self.affine_backup.set_aside(values, choice.mask)
        if self.recalibrate:
            self.comparison.settle_(choice.statistics)
        if self.smaller is not None:
            self.smaller.load_(self.smaller.network, self.plan.model.to("cpu"))
        decision = Decision(
            epoch=epoch,
            rate_factor=factor,
            criterion=choice.criterion,
            attribute=self.attribute_name,
            attribute_before=choice.before,
            attribute_after=choice.after,
            neighbours=choice.neighbours,
            churn=choice.mask.churn(self.mask),
            num_pruned=choice.mask.num_pruned,
            digest=choice.mask.digest,
            mask=choice.mask,
            layer_rates=choice.layer_rates,
            hindsight=choice.hindsight,
        )
        self.mask = choice.mask
        self.decisions.append(decision)
        return decision

    def hold_(self) -> None:
        """From now on the current mask holds, as in ``hard`` mode: the pruned filters stay zero."""
        self.affine_backup.values = {}
        self.mode = "hard"

    def mask_gradients_(self) -> None:
        """Where the mask holds, between ``backward()`` and a step: zero the gradients of pruned filters."""
        if self.holds and self.smaller is None:
            self.mask.apply_to_gradients_(self.mask_bn)

    def shrink_(
        self, optimizer: Optimizer | None = None, *, averaged: Any = None, within: nn.Module | None = None
    ) -> nn.Module:
        """Go on with the network that is left: from where the mask holds, the same steps on less arithmetic.

        >>> if epoch == 40:
        ...     pruner.hold_()
        ...     model = pruner.shrink_(optimizer)

        On the one way, ``if pruner.step(epoch): model = pruner.shrink_(optimizer)`` makes it smaller at every point.

        One step of the smaller network is the masked network's to rounding (which is tried out in float64 on random
        input), but for dropout, which draws numbers for the channels that are left. Only what the mask holds at zero
        goes. Wrap the network in DistributedDataParallel anew, and compile it anew. The pruner keeps its mask and its
        decisions, which are of the original network; :meth:`masked` is that network with the new weights. To resume:
        build the original network, load the pruner's state, call ``shrink_``, load the other states.

        Args:
            optimizer: changed in place with its momentum and other state, so that learning rate schedules and gradient
                scalers go on with it.
            averaged: an average of the weights, or several: anything with a copy of the network as ``module`` (torch's
                AveragedModel, timm's ModelEma); changed in place.
            within: the module that the pruner's network is a part of (a detector with this backbone, a trainer's
                module): there the smaller network takes its place, and the optimiser may have all its parameters.

        Returns:
            the smaller network (the same one, until the mask is another). Where it cannot be had, the masked network,
            with a warning that says why (none on the one way, as long as the mask takes too little to make anything
            smaller): training can go on with either.

        Raises:
            MfpError: the mask does not hold yet, or the optimiser has state or parameters that are not understood.
                Nothing was changed then.
        """
        return shrink(self, optimizer, averaged, within)

    def masked(self, network: nn.Module | None = None) -> nn.Module:
        """The masked network in its original shape; after :meth:`shrink_` on the CPU, with the smaller one's weights.

        Args:
            network: take the weights from this copy of the smaller network (an average).
        """
        if self.smaller is None:
            return self.model
        return self.smaller.widen_(self.plan.model.to("cpu"), network or self.smaller.network)

    def _widen(self) -> None:
        """After :meth:`shrink_`, the original network gets the weights as they are now, where the smaller one is."""
        if self.smaller is not None:
            self.masked().to(next(self.smaller.network.parameters()).device)

    def score(self, plan: FilterPlan | None = None, more: Sequence[str] = ()) -> FilterScores:
        """Scores of all filters as they are now by every candidate, and by ``more`` criteria; all processes take part.

        Args:
            plan: the pruner's own, or one made from it.
        """
        self._widen()
        return score_filters(plan or self.plan, (*self.criteria, *more), **self._scored_on())

    def _scored_on(self) -> dict[str, Any]:
        """What criteria look at, besides weights."""
        return {"calibration": self.calibration, "loss": self.loss, "live": self.mask if self.one_way else None}

    def state_dict(self) -> dict:
        """What a resumed run needs: plain values for JSON, and tensors.

        The tensors are the current mask ``"keep"`` (bool ``[F]``) and, in ``"affine_backup"``, the BatchNorm entries
        and biases that pruned filters get back when training goes on.
        """
        state = {
            "version": STATE_VERSION,
            "layers": self._layers(),
            "decisions": [decision.to_dict() for decision in self.decisions],
            "affine_backup": dict(self.affine_backup.values),
            "shrunk": self.smaller is not None,
        }
        if self.mask is not None:
            state["keep"] = self.mask.keep.cpu()
        return state

    def load_state_dict(self, state: Mapping) -> None:
        """Take over the mask and the decisions of :meth:`state_dict`; weights come from the model's own state.

        Raises:
            MfpError: state of another version, or of other layers; nothing is changed then.
        """
        if state.get("version") != STATE_VERSION:
            raise MfpError(f"pruner state has version {state.get('version')!r}, this mfp reads {STATE_VERSION}")
        if [list(layer) for layer in state["layers"]] != self._layers():
            raise MfpError(
                f"pruner state is of another network: its layers are {[name for name, *_ in state['layers']]}, "
                f"this plan's {[layer.name for layer in self.plan.layers]}"
            )
        decisions = [Decision(**values) for values in state["decisions"]]
        mask = FilterMask(self.plan, state["keep"].to(self.plan.weights()[0].device)) if "keep" in state else None
        self.affine_backup.check(state["affine_backup"])
        self.affine_backup.set_aside(state["affine_backup"], mask)
        self.mask, self.decisions = mask, decisions
        if state.get("shrunk") and not self.one_way:
            self.hold_()

    def _layers(self) -> list[list]:
        return [[layer.name, layer.num_filters, layer.filter_size] for layer in self.plan.layers]
