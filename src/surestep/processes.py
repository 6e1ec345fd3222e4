"""What several processes of one run must agree on. In a single process all of this is free."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

_alone = False


@contextmanager
def alone() -> Iterator[None]:
    """Ask the other processes nothing meanwhile: for what one of them tries out by itself."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def count() -> int:
    """Return the number of processes."""
    together = dist.is_available() and dist.is_initialized() and not _alone
    return dist.get_world_size() if together else 1


def rank() -> int:
    """Return the number of this process."""
    return dist.get_rank() if count() > 1 else 0


def mean(value: Tensor) -> Tensor:
    """Return the mean of a tensor over the processes."""
    if count() == 1:
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value / count()


def gather(rows: Tensor) -> Tensor:
    """Return the rows (N, ...) of all processes, in their order; N is the same in each."""
    if count() == 1:
        return rows
    plain = torch.contiguous_format
    parts = [torch.empty_like(rows, memory_format=plain) for _ in range(count())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def own(rows: Tensor) -> Tensor:
    """Return this process's part of what ``gather`` returned."""
    return rows.chunk(count())[rank()]
