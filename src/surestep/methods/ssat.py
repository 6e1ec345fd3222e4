"""SSAT: along the step only as far as it takes to flip the label (Kim et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surestep.attacks.gradients import attack_gradient
from surestep.attacks.inputs import forward_logits
from surestep.attacks.lending import attacking
from surestep.attacks.outcomes import misclassified
from surestep.methods._base import Cost
from surestep.methods._hyperparameters import param
from surestep.methods._presets import CIFAR_ZOO, MNIST_ZOO, recipe
from surestep.methods._registry import register
from surestep.methods.rs_fgsm import RSFGSM
from surestep.threat import per_sample


@register("ssat")
@dataclass
class SSAT(RSFGSM):
    """SSAT: RS-FGSM's perturbation, scaled to the least of c shares at which the label flips.

    Images that are misclassified at the random start are trained on without a perturbation.
    """

    summary = "RS-FGSM; each image moves only as far as it takes to flip its label"
    paper = "Kim et al. 2021, arXiv 2010.01799"
    presets = {
        "mnist": recipe(MNIST_ZOO, checkpoints=3),
        "cifar10": recipe(CIFAR_ZOO, checkpoints=3),
    }

    checkpoints: int = param(3, ge=1)

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Scale the perturbation; the points between are classified in one pass in eval mode."""
        c, n = self.checkpoints, len(x)
        start = self.start(x)
        grad, logits = attack_gradient(model, start, y, self.objective, train_mode=self.train_mode)
        delta = self.step(start, grad, x) - x
        share = x.new_ones(n)
        if c > 1:
            between = torch.cat([x + k / c * delta for k in range(1, c)])
            with attacking(model) as inner, torch.no_grad():
                flips = misclassified(forward_logits(inner, between), y.repeat(c - 1)).view(-1, n)
            nearest = (flips.int().argmax(0) + 1).to(x.dtype) / c
            share = torch.where(flips.any(0), nearest, share)
        share = torch.where(misclassified(logits, y), 0, share)
        return self.threat.project(x + per_sample(share, x) * delta, x)

    def cost(self, batch_size: int) -> Cost:
        """FGSM's cost, and a forward pass for each point between."""
        return Cost.of(attack=1, update=1, forward=self.checkpoints - 1)
