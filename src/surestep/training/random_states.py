"""The random states of all processes of a run, for its checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import gather_object

from surestep import processes
from surestep.randomness import rng_state, seed_everything, seed_of, set_rng_state


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
