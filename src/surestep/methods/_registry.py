"""Register, find, build and describe methods by name."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import MISSING, replace
from importlib import resources
from typing import Any, TypeVar

from surestep.config import read_param
from surestep.errors import SurestepWarning, UserError, look_up, unknown_name
from surestep.methods._base import Method
from surestep.methods._hyperparameters import kinds_of, own_fields, parameter_names
from surestep.methods._presets import Preset
from surestep.threat import Linf, ThreatModel

_SETTABLE = ("label_smoothing", "dropout")
"""The shared hyperparameters that a run's settings can set; the margin comes from its head."""
_OTHER_NAMES = {
    **{"fgsm-pgi": "fgsm-mep", "fgsm-rs": "rs-fgsm", "fast": "rs-fgsm", "fgsm-at": "fgsm"},
    **{"fgsm-ga": "gradalign", "nfgsm": "n-fgsm", "pgd-at": "pgd", "free-at": "free"},
}
"""Names of methods in the literature, and their slugs here."""

M = TypeVar("M", bound=Method)
METHODS: dict[str, type[Method]] = {}


def register(slug: str) -> Callable[[type[M]], type[M]]:
    """Register a subclass of ``Method`` under its slug.

    Raises:
        UserError: the slug is another method's, a hyperparameter has no default or an unsupported
            type, the summary or the paper is missing, or it has what earlier versions read.
    """

    def add(cls: type[M]) -> type[M]:
        for one in own_fields(cls):
            if one.default is MISSING and one.default_factory is MISSING:
                raise UserError(f"{one.name} of the method {slug!r} has no default: give it one")
        for old, new in (("validate", "set_up"), ("lengths", "fields made by of_eps")):
            if hasattr(cls, old):
                raise UserError(f"the method {slug!r} has {old}, which nothing reads: use {new}")
        kinds_of(cls)
        for name in ("summary", "paper"):
            if not isinstance(getattr(cls, name, None), str):
                raise UserError(f"the method {slug!r} has no {name}: set the class attribute")
        taken = METHODS.get(slug)
        if taken and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise UserError(
                f"the method name {slug!r} is taken by {taken.__module__}.{taken.__qualname__}: "
                f"register {cls.__qualname__} under another name"
            )
        cls.slug = slug
        METHODS[slug] = cls
        return cls

    return add


def get(slug: str) -> type[Any]:
    """Return the method class of a slug, a subclass of ``Method`` with hyperparameters of its own.

    Example:
        >>> method = get("sat-r3")(surestep.Linf(8 / 255), tau=0.6)

    Raises:
        UserError: there is no such method; the message suggests the nearest.
    """
    if slug in _OTHER_NAMES and slug not in METHODS:
        raise unknown_name("method", slug, METHODS, meant=_OTHER_NAMES[slug])
    return look_up("method", slug, METHODS)


def is_registered(method: Method) -> bool:
    """Tell whether a method's class is the one that its slug stands for."""
    return METHODS.get(method.slug) is type(method)


def names() -> list[str]:
    """Return the slugs of all methods."""
    return sorted(METHODS)


def overview(batch_size: int = 128) -> list[dict[str, Any]]:
    """Return one row per method, cheapest step first: name, summary, paper, passes, presets.

    The passes of a plug-in that fails to tell them are None.
    """
    rows = [
        {
            "name": slug,
            "summary": cls.summary,
            "paper": cls.paper,
            "passes": _passes(cls, batch_size),
            "presets": list(cls.presets),
        }
        for slug, cls in METHODS.items()
    ]
    return sorted(rows, key=lambda row: (row["passes"] or math.inf, row["name"]))


def _passes(cls: type[Method], batch_size: int) -> float | None:
    try:
        return cls(Linf(0.3)).cost(batch_size).total
    except Exception as e:  # a broken plug-in must not break the list
        if cls.__module__.startswith("surestep."):
            raise
        warnings.warn(f"the passes of {cls.slug} are unknown: {e!r}", SurestepWarning, stacklevel=3)
        return None


def build(slug: str, threat: ThreatModel, params: Mapping[str, Any], **parts: float) -> Method:
    """Build a method from its slug and parameters, as the command line does.

    Args:
        slug: name of the method.
        threat: norm, radius and data range.
        params: the method's own hyperparameters, by name.
        parts: hyperparameters that every method has: label_smoothing, margin, dropout.

    Raises:
        UserError: unknown method or parameter, or a value of the wrong type or range.
    """
    cls = get(slug)
    known = parameter_names(cls)
    for name in params:
        if name not in known:
            raise unknown_name(f"parameter of {slug}", name, known)
    return cls(threat, **params, **parts)


def build_written(text: str, threat: ThreatModel) -> Method:
    """Build a method from text: its slug, optionally with settings, as in "n-fgsm noise=1".

    Raises:
        UserError: the text has another form, or ``build`` raises.
    """
    slug, *rest = text.split() or [""]
    pairs = [setting.partition("=") for setting in rest]
    try:
        if not all(equals for _, equals, _ in pairs):
            raise ValueError
        params = {name: read_param(value) for name, _, value in pairs}
    except ValueError:
        raise UserError(
            f"{text!r} is not a method with settings: write it as in 'n-fgsm noise=1'"
        ) from None
    return build(slug, threat, params)


def settle(method: Method, settings: object) -> dict[str, float]:
    """Set a method's label smoothing and dropout from a run's settings; return the final values.

    Args:
        method: changed in place.
        settings: has attributes label_smoothing and dropout; None keeps the method's own value.
    """
    for name in _SETTABLE:
        if (value := getattr(settings, name)) is not None:
            setattr(method, name, value)
    return {name: getattr(method, name) for name in _SETTABLE}


def preset(slug: str, name: str) -> Preset:
    """Return a method's preset.

    Raises:
        UserError: the method has no preset of that name.
    """
    return look_up(f"preset of {slug}", name, get(slug).presets)


def card(slug: str) -> str:
    """Return the method's card as Markdown: ``cards/SLUG.md`` in the package of its file.

    Raises:
        UserError: there is no such method, or its package has no card for it.
    """
    module = sys.modules[get(slug).__module__]
    package = module.__name__ if hasattr(module, "__path__") else module.__package__
    try:
        return (resources.files(package or "") / "cards" / f"{slug}.md").read_text("utf-8")
    except FileNotFoundError as e:
        raise UserError(f"the method {slug!r} has no card: add {package}/cards/{slug}.md") from e


def recipe_of(slug: str, name: str, **params: Any) -> Preset:
    """Return another method's preset with ``params`` in place of that method's parameters."""
    return replace(preset(slug, name), params=params, source=f"as {name} of {slug}")
