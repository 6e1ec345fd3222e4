"""Checkpoints of a run: written atomically, never unpickled; the last two are kept."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from surestep import files
from surestep.errors import UserError

_KEPT = 2


def save(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write a checkpoint, then remove all but the newest two, and what a kill left of others.

    Raises:
        UserError: the disk is full or the file cannot be written.
    """
    files.make_folder(folder)
    files.save_tree(folder / f"step-{step:08d}.safetensors", state)
    # The run's lock is held, so nobody else is writing these.
    for old in (*found(folder)[:-_KEPT], *folder.glob(".step-*.part")):
        with contextlib.suppress(OSError):  # such as while another program reads it
            old.unlink()


def found(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, oldest first."""
    return sorted(p for p in folder.glob("step-*.safetensors") if re.match(r"step-\d+\.", p.name))


def newest_step(folder: Path) -> int | None:
    """Return the step of the newest checkpoint; None if there is none."""
    paths = found(folder)
    return int(paths[-1].stem.removeprefix("step-")) if paths else None


def load_newest(folder: Path, say: Callable[[str], None]) -> dict[str, Any] | None:
    """Load the newest checkpoint that is whole; None if there is none at all.

    Args:
        folder: folder of the checkpoints.
        say: called with a message for each damaged checkpoint that is skipped.

    Raises:
        UserError: there are checkpoints, but all are damaged.
    """
    paths = found(folder)
    for path in reversed(paths):
        try:
            return files.load_tree(path)
        except UserError as e:
            say(f"skipping a damaged checkpoint: {e}")
    if paths:
        raise UserError(
            f"every checkpoint in {folder} is damaged ({len(paths)} found): start the run again "
            "with --overwrite"
        )
    return None
