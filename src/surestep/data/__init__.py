"""Data: labelled images in memory, the built-in data sets, batches on the device.

`load` returns a split of a named data set, `as_images` checks data of your own, `Batches` makes
batches of either. Pixels are in [0, 1]; normalisation belongs to the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from surestep.data import augment
from surestep.data._batches import Batches, as_pair, as_pixels
from surestep.data._images import UNLABELLED, Images, are_numbers, as_images
from surestep.data._splits import check_judged, check_split, mixed, some
from surestep.errors import UserError, look_up

__all__ = [
    "UNLABELLED",
    "Batches",
    "Images",
    "are_numbers",
    "as_images",
    "as_pair",
    "as_pixels",
    "augment",
    "check_judged",
    "load",
    "mixed",
    "names",
    "some",
]


@dataclass(frozen=True)
class _Source:
    """How to call the loader of a named data set, in module ``file``, and what it needs."""

    file: str
    needs_place: str = ""
    usage: str = ""
    takes: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()


_SOURCES = {
    "mnist": _Source("mnist"),
    "cifar10": _Source("cifar", takes=("download",), fixed=("cifar10",)),
    "cifar100": _Source("cifar", takes=("download",), fixed=("cifar100",)),
    "folder": _Source("folder", "a folder", "folder:PATH", takes=("image_size", "n")),
    "npz": _Source("npz", "an .npz file", "npz:FILE"),
    "hf": _Source("hf", "the name of a data set", "hf:NAME", takes=("image_size", "n")),
}


def names() -> list[str]:
    """Return the names `load` knows."""
    return list(_SOURCES)


def resizes(name: str) -> bool:
    """Tell whether images of the data set ``name`` ("folder:PATH") can be cropped and resized.

    Raises:
        UserError: if the name is unknown.
    """
    return "image_size" in _source(name.partition(":")[0]).takes


def load(
    name: str,
    split: str = "train",
    *,
    root: str | Path | None = None,
    download: bool = True,
    image_size: int | None = None,
    n: int | None = None,
) -> Images:
    """Load one split of a data set into memory.

    The test files are never opened for the train or validation split.

    Args:
        name: one of `names`. The location of the data may follow after a colon: ``folder:PATH``,
            ``npz:FILE``, ``hf:NAME``, ``mnist:PATH``, ``cifar10:PATH``.
        split: "train", "validation" or "test".
        root: the location of the data, if the name does not give it. By default MNIST is read
            from the package, and CIFAR from ``$SURESTEP_DATA`` or ``~/.cache/surestep``.
        download: download CIFAR if its files are not there.
        image_size: side in pixels to which images of a folder or of the Hub are cropped and
            resized.
        n: load only n images, see ``Images.first``. For a folder, and for colour images of the
            Hub, no other images are decoded.

    Returns:
        Images on the CPU, x uint8 (N, C, H, W) (an .npz file may hold float32 or features).

    Raises:
        UserError: unknown name or split, an option the data set does not have, files that are
            missing or damaged.
    """
    part = check_split(split)
    kind, colon, place = name.partition(":")
    source = _source(kind)
    if colon and not place:
        raise UserError(f"{name!r} ends at the colon: add {source.needs_place or 'a folder'}")
    if place and root is not None:
        raise UserError(f"{name!r} and root {str(root)!r} both give the location: give only one")
    where = place or root
    if where is not None and kind != "hf":
        try:
            where = Path(where).expanduser()
        except RuntimeError as e:  # no such user
            raise UserError(f"cannot resolve the location {str(where)!r}: {e}") from e
    if source.needs_place and where is None:
        raise UserError(f"{kind!r} needs {source.needs_place}: write {source.usage}")
    if image_size is not None:
        if "image_size" not in source.takes:
            raise UserError(f"image_size {image_size}: {kind} has a fixed size; leave it out")
        if image_size < 1:
            raise UserError(f"image_size {image_size}: give 1 or more pixels")
    if n is not None and n < 1:
        raise UserError(f"cannot load {n} images of {name}: give 1 or more")
    options = {"download": download, "image_size": image_size, "n": n}
    images = _loader(source)(
        *source.fixed, part, where, **{option: options[option] for option in source.takes}
    )
    return images if n is None else images.first(n)


def _source(name: str) -> _Source:
    return look_up("dataset", name, _SOURCES)


def _loader(source: _Source) -> Callable[..., Images]:
    # Imported by name on first use: the package stays light, and a loader costs nothing until
    # its data are requested.
    return import_module(f"surestep.data.{source.file}").load
