"""The numbers of a comparison's rows, in order, with their titles."""

from __future__ import annotations

from typing import Literal

SHARES = {
    "clean_accuracy": "clean",
    "fgsm": "FGSM",
    "pgd": "PGD",
    "autoattack": "AutoAttack",
    "worst_case_accuracy": "worst case",
}
"""Accuracies, in [0, 1]."""
COSTS = {
    "passes": "passes per image",
    "seconds": "training seconds",
    "peak_memory_mb": "peak memory MB",
}
COLUMNS = SHARES | COSTS


def alignment(title: str) -> Literal["left", "right"]:
    """Return the side to which a column of a comparison's table is aligned: numbers to the right.

    Args:
        title: title of the column.
    """
    return "left" if title in ("method", "verdict") else "right"
