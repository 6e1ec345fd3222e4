"""The base class of training methods, and what a step costs.

Given a model and a batch, a method decides which images go through the single update pass and what
is minimised there. It contains no training loop and does no I/O. To add one, add a file with a
registered subclass of ``Method`` and a card of the same slug in ``cards/``.
"""

from __future__ import annotations

import copy
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from surestep import processes
from surestep.attacks.inputs import check_inputs, forward_logits
from surestep.errors import SurestepWarning, UserError
from surestep.methods._dropout import activation_dropout
from surestep.methods._hyperparameters import (
    kinds_of,
    length_names,
    param,
    parameter_names,
    what_is_expected,
)
from surestep.methods._losses import one_hot
from surestep.methods._memory import Draw, Positions
from surestep.methods._presets import Preset
from surestep.threat import ThreatModel, check_threat

Criterion = Callable[..., Tensor]
"""Called as ``criterion(logits, y, reduction="mean" | "none")``, as ``F.cross_entropy`` is."""


class StepResult(NamedTuple):
    """What a method returns for one batch.

    Attributes:
        loss: scalar, to be minimised; the only field with an autograd graph.
        terms: the parts of the loss by name, detached scalars, for logging. Those that the
            log gives columns of its own (``loss``, ``lr``, ``val_...``) are refused by ``fit``.
        x_adv: the images that ``logits`` belong to (N, ...), detached.
        logits: at ``x_adv`` in the update's forward pass, (N, K), detached.
    """

    loss: Tensor
    terms: Mapping[str, Tensor]
    x_adv: Tensor
    logits: Tensor


LossAndTerms = tuple[Tensor, Mapping[str, Tensor]]
"""The loss to minimise, and its parts by name."""
Loss = Callable[[Tensor], LossAndTerms]
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

    @property
    def epoch(self) -> int:
        """The epoch that the step belongs to, from 0."""
        return self.step // self.steps_per_epoch

    @property
    def done(self) -> float:
        """Share of the training that is completed, in [0, 1]."""
        return min(1.0, self.step / (self.steps_per_epoch * self.epochs))


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


@dataclass
class Method(ABC):
    """One step of a training method, called as ``method(model, x, y)``.

    Subclasses are dataclasses whose fields are the hyperparameters: ``param`` gives a field bounds,
    and one made by ``of_eps`` is a length, which scales with eps.

    Args:
        threat: norm, radius and data range of the perturbations trained against.
        label_smoothing: label smoothing of the update's cross entropy (never of the attack's).
        margin: subtracted from the true class's logit in the update's cross entropy (never in the
            attack); s * m for a hypersphere head with scale s and margin m.
        dropout: probability of dropout after each activation in the update, at the start of
            training; it falls linearly to 0 (SADS, Vivek & Babu 2020, arXiv 2004.08628).

    Attributes:
        progress: how far training is; to be set before each step if it ``needs_progress``.
        sources: other models to attack, to be set before training if it ``takes_sources``.

    Raises:
        UserError: a hyperparameter is outside its range.
    """

    slug: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]
    presets: ClassVar[Mapping[str, Preset]] = {}
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
    label_smoothing: float = param(0.0, ge=0, lt=1, kw_only=True)
    margin: float = param(0.0, ge=0, kw_only=True)
    dropout: float = param(0.0, ge=0, lt=1, kw_only=True)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.slug = cls.__name__  # until it is registered; never the parent's

    def __post_init__(self) -> None:
        check_threat(self.threat)
        self.progress = Progress()
        self.sources: Sequence[nn.Module] = ()
        self._positions: Positions | None = None
        self._inputs_checked = self._warned = False
        self.strength = 1.0
        self._full: tuple[ThreatModel, dict[str, float]] | None = None
        kinds = kinds_of(type(self))
        for one in fields(self):
            if getattr(self, one.name) is None and "of_threat" in one.metadata:
                setattr(self, one.name, one.metadata["of_threat"](self.threat))
            if one.name in kinds:
                expected = what_is_expected(getattr(self, one.name), kinds[one.name], one)
                self.require(not expected, one.name, expected)
        self.set_up()

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
        first = not self._inputs_checked
        if first:
            check_inputs(model, x, y, self.threat, unlabelled=self.takes_unlabelled)
        if self.needs_index and index is None:
            raise UserError(
                f"{self.slug} needs each image's position in the data set: pass index, the "
                "positions (N,) of the batch's images (surestep.fit does, for images in memory)"
            )
        self._inputs_checked = True
        follows = self.needs_progress or self.dropout > 0
        # A single call needs no schedule.
        if follows and not first and not self._warned and self.progress == Progress():
            self._warned = True
            warnings.warn(
                f"{self.slug} follows a schedule, but its progress is not set: set "
                "method.progress = surestep.methods.Progress(step, steps_per_epoch, epochs, "
                "images) before each step (surestep.fit does)",
                SurestepWarning,
                stacklevel=3,
            )
        self._positions = None if index is None else Positions(index, self.progress.images, draw)
        return self.craft(model, x.detach(), y)

    @property
    def positions(self) -> Positions:
        """Which images of the data set the batch holds; for methods that need the ``index``."""
        assert self._positions is not None
        return self._positions

    def take(self, model: nn.Module, update: Update) -> StepResult:
        """Compute the loss of an update, with the method's dropout."""
        share = self.dropout * (1 - self.progress.done)
        with activation_dropout(model, share):
            return update.take(model)

    @abstractmethod
    def craft(self, model: nn.Module, x: Tensor, y: Tensor) -> Update:
        """Attack the model; return the images of the update pass, and the loss there.

        State may change here, but not in the loss, which AWP calls twice: wrap what changes there
        in ``once``. A step never waits for the device, so read no values (``.item()``, boolean
        indexing).

        Args:
            model: in the update's mode, perhaps wrapped in DistributedDataParallel. Differentiate
                it through ``attack_gradient``, or lend it with ``attacking``.
            x: images (N, ...), detached, in the data range.
            y: int64 labels (N,).
        """

    def set_strength(self, share: float) -> None:
        """Scale eps and the lengths (fields made by ``of_eps``) to ``share`` of their full values.

        Use this to change the radius of an existing method. Assigning ``threat`` does not: parts
        of the method hold copies of it. A later call replaces an earlier one.
        """
        self.strength = share
        if self._full is None:
            self._full = self.threat, {k: getattr(self, k) for k in length_names(type(self))}
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

    def set_up(self) -> None:
        """Make what a run begins with: state, and wrapped methods.

        Hyperparameters have been checked against the bounds of their fields; check here, through
        ``require``, what depends on several of them or on the radius.
        """

    def require(self, ok: bool, name: str, expected: str) -> None:
        """Raise an error for the hyperparameter ``name`` unless ``ok``.

        Raises:
            UserError: names the hyperparameter, its value and what was expected.
        """
        if not ok:
            raise UserError(f"{self.slug}: {name} {getattr(self, name)!r} is not {expected}")

    def criterion(self, logits: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        """Return the cross entropy of the update, with label smoothing and margin."""
        if self.margin:
            logits = logits - self.margin * one_hot(y, logits.shape[1])
        smoothing = self.label_smoothing
        return F.cross_entropy(logits, y, label_smoothing=smoothing, reduction=reduction)

    def plain_loss(self, y: Tensor) -> Loss:
        """Return a loss that is just the cross entropy at all points."""

        def loss(logits: Tensor) -> LossAndTerms:
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
