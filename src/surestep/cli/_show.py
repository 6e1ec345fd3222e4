"""How commands show progress and results."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from surestep import verdicts

if TYPE_CHECKING:
    from rich.console import Console

    from surestep.auditing import Audit
    from surestep.evaluation import Evaluation


@contextmanager
def progress_bar(what: str) -> Iterator[dict[str, Any]]:
    """Show a bar on stderr, or a line a minute if it is not a terminal.

    Yields the arguments ``progress`` and ``tell`` of ``surestep.evaluate``. The lines come from a
    thread of their own: one attack on one batch can take many minutes.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeElapsedColumn as Elapsed
    from rich.progress import TimeRemainingColumn as Left

    from surestep.clock import SECONDS_BETWEEN_LINES

    console = Console(stderr=True)
    begin, stopped = time.monotonic(), threading.Event()
    last = ""

    def report() -> None:
        while not stopped.wait(SECONDS_BETWEEN_LINES):
            minutes = (time.monotonic() - begin) / 60
            known = f"{what}; {last}" if last else what
            print(f"{known}; {minutes:.0f} min", file=sys.stderr, flush=True)

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("worst case {task.fields[worst]}"),
        Elapsed(),
        Left(),
        console=console,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(what, total=None, worst="")

        def progress(done: int, total: int, worst: float) -> None:
            bar.update(task, completed=done, total=total or None, worst=f"{worst:.1%}")

        def tell(text: str) -> None:
            nonlocal last
            last = text
            bar.update(task, description=f"{what}: {text.partition(' ')[0]}")

        reporter = threading.Thread(target=report, daemon=True)
        if not console.is_terminal:
            reporter.start()
        try:
            yield {"progress": progress, "tell": tell}
        finally:
            stopped.set()


def wide_console(columns: int) -> Console:
    """Return a console for stdout, at least ``columns`` wide if stdout is not a terminal."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, columns))


def share_of_images(share: float, n: int) -> str:
    """Format a share of n images as a percentage with its 95% interval."""
    from surestep.evaluation import share_interval

    return _with_interval(share, share_interval(share, n))


def _with_interval(share: float, interval: tuple[float, float]) -> str:
    low, high = interval
    return f"{share:.1%} ({100 * low:.1f}-{100 * high:.1f})"


def evaluation_table(
    results: Mapping[str, Evaluation], extra: Mapping[str, Mapping[str, str]] | None = None
) -> None:
    """Print evaluations side by side: one column per model, one row per accuracy.

    Args:
        results: evaluations by model name.
        extra: further rows: texts by row name and model name.
    """
    from rich.markup import escape
    from rich.table import Table

    first = next(iter(results.values()))
    threat = f"{first.threat['norm']} eps {first.threat['eps']:.4g}"
    table = Table(title=f"accuracy on {first.n:,} images, {threat} (95% interval)")
    table.add_column("")
    for name in results:
        table.add_column(escape(name), justify="right")
    rows = ["clean", *first.robust_accuracy, "worst case"]
    for row in rows:
        cells = []
        for result in results.values():
            value = {
                "clean": result.clean_accuracy,
                "worst case": result.worst_case_accuracy,
                **result.robust_accuracy,
            }[row]
            cells.append(_with_interval(value, result.intervals[row]))
        table.add_row(row, *cells, style="bold" if row == "worst case" else None)
    for row, values in (extra or {}).items():
        table.add_row(row, *(values.get(name, "") for name in results), style="dim")
    table.caption = "worst case: per image, the strongest of the attacks"
    if any(attack["scope"] == "survivors" for attack in first.attacks) and len(first.attacks) > 1:
        table.caption += "; autoattack was run only on the images that the others left"
    console = wide_console(40 + 32 * len(results))
    console.print(table)
    if len(results) == 1:
        console.print(_more_of(first), style="dim", highlight=False, soft_wrap=True)


def _more_of(found: Evaluation) -> str:
    """Describe the seconds of each attack, what its parts left in turn, and the weakest class."""
    seconds = ", ".join(f"{name} {took:.1f}" for name, took in found.attack_seconds.items())
    weakest = min(found.per_class, key=lambda row: row["worst_case_accuracy"])
    share = share_of_images(weakest["worst_case_accuracy"], weakest["n"])
    after = "".join(
        f"; accuracy after each part of {attack['name']}: "
        + ", ".join(f"{part} {share:.1%}" for part, share in attack["by_part"].items())
        for attack in found.attacks
        if attack["by_part"]
    )
    return (
        f"seconds: {seconds}{after}; weakest class: {weakest['label']}, worst case {share} of "
        f"{weakest['n']:,} images"
    )


def audit_tables(name: str, found: Audit) -> None:
    """Print an audit: verdict, claimed and found accuracy, the checks and any escalation."""
    from rich.markup import escape
    from rich.table import Table

    console = wide_console(120)
    colour = verdicts.colour(found.verdict)
    console.print(f"[bold {colour}]{found.verdict}[/]  {escape(name)}", highlight=False)
    console.print(found.sentence, highlight=False)
    table = Table(title=f"{found.n:,} images, {found.threat['norm']} eps {found.threat['eps']:.4g}")
    table.add_column("")
    table.add_column("accuracy", justify="right")
    table.add_row("clean", share_of_images(found.clean_accuracy, found.n))
    for claim, value in found.claims.items():
        table.add_row(f"under {claim} alone", share_of_images(value, found.n))
    table.add_row(
        "under all attacks" + (f" (most broken by {found.found_by})" if found.found_by else ""),
        _with_interval(found.found_accuracy, found.found_interval),
        style="bold",
    )
    console.print(table)
    checks = Table(title="masking checks")
    for column in ("", "check", "result", "", "flags when"):
        checks.add_column(column)
    for check in found.checks:
        style = {"flagged": "bold red", "skipped": "dim"}.get(check.status)
        row = (str(check.number), check.title, check.status, check.sentence, check.threshold)
        checks.add_row(*row, style=style)
    console.print(checks)
    if found.escalation:
        steps = Table(title="escalation: what further attacks leave")
        for column in ("attack", "left", "why"):
            steps.add_column(column)
        for step in found.escalation:
            steps.add_row(step["name"], share_of_images(step["accuracy"], found.n), step["why"])
        console.print(steps)


def provenance() -> dict[str, Any]:
    """Return what is needed to reproduce a result: the command and the versions."""
    import shlex

    from surestep import environment

    command = shlex.join(["surestep", *sys.argv[1:]])
    return {"command": command, "versions": environment.versions()}
