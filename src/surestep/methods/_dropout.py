"""Dropout after every activation of a model, for as long as one pass takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn

from surestep.activations import activations


@contextmanager
def dropping(model: nn.Module, p: float) -> Iterator[None]:
    """Drop outputs of the activations of ``model`` with probability ``p`` (in train mode).

    SADS (Vivek & Babu 2020, arXiv 2004.08628) puts such a layer after each non-linearity.
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
