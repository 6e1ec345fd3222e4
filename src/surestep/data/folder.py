"""Folders of image files, one folder per class.

Either ``root/{train,val|valid|validation,test}/CLASS/*.png`` or ``root/CLASS/*.png``; the latter is
divided 80/10/10 within each class, always the same way.
Needs Pillow: pip install 'surestep[folder]'.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from surestep.data._images import Images
from surestep.data._pillow import Unreadable, has_colour, reading, stack
from surestep.data._splits import KNOWN_AS, SPLITS, Split, divide, instead, mixed
from surestep.errors import UserError, need

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def load(
    split: Split, root: str | Path, *, image_size: int | None = None, n: int | None = None
) -> Images:
    """Load a split of a folder of images.

    Classes are numbered in the alphabetical order of the class folders (those of the training
    split, if there is one). Without a validation folder, a tenth of each training class is held out
    for validation and left out of training.

    Args:
        split: "train", "validation" or "test".
        root: the folder.
        image_size: side in pixels of the centred square to crop and resize to; None if all images
            have the same size.
        n: read only the first n images of the shuffled order; all by default.

    Returns:
        Images with x uint8 (N, C, H, W) in a fixed shuffled order; C = 1 if every image of training
        and validation is grey, else 3.

    Raises:
        UserError: Pillow is not installed; a folder is missing or empty; images cannot be read,
            differ in size or do not fit into memory; a split has a class that training lacks.
    """
    need("PIL.Image", "reading image folders", "surestep[folder]", called="Pillow")
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root} is not a folder: give one with a sub-folder for each class")
    classes, files = _find(root, split)
    labelled = [(k, path) for k, name in enumerate(classes) for path in files.get(name, ())]
    order = mixed(len(labelled))[:n].tolist()
    y = torch.tensor([labelled[i][0] for i in order])
    paths = [labelled[i][1] for i in order]
    # All splits have the channels of the images that models are trained on.
    colour = _any_colour(_trained_on(root) or {path for _, path in labelled})
    pictures = ((str(path), partial(_open, path)) for path in paths)
    x = stack(pictures, len(paths), image_size, colour=colour)
    divided = not any(_split_folder(root, part) for part in SPLITS)
    note = (
        f"{len(labelled):,} images: {root} has no split folders, so it is divided 80/10/10"
        if divided
        else ""
    )
    return Images(x, y, classes, root.name or "folder", note)


def _trained_on(root: Path) -> set[Path]:
    """Return the files of the training and validation splits, if there are any."""
    found: set[Path] = set()
    for split in SPLITS:
        if split != "test":
            with contextlib.suppress(UserError):
                found.update(path for paths in _find(root, split)[1].values() for path in paths)
    return found


def _any_colour(paths: Iterable[Path]) -> bool:
    """Tell from the files' headers whether any picture has colour; skip damaged files."""
    for path in sorted(paths):
        with contextlib.suppress(Unreadable), reading(str(path)), _open(path) as picture:
            if has_colour(picture):
                return True
    return False


def _find(root: Path, split: Split) -> tuple[tuple[str, ...], dict[str, list[Path]]]:
    """Return the class names and, by class, the files of ``split``."""
    folders = {part: _split_folder(root, part) for part in SPLITS}
    if not any(folders.values()):
        _check_no_splits(root)
        return _part_of(root, split, test=True)
    train, wanted = folders["train"], folders[split]
    if train and folders["validation"] is None and split != "test":
        return _part_of(train, split, test=False)
    if wanted is None:
        expected = " or ".join(KNOWN_AS[split])
        raise UserError(
            f"{root} has no {split} split: expected a folder {expected} of classes{instead(split)}"
        )
    files = _files(wanted, training=split == "train")
    classes = tuple(_class_folders(train)) if train else tuple(files)
    extra = sorted(set(files) - set(classes))
    if extra:
        raise UserError(
            f"{wanted / extra[0]} is a class that {train} does not have: give both the same classes"
        )
    return classes, files


def _split_folder(root: Path, split: Split) -> Path | None:
    """Return the folder of ``split`` if it holds class folders (else it may be a class itself)."""
    for name in KNOWN_AS[split]:
        if _class_folders(root / name):
            return root / name
    return None


def _check_no_splits(root: Path) -> None:
    """Refuse split folders under unknown names, which would be taken for classes.

    Raises:
        UserError: all folders are named like splits but hold no class folders; or one is named
            like a split, and all share at least two names of sub-folders.
    """
    known = {name for names in KNOWN_AS.values() for name in names}
    if (found := set(_class_folders(root))) and found <= known:
        raise UserError(
            f"{root} holds {', '.join(sorted(found))}, which hold no class folders: arrange the "
            "files as SPLIT/CLASS/*.png"
        )
    inside = [set(_class_folders(folder)) for folder in _class_folders(root).values()]
    shared = set.intersection(*inside) if len(inside) > 1 else set()
    meant = [n for n in _class_folders(root) if re.search("train|test|valid", n.lower())]
    if len(shared) > 1 and meant:
        names = ", ".join(_class_folders(root))
        raise UserError(
            f"{root} holds {names}, each with {', '.join(sorted(shared)[:3])}, ...: if these are "
            "splits, name them train, validation and test"
        )


def _class_folders(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        return {}
    found = (p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    # By name, since path objects sort differently on Windows.
    return {p.name: p for p in sorted(found, key=lambda p: p.name)}


def _files(folder: Path, *, training: bool) -> dict[str, list[Path]]:
    """Return the image files of each class under ``folder``, in a fixed order.

    Raises:
        UserError: a class, if for training, or every class has none.
    """
    found = {name: _images_in(place) for name, place in _class_folders(folder).items()}
    if not found:
        raise UserError(f"{folder} holds no class folders: give one with CLASS/*.png")
    empty = [name for name, paths in found.items() if not paths]
    if empty and (training or len(empty) == len(found)):
        raise UserError(
            f"{folder / empty[0]} holds no images: expected files ending in {', '.join(_SUFFIXES)}"
        )
    return found


def _images_in(folder: Path) -> list[Path]:
    """Return the image files under ``folder``, also behind links, but not in hidden folders."""
    found: list[Path] = []
    # A link to a folder around this one would lead to other classes.
    seen = {str(around) for around in Path(os.path.realpath(folder)).parents}
    for place, folders, names in os.walk(folder, followlinks=True):
        # A folder that several links lead to, or a link in it, counts once.
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        # Links last, so that of a folder within this one and a link to it, the folder counts.
        shown = (name for name in folders if not name.startswith("."))
        folders[:] = sorted(shown, key=lambda n: (os.path.islink(os.path.join(place, n)), n))
        paths = (Path(place, name) for name in names if not name.startswith("."))
        found += (path for path in paths if path.suffix.lower() in _SUFFIXES)
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _part_of(
    folder: Path, split: Split, *, test: bool
) -> tuple[tuple[str, ...], dict[str, list[Path]]]:
    """Divide the files under ``folder`` class by class and keep those of ``split``."""
    files = _files(folder, training=True)
    kept = {}
    for name, paths in files.items():
        keys = [path.relative_to(folder).as_posix() for path in paths]
        chosen = divide(len(paths), split, what=str(folder / name), test=test, keys=keys)
        kept[name] = [paths[i] for i in chosen]
    return tuple(files), kept


def _open(path: Path) -> Picture:
    """Open a picture, reading only its header."""
    from PIL import Image

    return Image.open(path)
