"""Random states of everything a step may draw from, in every process of a run."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object

from surestep import processes
from surestep.attacks.lending import seed_everything
from surestep.data import seed_of


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
    """Restore what ``rng_state`` returned, on a device whose index may have changed."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
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
        self._state = (
            random.Random(seed).getstate(),
            np.random.RandomState(seed % 2**32).get_state(),
            torch.Generator().manual_seed(seed).get_state(),
        )

    @contextmanager
    def used(self) -> Iterator[None]:
        """Inside the block, draw from this state instead of the process's."""
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


class RandomStates:
    """The random states of a run's processes, each of which draws its own numbers.

    Args:
        device: the device of this process.
        seed: the seed of the run.
        generators: returns the current generators of a DataLoader and its samplers.
    """

    def __init__(
        self,
        device: torch.device,
        seed: int,
        generators: Callable[[], list[torch.Generator]],
    ) -> None:
        self.device, self.seed, self.generators = device, seed, generators

    def read(self) -> dict[str, Any]:
        """Return this process's random state."""
        loader = [generator.get_state() for generator in self.generators()]
        return {**rng_state(self.device), "loader": loader}

    def write(self, state: dict[str, Any]) -> None:
        """Restore what ``read`` returned."""
        set_rng_state(state, self.device)
        for generator, value in zip(self.generators(), state["loader"], strict=True):
            generator.set_state(value)

    def of_all(self) -> list[dict[str, Any]]:
        """Return the random states of all processes; every process must call this."""
        return gather_object([self.read()])

    def restore(self, states: list[dict[str, Any]], step: int) -> None:
        """Restore this process's state; seed what another number of processes did not have."""
        rank = processes.rank()
        if len(states) == processes.world_size():
            self.write(states[rank])
            return
        if rank < len(states):
            set_rng_state(states[rank], self.device)
        else:
            seed_everything(seed_of("process", self.seed, rank, step))
        # Accelerate gives a sampler a generator, alike in all processes, only if there are several.
        for generator in self.generators():
            generator.manual_seed(seed_of("loader", self.seed, step))
