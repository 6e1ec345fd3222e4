"""A model's activations, where dropout and sparsification go; straight-through gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

ACTIVATIONS: tuple[type[nn.Module], ...] = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU),
    *(nn.Softplus, nn.Tanh, nn.Sigmoid, nn.Mish, nn.Hardswish, nn.Hardtanh),
)
"""The modules of torch that count as non-linearities."""
_CALLED = {
    *("GELU", "GELUTanh", "GELUActivation", "NewGELUActivation", "PytorchGELUTanh"),
    *("QuickGELU", "QuickGELUActivation", "FastGELUActivation", "ClippedGELUActivation"),
    *("AccurateGELUActivation", "ReLUSquaredActivation", "LaplaceActivation"),
    *("Swish", "SwishMe", "SiLU", "SiLUActivation", "Mish", "MishMe", "MishActivation"),
    *("Sigmoid", "Tanh", "HardSwish", "HardSwishMe", "HardSigmoid", "HardSigmoidMe"),
    *("HardMish", "HardMishMe"),
}
"""The class names of those that timm and transformers define themselves."""


def activations(model: nn.Module) -> dict[str, nn.Module]:
    """Return a model's activation modules by name, in the order of its definition.

    Activations of other packages are known by their class name, if they have no parameters or
    modules inside. Activations called as functions (``F.relu``) are not found.
    """
    return {name: m for name, m in model.named_modules() if _is_activation(m)}


def _is_activation(module: nn.Module) -> bool:
    if isinstance(module, ACTIVATIONS):
        return True
    named = type(module).__name__ in _CALLED
    return named and not any(module.children()) and not any(True for _ in module.parameters())


def straight_through_layers(model: nn.Module) -> list[Any]:
    """Return the layers that can pass gradients straight through, such as MeanSparse.

    Such a layer has an attribute ``straight_through``, a bool that turns this on and off.
    """
    return [m for m in model.modules() if isinstance(getattr(m, "straight_through", None), bool)]


@contextmanager
def straight_through(model: nn.Module) -> Iterator[nn.Module]:
    """Lend the model with straight-through gradients turned on (BPDA, Athalye et al. 2018)."""
    before = [(layer, layer.straight_through) for layer in straight_through_layers(model)]
    for layer, _ in before:
        layer.straight_through = True
    try:
        yield model
    finally:
        for layer, value in before:
            layer.straight_through = value
