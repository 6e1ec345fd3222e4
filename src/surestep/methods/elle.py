"""ELLE: the loss must be linear between two points of the ball (Abad Rocamora et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surestep.attacks.losses import cross_entropy
from surestep.methods._base import Cost, LossAndTerms, Update
from surestep.methods._hyperparameters import param
from surestep.methods._losses import once
from surestep.methods._presets import CIFAR_ZOO, MNIST_ZOO, recipe
from surestep.methods._registry import register
from surestep.methods._single_step import OnSingleStep
from surestep.threat import per_sample


@register("elle")
@dataclass
class ELLE(OnSingleStep):
    """ELLE: adds lam times the squared gap between the loss and its chord at a random point."""

    summary = "FGSM; the loss must lie on the chord between two random points"
    paper = "Abad Rocamora et al. 2024, arXiv 2401.11618"
    presets = {
        "mnist": recipe(MNIST_ZOO, lam=1.0, perturbation="rs-fgsm", source="ours: search.csv"),
        "cifar10": recipe(CIFAR_ZOO, lam=1000.0),
        "cifar10-16": recipe(CIFAR_ZOO, eps=16 / 255, lam=5000.0),
    }

    lam: float = param(1000.0, ge=0)
    perturbation: str = "fgsm"

    def weight(self, gap: Tensor) -> Tensor | float:
        """Return the weight of the gap, here lam; ``gap`` is this step's, detached."""
        return self.lam

    def craft(self, model: nn.Module, x: Tensor, y: Tensor) -> Update:
        """Take x_adv, two random points and one between them through the update."""
        x_adv = self.base.perturb(model, x, y)
        a, b = x + self.threat.random_delta(x), x + self.threat.random_delta(x)
        share = per_sample(torch.rand(len(x), dtype=x.dtype, device=x.device), x)
        points = torch.cat([x_adv, a, b, torch.lerp(a, b, share)])
        weight = once(self.weight)

        def loss(logits: Tensor) -> LossAndTerms:
            ce = self.criterion(logits[: len(x)], y)
            at_a, at_b, between = cross_entropy(logits[len(x) :], y.repeat(3)).chunk(3)
            gap = (between - torch.lerp(at_a, at_b, share.flatten().to(ce.dtype))).square().mean()
            return ce + weight(gap.detach()) * gap, {"ce": ce, "gap": gap}

        return Update(points, loss, slice(len(x)))

    def cost(self, batch_size: int) -> Cost:
        """One perturbation; four points in the update."""
        return Cost.of(attack=self.base.gradients, update=4)
