"""What an evaluation found, and how sure its shares are."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

FORMAT, VERSION = "surestep-evaluation", 1


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found. Accuracies are shares in [0, 1].

    Attributes:
        clean_accuracy: share of images classified right as they are.
        robust_accuracy: by attack, the share right both clean and under that attack.
        worst_case_accuracy: share that no attack of the suite broke, taken per image.
        n: number of images.
        seed: of the random starts.
        intervals: 95% Wilson intervals of these accuracies by name.
        seconds: wall time of the whole.
        attack_seconds: wall time by attack.
        threat: norm, eps and data range, as plain values.
        attacks: by attack, its ``scope`` ("all" that are right clean, or the "survivors" of the
            other attacks: its accuracy is then theirs together), accuracy, seconds, and
            ``by_step``: for an iterative attack the share still right after each point tried,
            ``by_part``: for AutoAttack the share still right after each of its parts.
        per_class: per label, its number of images, clean and worst-case accuracy.
        curve: accuracies at other radii, if these were asked for.
        right: (n,) each, which images were right "clean", by attack and in the "worst case"; not
            part of ``to_dict``.
        precision: in which the perturbations were made.
        doubts: signs that the worst case is too high, in words; None where none was looked for.
    """

    clean_accuracy: float
    robust_accuracy: dict[str, float]
    worst_case_accuracy: float
    n: int
    seed: int
    intervals: dict[str, tuple[float, float]]
    seconds: float
    attack_seconds: dict[str, float]
    threat: dict[str, Any]
    attacks: list[dict[str, Any]]
    per_class: list[dict[str, Any]]
    curve: list[dict[str, Any]]
    right: dict[str, Tensor] = field(repr=False, compare=False)
    precision: str = "float32"
    doubts: list[str] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings, lists and dicts, as written by ``--json``."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "right"}
        values["intervals"] = {k: list(v) for k, v in self.intervals.items()}
        if self.doubts is None:
            del values["doubts"]
        return {"format": FORMAT, "version": VERSION, **values}


_Z = 1.96  # 95% of a normal distribution lie within as many standard deviations


def wilson_interval(right: int, n: int) -> tuple[float, float]:
    """Return the 95% score interval of a share (Wilson 1927).

    Args:
        right: number of images that count.
        n: number of all images.

    Returns:
        The interval's ends, in [0, 1]; all of [0, 1] if there is no image.
    """
    if n == 0:
        return (0.0, 1.0)
    p, z2 = right / n, _Z * _Z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return (max(0.0, centre - half), min(1.0, centre + half))


def share_interval(share: float, n: int) -> tuple[float, float]:
    """Return the ``wilson_interval`` of a share of n images that was computed before."""
    return wilson_interval(round(share * n), n)


def at_least(right: int, n: int) -> float:
    """Return the lower end of the ``wilson_interval``: what the share surely is at least."""
    return wilson_interval(right, n)[0]


def at_most(right: int, n: int) -> float:
    """Return the upper end of the ``wilson_interval``: what the share surely is at most."""
    return wilson_interval(right, n)[1]
