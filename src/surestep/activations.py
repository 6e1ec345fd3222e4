"""The activations of a model: where dropout and sparsification are put."""

from __future__ import annotations

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
