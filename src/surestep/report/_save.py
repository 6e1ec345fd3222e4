"""Saves charts as files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from surestep import files
from surestep.errors import UserError
from surestep.report import _theme
from surestep.report._needs import need

if TYPE_CHECKING:
    import altair as alt

FORMATS = (".png", ".svg")
VEGA_LITE = "6.4"


def save_chart(chart: alt.TopLevelMixin, path: str | Path) -> None:
    """Write a chart as a picture.

    Args:
        chart: any Altair chart, such as those of ``surestep.report.charts``.
        path: ends in .png or .svg.

    Raises:
        UserError: the ending is another one, the file cannot be written, or a package is missing.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise UserError(f"cannot save a chart as {path.name}: use {' or '.join(FORMATS)}")
    spec = chart.to_dict()
    # Altair's default config sets only a view size, which the charts set themselves.
    spec["config"] = _theme.config()
    convert = need("vl_convert")
    content: bytes | str
    if path.suffix == ".png":
        content = convert.vegalite_to_png(spec, vl_version=VEGA_LITE, scale=2)
    else:
        content = convert.vegalite_to_svg(spec, vl_version=VEGA_LITE)
    files.write_atomically(path, content)
