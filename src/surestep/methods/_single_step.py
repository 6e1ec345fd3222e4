"""Adversarial training with one gradient step, split into parts, and the base class built on it.

All such methods have the same form: a start, a gradient there, a step, an end. They differ in the
start, the gradient, the step length, and whether the result is projected to the eps ball.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from surestep.attacks.gradients import input_gradient
from surestep.attacks.lending import attacking
from surestep.attacks.losses import log_odds
from surestep.methods._base import Cost, Method, Update
from surestep.methods._registry import METHODS, build_written


class SingleStep(Method):
    """One gradient step from a start, then cross entropy at the result.

    Subclasses override ``start``, ``gradient`` (or its ``objective``), ``size`` and ``ball`` (or
    ``around``). Each is a Python method of its own, so that regularizers can use any of these
    perturbations in place of FGSM's.
    """

    train_mode: ClassVar[bool] = False
    """Whether the model is attacked in train mode."""
    objective = staticmethod(log_odds)
    """What the step raises, per sample (N,), as a function of logits (N, K) and labels (N,)."""
    ball: ClassVar[bool] = True
    """Whether the result is projected to the eps ball; otherwise only to the data range."""
    gradients = 1
    """Number of input gradients that ``gradient`` takes, for the cost of what builds on it."""

    def start(self, x: Tensor) -> Tensor:
        """Return the point (N, ...) at which the gradient is taken."""
        return x

    def gradient(self, model: nn.Module, point: Tensor, y: Tensor) -> Tensor:
        """Return the gradient (N, ...) to step along; the model is in the mode to attack."""
        return input_gradient(model, point, y, self.objective)[0]

    @property
    def size(self) -> float:
        """Length of the step."""
        return self.threat.eps

    def around(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """Return what projects points (N, ...) to the ball, or only to the data range."""
        return self.threat.around(x) if self.ball else self.threat.clip

    def step(self, start: Tensor, grad: Tensor, x: Tensor) -> Tensor:
        """Return the end (N, ...) of the step from a start along its gradient."""
        return self.around(x)(start + self.threat.steepest_step(grad, self.size))

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return x_adv (N, ...)."""
        with attacking(model, train_mode=self.train_mode) as inner:
            start = self.start(x)
            grad = self.gradient(inner, start, y)
        return self.step(start, grad, x)

    def craft(self, model: nn.Module, x: Tensor, y: Tensor) -> Update:
        """Train on the perturbed images."""
        return Update(self.perturb(model, x, y), self.plain_loss(y))

    def cost(self, batch_size: int) -> Cost:
        """The gradients, one update."""
        return Cost.of(attack=self.gradients, update=1)


def unchanged(cls: type[Method], *parts: str) -> bool:
    """Return whether a method is a ``SingleStep`` that overrides none of these parts."""
    return issubclass(cls, SingleStep) and all(
        getattr(cls, part) is getattr(SingleStep, part) for part in parts
    )


def _of_parts(cls: type[Method]) -> bool:
    """Return whether a method is fully described by a start, a gradient, a size and an end."""
    return unchanged(cls, "perturb", "step")


_LOST = ("needs_index", "needs_progress", "kept", "kept_rows", "second_order")


class OnSingleStep(Method):
    """A method built on the perturbation of a single-step method: FGSM or another.

    Subclasses have a field ``perturbation``: the slug of a ``SingleStep`` method, optionally with
    settings, as in ``"n-fgsm noise=1"``. They adopt its dropout if it is larger (SADS).
    """

    perturbation: str

    def set_up(self) -> None:
        """Build the perturbation."""
        found = build_written(self.perturbation, self.threat)
        if not _of_parts(type(found)):
            known = [name for name, cls in METHODS.items() if _of_parts(cls)]
            self.require(False, "perturbation", f"a single-step method: {', '.join(known)}")
        assert isinstance(found, SingleStep)
        # Only its parts are used, so nothing would tell it the progress or save its state.
        lost = [name for name in _LOST if getattr(found, name)]
        self.require(not lost, "perturbation", "a single-step method without schedule or state")
        self.base = found
        self.dropout = max(self.dropout, found.dropout)

    def set_strength(self, share: float) -> None:
        """Scale the perturbation too."""
        super().set_strength(share)
        self.base.set_strength(share)
