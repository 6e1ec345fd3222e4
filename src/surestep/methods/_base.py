"""The base class of training methods, their costs and presets, and how they are registered.

Given a model and a batch, a method decides which images go through the single update pass and what
is minimised there. It contains no training loop and does no I/O. To add one, add a file with a
registered subclass of ``Method`` and a card of the same slug in ``cards/``.
"""

from __future__ import annotations

import copy
import functools
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from types import UnionType
from typing import (
    Any,
    ClassVar,
    NamedTuple,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import torch.nn.functional as F
from torch import Tensor, nn

from surestep import processes
from surestep.attacks.inputs import check_inputs, forward_logits
from surestep.errors import SurestepWarning, UserError
from surestep.methods._dropout import activation_dropout
from surestep.methods._losses import one_hot
from surestep.methods._memory import Draw
from surestep.threat import Linf, ThreatModel, check_threat

Criterion = Callable[..., Tensor]
"""Called as ``criterion(logits, y, reduction="mean" | "none")``, as ``F.cross_entropy`` is."""


class StepResult(NamedTuple):
    """What a method returns for one batch.

    Attributes:
        loss: scalar, to be minimised; the only field with an autograd graph.
        terms: the parts of the loss by name, detached scalars, for logging. The names that the
            training loop logs itself (``RESERVED``, ``val_...``) are refused.
        x_adv: the images that ``logits`` belong to (N, ...), detached.
        logits: at ``x_adv`` in the update's forward pass, (N, K), detached.
    """

    loss: Tensor
    terms: Mapping[str, Tensor]
    x_adv: Tensor
    logits: Tensor


RESERVED = {
    *("loss", "epoch", "step", "lr", "adv_accuracy", "images_per_second", "train_seconds"),
    *("collapse", "stopped"),
}
"""Names in a row of the training log that no term of a loss may have."""
Terms = tuple[Tensor, Mapping[str, Tensor]]
"""The loss to minimise, and its parts by name."""
Loss = Callable[[Tensor], Terms]
"""Maps the update's logits (M, K) to the loss and its parts."""


class Update(NamedTuple):
    """What a method makes of a batch: the images of the update pass, and the loss there.

    Attributes:
        points: all views (M, ...), concatenated so that batch norm sees them together.
        loss: maps the logits (M, K) at ``points`` to the loss and its parts.
        rows: the slice of ``points`` that is x_adv.
    """

    points: Tensor
    loss: Loss
    rows: slice = slice(None)

    def take(self, model: nn.Module) -> StepResult:
        """Run the update pass through ``model`` and compute the loss."""
        logits = forward_logits(model, self.points)
        loss, terms = self.loss(logits)
        if taken := [name for name in terms if name in RESERVED or name.startswith("val_")]:
            raise UserError(f"the term {taken[0]!r} has a name that training logs: rename it")
        detached = {name: term.detach() for name, term in terms.items()}
        rows = self.rows
        return StepResult(loss, detached, self.points[rows].detach(), logits[rows].detach())


@dataclass(frozen=True)
class Progress:
    """How far training is, for methods with a schedule. The loop sets it before each step.

    Attributes:
        step: number of the next step, from 0.
        steps_per_epoch: number of steps in an epoch.
        epochs: length of the run; may be fractional.
        images: number of training images; 0 if unknown.
        lr: learning rate of the step.
        labelled: share of the training images that have a label.
    """

    step: int = 0
    steps_per_epoch: int = 1
    epochs: float = 1
    images: int = 0
    lr: float = 0.0
    labelled: float = 1.0

    def __deepcopy__(self, memo: object) -> Progress:
        """Return itself, so that a copied method still knows whether its progress was set."""
        return self

    @property
    def epoch(self) -> int:
        """The epoch that the step belongs to, from 0."""
        return self.step // self.steps_per_epoch

    @property
    def done(self) -> float:
        """Share of the training that is completed, in [0, 1)."""
        return self.step / (self.steps_per_epoch * self.epochs)


_NOT_TOLD = Progress()
"""A method's progress until it is set."""


@dataclass(frozen=True)
class Cost:
    """Passes per training image in one step. A standard step is 1 + 1 + 1."""

    forward: float
    input_grad: float
    weight_grad: float

    @property
    def total(self) -> float:
        """The sum; the three kinds of pass take about the same work."""
        return self.forward + self.input_grad + self.weight_grad

    @classmethod
    def of(cls, *, attack: float, update: float, forward: float = 0) -> Cost:
        """Build the cost of input gradients, an update on so many images, and forward passes.

        Args:
            attack: input gradients, each with its own forward pass.
            update: images in the update pass.
            forward: further forward passes.
        """
        return cls(forward + attack + update, attack + update, update)


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


def of_eps(share: float, *, most: float = math.inf) -> Any:
    """Return a dataclass field for a length: by default a share of eps.

    In l-inf it is at most ``most``, which is meant for pixels in [0, 1] and scales with the data
    range. (In l2 a length is that of the whole step: a bound for one pixel does not fit.)
    """

    def default(threat: ThreatModel) -> float:
        bound = most * threat.span if isinstance(threat, Linf) else math.inf
        return min(share * threat.eps, bound)

    return field(default=None, metadata={"default": default, "of_eps": True})


def of_span(share: float) -> Any:
    """Return a dataclass field: by default a share of the data range, 1 for pixels in [0, 1]."""
    return field(default=None, metadata={"default": lambda threat: share * threat.span})


@dataclass
class Method(ABC):
    """One step of a training method, called as ``method(model, x, y)``.

    Subclasses are dataclasses whose fields are the hyperparameters. Fields named ``lam`` (a weight)
    and ``alpha`` (a length) must be at least 0, ``steps`` at least 1; this class checks that.

    Args:
        threat: norm, radius and data range of the perturbations trained against.
        label_smoothing: label smoothing of the update's cross entropy (never of the attack's).
        margin: subtracted from the true class's logit in the update's cross entropy (never in the
            attack); s * m for a hypersphere head with scale s and margin m.
        dropout: probability of dropout after each activation in the update, at the start of
            training; it falls linearly to 0 (SADS, Vivek & Babu 2020, arXiv 2004.08628).

    Attributes:
        sources: other models to attack, to be set before training if it ``takes_sources``.

    Raises:
        UserError: a hyperparameter is outside its range.
    """

    slug: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]
    presets: ClassVar[Mapping[str, Preset]] = {}
    lengths: ClassVar[tuple[str, ...]] = ("alpha",)
    """Hyperparameters in pixel units, which ``set_strength`` scales with eps."""
    needs_index = False
    """Whether every step needs the ``index`` of its images, for instance to keep state for each."""
    remembers_images = False
    """Whether the state that it keeps per image is at least as large as the image."""
    takes_sources = False
    """Whether it also attacks other models, its ``sources``."""
    takes_unlabelled = False
    """Whether it also learns from images without a label (y = -1)."""
    kept: ClassVar[tuple[str, ...]] = ()
    """Attributes that are state: tensors, plain values, and objects with a ``state_dict``."""
    kept_rows: ClassVar[tuple[str, ...]] = ()
    """State tensors with one row per image of this process's share of the batch."""
    second_order = False
    """Whether its loss contains a gradient, which is differentiated again."""
    replays = 1
    """Number of consecutive steps on each batch."""
    needs_progress = False
    """Whether it follows a schedule, so that ``progress`` must be set before each step."""

    threat: ThreatModel
    label_smoothing: float = field(default=0.0, kw_only=True)
    margin: float = field(default=0.0, kw_only=True)
    dropout: float = field(default=0.0, kw_only=True)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.slug = cls.__name__  # until it is registered; never the parent's

    def __post_init__(self) -> None:
        check_threat(self.threat)
        self._inputs_checked = False
        self.progress = _NOT_TOLD
        self.strength = 1.0
        self.draw: Draw | None = None
        self.sources: Sequence[nn.Module] = ()
        for one in fields(self):
            if getattr(self, one.name) is None and "default" in one.metadata:
                setattr(self, one.name, one.metadata["default"](self.threat))
        for name, kinds in kinds_of(type(self)).items():
            expected = " or ".join(_WORDS[kind] for kind in kinds)
            self.require(_fits(getattr(self, name), kinds), name, expected)
        for name in sorted(_LEAST.keys() & set(parameter_names(type(self)))):
            value, least = getattr(self, name), _LEAST[name]
            self.require(not isinstance(value, float | int) or value >= least, name, f">= {least}")
        self.require(0 <= self.label_smoothing < 1, "label_smoothing", "in [0, 1)")
        self.require(self.margin >= 0, "margin", ">= 0")
        self.require(0 <= self.dropout < 1, "dropout", "in [0, 1)")
        self.validate()
        self._full: tuple[ThreatModel, dict[str, float]] | None = None

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        index: Tensor | None = None,
        draw: Draw | None = None,
    ) -> StepResult:
        """Compute the loss of one batch: ``prepare``, then ``take``.

        Args:
            model: returns logits (N, K); may be wrapped in DistributedDataParallel. Its mode,
                flags, gradients and buffers are left as found, except for the buffers that the
                update's forward pass writes in train mode.
            x: images (N, ...) in the threat model's data range.
            y: int64 labels (N,); -1 means no label, if the method ``takes_unlabelled``.
            index: positions of the images in the data set (N,), if the method ``needs_index``.
            draw: the crops and flips applied to x, for the same methods.

        Raises:
            UserError: the first batch has values, labels or shapes that cannot be trained on
                (later batches are not checked: that would wait for the device at each step); a
                method that ``needs_index`` got none.
        """
        return self.take(model, self.prepare(model, x, y, index, draw))

    def prepare(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        index: Tensor | None = None,
        draw: Draw | None = None,
    ) -> Update:
        """Attack the model and return the update to take; see ``__call__``."""
        if not self._inputs_checked:
            check_inputs(model, x, y, self.threat, unlabelled=self.takes_unlabelled)
            if self.needs_index and index is None:
                raise UserError(
                    f"{self.slug} needs each image's position in the data set: pass index, the "
                    "positions (N,) of the batch's images (surestep.fit does, for images in memory)"
                )
            self._inputs_checked = True
        elif self.progress is _NOT_TOLD and (self.needs_progress or self.dropout):
            # Only from the second call on: a single call needs no schedule.
            self.progress = Progress()  # warn only once
            warnings.warn(
                f"{self.slug} follows a schedule, but its progress is not set: set "
                "method.progress = surestep.methods.Progress(step, steps_per_epoch, epochs, "
                "images) before each step (surestep.fit does)",
                SurestepWarning,
                stacklevel=3,
            )
        self.draw = draw
        return self.craft(model, x.detach(), y, index)

    def take(self, model: nn.Module, update: Update) -> StepResult:
        """Compute the loss of an update, with the method's dropout."""
        share = self.dropout * (1 - self.progress.done)
        with activation_dropout(model, share):
            return update.take(model)

    @abstractmethod
    def craft(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor | None) -> Update:
        """Return the update for one batch; see ``__call__``. ``x`` is detached."""

    def set_strength(self, share: float) -> None:
        """Scale eps and the hyperparameters in ``lengths`` to ``share`` of their full values.

        Use this to change the radius of an existing method. Assigning ``threat`` does not: parts
        of the method hold copies of it. A later call replaces an earlier one.
        """
        self.strength = share
        if self._full is None:
            lengths = {k: v for k in self.lengths if (v := getattr(self, k, None))}
            self._full = self.threat, lengths
        threat, lengths = self._full
        self.threat = threat if share == 1 else threat.with_eps(share * threat.eps)
        for name, length in lengths.items():
            setattr(self, name, share * length)

    @abstractmethod
    def cost(self, batch_size: int) -> Cost:
        """Return the passes per image of one step at this batch size."""

    @property
    def cycle(self) -> int:
        """Number of steps after which the costs repeat; timing averages over one such cycle."""
        return 1

    def peak_images(self, batch_size: int) -> int:
        """Return the number of images in the largest pass, which sets the peak memory."""
        return math.ceil(batch_size * self.cost(batch_size).weight_grad)

    def validate(self) -> None:
        """Check the hyperparameters; raise ``UserError`` through ``require``."""

    def not_negative(self, *names: str) -> None:
        """Check in ``validate`` that hyperparameters are at least 0.

        ``lam``, ``alpha`` and ``steps`` are checked without a call; for other bounds, use
        ``require``.
        """
        for name in names:
            self.require(getattr(self, name) >= 0, name, ">= 0")

    def require(self, ok: bool, name: str, expected: str) -> None:
        """Raise an error for the hyperparameter ``name`` unless ``ok``.

        Raises:
            UserError: names the hyperparameter, its value and what was expected.
        """
        if not ok:
            raise UserError(f"{self.slug}: {name} {getattr(self, name)!r} is not {expected}")

    @property
    def criterion(self) -> Criterion:
        """The cross entropy of the update, with label smoothing and margin."""
        smoothed = functools.partial(F.cross_entropy, label_smoothing=self.label_smoothing)
        return functools.partial(_with_margin, smoothed, self.margin) if self.margin else smoothed

    def plain_loss(self, y: Tensor) -> Loss:
        """Return a loss that is just the cross entropy at all points."""

        def loss(logits: Tensor) -> Terms:
            ce = self.criterion(logits, y)
            return ce, {"ce": ce}

        return loss

    def params(self) -> dict[str, Any]:
        """Return the method's own hyperparameters by name."""
        values = {name: getattr(self, name) for name in parameter_names(type(self))}
        # np.float64 is a float here, but YAML would fail to write it.
        return {k: float(v) if isinstance(v, float) else v for k, v in values.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return what must survive a resume: ``kept``, and ``kept_rows`` of all processes.

        With several processes, each must call this, because ``kept_rows`` are gathered.
        """
        state = {}
        for name in (*self.kept, *self.kept_rows):
            value = getattr(self, name)
            if name in self.kept_rows:
                value = processes.gather(value)
            state[name.strip("_")] = value.state_dict() if hasattr(value, "state_dict") else value
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned; attributes missing from it stay as they are."""
        for name in (*self.kept, *self.kept_rows):
            if name.strip("_") not in state:
                continue
            value = state[name.strip("_")]
            if hasattr(getattr(self, name), "load_state_dict"):
                getattr(self, name).load_state_dict(value)
            elif isinstance(value, Tensor):
                value = processes.local_rows(value) if name in self.kept_rows else value
                setattr(self, name, value.clone())
            else:
                setattr(self, name, copy.deepcopy(value))


SHARED = ("label_smoothing", "margin", "dropout")
"""Hyperparameters that every method has."""
_LEAST = {"lam": 0, "alpha": 0, "steps": 1}
"""Lower bounds of hyperparameters by name, in every method that has them."""
_WORDS = {
    float: "a finite number",
    int: "a whole number",
    bool: "true or false",
    str: "a name",
    type(None): "none",
}


@functools.cache
def kinds_of(cls: type[Method]) -> dict[str, tuple[type, ...]]:
    """Return the types that each hyperparameter may have.

    Raises:
        UserError: a hyperparameter has a type that YAML and the command line cannot express.
    """
    hints = get_type_hints(cls)
    found = {}
    for name in (*SHARED, *parameter_names(cls)):
        union = get_origin(hints[name]) in (Union, UnionType)
        found[name] = kinds = get_args(hints[name]) if union else (hints[name],)
        if not set(kinds) <= set(_WORDS):
            raise UserError(
                f"{name} of {cls.__name__} is a {hints[name]}: hyperparameters must be float, int, "
                "bool, str or a union of these and None; take a str and convert it in validate()"
            )
    return found


def _with_margin(
    criterion: Criterion, margin: float, logits: Tensor, y: Tensor, **options: Any
) -> Tensor:
    return criterion(logits - margin * one_hot(y, logits.shape[1]), y, **options)


def _fits(value: Any, kinds: tuple[type, ...]) -> bool:
    """Return whether a value has one of the types; a float must also be finite."""
    if isinstance(value, float):
        return float in kinds and math.isfinite(value)
    # Compare exact types: isinstance takes True for an int, but a weight of "true" is a mistake.
    return type(value) in kinds or (type(value) is int and float in kinds)


def parameter_names(cls: type[Method]) -> list[str]:
    """Return the names of a method's own hyperparameters: its fields, less those of ``Method``."""
    return [f.name for f in fields(cls) if f.name not in ("threat", *SHARED)]


M = TypeVar("M", bound=Method)
METHODS: dict[str, type[Method]] = {}


def register(slug: str) -> Callable[[type[M]], type[M]]:
    """Register a subclass of ``Method`` under its slug.

    Raises:
        UserError: the slug is another method's, a hyperparameter has no default or an unsupported
            type, ``lengths`` lacks a length or names another attribute, or the summary or the paper
            is missing.
    """

    def add(cls: type[M]) -> type[M]:
        for name in parameter_names(cls):
            one = cls.__dataclass_fields__[name]
            if one.default is MISSING and one.default_factory is MISSING:
                raise UserError(f"{name} of the method {slug!r} has no default: give it one")
            if one.metadata.get("of_eps") and name not in cls.lengths:
                raise UserError(
                    f"{name} of the method {slug!r} is a length: name it in the class attribute "
                    "lengths, so that it scales with eps"
                )
        for name in cls.lengths if "lengths" in vars(cls) else ():
            if name not in parameter_names(cls):
                raise UserError(f"the method {slug!r} has no {name!r}, which its lengths name")
        kinds_of(cls)
        for name in ("summary", "paper"):
            if not isinstance(getattr(cls, name, None), str):
                raise UserError(f"the method {slug!r} has no {name}: set the class attribute")
        taken = METHODS.get(slug)
        if taken and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise UserError(
                f"the method name {slug!r} is taken by {taken.__module__}.{taken.__qualname__}: "
                f"register {cls.__qualname__} under another name"
            )
        cls.slug = slug
        METHODS[slug] = cls
        return cls

    return add
