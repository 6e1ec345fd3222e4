"""Decoding pictures with Pillow into one tensor, for all loaders that read pictures."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from surestep.devices import cores
from surestep.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

Opener = Callable[[], "Picture"]
_BLOCK = 64  # pictures that are decoded, and thus open, at a time
_GREY = {"1", "L"}
_COLOUR = {"RGB", "RGBA", "P", "PA", "LA", "CMYK", "YCbCr", "HSV", "LAB"}


def stack(
    pictures: Iterable[tuple[str, Opener]], image_size: int | None, *, grey: bool = False
) -> Tensor:
    """Decode pictures into uint8 (N, C, H, W): C = 1 if all of them are grey, else 3 (RGB).

    Decoding runs in several threads, since Pillow releases Python's GIL.

    Args:
        pictures: pairs of a name for messages and a function that opens the picture.
        image_size: side in pixels of the centred square to which each picture is cropped and
            resized (bilinear); None keeps them as they are.
        grey: convert colour pictures to grey.

    Raises:
        UserError: a picture cannot be decoded, has more than 8 bits per channel, or differs in
            size from the first.
    """
    arrays: list[np.ndarray] = []
    first = ""
    for name, array in _decoded(iter(pictures), image_size, grey):
        if not arrays:
            first = name
        elif array.shape[:2] != arrays[0].shape[:2]:
            raise UserError(
                f"{name} is {_size(array)} pixels and {first} is {_size(arrays[0])}: give images "
                "of one size, or an image_size to resize them to"
            )
        arrays.append(array)
    channels = max(array.shape[2] for array in arrays)
    whole = np.empty((len(arrays), channels, *arrays[0].shape[:2]), np.uint8)
    for place in whole[::-1]:  # the memory of an array is free as soon as it has been copied
        place[:] = arrays.pop().transpose(2, 0, 1)  # a grey picture fills all three channels
    return torch.from_numpy(whole)


def _decoded(
    pictures: Iterator[tuple[str, Opener]], image_size: int | None, grey: bool
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield names and decoded pictures in their order, decoding one block at a time."""

    def decode(pair: tuple[str, Opener]) -> np.ndarray:
        name, opener = pair
        with opener() as picture:
            return _decode(name, picture, image_size, grey)

    with ThreadPoolExecutor(min(16, cores())) as pool:
        while block := list(itertools.islice(pictures, _BLOCK)):
            for (name, _), array in zip(block, pool.map(decode, block), strict=True):
                yield name, array


def has_colour(picture: Picture) -> bool:
    """Tell whether a picture, decoded or not, has colour and so becomes RGB."""
    return picture.mode not in _GREY


def _decode(name: str, picture: Picture, image_size: int | None, grey: bool) -> np.ndarray:
    """Decode one picture into uint8 (H, W, 1) or (H, W, 3)."""
    from PIL import Image, ImageOps

    if picture.mode not in _GREY | _COLOUR:
        raise UserError(
            f"{name} has pixels of mode {picture.mode!r}: expected 8 bits per channel; convert it"
        )
    try:
        if grey or not has_colour(picture):
            picture = picture.convert("L")
        else:
            if "transparency" in picture.info:  # Pillow warns about direct conversion
                picture = picture.convert("RGBA")
            picture = picture.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise unreadable(name, error) from None
    if image_size is not None and picture.size != (image_size, image_size):
        side = (image_size, image_size)
        picture = ImageOps.fit(picture, side, method=Image.Resampling.BILINEAR)
    array = np.asarray(picture)
    return array.reshape(*array.shape[:2], -1)


def unreadable(name: str, error: Exception) -> UserError:
    """Build the error for a picture that Pillow cannot read."""
    return UserError(f"{name} is not a readable image ({error}): replace or remove it")


def _size(array: np.ndarray) -> str:
    return f"{array.shape[1]} x {array.shape[0]}"
