"""Split the data into training data and held-out data for validation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from surestep.data import Images, as_images
from surestep.errors import UserError
from surestep.training.loaders import NO_LENGTH


def hold_out(n: int, wanted: int, seed: int) -> tuple[Tensor, Tensor]:
    """Split n indices into training and held-out ones: ``wanted``, but at most a tenth of n."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed), device="cpu")
    held = min(wanted, n // 10)
    return order[held:], order[:held]


def hold_out_labelled(images: Images, wanted: int, seed: int) -> tuple[Images, Images]:
    """Split images as ``hold_out`` does, but hold out only labelled ones."""
    labelled, rest = images.by_label()
    train, held = hold_out(len(labelled), wanted, seed)
    return images.subset(torch.cat([labelled[train], rest])), images.subset(labelled[held])


def split(data: Any, validation: Any, wanted: int, seed: int) -> tuple[Any, Any]:
    """Return the training data and the held-out data (None if nothing is held out).

    Args:
        data: Images, a pair (x, y), a Dataset or a DataLoader.
        validation: held-out data, of any of these kinds; None to take them from ``data``.
        wanted: number of held-out images.
        seed: seed of the random split.

    Raises:
        UserError: data or validation of another kind, data without a length, validation images
            without a label, or a DataLoader without ``validation``, since nothing can be held out
            of it.
    """
    if isinstance(data, IterableDataset):
        raise UserError(f"{type(data).__name__} {NO_LENGTH}")
    loader = isinstance(data, DataLoader)
    data = data if loader or isinstance(data, Dataset) else as_images(data)
    if not wanted:
        if validation is not None:
            raise UserError("val_images 0 means no validation: leave validation or val_images out")
        return data, None
    if validation is not None:
        held_out = isinstance(validation, DataLoader | Dataset)
        validation = validation if held_out else as_images(validation)
        if isinstance(validation, Images) and bool((validation.y < 0).any()):
            raise UserError("validation holds images without a label (y of -1): leave them out")
        return data, validation
    if loader:
        raise UserError(
            "nothing can be held out of a DataLoader: pass validation=(x, y), or val_images=0"
        )
    if isinstance(data, Images):
        train, held = hold_out_labelled(data, wanted, seed)
        return (train, held) if len(held) else (data, None)
    rows, held_rows = hold_out(len(data), wanted, seed)
    if not len(held_rows):
        return data, None
    return Subset(data, rows.tolist()), Subset(data, held_rows.tolist())
