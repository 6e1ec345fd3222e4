"""ZeroGrad: pixels whose gradient is weak take no part in the step (Golgooni et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surestep.methods._hyperparameters import of_eps, param
from surestep.methods._presets import CIFAR100_ZOO, CIFAR_ZOO, MNIST_ZOO, recipe
from surestep.methods._registry import register
from surestep.methods.rs_fgsm import RSFGSM


@register("zerograd")
@dataclass
class ZeroGrad(RSFGSM):
    """ZeroGrad: the share ``q`` of an image's pixels with the weakest gradient keep their start."""

    summary = "RS-FGSM; pixels with a weak gradient keep their random start"
    paper = "Golgooni et al. 2021, arXiv 2103.15476"
    presets = {
        "mnist": recipe(MNIST_ZOO, q=0.35),
        "cifar10": recipe(CIFAR_ZOO, q=0.35, source="Golgooni et al. 2021; their script differs"),
        "cifar100": recipe(
            CIFAR100_ZOO, q=0.45, source="Golgooni et al. 2021; their script differs"
        ),
    }

    alpha: float = of_eps(2)  # from any start in the ball, this reaches its surface
    q: float = param(0.35, ge=0, lt=1)

    def gradient(self, model: nn.Module, point: Tensor, y: Tensor) -> Tensor:
        """Return the gradient, zero below the image's q-quantile of absolute values."""
        grad = super().gradient(model, point, y)
        size = grad.abs().flatten(1)
        k = int(self.q * size.shape[1])
        # kthvalue takes a fifth of a sort's time but has no deterministic kernel on GPUs.
        if torch.are_deterministic_algorithms_enabled():
            least = size.sort(1).values[:, k : k + 1]
        else:
            least = size.kthvalue(k + 1, dim=1, keepdim=True).values
        return torch.where(size < least, 0, grad.flatten(1)).view_as(grad)
