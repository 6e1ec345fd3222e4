"""What a method is, what it costs, and how it gets its name.

A method says, for a model and a batch, which images go through the one update pass and what is
minimised there. It holds no training loop and does no I/O. Adding one means adding a file with a
registered subclass of ``Method`` and a card of the same slug in ``cards/``.
"""

from __future__ import annotations

import copy
import functools
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from types import UnionType
from typing import (
    Any,
    ClassVar,
    Concatenate,
    NamedTuple,
    ParamSpec,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surestep import processes
from surestep.attacks.inputs import check_inputs, forward_logits
from surestep.devices import drop_casts_without_gradients
from surestep.errors import SurestepWarning, UserError
from surestep.methods._dropout import dropping
from surestep.methods._memory import Draw
from surestep.threat import ThreatModel
from surestep.threat import check as check_threat

P = ParamSpec("P")
T = TypeVar("T")

Criterion = Callable[..., Tensor]
"""Called as ``criterion(logits, y, reduction="mean" | "none")``, as ``F.cross_entropy`` is."""


class StepResult(NamedTuple):
    """What a method returns for one batch.

    Attributes:
        loss: scalar, to be minimised; the only part with a graph.
        terms: the parts of the loss by name, detached scalars, for logging.
        x_adv: the images that ``logits`` belong to (N, ...), detached.
        logits: at ``x_adv`` in the update's forward pass, (N, K), detached.
    """

    loss: Tensor
    terms: Mapping[str, Tensor]
    x_adv: Tensor
    logits: Tensor


Terms = tuple[Tensor, Mapping[str, Tensor]]
"""What is minimised, and its parts by name."""
Loss = Callable[[Tensor], Terms]
"""Of the update's logits (M, K)."""


class Update(NamedTuple):
    """What a method makes of a batch: the images of the one update pass, and the loss there.

    Attributes:
        points: all views (M, ...), concatenated: batch norm sees them together.
        loss: of the logits (M, K) at ``points``.
        rows: those of ``points`` that are x_adv.
    """

    points: Tensor
    loss: Loss
    rows: slice = slice(None)

    def take(self, model: nn.Module) -> StepResult:
        """Run the update pass through ``model`` and compute the loss."""
        logits = forward_logits(model, self.points)
        loss, terms = self.loss(logits)
        detached = {name: term.detach() for name, term in terms.items()}
        rows = self.rows
        return StepResult(loss, detached, self.points[rows].detach(), logits[rows].detach())


@dataclass(frozen=True)
class Progress:
    """Where training is, for methods that follow a course. The loop sets it before each step.

    Attributes:
        step: number of the step to come, from 0.
        steps_per_epoch: of the run.
        epochs: of the run; the last may be a part of one.
        images: in the training data; 0 if unknown.
        lr: learning rate of the step.
        labelled: share of the training images that have a label.
    """

    step: int = 0
    steps_per_epoch: int = 1
    epochs: float = 1
    images: int = 0
    lr: float = 0.0
    labelled: float = 1.0

    @property
    def epoch(self) -> int:
        """The epoch that the step belongs to, from 0."""
        return self.step // self.steps_per_epoch

    @property
    def done(self) -> float:
        """Share of the training that is behind, in [0, 1)."""
        return self.step / (self.steps_per_epoch * self.epochs)


_NOT_TOLD = Progress()
"""What a method has until somebody tells it where training is."""


@dataclass(frozen=True)
class Cost:
    """Passes per training image of one step. A standard step is 1 + 1 + 1."""

    forward: float
    input_grad: float
    weight_grad: float

    @property
    def total(self) -> float:
        """The sum; the three kinds of pass are about equal work."""
        return self.forward + self.input_grad + self.weight_grad

    @classmethod
    def of(cls, *, attack: float, update: float) -> Cost:
        """Build the cost of ``attack`` input gradients and an update on ``update`` images."""
        return cls(attack + update, attack + update, update)


@dataclass(frozen=True)
class Preset:
    """A recipe: the method's parameters with the training settings they were meant for.

    Attributes:
        eps: radius of the l-inf threat model.
        params: of the method, by field name.
        settings: of training, by the names of ``surestep.config.FitSettings``.
        model: the architecture.
        dataset: the data.
        source: where the recipe is from.
        normalize: whether the model normalises its input, with the data set's statistics.
    """

    eps: float
    params: Mapping[str, Any]
    settings: Mapping[str, Any]
    model: str
    dataset: str
    source: str
    normalize: bool = True


def of_eps(share: float) -> Any:
    """Return the field of a hyperparameter that is by default a share of eps, as ``alpha`` is."""
    return field(default=None, metadata={"of_eps": share})


@dataclass
class Method(ABC):
    """One step of a training method, called as ``method(model, x, y)``.

    Subclasses are dataclasses; their fields are the hyperparameters. ``lam`` is a weight and
    ``alpha`` a length, at least 0, ``steps`` at least 1: that is checked here.

    Args:
        threat: norm, radius and data range of the perturbations trained against.
        label_smoothing: of the cross entropy in the update (never in the attack).
        margin: subtracted from the true class's logit in the update's cross entropy (never in the
            attack); s * m of a hypersphere head with scale s and margin m.
        dropout: probability of dropout after each activation in the update, at the start of
            training; it falls linearly to 0 (SADS, Vivek & Babu 2020, arXiv 2004.08628).

    Raises:
        UserError: a hyperparameter is outside its range.
    """

    slug: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]
    presets: ClassVar[Mapping[str, Preset]] = {}
    lengths: ClassVar[tuple[str, ...]] = ("alpha",)
    """The hyperparameters in pixel units, which must grow and shrink with eps."""
    needs_index = False
    """Whether it remembers something for each image, so that every step needs their ``index``."""
    remembers_images = False
    """Whether what it remembers is as large as the images, or more."""
    takes_unlabelled = False
    """Whether it learns from images that have no label (y of -1), too."""
    kept: ClassVar[tuple[str, ...]] = ()
    """Attributes that are state: tensors, numbers, and what has a ``state_dict`` of its own."""
    kept_rows: ClassVar[tuple[str, ...]] = ()
    """The same, of tensors with a row for each image of this process's share of the batch."""
    second_order = False
    """Whether its loss holds a gradient, which is differentiated again."""
    replays = 1
    """How many steps in a row are taken on each batch."""
    needs_progress = False
    """Whether it follows the course of training: ``progress`` must be set before each step."""

    threat: ThreatModel
    label_smoothing: float = field(default=0.0, kw_only=True)
    margin: float = field(default=0.0, kw_only=True)
    dropout: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        check_threat(self.threat)
        self._inputs_checked = False
        self.progress = _NOT_TOLD
        self.draw: Draw | None = None
        for one in fields(self):
            if getattr(self, one.name) is None and "of_eps" in one.metadata:
                setattr(self, one.name, one.metadata["of_eps"] * self.threat.eps)
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
        self._full = (self.threat, {k: v for k in self.lengths if (v := getattr(self, k, None))})

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
                flags, gradients and buffers are left as found, but for the buffers that the one
                update forward writes in train mode.
            x: images (N, ...) in the threat model's data range.
            y: int64 labels (N,); -1 for none, where the method is ``takes_unlabelled``.
            index: position of each image in its data set (N,), for methods that remember.
            draw: the crops and flips that x was given, for the same methods.

        Raises:
            UserError: the first batch has values, labels or shapes that cannot be trained on
                (later batches are not checked: that would wait for the device at each step); a
                method that remembers got no index.
        """
        update = self.prepare(model, x, y, index, draw)
        drop_casts_without_gradients(x.device)
        return self.take(model, update)

    def prepare(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        index: Tensor | None = None,
        draw: Draw | None = None,
    ) -> Update:
        """Attack the model and return the update to take; see ``__call__``."""
        if (
            self._inputs_checked
            and self.progress is _NOT_TOLD
            and (self.needs_progress or self.dropout)
        ):
            self.progress = Progress()  # told once is enough
            warnings.warn(
                f"{self.slug} follows the course of training, and nobody tells it: set "
                "method.progress = surestep.methods.Progress(step, steps_per_epoch, epochs, "
                "images) before each step (surestep.fit does)",
                SurestepWarning,
                stacklevel=3,
            )
        if not self._inputs_checked:
            check_inputs(model, x, y, self.threat, unlabelled=self.takes_unlabelled)
            if self.needs_index and index is None:
                raise UserError(
                    f"{self.slug} keeps a perturbation for each image: pass index, the positions "
                    "(N,) of the batch's images in the data set (surestep.fit does, for images "
                    "in memory)"
                )
            self._inputs_checked = True
        self.draw = draw
        return self.craft(model, x.detach(), y, index)

    def take(self, model: nn.Module, update: Update) -> StepResult:
        """Compute the loss of an update, with the method's dropout."""
        share = self.dropout * (1 - self.progress.done)
        with dropping(model, share):
            return update.take(model)

    @abstractmethod
    def craft(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor | None) -> Update:
        """Return the update for one batch; see ``__call__``. ``x`` is detached."""

    def set_strength(self, share: float) -> None:
        """Attack from now on with ``share`` of eps, and of the other lengths: 1 is all of it.

        The way to change the radius of a method that is made already: parts of it have taken over
        what ``threat`` was.
        """
        threat, lengths = self._full
        self.threat = threat if share == 1 else threat.with_eps(share * threat.eps)
        for name, length in lengths.items():
            setattr(self, name, share * length)

    @abstractmethod
    def cost(self, batch_size: int) -> Cost:
        """Return the passes per image of one step at this batch size."""

    @property
    def cycle(self) -> int:
        """After how many steps their costs come again, for those that time some."""
        return 1

    def peak_images(self, batch_size: int) -> int:
        """Return how many images the largest update of such batches takes: what memory holds."""
        return math.ceil(batch_size * self.cost(batch_size).weight_grad)

    def validate(self) -> None:
        """Check the hyperparameters; raise ``UserError`` through ``require``."""

    def require(self, ok: bool, name: str, expected: str) -> None:
        """Raise the error for a hyperparameter that is not ``ok``.

        Raises:
            UserError: naming parameter, value and what was expected.
        """
        if not ok:
            raise UserError(f"{self.slug}: {name} {getattr(self, name)!r} is not {expected}")

    @property
    def criterion(self) -> Criterion:
        """The cross entropy of the update, with label smoothing and margin."""
        smoothed = functools.partial(F.cross_entropy, label_smoothing=self.label_smoothing)
        return functools.partial(_with_margin, smoothed, self.margin) if self.margin else smoothed

    def plain_loss(self, y: Tensor) -> Loss:
        """Return the loss that is the cross entropy at all points, with nothing added."""

        def loss(logits: Tensor) -> Terms:
            ce = self.criterion(logits, y)
            return ce, {"ce": ce}

        return loss

    def params(self) -> dict[str, Any]:
        """Return the method's own hyperparameters by name."""
        values = {name: getattr(self, name) for name in parameter_names(type(self))}
        # A NumPy float is a float to us, but not to whatever writes it down.
        return {k: float(v) if isinstance(v, float) else v for k, v in values.items()}

    def not_negative(self, *names: str) -> None:
        """Check that hyperparameters are at least 0."""
        for name in names:
            self.require(getattr(self, name) >= 0, name, ">= 0")

    def state_dict(self) -> dict[str, Any]:
        """Return what must survive a resume: ``kept``, and ``kept_rows`` of all processes.

        Of several processes each must call this: those of a method with ``kept_rows`` gather them.
        """
        state = {}
        for name in (*self.kept, *self.kept_rows):
            value = getattr(self, name)
            if name in self.kept_rows:
                value = processes.gather(value)
            state[name.strip("_")] = value.state_dict() if hasattr(value, "state_dict") else value
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned; what it lacks stays as it is."""
        for name in (*self.kept, *self.kept_rows):
            if name.strip("_") not in state:
                continue
            value = state[name.strip("_")]
            if hasattr(getattr(self, name), "load_state_dict"):
                getattr(self, name).load_state_dict(value)
            elif isinstance(value, Tensor):
                value = processes.own(value) if name in self.kept_rows else value
                setattr(self, name, value.clone())
            else:
                setattr(self, name, copy.deepcopy(value))


PARTS = ("label_smoothing", "margin", "dropout")
"""What every method has, whatever its mathematics."""
_LEAST = {"lam": 0, "alpha": 0, "steps": 1}
"""Of hyperparameters whose names mean the same in every method: weight, length, number."""
_WORDS = {
    float: "a finite number",
    int: "a whole number",
    bool: "true or false",
    str: "a name",
    type(None): "none",
}


def kinds_of(cls: type[Method]) -> dict[str, tuple[type, ...]]:
    """Return the types that each hyperparameter may have.

    Raises:
        UserError: one is not written in YAML and on the command line as it is.
    """
    hints = get_type_hints(cls)
    found = {}
    for name in (*PARTS, *parameter_names(cls)):
        union = get_origin(hints[name]) in (Union, UnionType)
        found[name] = kinds = get_args(hints[name]) if union else (hints[name],)
        if not set(kinds) <= set(_WORDS):
            raise UserError(
                f"{name} of {cls.__name__} is a {hints[name]}: hyperparameters are float, int, "
                "bool, str or one of these and None; make another thing of a name in validate()"
            )
    return found


def _with_margin(
    criterion: Criterion, margin: float, logits: Tensor, y: Tensor, **options: Any
) -> Tensor:
    return criterion(logits - margin * one_hot(y, logits.shape[1]), y, **options)


def one_hot(y: Tensor, classes: int) -> Tensor:
    """Return which class (N, K) each label (N,) is; ``F.one_hot`` would wait for the device."""
    return y[:, None] == torch.arange(classes, device=y.device)


def relaxed_cross_entropy(logits: Tensor, y: Tensor, share: float) -> Tensor:
    """Return the cross entropy (N,) with labels of which the true class has ``share``.

    The wrong classes share the rest evenly; torch's label smoothing gives the true class, too, a
    part of the rest.
    """
    log_p = F.log_softmax(logits, dim=1)
    true = log_p.gather(1, y[:, None]).squeeze(1)
    wrong = (log_p.sum(1) - true) / (logits.shape[1] - 1)
    return -(share * true + (1 - share) * wrong)


def once(function: Callable[..., T]) -> Callable[..., T]:
    """Return a function that keeps its first result.

    For what a loss takes in from step to step: a second pass over the update, of AWP, is no second
    step.
    """
    found: list[T] = []

    def call(*args: Any) -> T:
        if not found:
            found.append(function(*args))
        return found[0]

    return call


def stepping(craft: Callable[Concatenate[nn.Module, P], Update]) -> Callable[..., StepResult]:
    """Return the functional form of a method: a function that crafts an update and takes it."""

    @functools.wraps(craft)
    def step(model: nn.Module, *args: P.args, **kwargs: P.kwargs) -> StepResult:
        return craft(model, *args, **kwargs).take(model)

    step.__name__ = craft.__name__.replace("_update", "_loss")
    step.__annotations__ = {**craft.__annotations__, "return": StepResult}
    return step


def _fits(value: Any, kinds: tuple[type, ...]) -> bool:
    """Tell whether a hyperparameter is of one of the types, and finite if it is a number."""
    if isinstance(value, float):
        return float in kinds and math.isfinite(value)
    # Exact types: True is an int to isinstance, and a weight of "true" is a mistake.
    return type(value) in kinds or (type(value) is int and float in kinds)


def parameter_names(cls: type[Method]) -> list[str]:
    """Return the names of a method's own hyperparameters: its fields but those of ``Method``."""
    shared = {f.name for f in fields(Method)}
    return [f.name for f in fields(cls) if f.name not in shared]


METHODS: dict[str, type[Method]] = {}


def register(slug: str) -> Callable[[type[Method]], type[Method]]:
    """Register a subclass of ``Method`` under its slug.

    Raises:
        UserError: the slug is another method's, a hyperparameter has no default, or the summary
            or the paper is missing.
    """

    def add(cls: type[Method]) -> type[Method]:
        for name in parameter_names(cls):
            one = cls.__dataclass_fields__[name]
            if one.default is MISSING and one.default_factory is MISSING:
                raise UserError(f"{name} of the method {slug!r} has no default: give it one")
        kinds_of(cls)
        for name in ("summary", "paper"):
            if not isinstance(getattr(cls, name, None), str):
                raise UserError(f"the method {slug!r} has no {name}: give its class one, in words")
        taken = METHODS.get(slug)
        if taken and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise UserError(
                f"the method name {slug!r} is taken by {taken.__module__}.{taken.__qualname__}: "
                f"register {cls.__qualname__} under another"
            )
        cls.slug = slug
        METHODS[slug] = cls
        return cls

    return add
