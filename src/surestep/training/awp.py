"""Adversarial weight perturbation: the update's gradient is taken at worse weights nearby.

Wu, Xia & Wang 2020, "Adversarial Weight Perturbation Helps Robust Generalization", arXiv
2004.05884. Combines with any method: the images of the update stay the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from surestep.attacks.lending import copy_all


@contextmanager
def perturbed_weights(model: nn.Module, gamma: float) -> Iterator[None]:
    """Move each weight tensor along its gradient by ``gamma`` times its norm; restore it on exit.

    One-dimensional tensors (biases, batch norm) are left alone, as in the authors' code.

    Args:
        model: its parameters hold gradients of the loss.
        gamma: relative size of the perturbation (0.01 in adversarial training).
    """
    moved = [p for p in model.parameters() if p.dim() > 1 and p.grad is not None]
    kept = [p.detach().clone() for p in moved]
    with torch.no_grad():
        for weight in moved:
            assert weight.grad is not None
            norm = weight.grad.norm()
            step = weight.grad * (gamma * weight.norm() / norm.clamp(min=1e-12))
            # The fp16 loss scale grows until a gradient overflows. The scaler drops that step, but
            # its forward pass must not leave NaN in the batch statistics.
            weight.add_(torch.where(norm.isfinite(), step, 0))
    try:
        yield
    finally:
        copy_all(moved, kept)
