"""The words of an audit's verdict, in one place for what decides, shows and compares them."""

from __future__ import annotations

ROBUST, PSEUDO, NOT_ROBUST, INCONCLUSIVE = "robust", "pseudo-robust", "not robust", "inconclusive"

SEVERITY = (PSEUDO, NOT_ROBUST, INCONCLUSIVE, ROBUST)
"""The most severe first: what looks robust and is not comes before what is plainly not."""


def colour(verdict: str) -> str:
    """Return the colour that a verdict has on a terminal."""
    return {ROBUST: "green", INCONCLUSIVE: "yellow"}.get(verdict, "red")
