"""Image data sets from the Hugging Face Hub. Needs ``datasets``: pip install 'surestep[hf]'."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from surestep.data._images import Images, number_names
from surestep.data._pillow import Opener, stack
from surestep.data._splits import KNOWN_AS, Split, divide, instead, mixed
from surestep.errors import UserError, need

_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "labels", "fine_label")


def load(split: Split, name: str, *, image_size: int | None = None, n: int | None = None) -> Images:
    """Load a split of the data set ``name`` ("owner/name") from the Hub.

    The image and label columns are those whose type says so (``Image``, ``ClassLabel``), or, for
    untyped labels, the ones called label, labels or fine_label. If there is no validation split,
    a tenth of the training split is held out, always the same one.

    Args:
        split: "train", "validation" or "test"; only the files of this one are opened.
        name: name of the data set.
        image_size: side in pixels of the centred square to crop and resize to; None if all images
            have the same size.
        n: decode and return only the first n images of the shuffled order, provided that the
            classes have names and at least one of these images has colour; otherwise, all images.

    Returns:
        Images with x uint8 (N, C, H, W) in a fixed shuffled order; C = 1 if every image of the
        split is grey, else 3.

    Raises:
        UserError: ``datasets`` or Pillow is not installed; the data set cannot be fetched; a split
            is missing; no column, or several, can be the images or the labels; unlabelled rows;
            images that cannot be read, differ in size or do not fit into memory.
    """
    datasets, _ = (
        need(m, "reading the Hugging Face Hub", "surestep[hf]", called="datasets and Pillow")
        for m in ("datasets", "PIL.Image")
    )
    name = str(name)
    try:
        available = list(datasets.get_dataset_split_names(name))
        stored = _stored_split(name, split, available)
        rows = datasets.load_dataset(name, split=stored or "train")
    except UserError:
        raise
    except Exception as error:  # it wraps whatever fails, a full disk too, in errors of its own
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise UserError(
            f"the data set {name!r} cannot be fetched from the Hub ({reason}): check the name and "
            "the network"
        ) from None
    if stored is None:
        rows = rows.select(divide(len(rows), split, what=name, test=False).tolist())
    if len(rows) == 0:
        raise UserError(f"the {split} split of {name!r} is empty: choose another data set")
    image, label = _columns(name, rows.features)
    classes, order = getattr(rows.features[label], "names", None), mixed(len(rows))
    decode = datasets.Image(mode=getattr(rows.features[image], "mode", None)).decode_example
    try:
        if getattr(rows.features[image], "dtype", None) in ("string", "large_string"):
            raise TypeError  # they would be taken for paths and addresses to open
        # Rows hold the images' files, so that the files are decoded in several threads.
        rows = rows.cast_column(image, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError):  # pyarrow's errors are of these types
        raise UserError(
            f"{name!r} holds no pictures in column {image!r}: expected images"
        ) from None
    labels: list[int] = []

    def read(chosen: Tensor) -> Tensor:
        labels.clear()
        pictures = _pictures(name, rows, chosen.tolist(), (image, label), decode, labels)
        return stack(pictures, len(chosen), image_size)

    # Unnamed classes are counted from the labels of all rows; and if the first images are grey,
    # others may still have colour.
    if classes and n is not None and (x := read(order[:n])).shape[1] == 3:
        return Images(x, torch.tensor(labels), tuple(classes), name)
    x, y = read(order), torch.tensor(labels)
    classes = classes or number_names(int(y.max()) + 1)
    return Images(x, y, tuple(classes), name)


def _stored_split(name: str, split: Split, available: list[str]) -> str | None:
    """Return the Hub's name of ``split``; None if it must be divided off the training split."""
    stored = {
        part: next((known for known in known_as if known in available), None)
        for part, known_as in KNOWN_AS.items()
    }
    if split != "test" and stored["train"] and not stored["validation"]:
        return None
    if found := stored[split]:
        return found
    raise UserError(
        f"{name!r} has no {split} split: it has {', '.join(available) or 'none'}{instead(split)}"
    )


def _columns(name: str, features: dict[str, Any]) -> tuple[str, str]:
    """Return the names of the image and the label column."""
    return (
        _column(name, features, "image", "Image", _IMAGE_COLUMNS),
        _column(name, features, "label", "ClassLabel", _LABEL_COLUMNS),
    )


def _column(
    name: str, features: dict[str, Any], what: str, kind: str, usual: tuple[str, ...]
) -> str:
    typed = [column for column, feature in features.items() if type(feature).__name__ == kind]
    if len(typed) == 1:
        return typed[0]
    for column in usual:
        if column in (typed or features):
            return column
    raise UserError(
        f"{name!r} has {len(typed) or 'no'} {what} columns among {', '.join(features)}: expected "
        f"one of type {kind}, or one called {' or '.join(usual)}"
    )


def _pictures(
    name: str,
    rows: Any,
    chosen: list[int],
    columns: tuple[str, str],
    decode: Callable[[Any], Any],
    labels: list[int],
) -> Iterator[tuple[str, Opener]]:
    """Yield pictures and append their labels to ``labels``, reading each row only once."""
    image, label = columns
    for i in chosen:
        row = rows[i]
        where = f"row {i} of {name!r}"
        if not isinstance(row[label], int) or row[label] < 0:
            raise UserError(
                f"{where} has the label {row[label]!r}: expected a class number 0 or above; "
                "the split may be unlabelled"
            )
        if row[image] is None:
            raise UserError(f"{where} holds no picture in column {image!r}: expected an image")
        labels.append(row[label])
        yield where, partial(decode, row[image])
