"""ZeroGrad and MultiGrad: pixels whose gradient is weak or unsure take no part in the step.

Golgooni et al. 2021, "ZeroGrad: Mitigating and Explaining Catastrophic Overfitting in FGSM
Adversarial Training", arXiv 2103.15476.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surestep.methods._base import Cost, register
from surestep.methods._presets import CIFAR_ZOO, MNIST_ZOO, recipe
from surestep.methods.fgsm import RSFGSM


class Doubled(RSFGSM):
    """RS-FGSM with a step of 2 eps: what reaches the ball's surface from anywhere in it."""

    def validate(self) -> None:
        """Take the step's default."""
        self.alpha = 2 * self.threat.eps if self.alpha is None else self.alpha
        super().validate()


@register("zerograd")
@dataclass
class ZeroGrad(Doubled):
    """ZeroGrad: the share ``q`` of an image's pixels with the weakest gradient keep their start."""

    summary = "RS-FGSM; pixels with a weak gradient keep their random start"
    paper = "Golgooni et al. 2021, arXiv 2103.15476"
    presets = {
        "mnist": recipe(MNIST_ZOO, q=0.35),
        "cifar10": recipe(CIFAR_ZOO, q=0.35, source="Golgooni et al. 2021"),
    }

    q: float = 0.35

    def validate(self) -> None:
        """Check q."""
        self.require(0 <= self.q < 1, "q", "in [0, 1)")
        super().validate()

    def gradient(self, model: nn.Module, point: Tensor, y: Tensor) -> Tensor:
        """Return the gradient, zero below the image's q-quantile of absolute values."""
        grad = super().gradient(model, point, y)
        size = grad.abs().flatten(1)
        # The k-th smallest: a sort, as torch.quantile does, takes five times as long.
        least = size.kthvalue(int(self.q * size.shape[1]) + 1, dim=1, keepdim=True).values
        return torch.where(size < least, 0, grad.flatten(1)).view_as(grad)


@register("multigrad")
@dataclass
class MultiGrad(Doubled):
    """MultiGrad: from the image, along the signs on which several random starts agree."""

    summary = "only the signs on which the gradients at several random starts agree"
    paper = "Golgooni et al. 2021, arXiv 2103.15476"
    presets = {
        "mnist": recipe(MNIST_ZOO, starts=3),
        "cifar10": recipe(CIFAR_ZOO, starts=3, source="Golgooni et al. 2021"),
    }

    starts: int = 3

    def validate(self) -> None:
        """Check the number of starts."""
        self.require(self.starts >= 1, "starts", ">= 1")
        super().validate()

    def start(self, x: Tensor) -> Tensor:
        """Step from the image itself."""
        return x

    def gradient(self, model: nn.Module, point: Tensor, y: Tensor) -> Tensor:
        """Return the common signs of the gradients at random starts, zero elsewhere."""
        votes = torch.zeros_like(point)
        for _ in range(self.starts):
            votes += super().gradient(model, point + self.threat.random_delta(point), y).sign()
        return torch.where(votes.abs() == self.starts, votes, 0)

    def cost(self, batch_size: int) -> Cost:
        """A gradient a start, one update."""
        return Cost.of(attack=self.starts, update=1)
