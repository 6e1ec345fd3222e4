"""The subject of an audit: the model, the images, and what the attacks found on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from surestep.attacks import white_box
from surestep.attacks.gradients import NoGradient, input_gradient
from surestep.attacks.inputs import forward_logits
from surestep.attacks.losses import Objective, cross_entropy, log_odds
from surestep.attacks.outcomes import logit_distance, map_batches, misclassified, share_of
from surestep.attacks.white_box import pgd_step_size
from surestep.auditing.budgets import Budget
from surestep.clock import each_minute
from surestep.data import mixed
from surestep.devices import has_bf16
from surestep.evaluation import Adapted, doubts, evaluate
from surestep.evaluation.result import at_most
from surestep.evaluation.suite import Attack
from surestep.threat import ThreatModel


class Graphed(nn.Module):
    """Give a model that has no gradient one of zeros, so that attacks can run on it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        """Return the model's logits."""
        return forward_logits(self.model, x) + 0 * x.flatten(1).sum(1, keepdim=True)


class Searched(NamedTuple):
    """What PGD found on images.

    Attributes:
        x_adv: its points (N, ...).
        wrong: which of them (N,) are misclassified.
        first_wrong: after how many steps (N,) an image was first misclassified; -1 for never.
    """

    x_adv: Tensor
    wrong: Tensor
    first_wrong: Tensor


class PGDCourse(NamedTuple):
    """The course of a PGD run.

    Attributes:
        losses: the mean cross entropy at the start and after each step.
        ever_wrong: which images (N,) were misclassified at any of these points.
        wrong: which images (N,) are misclassified at the last point.
    """

    losses: list[float]
    ever_wrong: Tensor
    wrong: Tensor


@dataclass
class Subject:
    """A model under audit.

    Attributes:
        model: in eval mode, pixels in, logits out.
        x: images (N, ...) on the model's device.
        y: labels (N,).
        threat: norm, radius and data range.
        budget: what may be spent.
        seed: seed of everything random.
        batch_size: images per pass of the attacks.
        right: by attack, and for "clean": which images (N,) were still right after it. After an
            attack that ran only on survivors these are the survivors it left.
        ran: the attacks that ran, by name.
        broke: by attack: which of the images that it ran on it broke, (N,).
        tried: by attack: the number of images that it ran on and that are right clean.
        square_in_autoattack: number of images that only Square broke of AutoAttack's four parts.
        detached: the model's output has no gradient with respect to its input.
        precision: dtype in which attacks craft their points.
        agreement: share of the images on which the substitute agrees with the model.
        tell: called with a sentence that says what is being done.
        sources: further models for the transfer attack.
        state: path prefix of the files in which attacks save their progress.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    threat: ThreatModel
    budget: Budget
    seed: int
    batch_size: int
    tell: Callable[[str], None]
    sources: Sequence[nn.Module] = ()
    state: str | Path | None = None
    right: dict[str, Tensor] = field(init=False, default_factory=dict)
    ran: dict[str, Attack] = field(init=False, default_factory=dict)
    broke: dict[str, Tensor] = field(init=False, default_factory=dict)
    tried: dict[str, int] = field(init=False, default_factory=dict)
    square_in_autoattack: int = field(init=False, default=0)
    detached: bool = field(init=False, default=False)
    precision: torch.dtype = field(init=False, default=torch.float32)
    agreement: float | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        try:
            input_gradient(self.model, self.x[:1], self.y[:1])
        except NoGradient:
            self.detached = True
            self.model = Graphed(self.model)
        if self.budget.fast and has_bf16(self.x.device) and self._agrees_in_bf16():
            self.precision = torch.bfloat16

    def _agrees_in_bf16(self) -> bool:
        """Tell whether the model answers alike in bfloat16, on every image that is looked at."""
        some = self.x[:64]
        full = self.logits(some)
        half = doubts.logits(self.model, some, len(some), precision=torch.bfloat16)
        close = logit_distance(full, half) < doubts.ROUNDED_IN_HALF
        return close and full.argmax(1).equal(half.argmax(1))

    def own_name(self, name: str) -> str:
        """Return what a module is called in the user's model, without the audit's wrappers."""
        model, wrapped = self.model, 0
        while isinstance(model, Graphed | Adapted):
            model, wrapped = model.model, wrapped + 1
        return name.removeprefix("model." * wrapped)

    @property
    def survivors(self) -> Tensor:
        """Which images (N,) no attack has broken so far."""
        return torch.stack(list(self.right.values())).all(0)

    def accuracy(self, name: str) -> float:
        """Return the share of images that an attack left right."""
        return share_of(self.right[name])

    @property
    def white_box(self) -> Tensor:
        """Which of the images that are right clean (N,) no gradient attack broke.

        Attacks on stand-ins, such as BPDA, are gradient attacks; AutoAttack does not count.
        """
        return self.right["clean"] & ~self._broken_by(gradients=True)

    @property
    def only_without_gradients(self) -> Tensor:
        """Which images (N,) only gradient-free attacks broke: Square, transfer, random points."""
        return self.white_box & self._broken_by(gradients=False)

    @property
    def left_by_the_strongest(self) -> float:
        """Accuracy that no attack by itself surely (95%) gets below."""
        rates = [
            at_most(tried - int(self.broke[name].sum()), tried)
            for name, tried in self.tried.items()
            if tried
        ]
        return self.accuracy("clean") * min(rates, default=1.0)

    def _broken_by(self, *, gradients: bool) -> Tensor:
        """Return which images (N,) attacks with gradients, or those without, broke.

        AutoAttack has parts of both kinds and counts as neither.
        """
        broken = torch.zeros(len(self.x), dtype=torch.bool)
        for name, attack in self.ran.items():
            if attack.by_gradient is gradients:
                broken |= self.broke[name]
        return broken

    def attack(self, attacks: Mapping[str, Attack], on: Tensor | None = None) -> None:
        """Run attacks on the images ``on`` (N,), by default all, and record what they left.

        Of attacks that are given as names, ``evaluate`` would add BPDA variants; escalation.py runs
        its own.
        """
        rows = torch.arange(len(self.x)) if on is None else on.nonzero().squeeze(1)
        self.ran |= attacks
        for name in attacks:
            self.right[name] = torch.zeros(len(self.x), dtype=torch.bool)
            self.broke[name] = torch.zeros(len(self.x), dtype=torch.bool)
        self.tell(f"{', '.join(attacks)} on {len(rows):,} images")
        at = rows.to(self.x.device)
        found = evaluate(
            self.model,
            (self.x[at], self.y[at]),
            self.threat,
            attacks,
            batch_size=self.batch_size,
            seed=self.seed,
            precision=self.precision,
            state=None if self.state is None else f"{self.state}.{next(iter(attacks))}",
            tell=each_minute(self.tell),
            sources=self.sources,
            doubt=False,
        )
        if on is None:
            self.right["clean"] = found.right["clean"]
        for name in attacks:
            self.right[name][rows] = found.right[name]
            self.broke[name][rows] = found.right["clean"] & ~found.right[name]
            self.tried[name] = int(found.right["clean"].sum())
        if "autoattack" in attacks:
            (row,) = found.attacks  # it runs alone
            *_, before, after = row["by_part"].values()  # Square is the last part
            self.square_in_autoattack = round((before - after) * len(rows))

    @property
    def probe(self) -> tuple[Tensor, Tensor]:
        """Some images that are right clean, and their labels; any if none is right.

        A fixed draw in random order: the data may be sorted by class, and checks look at parts.
        """
        rows = self.right["clean"].nonzero().squeeze(1)
        rows = rows if len(rows) else torch.arange(len(self.x))
        at = rows[mixed(len(rows))[: self.budget.probe]].to(self.x.device)
        return self.x[at], self.y[at]

    @cached_property
    def random(self) -> bool:
        """Whether two passes of the model differ by more than rounding."""
        return white_box.varies(self.model, self.probe[0][: min(64, self.batch_size)])

    @cached_property
    def pgd_course(self) -> PGDCourse:
        """The course of 50 steps of PGD from a random start, on the probe."""
        losses, wrong = self.map(self._watch_pgd, *self.probe).unbind(2)
        return PGDCourse(losses.mean(0).tolist(), wrong.bool().any(1), wrong[:, -1].bool())

    def _watch_pgd(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss, and 1 for wrong, at the start and after each step, (N, 51, 2)."""
        size, inside = pgd_step_size(self.threat.eps, 50), self.threat.around(x)
        point, seen = self.threat.random_start(x), []
        for _ in range(51):
            grad, logits = input_gradient(self.model, point, y)
            loss = cross_entropy(logits, y)
            seen.append(torch.stack([loss, misclassified(logits, y).to(loss.dtype)], 1))
            point = inside(point + self.threat.steepest_step(grad.nan_to_num(0.0), size))
        return torch.stack(seen, 1)

    def map(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """Apply a function to batches of tensors and concatenate what it returns."""
        return map_batches(self.batch_size, function, *tensors)

    def search(
        self, x: Tensor, y: Tensor, steps: int, size: float, *, stop_when_wrong: bool = False
    ) -> Searched:
        """Run PGD on images, a batch at a time; see ``surestep.attacks.white_box.search``."""
        ascent = white_box.pgd_ascent(self.threat, steps, step_size=size)
        parts = [
            white_box.search(self.model, a, b, ascent, stop_when_wrong=stop_when_wrong)
            for a, b in zip(x.split(self.batch_size), y.split(self.batch_size), strict=True)
        ]
        names = ("x_adv", "wrong", "first_wrong")
        return Searched(*(torch.cat([getattr(part, name) for part in parts]) for name in names))

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits (N, K) of images."""
        return doubts.logits(self.model, x, self.batch_size)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the cross entropy (N,) of images."""
        return cross_entropy(self.logits(x), y)

    def gradient(self, x: Tensor, y: Tensor, objective: Objective = log_odds) -> Tensor:
        """Return the gradient of an objective with respect to the images, in their shape."""
        return self.map(lambda a, b: input_gradient(self.model, a, b, objective)[0], x, y)

    def fgsm_step(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the FGSM step, before projection."""
        return self.threat.steepest_step(self.gradient(x, y).nan_to_num(0), self.threat.eps)

    def fgsm(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the FGSM point."""
        return self.threat.project(x + self.fgsm_step(x, y), x)
