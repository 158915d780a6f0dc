from __future__ import annotations

from collections import Counter

import pytest
import torch

from mfp.errors import MfpError
from mfp.train.data import AllBatches, EpochBatches, load_data, make_loader
from mfp.train.order import epoch_order, hold_out


def test_digits_split_is_fixed_and_complete():
    data = load_data("digits")
    assert (len(data.train), len(data.test), data.num_classes) == (1437, 360, 10)
    assert data.image_shape == (3, 32, 32) == tuple(data.example().shape[1:])
    other = load_data("digits", seed=5)
    assert torch.equal(data.test[0, 7][0], other.test[0, 7][0])
    train_images = {data.plain[0, i][0].numpy().tobytes() for i in range(len(data.plain))}
    test_images = {data.test[0, i][0].numpy().tobytes() for i in range(len(data.test))}
    assert len(test_images) > 350
    assert not train_images & test_images


def test_digits_are_normalised():
    data = load_data("digits")
    images = torch.stack([data.plain[0, i][0] for i in range(len(data.plain))])
    assert abs(images.mean()) < 0.01
    assert abs(images.std() - 1) < 0.01


def test_a_sample_depends_on_seed_epoch_and_index_alone():
    data, same, other_seed = load_data("digits", 1), load_data("digits", 1), load_data("digits", 2)
    torch.manual_seed(3)
    first = data.train[4, 9][0]
    torch.rand(11)
    state = torch.get_rng_state()
    assert torch.equal(same.train[4, 9][0], first)
    assert torch.equal(torch.get_rng_state(), state)  # drawing a sample leaves the global state alone
    different = [data.train[5, 9][0], other_seed.train[4, 9][0], data.plain[0, 9][0]]
    assert not any(torch.equal(first, image) for image in different)


def test_order_is_a_permutation_of_seed_and_epoch():
    assert sorted(epoch_order(100, 0, 0)) == list(range(100))
    assert epoch_order(100, 0, 3) == epoch_order(100, 0, 3)
    assert len({tuple(epoch_order(100, seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}) == 6


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_share_the_same_global_batches(ranks):
    whole = list(EpochBatches(50, 12, seed=1, epoch=2))
    parts = [list(EpochBatches(50, 12, seed=1, epoch=2, rank=r, ranks=ranks)) for r in range(ranks)]
    assert len(whole) == len(EpochBatches(50, 12, seed=1, epoch=2)) == 4
    for number, batch in enumerate(whole):
        assert [key for part in parts for key in part[number]] == batch


@pytest.mark.parametrize("start", [0, 1, 3, 4])
def test_an_epoch_can_be_entered_anywhere(start):
    assert list(EpochBatches(50, 12, 1, 2, start)) == list(EpochBatches(50, 12, 1, 2))[start:]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_evaluation_sees_every_sample_once(ranks):
    seen = [key for rank in range(ranks) for batch in AllBatches(17, 4, rank, ranks) for key in batch]
    assert sorted(seen) == [(0, i) for i in range(17)]


def test_batches_do_not_depend_on_the_number_of_workers():
    data = load_data("digits")
    batches = [list(make_loader(data.train, EpochBatches(60, 20, 0, 1), workers)) for workers in (0, 2)]
    assert len(batches[0]) == 3
    for (images, targets), (images_2, targets_2) in zip(*batches, strict=True):
        assert torch.equal(images, images_2)
        assert torch.equal(targets, targets_2)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9])
def test_every_class_is_held_out_alike(share):
    targets = [0] * 40 + [1] * 7 + [2] * 133 + [3]
    targets = [targets[i] for i in epoch_order(len(targets), 5, 0)]
    kept, held = hold_out(targets, share)
    assert sorted(kept + held) == list(range(181)) and kept == sorted(kept) and held == sorted(held)
    assert len(held) == int(181 * share)
    for number in range(4):
        count = sum(targets[i] == number for i in held)
        assert abs(count - share * targets.count(number)) < 1
    assert hold_out(targets, share) == (kept, held)
    assert held != sorted(range(181), key=lambda i: targets[i])[: len(held)]


def test_validation_images_are_training_images_that_no_seed_changes():
    whole, data, other = (
        load_data("digits"),
        load_data("digits", 1, validation=0.1),
        load_data("digits", 2, validation=0.1),
    )
    assert whole.counts == [1437, 0, 360] and data.counts == other.counts == [1294, 143, 360]
    assert whole.watched is whole.test and data.watched is data.validation
    images = {name: views_of(getattr(data, name)) for name in ("plain", "validation", "test")}
    assert views_of(other.validation) == images["validation"] and views_of(other.test) == views_of(whole.test)
    assert images["plain"] + images["validation"] == views_of(whole.plain)
    counts = [sum(data.validation[0, i][1] == digit for i in range(143)) for digit in range(10)]
    assert min(counts) >= 13 and max(counts) <= 15


def views_of(view) -> Counter:
    return Counter(view[0, i][0].numpy().tobytes() for i in range(len(view)))


def test_a_share_that_holds_out_nothing():
    with pytest.raises(MfpError, match="--validation 0.0001 holds out none of 1437 training images: give more, or 0"):
        load_data("digits", validation=0.0001)
