"""NuAT: Sriramanan et al. 2021, NeurIPS."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from surestep.methods._base import of_eps, register
from surestep.methods._guided import Guided
from surestep.methods._presets import CIFAR_RESNET, MNIST_ZOO, recipe


@register("nuat")
@dataclass
class NuAT(Guided):
    """NuAT: nuclear norm of the batch's differences of logits; lam rises from 0 to ``lam``."""

    summary = "clean cross entropy and the nuclear norm of the outputs' differences"
    paper = "Sriramanan et al. 2021, NeurIPS"
    presets = {
        "mnist": recipe(MNIST_ZOO, lam=4.5),
        "cifar10": recipe(CIFAR_RESNET, lam=4.5),
        "cifar10-wa": recipe(CIFAR_RESNET, lam=4.5, settings={"ema": 0.9998}),
    }

    lam: float = 4.5
    alpha: float = of_eps(0.5)

    def weight(self) -> float:
        """Return the part of lam that training has reached."""
        return self.lam * self.progress.done

    def distance(self, clean: Tensor, adversarial: Tensor) -> Tensor:
        """Add up the singular values; on a GPU, torch waits for the device here."""
        apart = clean - adversarial
        whole = apart.isfinite().all()  # else torch raises, and nothing says that training diverged
        total = torch.linalg.svdvals(torch.where(whole, apart, 0)).sum()
        return torch.where(whole, total, torch.nan)
