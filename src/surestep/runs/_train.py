"""Train a run as configured."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

from surestep import models
from surestep.attacks.inputs import count_classes
from surestep.attacks.lending import device_of
from surestep.config import FitSettings, RunConfig
from surestep.errors import SurestepWarning, UserError
from surestep.evaluation import suite
from surestep.runs._load import load
from surestep.runs._models import build_model
from surestep.runs._parts import absolute, build_method, from_anywhere, load_data
from surestep.training import FitResult, checkpoint, fit
from surestep.training.run_folder import RunFolder


def train(
    config: RunConfig,
    out: str | Path | None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    on_start: Callable[[], None] | None = None,
) -> FitResult:
    """Train a run as configured; see ``surestep.fit``.

    Args:
        config: the run's settings.
        out: the run folder; None writes nothing.
        resume: continue from the newest checkpoint in ``out``.
        overwrite: delete what is in ``out`` first.
        quiet: show nothing.
        on_start: called once the settings are checked and the data are loaded, before training.

    Raises:
        UserError: invalid settings, data or weights; sources of other data; a hardened run; a run
            folder that exists already, or that is to be replaced although the run reads from it.
        TrainingDiverged: the loss became NaN or infinite.
    """
    if config.mean_sparse is not None:
        what = f"{out} was" if resume else f"mean_sparse {config.mean_sparse:g} belongs to a run"
        then = "resume" if resume else "take the config.yaml of"
        raise UserError(f"{what} hardened after training: {then} the run it was made from")
    # Report what can be checked at once, before a data set is read.
    run = RunFolder.plan(out, resume=resume, overwrite=overwrite)
    method = build_method(config)
    if config.val_images:
        suite.parse_all(config.val_attacks, method.threat)
    models.check_name(config.model)
    if out is not None and overwrite:
        weights = config.weights if config.weights != "pretrained" else None
        for read in (weights, *config.sources):
            if read and Path(out).resolve() in (at := Path(absolute(read)).resolve(), *at.parents):
                raise UserError(f"{read} is read from {out}, which is to be replaced: give another")
    images = load_data(config, "train")
    held_out = load_data(config, "validation", config.val_images) if config.val_images else None
    sources = [load(absolute(folder), config.device).model for folder in config.sources]
    for folder, source in zip(config.sources, sources, strict=True):
        classes = count_classes(source, images.pixels(slice(0, 1)).to(device_of(source)))
        if classes != images.num_classes:
            raise UserError(
                f"the source {folder} has {classes} classes, but {images.name} has "
                f"{images.num_classes}: give runs of the same data"
            )
    if sources:
        method.sources = sources
    elif method.takes_sources:
        warnings.warn(
            f"{config.method} has no sources, so the model attacks itself at every step: give "
            "trained runs with --sources",
            SurestepWarning,
            stacklevel=2,
        )
    settings = {name: getattr(config, name) for name in FitSettings.model_fields}
    written = from_anywhere(config).model_dump(mode="json")
    described = {k: v for k, v in written.items() if k not in FitSettings.model_fields}
    # A run that was stopped before its first checkpoint starts again from the beginning.
    goes_on = (
        run is not None
        and resume
        and (checkpoint.found(run.checkpoints) or run.ended(config.epochs))
    )
    model = build_model(config, images, begin=not goes_on)
    if on_start:
        on_start()
    return fit(
        model,
        images,
        method,
        out=out,
        validation=held_out,
        resume=resume,
        overwrite=overwrite,
        quiet=quiet,
        device=config.device,
        describe={**described, "params": method.params()},
        **settings,
    )
