"""Adversarial weight perturbation: the update's gradient is taken where the weights are worse.

Wu, Xia & Wang 2020, "Adversarial Weight Perturbation Helps Robust Generalization", arXiv
2004.05884. Combines with any method: the images of the update stay the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def weights_ahead(model: nn.Module, gamma: float) -> Iterator[None]:
    """Move each weight tensor up its gradient, by ``gamma`` times its own norm; then move it back.

    Tensors of one dimension (biases, batch norm) stay, as in the authors' code.

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
            # fp16's loss scale grows until a gradient overflows; that step is dropped, but its
            # pass must not leave NaN in the batch statistics.
            weight.add_(torch.where(norm.isfinite(), step, 0))
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, before in zip(moved, kept, strict=True):
                weight.copy_(before)


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Leave the buffers (batch statistics) as they were: the pass inside does not count."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, saved in before:
            # .data: the graph of the pass may hold it.
            buffer.data.copy_(saved)
