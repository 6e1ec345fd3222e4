"""Adversarial training with one gradient step: FGSM, R-FGSM, RS-FGSM and N-FGSM.

They share one form: a random start, one gradient there, one step, a clip. They differ in the
start, in the step's length, and in whether the result returns to the eps ball.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor, nn

from surestep.attacks.core import attacking, input_gradient
from surestep.attacks.losses import cross_entropy, log_odds
from surestep.errors import UserError
from surestep.methods._base import METHODS, Cost, Method, Preset, Update, build, register
from surestep.methods._presets import CIFAR_RESNET, MNIST_DEMO, MNIST_FAST, MNIST_SAT, recipe


class SingleStep(Method):
    """One gradient step from a start, then cross entropy at the result.

    The parts are methods of their own, so that the regularizers can take any of these
    perturbations for FGSM's.
    """

    train_mode: ClassVar[bool] = False
    objective = staticmethod(log_odds)
    ball: ClassVar[bool] = True
    """Whether the result returns to the eps ball; else to the data range only."""

    def start(self, x: Tensor) -> Tensor:
        """Return the point (N, ...) at which the gradient is taken."""
        return x

    @property
    def size(self) -> float:
        """Length of the step."""
        return self.threat.eps

    def gradient(self, model: nn.Module, point: Tensor, y: Tensor) -> Tensor:
        """Return the gradient to step along (N, ...), from a model that is ready for it."""
        return input_gradient(model, point, y, self.objective)[0]

    def finish(self, point: Tensor, x: Tensor) -> Tensor:
        """Bring the point back to where it must lie."""
        return self.threat.project(point, x) if self.ball else self.threat.clip(point)

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return x_adv (N, ...)."""
        with attacking(model, train_mode=self.train_mode) as inner:
            start = self.start(x)
            grad = self.gradient(inner, start, y)
            return self.finish(start + self.threat.steepest_step(grad, self.size), x)

    def craft(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor | None) -> Update:
        """Train on the perturbed images."""
        return Update(self.perturb(model, x, y), self.plain_loss(y))

    def cost(self, batch_size: int) -> Cost:
        """One gradient, one update."""
        return Cost.of(attack=1, update=1)


def _of_parts(cls: type[Method]) -> bool:
    """Tell whether a method is a start, a gradient, a step and an end, and nothing else."""
    return issubclass(cls, SingleStep) and cls.perturb is SingleStep.perturb


class OnSingleStep(Method):
    """A method that adds something to single-step training: to FGSM's or to another's.

    Subclasses have a field ``perturbation``: a slug of this file's kind, with settings after it
    if need be, as in ``"n-fgsm noise=1"``.
    """

    perturbation: str

    def validate(self) -> None:
        """Build the perturbation."""
        self.base = self.single_step(self.perturbation)

    def single_step(self, written: str) -> SingleStep:
        """Return the perturbation of a name, with its settings.

        Raises:
            UserError: the method is unknown or no single-step one, or a setting is wrong.
        """
        slug, *rest = written.split() or [""]
        pairs = [setting.partition("=") for setting in rest]
        try:
            params = {name: float(Fraction(value)) for name, _, value in pairs}
        except (ValueError, ZeroDivisionError):
            raise UserError(
                f"{self.slug}: perturbation {written!r} is not a method with settings, "
                "such as 'n-fgsm noise=1'"
            ) from None
        found = build(slug, self.threat, params)
        if not _of_parts(type(found)):
            known = [name for name, cls in METHODS.items() if _of_parts(cls)]
            self.require(False, "perturbation", f"a single-step method: {', '.join(known)}")
        assert isinstance(found, SingleStep)
        return found

    @property
    def gradients(self) -> float:
        """Input gradients that one perturbation takes."""
        cost = self.base.cost(1)
        return cost.input_grad - cost.weight_grad

    def set_strength(self, share: float) -> None:
        """Set it for the perturbation too."""
        super().set_strength(share)
        self.base.set_strength(share)


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

    def start(self, x: Tensor) -> Tensor:
        """Step at random."""
        assert self.alpha is not None
        return self.threat.clip(x + self.threat.steepest_step(torch.randn_like(x), self.alpha))

    @property
    def size(self) -> float:
        """The rest of eps."""
        assert self.alpha is not None
        return self.threat.eps - self.alpha


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
        self.not_negative("alpha")

    def start(self, x: Tensor) -> Tensor:
        """Start at random in the ball."""
        return x + self.threat.random_delta(x)

    @property
    def size(self) -> float:
        """Alpha."""
        assert self.alpha is not None
        return self.alpha


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
    ball = False

    noise: float = 2.0
    alpha: float | None = None

    def validate(self) -> None:
        """Check the noise and alpha, or take its default."""
        self.alpha = self.threat.eps if self.alpha is None else self.alpha
        self.not_negative("noise", "alpha")

    def start(self, x: Tensor) -> Tensor:
        """Start in the noise."""
        return x + self.threat.random_delta(x, self.noise * self.threat.eps)

    @property
    def size(self) -> float:
        """Alpha."""
        assert self.alpha is not None
        return self.alpha
