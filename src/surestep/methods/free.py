"""Free adversarial training: one backward pass serves the weights and the perturbation.

Shafahi et al. 2019, "Adversarial Training for Free!", arXiv 1904.12843.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surestep.methods._base import Cost, LossAndTerms, Method, Update
from surestep.methods._hyperparameters import param
from surestep.methods._memory import carried
from surestep.methods._presets import CIFAR_RESNET, MNIST_ZOO, recipe
from surestep.methods._registry import register
from surestep.threat import ThreatModel


@register("free")
@dataclass
class Free(Method):
    """Free-AT: ``replays`` steps on each batch; the perturbation carries over between batches.

    An epoch takes ``replays`` times as many steps, so recipes have fewer epochs.
    """

    summary = "several steps on each batch; one backward pass updates weights and perturbation"
    paper = "Shafahi et al. 2019, arXiv 1904.12843"
    kept_rows = ("_delta",)
    presets = {
        "mnist": recipe(MNIST_ZOO, replays=8, settings={"epochs": 2}),
        "cifar10": recipe(CIFAR_RESNET, replays=8, settings={"epochs": 12}),
    }

    replays: int = param(8, ge=1)

    def set_up(self) -> None:
        """Begin without a perturbation."""
        self._delta = torch.zeros(0)
        self._pending: tuple[ThreatModel, Tensor, Tensor] | None = None

    def craft(self, model: nn.Module, x: Tensor, y: Tensor) -> Update:
        """Apply the current perturbation; it takes its step at the next call, after backward."""
        self._advance()
        last = carried(self._delta, x)
        points = self.threat.project(x if last is None else x + last, x).requires_grad_()
        self._pending, plain = (self.threat, x, points), self.plain_loss(y)

        def loss(logits: Tensor) -> LossAndTerms:
            points.grad = None  # keep only the last of AWP's two passes
            return plain(logits)

        return Update(points, loss)

    def _advance(self) -> None:
        """Step along the gradient that the last backward pass left in ``points.grad``."""
        if self._pending is None:
            return
        (threat, x, points), self._pending = self._pending, None
        moved = points.detach()
        if points.grad is not None:
            # Scaled fp16 gradients may overflow, which must not stay in the perturbation.
            grad = points.grad.nan_to_num(0.0, 0.0, 0.0)
            moved = threat.ascend(moved, grad, threat.eps, x)
        self._delta = moved - x

    def cost(self, batch_size: int) -> Cost:
        """A standard step, whose backward pass also reaches the images."""
        return Cost(1, 1, 1)

    def state_dict(self) -> dict[str, Any]:
        """Return the perturbations after their pending step."""
        self._advance()
        return super().state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the perturbations; a step that was pending is dropped."""
        self._pending = None
        super().load_state_dict(state)
