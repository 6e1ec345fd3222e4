"""Adversarial logit pairing.

Kannan, Kurakin & Goodfellow 2018, "Adversarial Logit Pairing", arXiv 1803.06373.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surestep.methods._base import Cost, LossAndTerms, Update
from surestep.methods._hyperparameters import param
from surestep.methods._losses import pairing
from surestep.methods._presets import CIFAR_RESNET, MNIST_ZOO, recipe
from surestep.methods._registry import register
from surestep.methods.pgd import PGD


@register("alp")
@dataclass
class ALP(PGD):
    """ALP: half clean, half PGD images (M-PGD), and lam times the mean squared logit difference."""

    summary = "clean and PGD images, with the logits of each pair pulled together"
    paper = "Kannan et al. 2018, arXiv 1803.06373"
    presets = {
        "mnist": recipe(MNIST_ZOO, lam=1.0, steps=40, alpha=0.01),
        "cifar10": recipe(CIFAR_RESNET, lam=0.5, steps=10, alpha=2 / 255),
    }

    lam: float = param(0.5, ge=0)

    def craft(self, model: nn.Module, x: Tensor, y: Tensor) -> Update:
        """Pair each image with its perturbed version."""
        points = torch.cat([x, self.perturb(model, x, y)])

        def loss(logits: Tensor) -> LossAndTerms:
            clean, adversarial = logits.chunk(2)
            ce = self.criterion(logits, y.repeat(2))
            apart = pairing(clean, adversarial)
            return ce + self.lam * apart, {"ce": ce, "pairing": apart}

        return Update(points, loss, slice(len(x), None))

    def cost(self, batch_size: int) -> Cost:
        """One gradient per step; both halves in the update."""
        return Cost.of(attack=self.steps, update=2)
