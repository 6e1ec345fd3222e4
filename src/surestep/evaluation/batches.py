"""What is judged, batch after batch, whatever form it is given in."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from surestep.data import Batches, Images, as_images, as_pair, as_pixels, some
from surestep.errors import SurestepWarning, UserError

_FEW = 20  # images that may be of one class by chance


def batches_of(
    data: Any,
    batch_size: int,
    n: int | None,
    device: torch.device,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> tuple[Iterator[tuple[Tensor, Tensor]], int]:
    """Return the batches on the device, and the number of images if it is known (else 0).

    A DataLoader's batches that are larger than ``batch_size`` are divided.

    Raises:
        UserError: a batch size below 1, unsupported data, or, for a data range other than [0, 1],
            tensors that are not float32 images.
    """
    if batch_size < 1:
        raise UserError(f"batch size {batch_size}: give 1 or more")
    whole = 0
    if isinstance(data, Dataset):
        if isinstance(data, Sized) and not isinstance(data, IterableDataset):
            whole = len(data)
        data = Subset(data, some(whole, n).tolist()) if n is not None and n < whole else data
        data = DataLoader(data, batch_size)
    if isinstance(data, DataLoader):
        total = whole if n is None else n
        if total and isinstance(data.dataset, Sized):
            total = min(total, len(data.dataset))
        return _first(data, batch_size, n, device, bounds), total
    if bounds != (0.0, 1.0):
        images = _in_range(data, bounds)
    else:  # a check of all pixels would read a memory-mapped file whole
        mapped = isinstance(data, Images) and data.rows is not None
        images = data if mapped else as_images(data)
    images = images if n is None else images.first(n)
    if bool((images.y < 0).any()):
        raise UserError(f"{images.name} has images without a label (y of -1): leave them out")
    source = Batches(images, batch_size, shuffle=False, device=device)
    return ((x, y) for x, y, _ in source.epoch(0)), len(images)


def _in_range(data: Any, bounds: tuple[float, float]) -> Images:
    """Take tensors in another data range as they are; each batch is checked against the range."""
    if isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[0], Tensor):
        x, y = data
        if x.dtype == torch.float32 and isinstance(y, Tensor):
            return Images(x, y)
    raise UserError(
        f"for the data range {bounds} give float32 tensors (x, y) in it, or a DataLoader; other "
        "data are pixels in [0, 1]"
    )


def warn_of_one_class(counts: Mapping[int, int], stacklevel: int) -> None:
    """Say that a part of data sorted by class was judged, where all are images of one label."""
    ((label, n), *others) = counts.items()
    if not others and n >= _FEW:
        warnings.warn(
            f"the first {n:,} images are all of class {label}: if the data are "
            "sorted by class, shuffle them, or judge all (n=None)",
            SurestepWarning,
            stacklevel=stacklevel + 1,
        )


def _first(
    loader: Iterable[Any],
    batch_size: int,
    n: int | None,
    device: torch.device,
    bounds: tuple[float, float],
) -> Iterator[tuple[Tensor, Tensor]]:
    left = math.inf if n is None else n
    for batch in loader if left else ():
        x, y = as_pair(batch)
        take = int(min(left, len(x)))
        left -= take
        x, y = x[:take], y[:take]
        for begin in range(0, take, batch_size):
            part, labels = (t[begin : begin + batch_size] for t in (x, y))
            # Before it is moved: Apple's GPUs have no float64. float16 images become float32: in
            # half precision an l2 ball holds hardly any representable point.
            part = part.float() if part.is_floating_point() else part
            yield as_pixels(part.to(device), bounds), labels.to(device)
        if not left:  # a live stream would keep the next batch waiting
            return
