"""The settings of a run: one typed definition for Python, YAML and the command line.

Imports no torch, so that the command line can describe every option at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from surestep.errors import UserError, unknown_name


def _ratio(value: Any) -> Any:
    """Convert a ratio such as "8/255" to a number; leave all else to validation."""
    if isinstance(value, str) and "/" in value:
        try:
            return float(Fraction(value.replace(" ", "")))
        except (ValueError, ZeroDivisionError):
            raise ValueError("expected a number or a ratio such as 8/255") from None
    return value


_WORDS = {"true": True, "yes": True, "false": False, "no": False, "none": None, "null": None}


def read_param(value: Any) -> Any:
    """Read a hyperparameter as written: a number, a ratio, true, false, none, or else a name."""
    if not isinstance(value, str):
        return value
    if value[:1].isalpha():
        return _WORDS.get(value.lower(), value)
    try:
        return int(value)
    except ValueError:
        return float(_ratio(value))


Ratio = Annotated[float, BeforeValidator(_ratio)]
Param = Annotated[bool | int | float | str | None, BeforeValidator(read_param)]
Positive = Annotated[int, Field(ge=1)]


class FitSettings(BaseModel):
    """How a method is trained; the keyword arguments of ``surestep.fit``."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    epochs: int | float = Field(
        8, gt=0, description="Passes over the training images; may be fractional (1.5)"
    )
    batch_size: Positive = Field(128, description="Images per step, over all processes")
    optimizer: Literal["sgd", "adam", "adamw"] = Field("sgd", description="The optimizer")
    lr: float = Field(0.1, gt=0, description="Peak learning rate")
    momentum: float = Field(
        0.9, ge=0, lt=1, description="Momentum of SGD; onecycle varies it by 0.05 up and down"
    )
    weight_decay: float = Field(5e-4, ge=0, description="Weight decay, on all parameters")
    schedule: Literal["step", "onecycle", "triangular", "cosine", "constant"] = Field(
        "onecycle", description="Learning rate schedule; step: /5, /25, /125 at 1/4, 1/2, 3/4"
    )
    warmup: float = Field(
        0.0, ge=0, description="Epochs of linear learning rate warmup at the start"
    )
    eps_warmup: float = Field(
        0.0, ge=0, description="Epochs of linear warmup of eps and step sizes at the start"
    )
    label_smoothing: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Label smoothing of the update's cross entropy; by default the method's",
    )
    dropout: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Dropout after each activation, falling to 0 (SADS); by default the method's",
    )
    clip_grad: float | None = Field(None, gt=0, description="Maximum norm of the weight gradient")
    ema: float | None = Field(
        None, gt=0, lt=1, description="Decay of an exponential average of the weights, e.g. 0.999"
    )
    swa: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Fraction of training after which the weights are averaged, e.g. 0.75",
    )
    awp: float | None = Field(
        None,
        gt=0,
        description="Adversarial weight perturbation: relative size (published: 0.01 with pgd, "
        "0.005 from epoch 10 on with trades)",
    )
    awp_from: float = Field(
        0.0, ge=0, description="Epochs of training before weight perturbation (awp) begins"
    )
    augment: Literal["none", "crop-flip"] = Field(
        "none", description="Augmentation of the training images"
    )
    seed: int = Field(
        0, ge=0, lt=2**32, description="Seed of weights, data order and perturbations"
    )
    engine: Literal["auto", "fast", "reference"] = Field(
        "auto",
        description="How steps are computed: fast (channels_last, autocast), reference (plain) or "
        "auto: the faster one in a short measurement (fast for data not in memory)",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="Precision of the forward pass (losses are always fp32)"
    )
    max_memory: float | None = Field(
        None,
        gt=0,
        description="Memory limit of a step in GiB; activations are recomputed to stay below",
    )
    compile: bool = Field(
        False, description="Compile the network (torch.compile), for long runs on GPUs"
    )
    val_images: int = Field(
        1000, ge=0, description="Held-out images attacked after each epoch (0: no validation)"
    )
    val_attacks: tuple[str, ...] = Field(
        ("fgsm", "pgd-20x2"),
        description="Validation attacks (fgsm is always added); their worst case selects",
        examples=["fgsm", "pgd-20"],
    )
    select: Literal["best", "last"] = Field(
        "best", description="Weights to keep: best worst case in validation, or the last epoch's"
    )
    checkpoint_every: int | None = Field(
        None,
        ge=1,
        description="Steps between checkpoints within an epoch (one is always saved at its end)",
    )
    tensorboard: bool = Field(False, description="Also log to TensorBoard, in the run folder")


class RunConfig(FitSettings):
    """A whole run, as written to ``config.yaml``."""

    method: str = Field("sat-r2", description="Training method; see `surestep methods`")
    params: dict[str, Param] = Field({}, description="The method's hyperparameters, by name")
    sources: tuple[str, ...] = Field(
        (),
        description="Run folders whose models are attacked in turn (eat)",
        examples=["runs/one", "runs/two"],
    )
    dataset: str = Field(
        "mnist",
        description="Data set: mnist (embedded), cifar10, cifar100, folder:DIR, npz:FILE or "
        "hf:NAME",
    )
    data: str | None = Field(None, description="Location of the data set (folder or file)")
    image_size: Positive | None = Field(
        None, description="Crop and resize images of a folder or of the Hub to this side (pixels)"
    )
    model: str = Field(
        "lenet+",
        description="lenet+, cnn-small, resnet18, resnet34, preactresnet18, preactresnet10-slim, "
        "wrn-28-10, timm:NAME or FILE.py:FACTORY",
    )
    weights: str | None = Field(
        None, description="Initial weights: a file, or pretrained (timm's own)"
    )
    normalize: bool = Field(
        True, description="Use the model's built-in input normalisation, if it has one"
    )
    head: Literal["linear", "hypersphere"] = Field(
        "linear", description="Last layer; hypersphere: logits are scaled cosines"
    )
    head_scale: float = Field(15.0, gt=0, description="Scale of a hypersphere head")
    head_margin: float = Field(
        0.2, ge=0, lt=2, description="Margin on the true class's cosine, in training only"
    )
    mean_sparse: float | None = Field(
        None, ge=0, description="Threshold of sparsified activations, set by `surestep harden`"
    )
    norm: Literal["linf", "l2"] = Field("linf", description="Norm of the threat model")
    eps: Ratio = Field(
        0.3,
        ge=0,
        description="Radius of the threat model, such as 0.3 or 8/255; step sizes and other "
        "lengths of a preset or a --config scale with it (except those inside perturbation)",
    )
    device: str | None = Field(
        None, description="Where to run: cpu, cuda, cuda:1, mps; by default the best available"
    )


CHANGEABLE = ("device", "max_memory", "checkpoint_every", "tensorboard")
"""Settings that a resumed run may change: where and how it is computed and saved, not what."""

C = TypeVar("C", bound=BaseModel)


def parse(cls: type[C], values: Mapping[str, Any], where: str = "") -> C:
    """Validate values into a settings class.

    Args:
        cls: ``FitSettings`` or ``RunConfig``.
        values: by field name.
        where: prefix of error messages, such as the file's name.

    Raises:
        UserError: an unknown name (the message suggests the nearest) or an invalid value.
    """
    for name in values:
        if name not in cls.model_fields:
            error = unknown_name("setting", str(name), cls.model_fields)
            raise UserError(f"{where}{error}")
    try:
        return cls.model_validate(dict(values))
    except ValidationError as e:
        first = e.errors()[0]
        name = str(first["loc"][0])
        value = values.get(name)
        if len(first["loc"]) > 1 and isinstance(value, Mapping):
            name = f"{name}.{first['loc'][1]}"
            value = value.get(str(first["loc"][1]))
        message = first["msg"].removeprefix("Value error, ")
        if name.startswith("params."):
            message = "expected a number, a ratio such as 8/255, true, false, none or a name"
        if first["type"] == "tuple_type":
            entries = cls.model_fields[name].examples or ["one", "two"]
            message = f"expected a list such as [{', '.join(entries)}]"
        raise UserError(f"{where}{name} {value!r} is invalid: {message}") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file of settings.

    Raises:
        UserError: the file is missing or is not a YAML mapping.
    """
    try:
        values = yaml.safe_load(Path(path).read_text("utf-8"))
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}") from e
    except (yaml.YAMLError, ValueError) as e:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(e).split())}") from e
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no settings: expected lines such as 'method: sat-r2'")
    return values


def to_yaml(values: Mapping[str, Any]) -> str:
    """Write settings as YAML, in the order given."""
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
