"""Batches of images that do not lie on the device, read while the batch before is used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surestep.data._images import Images

READERS = 8
"""A disk serves several reads at a time; one after another, each image waits for all before it."""


def read_ahead(images: Images, shares: Iterable[Tensor], pin: bool) -> Iterator[Tensor]:
    """Yield the images of each batch as they are stored, the next one being read meanwhile.

    The threads copy bytes and nothing else: torch's own operators would set up a second team of
    threads, which fights with the step's for the cores.

    Args:
        images: contiguous, on the CPU.
        shares: int64 (n,) each, positions in the images.
        pin: put them where a GPU can fetch them without the CPU.
    """
    source = images.x.numpy()

    def begin(share: Tensor) -> tuple[Tensor, list[Future[Any]]]:
        rows = share if images.rows is None else images.rows[share]
        batch = torch.empty((len(rows), *source.shape[1:]), dtype=images.x.dtype, pin_memory=pin)
        parts = (np.array_split(array, READERS) for array in (rows.numpy(), batch.numpy()))
        jobs = [
            # "clip" writes into the batch; the other modes into a copy of it first.
            pool.submit(np.take, source, which, 0, out, "clip")
            for which, out in zip(*parts, strict=True)
        ]
        return batch, jobs

    with ThreadPoolExecutor(READERS, "surestep-reader") as pool:
        waiting: tuple[Tensor, list[Future[Any]]] | None = None
        for share in shares:
            coming = begin(share)
            if waiting is not None:
                yield _finished(*waiting)
            waiting = coming
        if waiting is not None:
            yield _finished(*waiting)


def _finished(batch: Tensor, jobs: list[Future[Any]]) -> Tensor:
    for job in jobs:
        job.result()
    return batch
