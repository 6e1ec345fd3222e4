"""FGSM-CUAP: FGSM-UAP with one universal perturbation for each class."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from surestep.attacks.inputs import count_classes
from surestep.methods._base import register
from surestep.methods.fgsm_uap import FGSMUAP


@register("fgsm-cuap")
@dataclass
class FGSMCUAP(FGSMUAP):
    """C-UAP: one perturbation for each class."""

    summary = "FGSM from one universal perturbation for each class"

    def choose(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, int]:
        """Choose the perturbation of the label."""
        if not len(self._u):
            return y, count_classes(model, x)
        return y, len(self._u)
