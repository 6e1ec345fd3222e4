"""The attacks of an evaluation, by name, and the budgets that bundle them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from surestep import attacks
from surestep.attacks import autoattack, nearest
from surestep.attacks.core import count_classes, in_turn
from surestep.attacks.gradient import search
from surestep.errors import UserError, look_up
from surestep.threat import ThreatModel

NAMES = (
    "fgsm, r-fgsm, i-fgsm-STEPS, mi-fgsm-STEPS, noise-SAMPLES, pgd-STEPS[xRESTARTS][-LOSS], "
    "apgd-ce, apgd-t, fab-t, square[-QUERIES], autoattack, transfer, cw-l2[-STEPS], "
    "deepfool[-STEPS]"
)
_NAME = re.compile(
    r"(?P<kind>fgsm|r-fgsm|i-fgsm|mi-fgsm|noise|pgd|square|transfer|autoattack|apgd-ce|apgd-t|fab-t"
    r"|cw-l2|deepfool)"
    r"(?:-(?P<count>[1-9]\d*))?(?:x(?P<restarts>[1-9]\d*))?(?:-(?P<loss>ce|margin|dlr))?"
)
_COUNTED = ("pgd", "i-fgsm", "mi-fgsm", "noise")
_COUNTS = {
    "square": autoattack.QUERIES,
    "cw-l2": nearest.CW_STEPS,
    "deepfool": nearest.DEEPFOOL_STEPS,
}
"""Of attacks that have a number where none is written."""
_PLAIN = ("fgsm", "r-fgsm", *_COUNTED[:3])

BUDGETS: dict[str, tuple[str, ...]] = {
    "quick": ("fgsm", "noise-20", "pgd-50", "pgd-50-margin"),
    "standard": ("fgsm", "noise-20", "pgd-100", "pgd-100-margin", "autoattack"),
    "thorough": (
        *("fgsm", "r-fgsm", "i-fgsm-100", "mi-fgsm-100", "noise-1000"),
        *("pgd-100x5", "pgd-100x5-margin", "pgd-100-dlr", "square", "autoattack"),
    ),
}
"""Attacks by budget. AutoAttack runs on the images that the others left."""


@dataclass(frozen=True)
class Found:
    """What an attack found in a batch.

    Attributes:
        x_adv: its points, shaped as the images.
        first_wrong: of an iterative attack, after how many steps each image was first
            misclassified (N,), -1 for never; else None.
    """

    x_adv: Tensor
    first_wrong: Tensor | None = None


@dataclass(frozen=True)
class Attack:
    """An attack of an evaluation.

    Attributes:
        run: maps (model, x, y) to what it found.
        passes: about how many forward passes an image costs that withstands it (a gradient
            counts as two); the order of an evaluation goes by it.
        survivors: run it only on what the other attacks left; its accuracy is then theirs together.
        looks: how many points an iterative attack tries, the start included.
    """

    run: Callable[[nn.Module, Tensor, Tensor], Found]
    passes: float = 1
    survivors: bool = False
    looks: int | None = None


def pgd_step_size(eps: float, steps: int) -> float:
    """Return the step size of PGD in an evaluation: 2.5 eps / steps, but at least eps / 30.

    At eps 0.3 this is the usual 0.01 for PGD-100, at eps 8/255 the usual 2/255 for PGD-10.
    """
    return eps * max(2.5 / steps, 1 / 30)


def parse(name: str, threat: ThreatModel, sources: Sequence[nn.Module] = ()) -> Attack:
    """Return the attack of a name.

    Args:
        name: such as "fgsm", "pgd-100", "pgd-20x2" (two restarts), "pgd-100-margin", "noise-10",
            "square-1000", "autoattack".
        threat: norm, radius and data range.
        sources: models for "transfer".

    Raises:
        UserError: the name is none of these, transfer has no source, or an attack of foolbox's
            is in another norm or foolbox not installed.
    """
    match = _NAME.fullmatch(name)
    if (
        match is None
        or (match["kind"] in _COUNTED and match["count"] is None)
        or (match["count"] is not None and match["kind"] not in (*_COUNTED, *_COUNTS))
        or (match["restarts"] is not None and match["kind"] != "pgd")
        or (match["loss"] is not None and match["kind"] not in _PLAIN)
    ):
        raise UserError(f"unknown attack {name!r}: write one of {NAMES}, LOSS ce, margin or dlr")
    kind, loss = match["kind"], match["loss"] or "ce"
    count, restarts = int(match["count"] or 0), int(match["restarts"] or 1)
    if kind in ("pgd", "i-fgsm", "mi-fgsm"):
        return _iterative(kind, threat, count, restarts, loss)
    if kind == "transfer":
        if not sources:
            raise UserError("the transfer attack needs source models: give at least one")
        return transfer(sources, threat)
    count = count or _COUNTS.get(kind, 0)
    if kind in ("cw-l2", "deepfool"):
        nearest.check(kind, threat)
    simple: Mapping[str, tuple[Callable[[nn.Module, Tensor, Tensor], Tensor], float]] = {
        "fgsm": (lambda m, x, y: attacks.fgsm(m, x, y, threat, loss), 2),
        "r-fgsm": (lambda m, x, y: attacks.r_fgsm(m, x, y, threat, loss=loss), 2),
        "noise": (lambda m, x, y: attacks.random_noise(m, x, y, threat, count), count),
        "square": (lambda m, x, y: autoattack.square(m, x, y, threat, count), count),
        "apgd-ce": (lambda m, x, y: autoattack.apgd_ce(m, x, y, threat), 200),
        "apgd-t": (lambda m, x, y: autoattack.apgd_t(m, x, y, threat), 1800),
        "fab-t": (lambda m, x, y: autoattack.fab_t(m, x, y, threat), 2700),
        "autoattack": (lambda m, x, y: autoattack.autoattack(m, x, y, threat), 9700),
        "cw-l2": (
            lambda m, x, y: nearest.cw_l2(m, x, y, threat, count),
            2 * nearest.SEARCHES * count,
        ),
        "deepfool": (
            lambda m, x, y: nearest.deepfool(m, x, y, threat, count),
            2 * nearest.CANDIDATES * count,
        ),
    }
    run, passes = simple[kind]
    return Attack(lambda m, x, y: Found(run(m, x, y)), passes, survivors=kind == "autoattack")


def _iterative(kind: str, threat: ThreatModel, steps: int, restarts: int, loss: str) -> Attack:
    eps = threat.eps
    size = pgd_step_size(eps, steps) if kind == "pgd" else eps / steps

    def run(model: nn.Module, x: Tensor, y: Tensor) -> Found:
        # Of two classes there is no dlr loss, and the margin is what it would scale.
        two = loss == "dlr" and count_classes(model, x) < 3
        best = search(
            model,
            x,
            y,
            threat,
            steps,
            size,
            restarts,
            "margin" if two else loss,
            start_radius=None if kind == "pgd" else 0.0,
            decay=1.0 if kind == "mi-fgsm" else None,
            stop_when_wrong=True,
        )
        return Found(best.x_adv, best.first_wrong)

    return Attack(run, 2 * steps * restarts, looks=(steps + 1) * restarts)


def transfer(sources: Sequence[nn.Module], threat: ThreatModel) -> Attack:
    """Return the attack that makes its points on other models: PGD and MI-FGSM on each source.

    A model with masked gradients falls to points that were made elsewhere (Athalye et al. 2018).

    Args:
        sources: models for the same data.
        threat: norm, radius and data range.
    """

    def run(model: nn.Module, x: Tensor, y: Tensor) -> Found:
        return Found(in_turn(model, x, y, makers))

    size = pgd_step_size(threat.eps, 50)
    makers = [
        make
        for s in sources
        for make in (
            partial(attacks.pgd, s, threat=threat, steps=50, step_size=size),
            partial(attacks.mi_fgsm, s, threat=threat, steps=20, loss="margin"),
        )
    ]
    return Attack(run, 140 * len(sources))


def parse_all(
    names: Iterable[str], threat: ThreatModel, sources: Sequence[nn.Module] = ()
) -> dict[str, Attack]:
    """Return several attacks by their names.

    Raises:
        UserError: one is unknown, or there is none.
    """
    found = {name: parse(name, threat, sources) for name in names}
    if not found:
        raise UserError(f"no attack given: name some of {NAMES}")
    return found


def budget(name: str) -> tuple[str, ...]:
    """Return the attacks of a budget: "quick", "standard" or "thorough".

    Raises:
        UserError: there is none of that name.
    """
    return look_up("budget", name, BUDGETS)
