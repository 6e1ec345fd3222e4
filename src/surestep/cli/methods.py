"""``surestep methods``."""

from __future__ import annotations

from typing import Any

import click

from surestep.cli._options import json_option, write_json


@click.command(short_help="List the training methods, or show the card of one.")
@click.argument("name", required=False)
@json_option
def methods(name: str | None, json_file: str | None) -> None:
    """List the training methods with their cost, or show the card of the method NAME.

    The cost counts passes per image of a step at batch size 128 (forward, input gradient and
    weight gradient are about equal work); standard training takes 3.
    """
    from rich.console import Console
    from rich.markdown import Markdown
    from rich.table import Table

    import surestep.methods as zoo
    from surestep.threat import Linf

    console = Console()
    if name is not None:
        text = zoo.card(name)
        if json_file is None:
            console.print(Markdown(text)) if console.is_terminal else click.echo(text)
        write_json({"name": name, "card": text}, json_file)
        return
    rows: list[dict[str, Any]] = []
    for slug in zoo.names():
        cls = zoo.get(slug)
        cost = cls(Linf(0.3)).cost(128)
        rows.append(
            {
                "name": slug,
                "summary": cls.summary,
                "paper": cls.paper,
                "passes": cost.total,
                "presets": list(cls.presets),
            }
        )
    rows.sort(key=lambda row: (row["passes"], row["name"]))
    if json_file != "-":
        table = Table(box=None, header_style="bold")
        for column in ("method", "passes", "what a step does", "presets"):
            table.add_column(column, justify="right" if column == "passes" else "left")
        for row in rows:
            presets = ", ".join(row["presets"])
            table.add_row(row["name"], f"{row['passes']:.3g}", row["summary"], presets)
        console.print(table)
        console.print("\n`surestep methods NAME` shows the card of one.", highlight=False)
    write_json(rows, json_file)
