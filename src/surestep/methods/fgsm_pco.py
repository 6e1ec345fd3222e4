"""FGSM-PCO: mixes each new perturbation with the image's stored one, against collapse.

Wang, Wang, Tian & Jin 2024, "Preventing Catastrophic Overfitting in Fast Adversarial Training: A
Bi-level Optimization Perspective", ECCV, arXiv 2407.12443.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surestep.attacks.gradients import attack_gradient
from surestep.attacks.losses import of_true_class
from surestep.methods._base import Cost, LossAndTerms, Method, Update
from surestep.methods._hyperparameters import param
from surestep.methods._losses import pairing, relaxed_cross_entropy
from surestep.methods._memory import Memory
from surestep.methods._presets import CIFAR100_RESNET, CIFAR_RESNET, MNIST_ZOO, recipe, smoothed
from surestep.methods._registry import register
from surestep.threat import per_sample


@register("fgsm-pco")
@dataclass
class FGSMPCO(Method):
    """FGSM-PCO: the better the stored perturbation fools the model, the closer x_adv stays to it.

    With c = 1 - p_y at the stored point, x_adv is c times the stored point plus 1 - c times the
    new point, whose perturbation is scaled by ``stretch``.
    """

    summary = "FGSM mixed with the image's previous perturbation, weighted by how well that fools"
    paper = "Wang et al. 2024, arXiv 2407.12443"
    needs_index = remembers_images = True
    kept = ("_delta",)
    presets = {
        # Unclipped, one seed of two diverges at eps 0.3 (step 359 of `leaderboard.py mnist`).
        "mnist": recipe(MNIST_ZOO, lam=10.0, settings={"clip_grad": 1.0}),
        "cifar10": recipe(CIFAR_RESNET, lam=10.0, settings=smoothed(10)),
        "cifar100": recipe(CIFAR100_RESNET, lam=10.0, settings=smoothed(100)),
    }

    lam: float = param(10.0, ge=0)
    stretch: float = param(1.5, ge=0)
    smoothing: float = param(0.4, ge=0, lt=1)

    def set_up(self) -> None:
        """Begin with an empty store."""
        self._delta = Memory()

    def craft(self, model: nn.Module, x: Tensor, y: Tensor) -> Update:
        """Step from the stored perturbation along the smoothed loss, then mix the two points."""
        threat = self.threat
        old = threat.project(x + self._delta.read(self.positions, x), x)

        def smoothed(logits: Tensor, y: Tensor) -> Tensor:
            return relaxed_cross_entropy(logits, y, 1 - self.smoothing)

        grad, logits = attack_gradient(model, old, y, smoothed)
        new = threat.ascend(old, grad, threat.eps, x)
        p_y = per_sample(of_true_class(logits.softmax(1), y), x).to(x.dtype)
        mixed = threat.clip((1 - p_y) * old + p_y * (x + self.stretch * (new - x)))
        self._delta.write(self.positions, new - x)

        def loss(logits: Tensor) -> LossAndTerms:
            at_old, at_new, at_mixed = logits.chunk(3)
            ce = self.criterion(at_mixed, y)
            gap = (pairing(at_new, at_old) - pairing(at_new, at_mixed)).abs()
            return ce + self.lam * gap, {"ce": ce, "gap": gap}

        return Update(torch.cat([old, new, mixed]), loss, slice(2 * len(x), None))

    def cost(self, batch_size: int) -> Cost:
        """One gradient; three points in the update."""
        return Cost.of(attack=1, update=3)
