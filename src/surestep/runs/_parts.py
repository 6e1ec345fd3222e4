"""The parts that a configuration names: threat model, method and data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from surestep import data, methods, models, threat
from surestep.config import RunConfig
from surestep.data import Images
from surestep.errors import UserError
from surestep.methods import Method
from surestep.threat import ThreatModel


def build_threat(config: RunConfig) -> ThreatModel:
    """Build the threat model of a run."""
    return threat.make(config.norm, config.eps)


def build_method(config: RunConfig) -> Method:
    """Build the method of a run, without its source models, which ``train`` loads.

    Raises:
        UserError: a hyperparameter is invalid, or there are sources for a method that takes none.
    """
    margin = config.head_scale * config.head_margin if config.head == "hypersphere" else 0.0
    method = methods.build(config.method, build_threat(config), config.params, margin=margin)
    methods.settle(method, config)
    if config.sources and not method.takes_sources:
        raise UserError(
            f"{config.method} attacks no other models: leave sources out, or train with eat"
        )
    return method


def load_data(config: RunConfig, split: str, n: int | None = None) -> Images:
    """Load a split ("train", "validation", "test") of a run's data set, or n images of it."""
    return data.load(config.dataset, split, root=config.data, image_size=config.image_size, n=n)


def passes_of(config: RunConfig) -> float:
    """Return the passes per image of a training step; standard training takes three.

    A step with AWP takes its update twice: one more forward pass and backward pass, of which the
    gradients of the activations and of the weights count as a pass each. Steps before ``awp_from``
    take it once, so this is the mean over the run. (That AWP also differentiates GradAlign's
    gradient a second time is not counted.)

    Raises:
        UserError: as ``build_method``.
    """
    cost = build_method(config).cost(config.batch_size)
    share = max(0.0, 1 - config.awp_from / config.epochs) if config.awp else 0.0
    return cost.total + share * 3 * cost.weight_grad


def from_anywhere(config: RunConfig) -> RunConfig:
    """Return settings with absolute paths, which are valid in any working directory."""
    kind, colon, root = config.dataset.partition(":")
    found: dict[str, Any] = {
        "data": config.data and _absolute_root(kind, config.data),
        "sources": tuple(absolute(folder) for folder in config.sources),
    }
    if root:
        found["dataset"] = f"{kind}{colon}{_absolute_root(kind, root)}"
    if config.weights not in (None, "pretrained"):
        found["weights"] = absolute(str(config.weights))
    if models.in_file(config.model):
        found["model"] = models.absolute(config.model)
    return config.model_copy(update=found)


def absolute(path: str) -> str:
    """Return a path that is valid in any working directory; ~ is the home folder."""
    return os.path.abspath(os.path.expanduser(path))


def _absolute_root(kind: str, root: str) -> str:
    """Return the absolute location of data; keep a Hub name unless such a path exists here."""
    return root if kind == "hf" and not Path(root).exists() else absolute(root)
