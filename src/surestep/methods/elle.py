"""ELLE and ELLE-A: the loss must be linear between two points of the ball.

Abad Rocamora et al. 2024, "Efficient Local Linearity Regularization to Overcome Catastrophic
Overfitting", ICLR, arXiv 2401.11618.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surestep import processes
from surestep.attacks.losses import cross_entropy
from surestep.methods._base import Cost, Update, register
from surestep.methods._presets import CIFAR_RESNET, MNIST_FAST, recipe
from surestep.methods.fgsm import OnSingleStep

FAST = {"epochs": 30, "lr": 0.2, "schedule": "triangular"}


@register("elle")
@dataclass
class ELLE(OnSingleStep):
    """ELLE: plus lam times the squared gap between the loss and its chord at a random point."""

    summary = "FGSM; the loss must lie on the chord between two random points"
    paper = "Abad Rocamora et al. 2024, arXiv 2401.11618"
    presets = {
        "mnist": recipe(MNIST_FAST, lam=1.0, source="ours: benchmarks/leaderboard.py"),
        "cifar10": recipe(CIFAR_RESNET, lam=1000.0, settings=FAST),
    }

    lam: float = 1000.0
    perturbation: str = "fgsm"

    def validate(self) -> None:
        """Check the weight."""
        super().validate()
        self.require(self.lam >= 0, "lam", ">= 0")

    def weight(self, gap: Tensor) -> Tensor | float:
        """Return lam; ``gap`` is this step's, detached."""
        return self.lam

    def craft(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor | None) -> Update:
        """Take x_adv, two random points and one between them through the update."""
        x_adv = self.base.perturb(model, x, y)
        a, b = x + self.threat.random_delta(x), x + self.threat.random_delta(x)
        share = torch.rand(len(x), *[1] * (x.dim() - 1), dtype=x.dtype, device=x.device)
        points = torch.cat([x_adv, a, b, torch.lerp(a, b, share)])

        def loss(logits: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
            ce = self.criterion(logits[: len(x)], y)
            at_a, at_b, between = cross_entropy(logits[len(x) :], y.repeat(3)).chunk(3)
            gap = (between - torch.lerp(at_a, at_b, share.flatten().to(ce.dtype))).square().mean()
            weight = self.weight(gap.detach())
            return ce + weight * gap, {"ce": ce, "gap": gap}

        return Update(points, loss, slice(len(x)))

    def cost(self, batch_size: int) -> Cost:
        """One perturbation; four points in the update."""
        return Cost.of(attack=self.gradients, update=4)


@register("elle-a")
@dataclass
class ELLEA(ELLE):
    """ELLE-A: lam is off until the gap leaps, to ``lam``, and decays from there."""

    summary = "ELLE that switches itself on when linearity is lost"
    presets = {
        "mnist": recipe(MNIST_FAST, lam=4.0, source="ours: benchmarks/leaderboard.py"),
        "cifar10": recipe(CIFAR_RESNET, lam=4000.0, settings=FAST),
    }

    lam: float = 4000.0
    decay: float = 0.99

    def validate(self) -> None:
        """Check the decay."""
        super().validate()
        self.require(0 <= self.decay < 1, "decay", "in [0, 1)")
        # Number, mean and sum of squares of the gaps so far, and lam now.
        self._history = torch.zeros(4, dtype=torch.float64)

    def weight(self, gap: Tensor) -> Tensor:
        """Return the full weight where the gap is above mean + 2 std of those before it."""
        dtype, gap = gap.dtype, processes.mean(gap).double()
        n, mean, squares, lam = self._history.to(gap.device)
        std = (squares / n.clamp(min=1)).sqrt()
        leapt = (n > 0) & (gap > mean + 2 * std)
        lam = torch.where(leapt, self.lam, lam * self.decay)
        off = gap - mean
        mean = mean + off / (n + 1)
        self._history = torch.stack([n + 1, mean, squares + off * (gap - mean), lam])
        return lam.to(dtype)

    def state_dict(self) -> dict[str, Any]:
        """Return the history of gaps and the present weight."""
        return {"history": self._history}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self._history = state["history"].clone()
