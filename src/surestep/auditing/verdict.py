"""The verdict of an audit. docs/audit.md states the rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from surestep.auditing._check import Check
from surestep.auditing.checks import GAP, SOLVED
from surestep.evaluation import share_interval, wilson_interval
from surestep.evaluation.doubts import BY_CHANCE, MISSED
from surestep.verdicts import INCONCLUSIVE, NOT_ROBUST, PSEUDO, ROBUST

_BY_COUNT = ("random-beats-gradient", "one-step-beats-many")
_MASKING = {
    "deterministic-forward",
    "logits-not-probabilities",
    "optimisation-in-forward",
    "collapse",
    "losses-agree",
    "abnormal-examples",
    "distorted-boundary",
}
"""Checks whose flag explains a failed claim: gradients or losses hide, or training collapsed.

The signs that gradient attacks are blind (``_signs``) explain it, too. The other checks also flag
sound models: some at a single image.
"""
_SUSPECT = {"vanishing-gradients", "broken-gradients", "abnormal-examples", "binarization"}
"""Checks by one of which the failure of an unbounded attack on a few images counts, too."""
_UNBOUNDED = 0.05
"""Share of images above which the failure of an unbounded attack counts by itself."""
_HARDLY = 0.15
"""Share of the clean accuracy above chance that still counts as guessing."""
_BLIND = 0.1
"""Share of images without a gradient above which surviving gradient attacks says little."""

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
        no_gradient_share: share of images on which even log-odds have no gradient.
        missed: number of images that only gradient-free attacks broke.
        n: number of images.
        alone: of a random model, the accuracy that no attack by itself surely gets below.
    """

    clean: float
    claims: Mapping[str, float]
    found: float
    interval: tuple[float, float]
    chance: float
    no_gradient_share: float
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


def judge(f: AuditNumbers, checks: Sequence[Check], budget: str) -> Verdict:
    """Return the verdict and its sentence.

    Args:
        f: the numbers.
        checks: the twenty masking checks.
        budget: name of the budget spent.
    """
    if f.guesses:
        return INCONCLUSIVE, (
            f"The model is right on {f.clean:.1%} of clean images, near chance ({f.chance:.1%}): "
            "there is no robustness to judge; check data, labels and preprocessing."
        )
    flags = [check.title.lower() for check in checks if check.flagged]
    seen = f"flagged: {', '.join(flags)}" if flags else "no check flagged"
    signs = _signs(f, checks)
    # An undefended model also loses most of what a weak attack left, and most models flag some
    # check: below the floor only a sign of masking makes the failed claim a pretence. Above it,
    # losing half of the claim is itself unusual, so any flag will do.
    masking = bool(signs) or any(check.flagged and _masks(check) for check in checks)
    broken_claim = _of_claims(f, seen) if masking or (flags and f.found > f.floor) else None
    return _of_draws(f, broken_claim or _of_signs(f, signs, budget) or _of_the_floor(f, seen))


def _of_draws(f: AuditNumbers, verdict: Verdict) -> Verdict:
    """Withhold a bad verdict on a random model that no attack by itself bears out.

    Each attack's point is judged by a pass of its own. The more attacks, the fewer images are right
    in all of these passes, however the attacks fare.
    """
    enough = {PSEUDO: 0.5 * f.strongest_claim[0], NOT_ROBUST: f.floor}.get(verdict[0])
    if f.alone is None or enough is None or f.alone <= enough:
        return verdict
    return INCONCLUSIVE, (
        f"The model is random, and each attack is judged by one pass: {f.found:.1%} of the images "
        f"are right in all of them, but no attack by itself surely leaves less than "
        f"{f.alone:.1%}. Audit the mean of many passes, in a module of its own."
    )


def _of_claims(f: AuditNumbers, seen: str) -> Verdict | None:
    """Judge whether at least half of the strongest claim is left; None if it is."""
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


def _of_signs(f: AuditNumbers, signs: Sequence[str], budget: str) -> Verdict | None:
    """Withhold "robust" where the attacks tried may have missed a weak model; else None."""
    if f.found <= f.floor or not signs:
        return None
    more = {"quick": "standard", "standard": "thorough"}.get(budget)
    advice = f"--budget {more}" if more else "an attack written for this model"
    return INCONCLUSIVE, (
        f"{f.found:.1%} withstood everything tried, but gradient attacks are blind here "
        f"({', '.join(signs)}): {advice} may break more; to show that it is robust, audit it "
        "without what blocks or misleads its gradients."
    )


def _of_the_floor(f: AuditNumbers, seen: str) -> Verdict:
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


def _signs(f: AuditNumbers, checks: Sequence[Check]) -> list[str]:
    """Return, in words, the signs that gradient attacks are blind on this model."""
    suspect = any(check.flagged and check.name in _SUSPECT for check in checks)
    signs = [
        check.title.lower() for check in checks if check.flagged and _decisive(check, f.n, suspect)
    ]
    if f.no_gradient_share > _BLIND:
        signs.append(f"no gradient on {f.no_gradient_share:.0%} of the images")
    if (missed := wilson_interval(f.missed, f.n)[0]) > MISSED:
        signs.append(f"at least {missed:.0%} of the images fall only to gradient-free attacks")
    return signs


def _decisive(check: Check, n: int, suspect: bool) -> bool:
    """Tell whether a check that flagged shows that gradient attacks say nothing here.

    Args:
        check: a check that flagged.
        n: number of images.
        suspect: whether one of the checks in ``_SUSPECT`` flagged.
    """
    evidence = check.evidence
    if check.name in _BY_COUNT:
        return check.value is not None and round(check.value * n) >= BY_CHANCE
    if check.name == "binarization":
        # Surely fewer than a working attack solves, and no more than random points do. Three
        # problems or fewer say nothing.
        solved, posed = evidence["pgd"], evidence["posed"]
        high = share_interval(solved, posed)[1]
        return posed > BY_CHANCE and high < SOLVED and solved <= evidence["random"]
    if check.name == "eps-sweep":
        left, looked_at = evidence["accuracy"][-1], evidence["n"]
        return share_interval(left, looked_at)[0] > (MISSED if suspect else _UNBOUNDED)
    # Without gradients, or with those of another function, surviving gradient attacks says
    # nothing. NaN gradients are not decisive here: no_gradient_share counts their images.
    wrong = evidence.get("detached") or evidence.get("contradicted")
    return check.name == "broken-gradients" and bool(wrong)


def _masks(check: Check) -> bool:
    """Tell whether a check that flagged explains a failed claim by masking."""
    # In weak models PGD-10 often leaves more than PGD; a gap between PGD and AutoAttack is rare.
    gap = check.evidence.get("pgd over all with autoattack", 0.0)
    return check.name in _MASKING or (check.name == "gap-profile" and gap > GAP)
