"""NuAT: Sriramanan et al. 2021, NeurIPS."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from surestep.methods._guided import Guided
from surestep.methods._hyperparameters import of_eps, param
from surestep.methods._presets import CIFAR_RESNET, MNIST_ZOO, recipe
from surestep.methods._registry import register


@register("nuat")
@dataclass
class NuAT(Guided):
    """NuAT: nuclear norm of the batch's logit differences; its weight rises from 0 to ``lam``.

    The weight reaches ``lam`` at the share ``full_from`` of training. The norm per image falls
    with the square root of the batch size: the authors' ``lam`` is for batches of 64.
    """

    summary = "clean cross entropy and the nuclear norm of the outputs' differences"
    paper = "Sriramanan et al. 2021, NeurIPS"
    presets = {
        "mnist": recipe(MNIST_ZOO, lam=4.5),
        "cifar10": recipe(CIFAR_RESNET, lam=4.5, settings={"batch_size": 64}),
        "cifar10-wa": recipe(
            CIFAR_RESNET, lam=4.0, full_from=1.0, settings={"ema": 0.9998, "batch_size": 64}
        ),
    }

    lam: float = param(4.5, ge=0)
    alpha: float = of_eps(0.5)
    full_from: float = param(0.9, gt=0, le=1)

    def weight(self) -> float:
        """Return lam times the linear ramp."""
        return self.lam * min(1.0, self.progress.done / self.full_from)

    def distance(self, clean: Tensor, adversarial: Tensor) -> Tensor:
        """Return the sum of the singular values; on a GPU, torch waits for the device here."""
        apart = clean - adversarial
        whole = apart.isfinite().all()  # on NaN svdvals raises, which hides the divergence
        matrix = torch.where(whole, apart, 0)
        if matrix.device.type == "mps":  # torch has no singular values there
            matrix = matrix.cpu()
        total = torch.linalg.svdvals(matrix).sum().to(apart.device)
        return torch.where(whole, total, torch.nan)
