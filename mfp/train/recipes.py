"""Settings by name: the demonstrations, and the papers' with the numbers that they published.

Sources: He et al., "Filter Pruning via Geometric Median", CVPR 2019 (tables 1 and 2), whose training settings MFP
(arXiv 1904.03961) shares. Nothing here was measured by us.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mfp.errors import MfpError, did_you_mean

CIFAR10 = {
    "epochs": 200, "batch": 128, "momentum": 0.9, "weight_decay": 5e-4,
    "schedule": "step", "milestones": (60, 120, 160), "gamma": 0.2, "rate": 0.4, "mask_bn": False, "workers": 4,
    "settle": 0.0, "clip": 0.0, "validation": 0.0,
}  # fmt: skip
ILSVRC2012 = {
    "epochs": 100, "batch": 256, "momentum": 0.9, "weight_decay": 1e-4,
    "schedule": "step", "milestones": (30, 60, 90), "gamma": 0.1, "rate": 0.3, "mask_bn": False,
    "workers": 8, "dense": False, "settle": 0.0, "clip": 0.0, "validation": 0.0,
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """Settings, the kind of data they are for, and what was published: percent."""

    settings: dict[str, Any]
    data: str
    published: dict[str, float]


def _recipes() -> dict[str, Recipe]:
    # option A's shortcuts have no weights, so that coupling loses nothing there: the residual stream gets narrower
    recipes = {
        "demo": Recipe({"residual": "coupled", "interval": 3, "settle": 0.4}, "digits", {}),
        "resnet20-fashion-mnist": Recipe({"residual": "coupled", "epochs": 4}, "fashion-mnist:PATH", {}),
    }
    flops_saved = {"resnet20": 54.0, "resnet32": 53.2, "resnet56": 52.6, "resnet110": 52.3}
    accuracy = {
        "resnet56": {"dense top-1": 93.59, "top-1": 92.93},
        "resnet56-finetune": {"dense top-1": 93.59, "top-1": 93.49},
        "resnet50": {"dense top-1": 76.15, "top-1": 75.03, "top-5": 92.40},
        "resnet50-finetune": {"dense top-1": 76.15, "top-1": 74.83, "dense top-5": 92.87, "top-5": 92.32},
    }
    for arch, saved in flops_saved.items():
        scratch = {"arch": arch, "lr": 0.1, **CIFAR10}
        for suffix, settings in (("", scratch), ("-finetune", {**scratch, "lr": 0.01})):
            published = {"FLOPs saved": saved, **accuracy.get(arch + suffix, {})}
            recipes[f"{arch}-cifar10{suffix}"] = Recipe(settings, "cifar10:PATH", published)
    flops_saved = {"resnet18": 41.8, "resnet34": 41.1, "resnet50": 42.2, "resnet101": 42.2}
    for arch, saved in flops_saved.items():
        scratch = {"arch": arch, "lr": 0.1, **ILSVRC2012}
        recipes[f"{arch}-imagenet"] = Recipe(scratch, "imagenet:PATH", {"FLOPs saved": saved, **accuracy.get(arch, {})})
        finetune = {**scratch, "lr": 0.01, "weights": "pretrained"}
        if arch == "resnet50":  # the published fine-tuned one is at this rate
            finetune["rate"], saved = 0.4, 53.5
        recipes[f"{arch}-imagenet-finetune"] = Recipe(
            finetune, "imagenet:PATH", {"FLOPs saved": saved, **accuracy.get(f"{arch}-finetune", {})}
        )
    return recipes


RECIPES = _recipes()


def recipe(name: str) -> Recipe:
    """Looks a recipe up.

    >>> recipe("resnet50-imagenet-finetune").published["top-1"]
    74.83

    Raises:
        MfpError: unknown; the known ones are listed.
    """
    if name not in RECIPES:
        raise MfpError(f"unknown recipe {name!r}; known are {', '.join(RECIPES)}{did_you_mean(name, RECIPES)}")
    return RECIPES[name]
