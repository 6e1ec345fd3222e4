"""Any classifier, behind the interface that attacks expect."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from surestep.attacks.inputs import forward_logits, reason_of
from surestep.attacks.lending import unwrapped
from surestep.devices import out_of_memory
from surestep.errors import UserError
from surestep.randomness import forked_rng, seed_everything

# Two seeds that no model is likely to use itself.
_SEEDS = 778_012_351, 1_903_118_207


class Adapted(nn.Module):
    """Wrap a model: pixels in the threat model's range in, logits (N, K) in float32 out.

    Images are preprocessed as declared and cast to the dtype of the model's weights; logits are
    taken from a tuple or a dict; an exception in the model becomes one line.

    Attacks draw from the same global random generators as the model. If the model seeds some of
    them in its forward, which the first pass in eval mode finds out, each pass leaves these as
    they were: otherwise every restart and every random point of an attack would be the same.

    Args:
        model: any classifier; of a DistributedDataParallel one the module inside is taken, since
            a process that judges must not wait for the others.
        preprocess: applied to the pixels first, such as ``models.Normalize(mean, std)`` for a
            model that expects normalised images.

    Attributes:
        seeds: the generators that the model seeds ("python", "numpy", "torch", "cuda", "mps");
            None until the first pass in eval mode.
    """

    def __init__(self, model: nn.Module, preprocess: nn.Module | None = None) -> None:
        super().__init__()
        self.model = unwrapped(model)
        self.preprocess = preprocess
        self.seeds: tuple[str, ...] | None = None
        # The same mode as the model: whoever restores modes must not find one it did not set.
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, K).

        Raises:
            UserError: the model raises, or returns no logits.
        """
        try:
            if self.seeds is None and not self.training:
                self.seeds = _seeded_by(partial(self._logits, x[:1]), x.device)
            if not self.seeds:
                return self._logits(x)
            with _left_alone(self.seeds, x.device):
                return self._logits(x)
        except Exception as e:
            if isinstance(e, UserError) or out_of_memory(e):
                raise
            raise UserError(
                f"the model fails on one batch of shape {tuple(x.shape)} and type {x.dtype}: "
                f"{type(e).__name__} {reason_of(e)}".rstrip()
            ) from e

    def _logits(self, x: Tensor) -> Tensor:
        weight = next((p for p in self.model.parameters() if p.is_floating_point()), None)
        z = x if self.preprocess is None else self.preprocess(x)
        if weight is not None and weight.dtype != z.dtype:
            z = z.to(weight.dtype)
        return forward_logits(self.model, z)


def seeds_of(model: nn.Module) -> list[str]:
    """Return the random generators that the adapted models in ``model`` seed in their forward."""
    adapted = (module for module in model.modules() if isinstance(module, Adapted))
    return sorted({name for module in adapted for name in module.seeds or ()})


@torch.no_grad()
def _seeded_by(look: Callable[[], object], device: torch.device) -> tuple[str, ...]:
    """Return the random generators that ``look``, a pass of a model, seeds.

    Passes that begin with different seeds leave such a generator in the same state.
    """

    def drawn(seed: int, *passes: Callable[[], object]) -> dict[str, float]:
        seed_everything(seed)
        for run in passes:
            run()
        numbers = {
            "python": random.random(),
            "numpy": np.random.random(),  # noqa: NPY002
            "torch": float(torch.randint(2**53, ())),
        }
        if device.type != "cpu":
            numbers[device.type] = float(torch.randint(2**31, (), device=device))
        return numbers

    one, other = _SEEDS
    with forked_rng(device):
        first = drawn(one, look)
        if first == drawn(one):  # most models neither draw nor seed: one pass is enough
            return ()
        second = drawn(other, look)
    return tuple(name for name, number in first.items() if number == second[name])


@contextmanager
def _left_alone(generators: tuple[str, ...], device: torch.device) -> Iterator[None]:
    """Leave these random generators as they were; the others advance by what is drawn."""
    known: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
        "python": (random.getstate, random.setstate),
        "numpy": (np.random.get_state, np.random.set_state),
        "torch": (torch.get_rng_state, torch.set_rng_state),
        "cuda": (
            partial(torch.cuda.get_rng_state, device),
            partial(torch.cuda.set_rng_state, device=device),
        ),
        "mps": (torch.mps.get_rng_state, torch.mps.set_rng_state),
    }
    before = [(known[name][1], known[name][0]()) for name in generators]
    try:
        yield
    finally:
        for restore, state in before:
            restore(state)
