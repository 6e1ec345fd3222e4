"""R-FGSM: Tramèr et al. 2018, arXiv 1705.07204."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from surestep.methods._base import register
from surestep.methods._presets import CIFAR_RESNET, MNIST_FAST, recipe
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

    alpha: float | None = None

    def validate(self) -> None:
        """Check alpha, or take its default."""
        self.alpha = self.threat.eps / 2 if self.alpha is None else self.alpha
        eps = self.threat.eps
        self.require(0 <= self.alpha <= eps, "alpha", f"in [0, eps = {eps:g}]")

    def start(self, x: Tensor) -> Tensor:
        """Step at random."""
        assert self.alpha is not None
        return self.threat.clip(x + self.threat.random_step(x, self.alpha))

    @property
    def size(self) -> float:
        """The rest of eps."""
        assert self.alpha is not None
        return self.threat.eps - self.alpha
