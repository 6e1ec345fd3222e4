"""Recipes, and the training settings that several methods' published ones share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A recipe: the method's parameters with the training settings they were meant for.

    Attributes:
        eps: radius of the l-inf threat model.
        params: the method's hyperparameters, by field name.
        settings: training settings, by the field names of ``surestep.config.FitSettings``.
        model: the architecture.
        dataset: the data.
        source: where the recipe comes from.
        normalize: whether the model normalises its input, if it has a normalisation of its own.
    """

    eps: float
    params: Mapping[str, Any]
    settings: Mapping[str, Any]
    model: str
    dataset: str
    source: str
    normalize: bool = True


_V20 = "Vivek & Babu 2020, arXiv 2002.00614, and the authors' code"

MNIST_SAT = Preset(
    eps=0.3,
    params={},
    settings={"epochs": 20, "batch_size": 32, "lr": 0.01, "schedule": "step"},
    model="lenet+",
    dataset="mnist",
    source=_V20,
)
CIFAR_SAT = Preset(
    eps=8 / 255,
    params={},
    settings={
        "epochs": 100,
        "batch_size": 64,
        "lr": 0.1,
        "schedule": "step",
        "augment": "crop-flip",
    },
    model="wrn-28-10",
    dataset="cifar10",
    source=f"{_V20} (whose WRN-28-10 is another: see the card)",
    normalize=False,
)
MNIST_FAST = Preset(
    eps=0.3,
    params={},
    settings={"epochs": 6, "batch_size": 128, "lr": 0.1, "schedule": "onecycle"},
    model="lenet+",
    dataset="mnist",
    source="ours: benchmarks/mnist_table.py",
)
MNIST_RS = Preset(
    eps=0.3,
    params={"alpha": 0.375},
    settings={
        "epochs": 10,
        "batch_size": 100,
        "optimizer": "adam",
        "lr": 0.005,
        "weight_decay": 0.0,
        "schedule": "triangular",
    },
    model="cnn-small",
    dataset="mnist",
    source="Wong et al. 2020 and the authors' MNIST script",
)
# Small batches give more steps per epoch; growing eps at first avoids a long start at chance.
MNIST_SPEED = replace(
    MNIST_FAST,
    settings={**MNIST_FAST.settings, "epochs": 2, "batch_size": 64, "eps_warmup": 0.7},
    source="ours: benchmarks/search.py, benchmarks/time_to_robust.py",
)
MNIST_DEMO = replace(
    MNIST_SPEED,
    # Training takes minutes: too short to spend time on trying out engines.
    settings={
        **MNIST_SPEED.settings,
        "val_images": 100,
        "select": "last",
        "engine": "fast",
    },
    source="ours: what `surestep demo` trains",
)
CIFAR_RESNET = Preset(
    eps=8 / 255,
    params={},
    settings={
        "epochs": 100,
        "batch_size": 128,
        "lr": 0.1,
        "schedule": "step",
        "augment": "crop-flip",
    },
    model="resnet18",
    dataset="cifar10",
    source="SGD, momentum 0.9, weight decay 5e-4, the field's usual settings",
)
CIFAR100_RESNET = replace(CIFAR_RESNET, dataset="cifar100")
# A network of 0.3 million weights, which trains in minutes on two cores.
CIFAR_SPEED = replace(
    CIFAR_RESNET,
    settings={
        **CIFAR_RESNET.settings,
        "epochs": 4,
        "batch_size": 64,
        "lr": 0.2,
        "schedule": "onecycle",
    },
    model="preactresnet10-slim",
    source="ours: benchmarks/search.py, benchmarks/time_to_robust.py",
)


def smoothed(classes: int, true: float = 0.6) -> dict[str, float]:
    """Return the ``label_smoothing`` that leaves the share ``true`` for the true class.

    torch spreads the smoothed mass over all classes, including the true one.
    """
    return {"label_smoothing": (1 - true) * classes / (classes - 1)}


# For most methods: our settings on MNIST, which the papers do not cover; the usual ones on CIFAR.
MNIST_ZOO = replace(MNIST_FAST, source="ours: the settings of mnist-fast")
CIFAR_ZOO = replace(
    CIFAR_RESNET,
    settings={**CIFAR_RESNET.settings, "epochs": 30, "lr": 0.2, "schedule": "triangular"},
    source="the method's own parameters; the usual settings of fast training",
)
CIFAR100_ZOO = replace(CIFAR_ZOO, dataset="cifar100")


def recipe(
    base: Preset,
    *,
    eps: float | None = None,
    settings: Mapping[str, Any] | None = None,
    source: str = "",
    **params: Any,
) -> Preset:
    """Return ``base`` with a method's parameters, and with some settings changed."""
    return replace(
        base,
        eps=base.eps if eps is None else eps,
        params=params,
        settings={**base.settings, **(settings or {})},
        source=source or base.source,
    )
