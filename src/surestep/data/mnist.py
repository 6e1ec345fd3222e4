"""MNIST, embedded in the package: four gzip-compressed IDX files.

Source: LeCun, Cortes and Burges, "The MNIST database of handwritten digits"; the licence is
beside the files. Data sets in the same format (Fashion-MNIST, KMNIST) can be read from ``root``.
"""

from __future__ import annotations

import gzip
import zlib
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from surestep.data._images import Images, number_names
from surestep.data._splits import Split, last_held_out
from surestep.errors import UserError

if TYPE_CHECKING:  # its home moved from importlib.abc to importlib.resources.abc in 3.11
    from importlib.abc import Traversable

_CLASSES = number_names(10)
_VALIDATION = 10_000


def load(split: Split, root: str | Path | None = None) -> Images:
    """Load a split: train (50,000), validation (the last 10,000 training images), test (10,000).

    Args:
        split: "train", "validation" or "test". The test files are read for "test" only.
        root: a folder with the four ``*-ubyte.gz`` files, or the same files decompressed, to read
            instead of the embedded ones. If it has a sub-folder ``MNIST/raw``, that is read.

    Returns:
        Images with x uint8 (N, 1, 28, 28) and ten classes.

    Raises:
        UserError: a file is missing, truncated, corrupt, or not the MNIST file it should be.
    """
    part, count = ("t10k", 10_000) if split == "test" else ("train", 60_000)
    folder = _folder(root)
    x = _read(folder, f"{part}-images-idx3-ubyte", (count, 28, 28))
    y = _read(folder, f"{part}-labels-idx1-ubyte", (count,))
    if y.max() >= len(_CLASSES):
        raise UserError(
            f"{folder / f'{part}-labels-idx1-ubyte'} holds the label {y.max()}: expected 0..9; "
            "put the original file there"
        )
    images = Images(torch.from_numpy(x)[:, None], torch.from_numpy(y).long(), _CLASSES, "mnist")
    return images if split == "test" else images.subset(last_held_out(count, split, _VALIDATION))


def _folder(root: str | Path | None) -> Traversable:
    if root is None:
        return resources.files("surestep.data") / "files" / "mnist"
    nested = Path(root) / "MNIST" / "raw"
    return nested if nested.is_dir() else Path(root)


def _read(folder: Traversable, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Read the IDX file ``name``, compressed or not, as a writable uint8 array of ``shape``."""
    packed, plain = folder / f"{name}.gz", folder / name
    file = packed if packed.is_file() or not plain.is_file() else plain
    try:
        content = file.read_bytes()
        if file is packed:
            content = gzip.decompress(content)
    except FileNotFoundError:
        raise UserError(
            f"{file} is missing: put the MNIST file there, or leave root out to use the "
            "embedded copy"
        ) from None
    except EOFError:
        raise UserError(
            f"{file} is truncated: expected a whole gzip file; put a fresh copy there"
        ) from None
    except (OSError, zlib.error) as error:
        raise UserError(
            f"{file} cannot be read ({error}): expected a gzip file; put a fresh copy there"
        ) from None
    # An IDX file begins with 0, 0, the type (8: unsigned byte), the number of dimensions, and
    # the size of each dimension, big-endian.
    header = np.array([0x0800 + len(shape), *shape], dtype=">u4").tobytes()
    if content[:4] != header[:4]:
        raise UserError(
            f"{file} begins with {content[:4].hex() or 'nothing'}: expected the IDX magic number "
            f"{header[:4].hex()}; put the original file there"
        )
    found = tuple(np.frombuffer(content[4 : len(header)].ljust(len(header) - 4, b"\0"), ">u4"))
    if found != shape:
        raise UserError(
            f"{file} holds an array of {_times(found)}: expected {_times(shape)}; "
            "put the original file there"
        )
    size = len(content) - len(header)
    if size != np.prod(shape):
        raise UserError(
            f"{file} holds {size} bytes of data: expected {np.prod(shape)}; put a fresh copy there"
        )
    return np.frombuffer(content, np.uint8, offset=len(header)).reshape(shape).copy()


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(str(int(n)) for n in shape)
