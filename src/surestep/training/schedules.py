"""Learning-rate schedules, as pure functions of the share of training done.

Stateless on purpose: a resumed run needs only its step number.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from surestep.errors import unknown_name


def step(done: float) -> float:
    """Divide by 5, 25, 125 from 1/4, 1/2, 3/4 of training on (Vivek & Babu 2020)."""
    return 5.0 ** -math.floor(4 * done)


def onecycle(done: float, peak: float = 0.3, start: float = 1 / 25, end: float = 1e-5) -> float:
    """Rise by half a cosine to 1 at ``peak``, fall by another to ``end`` (Smith & Topin 2019)."""
    if done < peak:
        return start + (1 - start) * _half_cosine(done / peak)
    return 1 - (1 - end) * _half_cosine((done - peak) / (1 - peak))


def triangular(done: float, peak: float = 0.4) -> float:
    """Rise linearly from 0 to 1 at ``peak``, fall linearly to 0 (Wong et al. 2020)."""
    return done / peak if done < peak else (1 - done) / (1 - peak)


def cosine(done: float) -> float:
    """Fall from 1 to 0 by half a cosine (Loshchilov & Hutter 2017)."""
    return 1 - _half_cosine(done)


def constant(done: float) -> float:
    """Stay at 1."""
    return 1.0


def _half_cosine(share: float) -> float:
    return (1 - math.cos(math.pi * share)) / 2


SCHEDULES: dict[str, Callable[[float], float]] = {
    "step": step,
    "onecycle": onecycle,
    "triangular": triangular,
    "cosine": cosine,
    "constant": constant,
}


def learning_rate(name: str, peak: float, step_number: int, total: int) -> float:
    """Return the learning rate of a step.

    Args:
        name: of the schedule.
        peak: the highest learning rate.
        step_number: counted from 0.
        total: steps of the whole training.

    Raises:
        UserError: no schedule of that name.
    """
    if name not in SCHEDULES:
        raise unknown_name("schedule", name, SCHEDULES)
    return peak * SCHEDULES[name](step_number / total)
