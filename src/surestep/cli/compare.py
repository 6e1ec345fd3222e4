"""``surestep compare``."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from surestep import verdicts
from surestep.cli._options import (
    check_writable,
    config_options,
    given,
    hand_over,
    json_option,
    names,
    new_folder,
    numbers,
)
from surestep.cli._show import provenance, wide_console
from surestep.cli._target import POSITIVE, budget_option, chosen_attacks, split_option
from surestep.config import RunConfig
from surestep.errors import ERROR, UserError

if TYPE_CHECKING:
    from surestep.comparing import Comparison

_TRAINING = [
    name
    for name in RunConfig.model_fields
    if name not in ("method", "params", "seed", "mean_sparse")
]


@click.command(short_help="Train and judge several methods side by side in one table.")
@click.argument("folders", metavar="[RUN]...", nargs=-1)
@click.option("--methods", metavar="A,B,...", help="Methods to train; see `surestep methods`.")
@click.option(
    "--seeds",
    metavar="N",
    help="Number of seeds per method, or a list of seeds (0,5). [default: 3]",
)
@click.option(
    "--out",
    metavar="DIR",
    help="Folder for runs, tables and report; rerun with the same one to continue. "
    "[default: runs/<date>-compare; with run folders, nothing is kept]",
)
@click.option(
    "--preset",
    metavar="NAME",
    help="A preset that every method has, or none. [default: each method's own for the data set]",
)
@click.option(
    "--attacks",
    metavar="A,B,...",
    help="Attacks of the evaluation, as for `surestep evaluate`. "
    "[default: fgsm,pgd-100,pgd-100-margin]",
)
@budget_option("Set of attacks, instead of --attacks", default=None)
@click.option(
    "--audit/--no-audit", default=True, show_default=True, help="Audit every run with budget quick."
)
@click.option(
    "--n", type=POSITIVE, default=1000, show_default=True, help="Number of images to judge on."
)
@split_option("Split to judge on; runs selected their weights on the validation images.")
@click.option(
    "--eval-batch-size",
    type=POSITIVE,
    help="Images attacked at a time. [default: 500; 250 in the audit]",
)
@click.option(
    "--format",
    "style",
    type=click.Choice(["terminal", "md", "csv", "latex"]),
    default="terminal",
    show_default=True,
    help="Format of the table on stdout.",
)
@json_option
@config_options(_TRAINING)
def compare(
    folders: tuple[str, ...],
    methods: str | None,
    seeds: str | None,
    out: str | None,
    preset: str | None,
    attacks: str | None,
    budget: str | None,
    audit: bool,
    n: int,
    split: str,
    eval_batch_size: int | None,
    style: str,
    json_file: str | None,
    **options: Any,
) -> None:
    """Train the methods named by --methods with several seeds each and judge them the same way, or
    judge the given run folders.

    Runs are trained one after another into DIR/<method>-seed<k>, each in its own process, then
    evaluated and audited. A stopped comparison continues when it is rerun with the same --out. The
    table has one row per method: mean and standard deviation over the seeds.

    \b
    Examples:
      surestep compare --methods fgsm,sat-r1,sat-r2 --preset mnist-fast --out table
      surestep compare --methods sat-r1,sat-r2,pgd --preset cifar10-speed --out table
      surestep compare runs/one runs/two --budget standard --format md
    """
    settings = given(options)
    _check(folders, methods, out, {**settings, "preset": preset, "seeds": seeds})
    check_writable(json_file)
    if not folders and out is None:
        out = new_folder("compare")
    chosen = chosen_attacks(attacks, budget)
    counted = _seeds("3" if seeds is None else seeds)

    from surestep import comparing
    from surestep.devices import keep_freed_memory

    keep_freed_memory()  # this process judges all runs
    if style in ("md", "latex"):
        comparing.need_tabulate()  # before the work, not after it
    common: dict[str, Any] = {
        "attacks": chosen,
        "budget": budget,
        "audit": "quick" if audit else None,
        "n": n,
        "split": split,
        "eval_batch_size": eval_batch_size,
        "out": out,
        "tell": _tell,
    }
    if folders:
        found = comparing.compare_runs(folders, **common, **settings)
    else:
        found = comparing.compare(
            names(methods or ""), counted, preset=preset, **common, **settings
        )
    made = provenance()

    def save() -> None:
        if out is not None:
            comparing.save(found, out, **made, tell=_tell)

    hand_over({**found.to_dict(), **made}, json_file, partial(_show, found, style), save)
    _end(found)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _check(
    folders: tuple[str, ...], methods: str | None, out: str | None, training: dict[str, Any]
) -> None:
    """Check that the options fit together: a comparison trains methods or judges run folders."""
    if folders and methods is not None:
        raise UserError("give run folders or --methods, not both")
    if not folders and methods is None:
        raise UserError("there is nothing to compare: give --methods A,B, or run folders")
    extra = [k for k, v in training.items() if v is not None and k != "device"]
    if folders and extra:
        named = ", ".join("--" + name.replace("_", "-") for name in extra)
        raise UserError(f"run folders are trained already: leave out {named}, or give --methods")


def _seeds(text: str) -> int | list[int]:
    """Read "3" as the number of seeds, and "3,5" as a list of seeds."""
    found = numbers("--seeds", text, "a number of seeds (3) or a list (0,5,7)", int)
    return found if "," in text else found[0]


def _show(found: Comparison, style: str) -> None:
    if style == "terminal":
        _table(found)
    else:
        text = {"md": found.to_markdown, "csv": found.to_csv, "latex": found.to_latex}[style]()
        click.echo(text, nl=False)


def _table(found: Comparison) -> None:
    from rich.table import Table
    from rich.text import Text

    from surestep.report.columns import alignment

    titles, body = found.table()
    # Text shows names literally, without reading markup in them.
    table = Table(title=Text(found.title))
    for title in titles:
        table.add_column(title, justify=alignment(title), overflow="fold")
    for row, texts in zip(found.rows, body, strict=True):
        cells = [Text(text or "–") for text in texts]
        if row.verdict is not None:
            cells[titles.index("verdict")].stylize(verdicts.colour(row.verdict))
        table.add_row(*cells)
    console = wide_console(200)
    console.print(table)
    for note in found.notes:
        console.print(Text(note))


def _end(found: Comparison) -> None:
    """Exit with an error if a run failed, after the results of the others are written."""
    if not found.failures:
        return
    first = found.failures[0]
    count = f"{len(found.failures)} of {len(found.failures) + len(found.runs)} runs failed"
    message = f"{count}; {first.run}: {first.message}"
    if any(failure.fault for failure in found.failures):
        _tell(f"{ERROR}{message}")
        sys.exit(1)
    raise UserError(message)
