"""Escalation: the answers to what checks and layers showed, most to one way of hiding gradients.

Each answer is a generator of attacks. What it sets up, such as hooks on the model, stays in place
while its attacks run one after another on the images that nothing has broken so far.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from typing import Any, NamedTuple

from surestep.activations import straight_through_layers
from surestep.attacks.outcomes import share_of
from surestep.auditing import stand_ins
from surestep.auditing._check import Check
from surestep.auditing._subject import Subject
from surestep.auditing.budgets import Budget
from surestep.auditing.checks import logits_not_probabilities
from surestep.evaluation import suite
from surestep.evaluation.suite import Attack


class Planned(NamedTuple):
    """An attack to run: its name, the reason, and the attack if the name does not define it."""

    name: str
    why: str
    attack: Attack | None = None


Planning = Generator[Planned, None, None]
Answer = Callable[[Subject, set[str]], Planning]
"""Called with the names of the checks that flagged. What it costs stands in ``most_forwards``."""
GRADIENT = 3
"""What a gradient costs, in forward passes, at most: ``Attack.passes`` counts it as two."""


def escalate(s: Subject, checks: Iterable[Check]) -> list[dict[str, Any]]:
    """Run what each of the ``ANSWERS`` plans; return why each attack was run and what it left."""
    flagged = {check.name for check in checks if check.flagged}
    steps: list[dict[str, Any]] = []
    for answer in ANSWERS:
        # Close at once if an attack fails: hooks must not outlive the audit.
        with closing(answer(s, flagged)) as planned:
            for name, why, attack in planned:
                left = s.survivors
                if not left.any() and not s.random:
                    return steps
                # Gradient attacks also try the images that only gradient-free ones broke: breaking
                # those, too, shows that this attack has gradients that tell something. On a random
                # model they try all, so that each tells by itself how much it breaks.
                further = s.right["clean"] if s.random else s.only_without_gradients
                attack = attack or suite.parse(name, s.threat, s.sources)
                on = left | further if attack.by_gradient else left
                if not on.any():
                    continue
                s.attack({name: attack}, on)
                s.right[name] &= left
                steps.append({"name": name, "why": why, "accuracy": share_of(s.survivors)})
    return steps


def _straight_through(s: Subject, flagged: set[str]) -> Planning:
    """Attack with straight-through gradients, if layers provide them."""
    layers, steps = straight_through_layers(s.model), 2 * s.budget.steps
    if not layers:
        return
    why = f"{len(layers)} layers pass no gradient in places: straight through them"
    for name in (f"pgd-{steps}-margin-bpda", f"pgd-{steps}-bpda"):
        yield Planned(name, why)


def _undo_softmax(s: Subject, flagged: set[str]) -> Planning:
    """Attack the logarithm of what a model returns as probabilities."""
    if logits_not_probabilities.name in flagged:
        inverse = stand_ins.LogProbabilities(s.model)
        yield Planned(
            "log-probabilities",
            "the model returns probabilities: attack their logarithm",
            stand_ins.on_stand_in(inverse, s.threat, s.budget.steps),
        )


def _expect(s: Subject, flagged: set[str]) -> Planning:
    """Attack a random model's mean over passes."""
    if s.random:
        expected = stand_ins.Expected(s.model)
        yield Planned(
            f"eot-{stand_ins.EOT_SAMPLES}",
            "passes of the model differ: attack its mean over them",
            stand_ins.on_stand_in(expected, s.threat, s.budget.steps),
        )


def _bpda(s: Subject, flagged: set[str]) -> Planning:
    """Go straight through layers that no gradient, or a wrong one, flows through.

    Whatever the checks say: one such layer in one of several branches leaves the whole a gradient.
    """
    some = s.probe[0][: min(64, s.batch_size)]
    # Few, since the inputs of all layers are held at once: of a large network a gigabyte.
    layers = stand_ins.blocking_layers(s.model, some[:8])
    if not layers:
        return
    names = ", ".join(map(s.own_name, layers))
    with stand_ins.bpda(s.model, some, layers) as smooth:
        yield Planned(
            "bpda",
            f"no gradient, or a wrong one, flows through {names}: straight through it",
            stand_ins.on_stand_in(smooth, s.threat, s.budget.steps, s.budget.restarts),
        )


def _switch(s: Subject, flagged: set[str]) -> Planning:
    """Change what decides without a gradient, such as which expert answers.

    Whatever the checks say: each expert's gradient is sound, and leads nowhere.
    """
    for name in stand_ins.switches(s.model, s.probe[0][: min(8, s.batch_size)]):
        own = s.own_name(name)
        yield Planned(
            f"switch-{own}",
            f"what {own} returns reaches the logits through no gradient: change what it decides",
            stand_ins.on_switch(s.model, name, s.threat, s.budget.steps),
        )


def _longer(s: Subject, flagged: set[str]) -> Planning:
    """Search longer, with gradients and without, whichever check flagged."""
    if flagged:
        why = f"flagged: {', '.join(sorted(flagged))}"
        restarts = f"x{s.budget.restarts}" if s.budget.restarts > 1 else ""
        yield Planned(f"pgd-{2 * s.budget.steps}{restarts}-margin", why)
        yield Planned(f"square-{s.budget.late_queries}", why)


def _autoattack(s: Subject, flagged: set[str]) -> Planning:
    """End with AutoAttack if the budget includes it."""
    if s.budget.autoattack:
        yield Planned("autoattack", "part of this budget")


ANSWERS: tuple[Answer, ...] = (
    _straight_through,
    _undo_softmax,
    _expect,
    _bpda,
    _switch,
    _longer,
    _autoattack,
)
"""In the order in which they run: those made for one way of hiding first."""


def most_forwards(
    budget: Budget, *, straight: bool, probabilities: bool, random: bool, switches: int
) -> int:
    """Return how many forward passes the answers take at most for an image that withstands them.

    Args:
        budget: what may be spent.
        straight: whether layers have a straight-through gradient.
        probabilities: whether the model returns probabilities.
        random: whether its passes differ.
        switches: number of modules that decide without a gradient.
    """
    pgd = GRADIENT * budget.steps
    forwards: dict[Answer, int] = {
        _straight_through: 4 * pgd * straight,
        _undo_softmax: 2 * pgd * probabilities,
        _expect: 2 * pgd * stand_ins.EOT_SAMPLES * random,
        _bpda: 2 * pgd * budget.restarts,
        _switch: pgd * switches,
        _longer: 2 * pgd * budget.restarts + budget.late_queries,
        _autoattack: 12_050 * budget.autoattack,  # in suite.py, where a gradient is two, 9,700
    }
    return sum(forwards[answer] for answer in ANSWERS)
