"""ELLE and ELLE-A: the loss must be linear between two points of the ball.

Abad Rocamora et al. 2024, "Efficient Local Linearity Regularization to Overcome Catastrophic
Overfitting", ICLR, arXiv 2401.11618.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surestep import processes
from surestep.attacks.losses import cross_entropy
from surestep.methods._base import Cost, Terms, Update, register
from surestep.methods._presets import CIFAR_ZOO, MNIST_ZOO, recipe
from surestep.methods.fgsm import OnSingleStep


@register("elle")
@dataclass
class ELLE(OnSingleStep):
    """ELLE: plus lam times the squared gap between the loss and its chord at a random point."""

    summary = "FGSM; the loss must lie on the chord between two random points"
    paper = "Abad Rocamora et al. 2024, arXiv 2401.11618"
    presets = {
        "mnist": recipe(MNIST_ZOO, lam=1.0, source="ours: benchmarks/leaderboard.py"),
        "cifar10": recipe(CIFAR_ZOO, lam=1000.0),
    }

    lam: float = 1000.0
    perturbation: str = "fgsm"

    def validate(self) -> None:
        """Check the weight."""
        super().validate()
        self.not_negative("lam")

    def weight(self, gap: Tensor) -> Tensor | float:
        """Return lam; ``gap`` is this step's, detached."""
        return self.lam

    def craft(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor | None) -> Update:
        """Take x_adv, two random points and one between them through the update."""
        x_adv = self.base.perturb(model, x, y)
        a, b = x + self.threat.random_delta(x), x + self.threat.random_delta(x)
        share = torch.rand(len(x), *[1] * (x.dim() - 1), dtype=x.dtype, device=x.device)
        points = torch.cat([x_adv, a, b, torch.lerp(a, b, share)])

        def loss(logits: Tensor) -> Terms:
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
        "mnist": recipe(MNIST_ZOO, lam=4.0, source="ours: benchmarks/leaderboard.py"),
        "cifar10": recipe(CIFAR_ZOO, lam=4000.0),
    }

    lam: float = 4000.0
    decay: float = 0.99

    kept = ("_history",)

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
