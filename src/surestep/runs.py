"""Runs: from a configuration to a trained model, and from a run folder back to the model.

This is what the command line does, callable from Python.
"""

from __future__ import annotations

import copy
import os
import re
import shutil
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surestep import data, files, methods, models, posthoc, threat
from surestep.attacks.inputs import count_classes
from surestep.attacks.lending import device_of, forked_rng
from surestep.clock import each_minute
from surestep.config import FitSettings, RunConfig, parse, read_yaml
from surestep.data import Images
from surestep.devices import pick_device
from surestep.errors import SurestepWarning, UserError
from surestep.evaluation import Evaluation, evaluate, suite
from surestep.methods import Method
from surestep.posthoc import insert
from surestep.threat import ThreatModel
from surestep.training import FitResult, checkpoint, fit
from surestep.training.run_folder import RunFolder

_MEANT = ("dataset", "norm")
"""Settings that a radius is tied to."""
_OF_HEAD = ("head_scale", "head_margin")
"""Settings that only a hypersphere head has."""
_ALIKE = {"cifar100": "cifar10"}
"""Data sets that use the presets of another one if a method has none for them."""


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


def resolve(
    values: Mapping[str, Any], preset: str | None = None, file: Mapping[str, Any] | None = None
) -> RunConfig:
    """Complete a user's settings with those of a preset and of a file.

    A preset sets the data set, model, eps, the method's parameters and the training settings;
    settings from a file override it, and the user's own settings override both. If eps differs
    from theirs, their step sizes and other lengths scale in proportion. Without a preset name, the
    method's preset named after the data set is taken, if there is one (for cifar100, else that of
    cifar10), or a variant such as cifar10-16 if its eps is nearer to the user's.

    Args:
        values: the user's settings, by field name of ``RunConfig``.
        preset: name of one of the method's presets, or "none". What follows the data set's name
            is enough, such as "speed" for "mnist-speed".
        file: settings read from a file, such as a run's ``config.yaml``.

    Raises:
        UserError: an unknown name or an invalid value; no eps, if there is no default for this
            data set and norm; a head scale or margin for a head that is not a hypersphere; another
            optimizer with the learning rate that was meant for SGD.
    """
    own, file = values, file or {}
    values = {**file, **own, "params": own.get("params") or {}}
    method = str(values.get("method", RunConfig.model_fields["method"].default))
    cls = methods.get(method)
    dataset, norm = (str(values.get(k, RunConfig.model_fields[k].default)) for k in _MEANT)
    name = dataset.partition(":")[0]
    if preset is None:
        preset = usual_preset(method, dataset, values.get("eps")) or "none"
    elif f"{name}-{preset}" in cls.presets:
        preset = f"{name}-{preset}"
    # The default eps is meant for MNIST in l-inf. Unknown data set names are reported later.
    elsewhere = preset == "none" and name != "mnist" and name in data.names()
    if "eps" not in values and (elsewhere or norm == "l2"):
        place = str(values.get("data") or dataset.partition(":")[2])
        if name in ("npz", "folder") and place and not Path(_absolute(place)).exists():
            raise UserError(f"{place} does not exist: give the location of the data set, --data")
        raise UserError(
            f"no radius is known for {method} on {dataset} in {norm}: give --eps, such as 8/255"
        )
    below: dict[str, Any] = {"method": method}
    layers: list[tuple[Mapping[str, Any], float]] = []
    if preset != "none":
        chosen = methods.preset(method, preset)
        below |= {name: getattr(chosen, name) for name in ("dataset", "model", "eps", "normalize")}
        below |= chosen.settings
        layers.append((chosen.params, chosen.eps))
    config = parse(RunConfig, {**below, **values})
    _check_head(config, own)
    _check_rate(below, file, own)
    if file:
        before = parse(RunConfig, {**below, **file, "params": file.get("params") or {}})
        # If the file has no eps, the radius that its lengths are for is unknown: do not scale them.
        layers.append((before.params, before.eps if "eps" in file else config.eps))
    params: dict[str, Any] = {}
    for found, eps in layers:
        params |= _at_radius(found, cls.lengths, config.eps / eps if eps else 1.0)
    return config.model_copy(update={"params": {**params, **config.params}})


def _at_radius(
    params: Mapping[str, Any], lengths: Collection[str], scale: float
) -> Mapping[str, Any]:
    """Return hyperparameters for a radius ``scale`` times as large: lengths scale with it."""
    if scale == 1:
        return params
    return {
        name: value * scale if name in lengths and type(value) in (int, float) else value
        for name, value in params.items()
    }


def _check_head(config: RunConfig, given: Mapping[str, Any]) -> None:
    """Refuse a head scale or margin that would be ignored, unless it merely spells out defaults.

    Raises:
        UserError: a scale or margin is given, but the head is not a hypersphere.
    """
    for name in _OF_HEAD if config.head != "hypersphere" else ():
        default = RunConfig.model_fields[name].default
        if name in given and ("head" not in given or getattr(config, name) != default):
            raise UserError(
                f"{name} {given[name]} applies only to a hypersphere head, but head is "
                f"{config.head}: give --head hypersphere, or leave it out"
            )


def _check_rate(*layers: Mapping[str, Any]) -> None:
    """Refuse a learning rate of SGD for Adam, or of Adam for SGD.

    Args:
        layers: settings; each overrides those before it.

    Raises:
        UserError: the last optimizer and the last learning rate were not meant for each other.
    """
    optimizer = meant = RunConfig.model_fields["optimizer"].default
    rate = RunConfig.model_fields["lr"].default
    for layer in layers:
        optimizer = layer.get("optimizer", optimizer)
        if "lr" in layer:
            meant, rate = optimizer, layer["lr"]
    if (optimizer == "sgd") != (meant == "sgd"):
        raise UserError(
            f"optimizer {optimizer} needs a learning rate of its own: give --lr, too (the present "
            f"one, {rate}, is meant for {meant})"
        )


def usual_preset(method: str, dataset: str, eps: Any = None) -> str | None:
    """Return the preset that a data set uses if none is named, or None if there is none.

    Args:
        method: the method's slug.
        dataset: as for training.
        eps: the radius, if given: among the data set's presets, the one for the nearest radius is
            returned, since regularizer weights depend on it.
    """
    kind = dataset.partition(":")[0]
    known = methods.get(method).presets
    name = next((n for n in (kind, _ALIKE.get(kind)) if n in known), None)
    if name is None or eps is None:
        return name
    radius = parse(RunConfig, {"eps": eps}).eps
    alike = [name, *(n for n in known if re.fullmatch(rf"{name}-\d+", n))]
    return min(alike, key=lambda n: abs(known[n].eps - radius))


def from_anywhere(config: RunConfig, begun: Mapping[str, Any] | None = None) -> RunConfig:
    """Return settings with absolute paths, which are valid in any working directory.

    Args:
        config: the settings.
        begun: the stored settings of a run to resume, if any. Older runs stored paths as given; a
            setting that equals the stored one is left unchanged.
    """
    kind, colon, place = config.dataset.partition(":")
    found: dict[str, Any] = {
        "data": config.data and _place(kind, config.data),
        "sources": tuple(_absolute(folder) for folder in config.sources),
    }
    if place:
        found["dataset"] = f"{kind}{colon}{_place(kind, place)}"
    if config.weights not in (None, "pretrained"):
        found["weights"] = _absolute(str(config.weights))
    if models.in_file(config.model):
        found["model"] = models.absolute(config.model)
    given, begun = config.model_dump(mode="json"), begun or {}
    return config.model_copy(
        update={k: v for k, v in found.items() if k not in begun or begun[k] != given[k]}
    )


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _place(kind: str, place: str) -> str:
    """Return the absolute location of data; keep a Hub name unless such a path exists here."""
    return place if kind == "hf" and not Path(place).exists() else _absolute(place)


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
    if config.sources and method.sources is None:
        raise UserError(
            f"{config.method} attacks no other models: leave sources out, or train with eat"
        )
    return method


def load_data(config: RunConfig, split: str, n: int | None = None) -> Images:
    """Load a split ("train", "validation", "test") of a run's data set, or n images of it."""
    return data.load(config.dataset, split, root=config.data, image_size=config.image_size, n=n)


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
            **models.normalisation(shape[0], inside=config.normalize),
        )
        named = config.weights if begin and not pretrained else None
        model = _with_head(model, config, None if named is None else Path(_absolute(named)))
    if config.mean_sparse is not None:
        model = insert(model, images.pixels(slice(0, 1)), config.mean_sparse)
    return model


def _with_head(model: nn.Module, config: RunConfig, weights: Path | None) -> nn.Module:
    """Return the model with the run's head, and with weights from a model with either head."""
    if config.head == "hypersphere":
        plain = copy.deepcopy(model) if weights else model
        model = models.on_hypersphere(model, config.head_scale)
        if weights is not None:
            try:
                files.load_any_weights(weights, model)
            except UserError:
                files.load_any_weights(weights, plain)
                return models.on_hypersphere(plain, config.head_scale)
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
    seed: int = 0,
    batch_size: int = 500,
    device: str | None = None,
    overwrite: bool = False,
    progress: Callable[[dict[str, Any]], None] | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Harden a run with MeanSparse and write the result to a new run folder.

    Args:
        folder: folder of the trained run.
        out: folder of the hardened run.
        thresholds: thresholds to try on validation images; see ``surestep.posthoc.harden``.
        attacks: names of the attacks, both for the search and for the evaluation on test images;
            by default ``posthoc.ATTACKS`` and ``posthoc.JUDGES``. Transfer attacks are crafted on
            the original model.
        n_search: use only the first ``n_search`` validation images.
        n: use only the first ``n`` test images.
        seed: seed of the attacks.
        batch_size: batch size of the attacks.
        device: where to run; by default the best available.
        overwrite: replace ``out`` if it exists.
        progress: called with each row of the search.
        tell: called with a line on what is being done, also in a long evaluation.

    Returns:
        The threshold, the rows of its search, the evaluations on test images before and after, and
        how many of these images were saved and lost: a net gain of only a few is noise.

    Raises:
        UserError: ``folder`` is not a run folder or is hardened already, or ``out`` exists.
    """
    run = load(folder, device)
    if run.config.mean_sparse is not None:
        raise UserError(f"{folder} is hardened already: take the run it was made from")
    if Path(out).resolve() == Path(folder).resolve():
        raise UserError(f"{out} is the run itself, which is kept: give another --out")
    place = RunFolder.plan(out, overwrite=overwrite)
    assert place is not None
    files.make_folder(place.folder.parent)  # fails before the work rather than after it
    options: dict[str, Any] = {"seed": seed, "batch_size": batch_size}
    # What is missing or misspelt is told before the search, which may take hours.
    test = load_data(run.config, "test")
    suite.parse_all(attacks or posthoc.JUDGES, run.threat, [run.model])
    found = posthoc.harden(
        run.model,
        load_data(run.config, "train"),
        load_data(run.config, "validation"),
        run.threat,
        thresholds=thresholds,
        attacks=attacks or posthoc.ATTACKS,
        n=n_search,
        progress=progress,
        tell=tell,
        **options,
    )

    def judge(model: nn.Module, told: str) -> Evaluation:
        tell(f"attacking test images {told} hardening")
        names = attacks or posthoc.JUDGES
        more: dict[str, Any] = {**options, "n": n, "sources": [run.model]}
        return evaluate(model, test, run.threat, names, tell=each_minute(tell), **more)

    before, after = judge(run.model, "before"), judge(found.model, "after")
    withstood_before, withstood_after = (one.right["worst case"] for one in (before, after))
    config = from_anywhere(run.config).model_copy(update={"mean_sparse": found.threshold})
    place.make(config.model_dump(mode="json"), overwrite=overwrite)
    try:
        files.save_weights(place.weights, found.model, files.read_signature(run.weights))
    except BaseException:  # such as a full disk: settings alone are not a run
        shutil.rmtree(place.folder, ignore_errors=True)
        raise
    return {
        "threshold": found.threshold,
        "search": found.search,
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
    tell: Callable[[], None] | None = None,
) -> FitResult:
    """Train a run as configured; see ``surestep.fit``. ``tell`` is called just before training."""
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
    elif method.sources is not None:
        warnings.warn(
            f"{config.method} has no sources, so the model attacks itself at every step: give "
            "trained runs with --sources",
            SurestepWarning,
            stacklevel=2,
        )
    settings = {name: getattr(config, name) for name in FitSettings.model_fields}
    begun = read_yaml(run.config) if run and resume else None
    written = from_anywhere(config, begun).model_dump(mode="json")
    described = {k: v for k, v in written.items() if k not in FitSettings.model_fields}
    # A run that was stopped before its first checkpoint begins anew.
    goes_on = (
        run is not None
        and resume
        and (checkpoint.found(run.checkpoints) or run.ended(config.epochs))
    )
    model = build_model(config, images, begin=not goes_on)
    if tell:
        tell()
    return fit(
        model,
        images,
        method,
        out=out,
        validation=load_data(config, "validation") if config.val_images else None,
        resume=resume,
        overwrite=overwrite,
        quiet=quiet,
        device=config.device,
        describe={**described, "params": method.params()},
        **settings,
    )


def check_rerunnable(
    values: Mapping[str, Any], place: str | Path, *, complete: bool = False
) -> None:
    """Refuse settings that ``surestep.fit`` wrote: they name neither model nor data.

    Args:
        values: from a ``config.yaml``.
        place: that file, or its folder.
        complete: whether the settings must be those of a whole run.

    Raises:
        UserError: the settings are of a model and data of the user's own.
    """
    named = {"dataset", "model"} <= values.keys()
    if not named and (complete or "bounds" in values):  # only fit writes bounds
        raise UserError(
            f"{place} was trained from Python with a model and data of your own: resume it with "
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


def load(folder: str | Path, device: str | None = None) -> Run:
    """Load a run folder (``surestep.load``), without its data if the weights name the classes.

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
        images = load_data(config, "test")
    model = build_model(config, images)
    files.load_weights(weights, model)
    return Run(config, model.to(pick_device(device)).eval(), build_threat(config), folder)
