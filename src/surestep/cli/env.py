"""``surestep env``."""

from __future__ import annotations

from typing import Any

import click

from surestep.cli._options import json_option, write_json


@click.command(short_help="Describe this machine and installation, for bug reports.")
@json_option
def env(json_file: str | None) -> None:
    """Describe this machine and installation, for bug reports."""
    import importlib.metadata
    import os
    import platform

    import torch

    from surestep import __version__
    from surestep.devices import cores, pick_device
    from surestep.training import Engine

    device = pick_device()
    engine = Engine.choose(device=device)
    facts: dict[str, Any] = {
        "surestep": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "usable cores": cores(),
        "torch threads": torch.get_num_threads(),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "device": str(device),
        "engine": f"{str(engine.precision).removeprefix('torch.')}, "
        f"{'channels_last' if engine.channels_last else 'contiguous'}",
    }
    if torch.cuda.is_available():
        facts["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    for name in (
        "torch",
        "accelerate",
        "numpy",
        "safetensors",
        "pydantic",
        "click",
        "rich",
        "timm",
    ):
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = "not installed"
    if json_file != "-":
        for key, value in facts.items():
            click.echo(f"{key:15} {value}")
    write_json(facts, json_file)
