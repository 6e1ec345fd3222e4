"""Parts of losses that several methods use."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from surestep.attacks.losses import of_true_class

T = TypeVar("T")


def one_hot(y: Tensor, classes: int) -> Tensor:
    """Return labels (N,) as a boolean mask (N, K); ``F.one_hot`` would wait for the device."""
    return y[:, None] == torch.arange(classes, device=y.device)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q) per sample (N,) from log-probabilities (N, K)."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


def squared_distance(one: Tensor, other: Tensor) -> Tensor:
    """Return the squared l2 distance of two sets of logits (N, K), averaged over the images."""
    return (one - other).square().sum(1).mean()


def js(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence per sample (N,) from log-probabilities (N, K)."""
    middle = torch.logaddexp(log_p, log_q) - math.log(2)
    return (kl(log_p, middle) + kl(log_q, middle)) / 2


def pairing(one: Tensor, other: Tensor) -> Tensor:
    """Return the squared difference of two sets of logits (N, K), averaged over all entries."""
    return (one - other).square().mean()


def relaxed_cross_entropy(logits: Tensor, y: Tensor, share: float) -> Tensor:
    """Return the cross entropy (N,) with labels that give ``share`` to the true class.

    The wrong classes split the rest evenly, whereas torch's label smoothing also gives the true
    class a part of it.
    """
    log_p = F.log_softmax(logits, dim=1)
    true = of_true_class(log_p, y)
    wrong = (log_p.sum(1) - true) / (logits.shape[1] - 1)
    return -(share * true + (1 - share) * wrong)


def once(function: Callable[..., T]) -> Callable[..., T]:
    """Wrap a function so that it runs once and then keeps returning its first result.

    For losses that update running values: AWP takes a second pass over the same update, which must
    not count as a second step.
    """
    found: list[T] = []

    def call(*args: Any) -> T:
        if not found:
            found.append(function(*args))
        return found[0]

    return call
