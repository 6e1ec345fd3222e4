"""The optional packages of the report, imported when a chart or a page is made."""

from __future__ import annotations

import importlib
from typing import Any

from surestep.errors import UserError


def need(name: str) -> Any:
    """Import one of the report's optional packages.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise UserError(
            "the report needs altair, vl-convert-python and jinja2: pip install 'surestep[report]'"
        ) from e


def require() -> None:
    """Make sure that reports can be written, before the work they tell about.

    Raises:
        UserError: a package is missing.
    """
    for name in ("altair", "vl_convert", "jinja2"):
        need(name)
