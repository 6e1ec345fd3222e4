"""What every gradient attack and every training method is made of: gradients and ascent.

Input gradients only: no weight gradient is ever computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surestep.attacks.inputs import forward_logits
from surestep.attacks.lending import attacking, compiled, uses_batch_statistics
from surestep.attacks.losses import (
    Objective,
    cross_entropy,
    dlr,
    log_odds,
    margin,
    size_of_margin,
)
from surestep.devices import exact, finest, in_fp16, rounding
from surestep.errors import UserError
from surestep.threat import ThreatModel, per_sample

SAME = 1e-4
"""Largest distance between the logits of two equal passes, scaled to length one."""
_BUCKET = 32
_INDEPENDENT = (log_odds, cross_entropy, margin, dlr)
"""Objectives whose value for an image does not depend on the other images."""


def round_up(count: int, most: int) -> int:
    """Round a number of images up to a multiple of 32, but not above ``most``.

    Backends prepare, and keep, kernels for every batch size they meet. Batches that shrink one
    image at a time would fill memory with them and spend their time making them.
    """
    return min(most, -(-count // _BUCKET) * _BUCKET)


class NoGradient(UserError):
    """The logits do not depend on the images through autograd."""


def input_gradient(
    model: nn.Module, x: Tensor, y: Tensor, objective: Objective = log_odds
) -> tuple[Tensor, Tensor]:
    """Differentiate the objective with respect to the images, and nothing else.

    Args:
        model: in the mode the caller wants; see ``attacking``.
        x: images (N, ...).
        y: labels (N,).
        objective: per-sample, to be maximised.

    Returns:
        The gradient (as x) and the logits (N, K), both detached.

    Raises:
        NoGradient: the logits do not depend on x through autograd.
    """
    chunk = getattr(model, "attacked_at_once", None)
    if chunk and len(x) > chunk and objective in _INDEPENDENT:
        # Within a limit on memory: as one pass, each chunk would be computed again in backward.
        pairs = zip(x.split(chunk), y.split(chunk), strict=True)
        parts = [input_gradient(model, *pair, objective) for pair in pairs]
        return torch.cat([grad for grad, _ in parts]), torch.cat([logits for _, logits in parts])
    with torch.inference_mode(False), torch.enable_grad():
        # y is cloned too: a tensor made in inference mode cannot be saved for backward.
        x, y = x.detach().clone().requires_grad_(), y.clone()
        logits = forward_logits(model, x)
        values = objective(logits, y)
        grad = None
        if values.requires_grad:
            if in_fp16(x.device):
                grad = _gradient_by_fp16(model, x, logits, values)
            else:
                (grad,) = torch.autograd.grad(values.sum(), x, allow_unused=True)
                # As with logits, the next pass writes over what CUDA graphs return.
                grad = grad.clone() if grad is not None and compiled(model) else grad
        if grad is None:
            raise NoGradient(
                "the model's output has no gradient with respect to its input (a detach() or "
                "no_grad() in its forward?): gradient attacks and adversarial training need one"
            )
    return grad, logits.detach()


def _gradient_by_fp16(model: nn.Module, x: Tensor, logits: Tensor, values: Tensor) -> Tensor | None:
    """Return the gradient, backpropagated from logit gradients that are scaled into fp16's range.

    Otherwise cross entropy and divergences have gradient 0 in fp16 on images that the model is sure
    of, which would not be attacked. In train mode images depend on each other and share one factor.
    """
    (pull,) = torch.autograd.grad(values.sum(), logits, retain_graph=True)
    size = pull.abs().amax(1, keepdim=True)
    together = model.training or uses_batch_statistics(model)
    size = size.amax(0, keepdim=True).expand_as(size) if together else size
    size = torch.where(size > 0, size, 1)
    (grad,) = torch.autograd.grad(logits, x, pull / size, allow_unused=True)
    return None if grad is None else grad * per_sample(size.squeeze(1), grad)


def l1_unit(grad: Tensor) -> Tensor:
    """Return each sample's gradient over the sum of its absolute values; zero stays zero."""
    size = per_sample(grad.abs().flatten(1).sum(1), grad)
    return grad / torch.where(size > 0, size, 1)


def misclassified(logits: Tensor, y: Tensor) -> Tensor:
    """Return which samples are wrong: another class leads, or a logit is NaN."""
    return (logits.argmax(1) != y) | logits.isnan().any(1)


def share_of(flags: Tensor) -> float:
    """Return the share of a boolean tensor that is true, exactly, on any device; NaN of none."""
    return int(flags.sum()) / flags.numel() if flags.numel() else math.nan


def logit_distance(first: Tensor, second: Tensor) -> float:
    """Return the largest distance between two passes' logits (N, K), each scaled to length one.

    It is infinite if other entries are finite in the second pass than in the first.
    """
    whole = first.isfinite()
    if not whole.equal(second.isfinite()):
        return float("inf")
    one, two = (F.normalize(z.where(whole, 0).to(finest(z.device)), dim=1) for z in (first, second))
    return (one - two).norm(dim=1).max().item()


def passes_agree(first: Tensor, second: Tensor) -> bool:
    """Tell whether two passes' logits (N, K) differ by rounding alone."""
    return logit_distance(first, second) <= SAME


def in_turn(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attacks: Iterable[Callable[[Tensor, Tensor], Tensor]],
) -> Tensor:
    """Run attacks one after another, each on the samples that the earlier ones left.

    Args:
        model: what decides whether a point is misclassified.
        x: images (N, ...).
        y: labels (N,).
        attacks: each maps images and labels to points, on whatever model it likes.

    Returns:
        x_adv, shaped as x: misclassified where an attack succeeded, else the last one's point. A
        random model may misclassify it in the next pass, which the image itself would hide.
    """
    x_adv = x.detach().clone()
    left = torch.arange(len(x), device=x.device)
    with attacking(model) as inner:
        for attack in attacks:
            if not len(left):
                break
            found = attack(x[left], y[left])
            # In float32: what is wrong by a hair in bf16 may be right, and is not done then.
            with torch.no_grad(), exact(x.device):
                broken = misclassified(forward_logits(inner, found), y[left])
            x_adv[left] = found
            left = left[~broken]
    return x_adv


def map_batches(size: int, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Apply a function to tensors, ``size`` samples at a time, and concatenate what it returns."""
    parts = zip(*(tensor.split(size) for tensor in tensors), strict=True)
    return torch.cat([function(*part) for part in parts])


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


@dataclass
class Ascent:
    """Steepest ascent inside the threat model: I-FGSM, MI-FGSM and PGD are settings of it.

    Args:
        threat: norm, radius and data range.
        steps: number of gradient steps.
        step_size: of one step, in pixel units.
        objective: per-sample, to be maximised.
        decay: None for plain steps; else MI-FGSM's momentum (Dong et al. 2018, eq. 6).
    """

    threat: ThreatModel
    steps: int
    step_size: float
    objective: Objective = log_odds
    decay: float | None = None

    def last_iterate(self, model: nn.Module, x: Tensor, y: Tensor, start: Tensor) -> Tensor:
        """Return the last iterate from ``start`` (N, ...) around ``x``: what training uses."""
        x_adv, momentum, inside = start, None, self.threat.around(x)
        for _ in range(self.steps):
            grad, _ = input_gradient(model, x_adv, y, self.objective)
            momentum = self._direction(grad, momentum)
            x_adv = inside(x_adv + self.threat.steepest_step(momentum, self.step_size))
        return x_adv

    def search(self, model: nn.Module, best: Best, radius: float | None = None) -> None:
        """Offer ``best`` every iterate from a random start of ``radius``: what judging uses.

        One forward pass more than ``last_iterate``, to judge the last point too.
        """
        rows = best.rows()
        x = best.x[rows]
        x_adv, momentum = self.threat.random_start(x, radius), None
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
