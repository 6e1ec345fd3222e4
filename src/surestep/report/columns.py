"""The numbers of a comparison's rows, in order, with their titles."""

from __future__ import annotations

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
