"""Dropout after every activation of a model, for as long as one pass takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: tuple[type[nn.Module], ...] = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU),
    *(nn.Softplus, nn.Tanh, nn.Sigmoid, nn.Mish, nn.Hardswish, nn.Hardtanh),
)
"""The modules that count as non-linearities."""


def activations(model: nn.Module) -> dict[str, nn.Module]:
    """Return a model's activation modules by name, in the order of its definition."""
    return {name: m for name, m in model.named_modules() if isinstance(m, ACTIVATIONS)}


@contextmanager
def dropping(model: nn.Module, p: float) -> Iterator[None]:
    """Drop outputs of the activations of ``model`` with probability ``p`` (in train mode).

    SADS (Vivek & Babu 2020, arXiv 2004.08628) puts such a layer after each non-linearity.
    Activations called as functions (``F.relu``) are not seen.
    """
    if not p:
        yield
        return

    def drop(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return F.dropout(output, p, module.training)

    handles = [m.register_forward_hook(drop) for m in activations(model).values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
