"""FGSM-CUAP: FGSM-UAP with one universal perturbation for each class."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from surestep.attacks.inputs import count_classes
from surestep.methods._registry import register
from surestep.methods.fgsm_uap import FGSMUAP, Choice


@register("fgsm-cuap")
@dataclass
class FGSMCUAP(FGSMUAP):
    """C-UAP: one perturbation for each class."""

    summary = "FGSM from one universal perturbation for each class"

    def choose(self, model: nn.Module, x: Tensor, y: Tensor) -> Choice:
        """Choose the perturbation of the label."""
        return Choice(y, len(self._u) or count_classes(model, x))
