"""Random crop and horizontal flip of whole batches, and their inverse.

Drawing is separate from applying, so that data that belong to an image (such as a perturbation
that a method stores for it) can follow the same crop and flip.
Source: the usual CIFAR augmentation, He et al. 2015 (arXiv 1512.03385, section 4.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from surestep.devices import move
from surestep.errors import UserError, look_up


@dataclass(frozen=True, eq=False)
class Draw:
    """The crops and flips drawn for n images.

    Attributes:
        dy: int64 (n,), rows by which the window moves down, in -pad..pad.
        dx: int64 (n,), columns by which the window moves right, in -pad..pad.
        flip: bool (n,), whether the cropped image is mirrored.
        pad: the width of the zero border.
    """

    dy: Tensor
    dx: Tensor
    flip: Tensor
    pad: int

    def __len__(self) -> int:
        return len(self.dy)

    def __getitem__(self, part: slice | Tensor) -> Draw:
        return Draw(self.dy[part], self.dx[part], self.flip[part], self.pad)

    def to(self, device: torch.device) -> Draw:
        """Return the same draw on a device, for who applies it there more than once."""
        dy, dx, flip = (move(v, device) for v in (self.dy, self.dx, self.flip))
        return Draw(dy, dx, flip, self.pad)

    def apply(self, x: Tensor) -> Tensor:
        """Crop, then flip: (n, C, H, W) of any dtype to the same shape, zero outside the image.

        Runs on the device of ``x`` without waiting for it.

        Raises:
            UserError: if ``x`` is not (n, C, H, W).
        """
        rows, columns, dy, dx, flip = self._grid(x)
        columns = torch.where(flip, x.shape[-1] - 1 - columns, columns)
        return self._take(x, rows + dy, columns + dx)

    def undo(self, x: Tensor) -> Tensor:
        """Move cropped (n, C, H, W) values back to where they came from, zero where cropped away.

        Raises:
            UserError: if ``x`` is not (n, C, H, W).
        """
        rows, columns, dy, dx, flip = self._grid(x)
        columns = columns - dx
        columns = torch.where(flip, x.shape[-1] - 1 - columns, columns)
        return self._take(x, rows - dy, columns)

    def _grid(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        if x.dim() != 4 or len(x) != len(self):
            raise UserError(
                f"crop and flip got shape {tuple(x.shape)}: expected ({len(self)}, C, H, W)"
            )
        height, width = x.shape[-2:]
        rows = torch.arange(height, device=x.device)[None]
        columns = torch.arange(width, device=x.device)[None]
        here = self.to(x.device)
        return rows, columns, here.dy[:, None], here.dx[:, None], here.flip[:, None]

    def _take(self, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Read ``x`` at rows (n, H) and columns (n, W), each at most ``pad`` outside it."""
        n, channels, height, width = x.shape
        padded = F.pad(x, (self.pad,) * 4)
        where = (rows + self.pad)[:, :, None] * padded.shape[-1] + (columns + self.pad)[:, None, :]
        where = where.view(n, 1, height * width).expand(-1, channels, -1)
        return padded.flatten(2).gather(2, where).view(n, channels, height, width)


@dataclass(frozen=True)
class CropFlip:
    """Zero padding by ``pad`` pixels, random crop, then a mirror image half the time.

    Raises:
        UserError: if ``pad`` is negative.
    """

    pad: int = 4

    def __post_init__(self) -> None:
        if self.pad < 0:
            raise UserError(f"crop pad is {self.pad}: give 0 (no crop) or more pixels")

    def draw(self, n: int, generator: torch.Generator) -> Draw:
        """Draw crops and flips for ``n`` images from a CPU ``generator``."""
        dy, dx = torch.randint(-self.pad, self.pad + 1, (2, n), generator=generator, device="cpu")
        flip = torch.randint(2, (n,), generator=generator, dtype=torch.bool, device="cpu")
        return Draw(dy, dx, flip, self.pad)


AUGMENTATIONS = {"none": None, "crop-flip": CropFlip()}


def get(name: str) -> CropFlip | None:
    """Return the augmentation called ``name``: "none" or "crop-flip".

    Raises:
        UserError: for any other name.
    """
    return look_up("augmentation", name, AUGMENTATIONS)
