from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surestep.data import augment
from surestep.data.augment import CropFlip, Draw


def crop_flip_one(image, dy, dx, flip, pad):
    """The oracle: pixel by pixel, as one would explain it."""
    channels, height, width = image.shape
    padded = torch.zeros(channels, height + 2 * pad, width + 2 * pad, dtype=image.dtype)
    padded[:, pad : pad + height, pad : pad + width] = image
    out = torch.empty_like(image)
    for c in range(channels):
        for i in range(height):
            for j in range(width):
                source = width - 1 - j if flip else j
                out[c, i, j] = padded[c, i + pad + dy, source + pad + dx]
    return out


@settings(max_examples=30)
@given(
    st.integers(1, 4),
    st.sampled_from([1, 3]),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(0, 7),
    st.integers(0, 1000),
)
def test_crop_and_flip_match_a_plain_loop(n, channels, height, width, pad, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(1, 256, (n, channels, height, width), generator=generator).byte()
    draw = CropFlip(pad).draw(n, generator)
    got = draw.apply(x)
    for k in range(n):
        one = (int(draw.dy[k]), int(draw.dx[k]), bool(draw.flip[k]), pad)
        assert torch.equal(got[k], crop_flip_one(x[k], *one))
    # Undoing gives the image back wherever the window saw it, zero elsewhere.
    seen = draw.undo(draw.apply(torch.ones_like(x)))
    assert torch.equal(draw.undo(got), x * seen)
    # And a perturbation in the cropped frame returns to it unharmed where the image was.
    inside = draw.apply(torch.ones_like(x))
    assert torch.equal(draw.apply(draw.undo(got)), got * inside)


def test_draws_cover_their_range():
    draw = CropFlip(2).draw(2000, torch.Generator().manual_seed(0))
    assert set(draw.dy.tolist()) == set(draw.dx.tolist()) == {-2, -1, 0, 1, 2}
    assert 0.45 < draw.flip.float().mean() < 0.55
    assert not torch.equal(draw.dy, draw.dx)


def test_no_crop_leaves_only_the_mirror_images():
    x = torch.rand(5, 3, 4, 6)
    draw = CropFlip(0).draw(5, torch.Generator())
    for got, one, mirrored in zip(draw.apply(x), x, draw.flip.tolist(), strict=True):
        assert torch.equal(got, one.flip(-1) if mirrored else one)


def test_a_slice_of_a_draw_is_the_draw_of_the_slice():
    x = torch.rand(8, 1, 5, 5)
    draw = CropFlip().draw(8, torch.Generator())
    assert len(draw[2:5]) == 3
    assert torch.equal(draw[2:5].apply(x[2:5]), draw.apply(x)[2:5])


def test_names_and_mistakes(refused):
    assert augment.get("none") is None
    assert augment.get("crop-flip") == CropFlip(pad=4)
    refused(lambda: augment.get("cropflip"), "did you mean 'crop-flip'")
    refused(lambda: CropFlip(pad=-1), "-1")
    zeros = torch.zeros(2, dtype=torch.long)
    refused(lambda: Draw(zeros, zeros, zeros.bool(), 1).apply(torch.rand(2, 7)), "(2, 7)")
    refused(lambda: Draw(zeros, zeros, zeros.bool(), 1).apply(torch.rand(3, 1, 4, 4)), "(2, C")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_the_dtype_stays(dtype):
    x = torch.ones(2, 1, 4, 4, dtype=dtype)
    assert CropFlip().draw(2, torch.Generator()).apply(x).dtype == dtype


def test_a_draw_on_a_device_is_moved_no_more():
    """A method that remembers applies it four times a step."""
    moved = CropFlip().draw(3, torch.Generator()).to(torch.device("meta"))
    again = moved.to(torch.device("meta"))
    for name in ("dy", "dx", "flip"):
        assert getattr(moved, name).is_meta
        assert getattr(again, name) is getattr(moved, name)
    assert moved.apply(torch.empty(3, 1, 8, 8, device="meta")).is_meta
    assert (len(moved), moved.pad) == (3, 4)
