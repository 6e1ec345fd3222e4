"""Models from any source, by their names on the command line.

Weights are safetensors, or a ``state_dict`` read with torch's ``weights_only``. Python files that
make a model, TorchScript and exported programs, and models that timm and the Hub load by name are
code, and may do anything that code may: the user must name them as such.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surestep import data, models, runs
from surestep.attacks.lending import device_of
from surestep.config import RunConfig, parse
from surestep.data import Images, are_numbers
from surestep.devices import pick_device
from surestep.errors import UserError, need
from surestep.threat import ThreatModel
from surestep.weights import load_any_weights, read_signature

KINDS = (
    "a run folder, FILE.py:FACTORY, an architecture such as lenet+ or timm:NAME with --weights, a "
    "TorchScript (.pt) or torch.export (.pt2) program, or hf:NAME"
)


@dataclass(frozen=True)
class Target:
    """A model to be judged, with the images to judge on and the threat model.

    Attributes:
        name: as the user gave it.
        model: on its device, in eval mode.
        images: the images to judge it on.
        threat: norm, radius and data range.
        preprocess: what to apply to the pixels before the model, if the user declared it.
        run: the run folder, if the model is one.
        note: remarks to show before the model is judged; may be empty.
        judged_on: ``dataset`` and ``split`` of the images, to be recorded in results.
    """

    name: str
    model: nn.Module
    images: Images
    threat: ThreatModel
    preprocess: nn.Module | None = None
    run: Path | None = None
    note: str = ""
    judged_on: dict[str, str] = field(default_factory=dict)


def open_target(
    name: str,
    *,
    weights: str | None = None,
    dataset: str | None = None,
    root: str | None = None,
    image_size: int | None = None,
    norm: str | None = None,
    eps: str | float | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    device: str | None = None,
    split: str = "test",
    n: int | None = None,
) -> Target:
    """Load a model by name, together with its images and its threat model.

    Args:
        name: a run folder, ``FILE.py:FACTORY``, an architecture (one of ``models.names()`` or
            ``timm:NAME``), a TorchScript or torch.export program, or ``hf:NAME``.
        weights: a .safetensors file or a saved state_dict, for FILE.py:FACTORY and an architecture;
            for ``timm:NAME``, the pretrained ones by default.
        dataset: as for training; by default the run's own.
        root: the location of the data set.
        image_size: side in pixels to which images of a folder or of the Hub are cropped and
            resized.
        norm: "linf" or "l2"; by default the run's, or "linf".
        eps: the radius; by default the run's.
        mean: per-channel mean, if the model expects normalised images; requires ``std``.
        std: per-channel standard deviation.
        device: by default the best available.
        split: "test" or "validation".
        n: load only n images, those that ``surestep.evaluate`` would judge.

    Raises:
        UserError: the name is none of these, files are missing or do not fit, or the data set or
            the radius is unknown.
    """
    folder = Path(name)
    of_run = folder.is_dir()
    normalises = of_run or name.startswith("hf:") or (_of_timm(name) and not weights)
    if (mean is None) != (std is None):  # before anything is loaded, or downloaded
        raise UserError("mean and std go together: give both or neither")
    if normalises and mean is not None:
        raise UserError(f"{name} normalises its images itself: leave mean and std out")
    torch_device = pick_device(device)
    asked = {"dataset": dataset, "data": root, "image_size": image_size, "norm": norm, "eps": eps}
    make_config = _config_of_run if of_run else _config_from_options
    config = make_config(name, weights, asked)
    data.check_judged(split)
    images, threat = runs.load_data(config, split, n), runs.build_threat(config)
    preprocess = models.choose_normalize(images.image_shape[0], mean, std, None)
    if of_run:
        run = runs.load(folder, device)
        model, classes = run.model, run.classes
    else:
        file = Path(weights or "")
        classes = read_signature(file).classes if file.suffix == ".safetensors" else ()
        model = _load(name, weights, images, classes, bare=preprocess is not None)
        classes = classes or _class_names(model)
    numbered = runs.in_class_order_of(name, classes, images)
    notes = [
        _note_on_class_count(name, model, numbered) or _note_on_class_names(name, classes, numbered)
    ]
    if numbered is not images:
        notes.append(f"the labels are renumbered to the class order of {name}, by class name")
    return Target(
        name=name,
        model=_eval(model.to(torch_device)),
        images=numbered,
        threat=threat,
        preprocess=None if preprocess is None else preprocess.to(torch_device),
        run=folder if of_run else None,
        note="; ".join(filter(None, notes)),
        judged_on={"dataset": config.dataset, "split": split},
    )


def _config_of_run(name: str, weights: str | None, asked: dict[str, Any]) -> RunConfig:
    """Return a run's settings, overridden by those that the user gave."""
    if weights is not None:
        raise UserError(f"{name} is a run folder and has its own weights: leave --weights out")
    config = runs.read_config(Path(name))
    norm, dataset = asked["norm"], asked["dataset"]
    if norm not in (None, config.norm) and asked["eps"] is None:
        raise UserError(
            f"{name} has eps {config.eps:g} in {config.norm}, which says nothing about {norm}: "
            f"give --eps with --norm {norm}"
        )
    changes = {k: v for k, v in asked.items() if v is not None}
    if dataset not in (None, config.dataset):  # the location is of the run's own data
        size = {} if data.resizes(dataset) else {"image_size": None}
        changes = {"data": None, **size, **changes}
    return parse(RunConfig, {**config.model_dump(), **changes})


def _config_from_options(name: str, weights: str | None, asked: dict[str, Any]) -> RunConfig:
    """Return the settings that the user gave for a model that is not a run."""
    _check_kind(name, weights)
    if weights is not None and not Path(weights).is_file():
        raise UserError(f"{weights} does not exist: give another --weights FILE")
    missing = " and ".join(f"--{key}" for key in ("dataset", "eps") if asked[key] is None)
    if missing:
        raise UserError(f"{name} is not a run folder, so give its data and radius: {missing}")
    return parse(RunConfig, {**asked, "norm": asked["norm"] or "linf"})


def open_source(name: str, target: Target) -> nn.Module:
    """Load another model, to craft a transfer attack on, onto the target's device.

    Args:
        name: as for ``open_target``, of a model that has weights of its own.
        target: the target, for its images and device.

    Raises:
        UserError: there is no such model, or it numbers the classes differently from the target.
    """
    device = device_of(target.model)
    if Path(name).is_dir():
        run = runs.load(name, str(device))
        model, classes = run.model, run.classes
    else:
        _check_kind(name, None)
        model = _eval(_load(name, None, target.images).to(device))
        classes = _class_names(model)
    if runs.in_class_order_of(name, classes, target.images) is not target.images:
        raise UserError(
            f"the source {name} has another class order than the target: use one with the same"
        )
    return model


def _without_normalisation(model: nn.Module) -> nn.Module:
    """Return a pretrained model without the normalisation in front of it."""
    return model[-1] if isinstance(model, nn.Sequential) and len(model) else model


def _class_names(model: nn.Module) -> tuple[str, ...]:
    """Return the class names of a model from the Hub; empty for other models."""
    named = getattr(getattr(_without_normalisation(model), "config", None), "id2label", None) or {}
    return tuple(str(named[k]) for k in sorted(named))


def _note_on_class_count(name: str, model: nn.Module, images: Images) -> str:
    """Return a note if a pretrained model has another number of classes than the data."""
    known = getattr(_without_normalisation(model), "num_classes", None)
    outputs = len(_class_names(model)) or (known if isinstance(known, int) else 0)
    if not outputs or outputs == images.num_classes:
        return ""
    return (
        f"{name} has {outputs} classes, the data {images.num_classes}: label k of the data is "
        "taken to be output k of the model"
    )


def _note_on_class_names(name: str, theirs: Sequence[str], images: Images) -> str:
    """Return a note if the model and the data name their classes, but none alike."""
    ours = images.classes
    if are_numbers(ours) or are_numbers(theirs) or set(theirs) & set(ours):
        return ""
    return (
        f"no class name of {name} agrees with the data's: label k of the data is taken to be "
        "output k of the model"
    )


def _check_kind(name: str, weights: str | None) -> None:
    """Refuse a name that is not a model's, before asking for other options that are missing."""
    program = Path(name).suffix in (".pt", ".pth", ".ts", ".pt2")
    if name.endswith(".py"):
        raise UserError(f"{name} names no factory: write {name}:make_model")
    if name in models.names() and weights is None:
        raise UserError(f"{name} is an architecture without weights: give --weights FILE")
    known = name.startswith("hf:") or _is_architecture(name) or models.in_file(name)
    if not (known or program):
        raise UserError(
            f"{name} is not a run folder: it has no config.yaml, nor is it a model: give {KINDS}"
        )
    if program and not Path(name).is_file():
        raise UserError(f"{name} does not exist: give a TorchScript or torch.export program")


def _of_timm(name: str) -> bool:
    return name.startswith("timm:")


def _is_architecture(name: str) -> bool:
    return _of_timm(name) or name in models.names()


def _eval(model: nn.Module) -> nn.Module:
    """Put a model into eval mode, and into float32 if any of its weights is in half precision."""
    halves = (torch.float16, torch.bfloat16)
    if any(p.dtype in halves for p in model.parameters()):
        model = model.float()
    # An exported program refuses eval(); it stays in the mode it was exported in.
    for module in model.modules():
        module.training = False
    return model


def _load(
    name: str,
    weights: str | None,
    images: Images,
    classes: Sequence[str] = (),
    *,
    bare: bool = False,
) -> nn.Module:
    """Load a model that is not a run folder.

    An architecture gets an output for each of ``classes``, or else for each class of the data. If
    ``bare``, it is built without normalisation, since the images are normalised before it.
    """
    if _is_architecture(name) and weights is not None:
        return _architecture(name, Path(weights), images, len(classes), bare=bare)
    if models.in_file(name):
        model = models.from_file(name)
        if weights is not None:
            load_any_weights(Path(weights), model)
        return model
    if weights is not None:
        raise UserError(
            f"{name} has its own weights: leave --weights out; it is for FILE.py:FACTORY and "
            "architectures such as lenet+ or timm:NAME"
        )
    if _of_timm(name):
        return _pretrained_timm(name)
    if name.startswith("hf:"):
        return _hugging_face(name.removeprefix("hf:"))
    return _program(Path(name))


def _architecture(
    name: str, weights: Path, images: Images, outputs: int, *, bare: bool
) -> nn.Module:
    shape = images.image_shape
    model = models.create(
        name,
        outputs or images.num_classes,
        in_channels=shape[0],
        image_size=shape[-1],
        normalize=not bare,
    )
    try:
        load_any_weights(weights, model)
    except UserError as e:
        if bare and "normalize.mean" in str(e):
            raise UserError(
                f"{weights} holds the mean and std that its model normalises with: leave mean and "
                "std out"
            ) from e
        raise
    return model


def _program(path: Path) -> nn.Module:
    try:
        if path.suffix == ".pt2":
            return torch.export.load(path).module()
        with warnings.catch_warnings():
            # TorchScript is deprecated but still in use.
            warnings.simplefilter("ignore", DeprecationWarning)
            return torch.jit.load(path, map_location="cpu")
    except Exception as e:
        kind = "torch.export" if path.suffix == ".pt2" else "TorchScript"
        raise UserError(
            f"{path} is not a {kind} program: if it holds weights only, give the code that makes "
            f"the model as FILE.py:FACTORY with --weights {path}"
        ) from e


def _pretrained_timm(name: str) -> nn.Module:
    timm = need("timm", name, "surestep[timm]")
    try:
        made = timm.create_model(name.removeprefix("timm:"), pretrained=True)
    except Exception as e:
        raise UserError(f"timm cannot load {name!r} with weights: {e}") from e
    config = made.pretrained_cfg
    return nn.Sequential(models.Normalize(config["mean"], config["std"]), made)


def _hugging_face(name: str) -> nn.Module:
    transformers = need("transformers", f"the model hf:{name}", "surestep[hf-models]")
    try:
        model = transformers.AutoModelForImageClassification.from_pretrained(name)
        processor = transformers.AutoImageProcessor.from_pretrained(name)
    except Exception as e:
        raise UserError(f"transformers cannot load {name!r}: {' '.join(str(e).split())}") from e
    if not _takes_plain_pixels(processor):
        raise UserError(
            f"hf:{name} expects pixels in another order or scale than RGB in [0, 1]: write a "
            "FILE.py:FACTORY that converts them inside the model"
        )
    statistics = _statistics(processor)
    found: nn.Module = model
    return nn.Sequential(models.Normalize(*statistics), found) if statistics else found


def _statistics(processor: Any) -> tuple[Sequence[float], Sequence[float]] | None:
    """Return the mean and std that a processor normalises with, None if it does not."""
    # The wrapper for timm has no do_normalize, and keeps its statistics in timm's own config.
    if of_timm := getattr(processor, "data_config", None):
        return of_timm["mean"], of_timm["std"]
    mean: Any = getattr(processor, "image_mean", None)
    if getattr(processor, "do_normalize", mean is not None):
        return mean, processor.image_std
    return None


def _takes_plain_pixels(processor: Any) -> bool:
    """Tell whether a processor scales RGB to [0, 1] and then normalises it at most once."""
    scale = getattr(processor, "rescale_factor", None)
    others = ("do_flip_channel_order", "do_color_quantize", "rescale_offset", "include_top")
    return (
        scale in (None, 1 / 255)
        and getattr(processor, "do_rescale", True)
        and not any(getattr(processor, name, False) for name in others)
    )
