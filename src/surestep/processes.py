"""What several processes of one run must agree on. In a single process all of this is free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    total = _sendable(value).clone()
    dist.all_reduce(total)
    return (total / count()).to(value.device)


def largest(value: int, device: torch.device) -> int:
    """Return the largest of a number in all processes."""
    if count() == 1:
        return value
    told = torch.tensor(value, device=device)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return int(told)


def sums(values: Sequence[int], device: torch.device) -> list[int]:
    """Return the sum of each number over the processes."""
    if count() == 1:
        return list(values)
    told = torch.tensor(values, device=device)
    dist.all_reduce(told)
    return told.tolist()


def gather(rows: Tensor) -> Tensor:
    """Return the rows (N, ...) of all processes, in their order; N is the same in each."""
    if count() == 1:
        return rows
    mine = _sendable(rows).contiguous()
    parts = [torch.empty_like(mine) for _ in range(count())]
    dist.all_gather(parts, mine)
    return torch.cat(parts).to(rows.device)


def _sendable(tensor: Tensor) -> Tensor:
    """Return a tensor where the processes can exchange it: NCCL sends what is on the GPU only.

    What a method remembers is on the CPU between a checkpoint and the first step after it.
    """
    if dist.get_backend() == "nccl" and tensor.device.type == "cpu":
        return tensor.to(torch.device("cuda", torch.cuda.current_device()))
    return tensor


def own(rows: Tensor) -> Tensor:
    """Return this process's part of what ``gather`` returned."""
    return rows.chunk(count())[rank()]
