from __future__ import annotations

import logging
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from surestep import data


def pixels(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 3072), dtype=np.uint8)


def write_binary(path: Path, x: np.ndarray, *labels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = [np.asarray(label, np.uint8)[:, None] for label in labels]
    path.write_bytes(np.hstack([*columns, x]).tobytes())


def python2_pickle(x: np.ndarray, key: str, labels: list[int]) -> bytes:
    """The opcodes Python 2 wrote for the official files: byte strings, and 0/1 for dtype flags."""

    def text(value: bytes) -> bytes:
        return b"T" + len(value).to_bytes(4, "little") + value

    def integer(value: int) -> bytes:
        return b"J" + value.to_bytes(4, "little", signed=True)

    empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(" + integer(0) + b"t"
    dtype = b"cnumpy\ndtype\n(" + text(b"u1") + integer(0) + integer(1) + b"tR"
    dtype += b"(" + integer(3) + text(b"|") + b"NNN" + integer(-1) + integer(-1) + integer(0)
    dtype += b"tb"
    state = b"(" + integer(1) + b"(" + integer(len(x)) + integer(x.shape[1]) + b"t" + dtype
    state += b"I00\n" + text(x.tobytes()) + b"t"
    array = empty + text(b"b") + b"tR" + state + b"b"
    numbers = b"](" + b"".join(integer(label) for label in labels) + b"e"
    entries = text(b"data") + array + text(key.encode()) + numbers
    return b"\x80\x02}(" + entries + b"u."


X, Y = pixels(10), [3, 8, 0, 1, 9, 2, 4, 5, 6, 7]


@pytest.mark.parametrize("nested", ["", "cifar-10-batches-bin"])
def test_binary_cifar10_and_its_splits(tmp_path, nested, caplog):
    for k in (1, 2):
        write_binary(tmp_path / nested / f"data_batch_{k}.bin", pixels(10, k), np.array(Y))
    write_binary(tmp_path / nested / "test_batch.bin", X, np.array(Y))
    with caplog.at_level(logging.INFO):
        train = data.load("cifar10", root=tmp_path)
    validation = data.load("cifar10", "validation", root=tmp_path)
    test = data.load("cifar10", "test", root=tmp_path)
    assert "found 20 of 50000" in caplog.text
    assert "20 of 50,000" in train.note
    assert [len(s) for s in (train, validation, test)] == [16, 4, 10]
    whole = np.concatenate([pixels(10, 1), pixels(10, 2)]).reshape(-1, 3, 32, 32)
    assert np.array_equal(torch.cat([train.x, validation.x]).numpy(), whole)
    assert train.y.tolist() + validation.y.tolist() == Y + Y
    assert test.y.tolist() == Y
    assert test.classes[3] == "cat"
    assert test.note == ""


def test_binary_cifar100_takes_the_fine_labels(tmp_path):
    fine = np.arange(90, 100)
    write_binary(tmp_path / "cifar-100-binary" / "test.bin", X, np.zeros(10), fine)
    test = data.load("cifar100", "test", root=tmp_path)
    assert test.y.tolist() == fine.tolist()
    assert test.num_classes == 100
    assert test.classes[99] == "worm"
    assert np.array_equal(test.x.numpy().reshape(10, -1), X)


@pytest.mark.parametrize(
    ("name", "place", "key"),
    [
        ("cifar10", "cifar-10-batches-py/test_batch", "labels"),
        ("cifar100", "cifar-100-python/test", "fine_labels"),
    ],
)
@pytest.mark.parametrize("how", ["python2", 2, 3, 4, "bytes keys"])
def test_python_format(tmp_path, name, place, key, how):
    file = tmp_path / place
    file.parent.mkdir()
    stored = {"data": X, key: Y}
    if how == "python2":
        content = python2_pickle(X, key, Y)
    elif how == "bytes keys":
        content = pickle.dumps({k.encode(): v for k, v in stored.items()}, protocol=4)
    else:
        content = pickle.dumps(stored, protocol=how)
    file.write_bytes(content)
    test = data.load(name, "test", root=tmp_path)
    assert np.array_equal(test.x.numpy().reshape(10, -1), X)
    assert test.y.tolist() == Y


ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n"
BYTES = b"cnumpy\ndtype\nU\x02u1\x85R"


class Evil:
    def __reduce__(self):
        return os.system, ("touch surestep-was-here",)


class Zip:
    def __reduce__(self):
        import codecs

        return codecs.encode, ("x", "rot13")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (pickle.dumps({"data": Evil()}), ["posix.system", "refused"]),
        (pickle.dumps(np.float64(1)), ["refused"]),
        (pickle.dumps(Zip()), ["codec rot13"]),
        (pickle.dumps({"data": X, "labels": Y})[:-100], ["not a readable pickle"]),
        (b"", ["not a readable pickle"]),
        (b"<html>", ["not a readable pickle"]),
        (pickle.dumps([1]), ["list", "expected a dict"]),
        (pickle.dumps({"labels": Y}, 2), ["'data'", "3072"]),
        (pickle.dumps({"data": X.astype(np.int32), "labels": Y}, 4), ["array of i4", "bytes"]),
        (pickle.dumps({"data": np.array([None]), "labels": Y}, 4), ["array of O8", "bytes"]),
        (pickle.dumps({"data": X[0], "labels": Y}, 4), ["'data'", "uint8"]),
        # NumPy's own array over bytes of the file's: pointers that it chooses, if it could.
        (b"\x80\x02cnumpy\nndarray\nK\x01\x85\x85R.", ["not a readable pickle"]),
        # Arrays that nothing was told of, or a number of bytes to make; a key that is no text.
        (b"\x80\x02}U\x04data" + ARRAY + b")\x81s.", ["not a readable pickle"]),
        (
            b"\x80\x02}U\x04data" + ARRAY + b")R(K\x01K\x05\x85" + BYTES + b"\x89K\x05tbs.",
            ["not a readable pickle", "not 'int'"],
        ),
        (b"\x80\x03}C\x01\xffK\x01s.", ["not a readable pickle", "UnicodeDecodeError"]),
        (python2_pickle(X, "labels", Y).replace(b"u1", b"O8"), ["array of O8", "bytes"]),
        (pickle.dumps({"data": X, "labels": Y[:5]}, 4), ["'labels'", "10"]),
        (pickle.dumps({"data": X, "labels": ["1"] * 10}, 4), ["'labels'"]),
        (pickle.dumps({"data": X, "labels": [*Y[:9], 10]}, 4), ["label 10", "0..9"]),
    ],
)
def test_bad_pickles_are_refused(refused, tmp_path, monkeypatch, content, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_batch").write_bytes(content)
    refused(lambda: data.load("cifar10", "test", root=tmp_path), "test_batch", *words)
    assert not (tmp_path / "surestep-was-here").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["0 bytes", "3073"]),
        (b"\0" * 5000, ["5000 bytes", "3073"]),
        (b"\x0a" * 3073, ["label 10", "0..9"]),
    ],
)
def test_bad_binaries_are_refused(refused, tmp_path, content, words):
    (tmp_path / "test_batch.bin").write_bytes(content)
    refused(lambda: data.load("cifar10", "test", root=tmp_path), "test_batch.bin", *words)


def test_the_test_file_is_not_read_for_training(tmp_path, refused):
    write_binary(tmp_path / "data_batch_1.bin", X, np.array(Y))
    (tmp_path / "test_batch.bin").write_bytes(b"damaged")
    assert len(data.load("cifar10", "train", root=tmp_path)) == 8
    assert len(data.load("cifar10", "validation", root=tmp_path)) == 2
    refused(lambda: data.load("cifar10", "test", root=tmp_path), "7 bytes", "3073")


def test_a_recut_is_never_downloaded_over(tmp_path, refused):
    write_binary(tmp_path / "data_batch_4.bin", X, np.array(Y))
    message = refused(lambda: data.load("cifar10", "test", root=tmp_path), "no test files")
    assert "allow the download" not in message
    refused(lambda: data.load("cifar100", root=tmp_path, download=False), "allow the download")


def test_the_real_files(real_cifar):
    train = data.load("cifar10", "train", root=real_cifar)
    validation = data.load("cifar10", "validation", root=real_cifar)
    assert (len(train), len(validation)) == (16_000, 4_000)
    assert train.image_shape == (3, 32, 32)
    # The channel means everybody normalises CIFAR-10 with, here over two of the five files.
    mean = train.x[::4].float().mean((0, 2, 3)) / 255
    assert torch.allclose(mean, torch.tensor([0.4914, 0.4822, 0.4465]), atol=0.01)
    test = data.load("cifar10", "test", root=real_cifar)
    assert test.y.bincount().tolist() == [1000] * 10
