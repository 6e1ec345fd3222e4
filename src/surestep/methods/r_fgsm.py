"""R-FGSM: Tramèr et al. 2018, arXiv 1705.07204."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from surestep.methods._hyperparameters import of_eps
from surestep.methods._presets import CIFAR_RESNET, MNIST_FAST, recipe
from surestep.methods._registry import register
from surestep.methods._single_step import SingleStep


@register("r-fgsm")
@dataclass
class RFGSM(SingleStep):
    """R-FGSM: a random-sign step of alpha, then a gradient step of eps - alpha.

    ``alpha`` is half of eps by default, as in the paper.
    """

    summary = "a random-sign step, then a gradient step of the rest of eps"
    paper = "Tramèr et al. 2018, arXiv 1705.07204"
    presets = {"mnist": recipe(MNIST_FAST), "cifar10": recipe(CIFAR_RESNET)}

    alpha: float = of_eps(0.5)

    def set_up(self) -> None:
        """Check that the random step is no longer than eps."""
        eps = self.threat.eps
        self.require(self.alpha <= eps, "alpha", f"in [0, eps = {eps:g}]")

    def start(self, x: Tensor) -> Tensor:
        """Take the random step."""
        return self.threat.clip(x + self.threat.random_step(x, self.alpha))

    @property
    def size(self) -> float:
        """Length of the gradient step: the rest of eps."""
        return self.threat.eps - self.alpha
