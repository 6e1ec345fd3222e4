"""SADS: dropout after every non-linearity, which decays during training.

Vivek & Babu 2020, "Single-step Adversarial Training with Dropout Scheduling", CVPR, arXiv
2004.08628.
"""

from __future__ import annotations

from dataclasses import dataclass

from surestep.methods._hyperparameters import param
from surestep.methods._presets import CIFAR_RESNET, MNIST_ZOO, recipe
from surestep.methods._registry import register
from surestep.methods.fgsm import FGSM


@register("sads")
@dataclass
class SADS(FGSM):
    """SADS: FGSM-AT whose ``dropout``, which every method has, is on by default.

    Dropout acts in the update only: the attack runs in eval mode.
    """

    summary = "FGSM with dropout after each activation, falling to 0 during training"
    paper = "Vivek & Babu 2020, arXiv 2004.08628"
    presets = {
        "mnist": recipe(MNIST_ZOO),
        "cifar10": recipe(CIFAR_RESNET, source="ours: the field's usual settings"),
    }

    dropout: float = param(0.4, ge=0, lt=1, kw_only=True)
