"""Adversarial training with one gradient step, in parts, and what builds upon any of it.

All of it has one form: a start, one gradient there, one step, an end. Methods differ in the start,
in the gradient, in the step's length, and in whether the result returns to the eps ball.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from surestep.attacks.core import input_gradient
from surestep.attacks.lending import attacking
from surestep.attacks.losses import log_odds
from surestep.methods._base import METHODS, Cost, Method, Update
from surestep.methods._registry import build_written


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
        return self.step_on(model, x, y, self.train_mode)

    def step_on(self, model: nn.Module, x: Tensor, y: Tensor, train_mode: bool) -> Tensor:
        """Return x_adv (N, ...) of a model in train or in eval mode."""
        with attacking(model, train_mode=train_mode) as inner:
            start = self.start(x)
            grad = self.gradient(inner, start, y)
            return self.finish(start + self.threat.steepest_step(grad, self.size), x)

    def craft(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor | None) -> Update:
        """Train on the perturbed images."""
        return Update(self.perturb(model, x, y), self.plain_loss(y))

    def cost(self, batch_size: int) -> Cost:
        """One gradient, one update."""
        return Cost.of(attack=1, update=1)


def unchanged(cls: type[Method], *parts: str) -> bool:
    """Tell whether a method is a single step and has these parts as ``SingleStep`` has them."""
    return issubclass(cls, SingleStep) and all(
        getattr(cls, part) is getattr(SingleStep, part) for part in parts
    )


def _of_parts(cls: type[Method]) -> bool:
    """Tell whether a method is a start, a gradient, a step and an end, and nothing else."""
    return unchanged(cls, "perturb", "step_on")


class OnSingleStep(Method):
    """A method that adds something to single-step training: to FGSM's or to another's.

    Subclasses have a field ``perturbation``: a slug of this file's kind, with settings after it
    if need be, as in ``"n-fgsm noise=1"``. Its dropout, if it has one (SADS), is theirs.
    """

    perturbation: str

    def validate(self) -> None:
        """Build the perturbation."""
        found = build_written(self.perturbation, self.threat)
        if not _of_parts(type(found)):
            known = [name for name, cls in METHODS.items() if _of_parts(cls)]
            self.require(False, "perturbation", f"a single-step method: {', '.join(known)}")
        assert isinstance(found, SingleStep)
        self.base = found
        self.dropout = max(self.dropout, found.dropout)

    @property
    def gradients(self) -> float:
        """Input gradients that one perturbation takes."""
        cost = self.base.cost(1)
        return cost.input_grad - cost.weight_grad

    def set_strength(self, share: float) -> None:
        """Set it for the perturbation too."""
        super().set_strength(share)
        self.base.set_strength(share)
