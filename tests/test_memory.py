"""What a training step keeps in memory, counted; and the parts of a batch that follow from it."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from train_helpers import tiny_config, tiny_data, tiny_trainer

from mfp.train.memory import Memory, count_memory, fewest_parts, freed_in_words


def test_activations_are_counted_by_what_backward_needs():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(1))
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seed = torch.get_rng_state()
    counted = count_memory(model, (3, 10, 12), True, contextlib.nullcontext)
    # the image, the conv's output for BatchNorm, the ReLU's output; in float32
    assert counted.activations == 4 * (3 + 8 + 8) * 120
    assert counted.weights == 3 * 4 * (8 * 27 + 16)
    assert count_memory(model, (3, 10, 12), False, contextlib.nullcontext).weights == 2 * 4 * (8 * 27 + 16)
    assert not model.training and torch.equal(seed, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_that_autocast_casts_are_no_activations():
    model = nn.Sequential(nn.Flatten(1), nn.Linear(300, 500, bias=False))
    counted = count_memory(model, (3, 10, 10), True, lambda: torch.autocast("cpu", torch.bfloat16))
    assert counted.activations == 2 * 300  # the images in bfloat16


@pytest.mark.parametrize(
    ("images", "parts", "left", "wanted"),
    [(24, 4, 1.0, 4), (24, 4, 0.75, 3), (24, 4, 0.76, 4), (24, 4, 0.5, 2), (24, 4, 0.1, 1), (7, 7, 0.5, 7),
     (256, 8, 0.62, 8), (256, 8, 0.5, 4), (12, 1, 0.1, 1), (12, 2, 1.1, 2)],
)  # fmt: skip
def test_fewest_parts_that_need_no_more(images, parts, left, wanted):
    assert fewest_parts(images, parts, Memory(100.0, 0), Memory(100.0 * left, 0)) == wanted


def test_what_is_freed_in_words():
    line = freed_in_words(32, Memory(2e6, 30_000_000), Memory(1.5e6, 12_000_000))
    assert "16.00 of 64.00 MB of activations (of 32 images" in line
    assert "18.00 of 30.00 MB of weights, gradients and momentum" in line


def test_fewer_parts_give_the_gradient_of_the_same_batch(tmp_path):
    """Where no BatchNorm looks at the parts."""
    trainer = tiny_trainer(tmp_path, tiny_config(accumulate=4), tiny_data())
    trainer.model.dropout.p = 0.0
    trainer.model.eval()
    images, targets = torch.randn(12, 3, 32, 32), torch.arange(12) % 10
    gradients, losses = [], []
    for parts in (4, 3, 1):
        trainer.switch.accumulate = parts
        trainer.totals.zero_()
        trainer._forward_backward(images, targets)
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))
        losses.append(trainer._mean_loss())
    for gradient, loss in zip(gradients[1:], losses[1:], strict=True):
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-4, atol=1e-6)
        assert loss == pytest.approx(losses[0], rel=1e-6)
