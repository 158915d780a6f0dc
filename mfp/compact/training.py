"""The smaller network to train on: where a mask holds, it takes the steps that the masked network would have taken.

``mfp.compact`` looks at values, for a network that is done: it folds constants into biases, and removes what happens to
be zero. Here only what the mask holds at zero goes, since all else may learn: the structure depends on the mask alone.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from mfp.batch_norm import NarrowBatchNorm2d
from mfp.capture import capture
from mfp.compact.analysis import analyse
from mfp.compact.check import largest_difference, leaves_of, to_double
from mfp.compact.count import count_parameters
from mfp.compact.optimizer import Origin
from mfp.compact.write import finish, modes_of, origins, write
from mfp.errors import MfpError
from mfp.modules import ResidualJoin

aten = torch.ops.aten

CLOSE = 1e-6  # of the largest entry, between steps of the two networks in float64


class NotEqual(MfpError):
    """The smaller network would not train as the masked one does."""


class NothingSmaller(NotEqual):
    """It would have as many parameters."""


@dataclass(frozen=True)
class Smaller:
    """A masked network without its pruned filters.

    Attributes:
        network: what to train on.
        origins: where its parameters and buffers come from, by name.
    """

    network: nn.Module
    origins: dict[str, Origin]

    @torch.no_grad()
    def cut(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is left of tensors of the masked network's names and shapes, by the smaller network's names."""
        known = [(name, origin) for name, origin in self.origins.items() if origin.name in tensors]
        return {name: origin.left(tensors[origin.name]) for name, origin in known}

    @torch.no_grad()
    def load_(self, network: nn.Module, like: nn.Module) -> nn.Module:
        """A copy of the smaller network gets the weights and statistics of a masked network."""
        tensors = named_tensors(network)
        for name, value in self.cut(named_tensors(like)).items():
            tensors[name].copy_(value)
        return network

    @torch.no_grad()
    def widen_(self, model: nn.Module, network: nn.Module) -> nn.Module:
        """The way back: a network of the original shape gets the weights and statistics of a smaller one; parameters
        and statistics that are not there are zero."""
        olds, news = named_tensors(model), named_tensors(network)
        constants = dict(model.named_buffers(remove_duplicate=False)).keys() - statistics(model)
        for name, origin in self.origins.items():
            old = olds.get(origin.name)
            if old is not None:  # else computed from buffers alone
                like = old if origin.name in constants else torch.zeros_like(old)
                old.copy_(self._spread(name, news[name].detach().to(old.device), like))
        return model

    def back(self, model: nn.Module) -> dict[str, Origin]:
        """Where the parameters of a network of the original shape come from, by name, once it trains again instead of
        the smaller one: their entries that are not there have state 0."""
        olds = dict(model.named_parameters())

        def spread(value: Tensor, name: str, old: Tensor) -> Tensor:
            return self._spread(name, value, torch.zeros_like(old, dtype=value.dtype))

        names = {origin.name: name for name, origin in self.origins.items() if origin.name in olds}
        return {own: Origin(name, partial(spread, name=name, old=olds[own])) for own, name in names.items()}

    def _spread(self, name: str, value: Tensor, like: Tensor) -> Tensor:
        """A tensor of a smaller network's tensor's shape in the original shape: entries that are not there as in
        ``like``."""
        places = torch.arange(2, like.numel() + 2).view(like.shape)  # 0 and 1: what fills slots without a meaning
        index = self.origins[name].left(places).flatten() - 2
        wide = like.detach().clone(memory_format=torch.contiguous_format).flatten()
        wide[index[index >= 0]] = value.flatten()[index >= 0]
        return wide.view(like.shape)


def statistics(model: nn.Module) -> set[str]:
    """Names of the BatchNorms' running means and variances."""
    norms = [name for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return {f"{name}.{part}".lstrip(".") for name in norms for part in ("running_mean", "running_var")}


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, shared ones under each of their names."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def make_smaller(model: nn.Module, arguments: dict[str, Any], held: dict[str, Tensor]) -> Smaller:
    """The network without the filters that are held at zero.

    Args:
        arguments: forward's arguments by name.
        held: by name of a parameter bool of its shape, True where it stays zero.

    Raises:
        CaptureError: torch.export cannot follow the model.
        NotEqual: weights that are computed from others would become weights of their own; or nothing gets smaller.
    """
    captured = capture(model, arguments, for_training=True)
    with torch.no_grad():
        net = analyse(captured, held)
        out = write(net, multiple=1)
    small = finish(out, type(model).__name__, modes_of(model))
    for module in small.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = NarrowBatchNorm2d
    rectify_in_place(small)
    smaller = Smaller(small, origins(small, out))
    fresh = [name for name, _ in small.named_parameters() if name not in smaller.origins]
    if fresh:
        raise NotEqual(f"weights are computed from others in every step: {', '.join(fresh[:3])}")
    if count_parameters(small) == count_parameters(model):
        raise NothingSmaller("nothing would get smaller: what follows the pruned filters learns on (see mask_bn)")
    return smaller


def rectify_in_place(small: fx.GraphModule) -> None:
    """ReLUs overwrite what no other node reads, where its gradient does not need it: of convs, BatchNorms and sums."""
    modules = dict(small.named_modules())
    for node in small.graph.nodes:
        if node.target is not aten.relu.default or len(node.args[0].users) > 1:
            continue
        made_by = modules[node.args[0].target] if node.args[0].op == "call_module" else node.args[0].target
        if made_by is aten.add.Tensor or isinstance(made_by, ResidualJoin | _BatchNorm | _ConvNd):
            node.target = aten.relu_.default
    small.recompile()


def keep_zero(smaller: Smaller, held: dict[str, Tensor]) -> None:
    """Filters that stay to fill up a group are zero; they get no gradient, so that they stay so."""
    for name, parameter in smaller.network.named_parameters():
        origin = smaller.origins[name]
        zero = origin.left(held[origin.name]) if origin.name in held else None
        if zero is not None and zero.any() and parameter.requires_grad:
            parameter.register_hook(_without(zero))


def _without(zero: Tensor):
    """A hook that zeroes entries of a gradient."""

    def hook(gradient: Tensor) -> Tensor:
        return gradient.masked_fill(zero.to(gradient.device), 0)

    return hook


# ---- the rehearsal


def rehearse(model: nn.Module, smaller: Smaller, arguments: dict[str, Any], held: dict[str, Tensor]) -> None:
    """Compares outputs, gradients and statistics of one pass in training mode, on copies in float64.

    Dropout is left out, which draws as many numbers as there are channels. Raises NotEqual with what differs.
    """
    try:
        ours, theirs = (_one_pass(network, arguments) for network in (smaller.network, model))
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        raise NotEqual(f"a step in training mode cannot be tried: {str(error).splitlines()[0]}") from error
    if [t.shape for t in ours[0]] != [t.shape for t in theirs[0]]:
        raise NotEqual("in training mode it returns something else than in eval mode")
    if largest_difference(ours[0], theirs[0]) > CLOSE:
        raise NotEqual("in training mode it computes something else than in eval mode (other than dropout)")
    for what, mine, its in (("gradient", ours[1], theirs[1]), ("buffer", ours[2], theirs[2])):
        scale = max((t.abs().max().item() for t in its.values() if t.numel()), default=0.0)
        for name, origin in smaller.origins.items():
            if name not in mine or origin.name not in its:
                continue
            wanted = origin.left(its[origin.name])
            if what == "gradient" and origin.name in held:  # what stays zero gets none: keep_zero
                zero = origin.left(held[origin.name])
                wanted, mine[name] = wanted.masked_fill(zero, 0), mine[name].masked_fill(zero, 0)
            limit = CLOSE * wanted.abs().max().item() + CLOSE * CLOSE * scale
            if (mine[name] - wanted).abs().max().item() > limit:
                raise NotEqual(f"the {what} of {origin.name} would differ from the masked network's")


def _one_pass(network: nn.Module, arguments: dict[str, Any]) -> tuple[list[Tensor], dict, dict]:
    """Outputs, gradients and float buffers."""
    network = copy.deepcopy(network).double().train()
    for module in network.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
    generator = torch.Generator().manual_seed(0)
    devices = {p.device for p in network.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices=sorted(devices, key=str)), torch.enable_grad():
        torch.manual_seed(0)  # what stochastic depth draws
        outputs = network(**_random_like(arguments, generator))
        outputs = [t for t in leaves_of(outputs) if isinstance(t, Tensor) and t.is_floating_point()]
        weighted = [(t * torch.randn(t.shape, generator=generator).to(t)).sum() for t in outputs if t.requires_grad]
        torch.stack(weighted).sum().backward()
    gradients = {n: p.grad for n, p in network.named_parameters(remove_duplicate=False) if p.grad is not None}
    buffers = {n: b for n, b in network.named_buffers(remove_duplicate=False) if b.is_floating_point()}
    return [t.detach() for t in outputs], gradients, buffers


def _random_like(arguments: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    """The example with random numbers for its floats; two samples at least, which BatchNorm needs."""

    def random(tensor: Tensor) -> Tensor:
        if tensor.dim() > 1 and len(tensor) == 1:
            tensor = torch.cat([tensor, tensor])
        if not tensor.is_floating_point():
            return tensor.clone()
        return to_double(torch.randn(tensor.shape, generator=generator).to(tensor.device))

    return pytree.tree_map_only(Tensor, random, arguments)
