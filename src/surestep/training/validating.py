"""Validation by strong attacks: weights chosen by a weak one would be those that mask the best."""

from __future__ import annotations

from typing import Any

from accelerate.utils import broadcast_object_list

from surestep.evaluation import evaluate
from surestep.training.preparing import Job
from surestep.training.stopping import StopRequest

MOST = 500
"""Most images that validation attacks at a time."""

COLLAPSE = 0.20
"""Fall of robust accuracy between two epochs that counts as collapse (Kim et al. 2021)."""


def validate(job: Job, stop: StopRequest) -> dict[str, Any]:
    """Attack the held-out images of a job, and return what a row of the history says of it.

    FGSM is always among the attacks: what falls to the others and not to it is masked.

    Raises:
        Asked: the run is to stop meanwhile.
        UserError: the images cannot be judged.
    """
    attacks = dict.fromkeys(("fgsm", *job.config.val_attacks))
    with stop.at_once():
        found = evaluate(
            job.judged,
            job.held_out,
            # With all of eps from the first epoch on.
            job.threat,
            list(attacks),
            n=job.config.val_images,
            # What fits in training fits here.
            batch_size=min(MOST, job.share),
            seed=job.config.seed,
            precision=job.engine.precision,
            progress=lambda *_: stop.together(job.device),
        )
    # Kernels may round apart: all processes must select the weights of the same epoch.
    (worst,) = broadcast_object_list([found.worst_case_accuracy])
    return {
        "val_n": found.n,
        "val_clean": found.clean_accuracy,
        **{f"val_{name}": value for name, value in found.robust_accuracy.items()},
        "val_worst_case": worst,
        "val_seconds": found.seconds,
    }


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
