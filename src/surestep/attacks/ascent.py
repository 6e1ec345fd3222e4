"""Steepest ascent inside the ball, and each sample's strongest point on the way."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surestep.attacks.gradients import input_gradient, l1_unit
from surestep.attacks.inputs import forward_logits
from surestep.attacks.losses import (
    Objective,
    log_odds,
    margin,
    size_of_margin,
)
from surestep.attacks.outcomes import misclassified
from surestep.devices import rounding
from surestep.threat import ThreatModel, per_sample

_BUCKET = 32


def round_up(count: int, most: int) -> int:
    """Round a number of images up to a multiple of 32, but not above ``most``.

    Backends prepare, and keep, kernels for every batch size they meet. Batches that shrink one
    image at a time would fill memory with them and spend their time making them.
    """
    return min(most, -(-count // _BUCKET) * _BUCKET)


class Best:
    """Each sample's strongest point so far: misclassified first, then the highest objective.

    ``first_wrong`` is the number of points a sample had been offered before the first that was
    misclassified, -1 if there was none: after how many steps an attack succeeded.

    Args:
        x: the clean images (N, ...).
        y: labels (N,).
        objective: per-sample, to be maximised.
        stop_when_wrong: no longer attack a sample once it is misclassified. The accuracy under
            attack is the same, and the cost falls with it. Under autocast, or in TF32, the sample
            must be misclassified clearly: by a hair in bf16 is often right in float32.
    """

    def __init__(
        self, x: Tensor, y: Tensor, objective: Objective, *, stop_when_wrong: bool = False
    ) -> None:
        self.x, self.y, self.objective = x, y, objective
        self.stop_when_wrong = stop_when_wrong
        self.x_adv = x.clone()
        self.values = torch.full((len(x),), float("-inf"), device=x.device)
        self.wrong = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.done = self.wrong.clone()
        self.first_wrong = torch.full((len(x),), -1, device=x.device)
        self.offers = 0
        self.slack = rounding(x.device)

    def rows(self) -> Tensor:
        """Return the indices of the samples still to be attacked."""
        if self.stop_when_wrong:
            return (~self.done).nonzero().squeeze(1)
        return torch.arange(len(self.x), device=self.x.device)

    def offer(self, rows: Tensor, x_adv: Tensor, logits: Tensor) -> None:
        """Take the points ``x_adv`` of the samples ``rows`` where they beat the best so far."""
        y, was_wrong, held = self.y[rows], self.wrong[rows], self.values[rows]
        # NaN, which counts as wrong, would be larger than nothing and smaller than nothing.
        values = self.objective(logits, y).to(held.dtype).nan_to_num(nan=float("-inf"))
        wrong = misclassified(logits, y)
        newly = wrong & ~was_wrong
        better = newly | ((wrong == was_wrong) & (values > held))
        # Indexing by a boolean would wait for the device, to learn how many are true.
        self.x_adv[rows] = torch.where(per_sample(better, x_adv), x_adv, self.x_adv[rows])
        self.values[rows] = torch.where(better, values, held)
        self.wrong[rows] = was_wrong | wrong
        self.first_wrong[rows] = torch.where(newly, self.offers, self.first_wrong[rows])
        self.offers += 1
        if self.stop_when_wrong:
            least = (self.slack * size_of_margin(logits, y)).nan_to_num(nan=0.0)
            self.done[rows] |= wrong & (margin(logits, y) > least)

    @torch.no_grad()
    def try_points(self, model: nn.Module, rows: Tensor, x_adv: Tensor) -> None:
        """Offer points that have not been through the model yet."""
        self.offer(rows, x_adv, forward_logits(model, x_adv))


def climb(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    start: Tensor,
    threat: ThreatModel,
    *,
    steps: int,
    size: float,
    objective: Objective = log_odds,
) -> Tensor:
    """Return the last point (N, ...) of a steepest ascent inside the ball: what training uses.

    Args:
        model: in the mode the caller wants; see ``attacking``.
        x: images (N, ...), around which the ball lies.
        y: labels (N,).
        start: where the ascent begins (N, ...).
        threat: norm, radius and data range.
        steps: number of gradient steps.
        size: length of each, in pixel units.
        objective: per-sample, to be maximised.
    """
    point, inside = start, threat.around(x)
    for _ in range(steps):
        grad, _ = input_gradient(model, point, y, objective)
        point = inside(point + threat.steepest_step(grad, size))
    return point


@dataclass(frozen=True)
class Ascent:
    """Steepest ascent that judges every point: I-FGSM, MI-FGSM and PGD are settings of it.

    Args:
        threat: norm, radius and data range.
        steps: number of gradient steps.
        step_size: of one step, in pixel units.
        objective: per-sample, to be maximised.
        decay: None for plain steps; else MI-FGSM's momentum (Dong et al. 2018, eq. 6).
        start_radius: of the random start; eps by default, 0 to start at the image.
    """

    threat: ThreatModel
    steps: int
    step_size: float
    objective: Objective = log_odds
    decay: float | None = None
    start_radius: float | None = None

    def search(self, model: nn.Module, best: Best) -> None:
        """Offer ``best`` every iterate from a random start: what judging uses.

        One forward pass more than there are steps, to judge the last point too.
        """
        rows = best.rows()
        x = best.x[rows]
        x_adv, momentum = self.threat.random_start(x, self.start_radius), None
        inside = self.threat.around(x)
        for _ in range(self.steps):
            grad, logits = input_gradient(model, x_adv, best.y[rows], self.objective)
            # A NaN would stay in the point from here on, and a broken point breaks the model.
            grad = grad.nan_to_num(0.0)
            best.offer(rows, x_adv, logits)
            if best.stop_when_wrong:
                done = best.done[rows]
                left = len(rows) - int(done.sum())
                if not left:
                    return
                if (kept := round_up(left, len(rows))) < len(rows):
                    # Those still right first; done ones fill up.
                    order = done.int().argsort(stable=True)[:kept]
                    rows, x_adv, grad = rows[order], x_adv[order], grad[order]
                    momentum = None if momentum is None else momentum[order]
                    inside = self.threat.around(best.x[rows])
            momentum = self._direction(grad, momentum)
            x_adv = inside(x_adv + self.threat.steepest_step(momentum, self.step_size))
        best.try_points(model, rows, x_adv)

    def _direction(self, grad: Tensor, momentum: Tensor | None) -> Tensor:
        if self.decay is None:
            return grad
        unit = l1_unit(grad)
        return unit if momentum is None else self.decay * momentum + unit
