"""R-MGM, the predecessor of SAT-R2, by the same authors (Vivek et al. 2019, CVPRW)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surestep.attacks.gradients import attack_gradient
from surestep.methods._base import Cost, LossAndTerms, Method, Update
from surestep.methods._hyperparameters import of_eps, param
from surestep.methods._losses import squared_distance
from surestep.methods._presets import CIFAR_SAT, MNIST_SAT, recipe
from surestep.methods._registry import register


@register("r-mgm")
@dataclass
class RMGM(Method):
    """R-MGM: FGSM's logits must agree with those of Tramèr's R-FGSM, which stays in the ball.

    R-FGSM's random step is ``alpha``, its gradient step the rest of eps; SAT-R2's is all of eps.
    """

    summary = "FGSM and R-FGSM (within eps) must agree"
    paper = "Vivek et al. 2019, CVPR Workshops"
    presets = {
        "mnist": recipe(MNIST_SAT, lam=5.0, alpha=0.01, source="ours: settings of SAT-R2"),
        "cifar10": recipe(CIFAR_SAT, lam=25.0, alpha=2 / 255, source="ours: settings of SAT-R2"),
    }

    lam: float = param(5.0, ge=0)
    alpha: float = of_eps(0.5)

    def set_up(self) -> None:
        """Check that the random step is no longer than eps."""
        eps = self.threat.eps
        self.require(self.alpha <= eps, "alpha", f"in [0, eps = {eps:g}]")

    def craft(self, model: nn.Module, x: Tensor, y: Tensor) -> Update:
        """Attack from both starts in one pass."""
        threat, n = self.threat, len(x)
        start = threat.clip(x + threat.random_step(x, self.alpha))
        grad, _ = attack_gradient(model, torch.cat([x, start]), y.repeat(2))
        x_fgsm = threat.ascend(x, grad[:n], threat.eps, x)
        x_rfgsm = threat.ascend(start, grad[n:], threat.eps - self.alpha, x)

        def loss(logits: Tensor) -> LossAndTerms:
            at_fgsm, at_rfgsm = logits.chunk(2)
            ce, distance = self.criterion(at_fgsm, y), squared_distance(at_fgsm, at_rfgsm)
            return ce + self.lam * distance, {"ce": ce, "distance": distance}

        return Update(torch.cat([x_fgsm, x_rfgsm]), loss, slice(n))

    def cost(self, batch_size: int) -> Cost:
        """Both views go through the attack and the update."""
        return Cost.of(attack=2, update=2)
