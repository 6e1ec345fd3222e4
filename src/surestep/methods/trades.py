"""TRADES: clean accuracy traded for agreement between clean and adversarial outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surestep.attacks.ascent import climb
from surestep.attacks.inputs import forward_logits
from surestep.attacks.lending import attacking
from surestep.methods._base import Cost, Criterion, LossAndTerms, Method, Update
from surestep.methods._functional import stepping
from surestep.methods._hyperparameters import of_eps, of_span, param
from surestep.methods._losses import kl
from surestep.methods._presets import CIFAR_RESNET, MNIST_FAST, recipe
from surestep.methods._registry import register
from surestep.threat import ThreatModel


def ascend_kl(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    start: Tensor,
    threat: ThreatModel,
    steps: int,
    alpha: float,
) -> Tensor:
    """Return x_adv (N, ...): from ``start``, ascend KL(f(x) || f(x_adv)) within the ball.

    The clean output is computed once, not at every step.
    """
    with attacking(model) as inner:
        with torch.no_grad():
            clean = F.log_softmax(forward_logits(inner, x), dim=1)

        def divergence(logits: Tensor, y: Tensor) -> Tensor:
            return kl(clean, F.log_softmax(logits, dim=1))

        return climb(inner, x, y, start, threat, steps=steps, size=alpha, objective=divergence)


def trades_update(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    beta: float,
    steps: int,
    alpha: float,
    sigma: float = 0.001,
    criterion: Criterion = F.cross_entropy,
) -> Update:
    """Minimise clean CE plus beta times KL(f(x) || f(x_adv)), x_adv found by maximising that KL.

    The update takes clean and adversarial images through one forward pass, so batch statistics
    cover both.

    Args:
        model: the classifier, in train mode.
        x: images (N, ...).
        y: labels (N,).
        threat: norm, radius and data range.
        beta: weight of the KL term.
        steps: number of attack steps.
        alpha: size of one step.
        sigma: standard deviation of the Gaussian start.
        criterion: the cross entropy of the clean term.

    Returns:
        The update; ``trades_loss`` takes it, and returns the ``StepResult``.
    """
    start = x + sigma * torch.randn_like(x)
    x_adv = ascend_kl(model, x, y, start, threat, steps, alpha)

    def loss(logits: Tensor) -> LossAndTerms:
        clean, adversarial = logits.split(len(x))
        ce = criterion(clean, y)
        divergence = kl(F.log_softmax(clean, dim=1), F.log_softmax(adversarial, dim=1)).mean()
        return ce + beta * divergence, {"ce": ce, "kl": divergence}

    return Update(torch.cat([x, x_adv]), loss, slice(len(x), None))


trades_loss = stepping(trades_update)


@register("trades")
@dataclass
class TRADES(Method):
    """TRADES, see ``trades_update``. ``alpha`` is 0.007 / (8 / 255) of eps by default."""

    summary = "clean cross entropy plus the divergence of clean and adversarial outputs"
    paper = "Zhang et al. 2019, arXiv 1901.08573"
    presets = {
        "mnist": recipe(MNIST_FAST, beta=1.0, steps=40, alpha=0.01),
        "cifar10": recipe(CIFAR_RESNET, beta=6.0, steps=10, alpha=0.007),
    }

    beta: float = param(6.0, ge=0)
    steps: int = param(10, ge=1)
    alpha: float = of_eps(0.007 * 255 / 8)
    sigma: float = of_span(0.001)

    def craft(self, model: nn.Module, x: Tensor, y: Tensor) -> Update:
        """See ``trades_update``."""
        return trades_update(model, x, y, self.threat, criterion=self.criterion, **self.params())

    def cost(self, batch_size: int) -> Cost:
        """One clean forward and the steps; clean and adversarial images in the update."""
        return Cost.of(attack=self.steps, update=2, forward=1)
