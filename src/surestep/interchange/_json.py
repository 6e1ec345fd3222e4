"""Strict JSON reading: refuse NaN and infinity, which Python accepts but the standard does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from surestep.errors import UserError


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Args:
        path: the file, UTF-8.

    Raises:
        UserError: the file is missing, unreadable or not JSON; NaN and infinity are not JSON.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist")
    try:
        return json.loads(path.read_text("utf-8-sig"), parse_constant=_refuse)
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not JSON: {e}") from e


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not a JSON number")


def shorten(value: Any, length: int = 60) -> str:
    """Return a value as one line of at most ``length`` characters."""
    text = repr(value)
    return text if len(text) <= length else text[: length - 3] + "..."
