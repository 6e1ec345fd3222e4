"""Parts of losses that several methods use."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from surestep.attacks.losses import of_true_class


def one_hot(y: Tensor, classes: int) -> Tensor:
    """Return labels (N,) as a boolean mask (N, K); ``F.one_hot`` would wait for the device."""
    return y[:, None] == torch.arange(classes, device=y.device)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q) per sample (N,) from log-probabilities (N, K)."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


def pairing(one: Tensor, other: Tensor) -> Tensor:
    """Return the mean squared difference between two sets of logits (N, K)."""
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
