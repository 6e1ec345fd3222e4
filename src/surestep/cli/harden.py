"""``surestep harden``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from surestep.cli._options import (
    check_writable,
    device_option,
    hand_over,
    json_option,
    names,
    numbers,
    seed_option,
)
from surestep.cli._show import share_of_images, wide_console
from surestep.cli._target import POSITIVE, split_option
from surestep.errors import UserError

_SAME_IMAGES = "; optimistic: the threshold was chosen on the same split"


@click.command(short_help="Harden a trained run (MeanSparse) and judge it before and after.")
@click.argument("run", metavar="RUN")
@click.option(
    "--mean-sparse", is_flag=True, help="Replace activations near their channel's mean by the mean."
)
@click.option(
    "--threshold",
    metavar="T,...",
    help="Thresholds to try, in standard deviations; 0 is always tried. [default: 0.05 to 0.4]",
)
@click.option(
    "--attacks",
    metavar="A,B,...",
    help="Attacks of the threshold search and of the final evaluation. "
    "[default: apgd-ce,pgd-50-margin,square-1000; in the evaluation also transfer, from RUN]",
)
@click.option(
    "--n-search",
    type=POSITIVE,
    default=500,
    show_default=True,
    help="Number of validation images for the search.",
)
@click.option(
    "--n", type=POSITIVE, default=1000, show_default=True, help="Number of images to judge on."
)
@split_option("Split to judge on; the threshold is chosen on the validation images.")
@click.option("--out", metavar="RUN", help="Folder of the hardened run. [default: RUN-hardened]")
@click.option("--overwrite", is_flag=True, help="Replace that folder if it exists.")
@seed_option("Random seed of the attacks.")
@click.option(
    "--batch-size", type=POSITIVE, default=500, show_default=True, help="Images attacked at a time."
)
@device_option
@json_option
def harden(
    run: str,
    mean_sparse: bool,
    threshold: str | None,
    attacks: str | None,
    n_search: int,
    n: int,
    split: str,
    out: str | None,
    overwrite: bool,
    seed: int,
    batch_size: int,
    device: str | None,
    json_file: str | None,
) -> None:
    """Harden the trained model of RUN, and judge it on held-out images before and after.

    Nothing is trained; to train a robust model, see `surestep train` and surestep.fit.

    --mean-sparse sets activations near their channel's mean to the mean (MeanSparse, arXiv
    2406.05927), with the threshold that withstands attacks best on validation images. The result
    masks gradients by construction, so every gradient attack runs twice: with the true gradients
    and with gradients passed straight through (BPDA). The worst case is over all of them.

    \b
    Examples:
      surestep harden runs/one --mean-sparse
      surestep harden runs/one --mean-sparse --threshold 0.2 --out runs/one-sparse
    """
    if not mean_sparse:
        raise UserError("no way of hardening is chosen: add --mean-sparse, the only one so far")
    check_writable(json_file)
    wanted = "standard deviations >= 0, such as 0.1,0.2"
    values = None if threshold is None else numbers("--threshold", threshold, wanted, float)

    from surestep import runs
    from surestep.devices import keep_freed_memory
    from surestep.posthoc import THRESHOLDS

    keep_freed_memory()

    def show(row: dict[str, Any]) -> None:
        # As progress, since the reader of a pipe may leave before the work is done.
        click.echo(
            f"threshold {row['threshold']:g}, on {row['n']} validation images: "
            f"clean {share_of_images(row['clean_accuracy'], row['n'])}, "
            f"worst case {share_of_images(row['worst_case_accuracy'], row['n'])}",
            err=True,
        )

    folder = out or _default_out(run)
    found = runs.harden(
        run,
        folder,
        thresholds=values or THRESHOLDS,
        attacks=names(attacks) if attacks else None,
        n_search=n_search,
        n=n,
        split=split,
        seed=seed,
        batch_size=batch_size,
        device=device,
        overwrite=overwrite,
        progress=show,
        tell=partial(click.echo, err=True),
    )
    hand_over(found, json_file, partial(_tables, found, folder))


def _tables(found: dict[str, Any], folder: str) -> None:
    """Print the accuracies before and after, and the gain."""
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    table.add_column("", overflow="fold")
    for name in ("before", "after"):
        table.add_column(name, justify="right", overflow="fold")
    shares = {
        name: {
            "clean": found[name]["clean_accuracy"],
            "worst case": found[name]["worst_case_accuracy"],
            **found[name]["robust_accuracy"],
        }
        for name in ("before", "after")
    }
    for row in shares["after"]:  # it has attacks more: those with straight-through gradients
        told = (
            share_of_images(shares[name][row], found[name]["n"]) if row in shares[name] else ""
            for name in shares
        )
        table.add_row(row, *told)
    console = wide_console(80)
    console.print(table)
    gain = 100 * (found["after"]["worst_case_accuracy"] - found["before"]["worst_case_accuracy"])
    console.print(
        # + 0.0 turns a rounded -0.0 into 0.0.
        f"threshold {found['threshold']:g}, worst case {round(gain, 1) + 0.0:+.1f} points on "
        f"{found['after']['n']} {found['split']} images ({found['saved']} saved, "
        f"{found['lost']} lost)"
        + (": no threshold helped" if found["threshold"] == 0 else "")
        + (_SAME_IMAGES if found["split"] == "validation" else "")
        + f"\nwritten to {folder}; audit it: surestep audit {folder}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _default_out(run: str) -> str:
    """Return the default --out, next to the run."""
    folder = Path(run)
    if folder.name in ("", ".."):  # paths without a last name, such as "."
        folder = folder.resolve()
    return str(folder.parent / f"{folder.name}-hardened")
