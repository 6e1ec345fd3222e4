"""The optional packages of the report, imported when a chart or a page is made."""

from __future__ import annotations

from typing import Any

from surestep import errors


def need(name: str) -> Any:
    """Import one of the report's optional packages.

    Raises:
        UserError: it is not installed.
    """
    every = "altair, vl-convert-python and jinja2"
    return errors.need(name, "the report", "surestep[report]", called=every)


def require() -> None:
    """Check that reports can be written, before the work that they report on.

    Raises:
        UserError: a package is missing.
    """
    for name in ("altair", "vl_convert", "jinja2"):
        need(name)
