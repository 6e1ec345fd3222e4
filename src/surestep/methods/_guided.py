"""GAT and NuAT: the attack and the update both follow the distance from the clean output.

Sriramanan et al. 2020, "Guided Adversarial Attack for Evaluating and Enhancing Adversarial
Defenses", NeurIPS, arXiv 2011.14969; Sriramanan et al. 2021, "Towards Efficient and Effective
Adversarial Training", NeurIPS.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from surestep.attacks.core import input_gradient
from surestep.attacks.inputs import forward_logits
from surestep.attacks.lending import attacking
from surestep.attacks.losses import Objective, cross_entropy, log_odds
from surestep.methods._base import Cost, Method, Terms, Update


class Guided(Method):
    """Clean cross entropy plus lam times a distance of clean from adversarial outputs."""

    lam: float
    alpha: float
    guide_every: int = 2
    """The last step of so many is guided."""
    lengths = ("alpha",)
    needs_progress = True

    def distance(self, clean: Tensor, adversarial: Tensor) -> Tensor:
        """Return the distance of two sets of logits (N, K), summed over the batch."""
        raise NotImplementedError

    def weight(self) -> float:
        """Return lam at this point of the training."""
        raise NotImplementedError

    def craft(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor | None) -> Update:
        """Step eps along cross entropy, on guided steps with the distance."""
        lam, n = self.weight(), len(x)
        with attacking(model) as inner:
            start = self.threat.clip(x + self.threat.random_step(x, self.alpha))
            objective: Objective = log_odds
            if (self.progress.step + 1) % self.guide_every == 0:
                with torch.no_grad():
                    clean = forward_logits(inner, x)

                # In a sum the scale of the cross entropy matters: no log-odds here.
                def guide(logits: Tensor, y: Tensor) -> Tensor:
                    return cross_entropy(logits, y) + lam * self.distance(clean, logits) / n

                objective = guide
            grad, _, _ = input_gradient(inner, start, y, objective)
        x_adv = self.threat.ascend(start, grad, self.threat.eps, x)

        def loss(logits: Tensor) -> Terms:
            clean, adversarial = logits.split(n)
            ce, apart = self.criterion(clean, y), self.distance(clean, adversarial) / n
            return ce + lam * apart, {"ce": ce, "distance": apart}

        return Update(torch.cat([x, x_adv]), loss, slice(n, None))

    def cost(self, batch_size: int) -> Cost:
        """One gradient (on guided steps a clean pass more), clean and adversarial in the update."""
        return Cost(3 + 1 / self.guide_every, 3, 2)
