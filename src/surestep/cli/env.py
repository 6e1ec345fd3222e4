"""``surestep env``."""

from __future__ import annotations

from typing import Any

import click

from surestep.cli._options import hand_over, json_option
from surestep.errors import UserError


@click.command(short_help="Describe this machine and installation, for bug reports.")
@json_option
def env(json_file: str | None) -> None:
    """Describe this machine and installation, for bug reports."""
    from surestep import environment
    from surestep.devices import pick_device
    from surestep.training import Engine

    try:
        device = pick_device()
    except UserError as e:  # a GPU that is there but fails: what a report may be about
        found = {"device": str(e)}
    else:
        engine = Engine.choose(device=device)
        memory = "channels_last" if engine.channels_last else "contiguous"
        precision = str(engine.precision).removeprefix("torch.")
        found = {"device": str(device), "engine": f"{precision}, {memory}"}
    facts: dict[str, Any] = {**environment.describe(), **found}

    def show() -> None:
        for key, value in facts.items():
            click.echo(f"{key:15} {value}")

    hand_over(facts, json_file, show)
