"""The report: its contents, and how it becomes a page or plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surestep import auditing, files
from surestep.errors import UserError
from surestep.evaluation import result
from surestep.report import _page
from surestep.report._plots import plots
from surestep.report._save import save_chart


@dataclass(frozen=True)
class Report:
    """What is known about a run, an evaluation, an audit or a comparison. Every part is optional.

    Attributes:
        title: title of the page, such as the run's name.
        evaluation: as ``Evaluation.to_dict`` gives it.
        audit: as ``Audit.to_dict`` gives it.
        history: the rows of ``metrics.jsonl``.
        comparison: one row per method; its cells are numbers, None or {"mean", "std", "n"}. Besides
            "method", rows may have "seeds", "verdict" and "verdict_text", which is shown for it.
        notes: what a reader of the comparison must know, one line each.
        surfaces: loss surfaces by model name, from ``gather``.
        examples: adversarial examples, from ``gather``.
        classes: names of the classes; by default their numbers.
        command: the exact command; by default the evaluation's or the audit's.
        versions: package versions; by default the evaluation's or the audit's.
        seeds: seeds by what they seed; by default those of the config, evaluation and audit.
        config: the settings of the run.

    Raises:
        UserError: the evaluation or the audit is none, or one of another version of the format; or
            a row of the history is no dict, or one of the comparison names no method.
    """

    title: str
    evaluation: Mapping[str, Any] | None = None
    audit: Mapping[str, Any] | None = None
    history: Sequence[Mapping[str, Any]] | None = None
    comparison: Sequence[Mapping[str, Any]] | None = None
    surfaces: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    examples: Sequence[Mapping[str, Any]] = ()
    classes: Sequence[str] = ()
    command: str = ""
    versions: Mapping[str, Any] = field(default_factory=dict)
    seeds: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        # Apart from what is checked here, the parts are taken to be what surestep itself made.
        for name, kind, command in (
            ("evaluation", (result.FORMAT, result.VERSION), "evaluate"),
            ("audit", (auditing.FORMAT, auditing.VERSION), "audit"),
        ):
            value = getattr(self, name)
            if value is None:
                continue
            known = isinstance(value, Mapping)
            found = (value.get("format"), value.get("version")) if known else value
            if found != kind:
                raise UserError(
                    f"the {name} has format and version {found}, expected {kind}: give what "
                    f"`surestep {command} --json` wrote"
                )
        if any(not isinstance(row, Mapping) for row in self.history or ()):  # read from a file
            raise UserError("a row of the history is no dict: is the run's metrics.jsonl damaged?")
        if any("method" not in row for row in self.comparison or ()):  # may be one's own
            raise UserError("a row of the comparison has no method: give each its method's name")

    @property
    def checks(self) -> Sequence[Mapping[str, Any]]:
        """The audit's checks, if there is an audit."""
        return (self.audit or {}).get("checks") or ()

    def to_html(self) -> str:
        """Return the page: one file that needs no network.

        Raises:
            UserError: a package is missing.
        """
        return _page.render(self)


def write_html(report: Report, path: str | Path) -> None:
    """Write the page of a report, atomically.

    Raises:
        UserError: the file cannot be written, or a package is missing.
    """
    files.write_atomically(Path(path), report.to_html())


def save_plots(report: Report, folder: str | Path) -> list[Path]:
    """Write every plot of a report as PNG and SVG, and return the paths.

    Raises:
        UserError: a file cannot be written, or a package is missing.
    """
    folder = Path(folder)
    files.make_folder(folder)
    written = []
    for plot in plots(report):
        for ending in (".png", ".svg"):
            written.append(folder / f"{plot.name}{ending}")
            save_chart(plot.chart, written[-1])
    return written
