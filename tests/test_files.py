from __future__ import annotations

import errno
import io
import math
import os
import pickle
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from surestep import files
from surestep.errors import UserError
from surestep.weights import load_weights

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def identical(one: Any, other: Any) -> bool:
    """Compare types, keys with their order, and bits; NaN is itself."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape
        return same and bytes(raw(one)) == bytes(raw(other))
    if isinstance(one, dict):
        keys = [(type(k), k) for k in one] == [(type(k), k) for k in other]
        return keys and all(identical(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(identical, one, other))
    if isinstance(one, float) and math.isnan(one):
        return math.isnan(other)
    return one == other


def raw(tensor: Tensor) -> list[int]:
    return tensor.contiguous().flatten().view(torch.uint8).tolist() if tensor.numel() else []


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    tensor = (tensor * 3).abs().to(dtype)
    return tensor.transpose(0, -1) if draw(st.booleans()) and tensor.dim() > 1 else tensor


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), tensors()
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(st.integers(), st.text(max_size=5)), inner, max_size=3),
    ),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


class TestTrees:
    @settings(max_examples=150)
    @given(TREES)
    def test_round_trip(self, place, tree):
        path = place / "tree.safetensors"
        files.save_tree(path, tree)
        assert identical(files.load_tree(path), tree)
        assert [p.name for p in place.iterdir()] == ["tree.safetensors"]

    def test_an_optimizer_goes_round(self, tmp_path):
        net = nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(net.parameters())
        net(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        state = optimizer.state_dict()
        files.save_tree(tmp_path / "o", state)
        assert identical(files.load_tree(tmp_path / "o"), state)

    def test_what_is_saved_is_a_copy(self, tmp_path):
        # Views of one storage, and a tensor twice: safetensors refuses shared memory as such.
        base = torch.arange(6.0)
        tree = {"a": base, "b": base[2:4], "c": base.view(2, 3).t(), "d": base}
        files.save_tree(tmp_path / "t", tree)
        assert identical(files.load_tree(tmp_path / "t"), tree)

    def test_an_object_is_refused_and_nothing_written(self, tmp_path):
        with pytest.raises(TypeError, match="cannot save a set"):
            files.save_tree(tmp_path / "t", {"a": [{1, 2}]})
        assert not list(tmp_path.iterdir())


def whole(path: Path) -> bytes:
    files.save_tree(path, {"a": torch.arange(100.0), 3: [1, (2.5, None)]})
    return path.read_bytes()


def cut(share: float):
    return lambda content: content[: int(len(content) * share)]


DAMAGE = {
    "empty": lambda _: b"",
    "one byte": cut(0.005),
    "in the header": cut(0.2),
    "in the tensors": cut(0.7),
    "last byte": lambda content: content[:-1],
    "longer": lambda content: content + b"\0",
    "zeros": lambda content: bytes(len(content)),
    "header gone": lambda content: content[:8] + b"\0" * 40 + content[48:],
    "huge header": lambda content: b"\xff" * 8 + content[8:],
    "html": lambda _: b"<!DOCTYPE html><html>quota exceeded</html>",
}


class TestDamage:
    @pytest.mark.parametrize("damage", DAMAGE)
    @pytest.mark.parametrize("load", ["tree", "weights"])
    def test_a_damaged_file_is_named(self, tmp_path, damage, load):
        path = tmp_path / "c.safetensors"
        path.write_bytes(DAMAGE[damage](whole(path)))
        with pytest.raises(UserError, match=r"c\.safetensors") as caught:
            read(path, load)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("load", ["tree", "weights"])
    @pytest.mark.parametrize("kind", ["missing", "folder"])
    def test_no_file(self, tmp_path, load, kind):
        path = tmp_path / "c.safetensors"
        if kind == "folder":
            path.mkdir()
        with pytest.raises(UserError, match=r"c\.safetensors does not exist"):
            read(path, load)

    def test_a_foreign_safetensors_file(self, tmp_path):
        path = tmp_path / "foreign.safetensors"
        safetensors.torch.save_file({"weight": torch.ones(2)}, path)
        with pytest.raises(UserError, match=r"foreign\.safetensors is not a surestep checkpoint"):
            files.load_tree(path)

    @pytest.mark.parametrize(
        "structure",
        ["no JSON", '{"tensor": "7"}', '{"a": 1, "b": 2}', '{"dict": 3}', '{"dict": [[[1], 2]]}'],
    )
    def test_a_structure_that_makes_no_sense(self, tmp_path, structure):
        path = tmp_path / "c.safetensors"
        safetensors.torch.save_file({}, path, {"structure": structure})
        with pytest.raises(UserError, match=r"c\.safetensors"):
            files.load_tree(path)

    def test_a_flipped_bit(self, tmp_path):
        path = tmp_path / "c.safetensors"
        content = bytearray(whole(path))
        content[-10] ^= 4
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"c\.safetensors"):
            files.load_tree(path)


def read(path: Path, how: str) -> None:
    if how == "tree":
        files.load_tree(path)
    else:
        load_weights(path, nn.Linear(2, 2))


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("load", ["tree", "weights"])
@pytest.mark.parametrize("kind", ["pickle", "torch.save"])
def test_a_pickle_is_never_unpickled(tmp_path, load, kind):
    marker, path = tmp_path / "marker", tmp_path / "evil.safetensors"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb(marker)))
        pickle.loads(path.read_bytes())
    else:
        torch.save({"weight": Bomb(marker)}, path)
        torch.load(io.BytesIO(path.read_bytes()), weights_only=False)
    assert marker.exists(), "the bomb must work, or this test shows nothing"
    marker.unlink()
    with pytest.raises(UserError, match=r"evil\.safetensors"):
        read(path, load)
    assert not marker.exists()


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


class FullFile:
    """A file whose disk is full."""

    def __enter__(self) -> FullFile:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    write = full


class TestWriting:
    def test_it_replaces_and_leaves_nothing_else(self, tmp_path):
        for content in ("old", b"new \xff"):
            files.write_atomically(tmp_path / "f", content)
        assert (tmp_path / "f").read_bytes() == b"new \xff"
        assert len(list(tmp_path.iterdir())) == 1

    @pytest.mark.parametrize("call", ["replace", "fsync", "write"])
    def test_a_full_disk_leaves_the_old_file(self, tmp_path, monkeypatch, call):
        path = tmp_path / "model.safetensors"
        path.write_text("old")
        if call == "write":
            opened = Path.open

            def open_full(self: Path, *args: Any, **kwargs: Any) -> Any:
                opened(self, *args, **kwargs).close()
                return FullFile()

            monkeypatch.setattr(Path, "open", open_full)
        else:
            monkeypatch.setattr(os, call, full)
        with pytest.raises(UserError, match=r"no space left.*model\.safetensors.*--resume"):
            files.write_atomically(path, b"new" * 1000)
        monkeypatch.undo()
        assert path.read_text() == "old"
        assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]

    def test_a_crash_leaves_the_old_file(self, tmp_path, monkeypatch):
        path = tmp_path / "f"
        path.write_text("old")

        def crash(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            files.write_atomically(path, "new")
        assert path.read_text() == "old"

    def test_a_folder_that_cannot_be_synced_is_no_failure(self, tmp_path, monkeypatch):
        sync = os.fsync

        def refuse(fd: int) -> None:
            if stat.S_ISDIR(os.fstat(fd).st_mode):
                raise OSError(errno.EINVAL, "Invalid argument")
            sync(fd)

        monkeypatch.setattr(os, "fsync", refuse)
        files.write_atomically(tmp_path / "f", "new")
        assert (tmp_path / "f").read_text() == "new"

    def test_the_content_is_on_disk_before_the_name(self, tmp_path, monkeypatch):
        calls: list[str] = []
        sync, replace = os.fsync, os.replace

        def note_sync(fd: int) -> None:
            calls.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
            sync(fd)

        def note_replace(*args: Any) -> None:
            calls.append("replace")
            replace(*args)

        monkeypatch.setattr(os, "fsync", note_sync)
        monkeypatch.setattr(os, "replace", note_replace)
        files.write_atomically(tmp_path / "f", "new")
        assert calls == ["file", "replace", "folder"]

    @pytest.mark.parametrize(
        "parent",
        [
            "missing",
            "file",
        ],
    )
    def test_a_place_that_cannot_be_written_to(self, tmp_path, parent):
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match="cannot write"):
            files.write_atomically(tmp_path / parent / "f", b"")


def test_a_folder_is_made_with_those_above_it_once(tmp_path):
    for _ in range(2):
        files.make_folder(tmp_path / "a" / "b")
    (tmp_path / "a" / "file").touch()
    with pytest.raises(UserError, match=r"cannot make the folder .*file.c: Not a directory"):
        files.make_folder(tmp_path / "a" / "file" / "c")


def test_on_windows_a_file_that_is_open_elsewhere_is_waited_for(tmp_path, monkeypatch):
    tried = []

    def replace(part, path):
        tried.append(path)
        if len(tried) < 3:
            raise PermissionError("in use")

    monkeypatch.setattr(files, "time", SimpleNamespace(sleep=tried.append))
    monkeypatch.setattr(files, "os", SimpleNamespace(name="nt", replace=replace))
    files._replace(tmp_path / "part", tmp_path / "whole")
    assert tried == [tmp_path / "whole", 0.1, tmp_path / "whole"]
    monkeypatch.setattr(files, "os", SimpleNamespace(name="posix", replace=lambda *_: replace(*_)))
    tried.clear()
    with pytest.raises(PermissionError):
        files._replace(tmp_path / "part", tmp_path / "whole")
