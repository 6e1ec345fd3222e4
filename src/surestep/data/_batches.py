"""Batches, made by indexing data that reside on the device (or are memory-mapped)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from surestep.data._ahead import read_ahead
from surestep.data._images import Images, to_pixels
from surestep.data.augment import CropFlip, Draw
from surestep.devices import move
from surestep.errors import UserError
from surestep.randomness import generator


def as_pair(batch: Any) -> tuple[Tensor, Tensor]:
    """Return a DataLoader's batch as ``(x, y)``, with labels of any integer dtype as int64.

    Raises:
        UserError: the batch is not a pair of tensors.
    """
    if (
        not isinstance(batch, tuple | list)
        or len(batch) != 2
        or not all(isinstance(part, Tensor) for part in batch)
    ):
        kind = f"{type(batch).__name__}"
        count = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise UserError(
            f"the data yield a {kind}{count}, expected a pair (x, y) of tensors: write a "
            "collate_fn that returns one, and pass a DataLoader with it"
        )
    x, y = batch
    whole = not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)
    return x, y.long() if whole else y


def as_pixels(x: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Convert a uint8 batch to pixels in [0, 1] if that is the data range; else return it as is."""
    return to_pixels(x) if x.dtype == torch.uint8 and bounds == (0.0, 1.0) else x


class Batches:
    """Batches of an `Images`, each a pure function of the seed, the epoch and the step.

    No state is kept between batches, so a resumed run needs none: `epoch` with ``skip`` continues
    exactly where the run stopped. The order of epoch e is a permutation drawn from a generator
    seeded by a hash of (seed, e); crops and flips come from one seeded by (seed, e, step).

    When shuffling, an incomplete last batch is dropped unless it is the only one; without
    shuffling it is kept. Every process of a distributed run draws the whole batch and takes its
    own contiguous share, so that the shares together make up the batch that a single process
    would get, augmentation included.

    Args:
        images: the data; moved to ``device`` once, here. Memory-mapped images, and images that
            would take half of a GPU's free memory or more, are moved batch by batch instead.
        batch_size: images per batch, summed over **all** processes.
        seed: any integer.
        shuffle: draw a new order every epoch; False keeps the order of the images.
        augment: see `surestep.data.augment.get`; None leaves the images as they are.
        device: where the data reside and the batches are made.
        rank: index of this process, 0..world-1.
        world: number of processes.

    Raises:
        UserError: a batch size below 1 or not divisible by ``world``, a rank outside 0..world-1,
            fewer images than processes, augmentation of data that is not (N, C, H, W).
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        augment: CropFlip | None = None,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch size {batch_size}: give 1 or more")
        if not 0 <= rank < world:
            raise UserError(f"rank {rank} of {world} processes: expected 0..{world - 1}")
        if batch_size % world:
            raise UserError(
                f"batch size {batch_size} cannot be shared equally by {world} processes: "
                f"give a multiple of {world}"
            )
        if len(images) < world:
            raise UserError(
                f"{images.name} has {len(images)} images for {world} processes: "
                "use fewer processes or more images"
            )
        if augment is not None and images.x.dim() != 4:
            raise UserError(
                f"{images.name} has shape {tuple(images.x.shape)}: crop and flip need "
                "(N, C, H, W); turn augmentation off"
            )
        self.device = torch.device(device)
        # Data that would fill the device stay where they are and move batch by batch.
        self.images = images.to(device) if _has_room(self.device, images) else images
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.augment = augment
        self.rank = rank
        self.world = world

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in an epoch, the same on every rank."""
        whole, rest = divmod(len(self.images), self.batch_size)
        keep_rest = rest > 0 and (not self.shuffle or whole == 0)
        return whole + keep_rest

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Return the batches of epoch number ``epoch`` from step ``skip`` on.

        Each is ``(x, y, index)``: float32 pixels in [0, 1] of shape (n, C, H, W), int64 labels (n,)
        and int64 positions (n,) of the images in the data, all on the device. An incomplete batch
        is divided as evenly as possible, so that some shares may be smaller than others, or empty.
        When shuffling, all shares are equal and the remainder is dropped.

        Raises:
            UserError: if ``skip`` is outside 0..steps_per_epoch.
        """
        if not 0 <= skip <= self.steps_per_epoch:
            raise UserError(
                f"cannot skip {skip} steps of an epoch of {self.steps_per_epoch}: "
                "were the data or the batch size changed since the run began?"
            )
        return self._iterate(epoch, skip)

    def draw(self, epoch: int, step: int) -> Draw | None:
        """Return the crops and flips of this rank's batch ``step`` of ``epoch``, or None."""
        if self.augment is None:
            return None
        size = min(self.batch_size, len(self.images) - step * self.batch_size)
        whole = self.augment.draw(size, generator("augment", self.seed, epoch, step))
        return whole[self._share(self._even(size))]

    def generators(self) -> list[torch.Generator]:
        """Return no generator: each draw has its own, seeded anew."""
        return []

    def _iterate(self, epoch: int, skip: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        order = self._order(epoch).to(self.images.x.device)
        steps = range(skip, self.steps_per_epoch)
        shares = [self._rows(order, step) for step in steps]
        for step, index, x in zip(steps, shares, self._stored(shares), strict=True):
            y = self.images.y[index]
            x, y, index = (move(t, self.device) for t in (x, y, index))
            draw = self.draw(epoch, step)
            if draw is not None:
                x = draw.apply(x)  # before the conversion: a quarter of the bytes to move
            yield to_pixels(x), y, index

    def _stored(self, shares: list[Tensor]) -> Iterator[Tensor]:
        x = self.images.x
        away = self.images.rows is not None or x.device != self.device
        # If NumPy cannot use the memory as laid out, each read would copy the whole array.
        plain = x.is_contiguous() and x.data_ptr() % x.element_size() == 0
        if away and x.device.type == "cpu" and plain:
            return read_ahead(self.images, shares, pin=self.device.type == "cuda")
        return (self.images.stored(index) for index in shares)

    def _rows(self, order: Tensor, step: int) -> Tensor:
        batch = order[step * self.batch_size : (step + 1) * self.batch_size]
        return batch[self._share(self._even(len(batch)))]

    def _order(self, epoch: int) -> Tensor:
        n = len(self.images)
        if not self.shuffle:
            return torch.arange(n)
        return torch.randperm(n, generator=generator("order", self.seed, epoch), device="cpu")

    def _even(self, size: int) -> int:
        """Return how many images of a batch to share; when shuffling, all shares must be equal."""
        return size - size % self.world if self.shuffle else size

    def _share(self, size: int) -> slice:
        return slice(self.rank * size // self.world, (self.rank + 1) * size // self.world)


def _has_room(device: torch.device, images: Images) -> bool:
    """Tell whether the images take less than half of a GPU's free memory; elsewhere True.

    On Apple's GPUs, less than 2 GiB: they share the CPU's memory, and index larger tensors wrongly.
    """
    if device.type == "mps":
        return images.x.nbytes < 2**31
    return device.type != "cuda" or images.x.nbytes < torch.cuda.mem_get_info(device)[0] / 2
