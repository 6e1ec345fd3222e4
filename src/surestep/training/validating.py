"""Validation by strong attacks: a weak attack would select the weights that mask gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, Subset

from surestep import processes
from surestep.data import Images, some
from surestep.devices import out_of_memory
from surestep.errors import UserError
from surestep.evaluation import evaluate
from surestep.training.loaders import end_workers, generators_of
from surestep.training.preparing import Job
from surestep.training.stopping import FailedElsewhere, StopRequest

COLLAPSE = 0.20
"""Drop of robust accuracy between two epochs that counts as collapse (Kim et al. 2021)."""


def validate(job: Job, stop: StopRequest) -> dict[str, Any]:
    """Attack the held-out images of a job, and return the entries for a row of the history.

    FGSM is always among the attacks: images that only other attacks break reveal gradient masking.
    Several processes divide the images among them; each judges all images of a DataLoader, or of
    data with fewer images than processes.

    Raises:
        StopRequested: a stop was requested during validation.
        UserError: the images cannot be judged.
        Exception: what the held-out data raise.
    """
    attacks = dict.fromkeys(("fgsm", *job.config.val_attacks))
    held_out, divided = _part_of(job.held_out, job.config.val_images)

    def check_for_stop(*_: object) -> None:
        stop.exchange(job.device)

    with _generators_kept(held_out), stop.at_once():
        try:
            found = evaluate(
                job.eval_model,
                held_out,
                # At full eps from the first epoch on.
                job.threat,
                list(attacks),
                n=job.config.val_images,
                batch_size=job.eval_batch_size,
                seed=job.config.seed,
                precision=job.take_step.engine.precision,
                progress=check_for_stop,
                doubt=False,
            )
            while stop.exchange(job.device, done=True):
                pass  # others have more images
        except FailedElsewhere as e:
            raise UserError("held-out images of another process cannot be judged") from e
        except Exception as e:
            stop.exchange(job.device, failed=True)  # the others would wait for this one
            cause = e.__cause__
            if isinstance(cause, Exception) and out_of_memory(cause):
                # The evaluation's advice is to lower its batch size, which is no setting of a run.
                with job.guard("an attack of validation", job.eval_batch_size):
                    raise cause from None
            raise
    counts = [int(found.right[name].sum()) for name in ("clean", *attacks, "worst case")]
    # Summed over the processes, whose kernels may round differently: all must select one epoch.
    judged, *right = processes.all_sum([found.n, *counts], job.device)
    clean, *under, worst = (one / judged for one in right)
    return {
        "val_n": judged if divided else found.n,
        "val_clean": clean,
        "val_worst_case": worst,
        **{f"val_{name}": share for name, share in zip(attacks, under, strict=True)},
        "val_seconds": found.seconds,
    }


@contextmanager
def _generators_kept(data: Any) -> Iterator[None]:
    """Restore a DataLoader's generators on exit: each epoch is judged on the same images."""
    if not isinstance(data, DataLoader):
        yield
        return
    end_workers(data)
    found = generators_of(data)
    states = [generator.get_state() for generator in found]
    try:
        yield
    finally:
        for generator, state in zip(found, states, strict=True):
            generator.set_state(state)


def _part_of(data: Any, n: int) -> tuple[Any, bool]:
    """Return the part of ``n`` images that this process judges, and whether it is less than all."""
    count, rank = processes.world_size(), processes.rank()
    if count == 1 or isinstance(data, DataLoader | IterableDataset):
        return data, False
    whole = len(data)
    n = min(n, whole)
    if n < count:
        return data, False
    if isinstance(data, Images):
        part: Any = data.first(n).subset(slice(rank, None, count))
    else:
        part = Subset(data, some(whole, n)[rank::count].tolist())
    return part, True


def find_masking(row: dict[str, Any], before: float | None) -> str | None:
    """Return a warning if the results of ``validate`` look like masking or a collapse, else None.

    Args:
        row: the epoch's row of the history.
        before: worst-case accuracy of the previous epoch; None if there was none.
    """
    worst = row["val_worst_case"]
    one_step = row["val_fgsm"]
    fell = before is not None and before - worst > COLLAPSE
    apart = one_step - worst > max(COLLAPSE, one_step / 2)
    if not fell and not apart:
        return None
    what = "gradient masking" if apart else "robust accuracy fell"
    return (
        f"warning: {what} after epoch {row['epoch']}: accuracy under FGSM is "
        f"{one_step:.1%}, under the strongest attack {worst:.1%}"
        + (f" (it was {before:.1%})" if fell else "")
    )
