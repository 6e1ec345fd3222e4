"""N-FGSM: de Jorge et al. 2022, arXiv 2202.01181."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from surestep.attacks.losses import weighted_log_odds
from surestep.methods._hyperparameters import of_eps, param
from surestep.methods._presets import CIFAR_ZOO, MNIST_ZOO, recipe
from surestep.methods._registry import register
from surestep.methods._single_step import SingleStep


@register("n-fgsm")
@dataclass
class NFGSM(SingleStep):
    """N-FGSM: uniform noise of up to ``noise`` times eps, then a step of ``alpha``.

    The noise is clipped to the data range before the gradient is taken, as in the authors' code,
    but never projected to the eps ball: the point may lie ``noise * eps + alpha`` from the image.
    The attack runs in train mode, as RS-FGSM's does; ``alpha`` is eps by default.
    """

    summary = "strong uniform noise, a full step from there, not projected to the ball"
    paper = "de Jorge et al. 2022, arXiv 2202.01181"
    presets = {
        # The paper has no MNIST; with its noise of 2 eps = 0.6 little is left of a digit.
        "mnist": recipe(MNIST_ZOO, noise=1.0),
        "cifar10": recipe(
            CIFAR_ZOO,
            noise=2.0,
            source="de Jorge et al. 2022 (theirs: PreActResNet-18, a rate that peaks at half)",
        ),
    }
    train_mode = True
    objective = staticmethod(weighted_log_odds)
    ball = False

    noise: float = param(2.0, ge=0)
    alpha: float = of_eps(1)

    def start(self, x: Tensor) -> Tensor:
        """Return the noisy image, within the data range."""
        return self.threat.clip(x + self.threat.random_delta(x, self.noise * self.threat.eps))

    @property
    def size(self) -> float:
        """Length of the step: alpha."""
        return self.alpha
