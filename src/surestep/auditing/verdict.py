"""The verdict of an audit. docs/audit.md states the rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from surestep.auditing._check import Check
from surestep.auditing.checks import (
    abnormal_examples,
    binarization,
    broken_gradients,
    collapse,
    deterministic_forward,
    distorted_boundary,
    logits_not_probabilities,
    losses_agree,
    optimisation_in_forward,
    vanishing_gradients,
)
from surestep.evaluation.doubts import MISSED
from surestep.evaluation.result import at_least
from surestep.verdicts import INCONCLUSIVE, NOT_ROBUST, PSEUDO, ROBUST

_MASKING = {
    deterministic_forward.name,
    logits_not_probabilities.name,
    optimisation_in_forward.name,
    collapse.name,
    losses_agree.name,
    abnormal_examples.name,
    distorted_boundary.name,
}
"""Checks whose flag explains a failed claim: gradients or losses hide, or training collapsed.

The signs that gradient attacks are blind (``_signs``) explain it, too. The other checks also flag
sound models: some at a single image.
"""
_SUSPECT = {
    vanishing_gradients.name,
    broken_gradients.name,
    abnormal_examples.name,
    binarization.name,
}
"""Checks whose flag makes gradients suspect: what another check hints at is then a sign."""
_HARDLY = 0.15
"""Share of the clean accuracy above chance that still counts as guessing."""

Verdict = tuple[str, str]


@dataclass(frozen=True)
class AuditNumbers:
    """The numbers that a verdict rests on, shares in [0, 1].

    Attributes:
        clean: clean accuracy.
        claims: accuracy under FGSM and under PGD-10, as a weak report would print it.
        found: accuracy after all attacks.
        interval: its 95% interval.
        chance: share of the most common label.
        missed: number of images that only gradient-free attacks broke.
        n: number of images.
        alone: of a random model, the accuracy that no attack by itself surely gets below.
    """

    clean: float
    claims: Mapping[str, float]
    found: float
    interval: tuple[float, float]
    chance: float
    missed: int
    n: int
    alone: float | None = None

    @property
    def floor(self) -> float:
        """Accuracy that counts as guessing: chance plus 15% of the clean accuracy above chance."""
        return self.chance + _HARDLY * max(self.clean - self.chance, 0)

    @property
    def guesses(self) -> bool:
        """Whether clean accuracy is near chance: at most twice it, or less if classes are few."""
        return self.clean <= min(2 * self.chance, self.chance + _HARDLY * (1 - self.chance))

    @property
    def strongest_claim(self) -> tuple[float, str]:
        """The larger claim that looks like a defence, and its attack; 0 if neither does.

        FGSM alone is weak: an undefended model may keep some accuracy under it, so its claim
        counts only if it leaves half of the clean accuracy.
        """
        fgsm, pgd = self.claims["fgsm"], self.claims["pgd-10"]
        return max(
            (fgsm if fgsm >= 0.5 * self.clean else 0.0, "FGSM"),
            (pgd if pgd > self.floor else 0.0, "PGD-10"),
        )

    @property
    def between(self) -> str:
        """The interval in words."""
        low, high = self.interval
        return f"{100 * low:.0f} to {100 * high:.0f}% at 95%"


def decide(f: AuditNumbers, checks: Sequence[Check], budget_name: str) -> Verdict:
    """Return the verdict and its sentence.

    Args:
        f: the numbers.
        checks: all masking checks.
        budget_name: of the budget spent.
    """
    if f.guesses:
        return _near_chance(f)
    signs = _signs(f, checks)
    flags = [check.title.lower() for check in checks if check.flagged]
    seen = f"flagged: {', '.join(flags)}" if flags else "no check flagged"
    # An undefended model also loses most of what a weak attack left, and most models flag some
    # check: below the floor only a sign of masking makes the failed claim a pretence. Above it,
    # losing half of the claim is itself unusual, so any flag will do.
    above = f.found > f.floor
    explained = bool(signs) or any(map(_masks, checks)) or (bool(flags) and above)
    verdict = (
        (_claim_failed(f, seen) if explained else None)
        or (_gradients_are_blind(f, signs, budget_name) if signs and above else None)
        or _against_the_floor(f, seen)
    )
    return verdict if _borne_out(f, verdict[0]) else _right_in_too_few_draws(f)


def _near_chance(f: AuditNumbers) -> Verdict:
    return INCONCLUSIVE, (
        f"The model is right on {f.clean:.1%} of clean images, near chance ({f.chance:.1%}): "
        "there is no robustness to judge; check data, labels and preprocessing."
    )


def _claim_failed(f: AuditNumbers, seen: str) -> Verdict | None:
    """Judge by the strongest claim, if less than half of it is left; else return None."""
    _, high = f.interval
    looks, name = f.strongest_claim
    claim = f"{looks:.1%} under {name}"
    if high < 0.5 * looks:
        return PSEUDO, (
            f"The model only looks robust: {claim}, but {f.found:.1%} withstand all attacks; "
            f"{seen}."
        )
    if f.found < 0.5 * looks:
        return INCONCLUSIVE, (
            f"{claim}, but {f.found:.1%} withstand all attacks ({f.between}): about half of what "
            "the model claims, too close to tell on so few images: give more with --n."
        )
    return None


def _gradients_are_blind(f: AuditNumbers, signs: Sequence[str], budget_name: str) -> Verdict:
    """Withhold "robust": the attacks tried may have missed a weak model."""
    more = {"quick": "standard", "standard": "thorough"}.get(budget_name)
    advice = f"--budget {more}" if more else "an attack written for this model"
    return INCONCLUSIVE, (
        f"{f.found:.1%} withstood everything tried, but gradient attacks are blind here "
        f"({', '.join(signs)}): {advice} may break more; to show that it is robust, audit it "
        "without what blocks or misleads its gradients."
    )


def _against_the_floor(f: AuditNumbers, seen: str) -> Verdict:
    """Judge whether more is left than counts as guessing."""
    low, high = f.interval
    if low > f.floor:
        return ROBUST, (
            f"The model is robust: {f.found:.1%} of the images withstand all attacks, "
            f"clean accuracy is {f.clean:.1%}; {seen}."
        )
    if high > f.floor:
        return INCONCLUSIVE, (
            f"{f.found:.1%} withstand all attacks ({f.between}), too close to what counts as "
            f"guessing ({f.floor:.1%}) to tell on {f.n:,} images: give more with --n."
        )
    constant = (
        f", fewer than an answer that never changes gets right ({f.chance:.1%})"
        if f.found < f.chance and f.chance > 0.5
        else ""
    )
    return NOT_ROBUST, (
        f"The model is not robust: {f.found:.1%} of the images withstand all attacks{constant}, "
        f"clean accuracy is {f.clean:.1%}; {seen}."
    )


def _borne_out(f: AuditNumbers, verdict: str) -> bool:
    """Tell whether one attack by itself bears out a verdict, as a bad one on a random model needs.

    Each attack's point is judged by a pass of its own. The more attacks, the fewer images are right
    in all of these passes, however the attacks fare.
    """
    enough = {PSEUDO: 0.5 * f.strongest_claim[0], NOT_ROBUST: f.floor}.get(verdict)
    return f.alone is None or enough is None or f.alone <= enough


def _right_in_too_few_draws(f: AuditNumbers) -> Verdict:
    return INCONCLUSIVE, (
        f"The model is random, and each attack is judged by one pass: {f.found:.1%} of the images "
        f"are right in all of them, but no attack by itself surely leaves less than "
        f"{f.alone:.1%}. Audit the mean of many passes, in a module of its own."
    )


def _signs(f: AuditNumbers, checks: Sequence[Check]) -> list[str]:
    """Return, in words, the signs that gradient attacks are blind on this model."""
    suspect = any(check.flagged and check.name in _SUSPECT for check in checks)
    signs = [check.sign for check in checks if check.blind or (check.hints and suspect)]
    if (missed := at_least(f.missed, f.n)) > MISSED:
        signs.append(f"at least {missed:.0%} of the images fall only to gradient-free attacks")
    return signs


def _masks(check: Check) -> bool:
    """Tell whether a check explains a failed claim by masking."""
    return check.masks or (check.flagged and check.name in _MASKING)
