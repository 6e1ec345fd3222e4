"""MultiGrad, from the ZeroGrad paper: Golgooni et al. 2021, arXiv 2103.15476."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surestep.methods._base import Cost, register
from surestep.methods._presets import CIFAR_ZOO, MNIST_ZOO, recipe
from surestep.methods.zerograd import Doubled


@register("multigrad")
@dataclass
class MultiGrad(Doubled):
    """MultiGrad: steps from the image along the signs on which several random starts agree."""

    summary = "one step, only along the gradient signs on which several random starts agree"
    paper = "Golgooni et al. 2021, arXiv 2103.15476"
    presets = {
        # Without eps warm-up it ends in gradient masking (search.csv).
        "mnist": recipe(MNIST_ZOO, starts=3, settings={"eps_warmup": 1.0}),
        "cifar10": recipe(CIFAR_ZOO, starts=3, source="Golgooni et al. 2021; their script differs"),
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
            start = self.threat.clip(point + self.threat.random_delta(point))
            votes += super().gradient(model, start, y).sign()
        return torch.where(votes.abs() == self.starts, votes, 0)

    def cost(self, batch_size: int) -> Cost:
        """One gradient per start, one update."""
        return Cost.of(attack=self.starts, update=1)
