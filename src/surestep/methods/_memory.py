"""Values that a method keeps: for each image of the data set, or from one batch to the next."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from surestep import processes


class Draw(Protocol):
    """The crops and flips of a batch; see ``surestep.data.augment.Draw``."""

    def apply(self, x: Tensor) -> Tensor:
        """Crop and flip (n, C, H, W)."""
        ...

    def undo(self, x: Tensor) -> Tensor:
        """Put cropped values back where they came from."""
        ...


class Memory:
    """One tensor per image, indexed by the image's position in the data set; zero at first.

    Values are kept in the coordinates of the stored image: reads apply the image's current crop
    and flip, writes undo them. A pixel that was cropped away keeps its value. Every process holds
    the values of all images, because an image may go to another process in the next epoch.
    """

    def __init__(self) -> None:
        self.values: Tensor | None = None

    def read(self, index: Tensor, like: Tensor, images: int, draw: Draw | None = None) -> Tensor:
        """Return the values of the images ``index`` (N,).

        Args:
            index: positions in the data set (N,).
            like: a tensor with the shape (N, ...), dtype and device of the values.
            images: size of the data set; 0 if unknown, which costs a wait for the device.
            draw: the crops and flips of the images.
        """
        self._grow(index, like, images)
        assert self.values is not None
        found = self.values[index]
        return found if draw is None else draw.apply(found)

    def write(self, index: Tensor, values: Tensor, images: int, draw: Draw | None = None) -> None:
        """Store the values of the images ``index`` (N,), in all processes.

        Pixels outside the crop keep what is stored.

        Args:
            index: positions in the data set (N,).
            values: (N, ...), in the coordinates of the images as cropped and flipped.
            images: size of the data set; 0 if unknown, as in ``read``.
            draw: the crops and flips of the images.
        """
        values = values.detach()
        if draw is not None:
            self._grow(index, values, images)
            assert self.values is not None
            seen = draw.undo(torch.ones_like(values[:, :1], dtype=torch.bool))
            values = torch.where(seen, draw.undo(values), self.values[index])
        index, values = processes.gather(index), processes.gather(values)
        self._grow(index, values, images)
        assert self.values is not None
        self.values.index_copy_(0, index, values)

    def _grow(self, index: Tensor, like: Tensor, images: int) -> None:
        if self.values is not None and self.values.device != like.device:
            self.values = self.values.to(like.device)  # loaded from a checkpoint
        held = 0 if self.values is None else len(self.values)
        needed = images or int(index.max()) + 1
        if needed > held:
            more = torch.zeros(needed - held, *like.shape[1:], dtype=like.dtype, device=like.device)
            self.values = more if self.values is None else torch.cat([self.values, more])

    def state_dict(self) -> dict[str, Any]:
        """Return the values, if there are any."""
        return {} if self.values is None else {"values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the values."""
        values = state.get("values")
        self.values = None if values is None else values.clone()


def carried(last: Tensor, x: Tensor) -> Tensor | None:
    """Return the last batch's rows for the images x (N, ...); None if none fit them.

    Rows repeat if the last batch was smaller.
    """
    if not len(last) or last.shape[1:] != x.shape[1:]:
        return None
    return last.to(x)[torch.arange(len(x), device=x.device) % len(last)]
