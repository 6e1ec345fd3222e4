"""Dropout after every activation of a model, for the duration of one pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn

from surestep.activations import activations
from surestep.attacks.lending import compiled, hooked
from surestep.errors import UserError


def check_dropout(model: nn.Module, p: float) -> list[nn.Module]:
    """Return the activations of ``model`` that dropout with probability ``p`` acts on; none if 0.

    Raises:
        UserError: the model has no activations that are modules, or is compiled.
    """
    if not p:
        return []
    if compiled(model):
        raise UserError(
            f"dropout {p:g} changes at each step, which a model that is compiled (as a whole or in "
            "part) does not follow: leave out dropout or torch.compile"
        )
    found = list(activations(model).values())
    if not found:
        raise UserError(
            f"dropout {p:g} acts after activation modules, but the model has none: use modules "
            "such as nn.ReLU() instead of functions such as F.relu, or leave dropout out"
        )
    return found


@contextmanager
def activation_dropout(model: nn.Module, p: float) -> Iterator[None]:
    """Drop outputs of the activations of ``model`` with probability ``p`` (in train mode).

    SADS (Vivek & Babu 2020, arXiv 2004.08628) puts such a layer after each non-linearity: whole
    channels are dropped after convolutions, single units elsewhere.

    Raises:
        UserError: see ``check_dropout``.
    """
    layers = check_dropout(model, p)

    def drop(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        drop_from = F.dropout2d if output.dim() == 4 else F.dropout
        return drop_from(output, p, module.training)

    with hooked(m.register_forward_hook(drop) for m in layers):
        yield
