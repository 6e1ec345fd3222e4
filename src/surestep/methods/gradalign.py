"""GradAlign: the input gradient must keep its direction within the ball.

Andriushchenko & Flammarion 2020, "Understanding and Improving Fast Adversarial Training", arXiv
2007.02617.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surestep.attacks.gradients import attack_gradient
from surestep.attacks.losses import cross_entropy
from surestep.methods._base import Cost, LossAndTerms, Update
from surestep.methods._hyperparameters import param
from surestep.methods._presets import CIFAR_ZOO, MNIST_ZOO, recipe
from surestep.methods._registry import register
from surestep.methods._single_step import OnSingleStep

_PAPER: dict[str, Any] = {
    "settings": {"lr": 0.3},
    "source": "Andriushchenko & Flammarion 2020 (they use PreActResNet-18)",
}


def unit(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return each sample's unit gradient (N, D), and which gradients are not zero (N,)."""
    flat = grad.flatten(1)
    # Gradients of confident networks are so small that their squares underflow.
    scale = flat.detach().abs().amax(1, keepdim=True)
    there = (scale > 0).squeeze(1)
    # Scaled ones are at least 1 long, or 0: there eps keeps the derivative finite.
    return F.normalize(flat / torch.where(scale > 0, scale, 1), dim=1, eps=0.1), there


@register("gradalign")
@dataclass
class GradAlign(OnSingleStep):
    """GradAlign: adds lam * (1 - cos) of the gradients at the image and at a random point."""

    summary = "FGSM; the input gradients at the image and beside it must align"
    paper = "Andriushchenko & Flammarion 2020, arXiv 2007.02617"
    presets = {
        "mnist": recipe(MNIST_ZOO, lam=0.2, perturbation="rs-fgsm", source="ours: search.csv"),
        "cifar10": recipe(CIFAR_ZOO, lam=0.2, **_PAPER),
        "cifar10-16": recipe(CIFAR_ZOO, eps=16 / 255, lam=2.0, **_PAPER),
    }

    second_order = True

    lam: float = param(0.2, ge=0)
    perturbation: str = "fgsm"

    def craft(self, model: nn.Module, x: Tensor, y: Tensor) -> Update:
        """Differentiate only the second gradient again, as the authors do."""
        n, x_adv = len(x), self.base.perturb(model, x, y)
        grad, _ = attack_gradient(model, x, y, cross_entropy, train_mode=True)
        here, there = unit(grad)
        points = torch.cat([x_adv, x + self.threat.random_delta(x)]).requires_grad_()

        def loss(logits: Tensor) -> LossAndTerms:
            ce, beside = self.criterion(logits[:n], y), cross_entropy(logits[n:], y).sum()
            (grad,) = torch.autograd.grad(beside, points, create_graph=True)
            other, too = unit(grad[n:])
            both = (there & too).to(ce.dtype)
            turn = ((1 - (here * other).sum(1)) * both).sum() / both.sum().clamp(min=1)
            return ce + self.lam * turn, {"ce": ce, "turn": turn}

        return Update(points, loss, slice(n))

    def cost(self, batch_size: int) -> Cost:
        """One more gradient; that of the second view is differentiated again in the update."""
        g = self.base.gradients + 1
        return Cost(g + 2, g + 4, 2)
