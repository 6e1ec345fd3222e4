"""GAT: Sriramanan et al. 2020, arXiv 2011.14969."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from surestep.methods._base import of_eps, register
from surestep.methods._guided import Guided
from surestep.methods._presets import CIFAR_RESNET, MNIST_ZOO, recipe


@register("gat")
@dataclass
class GAT(Guided):
    """GAT: squared l2 distance of the probabilities; lam rises to ``late`` times itself."""

    summary = "clean cross entropy and the squared distance of probabilities, guiding the attack"
    paper = "Sriramanan et al. 2020, arXiv 2011.14969"
    presets = {
        "mnist": recipe(MNIST_ZOO, lam=15.0, source="lam of Sriramanan et al. 2020, else ours"),
        "mnist-long": recipe(
            MNIST_ZOO, lam=15.0, settings={"epochs": 50}, source="Sriramanan et al. 2020, else ours"
        ),
        "cifar10": recipe(CIFAR_RESNET, lam=10.0),
    }

    lam: float = 10.0
    late: float = 4.0
    late_from: float = 0.86
    alpha: float = of_eps(0.5)

    def weight(self) -> float:
        """Return lam, late in training more."""
        return self.lam * (self.late if self.progress.done >= self.late_from else 1)

    def distance(self, clean: Tensor, adversarial: Tensor) -> Tensor:
        """Square the differences of the probabilities."""
        return (clean.softmax(1) - adversarial.softmax(1)).square().sum()
