"""What an attack maximises: per-sample objectives of logits (N, K) and labels (N,).

All are computed in the logits' type, float32 or float64. Those that attacks offer by name do not
vanish on a confident network.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from surestep.errors import UserError, look_up

Objective = Callable[[Tensor, Tensor], Tensor]
"""Maps logits (N, K) and labels (N,) to values (N,), whose sum an attack ascends."""


def _others(logits: Tensor, y: Tensor) -> Tensor:
    """Return the logits with the true class at minus infinity."""
    return logits.scatter(1, y[:, None], float("-inf"))


def of_true_class(values: Tensor, y: Tensor) -> Tensor:
    """Return each sample's value (N,) of its label y (N,), from values of all classes (N, K)."""
    return values.gather(1, y[:, None]).squeeze(1)


def log_odds(logits: Tensor, y: Tensor) -> Tensor:
    """Return log((1 - p_y) / p_y): cross entropy, without its vanishing gradient.

    With CE = -log p_y this is log(exp(CE) - 1), an increasing function of CE, so both rank
    points alike; and grad CE = (1 - p_y) * grad log_odds, so per sample both point the same
    way and every normalised step (sign, unit L2) is the same. Only the factor 1 - p_y is
    gone, and that is what underflows: in float32 it is 0 once the true logit leads by about 100,
    and an FGSM step of zero leaves the image as it was. (Per sample: in eval mode.)

    Args:
        logits: (N, K), K >= 2.
        y: labels (N,).
    """
    return torch.logsumexp(_others(logits, y), dim=1) - of_true_class(logits, y)


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return -log p_y per sample; where its gradient is followed see ``weighted_log_odds``."""
    return F.cross_entropy(logits, y, reduction="none")


def nowhere_flat_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return cross entropy (N,) with a gradient on every sample, for sums with another term.

    In float32 cross entropy has none where the true logit leads by about 100: there a trace of the
    log-odds is left. Elsewhere it is as rounded as in the methods' own code, whose steps it gives.
    """
    return cross_entropy(logits, y) + math.exp(-50) * log_odds(logits, y)


def weighted_log_odds(logits: Tensor, y: Tensor) -> Tensor:
    """Return log-odds, each times its constant weight in the gradient of the batch's cross entropy.

    For attacks in train mode. There batch norm couples the samples, so that the weights 1 - p_y
    of their gradients matter and log-odds alone would point elsewhere. Here the weights are taken
    over the largest of the batch: the gradient is that of cross entropy times one number, and a
    batch of confident samples has one. None is below exp(-50), so that samples beside which
    others are far less sure have a gradient too, and add nothing to those of the others.
    """
    values = log_odds(logits, y)
    weights = F.logsigmoid(values.detach())
    return values * (weights - weights.max()).clamp(min=-50).exp()


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Return max_{j != y} z_j - z_y (Carlini & Wagner 2017); positive when misclassified."""
    return _others(logits, y).amax(dim=1) - of_true_class(logits, y)


def size_of_margin(logits: Tensor, y: Tensor) -> Tensor:
    """Return the larger absolute value (N,) of the two logits that make the margin.

    Others do not round it: a class that is left out may be padded with -1e9 or -inf.
    """
    true = of_true_class(logits, y)
    return torch.maximum(true.abs(), (margin(logits, y) + true).abs())


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Return the difference of logits ratio (Croce & Hein 2020, eq. 6).

    The margin divided by the distance of the largest from the third largest logit, hence
    free of shift and scale.

    Raises:
        UserError: fewer than three classes.
    """
    if logits.shape[1] < 3:
        raise UserError(
            f"the dlr loss needs at least 3 classes, the model has {logits.shape[1]}: "
            "use the margin loss"
        )
    top = logits.topk(3, dim=1).values
    return margin(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)


OBJECTIVES: dict[str, Objective] = {"ce": log_odds, "margin": margin, "dlr": dlr}


def get(name: str) -> Objective:
    """Return the objective called ``name`` ("ce", "margin" or "dlr").

    Raises:
        UserError: there is none of that name.
    """
    return look_up("attack loss", name, OBJECTIVES)
