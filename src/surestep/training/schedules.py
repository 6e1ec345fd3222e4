"""Learning-rate schedules, as pure functions of the share of training done.

Stateless on purpose: a resumed run needs only its step number.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from surestep.errors import look_up


def step(done: float) -> float:
    """Divide by 5, 25 and 125 after 1/4, 1/2 and 3/4 of training (Vivek & Babu 2020)."""
    return 5.0 ** -math.floor(4 * done)


def onecycle(done: float, peak: float = 0.3, start: float = 1 / 25, end: float = 1e-5) -> float:
    """Rise along half a cosine to 1 at ``peak``, then fall to ``end`` (Smith & Topin 2019)."""
    if done < peak:
        return start + (1 - start) * _half_cosine(done / peak)
    return 1 - (1 - end) * _half_cosine((done - peak) / (1 - peak))


def triangular(done: float, peak: float = 0.4) -> float:
    """Rise linearly from 0 to 1 at ``peak``, fall linearly to 0 (Wong et al. 2020)."""
    return done / peak if done < peak else (1 - done) / (1 - peak)


def cosine(done: float) -> float:
    """Fall from 1 to 0 along half a cosine (Loshchilov & Hutter 2017)."""
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


def learning_rate(name: str, peak: float, done: float) -> float:
    """Return the learning rate after a share ``done`` in [0, 1) of the steps.

    Args:
        name: name of the schedule.
        peak: the highest learning rate.
        done: step number (from 0) over total steps.

    Raises:
        UserError: no schedule of that name.
    """
    return peak * look_up("schedule", name, SCHEDULES)(done)


def warm_up(step: int, steps: float) -> float:
    """Return the warm-up factor at a step (from 0): linear up to 1 over the first ``steps``."""
    return min(1.0, (step + 1) / steps) if steps else 1.0


def momentum(name: str, base: float, done: float) -> float:
    """Return SGD's momentum: constant, except for onecycle.

    There it mirrors the learning rate, from base + 0.05 to base - 0.05 at the peak and back
    (Smith & Topin 2019, section 3), which allows a high peak.
    """
    if name != "onecycle" or not base:
        return base
    moved = base + 0.05 - 0.1 * onecycle(done, start=0.0, end=0.0)
    return min(max(moved, 0.0), 0.99)
