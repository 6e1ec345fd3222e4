"""Adversarial training with one gradient step: FGSM, R-FGSM, RS-FGSM and N-FGSM.

They share one form: a random start, one gradient there, one step, a clip. They differ in the
start, in the step's length, and in whether the result returns to the eps ball.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surestep.attacks.core import attacking, forward_logits, input_gradient
from surestep.attacks.losses import cross_entropy, log_odds
from surestep.methods._base import Cost, Method, Preset, StepResult, register
from surestep.methods._presets import CIFAR_RESNET, MNIST_DEMO, MNIST_FAST, MNIST_SAT, recipe


class SingleStep(Method):
    """One gradient step from a start, then cross entropy at the result."""

    train_mode = False
    objective = staticmethod(log_odds)

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return x_adv (N, ...) from a model that is ready to be attacked."""
        raise NotImplementedError

    def step(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor | None) -> StepResult:
        """Compute the cross entropy at ``perturb``'s result."""
        with attacking(model, train_mode=self.train_mode) as inner:
            x_adv = self.perturb(inner, x, y)
        logits = forward_logits(model, x_adv)
        loss = self.criterion(logits, y)
        return StepResult(loss, {"ce": loss.detach()}, x_adv, logits.detach())

    def cost(self, batch_size: int) -> Cost:
        """One gradient, one update."""
        return Cost.of(attack=1, update=1)

    def ascend(self, model: nn.Module, start: Tensor, y: Tensor, size: float) -> Tensor:
        """Return ``start`` moved by one steepest step of ``size``, unclipped."""
        grad, _, _ = input_gradient(model, start, y, self.objective)
        return start + self.threat.steepest_step(grad, size)


@register("fgsm")
@dataclass
class FGSM(SingleStep):
    """FGSM-AT: x_adv = Box(x + eps * sign(grad)). Ends in gradient masking at useful radii."""

    summary = "one full gradient step from the image; prone to gradient masking"
    paper = "Goodfellow et al. 2015, arXiv 1412.6572"
    presets = {
        "mnist": recipe(MNIST_SAT),
        "mnist-fast": recipe(MNIST_FAST),
        "mnist-demo": recipe(MNIST_DEMO, settings={"lr": 0.05}),
        "cifar10": recipe(CIFAR_RESNET),
    }

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Take the full step from x."""
        return self.threat.project(self.ascend(model, x, y, self.threat.eps), x)


@register("r-fgsm")
@dataclass
class RFGSM(SingleStep):
    """R-FGSM: a random-sign step of alpha, then a gradient step of eps - alpha.

    ``alpha`` is half of eps by default, as in the paper.
    """

    summary = "a random-sign step, then a gradient step of the rest of eps"
    paper = "Tramèr et al. 2018, arXiv 1705.07204"
    presets = {"mnist": recipe(MNIST_FAST), "cifar10": recipe(CIFAR_RESNET)}

    alpha: float | None = None

    def validate(self) -> None:
        """Check alpha, or take its default."""
        self.alpha = self.threat.eps / 2 if self.alpha is None else self.alpha
        eps = self.threat.eps
        self.require(0 <= self.alpha <= eps, "alpha", f"in [0, eps = {eps:g}]")

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Step at random, then along the gradient."""
        assert self.alpha is not None
        start = self.threat.clip(x + self.threat.steepest_step(torch.randn_like(x), self.alpha))
        x_adv = self.ascend(model, start, y, self.threat.eps - self.alpha)
        return self.threat.project(x_adv, x)


@register("rs-fgsm")
@dataclass
class RSFGSM(SingleStep):
    """RS-FGSM ("Fast"): a uniform start in the ball, a step of 1.25 eps, back to the ball.

    The attack runs in train mode, as in the authors' code; batch statistics are left untouched.
    The start is not clipped to the data range before the gradient. ``alpha`` is the step's size.
    """

    summary = "a uniform random start, a step of 1.25 eps, back to the ball"
    paper = "Wong et al. 2020, arXiv 2001.03994"
    presets = {
        "mnist": Preset(
            eps=0.3,
            params={"alpha": 0.375},
            settings={
                "epochs": 10,
                "batch_size": 100,
                "optimizer": "adam",
                "lr": 0.005,
                "weight_decay": 0.0,
                "schedule": "triangular",
            },
            model="cnn-small",
            dataset="mnist",
            source="Wong et al. 2020 and the authors' MNIST script",
        ),
        "cifar10": recipe(
            CIFAR_RESNET,
            alpha=10 / 255,
            settings={"epochs": 15, "lr": 0.2, "schedule": "triangular"},
            source="Wong et al. 2020 (they use PreActResNet-18)",
        ),
    }
    train_mode = True
    objective = staticmethod(cross_entropy)

    alpha: float | None = None

    def validate(self) -> None:
        """Check alpha, or take its default."""
        self.alpha = 1.25 * self.threat.eps if self.alpha is None else self.alpha
        self.require(self.alpha >= 0, "alpha", ">= 0")

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Start at random, step, project."""
        assert self.alpha is not None
        start = x + self.threat.random_delta(x)
        return self.threat.project(self.ascend(model, start, y, self.alpha), x)


@register("n-fgsm")
@dataclass
class NFGSM(SingleStep):
    """N-FGSM: uniform noise of up to ``noise`` times eps, then a step of ``alpha``; no ball.

    The noise is not taken back: the point may lie ``noise * eps + alpha`` from the image. Attack
    in train mode, as RS-FGSM; ``alpha`` is eps by default.
    """

    summary = "strong uniform noise, a full step from there, not projected to the ball"
    paper = "de Jorge et al. 2022, arXiv 2202.01181"
    presets = {
        # The paper has no MNIST; with its noise of 2 eps = 0.6 little is left of a digit.
        "mnist": recipe(MNIST_FAST, noise=1.0, source="ours: as mnist-fast of the others"),
        "cifar10": recipe(
            CIFAR_RESNET,
            noise=2.0,
            settings={"epochs": 30, "lr": 0.2, "schedule": "triangular"},
            source="de Jorge et al. 2022 (they use PreActResNet-18)",
        ),
    }
    train_mode = True
    objective = staticmethod(cross_entropy)

    noise: float = 2.0
    alpha: float | None = None

    def validate(self) -> None:
        """Check the noise and alpha, or take its default."""
        self.alpha = self.threat.eps if self.alpha is None else self.alpha
        self.require(self.noise >= 0, "noise", ">= 0")
        self.require(self.alpha >= 0, "alpha", ">= 0")

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Start in the noise, step, clip to the data range only."""
        assert self.alpha is not None
        start = x + self.threat.random_delta(x, self.noise * self.threat.eps)
        return self.threat.clip(self.ascend(model, start, y, self.alpha))
