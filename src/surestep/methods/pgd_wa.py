"""PGD-AT with weight averaging, a reference of the FastAT benchmark, arXiv 2604.22853."""

from __future__ import annotations

from dataclasses import dataclass

from surestep.methods._presets import CIFAR_RESNET, MNIST_FAST, recipe
from surestep.methods._registry import register
from surestep.methods.pgd import PGD


@register("pgd-wa")
@dataclass
class PGDWA(PGD):
    """PGD-AT with weight averaging: the method is PGD-AT, and its presets average the weights."""

    summary = "PGD-AT with an exponential average of the weights"
    paper = "the FastAT benchmark 2026, arXiv 2604.22853"
    presets = {
        "mnist": recipe(MNIST_FAST, steps=40, alpha=0.01, settings={"ema": 0.999}),
        "cifar10": recipe(
            CIFAR_RESNET,
            steps=10,
            alpha=2 / 255,
            settings={"ema": 0.9995, "label_smoothing": 0.4, "schedule": "onecycle"},
            source="the FastAT benchmark's protocol, arXiv 2604.22853",
        ),
    }
