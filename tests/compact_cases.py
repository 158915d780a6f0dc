"""Networks with pruned filters and random BatchNorm statistics, and the comparison that tests of compaction make."""

import dataclasses

import torch
from torch import nn

import mfp


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every norm layer random statistics, scales and shifts, and every bias random values."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.uniform_(-0.5, 0.5, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
        if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.GroupNorm | nn.LayerNorm):
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
        if isinstance(getattr(module, "bias", None), nn.Parameter):
            module.bias.data.uniform_(-0.5, 0.5, generator=generator)
    return model


def masked(model: nn.Module, rate: float = 0.4, mask_bn: bool = True, seed: int = 0, **plan) -> nn.Module:
    """The model in eval mode, randomized and masked by the public way."""
    randomize(model, seed)
    plan = mfp.FilterPlan.from_model(model, rate=rate, **plan)
    scores = mfp.score_filters(plan, criteria=("l2_norm",))
    mfp.select_filters(scores, criterion="l2_norm").apply_(mask_bn=mask_bn)
    return model.eval()


def killed(layer: nn.Module, *filters: int) -> nn.Module:
    """The layer with these filters zero, bias too."""
    for j in filters:
        layer.weight.data[j] = 0
        if layer.bias is not None:
            layer.bias.data[j] = 0
    return layer


def compacted(model: nn.Module, *shape: int, **options) -> nn.Module:
    """The compact network, after a comparison on another batch size in float64."""
    model = model.double().eval()
    small = mfp.compact(model, torch.randn(1, *shape, dtype=torch.float64), **options)
    compare(model, small, *shape)
    return small


def compare(model: nn.Module, small: nn.Module, *shape: int, batch: int = 3, tolerance: float = 1e-12) -> None:
    """Two networks in float64 on random images of a shape."""
    x = torch.randn(batch, *shape, dtype=torch.float64)
    with torch.no_grad():
        assert difference(model(x.clone()), small(x.clone())) < tolerance


def difference(a, b) -> float:
    """Largest difference relative to the largest value, over all tensors of two equal structures."""
    assert type(a) is type(b)
    if a is None:
        return 0.0
    if dataclasses.is_dataclass(a):
        a, b = vars(a), vars(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        return max(difference(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list):
        assert len(a) == len(b)
        return max(difference(x, y) for x, y in zip(a, b, strict=True))
    assert a.shape == b.shape
    assert a.isfinite().all()
    assert a.std() > 0, "all values equal: the comparison would show nothing"
    return ((a - b).abs().max() / a.abs().max()).item()


def served(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """The serving form, after comparing it with the model on other sizes than the example's."""
    serving = mfp.compact(model.eval(), x[:1], fold_bn=True)
    with torch.inference_mode():
        for given in (x, x[:1], x[..., :-3].contiguous(memory_format=torch.channels_last)):
            assert difference(model(given), serving(given)) < 1e-5
            assert torch.equal(serving(given), serving(given)), "the input or a parameter was overwritten"
    return serving


def images(batch=3):
    """What the small networks of the serving form's tests take."""
    return torch.randn(batch, 6, 12, 12, generator=torch.Generator().manual_seed(1))
