"""R-MGM, the predecessor of SAT-R2, by the same authors (Vivek et al. 2019, CVPRW)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surestep.attacks.lending import attacking
from surestep.methods._base import Cost, Method, Terms, Update, of_eps, register
from surestep.methods._presets import CIFAR_SAT, MNIST_SAT, recipe
from surestep.methods.fgsm import FGSM
from surestep.methods.r_fgsm import RFGSM
from surestep.methods.sat import agreement


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

    lam: float = 5.0
    alpha: float = of_eps(0.5)

    def validate(self) -> None:
        """Check alpha as R-FGSM does."""
        RFGSM(self.threat, alpha=self.alpha)

    def craft(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor | None) -> Update:
        """Attack from both starts in one pass, with the parts of FGSM and R-FGSM."""
        views = FGSM(self.threat), RFGSM(self.threat, alpha=self.alpha)
        with attacking(model) as inner:
            starts = [view.start(x) for view in views]
            grads = views[0].gradient(inner, torch.cat(starts), y.repeat(2)).chunk(2)
        points = [
            view.step(start, grad, x)
            for view, start, grad in zip(views, starts, grads, strict=True)
        ]

        def loss(logits: Tensor) -> Terms:
            at_fgsm, at_rfgsm = logits.chunk(2)
            return agreement(self.criterion(at_fgsm, y), self.lam, at_fgsm, at_rfgsm)

        return Update(torch.cat(points), loss, slice(len(x)))

    def cost(self, batch_size: int) -> Cost:
        """Both views go through the attack and the update."""
        return Cost.of(attack=2, update=2)
