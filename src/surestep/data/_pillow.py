"""Decoding pictures with Pillow into one tensor, for all loaders that read pictures."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from surestep.data._room import ADVICE, check_room
from surestep.devices import cores, memory_for
from surestep.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

Opener = Callable[[], "Picture"]
_BLOCK = 64  # pictures that are decoded, and thus open, at a time
_GREY = {"1", "L"}
_COLOUR = {"RGB", "RGBA", "P", "PA", "LA", "CMYK", "YCbCr", "HSV", "LAB"}


class Unreadable(Exception):
    """Pillow cannot read a picture; its arguments are the picture's name and the reason."""


def stack(
    pictures: Iterable[tuple[str, Opener]],
    count: int,
    image_size: int | None,
    *,
    colour: bool | None = None,
) -> Tensor:
    """Decode pictures into uint8 (N, C, H, W), where C is 1 (grey) or 3 (RGB).

    Opening and decoding run in several threads, since Pillow releases Python's GIL.

    Args:
        pictures: pairs of a name for messages and a function that opens the picture.
        count: number of pictures.
        image_size: side in pixels of the centred square to which each picture is cropped and
            resized (bilinear); None keeps them as they are.
        colour: convert all pictures to RGB, or all to grey; None: to RGB if any has colour.

    Raises:
        UserError: pictures cannot be read (all are tried first), have more than 8 bits per channel,
            differ in size from the first, or do not fit into memory.
    """
    with memory_for(f"reading {count:,} images", ADVICE):
        arrays: list[np.ndarray] = []
        damaged: list[Unreadable] = []
        first, channels = "", 0
        for name, array in _decoded(iter(pictures), image_size, colour):
            if isinstance(array, Unreadable):
                damaged.append(array)
                continue
            if not arrays:
                first = name
            elif array.shape[:2] != arrays[0].shape[:2]:
                raise UserError(
                    f"{name} is {_size(array)} pixels and {first} is {_size(arrays[0])}: give "
                    "images of one size, or an image_size to resize them to"
                )
            if array.shape[2] > channels:  # the first picture, or the first one in colour
                channels = array.shape[2]
                held = sum(a.size for a in arrays)
                check_room(count, (channels, *array.shape[:2]), held)
            arrays.append(array)
        if damaged:
            raise _all_of(damaged, count)
        whole = np.empty((len(arrays), channels, *arrays[0].shape[:2]), np.uint8)
        for place in whole[::-1]:  # the memory of an array is free as soon as it has been copied
            place[:] = arrays.pop().transpose(2, 0, 1)  # a grey picture fills all three channels
        return torch.from_numpy(whole)


def _all_of(damaged: list[Unreadable], count: int) -> UserError:
    """Return one error for all pictures that cannot be read."""
    (name, reason), *others = (error.args for error in damaged)
    if not others:
        return UserError(f"{name} is not a readable image ({reason}): replace or remove it")
    names = ", ".join([f"{name} ({reason})", *(other for other, _ in others[:2])])
    more = f" and {len(others) - 2:,} more" if len(others) > 2 else ""
    return UserError(
        f"{len(damaged):,} of {count:,} images are not readable: replace or remove {names}{more}"
    )


def _decoded(
    pictures: Iterator[tuple[str, Opener]], image_size: int | None, colour: bool | None
) -> Iterator[tuple[str, np.ndarray | Unreadable]]:
    """Yield names and decoded pictures in their order, decoding one block at a time."""

    def decode(pair: tuple[str, Opener]) -> np.ndarray | Unreadable:
        name, opener = pair
        try:
            with reading(name):
                picture = opener()
            with picture:
                return _decode(name, picture, image_size, colour)
        except Unreadable as error:
            return error

    with ThreadPoolExecutor(min(16, cores())) as pool:
        while block := list(itertools.islice(pictures, _BLOCK)):
            for (name, _), array in zip(block, pool.map(decode, block), strict=True):
                yield name, array


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn what Pillow raises for a damaged picture into one kind of error.

    Raises:
        Unreadable: the picture ``name`` cannot be read.
    """
    from PIL import Image

    try:
        yield
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise Unreadable(name, error) from None


def has_colour(picture: Picture) -> bool:
    """Tell whether a picture, decoded or not, has colour and so becomes RGB."""
    return picture.mode not in _GREY


def _decode(name: str, picture: Picture, image_size: int | None, colour: bool | None) -> np.ndarray:
    """Decode one picture into uint8 (H, W, 1) or, in colour, (H, W, 3); None: as it is."""
    from PIL import Image, ImageOps

    if picture.mode not in _GREY | _COLOUR:
        raise UserError(
            f"{name} has pixels of mode {picture.mode!r}: expected 8 bits per channel; convert it"
        )
    with reading(name):
        picture = _upright(picture)
        if colour or (colour is None and has_colour(picture)):
            if "transparency" in picture.info:  # Pillow warns about direct conversion
                picture = picture.convert("RGBA")
            picture = picture.convert("RGB")
        else:
            picture = picture.convert("L")
    if image_size is not None and picture.size != (image_size, image_size):
        side = (image_size, image_size)
        picture = ImageOps.fit(picture, side, method=Image.Resampling.BILINEAR)
    array = np.asarray(picture)
    return array.reshape(*array.shape[:2], -1)


def _upright(picture: Picture) -> Picture:
    """Return a picture as its EXIF data say that it is to be shown: cameras are held sideways."""
    from PIL import ExifTags, ImageOps

    picture.load()  # some formats tell their EXIF data only then
    try:
        turned = picture.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(picture) if turned else picture
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, struct.error):
        return picture  # damaged EXIF data are no damaged picture


def _size(array: np.ndarray) -> str:
    return f"{array.shape[1]} x {array.shape[0]}"
