"""The sources of batches for the training loop."""

from __future__ import annotations

import copy
import functools
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate.data_loader import DataLoaderShard
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    SequentialSampler,
    Subset,
    default_collate,
)

from surestep.data import Batches, as_pair, as_pixels, augment
from surestep.devices import move
from surestep.errors import SurestepWarning, UserError
from surestep.randomness import OwnRandom

NO_LENGTH = (
    "has no length, which schedules need: give steps_per_epoch with a DataLoader, or a Dataset "
    "with __len__ and __getitem__"
)
"""The rest of an error about data without a length, after their type."""

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
        steps: batches per epoch, for a streaming loader; by default the loader's length.

    Raises:
        UserError: the loader has no length and ``steps`` is missing, or has fewer than ``steps``.
    """

    def __init__(
        self,
        loader: DataLoader,
        device: torch.device,
        bounds: tuple[float, float] = (0.0, 1.0),
        steps: int | None = None,
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
        for part in [*_parts_of(self.loader), *_datasets_of(self.loader)]:
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


def end_workers(loader: DataLoader) -> None:
    """Let the next epoch start new workers with its own seed and data set, as a resume would."""
    inner: Any = getattr(loader, "base_dataloader", loader)  # Accelerate wraps it
    if getattr(inner, "persistent_workers", False):
        inner._iterator = None


def generators_of(loader: DataLoader) -> list[torch.Generator]:
    """Return the random generators of a DataLoader and its samplers, outermost first."""
    found: list[torch.Generator] = []
    for place in _parts_of(loader):
        generator = getattr(place, "generator", None)
        if isinstance(generator, torch.Generator) and generator not in found:
            found.append(generator)
    return found


def _parts_of(loader: DataLoader) -> list[Any]:
    """Return a DataLoader and the samplers in it, each once, outermost first."""
    found: list[Any] = []
    places: list[Any] = [loader]
    while places:
        place = places.pop(0)
        if not any(place is other for other in found):
            found.append(place)
        nested = (getattr(place, name, None) for name in ("batch_sampler", "sampler"))
        places += [n for n in nested if n is not None]
    return found


def _datasets_of(loader: DataLoader) -> list[Any]:
    """Return the Dataset of a DataLoader and those that it is a ``Subset`` of, outermost first."""
    found: list[Any] = [loader.dataset]
    while isinstance(found[-1], Subset):
        found.append(found[-1].dataset)
    return found


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


def first_item_as_batch(data: Any) -> tuple[Tensor, Tensor] | None:
    """Return a batch of the first item, collated as the Dataset's or DataLoader's batches are.

    Returns None if no item can be read (the data are streamed or empty, or a DataLoader's are not
    indexed by integers) or collated by the DataLoader's own ``collate_fn``, or if it has no batch
    sampler or yields something else.

    Raises:
        UserError: the item cannot be collated, or the batch is not a pair of tensors.
        Exception: what a Dataset's ``__getitem__`` raises.
    """
    loader = isinstance(data, DataLoader)
    if loader and (data.batch_sampler is None or _yields_otherwise(data)):
        return None
    dataset = data.dataset if loader else data
    collate = data.collate_fn if loader else default_collate
    # What an augmentation draws here must not change the random states of training.
    with OwnRandom(0).used():
        try:
            # As a DataLoader fetches it.
            many = getattr(dataset, "__getitems__", None)
            item = many([0])[0] if many else dataset[0]
        except (NotImplementedError, TypeError, IndexError, KeyError):
            # A Dataset itself is indexed from 0 on, so this is a mistake in it.
            if not loader and not isinstance(data, IterableDataset) and len(data):
                raise
            return None  # it streams, is empty, or has other keys than numbers
        try:
            batch = collate([item])
        except Exception as e:
            try:  # a collate_fn that mixes images may need two
                batch = collate([item, item])
            except Exception:
                if collate is not default_collate:
                    return None  # it may need more
                reason = " ".join(str(e).split())
                raise UserError(
                    f"the first item of the data cannot be made part of a batch ({reason}): return "
                    "a pair (x, y) of tensors, or pass a DataLoader with a collate_fn"
                ) from e
    return as_pair(batch)


def batch_size_of(loader: DataLoader) -> int | None:
    """Return the images per batch of a DataLoader, or None if they are not known."""
    return loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)


def is_stream(data: Any) -> bool:
    """Tell whether data are a DataLoader that reads a stream, which cannot be divided by index."""
    return isinstance(data, DataLoader) and isinstance(data.dataset, IterableDataset)


def with_workers_of_a_run(data: Any) -> Any:
    """Return a DataLoader whose workers ignore signals to the process group; other data as given.

    Nor do they print through the run's progress bar.

    After a signal the run needs its workers to finish a step and save. When it ends, it shuts them
    down, or they notice that it is gone.
    """
    if not isinstance(data, DataLoader) or not data.num_workers:
        return data
    data = inner = copy.copy(data)  # the user's loader must not change
    if hasattr(data, "base_dataloader"):  # Accelerate's; the loader inside starts the workers
        data.base_dataloader = inner = copy.copy(data.base_dataloader)
    inner._iterator = None  # workers that already run are the user's
    inner.worker_init_fn = functools.partial(_begin_worker, inner.worker_init_fn)
    return data


def _begin_worker(then: Callable[[int], None] | None, worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # The progress bar prints through itself, under a lock. If that was held at the fork, it stays
    # held here for good, and a worker that prints or warns would wait for it.
    sys.stdout = getattr(sys.stdout, "rich_proxied_file", sys.stdout)
    sys.stderr = getattr(sys.stderr, "rich_proxied_file", sys.stderr)
    if then is not None:
        then(worker)


def make_source(
    data: Any,
    *,
    batch_size: int,
    seed: int,
    augmentation: str,
    device: torch.device,
    rank: int,
    world: int,
    prepare: Any,
    workers: int = 0,
    bounds: tuple[float, float] = (0.0, 1.0),
    steps: int | None = None,
) -> Source:
    """Return the source of batches for any kind of data.

    Args:
        data: Images, a Dataset or a DataLoader.
        batch_size: images per batch over all processes (a DataLoader keeps its own).
        seed: seed of the order and the augmentation.
        augmentation: name of the augmentation.
        device: the device to move batches to.
        rank: rank of this process.
        world: number of processes.
        prepare: returns a DataLoader that is sharded over the processes (Accelerate's
            ``prepare_data_loader``); called only if there are several, and not for a stream with
            ``steps``, of which each process must yield its own part.
        workers: processes that load a Dataset's images.
        bounds: the data range.
        steps: batches per epoch of a DataLoader; by default its length.

    Raises:
        UserError: augmentation of data not held in memory; a batch size that the processes cannot
            divide; a DataLoader that they cannot share; ``steps`` without a DataLoader.
    """
    if steps is not None and not isinstance(data, DataLoader):
        raise UserError(
            f"steps_per_epoch ({steps}) applies to a DataLoader only: leave it out for other data"
        )
    if not isinstance(data, DataLoader | Dataset):
        return Batches(
            data,
            batch_size,
            seed=seed,
            augment=augment.get(augmentation),
            device=device,
            rank=rank,
            world=world,
        )
    if augmentation != "none":
        raise UserError(
            f"augment={augmentation!r} works on tensors in memory: augment in your Dataset, or "
            "pass a pair of tensors"
        )
    # Of a stream of a given length each process yields its own part.
    divided = world > 1 and not (is_stream(data) and steps is not None)
    if isinstance(data, Dataset):
        if batch_size % world:
            raise UserError(f"batch_size {batch_size} is not divisible by {world} processes")
        data = DataLoader(
            data,
            batch_size // world,
            shuffle=True,
            drop_last=True,
            pin_memory=device.type == "cuda",
            num_workers=workers,
        )
    elif divided:
        _check_shardable(data)
        _warn_if_orders_differ(data)
    data = with_workers_of_a_run(data)
    return LoaderSource(prepare(data) if divided else data, device, bounds, steps)


def _yields_otherwise(loader: DataLoader) -> bool:
    """Tell whether a subclass of DataLoader changes what one yields."""
    return type(loader).__iter__ not in (DataLoader.__iter__, DataLoaderShard.__iter__)


def _check_shardable(loader: DataLoader) -> None:
    """Refuse a DataLoader whose batches cannot be split over several processes."""
    if _yields_otherwise(loader):
        raise UserError(
            f"the batches of a {type(loader).__name__}, which changes what a DataLoader yields, "
            "cannot be split over several processes: do that in its Dataset or collate_fn"
        )
    if loader.batch_sampler is None:
        raise UserError(
            "a DataLoader with batch_size=None cannot be split over several processes: give it "
            "a batch_size"
        )
    if getattr(loader.batch_sampler, "batch_size", None) is None:
        kind = type(loader.batch_sampler).__name__
        raise UserError(
            f"the batches of a {kind} without an attribute batch_size may differ in size and "
            "cannot be split over several processes: let it have one, and batches of that size"
        )
    if is_stream(loader):
        raise UserError(
            "an IterableDataset cannot be split over several processes: give a Dataset with "
            "__getitem__, or steps_per_epoch and a stream that yields each process its own part"
        )
    if isinstance(loader.sampler, DistributedSampler):
        raise UserError(
            "the DataLoader has a DistributedSampler, but surestep itself splits batches over the "
            "processes: give one without"
        )


def _warn_if_orders_differ(loader: DataLoader) -> None:
    """Warn if the processes, which take batches in turn, may see these in different orders."""
    sampler = getattr(loader.batch_sampler, "sampler", None)
    lacking, advice = "generator", "an attribute generator, a torch.Generator, and draw from that"
    if sampler is None:  # Accelerate synchronises a sampler's generator, but no batch sampler's
        sampler, lacking = loader.batch_sampler, "set_epoch"
        advice = "a method set_epoch(epoch), and draw from a generator seeded with that epoch"
    in_step = any(hasattr(sampler, name) for name in ("set_epoch", lacking))
    if not isinstance(sampler, SequentialSampler) and not in_step:
        warnings.warn(
            f"the DataLoader's {type(sampler).__name__} has no {lacking}: if it draws its order at "
            "random, each process draws a different one, and images are repeated or missed; give "
            f"it {advice}",
            SurestepWarning,
            stacklevel=2,
        )
