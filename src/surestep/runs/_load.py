"""From a run folder back to its configuration and its model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surestep.attacks.lending import device_of
from surestep.config import RunConfig, parse, read_yaml
from surestep.data import Images
from surestep.devices import pick_device
from surestep.errors import UserError
from surestep.runs._models import build_model
from surestep.runs._parts import build_threat, load_data
from surestep.threat import ThreatModel
from surestep.training import Engine
from surestep.training.run_folder import RunFolder
from surestep.weights import load_weights, read_signature


@dataclass(frozen=True)
class Run:
    """A trained run, loaded from its folder.

    Attributes:
        config: its settings.
        model: with the selected weights, in eval mode.
        threat: the threat model it was trained against.
        folder: the run folder.
    """

    config: RunConfig
    model: nn.Module
    threat: ThreatModel
    folder: Path

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names of the model's outputs; empty if the weights do not tell."""
        return read_signature(self.weights).classes

    @property
    def weights(self) -> Path:
        """The weights file."""
        return RunFolder(self.folder).weights


def check_rerunnable(
    values: Mapping[str, Any], path: str | Path, *, complete: bool = False
) -> None:
    """Refuse settings that ``surestep.fit`` wrote: they name neither model nor data.

    Args:
        values: from a ``config.yaml``.
        path: that file, or its folder.
        complete: whether the settings must be those of a complete run.

    Raises:
        UserError: the settings are of a model and data of the user's own.
    """
    named = {"dataset", "model"} <= values.keys()
    if not named and (complete or "bounds" in values):  # only fit writes bounds
        raise UserError(
            f"{path} was trained from Python with a model and data of your own: resume it with "
            "surestep.fit(..., resume=True); judge it with surestep.evaluate, or here as "
            f"FILE.py:FACTORY, or an architecture's name such as lenet+, with --weights "
            "RUN/model.safetensors --dataset NAME --eps NUMBER"
        )


def read_config(folder: str | Path) -> RunConfig:
    """Read the configuration of a run folder.

    Raises:
        UserError: the folder is not a run folder, or was written by ``surestep.fit`` with the
            user's own model or data.
    """
    run = RunFolder(Path(folder))
    if not run.config.is_file():
        raise UserError(f"{folder} is not a run folder: it has no config.yaml")
    values = read_yaml(run.config)
    check_rerunnable(values, folder, complete=True)
    return parse(RunConfig, values, where=f"{run.config}: ")


def load(folder: str | Path, device: str | torch.device | None = None) -> Run:
    """Load a run folder (``surestep.load``), without its data if the weights name the classes.

    The model is in the memory format of the run's engine, as ``train`` returned it.

    Args:
        folder: as written by ``surestep train``.
        device: for the model; by default the best available.

    Raises:
        UserError: it is not a run folder, or its weights are missing or damaged.
    """
    folder = Path(folder)
    config = read_config(folder)
    weights = RunFolder(folder).weights
    if not weights.is_file():
        raise UserError(f"{folder} has no weights yet: continue it with --resume {folder}")
    signature = read_signature(weights)
    if signature.classes:
        one = torch.zeros(1, *signature.shape)
        images = Images(one, torch.zeros(1, dtype=torch.int64), signature.classes, config.dataset)
    else:  # weights that another program wrote
        try:
            images = load_data(config, "test", 1)
        except UserError:  # an ImageNet folder has none
            images = load_data(config, "validation", 1)
    model = build_model(config, images)
    load_weights(weights, model)
    model.to(pick_device(device)).train()  # as where its engine was made to suit it
    engine = Engine.choose(config.engine, "fp32", device_of(model))
    engine.suited(engine.place(model), torch.Size(images.image_shape))
    return Run(config, model.eval(), build_threat(config), folder)
