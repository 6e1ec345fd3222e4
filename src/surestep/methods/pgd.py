"""PGD adversarial training, the multi-step reference that single-step methods are compared with."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from surestep.attacks.ascent import climb
from surestep.attacks.lending import attacking
from surestep.methods._base import Cost, Method, Update
from surestep.methods._hyperparameters import of_eps, param
from surestep.methods._presets import CIFAR_RESNET, CIFAR_SPEED, MNIST_FAST, MNIST_SPEED, recipe
from surestep.methods._registry import register


@register("pgd")
@dataclass
class PGD(Method):
    """PGD-AT: ``steps`` steps of ``alpha`` from a uniform start; cross entropy at the last iterate.

    ``alpha`` is a quarter of eps by default (2 / 255 at 8 / 255).
    """

    summary = "many gradient steps from a random start: robust but expensive"
    paper = "Madry et al. 2018, arXiv 1706.06083"
    presets = {
        "mnist": recipe(MNIST_FAST, steps=40, alpha=0.01),
        "mnist-fast": recipe(MNIST_FAST, steps=40, alpha=0.01),
        "mnist-speed": recipe(MNIST_SPEED, settings={"lr": 0.05}, steps=40, alpha=0.01),
        "cifar10": recipe(CIFAR_RESNET, steps=10, alpha=2 / 255),
        "cifar10-speed": recipe(CIFAR_SPEED, steps=7, alpha=2 / 255),
    }

    steps: int = param(10, ge=1)
    alpha: float = of_eps(0.25)

    def start(self, x: Tensor) -> Tensor:
        """Return the points (N, ...) at which the attack begins."""
        return self.threat.random_start(x)

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return the last iterate from a random start (N, ...)."""
        with attacking(model) as inner:
            start = self.start(x)
            return climb(inner, x, y, start, self.threat, steps=self.steps, size=self.alpha)

    def craft(self, model: nn.Module, x: Tensor, y: Tensor) -> Update:
        """Train on the perturbed images."""
        return Update(self.perturb(model, x, y), self.plain_loss(y))

    def cost(self, batch_size: int) -> Cost:
        """One gradient per step, one update."""
        return Cost.of(attack=self.steps, update=1)
