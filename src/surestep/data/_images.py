"""Images: labelled images, in memory or memory-mapped, as all other packages receive them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from surestep.data._splits import some
from surestep.errors import UserError

Index = Tensor | slice | Sequence[int]
UNLABELLED = -1
"""The label of an unlabelled image; some methods learn from such images, too."""


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled images: all in memory on one device, or memory-mapped from a file.

    Attributes:
        x: uint8 (N, C, H, W) with values 0..255, or float32 (N, ...) with pixels in [0, 1].
        y: int64 (N,), class numbers; ``UNLABELLED`` (-1) for images without a label.
        classes: class names; by default "0".."K-1" with K = max(y) + 1.
        name: what to call the data in messages and reports.
        note: a remark on the origin of the images, such as that the copy is partial; or empty.
        rows: for memory-mapped images, int64 (N,): the rows of ``x`` that hold them. Rows are
            read on demand, a batch at a time, so the data may exceed the memory.

    The constructor trusts its arguments; `as_images` checks data from outside.
    """

    x: Tensor
    y: Tensor
    classes: tuple[str, ...] = ()
    name: str = "data"
    note: str = ""
    rows: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.classes:
            count = int(self.y.max()) + 1 if len(self.y) else 0
            object.__setattr__(self, "classes", number_names(count))

    def __len__(self) -> int:
        return len(self.y)

    @property
    def num_classes(self) -> int:
        """Number of classes, which may be more than the labels present here."""
        return len(self.classes)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one image, (C, H, W); (D,) for feature vectors."""
        return tuple(self.x.shape[1:])

    def subset(self, index: Index) -> Images:
        """Return the images at ``index`` (a slice, int64 or bool (N,) tensor, or list of ints)."""
        if not isinstance(index, slice):
            index = torch.as_tensor(index, device=self.x.device)
            index = index if index.dtype == torch.bool else index.long()
        if self.rows is not None:
            return replace(self, rows=self.rows[index], y=self.y[index])
        return replace(self, x=self.x[index], y=self.y[index])

    def by_label(self) -> tuple[Tensor, Tensor]:
        """Return the positions (int64) of images that have a label, and of those that have none."""
        has_one = (self.y >= 0).cpu()
        return has_one.nonzero().squeeze(1), (~has_one).nonzero().squeeze(1)

    def first(self, n: int) -> Images:
        """Return the first ``n`` images, or all of them if there are fewer.

        If the images lie class by class, the n are drawn from all of them, always the same ones.

        Raises:
            UserError: if ``n`` is less than 1.
        """
        if n < 1:
            raise UserError(f"cannot take the first {n} images of {self.name}: give 1 or more")
        if n < len(self) and self.num_classes > 1:
            changes = int((self.y.diff() != 0).sum())
            if changes < len(self.y.unique()):  # one block for each class, in any order
                return self.subset(some(len(self), n))
        return self.subset(slice(0, n))

    def to(self, device: torch.device | str) -> Images:
        """Return the same images on ``device``; memory-mapped ones stay where they are."""
        if self.rows is not None:
            return self
        return replace(self, x=self.x.to(device), y=self.y.to(device))

    def stored(self, index: Index | None = None) -> Tensor:
        """Return the images at ``index`` (None: all) as they are stored, (n, C, H, W)."""
        chosen = self if index is None else self.subset(index)
        return chosen.x if chosen.rows is None else chosen.x[chosen.rows]

    def pixels(self, index: Index | None = None) -> Tensor:
        """Return the images at ``index`` (None: all) as float32 pixels in [0, 1], (n, C, H, W)."""
        return to_pixels(self.stored(index))

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Return ``(x, y)``: all pixels as float32 in [0, 1], and the labels."""
        return self.pixels(), self.y


_MOST_CLASSES = 1_000_000  # larger labels are surely not class numbers


def number_names(count: int) -> tuple[str, ...]:
    """Return names for ``count`` unnamed classes: "0", "1", ..."""
    return tuple(str(k) for k in range(count))


def are_numbers(names: Sequence[str]) -> bool:
    """Tell whether class names are those of unnamed classes; True if there is none."""
    return tuple(names) == number_names(len(names))


def to_pixels(x: Tensor) -> Tensor:
    """Turn uint8 0..255 into float32 in [0, 1]; float32 pixels pass through unchanged."""
    # By a number a GPU multiplies with its reciprocal, which may be off by the last bit.
    return x.float() / torch.full((), 255.0, device=x.device) if x.dtype == torch.uint8 else x


def as_images(data: Any, *, num_classes: int | None = None, name: str = "data") -> Images:
    """Check data from outside and return it as `Images`.

    Args:
        data: an `Images`, or a pair ``(x, y)`` of tensors or NumPy arrays. ``x`` is (N, ...) with
            at least two dimensions, uint8 in 0..255 or float32 pixels in [0, 1]; ``y`` is (N,) of
            an integer dtype; -1 marks an image without a label. A memory-mapped ``x``
            (``numpy.load(path, mmap_mode="r")``) is read batch by batch (float32 also once in
            full, to check its range).
        num_classes: number of classes; by default that of the Images, or max(y) + 1.
        name: what to call a pair in messages; an Images keeps its own name.

    Raises:
        UserError: wrong type, dtype, shape, length, pixel range or label range; empty data.
    """
    if isinstance(data, Images):
        name, pair = data.name, (data.x, data.y)
    elif isinstance(data, (tuple, list)) and len(data) == 2:
        pair = (_tensor(data[0], f"{name}: x"), _tensor(data[1], f"{name}: y"))
    else:
        raise UserError(
            f"{name} is {_kind(data)}: give a pair (x, y) of tensors or NumPy arrays, "
            "or what surestep.data.load returns"
        )
    x, y = pair
    rows = data.rows if isinstance(data, Images) else None
    _check_shapes(x, y, name, len(x) if rows is None else len(rows))
    _check_pixels(x, name)
    y = _check_labels(y, num_classes, name).to(x.device)
    if isinstance(data, Images):
        return replace(data, x=x, y=y)
    if isinstance(data[0], np.memmap):
        rows = torch.arange(len(y))
    return Images(x, y, number_names(num_classes or 0), name, rows=rows)


def _kind(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"of type {type(value).__name__}"


def _tensor(value: Any, what: str) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    if not isinstance(value, np.ndarray):
        raise UserError(f"{what} is {_kind(value)}: give a tensor or a NumPy array")
    # PyTorch refuses negative strides and foreign byte orders and warns about read-only memory;
    # np.require copies in those cases only. A memory-mapped file must not be copied, not even a
    # transposed one; nothing here writes to it, so the warning is suppressed.
    native = value.dtype.newbyteorder("=")
    needs: list[Literal["C", "W"]] = ["C", "W"]
    if isinstance(value, np.memmap):
        whole = all(step >= 0 and step % value.itemsize == 0 for step in value.strides)
        needs = [] if whole else ["C"]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            return torch.from_numpy(np.require(value, native, needs))
    except TypeError:
        raise UserError(
            f"{what} has dtype {value.dtype}: give numbers, pixels as uint8 or float32 and "
            "labels as int64"
        ) from None


def _check_shapes(x: Tensor, y: Tensor, name: str, n: int) -> None:
    if x.dim() < 2:
        raise UserError(
            f"{name}: x has shape {tuple(x.shape)}: expected (N, C, H, W), or (N, D) for features"
        )
    if y.dim() != 1:
        raise UserError(
            f"{name}: y has shape {tuple(y.shape)}: expected (N,), one class number for each image"
        )
    if n != len(y):
        raise UserError(f"{name}: x has {n} images but y has {len(y)} labels: give one each")
    if x.numel() == 0:
        raise UserError(f"{name} is empty, x has shape {tuple(x.shape)}: give at least one image")


def _check_pixels(x: Tensor, name: str) -> None:
    if x.dtype == torch.uint8:
        return
    if x.dtype != torch.float32:
        raise UserError(
            f"{name}: x has dtype {_dtype(x)}: give uint8 in 0..255, or float32 in [0, 1] "
            "(x.float())"
        )
    # aminmax would copy a strided tensor, such as a transposed file, at once.
    parts = [x] if x.is_contiguous() else x.split(256)
    ranges = torch.stack([torch.stack(torch.aminmax(part)) for part in parts])
    low, high = (float(v) for v in torch.aminmax(ranges))
    if not np.isfinite([low, high]).all():  # aminmax carries a NaN through
        raise UserError(f"{name}: x holds NaN or infinity: expected pixels in [0, 1]")
    found = f"{name}: x ranges from {low:.4g} to {high:.4g}"
    if low < 0:
        raise UserError(
            f"{found}: surestep takes pixels in [0, 1] and normalises inside the model, "
            "so undo the normalisation of x"
        )
    if 2 < high <= 255:
        raise UserError(f"{found}: surestep takes pixels in [0, 1], so divide x by 255")
    if high > 1:
        raise UserError(
            f"{found}: surestep takes pixels in [0, 1], so scale x, or use x.clamp(0, 1) if the "
            "excess is rounding"
        )


def _check_labels(y: Tensor, num_classes: int | None, name: str) -> Tensor:
    if y.dtype == torch.bool or y.is_floating_point() or y.is_complex():
        raise UserError(
            f"{name}: y has dtype {_dtype(y)}: give class numbers as integers (y.long())"
        )
    if num_classes is not None and num_classes < 1:
        raise UserError(f"{name}: num_classes is {num_classes}: give 1 or more")
    y = y.long()
    low, high = (int(v) for v in torch.aminmax(y))
    if low < UNLABELLED:
        raise UserError(f"{name}: y holds the label {low}: class numbers start at 0 (-1: no label)")
    if high < 0:
        raise UserError(f"{name}: y holds no class number: label some of the images")
    if high >= _MOST_CLASSES:
        raise UserError(
            f"{name}: y holds the label {high}, which is not a class number: number the classes 0, "
            "1, ..."
        )
    if num_classes is not None and high >= num_classes:
        raise UserError(
            f"{name}: y holds the label {high} but there are {num_classes} classes: "
            f"expected 0..{num_classes - 1}"
        )
    return y


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
