"""Standard training: the clean loss, no attack. The unit in which costs are counted."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from surestep.methods._base import Cost, Method, Update
from surestep.methods._presets import CIFAR_RESNET, MNIST_FAST, recipe
from surestep.methods._registry import register


@register("standard")
@dataclass
class Standard(Method):
    """Cross entropy on clean images."""

    summary = "no perturbation: cross entropy on clean images"
    paper = "the usual empirical risk"
    presets = {"mnist": recipe(MNIST_FAST), "cifar10": recipe(CIFAR_RESNET)}

    def craft(self, model: nn.Module, x: Tensor, y: Tensor) -> Update:
        """Take the images as they are."""
        return Update(x, self.plain_loss(y))

    def cost(self, batch_size: int) -> Cost:
        """One update pass."""
        return Cost.of(attack=0, update=1)
