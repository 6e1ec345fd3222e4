"""MART: misclassified images weigh more.

Wang et al. 2020, "Improving Adversarial Robustness Requires Revisiting Misclassified Examples",
ICLR.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surestep.attacks.losses import of_true_class
from surestep.methods._base import Cost, LossAndTerms, Update
from surestep.methods._hyperparameters import of_span, param
from surestep.methods._losses import kl, one_hot
from surestep.methods._presets import CIFAR_RESNET, MNIST_ZOO, recipe
from surestep.methods._registry import register
from surestep.methods.pgd import PGD


@register("mart")
@dataclass
class MART(PGD):
    """MART: boosted cross entropy at x_adv, plus beta * KL(clean || adversarial) * (1 - p_y)."""

    summary = "PGD images; a margin to the runner-up, and more weight on clean mistakes"
    paper = "Wang et al. 2020, ICLR"
    presets = {
        "mnist": recipe(MNIST_ZOO, beta=5.0, steps=40, alpha=0.01),
        "cifar10": recipe(
            CIFAR_RESNET,
            beta=5.0,
            steps=10,
            alpha=0.007,
            settings={"epochs": 120, "lr": 0.01, "weight_decay": 3.5e-3},
            source="the authors' script for ResNet-18, except for its learning-rate steps",
        ),
    }

    beta: float = param(5.0, ge=0)
    sigma: float = of_span(0.001)

    def start(self, x: Tensor) -> Tensor:
        """Return the images with Gaussian noise, as the authors do."""
        return x + self.sigma * torch.randn_like(x)

    def craft(self, model: nn.Module, x: Tensor, y: Tensor) -> Update:
        """Take the image and its perturbed version through the update."""
        x_adv = self.perturb(model, x, y)

        def loss(logits: Tensor) -> LossAndTerms:
            clean, adversarial = F.log_softmax(logits, dim=1).chunk(2)
            own = one_hot(y, logits.shape[1])
            runner_up = adversarial.exp().masked_fill(own, 0).amax(1)
            # 1 - p and the authors' 1e-4, above 0 where the runner-up has all the probability.
            ce = self.criterion(logits[len(x) :], y) - torch.log(1.0001 - runner_up).mean()
            mistaken = 1 - of_true_class(clean.exp(), y)
            divergence = (kl(clean, adversarial) * mistaken).mean()
            return ce + self.beta * divergence, {"ce": ce, "kl": divergence}

        return Update(torch.cat([x, x_adv]), loss, slice(len(x), None))

    def cost(self, batch_size: int) -> Cost:
        """One gradient per step; clean and adversarial images in the update."""
        return Cost.of(attack=self.steps, update=2)
