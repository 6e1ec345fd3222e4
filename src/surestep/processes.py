"""Values on which the processes of a run must agree; a single process does no work for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from surestep.errors import UserError

T = TypeVar("T")

_alone = False


@contextmanager
def alone() -> Iterator[None]:
    """Act as the only process inside the block, so that one process can try something alone."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def world_size() -> int:
    """Return the number of processes."""
    together = dist.is_available() and dist.is_initialized() and not _alone
    return dist.get_world_size() if together else 1


def rank() -> int:
    """Return the rank of this process."""
    return dist.get_rank() if world_size() > 1 else 0


def barrier(device: torch.device) -> None:
    """Wait until all processes are here.

    Args:
        device: the device of this process. (Accelerate names the GPU by the local rank, which fails
            where the launcher shows each process only its own GPU.)
    """
    if world_size() > 1:
        dist.barrier(device_ids=[device.index] if device.type == "cuda" else None)


def by_first(do: Callable[[], T]) -> T:
    """Let the first process do something; return what it returned in all of them.

    Args:
        do: called in the first process only; what it returns is pickled.

    Raises:
        UserError: ``do`` raised it, or failed otherwise. It is raised in all processes, since the
            others would wait for a process that has left.
        Exception: in the first process, whatever ``do`` raised.
    """
    if world_size() == 1:
        return do()
    sent: list[T | UserError | None] = [None]
    failure: Exception | None = None
    if rank() == 0:
        try:
            sent = [do()]
        except Exception as e:
            failure = e
            other = UserError("the first process failed; its output says why")
            sent = [e if isinstance(e, UserError) else other]
    dist.broadcast_object_list(sent, 0)
    (found,) = sent
    if isinstance(found, UserError):
        raise failure or found
    return cast(T, found)


def mean(value: Tensor) -> Tensor:
    """Return the mean of a tensor over the processes."""
    if world_size() == 1:
        return value
    total = _sendable(value).clone()
    dist.all_reduce(total)
    return (total / world_size()).to(value.device)


def all_max(value: int, device: torch.device) -> int:
    """Return the maximum of an integer over the processes."""
    if world_size() == 1:
        return value
    most = torch.tensor(value, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


def all_min(value: int, device: torch.device) -> int:
    """Return the minimum of an integer over the processes."""
    return -all_max(-value, device)


def check_alike(what: str, value: int, device: torch.device) -> None:
    """Check that a number is the same in all processes, which would otherwise diverge or hang.

    Args:
        what: names the number in the error.
        value: the number in this process.
        device: the device of this process.

    Raises:
        UserError: the number differs; raised in all processes.
    """
    least, most = all_min(value, device), all_max(value, device)
    if least != most:
        raise UserError(
            f"the processes do not agree on the number of {what}, of which one has {least} and "
            f"another {most}: give all of them the same data and, to resume, the same run folder"
        )


def all_sum(values: Sequence[int], device: torch.device) -> list[int]:
    """Return the sum of each number over the processes."""
    if world_size() == 1:
        return list(values)
    totals = torch.tensor(values, device=device)
    dist.all_reduce(totals)
    return totals.tolist()


def gather(rows: Tensor) -> Tensor:
    """Return the rows (N, ...) of all processes in rank order; N must be the same in each."""
    if world_size() == 1:
        return rows
    mine = _sendable(rows).contiguous()
    parts = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(parts, mine)
    return torch.cat(parts).to(rows.device)


@torch.no_grad()
def broadcast_first(tensors: Sequence[Tensor]) -> None:
    """Copy the first process's tensors to all, in place, with one message per dtype."""
    if world_size() == 1:
        return
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        alike = [t for t in tensors if t.dtype == dtype]
        message = torch.cat([t.reshape(-1) for t in alike])
        dist.broadcast(message, 0)
        if rank():
            parts = message.split([t.numel() for t in alike])
            shaped = [part.view_as(own) for own, part in zip(alike, parts, strict=True)]
            torch._foreach_copy_(alike, shaped)


def _sendable(tensor: Tensor) -> Tensor:
    """Return the tensor on a device that the backend can send from: NCCL sends GPU tensors only.

    After a checkpoint is loaded, a method's memory stays on the CPU until the first step.
    """
    if dist.get_backend() == "nccl" and tensor.device.type == "cpu":
        return tensor.to(torch.device("cuda", torch.cuda.current_device()))
    return tensor


def local_rows(rows: Tensor) -> Tensor:
    """Return this process's part of what ``gather`` returned."""
    return rows.tensor_split(world_size())[rank()]
