"""What an audit answers a flag with: attacks made for the way this model may hide.

Each answer is a generator of attacks: what it sets up, such as hooks on the model, holds while its
attacks run, one after the other, on the images that nothing has broken so far.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Any, NamedTuple

from surestep.activations import with_a_way_through
from surestep.attacks.core import share_of
from surestep.auditing import escalation
from surestep.auditing._subject import Subject
from surestep.auditing.checks import Check
from surestep.evaluation.suite import Attack

BLINDING = {
    "broken-gradients",
    "random-beats-gradient",
    "one-step-beats-many",
    "black-box-beats-white-box",
    "optimisation-in-forward",
}
"""Checks that flag where a layer keeps gradients from the image."""


class Planned(NamedTuple):
    """An attack that is to be run: its name, why, and itself if the name does not say it."""

    name: str
    why: str
    attack: Attack | None = None


class Signs(NamedTuple):
    """What the checks saw.

    Attributes:
        flagged: names of the checks that flagged.
        blind: share of images on which even a safe loss has no gradient.
    """

    flagged: set[str]
    blind: float


Planning = Generator[Planned, None, None]
Answer = Callable[[Subject, Signs], Planning]


def escalate(s: Subject, checks: Sequence[Check], blind: float) -> list[dict[str, Any]]:
    """Run what the flags call for, and say of each attack why it was run and what it left."""
    signs = Signs({check.name for check in checks if check.flagged}, blind)
    steps: list[dict[str, Any]] = []
    for answer in ANSWERS:
        # Closed at once where an attack fails: hooks must not outlive the audit.
        with closing(answer(s, signs)) as planned:
            for name, why, attack in planned:
                left = s.survivors
                if not left.any():
                    return steps
                s.attack([name] if attack is None else {name: attack}, left)
                steps.append({"name": name, "why": why, "accuracy": share_of(s.survivors)})
    return steps


def _own_way(s: Subject, signs: Signs) -> Planning:
    """Go straight through layers that know a way through themselves."""
    layers, steps = with_a_way_through(s.model), 2 * s.budget.steps
    if not layers:
        return
    why = f"{len(layers)} layers pass no gradient in places: straight through them"
    for name in (f"pgd-{steps}-margin-bpda", f"pgd-{steps}-bpda"):
        yield Planned(name, why)


def _undo_softmax(s: Subject, signs: Signs) -> Planning:
    """Attack the logarithm of what a model returns as probabilities."""
    if "logits-not-probabilities" in signs.flagged:
        inverse = escalation.LogProbabilities(s.model)
        yield Planned(
            "log-probabilities",
            "the model returns probabilities: attack their logarithm",
            escalation.on_stand_in(inverse, s.threat, s.budget.steps),
        )


def _expect(s: Subject, signs: Signs) -> Planning:
    """Attack a random model's mean over passes."""
    if "deterministic-forward" in signs.flagged:
        expected = escalation.Expected(s.model)
        yield Planned(
            f"eot-{escalation.EOT_SAMPLES}",
            "the model is random: attack its mean over passes",
            escalation.on_stand_in(expected, s.threat, s.budget.steps),
        )


def _bpda(s: Subject, signs: Signs) -> Planning:
    """Go straight through layers that no gradient flows through."""
    if signs.blind == 0 and not signs.flagged & BLINDING:
        return
    some = s.probe[0][: min(64, s.batch_size)]
    layers = escalation.flat_layers(s.model, some[:32])
    if not layers:
        return
    wrapping = {id(m): name for name, m in s.model.named_modules()}[id(s.inner)] + "."
    names = ", ".join(name.removeprefix(wrapping) for name in layers)
    with escalation.bpda(s.model, some, layers) as smooth:
        yield Planned(
            "bpda",
            f"no gradient flows through {names}: straight through it",
            escalation.on_stand_in(smooth, s.threat, s.budget.steps, s.budget.restarts),
        )


def _longer(s: Subject, signs: Signs) -> Planning:
    """Search longer, with gradients and without, whatever it is that flagged."""
    if signs.flagged:
        why = f"flagged: {', '.join(sorted(signs.flagged))}"
        restarts = f"x{s.budget.restarts}" if s.budget.restarts > 1 else ""
        yield Planned(f"pgd-{2 * s.budget.steps}{restarts}-margin", why)
        yield Planned(f"square-{s.budget.late_queries}", why)


def _autoattack(s: Subject, signs: Signs) -> Planning:
    """End with AutoAttack, where the budget has it."""
    if s.budget.autoattack:
        yield Planned("autoattack", "part of this budget")


ANSWERS: tuple[Answer, ...] = (_own_way, _undo_softmax, _expect, _bpda, _longer, _autoattack)
"""In the order in which they are tried: those made for one way of hiding first."""
