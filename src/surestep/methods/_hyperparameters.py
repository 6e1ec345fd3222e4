"""Hyperparameters: dataclass fields with a range, or with a default that depends on the radius."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from dataclasses import Field, field, fields
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from surestep.errors import UserError
from surestep.threat import Linf, ThreatModel

SHARED = ("label_smoothing", "margin", "dropout")
"""Hyperparameters that every method has."""
_WORDS = {
    float: "a finite number",
    int: "a whole number",
    bool: "true or false",
    str: "a name",
    type(None): "none",
}
_BOUNDS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "ge": (">=", operator.ge),
    "gt": (">", operator.gt),
    "le": ("<=", operator.le),
    "lt": ("<", operator.lt),
}
"""The kinds of bounds: how they are written, and when they hold."""


def param(
    default: Any,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    kw_only: bool = False,
) -> Any:
    """Return a dataclass field for a number with bounds, named as pydantic names them.

    Args:
        default: the value if none is given; None is never checked.
        ge: the least value.
        gt: a value below all.
        le: the largest value.
        lt: a value above all.
        kw_only: whether it is given by name only.
    """
    given = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    bounds = {kind: bound for kind, bound in given.items() if bound is not None}
    return field(default=default, metadata={"bounds": bounds}, kw_only=kw_only)


def of_eps(share: float, *, most: float = math.inf) -> Any:
    """Return a dataclass field for a length, at least 0: by default a share of eps.

    It scales with eps. In l-inf the default is at most ``most``, which is meant for pixels in
    [0, 1] and scales with the data range. (In l2 a length is that of the whole step: a bound for
    one pixel does not fit.)
    """

    def default(threat: ThreatModel) -> float:
        bound = most * threat.span if isinstance(threat, Linf) else math.inf
        return min(share * threat.eps, bound)

    return field(default=None, metadata={"of_threat": default, "length": True, "bounds": {"ge": 0}})


def of_span(share: float) -> Any:
    """Return a dataclass field, at least 0: by default a share of the data range.

    The range is 1 for pixels in [0, 1]. Unlike ``of_eps`` it does not scale with eps.
    """
    metadata = {"of_threat": lambda threat: share * threat.span, "bounds": {"ge": 0}}
    return field(default=None, metadata=metadata)


def own_fields(cls: type[Any]) -> list[Field[Any]]:
    """Return the fields of a method's own hyperparameters: all but those of ``Method``."""
    return [one for one in fields(cls) if one.name not in ("threat", *SHARED)]


def parameter_names(cls: type[Any]) -> list[str]:
    """Return the names of a method's own hyperparameters."""
    return [one.name for one in own_fields(cls)]


def length_names(cls: type[Any]) -> list[str]:
    """Return the names of the hyperparameters in pixel units that scale with eps (``of_eps``)."""
    return [one.name for one in own_fields(cls) if "length" in one.metadata]


@functools.cache
def kinds_of(cls: type[Any]) -> dict[str, tuple[type, ...]]:
    """Return the types that each hyperparameter may have.

    Raises:
        UserError: a hyperparameter has a type that YAML and the command line cannot express.
    """
    hints = get_type_hints(cls)
    found = {}
    for name in (*SHARED, *parameter_names(cls)):
        union = get_origin(hints[name]) in (Union, UnionType)
        found[name] = kinds = get_args(hints[name]) if union else (hints[name],)
        if not set(kinds) <= set(_WORDS):
            raise UserError(
                f"{name} of {cls.__name__} is a {hints[name]}: hyperparameters must be float, int, "
                "bool, str or a union of these and None; take a str and convert it in set_up()"
            )
    return found


def what_is_expected(value: Any, kinds: tuple[type, ...], one: Field[Any]) -> str:
    """Return what a hyperparameter should be, for an error; nothing if the value is right."""
    if not _fits(value, kinds):
        return " or ".join(_WORDS[kind] for kind in kinds)
    bounds = one.metadata.get("bounds", {})
    if value is None or all(_BOUNDS[kind][1](value, bound) for kind, bound in bounds.items()):
        return ""
    ends = [kind for kind in _BOUNDS if kind in bounds]
    if len(ends) == 2 and ends[0] in ("ge", "gt") and ends[1] in ("le", "lt"):
        left, right = "[" if ends[0] == "ge" else "(", "]" if ends[1] == "le" else ")"
        return f"in {left}{bounds[ends[0]]:g}, {bounds[ends[1]]:g}{right}"
    return " and ".join(f"{_BOUNDS[kind][0]} {bounds[kind]:g}" for kind in ends)


def _fits(value: Any, kinds: tuple[type, ...]) -> bool:
    """Return whether a value has one of the types; a float must also be finite."""
    if isinstance(value, float):
        return float in kinds and math.isfinite(value)
    # Compare exact types: isinstance takes True for an int, but a weight of "true" is a mistake.
    return type(value) in kinds or (type(value) is int and float in kinds)
