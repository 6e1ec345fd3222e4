"""From what an audit found to its verdict. The rule is docs/audit.md's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from surestep.auditing.checks import Check
from surestep.evaluation import wilson_interval
from surestep.evaluation.doubts import BY_CHANCE, MISSED
from surestep.verdicts import INCONCLUSIVE, NOT_ROBUST, PSEUDO, ROBUST

_BY_COUNT = ("random-beats-gradient", "one-step-beats-many")
_HARDLY = 0.15
"""Share of what a model knows above chance that is hardly more than guessing."""
_BLIND = 0.1
"""Share of images without a gradient, above which what withstood gradients says little."""

Verdict = tuple[str, str]


@dataclass(frozen=True)
class Findings:
    """The numbers that a verdict rests on, shares in [0, 1].

    Attributes:
        clean: clean accuracy.
        claims: accuracy under FGSM and PGD-10, as a weak report has it.
        found: accuracy after all attacks.
        interval: its 95% interval.
        chance: share of the commonest label.
        blind: share of images on which even a safe loss has no gradient.
        n: number of images.
    """

    clean: float
    claims: Mapping[str, float]
    found: float
    interval: tuple[float, float]
    chance: float
    blind: float
    n: int

    @property
    def floor(self) -> float:
        """What is hardly more than guessing, for a model that knows as much as this one."""
        return self.chance + _HARDLY * max(self.clean - self.chance, 0)

    @property
    def guesses(self) -> bool:
        """Whether the model itself hardly does more: twice as well, or less for a few classes."""
        return self.clean <= min(2 * self.chance, self.chance + _HARDLY * (1 - self.chance))

    @property
    def looks(self) -> tuple[float, str]:
        """The larger claim that looks like a defence, and its attack; 0 if none does.

        FGSM alone is weak: an undefended model may keep some accuracy under it. Only where it
        leaves half does it look like one.
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


def judge(f: Findings, checks: Sequence[Check], budget: str) -> Verdict:
    """Return the verdict and its sentence.

    Args:
        f: what was found.
        checks: the twenty.
        budget: the name of the one spent.
    """
    if f.guesses:
        return INCONCLUSIVE, (
            f"The model is right on {f.clean:.1%} of clean images, near chance ({f.chance:.1%}): "
            "there is no robustness to judge; check data, labels and preprocessing."
        )
    flags = [check.title.lower() for check in checks if check.flagged]
    seen = f"flagged: {', '.join(flags)}" if flags else "no check flagged"
    # Where nothing is wrong with the gradients, a claim that does not hold is only a weak one.
    return (
        (_of_claims(f, seen) if flags else None)
        or _of_doubts(f, checks, budget)
        or _of_the_floor(f, seen)
    )


def _of_claims(f: Findings, seen: str) -> Verdict | None:
    """Judge whether half of what the model claims is left."""
    _, high = f.interval
    looks, name = f.looks
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


def _of_doubts(f: Findings, checks: Sequence[Check], budget: str) -> Verdict | None:
    """Hold the verdict where an undefended model may be hidden too well for what was tried."""
    doubts = [check.title.lower() for check in checks if check.flagged and _decisive(check, f.n)]
    if f.blind > _BLIND:
        doubts.append(f"no gradient on {f.blind:.0%} of the images")
    if (missed := _missed(checks, f.n)) > MISSED:
        doubts.append(f"at least {missed:.0%} of the images fall only to gradient-free attacks")
    if f.found <= f.floor or not doubts:
        return None
    more = {"quick": "standard", "standard": "thorough"}.get(budget)
    advice = f"--budget {more}" if more else "an attack written for this model"
    return INCONCLUSIVE, (
        f"{f.found:.1%} withstood everything tried, but gradient attacks are blind here "
        f"({', '.join(doubts)}): {advice} would decide."
    )


def _of_the_floor(f: Findings, seen: str) -> Verdict:
    """Judge whether more is left than guessing would."""
    low, high = f.interval
    if low > f.floor:
        return ROBUST, (
            f"The model is robust: {f.found:.1%} of the images withstand all attacks, "
            f"clean accuracy is {f.clean:.1%}; {seen}."
        )
    if high > f.floor:
        return INCONCLUSIVE, (
            f"{f.found:.1%} withstand all attacks ({f.between}), too close to chance "
            f"({f.chance:.1%}) to tell on so few images: give more with --n."
        )
    return NOT_ROBUST, (
        f"The model is not robust: {f.found:.1%} of the images withstand all attacks, clean "
        f"accuracy is {f.clean:.1%}; {seen}."
    )


def _decisive(check: Check, n: int) -> bool:
    """Tell whether a check that flags says that gradient attacks mean nothing here."""
    if check.name in _BY_COUNT:
        return check.value is not None and round(check.value * n) >= BY_CHANCE
    # Without gradients, what attacks by gradients leave says nothing. Where some are NaN, the
    # images that these blind are counted.
    return check.name == "broken-gradients" and bool(check.evidence["detached"])


def _missed(checks: Sequence[Check], n: int) -> float:
    """Return the share of images, at least, that an attack without gradients breaks alone."""
    counts = [
        count
        for check in checks
        if check.name == "black-box-beats-white-box" and check.flagged
        for count in check.evidence.get("broken only by it", {}).values()
    ]
    return wilson_interval(max(counts), n)[0] if counts else 0.0
