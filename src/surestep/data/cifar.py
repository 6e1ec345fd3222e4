"""CIFAR-10 and CIFAR-100, from their standard files in the binary or the Python format.

Source: Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images";
https://www.cs.toronto.edu/~kriz/cifar.html describes both formats.
"""

from __future__ import annotations

import io
import logging
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from surestep.data import download as web
from surestep.data._images import Images
from surestep.data._splits import Split, last_held_out
from surestep.errors import UserError

log = logging.getLogger(__name__)

_PIXELS = 3 * 32 * 32
_TRAIN_IMAGES = 50_000


@dataclass(frozen=True)
class _Format:
    """One of the formats in which the files are published."""

    archive: web.Archive
    train: tuple[str, ...]
    test: tuple[str, ...]
    read: Callable[[Path, int], tuple[np.ndarray, np.ndarray]]

    def files(self, split: Split) -> tuple[str, ...]:
        return self.test if split == "test" else self.train


@dataclass(frozen=True)
class _Dataset:
    classes: tuple[str, ...]
    formats: tuple[_Format, ...]


def load(
    dataset: Literal["cifar10", "cifar100"],
    split: Split,
    root: str | Path | None = None,
    *,
    download: bool = True,
) -> Images:
    """Load a split of CIFAR-10 or CIFAR-100.

    A folder with only some of the training files is accepted as a smaller data set, a re-cut:
    validation is the last fifth of the training images found (10,000 of the full 50,000), and
    `Images.note` says how many were found.

    Args:
        dataset: "cifar10" or "cifar100".
        split: "train", "validation" or "test". The test file is read for "test" only.
        root: the folder with the files, or with the standard sub-folder that has them
            (``cifar-10-batches-bin``, ``cifar-10-batches-py``, ``cifar-100-binary``,
            ``cifar-100-python``); by default ``$SURESTEP_DATA`` or ``~/.cache/surestep``.
        download: download the archive into ``root`` if none of the files is there.

    Returns:
        Images with x uint8 (N, 3, 32, 32); for CIFAR-100 the fine labels.

    Raises:
        UserError: files are missing and cannot be downloaded, or are truncated, corrupt, or hold
            a pickle that needs anything but NumPy arrays.
    """
    data = _DATASETS[dataset]
    place = Path(root) if root is not None else web.default_root()
    found = _find(data, split, place)
    if found is None:
        recut = _any_file(data, place)
        if recut or not download:
            raise _missing(data, split, place, "" if recut else ", or allow the download")
        web.fetch(tuple(f.archive for f in data.formats), place)
        found = _find(data, split, place)
    if found is None:
        raise _missing(data, split, place, "")
    form, paths = found
    parts = [form.read(path, len(data.classes)) for path in paths]
    x = torch.from_numpy(np.concatenate([x for x, _ in parts])).view(-1, 3, 32, 32)
    y = torch.from_numpy(np.concatenate([y for _, y in parts]).astype(np.int64))
    images = Images(x, y, data.classes, dataset)
    if split == "test":
        return images
    images = Images(x, y, data.classes, dataset, _note(len(images), paths[0].parent))
    return images.subset(last_held_out(len(images), split, len(images) // 5))


def _note(count: int, folder: Path) -> str:
    log.info("found %d of %d training images in %s", count, _TRAIN_IMAGES, folder)
    if count == _TRAIN_IMAGES:
        return ""
    return f"{count:,} of {_TRAIN_IMAGES:,} training images found in {folder}"


def _find(data: _Dataset, split: Split, root: Path) -> tuple[_Format, list[Path]] | None:
    """Return the first format in which ``root`` has files for ``split``, and those files."""
    for form in data.formats:
        for folder in (root / form.archive.folder, root):
            paths = [folder / name for name in form.files(split) if (folder / name).is_file()]
            if paths:
                return form, paths
    return None


def _any_file(data: _Dataset, root: Path) -> bool:
    """Tell whether ``root`` holds any file of the data set, and so is a re-cut to leave alone."""
    return any(_find(data, split, root) for split in ("train", "test"))


def _missing(data: _Dataset, split: Split, root: Path, also: str) -> UserError:
    ways = " or ".join(
        f"{_listed(form.files(split))} into {root / form.archive.folder}" for form in data.formats
    )
    return UserError(f"{root} has no {split} files: put {ways}{also}")


def _listed(files: tuple[str, ...]) -> str:
    return files[0] if len(files) == 1 else f"{files[0]}..{files[-1].removeprefix('data_batch_')}"


def _binary(label_bytes: int) -> Callable[[Path, int], tuple[np.ndarray, np.ndarray]]:
    """Make a reader of records: ``label_bytes`` label bytes (the last is used), then the pixels."""
    record = label_bytes + _PIXELS

    def read(path: Path, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
        content = np.frombuffer(_content(path), np.uint8)
        if content.size == 0 or content.size % record:
            raise UserError(
                f"{path} has {content.size} bytes: expected a multiple of {record}, one record per "
                "image; it is truncated or in another format, put a fresh copy there"
            )
        rows = content.reshape(-1, record)
        y = rows[:, label_bytes - 1]
        return rows[:, label_bytes:], _in_range(y, num_classes, path)

    return read


def _pickled(label_key: str) -> Callable[[Path, int], tuple[np.ndarray, np.ndarray]]:
    """Make a reader of a pickled dict with ``data`` and the labels under ``label_key``."""

    def read(path: Path, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
        stored = _unpickle(path)
        x, labels = stored.get("data"), stored.get(label_key)
        if (
            not isinstance(x, np.ndarray)
            or x.dtype != np.uint8
            or x.ndim != 2
            or x.shape[1] != _PIXELS
            or len(x) == 0
        ):
            raise UserError(
                f"{path} has no usable 'data': expected a uint8 array (N, {_PIXELS}); "
                "put a fresh copy there"
            )
        if (
            not isinstance(labels, list)
            or len(labels) != len(x)
            or not all(type(label) is int for label in labels)
        ):
            raise UserError(
                f"{path} has no usable {label_key!r}: expected a list of {len(x)} class numbers; "
                "put a fresh copy there"
            )
        return x, _in_range(np.array(labels), num_classes, path)

    return read


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): check the file and its permissions"
        ) from None


def _in_range(y: np.ndarray, num_classes: int, path: Path) -> np.ndarray:
    wrong = y[(y < 0) | (y >= num_classes)]
    if wrong.size:
        raise UserError(
            f"{path} holds the label {wrong[0]}: expected 0..{num_classes - 1}; it is damaged or "
            "belongs to another data set, put a fresh copy there"
        )
    return y


def _unpickle(path: Path) -> dict[str, Any]:
    # Python 3 needs latin1 to read NumPy arrays pickled by Python 2.
    reader = _Unpickler(io.BytesIO(_content(path)), encoding="latin1")
    reader.path = path
    try:
        return _plain(reader.load(), path)
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(
            f"{path} is not a readable pickle ({type(error).__name__}: {error}): it is truncated "
            "or corrupt, put a fresh copy there"
        ) from None


def _plain(stored: Any, path: Path) -> dict[str, Any]:
    """Return the dict with keys as text, and NumPy arrays in place of their stand-ins."""
    if not isinstance(stored, dict):
        raise UserError(f"{path} holds a {type(stored).__name__}: expected a dict with 'data'")
    return {
        k.decode() if isinstance(k, bytes) else str(k): v.values if isinstance(v, _Array) else v
        for k, v in stored.items()
    }


class _Unpickler(pickle.Unpickler):
    """Unpickles only arrays of bytes and plain containers, since a pickle can run any code."""

    path: Path

    def find_class(self, module: str, name: str, /) -> Any:
        found = _ALLOWED.get((module.replace("numpy._core", "numpy.core"), name))
        if found is None:
            raise UserError(
                f"{self.path} asks for {module}.{name}, which no CIFAR file needs: refused, as "
                "it could run code; put the official file there"
            )
        return found


class _Kind:
    """Stand-in for the dtype uint8; NumPy's own would take flags and fields from the file."""

    def __init__(self, code: str, *_: int) -> None:
        if code not in ("u1", "|u1"):
            raise ValueError(f"an array of {code}, where a CIFAR file has bytes")

    def __setstate__(self, state: object) -> None:
        """Ignore the state that the file gives."""


class _Array:
    """Stand-in for a uint8 array; NumPy's own, with dtype object, lets a file choose pointers."""

    def __init__(self, *_: object) -> None:
        self.values = np.empty(0, np.uint8)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Take shape and content from the state that a NumPy array pickles."""
        _version, shape, kind, by_column, content = state
        if not isinstance(kind, _Kind):
            raise ValueError("an array of unknown dtype")
        raw = content.encode("latin1") if isinstance(content, str) else content
        flat = np.frombuffer(raw, np.uint8)
        self.values = flat.reshape(shape, order="F" if by_column else "C").copy()


def _encode(text: str, encoding: str) -> bytes:
    # Pickle protocol 2 writes bytes this way. No other codec (such as zip) is needed.
    if encoding != "latin1":
        raise ValueError(f"codec {encoding}")
    return text.encode("latin1")


_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): "ndarray",  # named only, as the type to reconstruct
    ("numpy", "dtype"): _Kind,
    ("_codecs", "encode"): _encode,
}

_TEN = "airplane automobile bird cat deer dog frog horse ship truck"
_HUNDRED = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup
dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower
leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid
otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray
road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
wardrobe whale willow_tree wolf woman worm
"""
_BATCHES = tuple(f"data_batch_{k}" for k in range(1, 6))
# The binary format comes first: it needs no pickle.
_DATASETS = {
    "cifar10": _Dataset(
        tuple(_TEN.split()),
        (
            _Format(
                web.CIFAR10_BINARY,
                tuple(f"{name}.bin" for name in _BATCHES),
                ("test_batch.bin",),
                _binary(1),
            ),
            _Format(web.CIFAR10_PYTHON, _BATCHES, ("test_batch",), _pickled("labels")),
        ),
    ),
    "cifar100": _Dataset(
        tuple(_HUNDRED.split()),
        (
            _Format(web.CIFAR100_BINARY, ("train.bin",), ("test.bin",), _binary(2)),
            _Format(web.CIFAR100_PYTHON, ("train",), ("test",), _pickled("fine_labels")),
        ),
    ),
}
