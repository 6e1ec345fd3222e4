"""The attacks of an evaluation, by name, and the budgets that bundle them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from surestep import attacks
from surestep.activations import straight_through
from surestep.attacks import auto, nearest
from surestep.attacks.ascent import Ascent
from surestep.attacks.inputs import count_classes
from surestep.attacks.outcomes import in_turn
from surestep.attacks.white_box import i_fgsm_ascent, mi_fgsm_ascent, pgd_ascent, search
from surestep.errors import UserError, look_up
from surestep.evaluation.adapt import Adapted
from surestep.threat import ThreatModel

BUDGETS: dict[str, tuple[str, ...]] = {
    "quick": ("fgsm", "noise-20", "pgd-50", "pgd-50-margin"),
    "standard": ("fgsm", "noise-20", "pgd-100", "pgd-100-margin", "autoattack"),
    "thorough": (
        *("fgsm", "r-fgsm", "i-fgsm-100", "mi-fgsm-100", "noise-1000"),
        *("pgd-100x5", "pgd-100x5-margin", "pgd-100-dlr", "square", "autoattack"),
    ),
}
"""Attacks by budget. AutoAttack runs on the images that the other attacks left."""


@dataclass(frozen=True)
class AttackResult:
    """What an attack found in a batch.

    Attributes:
        x_adv: its points, shaped as the images.
        first_wrong: for an iterative attack, the number of steps after which each image was first
            misclassified (N,), -1 for never; else None.
    """

    x_adv: Tensor
    first_wrong: Tensor | None = None


AttackFn = Callable[[nn.Module, Tensor, Tensor], AttackResult | Tensor]


@dataclass(frozen=True)
class Attack:
    """An attack of an evaluation.

    Attributes:
        run: maps (model, x, y) to what it found, or to the points alone. An attack of several
            parts has these by name; each part runs on what the earlier ones left.
        passes: approximate number of forward passes for an image that withstands the attack (a
            gradient counts as two); an evaluation runs attacks in this order.
        survivors_only: run it only on what the other attacks left; its accuracy then includes
            theirs.
        points_tried: number of points that an iterative attack tries, including its start.
        uses_gradient: whether it uses the model's gradient; set it for an attack of your own. If
            so, an evaluation looks for gradients that are lost (``doubts``), and an audit takes
            what it breaks for something that gradients see.
        gradient_steps: number of steps along the model's gradient, 0 if it uses none; None if it
            searches in another way, or if this is unknown.
        bpda: whether gradients go straight through the layers that provide this.
    """

    run: AttackFn | Mapping[str, AttackFn]
    passes: float = 1
    survivors_only: bool = False
    points_tried: int | None = None
    uses_gradient: bool = False
    gradient_steps: int | None = None
    bpda: bool = False

    @property
    def last_step(self) -> int:
        """The number of steps before the last of its points."""
        return (self.points_tried or 1) - 1

    @property
    def by_gradient(self) -> bool | None:
        """Whether what it breaks is something that gradients see; None if only its parts tell."""
        return None if isinstance(self.run, Mapping) else self.uses_gradient


def as_attacks(given: Mapping[str, Any]) -> dict[str, Attack]:
    """Return attacks by name, with plain functions of (model, x, y) wrapped.

    Raises:
        UserError: there is none, or one is neither an ``Attack`` nor a function.
    """
    _check_any(given)
    for name, one in given.items():
        if isinstance(one, type) or not (isinstance(one, Attack) or callable(one)):
            raise UserError(
                f"the attack {name!r} is {one!r}, expected a function of (model, x, y) that "
                "returns x_adv, or an Attack: surestep's own are "
                "surestep.evaluation.suite.parse(NAME, threat)"
            )
    return {n: one if isinstance(one, Attack) else Attack(one) for n, one in given.items()}


def _check_any(attacks: Sized) -> None:
    if not attacks:
        raise UserError(f"no attack given: name some of {NAMES}")


def check_names(names: Sequence[Any]) -> None:
    """Refuse a list of attacks that holds other things than names.

    Raises:
        UserError: an entry is not a string.
    """
    for one in names:
        if not isinstance(one, str):
            called = getattr(one, "__name__", "mine")
            raise UserError(
                f"attacks holds {one!r}, expected names such as 'pgd-100': give an attack of your "
                f"own by name, attacks={{{called!r}: ...}}"
            )


@dataclass(frozen=True)
class Spec:
    """The parts of an attack's name, and what the attack is made for.

    Attributes:
        kind: the first part of the name.
        count: the number after it, of steps, samples or queries; 0 if there is none.
        restarts: the number after an x, 1 if there is none.
        loss: the last part, "ce" if there is none.
        threat: norm, radius and data range.
        sources: models for "transfer".
    """

    kind: str
    count: int
    restarts: int
    loss: str
    threat: ThreatModel
    sources: Sequence[nn.Module]


def parse(name: str, threat: ThreatModel, sources: Sequence[nn.Module] = ()) -> Attack:
    """Return the attack with a name.

    Args:
        name: such as "fgsm", "pgd-100", "pgd-20x2" (two restarts), "pgd-100-margin", "noise-10",
            "square-1000", "autoattack". If it uses the gradient, "-bpda" at the end sends the
            gradient straight through the layers that provide this, see ``with_bpda``.
        threat: norm, radius and data range.
        sources: models for "transfer".

    Raises:
        UserError: the name is unknown, "transfer" has no source, or an attack from foolbox does
            not have the threat model's norm or foolbox is not installed.
    """
    match = _NAME.fullmatch(name)
    if match is None or not (kind := KINDS[match["kind"]]).takes(match):
        meant = _OTHER_NAMES.get(name.lower())
        hint = f"did you mean {meant}? " if meant else ""
        raise UserError(
            f"unknown attack {name!r}: {hint}write one of {NAMES}, LOSS ce, margin or dlr"
        )
    count, restarts = int(match["count"] or kind.usual or 0), int(match["restarts"] or 1)
    made = kind.make(Spec(match["kind"], count, restarts, match["loss"] or "ce", threat, sources))
    steps = made.gradient_steps if kind.uses_gradient else 0
    made = replace(made, uses_gradient=kind.uses_gradient, gradient_steps=steps)
    return _bpda(made) if match["bpda"] else made


def with_bpda(names: Iterable[str]) -> list[str]:
    """Return the attacks and, after each that uses the gradient, the same with "-bpda".

    Layers such as MeanSparse's pass no gradient in places, which misleads the first but not the
    second (backward pass differentiable approximation, Athalye et al. 2018).
    """
    every: list[str] = []
    for name in names:
        match = _NAME.fullmatch(name)
        extend = match and not match["bpda"] and KINDS[match["kind"]].uses_gradient
        every += [name, f"{name}-bpda"] if extend else [name]
    return list(dict.fromkeys(every))


def _bpda(attack: Attack) -> Attack:
    """Return the attack with gradients that go straight through the layers that provide them."""
    if isinstance(attack.run, Mapping):
        parts = {name: partial(_straight, run) for name, run in attack.run.items()}
        return replace(attack, run=parts, bpda=True)
    return replace(attack, run=partial(_straight, attack.run), bpda=True)


def _straight(run: AttackFn, model: nn.Module, x: Tensor, y: Tensor) -> AttackResult | Tensor:
    with straight_through(model):
        return run(model, x, y)


def _plain(
    attack: Callable[..., Tensor],
    threat: ThreatModel,
    passes: float,
    gradient_steps: int | None = None,
    **options: Any,
) -> Attack:
    """Return an attack that is one function of (model, x, y, threat) and options."""
    run = partial(attack, threat=threat, **options)
    return Attack(run, passes, gradient_steps=gradient_steps)


def _iterative(spec: Spec, ascent_of: Callable[[ThreatModel, int, str], Ascent]) -> Attack:
    """Return the attack whose ascent ``ascent_of`` makes of a threat, steps and a loss."""
    steps = spec.count

    def run(model: nn.Module, x: Tensor, y: Tensor) -> AttackResult:
        # The dlr loss, which scales the margin, needs three classes.
        too_few_classes = spec.loss == "dlr" and count_classes(model, x) < 3
        ascent = ascent_of(spec.threat, steps, "margin" if too_few_classes else spec.loss)
        best = search(model, x, y, ascent, spec.restarts, stop_when_wrong=True)
        return AttackResult(best.x_adv, best.first_wrong)

    passes, points = 2 * steps * spec.restarts, (steps + 1) * spec.restarts
    return Attack(run, passes, points_tried=points, gradient_steps=steps)


def _autoattack(spec: Spec) -> Attack:
    parts = {name: partial(part, threat=spec.threat) for name, part in auto.PARTS.items()}
    # Of apgd-ce 200, of apgd-t 1800, of fab-t 2700, of square 5000.
    return Attack(parts, 9700, survivors_only=True)


def _transfer(spec: Spec) -> Attack:
    if not spec.sources:
        raise UserError("the transfer attack needs source models: give at least one")
    return transfer(spec.sources, spec.threat)


def _nearest(spec: Spec, attack: Callable[..., Tensor], gradients: int) -> Attack:
    """Return an attack from foolbox.

    Args:
        spec: the parts of its name.
        attack: the attack.
        gradients: number of gradients per step.
    """
    nearest.check(spec.kind, spec.threat)
    return _plain(attack, spec.threat, 2 * gradients * spec.count, steps=spec.count)


def transfer(sources: Sequence[nn.Module], threat: ThreatModel) -> Attack:
    """Return the attack that makes its points on other models: PGD and MI-FGSM on each source.

    Points made elsewhere break a model with masked gradients (Athalye et al. 2018).

    Args:
        sources: models for the same pixels.
        threat: norm, radius and data range.
    """
    makers = [
        make
        for s in map(Adapted, sources)
        for make in (
            partial(attacks.pgd, s, threat=threat, steps=50),
            partial(attacks.mi_fgsm, s, threat=threat, steps=20, loss="margin"),
        )
    ]
    return Attack(partial(in_turn, attacks=makers), 140 * len(sources))


def parse_all(
    names: Iterable[str], threat: ThreatModel, sources: Sequence[nn.Module] = ()
) -> dict[str, Attack]:
    """Return several attacks by their names.

    Raises:
        UserError: there is no name, or one cannot be made, see ``parse``.
    """
    found = {name: parse(name, threat, sources) for name in names}
    _check_any(found)
    return found


def budget(name: str) -> tuple[str, ...]:
    """Return the attacks of a budget: "quick", "standard" or "thorough".

    Raises:
        UserError: there is none of that name.
    """
    return look_up("budget", name, BUDGETS)


@dataclass(frozen=True)
class Kind:
    """How the attacks of a kind are named and made.

    Attributes:
        make: makes the attack from the parts of its name.
        counts: what the number after the kind counts; empty if it takes no number.
        usual: the default of that number; None if it must be given.
        restarts: whether the name may have xRESTARTS.
        loss: whether the name may have -LOSS.
        uses_gradient: whether they use the model's gradient.
    """

    make: Callable[[Spec], Attack]
    counts: str = ""
    usual: int | None = None
    restarts: bool = False
    loss: bool = False
    uses_gradient: bool = True

    def takes(self, name: re.Match[str]) -> bool:
        """Tell whether attacks of this kind may have these parts in their name."""
        if self.counts and self.usual is None and not name["count"]:
            return False
        allowed = {
            "count": self.counts,
            "restarts": self.restarts,
            "loss": self.loss,
            "bpda": self.uses_gradient,
        }
        return all(may or not name[part] for part, may in allowed.items())

    def written(self, name: str) -> str:
        """Return the pattern of its names, for people."""
        number = f"-{self.counts}" if self.counts else ""
        number = f"[{number}]" if self.usual else number
        return name + number + "[xRESTARTS]" * self.restarts + "[-LOSS]" * self.loss


KINDS: dict[str, Kind] = {
    "fgsm": Kind(
        lambda s: _plain(attacks.fgsm, s.threat, 2, gradient_steps=1, loss=s.loss), loss=True
    ),
    "r-fgsm": Kind(
        lambda s: _plain(attacks.r_fgsm, s.threat, 2, gradient_steps=1, loss=s.loss), loss=True
    ),
    "i-fgsm": Kind(lambda s: _iterative(s, i_fgsm_ascent), "STEPS", loss=True),
    "mi-fgsm": Kind(lambda s: _iterative(s, mi_fgsm_ascent), "STEPS", loss=True),
    "noise": Kind(
        lambda s: _plain(attacks.random_noise, s.threat, s.count, samples=s.count),
        "SAMPLES",
        uses_gradient=False,
    ),
    "pgd": Kind(lambda s: _iterative(s, pgd_ascent), "STEPS", restarts=True, loss=True),
    "apgd-ce": Kind(lambda s: _plain(auto.apgd_ce, s.threat, 200, gradient_steps=100)),
    "apgd-t": Kind(lambda s: _plain(auto.apgd_t, s.threat, 1800, gradient_steps=100)),
    "fab-t": Kind(lambda s: _plain(auto.fab_t, s.threat, 2700)),
    "square": Kind(
        lambda s: _plain(auto.square, s.threat, s.count, queries=s.count),
        "QUERIES",
        auto.QUERIES,
        uses_gradient=False,
    ),
    "autoattack": Kind(_autoattack),
    "transfer": Kind(_transfer, uses_gradient=False),
    "cw-l2": Kind(
        lambda s: _nearest(s, nearest.cw_l2, nearest.SEARCHES), "STEPS", nearest.CW_STEPS
    ),
    "deepfool": Kind(
        lambda s: _nearest(s, nearest.deepfool, nearest.CANDIDATES),
        "STEPS",
        nearest.DEEPFOOL_STEPS,
    ),
}
"""Every attack that has a name. A new one is a function in ``attacks/`` and a line here."""
_OTHER_NAMES = {
    "aa": "autoattack",
    "apgd": "apgd-ce",
    "apgd-dlr": "apgd-t",
    "bim": "i-fgsm-10",
    "cw": "pgd-50-margin (or cw-l2)",
    "fab": "fab-t",
    "pgd": "pgd-50",
}
"""Names of attacks in the literature, and how they are written here."""
NAMES = ", ".join(kind.written(name) for name, kind in KINDS.items())
_NAME = re.compile(
    rf"(?P<kind>{'|'.join(KINDS)})"
    r"(?:-(?P<count>[1-9]\d*))?(?:x(?P<restarts>[1-9]\d*))?(?:-(?P<loss>ce|margin|dlr))?"
    r"(?P<bpda>-bpda)?"
)
