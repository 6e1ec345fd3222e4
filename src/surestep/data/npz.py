"""NumPy archives (.npz), a common format of Keras and MedMNIST-like data sets."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from surestep.data._images import Images, as_images
from surestep.data._splits import Split, divide
from surestep.errors import UserError

_SUFFIX: dict[Split, str] = {"train": "train", "validation": "val", "test": "test"}


def load(split: Split, path: str | Path) -> Images:
    """Load a split of an .npz file.

    The arrays are x_train, y_train, x_test, y_test and optionally x_val, y_val; or x and y, divided
    80/10/10, always the same way. Without x_val, a tenth of the training arrays is held out. When
    arrays are divided, images without a label (-1) all go to training.
    Images are (N, H, W, C) or (N, C, H, W), told apart by the dimension that is 1 or 3 (the second
    if both are), or (N, H, W) for grey ones; (N, D) stays as it is. Labels are (N,) or (N, 1).
    Pickled arrays are refused: they could run code.

    Args:
        split: "train", "validation" or "test".
        path: the file.

    Returns:
        Images with x uint8 (N, C, H, W), or float32 pixels in [0, 1].

    Raises:
        UserError: a missing file, key or channel dimension; a damaged or pickled file; training
            labels that do not start at 0 or leave numbers out, also after the division; pixels or
            labels that `surestep.data.as_images` refuses.
    """
    path = Path(path)
    try:
        # Opened here, because NumPy does not close a damaged file.
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise UserError(f"{path} holds one bare array: expected an .npz file with x and y")
            with archive:
                return _load(archive, split, path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give an .npz file with arrays x and y") from None
    except UserError:
        raise
    # RuntimeError: encrypted, or compressed in a way that zipfile does not know.
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{path} cannot be read ({error}): expected an .npz file written by numpy.savez, "
            "without pickled objects"
        ) from None


def _load(archive: Any, split: Split, path: Path) -> Images:
    def get(part: str) -> tuple[np.ndarray, np.ndarray]:
        for key in (f"x{part}", f"y{part}"):
            if key not in archive:
                raise UserError(
                    f"{path} has no array {key!r}: it has {', '.join(archive.files) or 'none'}; "
                    "expected x_train, y_train, x_test, y_test [, x_val, y_val], or x and y"
                )
        return archive[f"x{part}"], np.atleast_1d(archive[f"y{part}"])

    whole = "x" in archive
    held_out = not whole and "x_val" not in archive and split != "test"
    x, y = get("" if whole else "_train" if held_out else f"_{_SUFFIX[split]}")
    unknown = y[:0]  # data that are only judged on may lack the first class
    own = unknown if split == "test" else y
    trained = own if whole else archive.get("y_train", unknown)
    images = as_images(
        (_channels_first(x, path), y.reshape(-1) if y.shape[1:] == (1,) else y),
        # A split may lack the last class, so the training labels count as well.
        num_classes=_classes(y, trained),
        name=path.stem,
    )
    _check_from_zero(trained, path)
    if whole or held_out:
        part = _divided(images, split, str(path), test=whole)
        note = f"{len(part):,} of {len(images):,} images: {path} has no splits, so it is divided"
        return replace(part, note=f"{note} 80/10/10") if whole else part
    return images


def _divided(images: Images, split: Split, what: str, test: bool) -> Images:
    """Divide the labelled images; unlabelled ones all go to training.

    Raises:
        UserError: too few images; or, unless for the test split, a class without training images.
    """
    labelled, rest = images.by_label()
    rows, trained = (
        labelled[divide(len(labelled), part, what=what, test=test)] for part in (split, "train")
    )
    lacking = sorted(set(range(images.num_classes)) - set(images.y[trained].tolist()))
    if lacking and split != "test":
        raise UserError(
            f"{what} has no training images of class {lacking[0]} once it is divided: give more "
            "images of it, or arrays x_train, y_train, x_val, y_val, x_test, y_test"
        )
    return images.subset(torch.cat([rows, rest]) if split == "train" else rows)


def _channels_first(x: np.ndarray, path: Path) -> np.ndarray:
    if x.dtype.kind == "f":  # NumPy's default is float64
        x = x.astype(np.float32)
    if x.ndim == 3:
        return x[:, None]
    if x.ndim != 4 or x.shape[1] in (1, 3):
        return x
    if x.shape[3] in (1, 3):
        return x.transpose(0, 3, 1, 2)
    raise UserError(
        f"{path} holds images of shape {x.shape}: expected 1 or 3 channels, (N, C, H, W) or "
        "(N, H, W, C)"
    )


def _check_from_zero(y: np.ndarray, path: Path) -> None:
    """Refuse training labels that do not start at 0 or that leave numbers out.

    They would make classes without images.
    """
    known = np.unique(y[y >= 0]) if y.dtype.kind in "iu" else np.empty(0)
    if known.size and known.size <= known[-1]:
        raise UserError(
            f"{path} has training labels of {known.size} classes, {known[0]} to {known[-1]}: "
            "number them from 0, without gaps"
        )


def _classes(*labels: np.ndarray) -> int | None:
    """Return the number of classes, or None if the labels are not class numbers."""
    top = max((int(y.max()) for y in labels if y.dtype.kind in "iu" and y.size), default=-1)
    return top + 1 if top >= 0 else None
