from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surestep.data import Batches, Images, as_images, augment
from surestep.data._ahead import read_ahead
from surestep.data._splits import divide, mixed
from surestep.training.holding_out import hold_out

CROP_FLIP = augment.get("crop-flip")


def numbered(n: int) -> Images:
    """Images that can be told apart, label = position modulo 7."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randint(0, 256, (n, 1, 5, 5), generator=generator).byte()
    return Images(x, torch.arange(n) % 7)


def same(one, other):
    one, other = list(one), list(other)
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


@settings(max_examples=40)
@given(st.integers(1, 40), st.integers(1, 50), st.booleans())
def test_an_epoch_visits_each_image_at_most_once(n, size, shuffle):
    images = numbered(n)
    batches = Batches(images, size, shuffle=shuffle)
    seen = list(batches.epoch(3))
    assert len(seen) == batches.steps_per_epoch
    index = torch.cat([i for _, _, i in seen])
    assert index.unique().numel() == len(index)
    for x, y, i in seen:
        assert x.dtype == torch.float32
        assert torch.equal(x, images.x[i].float() / 255)
        assert torch.equal(y, images.y[i])
    if shuffle:
        assert len(index) == (n // size * size or n)
    else:
        assert torch.equal(index, torch.arange(n))


@settings(max_examples=25)
@given(st.integers(1, 40), st.integers(1, 12), st.booleans(), st.data())
def test_skip_goes_on_where_the_run_stopped(n, size, shuffle, data):
    batches = Batches(numbered(n), size, seed=5, shuffle=shuffle, augment=CROP_FLIP)
    skip = data.draw(st.integers(0, batches.steps_per_epoch))
    same(list(batches.epoch(2))[skip:], batches.epoch(2, skip))


@settings(max_examples=25)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(4, 60), st.booleans())
def test_the_ranks_together_are_the_single_process(world, share, n, shuffle):
    size = world * share
    images = numbered(n)
    options = {"seed": 1, "shuffle": shuffle, "augment": CROP_FLIP}
    alone = Batches(images, size, **options)
    ranks = [Batches(images, size, rank=r, world=world, **options) for r in range(world)]
    assert {b.steps_per_epoch for b in ranks} == {alone.steps_per_epoch}
    for whole, *parts in zip(alone.epoch(0), *(b.epoch(0) for b in ranks), strict=True):
        # Of the shuffled, what cannot be shared equally is left out.
        kept = len(whole[1]) - (len(whole[1]) % world if shuffle else 0)
        for one, shares in zip(whole, zip(*parts, strict=True), strict=True):
            assert torch.equal(one[:kept], torch.cat(shares))


def test_seed_and_epoch_each_change_the_order():
    images = numbered(50)
    first = {
        (seed, epoch): next(Batches(images, 50, seed=seed).epoch(epoch))[2].tolist()
        for seed in (-1, 0, 1, 2, 2**40)
        for epoch in (0, 1, 2)
    }
    assert len({tuple(order) for order in first.values()}) == len(first)


def test_the_order_is_the_same_in_every_version():
    # A change here changes every published run: do not update it lightly.
    order = next(Batches(numbered(8), 8, seed=0).epoch(0))[2]
    assert order.tolist() == ORDER
    assert mixed(8).tolist() == [6, 4, 3, 2, 1, 0, 7, 5]
    assert divide(20, "test", what="data").tolist() == [12, 13]
    assert divide(20, "validation", what="data").tolist() == [2, 5]
    assert divide(20, "test", what="data", keys=list(map(str, range(20)))).tolist() == [9, 18]
    assert hold_out(20, 4, seed=0)[1].tolist() == [4, 5]


ORDER = [4, 1, 5, 0, 6, 7, 2, 3]


def test_augmentation_differs_from_step_to_step_and_repeats():
    batches = Batches(numbered(64), 16, augment=CROP_FLIP, shuffle=False)
    same(batches.epoch(0), batches.epoch(0))
    draws = [batches.draw(e, s) for e in (0, 1) for s in range(4)]
    draws.append(Batches(numbered(64), 16, seed=1, augment=CROP_FLIP).draw(0, 0))
    assert len({tuple(d.dy.tolist()) for d in draws if d is not None}) == 9


def test_the_crops_and_flips_are_the_same_in_every_version():
    draw = Batches(numbered(8), 8, augment=CROP_FLIP, seed=0).draw(0, 0)
    assert draw is not None
    assert draw.dy.tolist() == [-1, 1, 1, 4, 2, -1, -1, 3]
    assert draw.dx.tolist() == [-3, 2, 0, -3, 0, -3, 0, -2]
    assert draw.flip.tolist() == [True, True, True, True, False, False, True, False]


def test_the_draw_is_the_one_the_batch_got():
    images = numbered(20)
    batches = Batches(images, 8, augment=CROP_FLIP, rank=1, world=2)
    for step, (x, _, index) in enumerate(batches.epoch(4)):
        draw = batches.draw(4, step)
        assert draw is not None
        assert torch.equal(x, draw.apply(images.pixels(index)))
    assert Batches(images, 8).draw(0, 0) is None


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    list(Batches(numbered(20), 4, augment=CROP_FLIP).epoch(0))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, ["batch size 0"]),
        ({"batch_size": 10, "world": 3}, ["batch size 10", "multiple of 3"]),
        ({"batch_size": 4, "rank": 2, "world": 2}, ["rank 2", "0..1"]),
        ({"batch_size": 4, "world": 0}, ["rank 0 of 0"]),
        ({"batch_size": 32, "world": 16}, ["8 images", "16 processes"]),
    ],
)
def test_mistakes(refused, options, words):
    refused(lambda: Batches(numbered(8), **options), *words)


def test_more_mistakes(refused):
    refused(lambda: Batches(numbered(8), 4).epoch(0, skip=3), "skip 3", "2")
    features = Images(torch.rand(4, 7), torch.zeros(4, dtype=torch.long))
    refused(lambda: Batches(features, 2, augment=CROP_FLIP), "(4, 7)")
    assert next(Batches(features, 2).epoch(0))[0].shape == (2, 7)


def mapped(n: int, tmp_path) -> tuple[Images, Images]:
    """The same images in memory and in a file; of the file, some rows in another order."""
    images = numbered(2 * n)
    np.save(tmp_path / "x.npy", images.x.numpy())
    found = as_images((np.load(tmp_path / "x.npy", mmap_mode="r"), images.y))
    rows = torch.randperm(2 * n, generator=torch.Generator().manual_seed(0))[:n]
    return images.subset(rows), found.subset(rows)


@pytest.mark.parametrize(("n", "size", "world"), [(40, 16, 1), (40, 16, 2), (5, 9, 1), (3, 2, 2)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_a_mapped_file_gives_the_same_batches(tmp_path, n, size, world, shuffle):
    size -= size % world
    held, lying = mapped(n, tmp_path)
    for rank in range(world):
        options = {"shuffle": shuffle, "augment": CROP_FLIP, "rank": rank, "world": world}
        there, here = (Batches(images, size, **options) for images in (lying, held))
        same(there.epoch(1), here.epoch(1))
        if there.steps_per_epoch > 1:
            same(there.epoch(1, 1), here.epoch(1, 1))


def test_of_a_mapped_file_one_batch_is_read_ahead(tmp_path):
    _, lying = mapped(20, tmp_path)
    asked = []

    def shares():
        for share in torch.arange(20).split(5):
            asked.append(share)
            yield share

    batches = read_ahead(lying, shares(), pin=False)
    for used, batch in enumerate(batches, 1):
        assert torch.equal(batch, lying.stored(asked[used - 1]))
        assert len(asked) == min(used + 1, 4)


def test_an_epoch_left_early_leaves_no_reader_behind(tmp_path):
    _, lying = mapped(20, tmp_path)
    batches = Batches(lying, 4).epoch(0)
    next(batches)
    assert readers()
    del batches
    assert not readers()


def readers() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("surestep-reader")]


def test_what_fails_in_a_reader_fails_in_the_epoch(tmp_path, monkeypatch):
    _, lying = mapped(20, tmp_path)

    def failing(*_):
        raise OSError("the disk is gone")

    monkeypatch.setattr(np, "take", failing)
    with pytest.raises(OSError, match="the disk is gone"):
        next(Batches(lying, 4).epoch(0))


def test_shares_of_a_small_training_set_are_equal():
    """Processes that gather what they hold, or average gradients, need as many images each."""
    images = as_images((torch.rand(7, 1, 2, 2), torch.arange(7)))
    shares = [list(Batches(images, 12, rank=k, world=3).epoch(0)) for k in range(3)]
    assert [[len(x) for x, *_ in share] for share in shares] == [[2], [2], [2]]
    # In their order, for an evaluation, none is left out.
    shares = [list(Batches(images, 12, rank=k, world=3, shuffle=False).epoch(0)) for k in range(3)]
    assert sum(len(x) for share in shares for x, *_ in share) == 7
