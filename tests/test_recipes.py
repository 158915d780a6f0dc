"""The recipes of `mfp prune --recipe`: settings, with the numbers that their papers published."""

from __future__ import annotations

import pytest

from mfp.train.config import RunConfig
from mfp.train.recipes import RECIPES


@pytest.mark.parametrize("name", [name for name in RECIPES if RECIPES[name].published])
def test_recipes_are_settings_with_published_numbers(name):
    recipe = RECIPES[name]
    config = RunConfig(**recipe.settings)
    assert config.arch in name
    assert config.validation == 0  # they train on all training images
    assert 40 < recipe.published["FLOPs saved"] < 55
    assert config.learning_rate(0, 10) == pytest.approx(0.01 if name.endswith("finetune") else 0.1)
    last = config.learning_rate(10 * config.epochs - 1, 10)
    assert last == pytest.approx(config.lr * config.gamma ** len(config.milestones))


def test_the_other_recipes():
    assert [name for name in RECIPES if not RECIPES[name].published] == ["demo", "resnet20-fashion-mnist"]
    fashion = RECIPES["resnet20-fashion-mnist"]
    config = RunConfig(**fashion.settings)
    assert (config.arch, config.epochs, fashion.data) == ("resnet20", 4, "fashion-mnist:PATH")
    assert config.validation == RunConfig(**RECIPES["demo"].settings).validation == 0.1


def test_the_papers_rates_by_recipe():
    assert {
        RECIPES[f"{arch}-imagenet"].settings["rate"] for arch in ("resnet18", "resnet34", "resnet50", "resnet101")
    } == {0.3}
    assert RECIPES["resnet50-imagenet-finetune"].settings["rate"] == 0.4
    assert RECIPES["resnet56-cifar10"].published == {"FLOPs saved": 52.6, "dense top-1": 93.59, "top-1": 92.93}
