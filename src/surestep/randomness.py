"""The random states of python, numpy, torch and the devices: kept, set and seeded.

Also generators that depend only on the numbers and words they are named by.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

_Host = tuple[Any, Any, Tensor]
"""The states of python, numpy and torch on the CPU, as each of them returns its own."""


def _read() -> _Host:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002


def _write(python: Any, numpy: Any, cpu: Tensor) -> None:
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002
    torch.set_rng_state(cpu)


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch: a model may draw from any of them."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        # torch.manual_seed would format the call stack three times, for devices that may come yet:
        # one to three milliseconds, as long as a pass of a small network.
        torch.default_generator.manual_seed(seed)


@contextmanager
def forked_rng(device: torch.device) -> Iterator[None]:
    """Restore the random states of python, numpy, torch and the device on exit.

    Inside the block, ``torch.manual_seed`` seeds every device.
    """
    host = _read()
    # torch's fork_rng addresses devices by their index, which mps does not have.
    state = torch.mps.get_rng_state() if device.type == "mps" else None
    used = torch.cuda.is_initialized() or device.type == "cuda"
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count()) if used else []):
            yield
    finally:
        _write(*host)
        if state is not None:
            torch.mps.set_rng_state(state)


def rng_state(device: torch.device) -> dict[str, Any]:
    """Return the random state of every library a step on ``device`` may draw from.

    It is made of tensors and plain values, for a file.
    """
    (version, numbers, normal), (kind, keys, *rest), cpu = _read()
    return {
        "python": (version, torch.tensor(numbers), normal),
        "numpy": (str(kind), torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": cpu,
        "cuda": [torch.cuda.get_rng_state(device)] if device.type == "cuda" else [],
        "mps": [torch.mps.get_rng_state()] if torch.backends.mps.is_available() else [],
    }


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore what ``rng_state`` returned, on a device whose index may have changed."""
    (version, numbers, normal), (kind, keys, *rest) = state["python"], state["numpy"]
    python = version, tuple(numbers.tolist()), normal
    _write(python, (kind, keys.numpy().astype(np.uint32), *rest), state["torch"])
    if state["cuda"] and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"][0], device)
    if state["mps"] and torch.backends.mps.is_available():
        torch.mps.set_rng_state(*state["mps"])


class OwnRandom:
    """A random state of python, numpy and torch (on the CPU), separate from the process's.

    Args:
        seed: seed of this state.
    """

    def __init__(self, seed: int) -> None:
        self._state: _Host = (
            random.Random(seed).getstate(),
            np.random.RandomState(seed % 2**32).get_state(),
            torch.Generator().manual_seed(seed).get_state(),
        )

    @contextmanager
    def used(self) -> Iterator[None]:
        """Inside the block, draw from this state instead of the process's."""
        before = _read()
        _write(*self._state)
        try:
            yield
        finally:
            self._state = _read()
            _write(*before)


def generator(*words: int | str) -> torch.Generator:
    """Return a CPU generator seeded from a hash of ``words``.

    With ``seed + epoch``, run 0 at epoch 1 would repeat the draws of run 1 at epoch 0; and the two
    cannot be packed side by side, since PyTorch's CPU generator keeps only the low 32 bits of its
    seed. A hash (BLAKE2b of the words) avoids such collisions and is the same on every platform
    and Python version.
    """
    return torch.Generator().manual_seed(seed_of(*words))


def seed_of(*words: int | str) -> int:
    """Return 32 bits of a hash of ``words``."""
    digest = hashlib.blake2b(repr(words).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")
