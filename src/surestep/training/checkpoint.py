"""Checkpoints of a run: written whole, the last two kept, never unpickled."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from surestep import files
from surestep.errors import UserError

_KEPT = 2


def rng_state(device: torch.device) -> dict[str, Any]:
    """Return the random state of every library a step on ``device`` may draw from."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (str(kind), [int(k) for k in keys], position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(device)] if device.type == "cuda" else [],
        "mps": [torch.mps.get_rng_state()] if torch.backends.mps.is_available() else [],
    }


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore what ``rng_state`` returned, on a device that may have another number now."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] and device.type == "cuda":
        # Checkpoints of older versions have the states of all devices.
        own = min(device.index or 0, len(state["cuda"]) - 1)
        torch.cuda.set_rng_state(state["cuda"][own], device)
    # Checkpoints of older versions lack it.
    if state.get("mps") and torch.backends.mps.is_available():
        torch.mps.set_rng_state(*state["mps"])


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)


class OwnRandom:
    """A random state of python, numpy and torch on the CPU that is not the process's.

    Args:
        seed: of it.
    """

    def __init__(self, seed: int) -> None:
        self._state = (
            random.Random(seed).getstate(),
            np.random.RandomState(seed % 2**32).get_state(),
            torch.Generator().manual_seed(seed).get_state(),
        )

    @contextmanager
    def used(self) -> Iterator[None]:
        """Draw from this state, not from the process's, meanwhile."""
        before = self._read()
        self._write(*self._state)
        try:
            yield
        finally:
            self._state = self._read()
            self._write(*before)

    @staticmethod
    def _read() -> tuple[Any, Any, torch.Tensor]:
        return random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002

    @staticmethod
    def _write(python: Any, numpy: Any, cpu: torch.Tensor) -> None:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write a checkpoint, then remove all but the newest two.

    Raises:
        UserError: the disk is full or the place cannot be written to.
    """
    files.make_folder(folder)
    path = folder / f"step-{step:08d}.safetensors"
    files.save_tree(path, state)
    for old in found(folder)[:-_KEPT]:
        old.unlink(missing_ok=True)
    return path


def found(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, oldest first."""
    return sorted(p for p in folder.glob("step-*.safetensors") if re.match(r"step-\d+\.", p.name))


def load_newest(folder: Path, warn: Callable[[str], None]) -> dict[str, Any] | None:
    """Load the newest checkpoint that is whole; None if there is none at all.

    Args:
        folder: of the checkpoints.
        warn: told about each damaged checkpoint that is passed over.

    Raises:
        UserError: there are checkpoints, but all are damaged.
    """
    paths = found(folder)
    for path in reversed(paths):
        try:
            return files.load_tree(path)
        except UserError as e:
            warn(f"passing over a damaged checkpoint: {e}")
    if paths:
        raise UserError(
            f"every checkpoint in {folder} is damaged ({len(paths)} found): start the run again "
            "with --overwrite"
        )
    return None
