"""RS-FGSM, "Fast": Wong, Rice & Kolter 2020, arXiv 2001.03994."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from surestep.attacks.losses import weighted_log_odds
from surestep.methods._hyperparameters import of_eps
from surestep.methods._presets import CIFAR_RESNET, CIFAR_SPEED, MNIST_RS, recipe
from surestep.methods._registry import register
from surestep.methods._single_step import SingleStep


@register("rs-fgsm")
@dataclass
class RSFGSM(SingleStep):
    """RS-FGSM ("Fast"): a uniform start in the ball, a step of 1.25 eps, back to the ball.

    The attack runs in train mode, as in the authors' code; batch statistics are left untouched.
    The start is not clipped to the data range before the gradient. ``alpha`` is the step's size.
    """

    summary = "a uniform random start, a step of 1.25 eps, back to the ball"
    paper = "Wong et al. 2020, arXiv 2001.03994"
    presets = {
        "mnist": MNIST_RS,
        "cifar10": recipe(
            replace(CIFAR_RESNET, model="preactresnet18"),
            alpha=10 / 255,
            settings={"epochs": 15, "lr": 0.2, "schedule": "triangular"},
            source="Wong et al. 2020",
        ),
        "cifar10-speed": recipe(CIFAR_SPEED, alpha=10 / 255),
    }
    train_mode = True
    objective = staticmethod(weighted_log_odds)

    alpha: float = of_eps(1.25)

    def start(self, x: Tensor) -> Tensor:
        """Return a uniform random point of the ball, not clipped to the data range."""
        return x + self.threat.random_delta(x)

    @property
    def size(self) -> float:
        """Length of the step: alpha."""
        return self.alpha
