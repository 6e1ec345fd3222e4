"""FGSM-AT: Goodfellow, Shlens & Szegedy 2015, arXiv 1412.6572."""

from __future__ import annotations

from dataclasses import dataclass

from surestep.methods._presets import CIFAR_RESNET, MNIST_DEMO, MNIST_FAST, MNIST_SAT, recipe
from surestep.methods._registry import register
from surestep.methods._single_step import SingleStep


@register("fgsm")
@dataclass
class FGSM(SingleStep):
    """FGSM-AT: x_adv = Box(x + eps * sign(grad)). At useful radii it ends in gradient masking."""

    summary = "one full gradient step from the image; prone to gradient masking"
    paper = "Goodfellow et al. 2015, arXiv 1412.6572"
    presets = {
        "mnist": recipe(MNIST_SAT),
        "mnist-fast": recipe(MNIST_FAST),
        "mnist-demo": recipe(MNIST_DEMO, settings={"lr": 0.03}),
        "cifar10": recipe(CIFAR_RESNET),
    }
