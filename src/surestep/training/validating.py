"""Validation by strong attacks: weights chosen by a weak one would be those that mask the best."""

from __future__ import annotations

import math
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, Subset

from surestep import processes
from surestep.data import Images, some
from surestep.errors import UserError
from surestep.evaluation import evaluate
from surestep.training.preparing import Job
from surestep.training.stopping import StopRequest

COLLAPSE = 0.20
"""Fall of robust accuracy between two epochs that counts as collapse (Kim et al. 2021)."""


def validate(job: Job, stop: StopRequest) -> dict[str, Any]:
    """Attack the held-out images of a job, and return what a row of the history says of it.

    FGSM is always among the attacks: what falls to the others and not to it is masked. Several
    processes divide the images among them, but for those of a DataLoader, which each judges.

    Raises:
        Asked: the run is to stop meanwhile.
        UserError: the images cannot be judged.
    """
    attacks = dict.fromkeys(("fgsm", *job.config.val_attacks))
    batch_size, asked = job.judged_at_once, 0
    held_out, largest = _part_of(job.held_out, job.config.val_images)

    def ask(*_: object) -> None:
        nonlocal asked
        asked += 1
        stop.together(job.device)

    trouble: UserError | None = None
    counts = [0] * (2 + len(attacks))
    with stop.at_once():
        try:
            found = evaluate(
                job.judged,
                held_out,
                # With all of eps from the first epoch on.
                job.threat,
                list(attacks),
                n=job.config.val_images,
                batch_size=batch_size,
                seed=job.config.seed,
                precision=job.engine.precision,
                progress=ask,
                doubt=False,
            )
            n, seconds = found.n, found.seconds
            counts = [int(found.right[name].sum()) for name in ("clean", *attacks, "worst case")]
        except UserError as e:
            # Alone it would leave the others waiting for its next question.
            trouble, n, seconds = e, 0, 0.0
        # To ask is collective: a process of a smaller part asks as often as that of the largest.
        while asked < math.ceil(largest / batch_size):
            ask()
    # Sums of all, so that all select the weights of the same epoch: kernels may round apart.
    failed, judged, *right = processes.sums([int(trouble is not None), n, *counts], job.device)
    if failed:
        raise trouble or UserError("held-out images of another process cannot be judged")
    clean, *under, worst = (one / judged for one in right)
    return {
        "val_n": judged if largest else n,
        "val_clean": clean,
        "val_worst_case": worst,
        **{f"val_{name}": share for name, share in zip(attacks, under, strict=True)},
        "val_seconds": seconds,
    }


def _part_of(data: Any, n: int) -> tuple[Any, int]:
    """Return what of ``n`` images this process judges, and how many the largest part has.

    0 is of data that are not divided: each process judges them all.
    """
    count, rank = processes.count(), processes.rank()
    if count == 1 or isinstance(data, DataLoader | IterableDataset):
        return data, 0
    whole = len(data)
    n = min(n, whole)
    if n < count:
        return data, 0
    if isinstance(data, Images):
        part: Any = data.first(n).subset(slice(rank, None, count))
    else:
        part = Subset(data, some(whole, n)[rank::count].tolist())
    return part, math.ceil(n / count)


def find_masking(row: dict[str, Any], before: float) -> str | None:
    """Say what looks like gradient masking in what ``validate`` returned, if anything does.

    Args:
        row: of the epoch.
        before: worst case of the epoch before; below 0 if there was none.
    """
    worst = row["val_worst_case"]
    one_step = row["val_fgsm"]
    fell = before - worst > COLLAPSE
    if not fell and one_step - worst <= max(COLLAPSE, one_step / 2):
        return None
    return (
        f"warning: gradient masking after epoch {row['epoch']}: accuracy under FGSM is "
        f"{one_step:.1%}, under the strongest attack {worst:.1%}"
        + (f" (it was {before:.1%})" if fell else "")
    )
