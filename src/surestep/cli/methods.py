"""``surestep methods``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from surestep.cli._options import hand_over, json_option
from surestep.cli._show import wide_console
from surestep.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from surestep.methods import Preset


@click.command(
    short_help="List the methods, show a method's card, or start a new method.",
    options_metavar="[NAME | new NAME] [OPTIONS]",
)
@click.argument("name", required=False, metavar="")
@click.argument("new_name", required=False, metavar="")
@click.option("--dir", "where", default=".", help="Where `new` writes. [default: here]")
@json_option
def methods(name: str | None, new_name: str | None, where: str, json_file: str | None) -> None:
    """List the training methods with their cost, show one's card and presets, or start a new one.

    `new NAME` writes the start of a method: its file, card and test, all of which work as they are.
    In a checkout of surestep they go where they belong; elsewhere they form a plug-in package that
    surestep finds once it is installed.

    The cost is the number of passes per image in a step at batch size 128 (forward, input gradient
    and weight gradient are about equal work); standard training takes 3.
    """
    from rich.console import Console
    from rich.markdown import Markdown
    from rich.table import Table

    import surestep.methods as zoo
    from surestep import scaffold

    console = Console()
    if name == "new":
        if new_name is None:
            raise UserError("the new method needs a name: surestep methods new NAME")
        made = [str(path) for path in scaffold.method(new_name, where)]
        use = f"surestep methods {new_name}"
        # Only a plug-in package has one; in a checkout the docs list the method.
        if projects := [path for path in made if path.endswith("pyproject.toml")]:
            then = f"pip install -e {Path(projects[0]).parent}; {use}"
        else:
            then = f"{use}; python docs/methods.py (updates the docs)"
            if Path(zoo.__file__).parent.resolve() != Path(made[0]).parent.resolve():
                then = f"pip install -e . (surestep is installed elsewhere); {then}"
        lines = [*made, f"fill it in; then: {then}"]
        told = {"name": new_name, "files": made}
        return hand_over(told, json_file, partial(click.echo, "\n".join(lines)))
    if new_name is not None:
        raise UserError(f"{name!r} {new_name!r}: give one method, or `new` and a name")
    if name is not None:
        text, presets = zoo.card(name), zoo.get(name).presets

        def show_card() -> None:
            console.print(Markdown(text)) if console.is_terminal else click.echo(text)
            if presets:
                wide_console(160).print(_recipes(presets))

        whole = {k: asdict(preset) for k, preset in presets.items()}
        return hand_over({"name": name, "card": text, "presets": whole}, json_file, show_card)
    rows = zoo.overview()

    def show() -> None:
        table = Table(box=None, header_style="bold")
        for column in ("method", "passes", "what a step does", "presets"):
            table.add_column(column, justify="right" if column == "passes" else "left")
        for row in rows:
            presets = ", ".join(row["presets"])
            passes = f"{row['passes']:.3g}" if row["passes"] else "–"
            table.add_row(row["name"], passes, row["summary"], presets)
        console.print(table)
        console.print("\n`surestep methods NAME` shows a method's card.", highlight=False)

    return hand_over(rows, json_file, show)


def _recipes(presets: Mapping[str, Preset]) -> Table:
    """Return a table of what presets train, and how."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", title="presets", title_justify="left")
    for column in ("preset", "network", "eps", "training", "source"):
        table.add_column(column, overflow="fold")
    for name, preset in presets.items():
        settings = {**preset.settings, **preset.params}
        training = ", ".join(
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in settings.items()
        )
        table.add_row(name, preset.model, f"{preset.eps:.4g}", training, preset.source)
    return table
