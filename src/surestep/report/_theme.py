"""How charts look when saved: the page's light colours (the page itself reads its CSS)."""

from __future__ import annotations

from typing import Any

CATEGORY = ["#2563a8", "#c2571a", "#2a8a63", "#8a4fb0", "#a87d0f", "#c23a64", "#0f8496", "#667080"]
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_INK, _MUTED, _LINE = "#1c232b", "#5b6672", "#e3e7eb"


def config() -> dict[str, Any]:
    """Return the Vega-Lite configuration of saved charts."""
    text = {"labelFont": _FONT, "titleFont": _FONT, "labelColor": _MUTED, "titleColor": _MUTED}
    return {
        "background": "white",
        "font": _FONT,
        "range": {"category": CATEGORY},
        "mark": {"color": CATEGORY[0]},
        "text": {"color": _INK, "font": _FONT},
        "rule": {"color": CATEGORY[0]},
        "title": {"color": _INK, "font": _FONT, "fontSize": 13, "anchor": "start"},
        "view": {"stroke": None},
        "axis": {
            **text,
            "titleFontWeight": "normal",
            "labelFontSize": 11,
            "titleFontSize": 12,
            "gridColor": _LINE,
            "domainColor": _LINE,
            "tickColor": _LINE,
        },
        "legend": {**text, "orient": "top", "labelFontSize": 12, "columns": 4},
    }
