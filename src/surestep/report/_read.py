"""Reads numbers from the dicts of evaluations, audits, metrics and comparisons."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from surestep.errors import UserError

Row = dict[str, Any]
T = TypeVar("T")


def number(value: Any) -> float | None:
    """Return a finite number as float, and None for anything else: charts and JSON have no NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def pairs(xs: Sequence[Any], ys: Sequence[Any]) -> list[tuple[float | None, float | None]]:
    """Return the points of two lists of equal length."""
    return [(number(x), number(y)) for x, y in zip(xs, ys, strict=True)]


def stated(value: Any) -> tuple[float | None, float | None, int | None]:
    """Return mean, standard deviation and count of a comparison's cell.

    Args:
        value: a number, None, or {"mean": ..., "std": ..., "n": ...}.
    """
    if isinstance(value, Mapping):
        n = value.get("n")
        return number(value.get("mean")), number(value.get("std")), int(n) if n else None
    return number(value), None, None


def some(rows: Iterable[T], what: str) -> list[T]:
    """Return the rows as a list.

    Raises:
        UserError: there are no rows.
    """
    found = list(rows)
    if not found:
        raise UserError(f"there is nothing to draw: {what} is empty")
    return found
