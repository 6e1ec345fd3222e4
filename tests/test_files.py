from __future__ import annotations

import errno
import io
import math
import os
import pickle
import stat
from collections import OrderedDict
from itertools import product
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
        files.load_weights(path, nn.Linear(2, 2))


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


class TestWeights:
    def test_round_trip_in_any_memory_format(self, tmp_path):
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        files.save_weights(tmp_path / "a", net)
        files.save_weights(tmp_path / "b", net.to(memory_format=torch.channels_last))
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
        other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        files.load_weights(tmp_path / "a", other)
        assert identical(dict(other.state_dict()), dict(net.state_dict()))

    def test_others_can_read_them(self, tmp_path):
        net = nn.Linear(2, 3)
        files.save_weights(tmp_path / "w", net)
        net.load_state_dict(safetensors.torch.load_file(tmp_path / "w"))

    def test_what_a_model_takes_and_gives(self, tmp_path):
        for signature in (files.Signature(), files.Signature(("ape", "bee, \u00e4"), (3, 8, 8))):
            files.save_weights(tmp_path / "w", nn.Linear(2, 2), signature)
            assert files.read_signature(tmp_path / "w") == signature
            files.load_weights(tmp_path / "w", nn.Linear(2, 2))
        with pytest.raises(UserError, match="does not exist"):
            files.read_signature(tmp_path / "none")

    def test_tied_weights(self, tmp_path):
        net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        net[1].weight = net[0].weight
        files.save_weights(tmp_path / "w", net)
        files.load_weights(tmp_path / "w", net)
        assert net[1].weight is net[0].weight

    @pytest.mark.parametrize(
        ("other", "said"),
        [
            (nn.Linear(2, 4), r"bias has shape \(3,\), expected \(4,\)"),
            (nn.Linear(2, 3, bias=False), "missing nothing, unexpected bias"),
            (nn.Sequential(nn.Linear(2, 3)), r"missing 0\.bias, 0\.weight, unexpected bias"),
            (nn.BatchNorm1d(3), r"missing num_batches_tracked, running_mean, running_var, un"),
        ],
    )
    def test_weights_of_another_model(self, tmp_path, other, said):
        path = tmp_path / "w.safetensors"
        files.save_weights(path, nn.Linear(2, 3))
        before = {k: v.clone() for k, v in other.state_dict().items()}
        with pytest.raises(UserError, match=rf"w\.safetensors does not fit the model: .*{said}"):
            files.load_weights(path, other)
        assert identical(before, dict(other.state_dict()))


def test_weights_that_are_named_as_the_body_names_them(tmp_path):
    """As timm's own, of a model whose normalisation stands before timm's network."""
    net = nn.Sequential(OrderedDict(mean=nn.BatchNorm1d(2, affine=False), body=nn.Linear(2, 3)))
    other = nn.Linear(2, 3)
    for prefix, save in product(("", "module."), (safetensors.torch.save_file, torch.save)):
        path = tmp_path / ("w.safetensors" if save is not torch.save else "w.pt")
        save({f"{prefix}{k}": v for k, v in other.state_dict().items()}, path)
        net.body.reset_parameters()
        files.load_any_weights(path, net)
        assert torch.equal(net.body.weight, other.weight)
    files.save_weights(tmp_path / "whole.safetensors", net)
    net.body.reset_parameters()
    files.load_any_weights(tmp_path / "whole.safetensors", net)
    assert torch.equal(net.body.weight, other.weight)
    headed = nn.Sequential(OrderedDict(body=nn.Linear(2, 3), head=nn.Linear(3, 3)))
    with pytest.raises(UserError, match=r"does not fit the model: missing body\.bias"):
        files.load_any_weights(tmp_path / "w.safetensors", headed)


@pytest.mark.parametrize("entry", ["state_dict", "model_state_dict", "model", "net"])
def test_weights_of_a_checkpoint(tmp_path, entry):
    net, other = nn.Linear(2, 2), nn.Linear(2, 2)
    torch.save({entry: other.state_dict(), "acc": 1.0, "mean": torch.ones(1)}, tmp_path / "w.pt")
    files.load_any_weights(tmp_path / "w.pt", net)
    assert torch.equal(net.weight, other.weight)


def test_a_checkpoint_with_weights_elsewhere_names_its_entries(tmp_path):
    torch.save({"weights": nn.Linear(2, 2).state_dict(), "t": torch.ones(1)}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"a dict of weights, t: save .* or 'net'$"):
        files.load_any_weights(tmp_path / "w.pt", nn.Linear(2, 2))
    torch.save([1], tmp_path / "w.pt")
    with pytest.raises(UserError, match="no state_dict but a list"):
        files.load_any_weights(tmp_path / "w.pt", nn.Linear(2, 2))


@pytest.mark.parametrize("named", ["_orig_mod.0.{}", "module._orig_mod.0.{}", "0._orig_mod.{}"])
def test_weights_of_a_compiled_model(tmp_path, named):
    """torch.compile puts a name before each, of the whole or of parts."""
    layer = nn.Linear(2, 2)
    torch.save({named.format(k): v for k, v in layer.state_dict().items()}, tmp_path / "w.pt")
    net = nn.Sequential(nn.Linear(2, 2))
    files.load_any_weights(tmp_path / "w.pt", net)
    assert torch.equal(net[0].weight, layer.weight)


def test_a_compiled_model_takes_the_names_that_it_has(tmp_path):
    compiled = nn.Sequential(OrderedDict(_orig_mod=nn.Linear(2, 2)))
    torch.save(compiled.state_dict(), tmp_path / "w.pt")
    files.load_any_weights(tmp_path / "w.pt", compiled)


def test_safetensors_of_a_wrapped_model(tmp_path):
    """As DistributedDataParallel, and RobustBench, put a name before each."""
    net = nn.Linear(2, 2)
    for prefix in ("module.", "model.", "module.model."):
        named = {f"{prefix}{k}": v for k, v in net.state_dict().items()}
        safetensors.torch.save_file(named, tmp_path / "w.safetensors")
        other = nn.Linear(2, 2)
        files.load_any_weights(tmp_path / "w.safetensors", other)
        assert torch.equal(other.weight, net.weight)
    safetensors.torch.save_file({"weight": torch.zeros(2, 2)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="missing bias"):
        files.load_any_weights(tmp_path / "w.safetensors", nn.Linear(2, 2))


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


class Versioned(nn.Linear):
    """A layer that once stored its weight doubled, and now refuses weights of the future."""

    _version = 2

    def _load_from_state_dict(self, state, prefix, metadata, *rest):
        version = metadata.get("version") or 1
        if version < 2:
            state[f"{prefix}weight"] = state[f"{prefix}weight"] / 2
        if version > 2:
            raise ValueError(f"version {version} is newer than 2")
        super()._load_from_state_dict(state, prefix, metadata, *rest)


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.", "module._orig_mod."])
def test_modules_are_told_the_version_of_their_weights(tmp_path, prefix):
    net = nn.Sequential(Versioned(2, 2))
    wrapped = net
    for part in reversed(prefix.split(".")[:-1]):
        wrapped = nn.Sequential(OrderedDict([(part, wrapped)]))
    torch.save({"state_dict": wrapped.state_dict()}, tmp_path / "w.pt")
    safetensors.torch.save_file(wrapped.state_dict(), tmp_path / "w.safetensors")
    for name in ("w.pt", "w.safetensors"):
        other = nn.Sequential(Versioned(2, 2))
        files.load_any_weights(tmp_path / name, other)
        assert torch.equal(other[0].weight, net[0].weight)
    files.save_weights(tmp_path / "own", net)
    files.load_weights(tmp_path / "own", other)
    assert torch.equal(other[0].weight, net[0].weight)


def test_weights_that_a_module_refuses(tmp_path):
    net = Versioned(2, 2)
    net._version = 3
    torch.save(net.state_dict(), tmp_path / "w.pt")
    files.save_weights(tmp_path / "w", net)
    with pytest.raises(UserError, match="does not fit the model: version 3 is newer than 2"):
        files.load_any_weights(tmp_path / "w.pt", Versioned(2, 2))
    with pytest.raises(UserError, match="does not fit the model: version 3 is newer than 2"):
        files.load_weights(tmp_path / "w", net)
