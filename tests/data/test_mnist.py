from __future__ import annotations

import gzip
import shutil
from importlib import resources
from pathlib import Path

import pytest
import torch

from surestep import data
from surestep.data import mnist

NAMES = {
    "x": "t10k-images-idx3-ubyte.gz",
    "y": "t10k-labels-idx1-ubyte.gz",
}


@pytest.fixture
def root(tmp_path) -> Path:
    """A folder with the test files only."""
    embedded = Path(str(resources.files("surestep.data"))) / "files" / "mnist"
    for name in NAMES.values():
        shutil.copy(embedded / name, tmp_path)
    return tmp_path


def test_the_embedded_splits():
    train, validation, test = (data.load("mnist", s) for s in ("train", "validation", "test"))
    assert [len(s) for s in (train, validation, test)] == [50_000, 10_000, 10_000]
    for split in (train, validation, test):
        assert split.image_shape == (1, 28, 28)
        assert split.x.dtype == torch.uint8
        assert split.num_classes == 10
        assert split.name == "mnist"
    assert train.y[:5].tolist() == [5, 0, 4, 1, 9]
    assert test.y[:5].tolist() == [7, 2, 1, 0, 4]
    # The mean and deviation everybody normalises MNIST with.
    x = torch.cat([train.x, validation.x]).float() / 255
    assert x.mean().item() == pytest.approx(0.1307, abs=1e-4)
    assert x.std().item() == pytest.approx(0.3081, abs=1e-4)


def test_a_root_overrides_and_may_hold_plain_files(root):
    expected = data.load("mnist", "test")
    assert torch.equal(data.load("mnist", "test", root=root).x, expected.x)
    nested = root / "MNIST" / "raw"
    nested.mkdir(parents=True)
    for name in NAMES.values():
        packed = root / name
        (nested / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
        packed.unlink()
    assert torch.equal(data.load(f"mnist:{root}", "test").y, expected.y)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_test_files_are_not_opened_for_other_splits(split, monkeypatch):
    opened = []

    def read(folder, name, shape):
        opened.append(name)
        return original(folder, name, shape)

    original = mnist._read
    monkeypatch.setattr(mnist, "_read", read)
    data.load("mnist", split)
    assert [name.split("-")[0] for name in opened] == ["train", "train"]


def repack(file: Path, change) -> None:
    content = change(bytearray(gzip.decompress(file.read_bytes())))
    file.write_bytes(gzip.compress(bytes(content), 1))


def set_byte(place: int, value: int):
    def change(content: bytearray) -> bytearray:
        content[place] = value
        return content

    return change


DAMAGE = {
    "truncated gzip": ("x", lambda f: f.write_bytes(f.read_bytes()[:5000]), ["truncated"]),
    "empty": ("y", lambda f: f.write_bytes(b""), ["begins with nothing", "00000801"]),
    "no gzip": ("x", lambda f: f.write_bytes(b"<html>"), ["expected a gzip file"]),
    "corrupt": (
        "x",
        lambda f: f.write_bytes(f.read_bytes()[:999] + b"\0" * 99 + f.read_bytes()[1098:]),
        ["cannot be read"],
    ),
    "magic": ("y", lambda f: repack(f, set_byte(3, 3)), ["00000803", "00000801"]),
    "count": ("y", lambda f: repack(f, set_byte(7, 0)), ["9984", "10000"]),
    "size": ("x", lambda f: repack(f, set_byte(15, 32)), ["10000 x 28 x 32", "10000 x 28 x 28"]),
    "short data": ("y", lambda f: repack(f, lambda c: c[:-1]), ["9999 bytes", "10000"]),
    "short header": ("x", lambda f: repack(f, lambda c: c[:6]), ["10000 x 28 x 28"]),
    "label": ("y", lambda f: repack(f, set_byte(100, 10)), ["label 10", "0..9"]),
    "missing": ("x", lambda f: f.unlink(), ["missing"]),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(refused, root, case):
    which, damage, words = DAMAGE[case]
    file = root / NAMES[which]
    damage(file)
    refused(lambda: data.load("mnist", "test", root=root), file.stem, *words)
