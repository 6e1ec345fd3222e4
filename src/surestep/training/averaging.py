"""Averages of the weights: exponential (bias-corrected) or plain."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surestep.attacks.lending import copy_all
from surestep.errors import UserError


class WeightAverage:
    """Keep an average of a model's parameters and running statistics; other buffers are copied.

    After t updates the average is sum_i d^(t-i) w_i / sum_i d^(t-i): the mean of the weights seen,
    however high the decay d (Adam's bias correction). An average that starts at the random
    initial weights would stay near them for about 1 / (1 - d) steps.

    Args:
        model: the module whose weights are averaged.
        decay: d, in (0, 1); None for the plain mean (SWA, Izmailov et al. 2018, arXiv 1803.05407).

    Attributes:
        updates: how many times weights were added; until the first, ``model`` has those of the
            start.
        model: a copy of the module, with the averaged weights.

    Raises:
        UserError: the model cannot be copied.
    """

    def __init__(self, model: nn.Module, decay: float | None) -> None:
        self.decay = decay
        self.updates = 0
        try:
            self.model = copy.deepcopy(model).requires_grad_(False)
        except Exception as e:
            reason = " ".join(str(e).split())[:200]
            raise UserError(
                "averaging the weights needs a copy of the model, but it cannot be copied "
                f"({reason}): leave ema and swa out"
            ) from e

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Add the model's current weights to the average."""
        self.updates += 1
        share = 1 / self.updates
        if self.decay is not None:
            share = (1 - self.decay) / (1 - self.decay**self.updates)
        averaged: list[tuple[Tensor, Tensor]] = [
            *zip(self.model.parameters(), model.parameters(), strict=True)
        ]
        # Batch norm's statistics are moving averages over about the last ten steps. An average of
        # the weights reaches further back, so the statistics are averaged, too. Other buffers, such
        # as an attention mask of -inf, have no mean.
        copied: list[tuple[Tensor, Tensor]] = []
        named = self.model.named_buffers()
        for (name, own), buffer in zip(named, model.buffers(), strict=True):
            mean = name.endswith(("running_mean", "running_var"))
            (averaged if mean else copied).append((own, buffer))
        # One fused operation for hundreds of small tensors, where the device has one.
        means, now = (list(side) for side in zip(*averaged, strict=True))
        torch._foreach_lerp_(means, now, share)
        copy_all([own for own, _ in copied], [buffer for _, buffer in copied])

    def state_dict(self) -> dict[str, Any]:
        """Return the average and the number of updates."""
        return {"updates": self.updates, "model": self.model.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.updates = state["updates"]
        self.model.load_state_dict(state["model"])
