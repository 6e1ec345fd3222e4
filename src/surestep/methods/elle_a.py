"""ELLE-A, from the ELLE paper: Abad Rocamora et al. 2024, arXiv 2401.11618."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from surestep import processes
from surestep.devices import finest
from surestep.methods._hyperparameters import param
from surestep.methods._presets import CIFAR_ZOO, MNIST_ZOO, recipe
from surestep.methods._registry import register
from surestep.methods.elle import ELLE


@register("elle-a")
@dataclass
class ELLEA(ELLE):
    """ELLE-A: the weight is 0 until the gap jumps; then it is set to ``lam`` and decays."""

    summary = "ELLE that switches itself on when linearity is lost"
    presets = {
        "mnist": recipe(MNIST_ZOO, lam=4.0, perturbation="rs-fgsm", source="ours: search.csv"),
        "cifar10": recipe(CIFAR_ZOO, lam=4000.0),
    }

    lam: float = param(4000.0, ge=0)
    decay: float = param(0.99, ge=0, lt=1)

    kept = ("_history",)

    def set_up(self) -> None:
        """Begin without a history."""
        super().set_up()
        # Count, mean and sum of squared deviations of the gaps so far; the current weight.
        self._history = torch.zeros(4, dtype=torch.float64)

    def weight(self, gap: Tensor) -> Tensor:
        """Return ``lam`` if the gap exceeds mean + 2 std of all so far, itself included."""
        dtype, gap = gap.dtype, processes.mean(gap).to(finest(gap.device))
        n, mean, squares, lam = self._history.to(gap)
        off, n = gap - mean, n + 1
        mean = mean + off / n
        squares = squares + off * (gap - mean)
        # Of n gaps none is more than sqrt(n - 1) std above their mean: none before the sixth jumps.
        leapt = gap > mean + 2 * (squares / n).sqrt()
        lam = torch.where(leapt, self.lam, lam * self.decay)
        self._history = torch.stack([n, mean, squares, lam])
        return lam.to(dtype)
