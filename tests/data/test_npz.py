from __future__ import annotations

import numpy as np
import pytest

from surestep import UserError, data

RNG = np.random.default_rng(0)
Y = np.arange(20) % 4


def save(path, **arrays) -> str:
    np.savez(path / "set.npz", **arrays)
    return f"npz:{path / 'set.npz'}"


def test_named_splits(tmp_path):
    arrays = {}
    for k, part in enumerate(("train", "val", "test")):
        arrays |= {f"x_{part}": np.full((4, 5, 5, 3), k, np.uint8), f"y_{part}": Y[:4]}
    arrays["y_test"] = np.zeros((4, 1), np.int32)
    place = save(tmp_path, **arrays)
    for k, split in enumerate(("train", "validation", "test")):
        images = data.load(place, split)
        assert images.image_shape == (3, 5, 5)
        assert images.num_classes == 4  # of the training labels, though the test lacks some
        assert images.x.unique().tolist() == [k]
        assert images.name == "set"


def test_labels_from_one_are_refused(tmp_path):
    place = save(tmp_path, x=np.zeros((20, 4, 4)), y=Y + 1)
    with pytest.raises(UserError, match=r"labels of 4 classes, 1 to 4: number them from 0"):
        data.load(place)


def test_labels_with_gaps_are_refused(tmp_path):
    place = save(tmp_path, x=np.zeros((20, 4, 4)), y=255 * (Y > 1))
    with pytest.raises(UserError, match=r"labels of 2 classes, 0 to 255: .* without gaps"):
        data.load(place)


def test_a_single_label_for_all(tmp_path):
    place = save(tmp_path, x=np.zeros((20, 4, 4)), y=np.array(0))
    with pytest.raises(UserError, match="20 images but y has 1 label"):
        data.load(place)


def test_only_training_must_have_the_first_class(tmp_path):
    x = np.zeros((20, 4, 4))
    assert data.load(save(tmp_path, x_test=x, y_test=Y + 1), "test").y.min() == 1
    whole = save(tmp_path, x=x, y=Y, y_train=Y + 1)  # of which y_train is not read
    assert data.load(whole).num_classes == 4
    named = save(tmp_path, x_train=x, y_train=Y + 1, x_test=x, y_test=Y)
    with pytest.raises(UserError, match="number them from 0"):
        data.load(named, "test")


def test_x_and_y_are_divided(tmp_path):
    x = np.arange(20)[:, None, None] * np.ones((1, 4, 6)) / 255
    place = save(tmp_path, x=x, y=Y)
    parts = [data.load(place, s) for s in ("train", "validation", "test")]
    assert [len(p) for p in parts] == [16, 2, 2]
    found = [round(v * 255) for p in parts for v in p.x[:, 0, 0, 0].tolist()]
    assert sorted(found) == list(range(20))
    for part in parts:
        assert part.y.tolist() == [round(v * 255) % 4 for v in part.x[:, 0, 0, 0].tolist()]
        assert part.num_classes == 4


@pytest.mark.parametrize("lacking", [0, 4])
def test_every_class_must_be_trained_on_after_the_division(tmp_path, refused, lacking):
    """A class of one image may fall into the test part; the first may be missed, or the last."""
    x = np.arange(20)[:, None, None] * np.ones((1, 4, 6)) / 255
    (held, *_) = data.load(save(tmp_path, x=x, y=Y), "test").x[:, 0, 0, 0].mul(255).round().tolist()
    y = Y + 1 if lacking == 0 else Y.copy()
    y[int(held)] = lacking
    place = save(tmp_path, x=x, y=y)
    for split in ("train", "validation"):
        refused(lambda s=split: data.load(place, s), f"no training images of class {lacking} once")
    assert len(data.load(place, "test")) == 2  # that it may be judged on, all the same
    named = save(tmp_path, x_train=x, y_train=np.arange(20), x_test=x, y_test=Y)
    refused(lambda: data.load(named), "no training images of class")


def test_without_validation_arrays_a_tenth_is_held_out(tmp_path):
    x = RNG.integers(0, 256, (20, 1, 3, 3), dtype=np.uint8)
    place = save(tmp_path, x_train=x, y_train=Y, x_test=x[:5], y_test=Y[:5])
    sizes = [len(data.load(place, s)) for s in ("train", "validation", "test")]
    assert sizes == [18, 2, 5]


@pytest.mark.parametrize("whole", [True, False])
def test_images_without_a_label_are_all_for_training(tmp_path, whole):
    x = RNG.integers(0, 256, (40, 1, 3, 3), dtype=np.uint8)
    y = np.where(np.arange(40) % 2, -1, np.arange(40) // 2 % 4)
    arrays = {"x": x, "y": y} if whole else {"x_train": x, "y_train": y, "x_test": x, "y_test": Y}
    if not whole:
        arrays["x_test"] = x[:20]
    place = save(tmp_path, **arrays)
    train, held = data.load(place, "train"), data.load(place, "validation")
    assert (train.y == data.UNLABELLED).sum() == 20
    assert (len(train), len(held)) == ((36, 2) if whole else (38, 2))
    assert (held.y >= 0).all()


def test_an_archive_that_zipfile_cannot_open(refused, tmp_path, monkeypatch):
    """One that is encrypted: RuntimeError; compressed in an unknown way: NotImplementedError."""
    place = save(tmp_path, x=RNG.random((4, 1, 2, 2)), y=np.arange(4) % 2)
    monkeypatch.setattr("zipfile.ZipFile.open", _encrypted)
    refused(lambda: data.load(place), "cannot be read", "password required")


def _encrypted(*_, **__):
    raise RuntimeError("File is encrypted, password required for extraction")


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((20, 6, 7, 3), (3, 6, 7)),
        ((20, 6, 7, 1), (1, 6, 7)),
        ((20, 3, 6, 7), (3, 6, 7)),
        ((20, 3, 6, 3), (3, 6, 3)),
        ((20, 6, 7), (1, 6, 7)),
        ((20, 9), (9,)),
    ],
)
def test_the_channel_dimension_is_found(tmp_path, shape, expected):
    x = RNG.random(shape)
    images = data.load(save(tmp_path, x_test=x, y_test=Y), "test")
    assert images.image_shape == expected
    if shape == (20, 6, 7, 3):
        assert np.array_equal(images.x.numpy(), x.transpose(0, 3, 1, 2).astype(np.float32))


X = np.zeros((20, 1, 2, 2), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"a": X}, ["no array 'x_train'", "it has a"]),
        ({"x_train": X}, ["no array 'y_train'"]),
        ({"x": X.reshape(20, 2, 2, 1).repeat(2, 3), "y": Y}, ["(20, 2, 2, 2)", "channels"]),
        ({"x": X + 300.0, "y": Y}, ["300"]),
        ({"x": X + 9.0, "y": Y}, ["divide x by 255"]),
        ({"x": X, "y": Y / 2}, ["float64"]),
        ({"x": X, "y": Y[:3]}, ["3 labels"]),
        ({"x": X[:2], "y": Y[:2]}, ["2 examples", "at least 3"]),
        ({"x": X[:0], "y": Y[:0]}, ["empty"]),
        ({"x": np.array([None] * 20), "y": Y}, ["set.npz", "without pickled objects"]),
    ],
)
def test_mistakes(refused, tmp_path, arrays, words):
    place = save(tmp_path, **arrays)
    refused(lambda: data.load(place), "set", *words)


def test_files_that_are_no_archive(refused, tmp_path):
    path = tmp_path / "set.npz"
    refused(lambda: data.load(f"npz:{path}"), "does not exist")
    path.write_bytes(b"nonsense")
    refused(lambda: data.load(f"npz:{path}"), "cannot be read")
    with path.open("wb") as file:
        np.save(file, X)
    refused(lambda: data.load(f"npz:{path}"), "one bare array")
    save(tmp_path, x=X, y=Y)
    path.write_bytes(path.read_bytes()[:300])
    refused(lambda: data.load(f"npz:{path}"), "cannot be read")
