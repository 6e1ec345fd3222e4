"""AAER: examples whose loss falls along the attack step are abnormal, and are regularised.

Lin, Yu & Liu 2023, "Eliminating Catastrophic Overfitting Via Abnormal Adversarial Examples
Regularization", NeurIPS.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surestep.attacks.gradients import attack_gradient
from surestep.attacks.losses import cross_entropy
from surestep.methods._base import Cost, LossAndTerms, Update
from surestep.methods._hyperparameters import param
from surestep.methods._losses import once
from surestep.methods._presets import CIFAR100_ZOO, CIFAR_ZOO, MNIST_ZOO, recipe
from surestep.methods._registry import register
from surestep.methods._single_step import OnSingleStep, unchanged


@register("aaer")
@dataclass
class AAER(OnSingleStep):
    """AAER: penalises the number of abnormal examples and the spread of their logits.

    As in the authors' code, both losses in the decrease of the loss are detached: it counts in the
    value of the penalty but has no gradient. Its gradient would raise the loss of abnormal
    examples, against the cross entropy.
    """

    summary = "RS-FGSM; examples whose loss fell along the step are regularised"
    paper = "Lin et al. 2023, arXiv 2404.08154"
    presets = {
        "mnist": recipe(MNIST_ZOO),
        "cifar10": recipe(CIFAR_ZOO, lam=1.0, lam_loss=2.5, lam_spread=1.5),
        "cifar10-16": recipe(CIFAR_ZOO, eps=16 / 255, lam=1.0, lam_loss=7.0, lam_spread=3.25),
        "cifar10-n": recipe(
            CIFAR_ZOO, lam=1.0, lam_loss=1.5, lam_spread=0.15, perturbation="n-fgsm"
        ),
        "cifar10-n-16": recipe(
            CIFAR_ZOO, eps=16 / 255, lam=1.0, lam_loss=8.5, lam_spread=1.5, perturbation="n-fgsm"
        ),
        "cifar100": recipe(CIFAR100_ZOO, lam=1.0, lam_loss=3.5, lam_spread=1.5),
    }

    lam: float = param(1.0, ge=0)
    lam_loss: float = param(2.5, ge=0)
    lam_spread: float = param(1.5, ge=0)
    perturbation: str = "rs-fgsm"

    def set_up(self) -> None:
        """Check that the perturbation is a step along a single gradient."""
        super().set_up()
        # The losses at both ends must come from one function, and the update is in train mode.
        plain = unchanged(type(self.base), "gradient") and self.base.train_mode
        expected = "a step along one gradient in train mode, like rs-fgsm and n-fgsm"
        self.require(plain, "perturbation", expected)

    def craft(self, model: nn.Module, x: Tensor, y: Tensor) -> Update:
        """Compare loss and logits after the step with those at the start, from the attack."""
        base = self.base
        start = base.start(x)
        grad, was = attack_gradient(model, start, y, base.objective, train_mode=base.train_mode)
        before = cross_entropy(was, y)
        x_adv = base.step(start, grad, x)
        # At the weights of the attack: AWP's second pass is at others, where the loss is higher.
        fallen = once(lambda after: (after < before).to(after.dtype))

        def loss(logits: Tensor) -> LossAndTerms:
            ce, after = self.criterion(logits, y), cross_entropy(logits, y)
            abnormal = fallen(after)
            spread = (logits - was).square().sum(1)
            count, others = abnormal.sum(), (1 - abnormal).sum()
            fall = (abnormal * (before - after.detach())).sum() / count.clamp(min=1)
            wide = (abnormal * spread).sum() / count.clamp(min=1)
            usual = ((1 - abnormal) * spread).sum().detach() / others.clamp(min=1)
            extra = self.lam_loss * fall + self.lam_spread * F.relu(wide - usual)
            share = abnormal.mean()
            penalty = torch.where((count > 0) & (others > 0), share * extra, 0)
            return ce + self.lam * penalty, {"ce": ce, "penalty": penalty, "abnormal": share}

        return Update(x_adv, loss)

    def cost(self, batch_size: int) -> Cost:
        """One gradient, one update."""
        return Cost.of(attack=1, update=1)
