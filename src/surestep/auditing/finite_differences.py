"""Gradients held against finite differences: along themselves, and along random directions."""

from __future__ import annotations

import math
from functools import reduce

import torch
from torch import Tensor

from surestep.attacks import losses
from surestep.attacks.gradients import input_gradient
from surestep.attacks.inputs import forward_logits
from surestep.auditing._subject import Subject
from surestep.devices import exact, finest
from surestep.randomness import seed_everything

STRIDES = (1e-4, 1e-3, 1e-2, 0.1, 1.0)
"""Lengths, in eps, of the steps along the gradient."""
ACROSS = (0.01, 0.1, 1.0)
"""Lengths, in eps, of the steps along random directions. What is wrong over all of them is neither
rounding nor curvature."""
DIRECTIONS = 16
"""Number of random directions."""
CONTRADICTED = 0.5
"""Relative error, the median over the images, above which a gradient counts as wrong.

Measured: 0.001 on trained models, with kwta or dead zones too, up to 0.2 in bfloat16; 0.9 or more
where the gradient is that of another function.
"""


def error_along(s: Subject, x: Tensor, y: Tensor) -> float | None:
    """Return how far gradients are from finite differences along them, relative to themselves.

    The median over the images, for the stride where it is smallest: shorter strides drown in
    rounding, longer ones leave the region where the model is linear. None if rounding, or
    randomness that no seed repeats, hides the differences on nine tenths of the images.
    """
    with exact(x.device):
        ratios = s.map(lambda a, b: _ratios_along(s, a, b), x, y)
    errors = []
    for ratio in ratios.unbind(1):
        known = ratio[ratio.isfinite()]
        if len(known) >= max(3, 0.1 * len(x)):
            errors.append((known - 1).abs().median().item())
    return min(errors, default=None)


def errors_across(s: Subject, x: Tensor, y: Tensor) -> Tensor:
    """Return how far gradients are from differences along random directions, relative to these.

    A branch whose gradient is blocked adds nothing along the gradient of the others, so only steps
    in other directions show it. One error for each image where noise does not hide the differences;
    none at all if it does on most.
    """
    with exact(x.device):
        error = s.map(lambda a, b: _errors_across(s, a, b), x, y)
    found = error[error.isfinite()]
    return found if len(found) >= max(3, 0.5 * len(x)) else found[:0]


class _Local:
    """An objective around images: its gradient there, and its values at points nearby.

    A random model draws the same in every pass.

    Attributes:
        grad: (N, ...), 0 where it is NaN.
        start: the values (N,) at the images.
        noise: how large a difference of values (N,) noise alone may make.
    """

    def __init__(self, s: Subject, x: Tensor, y: Tensor, objective: losses.Objective) -> None:
        self.s, self.y, self.objective = s, y, objective
        seed_everything(s.seed)
        self.grad = input_gradient(s.model, x, y, objective)[0].nan_to_num(0)
        logits = self._logits(x)
        self.start = objective(logits, y)
        rounding = 64 * torch.finfo(torch.float32).eps * losses.size_of_margin(logits, y)
        self.noise = torch.maximum(rounding, 10 * (self.values(x) - self.start).abs())

    @torch.no_grad()
    def _logits(self, point: Tensor) -> Tensor:
        seed_everything(self.s.seed)
        return forward_logits(self.s.model, point).to(finest(point.device))

    def values(self, point: Tensor) -> Tensor:
        """Return the objective (N,) at points (N, ...)."""
        return self.objective(self._logits(point), self.y)

    def predicted(self, step: Tensor) -> Tensor:
        """Return the growth (N,) that the gradient predicts for steps (N, ...)."""
        kind = finest(step.device)
        return (self.grad.to(kind) * step.to(kind)).flatten(1).sum(1)


def _ratios_along(s: Subject, x: Tensor, y: Tensor) -> Tensor:
    """Return measured over predicted growth of the loss, (N, strides); NaN where noise hides it.

    The steps are steepest ascent, clipped to the data range.
    """
    local = _Local(s, x, y, losses.log_odds)
    ratios = []
    for stride in STRIDES:
        ahead = x + s.threat.steepest_step(local.grad, stride * s.threat.eps)
        step = s.threat.clip(ahead) - x
        growth, predicted = local.values(x + step) - local.start, local.predicted(step)
        ratios.append(torch.where(predicted > local.noise, growth / predicted, math.nan))
    return torch.stack(ratios, 1)


def _errors_across(s: Subject, x: Tensor, y: Tensor) -> Tensor:
    """Return the errors (N,) at the best length; NaN where noise hides them, or gradients are 0."""
    local = _Local(s, x, y, losses.margin)
    return reduce(torch.fmin, (_error_over(local, x, length) for length in ACROSS))


def _error_over(local: _Local, x: Tensor, length: float) -> Tensor:
    """Return the errors (N,) over steps of a length, in eps.

    The slope is half of the difference between a step's ends, the bend how far its middle lies from
    their mean.
    """
    s = local.s
    low, high = s.threat.bounds
    rows = []
    for k in range(DIRECTIONS):
        seed_everything(s.seed + 1 + k)  # a pass draws from the seed itself
        step = s.threat.random_step(x, length * s.threat.eps)
        # A model may clip what lies outside the data range.
        step = torch.where((x - step.abs() >= low) & (x + step.abs() <= high), step, 0)
        up, down = local.values(x + step), local.values(x - step)
        slope, bend = (up - down) / 2, (up + down) / 2 - local.start
        rows.append(torch.stack([slope, bend, slope - local.predicted(step)]))
    slope, bend, error = torch.stack(rows).square().mean(0).sqrt()
    # Of values that are independent at the three points, as where a model rounds inside, the ratio
    # of bend to slope is the square root of 3; of those that jump at random, 1. Error and slope are
    # equal if nothing was predicted.
    known = (slope > 4 * local.noise) & (bend < 1.3 * slope) & (error != slope)
    return torch.where(known, error / slope, math.nan)
