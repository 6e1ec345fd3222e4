"""The names of an audit's verdicts, shared by the code that decides, shows and compares them."""

from __future__ import annotations

ROBUST, PSEUDO, NOT_ROBUST, INCONCLUSIVE = "robust", "pseudo-robust", "not robust", "inconclusive"

SEVERITY = (PSEUDO, NOT_ROBUST, INCONCLUSIVE, ROBUST)
"""Most severe first: a model that only looks robust is worse than one that plainly is not."""


def colour(verdict: str) -> str:
    """Return the colour of a verdict on a terminal."""
    return {ROBUST: "green", INCONCLUSIVE: "yellow"}.get(verdict, "red")
