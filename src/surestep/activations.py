"""The activations of a model: where dropout and sparsification are put, and a way through these."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

ACTIVATIONS: tuple[type[nn.Module], ...] = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU),
    *(nn.Softplus, nn.Tanh, nn.Sigmoid, nn.Mish, nn.Hardswish, nn.Hardtanh),
)
"""The modules that count as non-linearities."""


def activations(model: nn.Module) -> dict[str, nn.Module]:
    """Return a model's activation modules by name, in the order of its definition.

    Activations called as functions (``F.relu``) are not seen.
    """
    return {name: m for name, m in model.named_modules() if isinstance(m, ACTIVATIONS)}


def with_a_way_through(model: nn.Module) -> list[Any]:
    """Return the layers that know a gradient straight through them: MeanSparse, and any of a kind.

    Such a layer has an attribute ``straight_through``, a bool, and obeys it.
    """
    return [m for m in model.modules() if isinstance(getattr(m, "straight_through", None), bool)]


@contextmanager
def straight_through(model: nn.Module) -> Iterator[nn.Module]:
    """Lend the model with gradients that pass such layers (BPDA, Athalye et al. 2018)."""
    before = [(layer, layer.straight_through) for layer in with_a_way_through(model)]
    for layer, _ in before:
        layer.straight_through = True
    try:
        yield model
    finally:
        for layer, value in before:
            layer.straight_through = value
