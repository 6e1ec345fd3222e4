"""What logits say of an attack: which samples it broke, and whether two passes agree."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surestep.attacks.inputs import forward_logits
from surestep.attacks.lending import attacking
from surestep.devices import exact, finest

SAME = 1e-4
"""Largest distance between the logits of two equal passes, scaled to length one."""


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
    finite = first.isfinite()
    if not finite.equal(second.isfinite()):
        return float("inf")
    one, two = (
        F.normalize(z.where(finite, 0).to(finest(z.device)), dim=1) for z in (first, second)
    )
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
