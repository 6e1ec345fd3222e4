"""The sources of batches for the training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from surestep import processes
from surestep.config import FitSettings
from surestep.data import Batches, as_pair, as_pixels, augment
from surestep.devices import move
from surestep.errors import UserError
from surestep.randomness import OwnRandom
from surestep.training.loaders import (
    NO_LENGTH,
    check_shardable,
    datasets_of,
    end_workers,
    generators_of,
    is_stream,
    parts_of,
    warn_if_orders_differ,
    with_workers_of_a_run,
)

Batch = tuple[Tensor, Tensor, Tensor | None]


class Source(Protocol):
    """A source of batches, epoch by epoch."""

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in an epoch."""
        ...

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """Return the batches (x, y, index) of an epoch, from step ``skip`` on.

        Whatever this draws from the global random state is drawn in this call, not later.
        """
        ...

    def draw(self, epoch: int, step: int) -> augment.Draw | None:
        """Return the crops and flips of a batch, if it has any."""
        ...

    def generators(self) -> list[torch.Generator]:
        """Return the generators that it draws from, whose states a checkpoint must hold."""
        ...


class LoaderSource:
    """Batches from a torch DataLoader, whose order follows random states.

    Args:
        loader: yields pairs (x, y).
        device: the device to move batches to.
        bounds: the data range; if it is [0, 1], uint8 images are scaled to it.
        steps: batches per epoch, for a streaming loader; None takes the loader's length.

    Raises:
        UserError: the loader has no length and ``steps`` is missing, or has fewer than ``steps``.
    """

    def __init__(
        self,
        loader: DataLoader,
        device: torch.device,
        bounds: tuple[float, float],
        steps: int | None,
    ) -> None:
        self.loader, self.device, self.bounds, self._max_steps = loader, device, bounds, steps
        try:
            known: int | None = len(loader)
        except TypeError:
            known = None
        if known is None and steps is None:
            raise UserError(f"the DataLoader {NO_LENGTH}")
        if known is not None and steps is not None and steps > known:
            raise UserError(
                f"steps_per_epoch {steps}: the DataLoader has {known} batches: give no more"
            )
        self.steps_per_epoch = steps or known or 0

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """Return the batches (x, y, None); those before ``skip`` are loaded and discarded.

        Raises:
            UserError: a batch is not a pair, or the loader ends before its length.
        """
        # Accelerate counts only completed epochs, so its number is wrong after a partial one. It
        # also never calls set_epoch on a batch sampler, nor on the dataset if the sampler has one.
        for part in [*parts_of(self.loader), *datasets_of(self.loader)]:
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        random = OwnRandom(int(torch.empty((), dtype=torch.int64).random_()))
        return _without(self._batches(random), skip)

    def _batches(self, random: OwnRandom) -> Iterator[Batch]:
        # Order and transforms must not depend on what the steps between batches draw.
        made = 0
        end_workers(self.loader)
        with random.used():
            batches = iter(self.loader)
        while self._max_steps is None or made < self._max_steps:
            with random.used():
                batch = next(batches, None)
            if batch is None:
                if made < self.steps_per_epoch:
                    raise UserError(
                        f"the DataLoader ended after {made} of {self.steps_per_epoch} batches of "
                        "an epoch: give fewer steps_per_epoch, or a longer stream"
                    )
                return
            made += 1
            x, y = (move(part, self.device) for part in as_pair(batch))
            yield as_pixels(x, self.bounds), y, None

    def draw(self, epoch: int, step: int) -> None:
        """Return None: a Dataset's augmentation is not known."""

    def generators(self) -> list[torch.Generator]:
        """Return the random generators of the loader and its samplers, outermost first."""
        return generators_of(self.loader)


@dataclass(frozen=True)
class Replayed:
    """A source that repeats each batch several times in a row, as in free adversarial training."""

    source: Source
    times: int

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in an epoch, counting each repetition."""
        return self.times * self.source.steps_per_epoch

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """Return each batch of the source ``times`` times, from step ``skip`` on."""
        whole, part = divmod(skip, self.times)
        batches = self.source.epoch(epoch, whole)
        replayed = (batch for batch in batches for _ in range(self.times))
        return _without(replayed, part)

    def draw(self, epoch: int, step: int) -> augment.Draw | None:
        """Return the crops and flips of a batch, if it has any."""
        return self.source.draw(epoch, step // self.times)

    def generators(self) -> list[torch.Generator]:
        """Return the generators of the source that is repeated."""
        return self.source.generators()


def _without(batches: Iterator[Batch], skip: int) -> Iterator[Batch]:
    """Discard the first ``skip`` batches eagerly: the caller restores random states right after."""
    for _ in range(skip):
        next(batches)
    return batches


def make_source(
    data: Any,
    config: FitSettings,
    device: torch.device,
    *,
    shard: Callable[[DataLoader], DataLoader],
    workers: int,
    bounds: tuple[float, float],
    steps: int | None,
) -> Source:
    """Return the source of batches for any kind of data.

    Args:
        data: Images, a Dataset or a DataLoader.
        config: the settings: ``batch_size`` counts the images of all processes (a DataLoader keeps
            its own), ``seed`` is of the order and of ``augment``.
        device: the device to move batches to.
        shard: divides a DataLoader over the processes (Accelerate's ``prepare_data_loader``);
            called only if there are several, and not for a stream with ``steps``, of which each
            process must yield its own part.
        workers: processes that load a Dataset's images.
        bounds: the data range.
        steps: batches per epoch of a DataLoader; None takes its length.

    Raises:
        UserError: augmentation of data not held in memory; a batch size that the processes cannot
            divide; a DataLoader that they cannot share; ``steps`` without a DataLoader.
    """
    if steps is not None and not isinstance(data, DataLoader):
        raise UserError(
            f"steps_per_epoch ({steps}) applies to a DataLoader only: leave it out for other data"
        )
    world = processes.world_size()
    if not isinstance(data, DataLoader | Dataset):
        return Batches(
            data,
            config.batch_size,
            seed=config.seed,
            augment=augment.get(config.augment),
            device=device,
            rank=processes.rank(),
            world=world,
        )
    if config.augment != "none":
        raise UserError(
            f"augment={config.augment!r} works on tensors in memory: augment in your Dataset, or "
            "pass a pair of tensors"
        )
    # Of a stream of a given length each process yields its own part.
    divided = world > 1 and not (is_stream(data) and steps is not None)
    if isinstance(data, Dataset):
        if config.batch_size % world:
            raise UserError(f"batch_size {config.batch_size} is not divisible by {world} processes")
        data = DataLoader(
            data,
            config.batch_size // world,
            shuffle=True,
            drop_last=True,
            pin_memory=device.type == "cuda",
            num_workers=workers,
        )
    elif divided:
        check_shardable(data)
        warn_if_orders_differ(data)
    data = with_workers_of_a_run(data)
    return LoaderSource(shard(data) if divided else data, device, bounds, steps)
