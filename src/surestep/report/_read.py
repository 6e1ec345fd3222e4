"""Reads the dicts of evaluations, audits and metrics, with one clear line for each mistake."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from surestep.errors import UserError

Row = dict[str, Any]
T = TypeVar("T")


def get(source: Any, key: str, what: str) -> Any:
    """Return ``source[key]``.

    Raises:
        UserError: ``source`` is not a dict, or lacks the key.
    """
    if not isinstance(source, Mapping):
        raise UserError(f"{what} is a {type(source).__name__}, expected a dict with {key!r}")
    if key not in source:
        raise UserError(f"{what} lacks {key!r}: is it from another version of surestep?")
    return source[key]


def number(value: Any) -> float | None:
    """Return a finite number as float, and None for anything else: charts and JSON have no NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def pairs(source: Any, xs: str, ys: str, what: str) -> list[tuple[float | None, float | None]]:
    """Return the points of two lists of equal length in a dict.

    Raises:
        UserError: a list is missing, or their lengths differ.
    """
    a, b = get(source, xs, what), get(source, ys, what)
    for name, values in ((xs, a), (ys, b)):
        if not isinstance(values, Sequence) or isinstance(values, str):
            raise UserError(f"{what}: {name!r} is a {type(values).__name__}, expected a list")
    if len(a) != len(b):
        raise UserError(f"{what}: {len(a)} values of {xs!r} but {len(b)} of {ys!r}")
    return [(number(x), number(y)) for x, y in zip(a, b, strict=True)]


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
