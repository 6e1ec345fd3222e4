"""TDAT: the step starts at the previous batch's perturbation; labels relax during training.

Tong, Jiang, Gui & Cao 2024, "Taxonomy Driven Fast Adversarial Training", AAAI, arXiv 2408.03944.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surestep.attacks.gradients import attack_gradient
from surestep.attacks.losses import of_true_class
from surestep.methods._base import Cost, LossAndTerms, Method, Update
from surestep.methods._hyperparameters import param
from surestep.methods._losses import relaxed_cross_entropy
from surestep.methods._memory import carried
from surestep.methods._presets import CIFAR_RESNET, MNIST_ZOO, recipe
from surestep.methods._registry import register


@register("tdat")
@dataclass
class TDAT(Method):
    """TDAT: relaxed labels in attack and update; logits pulled together where the model is unsure.

    The share of the true class falls as max(``relax`` * tan(1 - t / T), ``least``). Perturbations
    carry over from batch to batch, by the position in the batch.
    """

    needs_progress = True
    summary = "FGSM from the previous batch's perturbation, on relaxed labels"
    kept_rows = ("_delta",)
    paper = "Tong et al. 2024, arXiv 2408.03944"
    presets = {
        # Two epochs end at 46% with this, at 32% with the published 0.15 (search.csv, and
        # leaderboard.csv at 3f86206).
        "mnist": recipe(MNIST_ZOO, lam=0.65, least=0.6),
        "cifar10": recipe(CIFAR_RESNET, lam=0.65),
    }

    lam: float = param(0.65, ge=0)
    relax: float = param(0.6, gt=0, le=0.64)  # the share begins at relax * tan(1), below 1
    least: float = param(0.15, gt=0, lt=1)

    def set_up(self) -> None:
        """Begin without a perturbation."""
        self._delta = torch.zeros(0)

    @property
    def share(self) -> float:
        """Share of the true class in the label, at this point of the training."""
        return max(self.relax * math.tan(1 - self.progress.done), self.least)

    def relaxed(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return the cross entropy with relaxed labels, per sample."""
        return relaxed_cross_entropy(logits, y, self.share)

    def craft(self, model: nn.Module, x: Tensor, y: Tensor) -> Update:
        """Step from the previous batch's perturbation (random at first)."""
        threat, last = self.threat, carried(self._delta, x)
        start = threat.random_start(x) if last is None else threat.project(x + last, x)
        grad, _ = attack_gradient(model, start, y, self.relaxed)
        x_adv = threat.ascend(start, grad, threat.eps, x)
        self._delta = x_adv - x

        def loss(logits: Tensor) -> LossAndTerms:
            at_start, at_adv = logits.chunk(2)
            away = -F.log_softmax(at_adv, dim=1).mean()
            ce = self.share * self.criterion(at_adv, y) + (1 - self.share) * away
            p_y = of_true_class(at_start.softmax(1), y)
            apart = (at_start - at_adv).square().sum(1)
            drawn = (apart * torch.tanh(1 - p_y)).mean()
            return ce + self.lam * drawn, {"ce": ce, "drawn": drawn}

        return Update(torch.cat([start, x_adv]), loss, slice(len(x), None))

    def cost(self, batch_size: int) -> Cost:
        """One gradient; the start and x_adv in the update."""
        return Cost.of(attack=1, update=2)
