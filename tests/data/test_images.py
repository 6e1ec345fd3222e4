from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surestep.data import Images, as_images

X = torch.rand(6, 3, 4, 4)
Y = torch.tensor([0, 1, 2, 0, 1, 2])


def test_a_pair_becomes_images():
    images = as_images((X, Y), name="mine")
    assert len(images) == 6
    assert images.num_classes == 3
    assert images.classes == ("0", "1", "2")
    assert images.image_shape == (3, 4, 4)
    assert images.name == "mine"
    assert as_images((X, Y), num_classes=10).num_classes == 10
    assert as_images(images).classes == images.classes


def test_bytes_become_pixels():
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    pixels, y = Images(x, torch.tensor([0])).tensors()
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels.flatten(), torch.arange(256).float() / 255)
    assert y.dtype == torch.int64


def test_subsets():
    images = as_images((X, Y))
    assert torch.equal(images.subset([2, 0]).x, X[[2, 0]])
    assert torch.equal(images.subset(slice(4, None)).y, Y[4:])
    assert torch.equal(images.subset(Y == 1).y, Y[Y == 1])
    assert torch.equal(images.pixels(torch.tensor([3])), X[3:4])
    assert len(images.first(2)) == 2
    assert len(images.first(100)) == 6
    assert images.first(1).num_classes == 3  # the classes are those of the whole
    assert len(images.subset([])) == 0


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 0, 2, 1], [2, 1, -1, 0]])
def test_the_first_of_images_that_lie_class_by_class_are_of_all(order):
    y = torch.tensor(order).repeat_interleave(50)
    first = as_images((torch.zeros(200, 1), y)).first(40)
    assert set(first.y.tolist()) == set(order)


def test_the_first_of_mixed_images_are_the_first():
    y = torch.arange(200) % 4
    assert as_images((torch.arange(200.0)[:, None] / 200, y)).first(9).y.tolist() == y[:9].tolist()


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, np.uint16, ">i4"])
def test_integer_labels_of_any_width(dtype):
    images = as_images((X.numpy(), Y.numpy().astype(dtype)))
    assert images.y.dtype == torch.int64
    assert torch.equal(images.y, Y)


def test_awkward_arrays_are_taken_without_a_warning():
    x, y = X.numpy().copy(), Y.numpy().copy()
    x.flags.writeable = False
    assert torch.equal(as_images((x[::-1], y[::-1])).x, X.flip(0))


@given(st.integers(1, 5), st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_any_shape_of_rank_two_or_more(n, shape):
    images = as_images((torch.zeros(n, *shape), torch.zeros(n, dtype=torch.long)))
    assert images.image_shape == tuple(shape)


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (X * 255, Y, ["divide x by 255"]),
        (X * 2 - 1, Y, ["normalises inside the model"]),
        (X + 0.01 + 1 - X.max(), Y, ["clamp"]),
        (X * 70000, Y, ["scale x"]),
        (X.where(X.max() > X, torch.nan), Y, ["NaN"]),
        (X.where(X.max() > X, torch.inf), Y, ["infinity"]),
        (X.double(), Y, ["float64", "float32"]),
        (X.half(), Y, ["float16"]),
        ((X * 255).int(), Y, ["int32", "uint8"]),
        (X > 0.5, Y, ["bool"]),
        (X, Y.float(), ["y has dtype float32", "integers"]),
        (X, Y == 1, ["y has dtype bool"]),
        (X, Y[:, None], ["(6, 1)", "(N,)"]),
        (X, Y[:5], ["6 images", "5 labels"]),
        (X, Y - 2, ["label -2", "-1: no label"]),
        (X, 0 * Y - 1, ["no class number"]),
        (X, Y + 1, ["label 3", "0..2"]),
        (X[:0], Y[:0], ["empty"]),
        (X[:, :0], Y, ["empty"]),
        (Y.float() / 2, Y, ["(6,)"]),
        (X.tolist(), Y, ["list of 6", "array"]),
        (X, np.array(list("abcabc")), ["dtype <U1"]),
        (X, np.array([object()] * 6), ["dtype object"]),
    ],
)
def test_bad_data_is_refused_in_one_line(refused, x, y, words):
    refused(lambda: as_images((x, y), num_classes=3, name="mine"), "mine", *words)


@pytest.mark.parametrize("data", [None, X, (X,), (X, Y, Y), {"x": X}])
def test_what_is_no_pair_is_refused(refused, data):
    refused(lambda: as_images(data), "pair (x, y)")


def test_images_are_checked_too(refused):
    refused(lambda: as_images(Images(X * 255, Y, name="raw")), "raw", "divide")
    refused(lambda: as_images(Images(X, Y), num_classes=2), "label 2")
    refused(lambda: as_images((X, Y), num_classes=0), "num_classes is 0")
    refused(lambda: as_images((X, Y)).first(0), "first 0")
