"""Friendly adversarial training: the attack stops soon after it succeeds.

Zhang et al. 2020, "Attacks Which Do Not Kill Training Make Adversarial Learning Stronger", arXiv
2002.11242.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surestep.attacks.gradients import input_gradient
from surestep.attacks.lending import attacking
from surestep.attacks.outcomes import misclassified
from surestep.methods._hyperparameters import param
from surestep.methods._presets import CIFAR_RESNET, MNIST_ZOO, recipe
from surestep.methods._registry import register
from surestep.methods.pgd import PGD
from surestep.threat import per_sample


@register("fat")
@dataclass
class FAT(PGD):
    """FAT: PGD that stops, image by image, at the (``tau`` + 1)-th point that is misclassified.

    All images go through all steps, so that no step waits for the device; images whose attack has
    ended stay where they are.
    """

    summary = "PGD that stops for an image soon after it is misclassified"
    paper = "Zhang et al. 2020, arXiv 2002.11242"
    presets = {
        "mnist": recipe(MNIST_ZOO, tau=1, steps=40, alpha=0.01),
        "cifar10": recipe(CIFAR_RESNET, tau=1, steps=10, alpha=2 / 255),
    }

    tau: int = param(0, ge=0)

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return the point (N, ...) at which each image's attack ended."""
        x_adv, inside = self.start(x), self.threat.around(x)
        left = torch.full_like(y, self.tau)
        with attacking(model) as inner:
            for _ in range(self.steps):
                grad, logits = input_gradient(inner, x_adv, y)
                left = left - misclassified(logits, y).long()
                going = per_sample(left >= 0, x)
                further = inside(x_adv + self.threat.steepest_step(grad, self.alpha))
                x_adv = torch.where(going, further, x_adv)
        return x_adv
