"""GAT and NuAT: attack and update both include the distance from the clean output.

Sriramanan et al. 2020, "Guided Adversarial Attack for Evaluating and Enhancing Adversarial
Defenses", NeurIPS, arXiv 2011.14969; Sriramanan et al. 2021, "Towards Efficient and Effective
Adversarial Training", NeurIPS.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from surestep.attacks.gradients import input_gradient
from surestep.attacks.inputs import forward_logits
from surestep.attacks.lending import attacking
from surestep.attacks.losses import Objective, log_odds, nowhere_flat_cross_entropy
from surestep.methods._base import Cost, LossAndTerms, Method, Update


class Guided(Method):
    """Clean cross entropy plus lam times a distance between clean and adversarial outputs."""

    lam: float
    alpha: float
    guide_every: int = 2
    """The attack includes the distance in the last of every so many steps."""
    needs_progress = True

    @abstractmethod
    def distance(self, clean: Tensor, adversarial: Tensor) -> Tensor:
        """Return the distance between two sets of logits (N, K), in total for the batch."""

    @abstractmethod
    def weight(self) -> float:
        """Return the weight of the distance at this point of the training."""

    def craft(self, model: nn.Module, x: Tensor, y: Tensor) -> Update:
        """Step eps along the gradient of cross entropy, plus the distance on guided steps."""
        lam, n = self.weight(), len(x)
        with attacking(model) as inner:
            start = self.threat.clip(x + self.threat.random_step(x, self.alpha))
            objective: Objective = log_odds
            if (self.progress.step + 1) % self.guide_every == 0:
                with torch.no_grad():
                    clean = forward_logits(inner, x)

                # Log-odds have another scale than cross entropy, which matters in a sum. Each
                # image has the whole batch's distance over n, n times in the sum of the values.
                def guide(logits: Tensor, y: Tensor) -> Tensor:
                    ce = nowhere_flat_cross_entropy(logits, y)
                    return ce + lam * self.distance(clean, logits) / n

                objective = guide
            grad, _ = input_gradient(inner, start, y, objective)
        x_adv = self.threat.ascend(start, grad, self.threat.eps, x)

        def loss(logits: Tensor) -> LossAndTerms:
            clean, adversarial = logits.split(n)
            ce, apart = self.criterion(clean, y), self.distance(clean, adversarial) / n
            return ce + lam * apart, {"ce": ce, "distance": apart}

        return Update(torch.cat([x, x_adv]), loss, slice(n, None))

    def cost(self, batch_size: int) -> Cost:
        """One gradient, a clean pass on guided steps; clean and adversarial in the update."""
        return Cost.of(attack=1, update=2, forward=1 / self.guide_every)
