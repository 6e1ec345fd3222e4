"""FGSM-MEP: each image's step starts where the gradients of earlier epochs point.

Jia et al. 2022, "Prior-Guided Adversarial Initialization for Fast Adversarial Training", ECCV,
arXiv 2207.08859 (FGSM-PGI, with the prior from the momentum of all epochs).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surestep.attacks.gradients import attack_gradient, l1_unit
from surestep.methods._base import Cost, Criterion, LossAndTerms, Method, Update
from surestep.methods._hyperparameters import of_eps, param
from surestep.methods._losses import pairing
from surestep.methods._memory import Memory
from surestep.methods._presets import CIFAR100_RESNET, CIFAR_RESNET, MNIST_ZOO, recipe, smoothed
from surestep.methods._registry import register


def paired(start: Tensor, x_adv: Tensor, y: Tensor, criterion: Criterion, lam: float) -> Update:
    """Minimise CE at x_adv (N, ...) plus lam times the ``pairing`` with the logits at ``start``."""

    def loss(logits: Tensor) -> LossAndTerms:
        at_start, at_adv = logits.chunk(2)
        ce, apart = criterion(at_adv, y), pairing(at_adv, at_start)
        return ce + lam * apart, {"ce": ce, "pairing": apart}

    return Update(torch.cat([start, x_adv]), loss, slice(len(start), None))


@register("fgsm-mep")
@dataclass
class FGSMMEP(Method):
    """FGSM-MEP: start at the stored perturbation, pair the logits there and after the step.

    The store is cleared every ``reset`` epochs. The CIFAR presets set the paper's label smoothing
    (0.6 for the true class).
    """

    summary = "FGSM from a start that follows each image's gradient momentum over epochs"
    paper = "Jia et al. 2022, arXiv 2207.08859"
    needs_index = remembers_images = True
    needs_progress = True
    kept = ("_delta", "_momentum", "_round")
    presets = {
        # At eps 0.3 the published smoothing ends masked (leaderboard.csv at 3f86206, search.csv).
        "mnist": recipe(MNIST_ZOO, lam=10.0, alpha=0.15),
        "cifar10": recipe(CIFAR_RESNET, lam=10.0, settings=smoothed(10)),
        "cifar100": recipe(CIFAR100_RESNET, lam=10.0, settings=smoothed(100)),
    }

    lam: float = param(10.0, ge=0)
    decay: float = param(0.3, ge=0)
    reset: int = param(40, ge=1)
    alpha: float = of_eps(1)

    def set_up(self) -> None:
        """Begin with an empty store."""
        self._delta, self._momentum, self._round = Memory(), Memory(), 0

    def craft(self, model: nn.Module, x: Tensor, y: Tensor) -> Update:
        """Step from the stored perturbation, then move that along the gradient momentum."""
        threat = self.threat
        if (now := self.progress.epoch // self.reset) != self._round:
            self._delta, self._momentum, self._round = Memory(), Memory(), now
        if self.progress.epoch % self.reset == 0:  # nothing is stored yet
            delta = threat.random_delta(x)
        else:
            delta = self._delta.read(self.positions, x)
        start = threat.project(x + delta, x)
        grad, _ = attack_gradient(model, start, y)
        x_adv = threat.ascend(start, grad, self.alpha, x)
        before = self._momentum.read(self.positions, x)
        # The authors divide the gradient of the batch's mean loss by the l1 norm of the whole
        # batch, so that confidently classified images hardly count.
        momentum = l1_unit(grad) + self.decay * before
        moved = threat.ascend(start, momentum, self.alpha, x) - x
        self._momentum.write(self.positions, momentum)
        self._delta.write(self.positions, moved)
        return paired(start, x_adv, y, self.criterion, self.lam)

    def cost(self, batch_size: int) -> Cost:
        """One gradient; the start and x_adv in the update."""
        return Cost.of(attack=1, update=2)
