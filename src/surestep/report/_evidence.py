"""Formats the evidence of a check, which may be any JSON, as pairs, tables and raw text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from surestep.files import plain

_MOST = 4000  # most characters of a text
_ROWS = 60  # most rows of a table


def parts(evidence: Any) -> list[dict[str, Any]]:
    """Return what to show, in order: pairs, tables and raw text.

    Lists of equal length are the columns of one table; each list of dicts is a table.
    """
    if not isinstance(evidence, Mapping):
        return [{"kind": "raw", "title": "", "text": text(evidence)}] if evidence else []
    pairs = {k: text(v) for k, v in evidence.items() if _scalar(v)}
    found: list[dict[str, Any]] = [{"kind": "pairs", "pairs": pairs}] if pairs else []
    columns: dict[int, dict[str, Sequence[Any]]] = {}
    for key, value in evidence.items():
        if _scalar(value):
            continue
        if isinstance(value, list | tuple) and value and all(map(_scalar, value)):
            columns.setdefault(len(value), {})[str(key)] = value
        elif isinstance(value, list | tuple) and value and all(map(_record, value)):
            names = list(dict.fromkeys(str(k) for row in value for k in row))
            rows = [[text(row.get(name)) for name in names] for row in value]
            found.append(_table(str(key), names, rows))
        elif _record(value):
            rows = [[str(k), text(v)] for k, v in value.items()]
            found.append(_table(str(key), [], rows))
        elif value:
            found.append({"kind": "raw", "title": str(key), "text": text(value)})
    for lists in columns.values():
        lines = [list(map(text, line)) for line in zip(*lists.values(), strict=True)]
        found.append(_table("", list(lists), lines))
    return found


def text(value: Any) -> str:
    """Format a value as text that is short enough for a page."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, str | int):
        written = str(value)
    else:
        written = json.dumps(plain(value), ensure_ascii=False, default=str)
    return written if len(written) <= _MOST else f"{written[:_MOST]} …"


def _table(title: str, names: list[str], rows: list[list[str]]) -> dict[str, Any]:
    left = max(0, len(rows) - _ROWS)
    return {"kind": "table", "title": title, "names": names, "rows": rows[:_ROWS], "left": left}


def _scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool)


def _record(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(map(_scalar, value.values()))
