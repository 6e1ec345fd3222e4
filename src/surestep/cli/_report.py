"""The report that commands write in addition to their result."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surestep.cli._options import check_writable, write_text
from surestep.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from surestep.data import Images
    from surestep.targets import Target
    from surestep.threat import ThreatModel
    from surestep.training.run_folder import RunFolder

LOOKED_AT = 200  # images among which to look for correctly classified ones
_AT_ONCE = 256  # largest batch of a forward pass


def report_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--html`` and ``--plots``."""
    page = click.option(
        "--html", metavar="FILE", help="Also write a report, a self-contained HTML page."
    )
    plots = click.option(
        "--plots", metavar="DIR", help="Also write the report's plots as PNG and SVG."
    )
    return page(plots(command))


def check_report(html: str | None, plots: str | None = None) -> None:
    """Check that a report can be written, before any work.

    Raises:
        UserError: a target cannot be written to, or a package is missing.
    """
    if html is None and plots is None:
        return
    from surestep import files, report

    if html == "-":
        raise UserError("--html -: the result goes to stdout, so give the page a file")
    check_writable(html)
    report.require()
    if plots is not None:
        files.make_folder(Path(plots))
        if not os.access(plots, os.W_OK):
            raise UserError(f"cannot write to {plots}: permission denied; choose another place")


def write_report(html: str | None, plots: str | None, title: str, **parts: Any) -> None:
    """Write the page, the plots or both.

    Args:
        html: file of the page; None writes no page.
        plots: folder of the plots; None writes no plots.
        title: title of the page.
        **parts: other fields of ``surestep.report.Report``.
    """
    from surestep import report

    page = report.Report(title, **parts)
    if html is not None:
        write_text(page.to_html(), html)
    if plots is not None:
        report.save_plots(page, plots)


def report_target(
    html: str | None, plots: str | None, target: Target, batch_size: int, **results: Any
) -> None:
    """Write the requested report of a judged model: its results, pictures and any run history."""
    if html is None and plots is None:
        return
    from surestep.evaluation import Adapted
    from surestep.training.run_folder import RunFolder

    model = Adapted(target.model, target.preprocess)
    parts = of_model(model, target.images, target.threat, target.name, batch_size)
    parts |= of_run(RunFolder(target.run)) if target.run is not None else {}
    write_report(html, plots, target.name, **results, **parts)


def of_model(
    model: nn.Module, images: Images, threat: ThreatModel, name: str, batch_size: int
) -> dict[str, Any]:
    """Return the report's parts about a model: classes, loss surface and adversarial examples.

    Where surface and examples cannot be computed, for lack of gradients or memory, say so on stderr
    and return the classes alone.
    """
    from surestep import report

    known = {"classes": images.classes}
    try:
        x, y = images.first(min(LOOKED_AT, len(images))).tensors()
        size = min(batch_size, _AT_ONCE)
        return known | report.gather(model, x, y, threat, name=name, batch_size=size)
    except UserError as e:  # the result is valid without pictures
        click.echo(f"the report has no pictures: {e}", err=True)
        return known


def of_run(run: RunFolder) -> dict[str, Any]:
    """Return a run's training history and settings."""
    from surestep.config import read_yaml

    return {"history": run.history(), "config": read_yaml(run.config)}
