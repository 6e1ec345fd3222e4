"""Reading a user's DataLoader: its parts, its generators, its first item, its workers."""

from __future__ import annotations

import copy
import functools
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from accelerate.data_loader import DataLoaderShard
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    SequentialSampler,
    Subset,
    default_collate,
)

from surestep.data import as_pair
from surestep.errors import SurestepWarning, UserError
from surestep.randomness import OwnRandom

NO_LENGTH = (
    "has no length, which schedules need: give steps_per_epoch with a DataLoader, or a Dataset "
    "with __len__ and __getitem__"
)
"""The rest of an error about data without a length, after their type."""


def end_workers(loader: DataLoader) -> None:
    """Let the next epoch start new workers with its own seed and data set, as a resume would."""
    inner: Any = getattr(loader, "base_dataloader", loader)  # Accelerate wraps it
    if getattr(inner, "persistent_workers", False):
        inner._iterator = None


def generators_of(loader: DataLoader) -> list[torch.Generator]:
    """Return the random generators of a DataLoader and its samplers, outermost first."""
    found: list[torch.Generator] = []
    for place in parts_of(loader):
        generator = getattr(place, "generator", None)
        if isinstance(generator, torch.Generator) and generator not in found:
            found.append(generator)
    return found


def parts_of(loader: DataLoader) -> list[Any]:
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


def datasets_of(loader: DataLoader) -> list[Any]:
    """Return the Dataset of a DataLoader and those that it is a ``Subset`` of, outermost first."""
    found: list[Any] = [loader.dataset]
    while isinstance(found[-1], Subset):
        found.append(found[-1].dataset)
    return found


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


def _yields_otherwise(loader: DataLoader) -> bool:
    """Tell whether a subclass of DataLoader changes what one yields."""
    return type(loader).__iter__ not in (DataLoader.__iter__, DataLoaderShard.__iter__)


def check_shardable(loader: DataLoader) -> None:
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


def warn_if_orders_differ(loader: DataLoader) -> None:
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
