"""The result of a comparison: its numbers, rows and notes, and how they are written."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from surestep import environment, files, report
from surestep.errors import UserError, need
from surestep.report.columns import COLUMNS, SHARES, alignment

FORMAT, VERSION = "surestep-comparison", 1

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Number:
    """A number in a row.

    Attributes:
        mean: mean over the seeds.
        std: sample standard deviation over the seeds; None for a single seed.
        n: number of seeds.
    """

    mean: float
    std: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Number:
        """Build the number from one value per seed."""
        spread = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), spread, len(values))


@dataclass(frozen=True)
class Row:
    """A method in a comparison.

    Attributes:
        method: the slug, followed by the settings in which rows of the same method differ.
        seeds: the seeds of its runs.
        numbers: by the keys of ``COLUMNS``; accuracies are in [0, 1]. Unknown ones are absent.
        verdicts: how many runs got each verdict, the most severe first; empty without an audit.
    """

    method: str
    seeds: list[int]
    numbers: dict[str, Number]
    verdicts: dict[str, int] = field(default_factory=dict)

    @property
    def verdict(self) -> str | None:
        """The most severe verdict over the seeds; None without an audit."""
        return next(iter(self.verdicts), None)

    @property
    def verdict_text(self) -> str:
        """The most severe verdict, with the counts if the seeds disagree."""
        if len(self.verdicts) < 2:
            return self.verdict or ""
        (worst, count), *others = self.verdicts.items()
        rest = ", ".join(f"{name} {k}" for name, k in others)
        return f"{worst} ({count} of {sum(self.verdicts.values())}; {rest})"

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings, lists and dicts; unknown numbers are None."""
        known = {key: asdict(number) for key, number in self.numbers.items()}
        return {
            "method": self.method,
            "seeds": self.seeds,
            **{key: known.get(key) for key in COLUMNS},
            "verdict": self.verdict,
            "verdicts": self.verdicts,
        }


@dataclass(frozen=True)
class Failure:
    """A run that gave no result.

    Attributes:
        run: its name in the comparison.
        message: why, in one line.
        fault: whether it is a bug in surestep rather than a mistake or a full disk.
    """

    run: str
    message: str
    fault: bool = False


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison.

    Attributes:
        rows: one per method, or several if its runs differ in settings, in the order given.
        runs: one dict per run: its name, method, seed, numbers and doubts; with an audit also its
            verdict, sentence, accuracy and strongest attack.
        failures: runs that gave no result; they are in no row.
        dataset: the data set that the runs are judged on.
        threat: norm and eps.
        n: number of images.
        split: the split that they are from.
        attacks: names of the evaluation's attacks.
        audit: budget of the audits; None without audits.
        notes: what a reader of the table must know, one line each.
    """

    rows: list[Row]
    runs: list[dict[str, Any]]
    failures: list[Failure]
    dataset: str
    threat: dict[str, Any]
    n: int
    attacks: list[str]
    audit: str | None
    notes: list[str]
    split: str = "test"

    @property
    def title(self) -> str:
        """One line that describes the numbers."""
        threat = f"{self.threat['norm']} eps {self.threat['eps']:.4g}"
        counts = {len(row.seeds) for row in self.rows}
        spread = ""
        if max(counts) > 1:
            over = f" over {counts.pop()} seeds" if len(counts) == 1 else ""
            spread = f", mean ± standard deviation{over}"
        images = f"{self.n:,} {self.split} images of {self.dataset}"
        return f"accuracy in % on {images}, {threat}{spread}"

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return the table as strings: the titles, and one list per row.

        Columns without a known value are left out, as is the number of seeds if every row has the
        same.
        """
        keys = [key for key in COLUMNS if any(key in row.numbers for row in self.rows)]
        audited = any(row.verdicts for row in self.rows)
        uneven = len({len(row.seeds) for row in self.rows}) > 1
        titles, body = ["method"], [[row.method] for row in self.rows]

        def add(title: str, texts: Iterable[str]) -> None:
            titles.append(title)
            for line, text in zip(body, texts, strict=True):
                line.append(text)

        if uneven:
            add("seeds", (str(len(row.seeds)) for row in self.rows))
        for key in keys:
            if key == "passes" and audited:
                add("verdict", (row.verdict_text for row in self.rows))
            add(COLUMNS[key], (_cell(key, row.numbers.get(key)) for row in self.rows))
        return titles, body

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings, lists and dicts, as written by ``--json``."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "dataset": self.dataset,
            "split": self.split,
            "threat": self.threat,
            "n": self.n,
            "attacks": self.attacks,
            "audit": self.audit,
            "rows": [row.to_dict() for row in self.rows],
            "runs": self.runs,
            "failures": [asdict(failure) for failure in self.failures],
            "notes": self.notes,
        }

    def to_csv(self) -> str:
        """Return the table as CSV: unrounded, mean and standard deviation in separate columns."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        parts = [f"{key}_{part}" for key in COLUMNS for part in ("mean", "std")]
        writer.writerow(["method", "seeds", *parts, "verdict", "verdicts"])
        for row in self.rows:
            numbers = [row.numbers.get(key) for key in COLUMNS]
            values = [v for n in numbers for v in ((n.mean, n.std) if n else (None, None))]
            counts = "; ".join(f"{name} {count}" for name, count in row.verdicts.items())
            writer.writerow([_line(row.method), len(row.seeds), *values, row.verdict, counts])
        return text.getvalue()

    def to_markdown(self) -> str:
        """Return the table as Markdown, with title and notes below.

        Raises:
            UserError: tabulate is not installed.
        """
        titles, body = self.table()
        texts = [[_markdown(text) or "–" for text in line] for line in body]
        sides = [alignment(title) for title in titles]
        table = need_tabulate().tabulate(
            texts, titles, tablefmt="pipe", disable_numparse=True, colalign=sides
        )
        lines = "".join(f"- {_markdown(note)}\n" for note in self.notes)
        return f"{table}\n\n{_markdown(self.title)}\n" + (f"\n{lines}" if lines else "")

    def to_latex(self) -> str:
        """Return the table as LaTeX (package booktabs), with title and notes as comments above.

        Raises:
            UserError: tabulate is not installed.
        """
        titles, body = self.table()
        texts = [[_line(text) or "–" for text in line] for line in body]
        sides = [alignment(title) for title in titles]
        table: str = need_tabulate().tabulate(
            texts, titles, tablefmt="latex_booktabs", disable_numparse=True, colalign=sides
        )
        text = "".join(f"% {_line(line)}\n" for line in (self.title, *self.notes)) + f"{table}\n"
        # tabulate escapes LaTeX's special characters; these two would depend on the input encoding.
        return text.replace("±", "$\\pm$").replace("–", "--")


def need_tabulate() -> Any:
    """Import tabulate.

    Raises:
        UserError: it is not installed.
    """
    return need("tabulate", "a Markdown or LaTeX table", "surestep[report]")


def _line(text: str) -> str:
    """Put a text on one line: a line break would end the row."""
    return " ".join(text.split())


def _markdown(text: str) -> str:
    """Escape what Markdown or a browser would not read as plain text."""
    text = _line(text).replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{c}" if c in "\\|*_`[]" else c for c in text)


def _cell(key: str, number: Number | None) -> str:
    if number is None:
        return ""
    if key == "passes":
        # Counted, not measured: a deviation would be meaningless.
        return f"{number.mean:.4g}"
    scale = 100 if key in SHARES else 1
    digits = 1 if key in SHARES or number.mean < 100 else 0
    text = f"{scale * number.mean:.{digits}f}"
    return text if number.std is None else f"{text} ± {scale * number.std:.{digits}f}"


def save(
    comparison: Comparison,
    folder: str | Path,
    *,
    command: str = "",
    versions: Mapping[str, Any] | None = None,
    tell: Tell = lambda _: None,
) -> list[Path]:
    """Write comparison.json, .csv, .md and .tex, report.html, and its plots as PNG and SVG.

    Files that need a package that is not installed are left out.

    Args:
        comparison: the comparison to write.
        folder: where to write; made if it does not exist.
        command: the command that made the comparison.
        versions: package versions; by default those of surestep, torch and Python.
        tell: called with one line of text for each file that is left out.

    Returns:
        The files that were written.

    Raises:
        UserError: a file cannot be written.
    """
    folder = Path(folder)
    files.make_folder(folder)
    versions = versions or environment.versions()
    made = {**comparison.to_dict(), "command": command, "versions": dict(versions)}
    page = _page(comparison, command, versions)
    texts: list[tuple[str, Callable[[], str]]] = [
        ("comparison.json", lambda: json.dumps(made, indent=2) + "\n"),
        ("comparison.csv", comparison.to_csv),
        ("comparison.md", comparison.to_markdown),
        ("comparison.tex", comparison.to_latex),
        ("report.html", page.to_html),
    ]
    written = []
    for name, make in texts:
        try:
            text = make()
        except UserError as e:
            tell(f"{name} left out: {e}")
            # A file of an earlier comparison would not match the new numbers.
            (folder / name).unlink(missing_ok=True)
            continue
        files.write_atomically(folder / name, text)
        written.append(folder / name)
    if folder / "report.html" in written:
        written += report.save_plots(page, folder / "plots")
    return written


def _page(comparison: Comparison, command: str, versions: Mapping[str, Any]) -> report.Report:
    seeds = sorted({seed for row in comparison.rows for seed in row.seeds})
    return report.Report(
        f"Comparison of {', '.join(row.method for row in comparison.rows)}",
        comparison=[row.to_dict() | {"verdict_text": row.verdict_text} for row in comparison.rows],
        notes=comparison.notes,
        command=command,
        versions=versions,
        seeds={"training": ", ".join(map(str, seeds))},
        config={
            "data set": comparison.dataset,
            "norm": comparison.threat["norm"],
            "eps": comparison.threat["eps"],
            f"{comparison.split} images": comparison.n,
            "attacks": ", ".join(comparison.attacks),
            "audit": comparison.audit or "none",
        },
    )
