"""Values that a method keeps: for each image of the data set, or from one batch to the next."""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True)
class Positions:
    """Which images of the data set a batch holds.

    Attributes:
        index: their positions (N,).
        images: size of the data set; 0 if unknown, which costs a wait for the device.
        draw: the crops and flips that were applied to them.
    """

    index: Tensor
    images: int = 0
    draw: Draw | None = None


class Memory:
    """One tensor per image, indexed by the image's position in the data set; zero at first.

    Every process holds the values of all images, because an image may go to another process in the
    next epoch.

    Args:
        pixels: whether the values belong to pixels. They are then kept in the coordinates of the
            stored image: reads apply the image's current crop and flip, writes undo them. A pixel
            that was cropped away keeps its value.
    """

    def __init__(self, *, pixels: bool = True) -> None:
        self.pixels = pixels
        self.values: Tensor | None = None

    def read(self, at: Positions, like: Tensor) -> Tensor:
        """Return the values of a batch's images, with the shape, dtype and device of ``like``."""
        found = self._grown(at.index, like, at.images)[at.index]
        return at.draw.apply(found) if self.pixels and at.draw is not None else found

    def write(self, at: Positions, values: Tensor) -> None:
        """Store values (N, ...) of a batch's images, as cropped and flipped, in all processes."""
        index, values = at.index, values.detach()
        if self.pixels and at.draw is not None:
            seen = at.draw.undo(torch.ones_like(values[:, :1], dtype=torch.bool))
            before = self._grown(index, values, at.images)[index]
            values = torch.where(seen, at.draw.undo(values), before)
        index, values = processes.gather(index), processes.gather(values)
        self._grown(index, values, at.images).index_copy_(0, index, values)

    def _grown(self, index: Tensor, like: Tensor, images: int) -> Tensor:
        """Return the values, with rows for all images and on the device of ``like``."""
        if self.values is not None and self.values.device != like.device:
            self.values = self.values.to(like.device)  # loaded from a checkpoint
        held = 0 if self.values is None else len(self.values)
        needed = images or int(index.max()) + 1
        if needed > held:
            more = torch.zeros(needed - held, *like.shape[1:], dtype=like.dtype, device=like.device)
            self.values = more if self.values is None else torch.cat([self.values, more])
        assert self.values is not None
        return self.values

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
