"""Read-ahead for images that are not on the device: read one batch while another is used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surestep.data._images import Images

READERS = 8
"""Reader threads: a disk serves several reads at once; serial reads would wait for each other."""


def read_ahead(images: Images, shares: Iterable[Tensor], pin: bool) -> Iterator[Tensor]:
    """Yield the images of each batch as stored, reading the next batch in the meantime.

    The threads only copy bytes: torch operators would start a second thread pool, which competes
    with the training step's for the cores.

    Args:
        images: the data; ``x`` must be contiguous and on the CPU.
        shares: for each batch, int64 (n,) positions in ``images``.
        pin: put the batches into pinned memory, from which a GPU copies without the CPU.
    """
    source = images.x.numpy()

    def begin(share: Tensor) -> tuple[Tensor, list[Future[Any]]]:
        rows = share if images.rows is None else images.rows[share]
        batch = torch.empty((len(rows), *source.shape[1:]), dtype=images.x.dtype, pin_memory=pin)
        parts = (np.array_split(array, READERS) for array in (rows.numpy(), batch.numpy()))
        jobs = [
            # "clip" writes straight into the batch; the default mode would buffer it first.
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
