"""Runs: from a configuration to a trained model, and from a run folder back to the model.

This is what the command line does, callable from Python. How a configuration is completed by a
preset is in ``surestep.presets``; its functions are exported here, too.
"""

from __future__ import annotations

import copy
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surestep import data, files, methods, models, posthoc, threat
from surestep.attacks.inputs import count_classes
from surestep.attacks.lending import device_of
from surestep.clock import each_minute
from surestep.config import FitSettings, RunConfig, parse, read_yaml
from surestep.data import Images, are_numbers
from surestep.devices import pick_device
from surestep.errors import SurestepWarning, UserError
from surestep.evaluation import Evaluation, evaluate, suite
from surestep.methods import Method
from surestep.posthoc import insert
from surestep.presets import resolve, usual_preset
from surestep.randomness import forked_rng
from surestep.threat import ThreatModel
from surestep.training import Engine, FitResult, checkpoint, fit
from surestep.training.run_folder import RunFolder

__all__ = [
    "Run",
    "build_method",
    "build_model",
    "build_threat",
    "check_rerunnable",
    "from_anywhere",
    "harden",
    "in_class_order_of",
    "load",
    "load_data",
    "read_config",
    "resolve",
    "train",
    "usual_preset",
]


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
        return files.read_signature(self.weights).classes

    @property
    def weights(self) -> Path:
        """The weights file."""
        return RunFolder(self.folder).weights


def from_anywhere(config: RunConfig) -> RunConfig:
    """Return settings with absolute paths, which are valid in any working directory."""
    kind, colon, root = config.dataset.partition(":")
    found: dict[str, Any] = {
        "data": config.data and _absolute_root(kind, config.data),
        "sources": tuple(_absolute(folder) for folder in config.sources),
    }
    if root:
        found["dataset"] = f"{kind}{colon}{_absolute_root(kind, root)}"
    if config.weights not in (None, "pretrained"):
        found["weights"] = _absolute(str(config.weights))
    if models.in_file(config.model):
        found["model"] = models.absolute(config.model)
    return config.model_copy(update=found)


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _absolute_root(kind: str, root: str) -> str:
    """Return the absolute location of data; keep a Hub name unless such a path exists here."""
    return root if kind == "hf" and not Path(root).exists() else _absolute(root)


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


def in_class_order_of(name: str, theirs: Sequence[str], images: Images) -> Images:
    """Return the images with labels in a model's class order, if the class names tell it.

    Args:
        name: the model, as errors name it.
        theirs: the class names of its outputs; empty if unknown.
        images: labelled in the data's class order; returned as they are if that is the same.

    Raises:
        UserError: the model knows only some of the data's classes.
    """
    ours = images.classes
    known = set(theirs) & set(ours)
    ambiguous = len(set(theirs)) < len(theirs) or len(set(ours)) < len(ours)
    if tuple(ours) == tuple(theirs) or not known or ambiguous:
        return images
    unknown = [one for one in ours if one not in known]
    numbers = are_numbers(ours) or are_numbers(theirs)
    # Some names may differ, if all shared names have the same positions in both.
    alike = len(ours) == len(theirs) and all(ours.index(k) == theirs.index(k) for k in known)
    if unknown and (numbers or alike):
        return images
    if unknown:
        raise UserError(
            f"{name} does not know the class {unknown[0]!r} of the data, but it knows "
            f"{len(known)} of {len(ours)}: rename the data's classes as the model names them, or "
            "leave out those that it was not trained on"
        )
    number = torch.tensor([theirs.index(one) for one in ours])
    labels = torch.where(images.y < 0, images.y, number[images.y])
    return replace(images, y=labels, classes=tuple(theirs))


def build_model(config: RunConfig, images: Images, *, begin: bool = False) -> nn.Module:
    """Build a run's model for its data, with the random weights of its seed.

    Args:
        config: the run's settings.
        images: images of its data set.
        begin: load the initial weights that the settings name, if any.
    """
    pretrained = begin and config.weights == "pretrained"
    shape = images.image_shape
    if len(shape) != 3:
        raise UserError(
            f"{images.name} has samples of shape {shape}, but the command line's models take "
            "images (C, H, W): use surestep.fit with your own model"
        )
    with forked_rng(torch.device("cpu")):  # the caller's random state stays as it was
        torch.manual_seed(config.seed)
        model = models.create(
            config.model,
            images.num_classes,
            in_channels=shape[0],
            image_size=shape[-1],
            pretrained=pretrained,
            normalize=config.normalize,
        )
        named = config.weights if begin and not pretrained else None
        weights = None if named is None else Path(_absolute(named))
        model = _with_head(model, config, images.pixels(slice(0, 1)), weights)
    if config.mean_sparse is not None:
        model = insert(model, images.pixels(slice(0, 1)), config.mean_sparse)
    return model


def _with_head(model: nn.Module, config: RunConfig, x: Tensor, weights: Path | None) -> nn.Module:
    """Return the model with the run's head, and with weights from a model with either head.

    The model is run on the image ``x`` (1, C, H, W) to find the layer that the head replaces.
    """
    if config.head == "hypersphere":
        plain = copy.deepcopy(model) if weights else model
        model = models.on_hypersphere(model, config.head_scale, x)
        if weights is not None:
            try:
                files.load_any_weights(weights, model)
            except UserError:
                files.load_any_weights(weights, plain)
                return models.on_hypersphere(plain, config.head_scale, x)
    elif weights is not None:
        files.load_any_weights(weights, model)
    return model


def harden(
    folder: str | Path,
    out: str | Path,
    *,
    thresholds: Sequence[float] = posthoc.THRESHOLDS,
    attacks: Sequence[str] | None = None,
    n_search: int | None = None,
    n: int | None = None,
    split: str = "test",
    seed: int = 0,
    batch_size: int = 500,
    device: str | torch.device | None = None,
    overwrite: bool = False,
    progress: Callable[[dict[str, Any]], None] | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Harden a run with MeanSparse and write the result to a new run folder.

    Args:
        folder: folder of the trained run.
        out: folder of the hardened run.
        thresholds: thresholds to try on validation images; see ``surestep.posthoc.harden``.
        attacks: names of the attacks, both for the search and for the evaluation; by default
            ``posthoc.ATTACKS`` and ``posthoc.JUDGES``. Transfer attacks are crafted on the original
            model.
        n_search: use only the first ``n_search`` validation images.
        n: evaluate on the first ``n`` images only.
        split: evaluate on images of "test" or "validation". The threshold is chosen on validation
            images, so that the results on them are optimistic.
        seed: seed of the attacks.
        batch_size: batch size of the attacks.
        device: where to run; by default the best available.
        overwrite: replace ``out`` if it exists.
        progress: called with each row of the search.
        tell: called with a line on what is being done, also in a long evaluation.

    Returns:
        The threshold, the rows of its search, the split, the evaluations before and after, and how
        many of the images were saved and lost: a net gain of only a few is noise.

    Raises:
        UserError: ``folder`` is not a run folder, is hardened already or does not know all classes
            of its data, or ``out`` exists.
    """
    run = load(folder, device)
    if run.config.mean_sparse is not None:
        raise UserError(f"{folder} is hardened already: take the run it was made from")
    if Path(out).resolve() == Path(folder).resolve():
        raise UserError(f"{out} is the run itself, which is kept: give another --out")
    hardened = RunFolder.plan(out, overwrite=overwrite)
    assert hardened is not None
    files.make_folder(hardened.folder.parent)  # fails before the work rather than after it
    data.check_judged(split)
    options: dict[str, Any] = {"seed": seed, "batch_size": batch_size}

    def labelled(part: str, count: int | None) -> Images:
        found = load_data(run.config, part, count)
        ordered = in_class_order_of(str(folder), run.classes, found)
        if ordered is not found:
            tell(f"the {part} labels are renumbered to the class order of {folder}, by class name")
        return ordered

    # Missing data and misspelt attacks are reported before the search, which may take hours.
    images = labelled(split, n)
    suite.parse_all(attacks or posthoc.JUDGES, run.threat, [run.model])
    found = posthoc.harden(
        run.model,
        load_data(run.config, "train"),
        labelled("validation", n_search),
        run.threat,
        thresholds=thresholds,
        attacks=attacks or posthoc.ATTACKS,
        n=n_search,
        progress=progress,
        tell=tell,
        **options,
    )

    def judge(model: nn.Module, told: str) -> Evaluation:
        tell(f"attacking {split} images {told} hardening")
        names = attacks or posthoc.JUDGES
        more: dict[str, Any] = {**options, "n": n, "sources": [run.model]}
        return evaluate(model, images, run.threat, names, tell=each_minute(tell), **more)

    before, after = judge(run.model, "before"), judge(found.model, "after")
    withstood_before, withstood_after = (one.right["worst case"] for one in (before, after))
    config = from_anywhere(run.config).model_copy(update={"mean_sparse": found.threshold})
    hardened.make(config.model_dump(mode="json"), overwrite=overwrite)
    try:
        files.save_weights(hardened.weights, found.model, files.read_signature(run.weights))
    except BaseException:  # such as a full disk: settings alone are not a run
        shutil.rmtree(hardened.folder, ignore_errors=True)
        raise
    return {
        "threshold": found.threshold,
        "search": found.search,
        "split": split,
        "before": before.to_dict(),
        "after": after.to_dict(),
        "saved": int((withstood_after & ~withstood_before).sum()),
        "lost": int((withstood_before & ~withstood_after).sum()),
    }


def train(
    config: RunConfig,
    out: str | Path | None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    on_start: Callable[[], None] | None = None,
) -> FitResult:
    """Train a run as configured; see ``surestep.fit``. Before it, ``on_start`` is called."""
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
            if read and Path(out).resolve() in (at := Path(_absolute(read)).resolve(), *at.parents):
                raise UserError(f"{read} is read from {out}, which is to be replaced: give another")
    images = load_data(config, "train")
    held_out = load_data(config, "validation", config.val_images) if config.val_images else None
    sources = [load(_absolute(folder), config.device).model for folder in config.sources]
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
    signature = files.read_signature(weights)
    if signature.classes:
        one = torch.zeros(1, *signature.shape)
        images = Images(one, torch.zeros(1, dtype=torch.int64), signature.classes, config.dataset)
    else:  # weights that another program wrote
        try:
            images = load_data(config, "test", 1)
        except UserError:  # an ImageNet folder has none
            images = load_data(config, "validation", 1)
    model = build_model(config, images)
    files.load_weights(weights, model)
    model.to(pick_device(device)).train()  # as where its engine was made to suit it
    engine = Engine.choose(config.engine, "fp32", device_of(model))
    engine.suited(engine.place(model), torch.Size(images.image_shape))
    return Run(config, model.eval(), build_threat(config), folder)
