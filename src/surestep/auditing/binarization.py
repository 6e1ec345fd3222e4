"""The binarization test (Zimmermann et al. 2022, "Increasing confidence...", section 3).

Around each image, points are drawn well inside the ball and one on its surface. A linear readout of
the model's features is fitted to separate that one from the others. An adversarial point therefore
exists, and an attack that finds none is too weak for this model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surestep.attacks.ascent import Ascent, Best
from surestep.attacks.gradients import NoGradient
from surestep.attacks.inputs import features_of
from surestep.attacks.outcomes import share_of
from surestep.devices import finest
from surestep.threat import ThreatModel

INNER, RANDOM, STEPS = 999, 200, 30


class Features(nn.Module):
    """A model's features, as if logits (N, D).

    Args:
        model: in eval mode.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        """Return the features in the finest dtype that the device has."""
        found = features_of(self.model, x).to(finest(x.device))
        # Logits need at least two columns; the readout gives a column of zeros no weight.
        return F.pad(found, (0, 1)) if found.shape[1] < 2 else found


class _Solved(Best):
    """Notes which points lie on the planted point's side, where the objective is positive.

    The labels of these problems are their numbers: the objective takes that problem's readout.
    """

    def offer(self, rows: Tensor, x_adv: Tensor, logits: Tensor) -> None:
        self.wrong[rows] |= self.objective(logits, self.y[rows]) > 0


def binarization_rates(
    model: nn.Module, x: Tensor, threat: ThreatModel, batch_size: int
) -> tuple[float, float, int] | None:
    """Return the shares of problems that PGD and random points solve, and how many were posed.

    Args:
        model: in eval mode.
        x: images (N, ...).
        threat: norm, radius and data range.
        batch_size: images per pass.

    Returns:
        None if no problem could be posed because the planted points' features do not differ.
    """
    features = Features(model)
    readouts, biases, kept = [], [], []
    for row in range(len(x)):
        image = x[row : row + 1]
        planted = threat.project(image + threat.random_step(image, threat.eps), image)
        with torch.no_grad():
            # For large images: never draw more points than go through the model at once.
            sizes = [min(batch_size, INNER - k) for k in range(0, INNER, batch_size)]
            drawn = (
                threat.random_start(image.repeat_interleave(k, 0), 0.95 * threat.eps) for k in sizes
            )
            inner = torch.cat([features(z) for z in (image, *drawn)])
            readout = _separate(inner, features(planted)[0])
        if readout is not None:
            readouts.append(readout[0])
            biases.append(readout[1])
            kept.append(row)
    if not kept:
        return None
    weight, bias, x = torch.stack(readouts), torch.stack(biases), x[kept]

    def score(found: Tensor, rows: Tensor) -> Tensor:
        return (found * weight[rows]).sum(1) + bias[rows]

    ascent = Ascent(threat, STEPS, threat.eps * 2.5 / STEPS, score)
    solved, lucky = [], []
    for rows in torch.arange(len(x), device=x.device).split(batch_size):
        by_gradient, by_chance = (_Solved(x[rows], rows, score) for _ in range(2))
        try:
            ascent.search(features, by_gradient)
        except NoGradient:
            # Only the start counts.
            by_gradient.try_points(features, by_gradient.rows(), threat.random_start(x[rows]))
        for _ in range(RANDOM):
            by_chance.try_points(features, by_chance.rows(), threat.random_start(x[rows]))
        solved.append(by_gradient.wrong)
        lucky.append(by_chance.wrong)
    return share_of(torch.cat(solved)), share_of(torch.cat(lucky)), len(x)


def _separate(inner: Tensor, planted: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return weight (D,) and bias of a readout positive only at ``planted``, or None."""
    mean, std = inner.mean(0), inner.std(0)
    away = planted - mean
    # Ridge whitening in the span of the samples, since D may far exceed their number.
    centred = inner - mean
    ridge = 1e-3 * centred.square().sum() / len(inner) + 1e-12
    gram = centred @ centred.T + len(inner) * ridge * torch.eye(len(inner)).to(inner)
    weight = (away - centred.T @ torch.linalg.solve(gram, centred @ away)) / ridge
    if not weight.isfinite().all() or not std.any():
        return None
    highest, at = (inner @ weight).max(), planted @ weight
    if not at > highest * (1 + 1e-9) + 1e-9:
        return None
    # The boundary passes close to the planted point, as in the paper: little else is on its side.
    return weight, -(highest + 0.9 * (at - highest))
