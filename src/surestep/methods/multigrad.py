"""MultiGrad, from the ZeroGrad paper: Golgooni et al. 2021, arXiv 2103.15476."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surestep.methods._hyperparameters import of_eps, param
from surestep.methods._presets import CIFAR_ZOO, MNIST_ZOO, recipe
from surestep.methods._registry import register
from surestep.methods.rs_fgsm import RSFGSM


@register("multigrad")
@dataclass
class MultiGrad(RSFGSM):
    """MultiGrad: steps from the image along the signs on which several random starts agree."""

    summary = "one step, only along the gradient signs on which several random starts agree"
    paper = "Golgooni et al. 2021, arXiv 2103.15476"
    presets = {
        # Without eps warm-up it ends in gradient masking (search.csv).
        "mnist": recipe(MNIST_ZOO, starts=3, settings={"eps_warmup": 1.0}),
        "cifar10": recipe(CIFAR_ZOO, starts=3, source="Golgooni et al. 2021; their script differs"),
    }

    alpha: float = of_eps(2)
    starts: int = param(3, ge=1)

    def set_up(self) -> None:
        """Take a gradient at each start."""
        self.gradients = self.starts

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
