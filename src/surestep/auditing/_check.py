"""What a masking check is, what it finds, and the list of all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from surestep.auditing._subject import Subject
from surestep.files import plain
from surestep.randomness import seed_everything


@dataclass(frozen=True)
class Check:
    """What one masking check found.

    Attributes:
        number: its number, from 1.
        name: identifier for programs.
        title: name for people.
        status: "passed", "flagged" or "skipped".
        value: the measured value; None if nothing was measured.
        threshold: in words, when the check flags.
        sentence: what the value means for this model.
        source: where the check is from.
        evidence: the numbers behind it.
        blind: how it counts in the verdict, see ``Measurement``.
        hints: the same.
        masks: the same.
        sign: the same, in words.
    """

    number: int
    name: str
    title: str
    status: str
    value: float | None
    threshold: str
    sentence: str
    source: str
    evidence: dict[str, Any] = field(default_factory=dict)
    blind: bool = False
    hints: bool = False
    masks: bool = False
    sign: str = ""

    @property
    def flagged(self) -> bool:
        """Whether the check gives a reason to doubt."""
        return self.status == "flagged"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; None for numbers that are not finite, which JSON lacks.

        How the check counts in the verdict is left out: the verdict's own sentence tells it.
        """
        found: dict[str, Any] = plain(asdict(self))
        for counts in ("blind", "hints", "masks", "sign"):
            del found[counts]
        return found


@dataclass(frozen=True)
class Measurement:
    """What a check's function returns. The last four say how it counts in the verdict.

    Attributes:
        flag: whether the check flags; None if it does not apply.
        value: what was measured; None if nothing was.
        sentence: what this means for the model.
        evidence: the numbers behind it.
        blind: whether this by itself shows that gradient attacks say nothing about the model. Like
            the next two true only if the check flags.
        hints: whether it shows that together with a check that makes gradients suspect.
        masks: whether it explains by masking why a claim failed.
        sign: what shows that gradient attacks are blind, in words; by default the check's title.
    """

    flag: bool | None
    value: float | None
    sentence: str
    evidence: dict[str, Any] = field(default_factory=dict)
    blind: bool = False
    hints: bool = False
    masks: bool = False
    sign: str = ""


@dataclass(frozen=True)
class CheckDefinition:
    """One masking check, called with a subject.

    Attributes:
        number: its number, from 1.
        title: name for people.
        threshold: in words, when the check flags.
        source: where the check is from.
        function: measures the subject.
    """

    number: int
    title: str
    threshold: str
    source: str
    function: Callable[[Subject], Measurement]

    @property
    def name(self) -> str:
        """Identifier for programs: the function's name with hyphens."""
        return self.function.__name__.replace("_", "-")

    @property
    def reason(self) -> str:
        """Why the check tells anything."""
        return (self.function.__doc__ or "").strip()

    def __call__(self, subject: Subject) -> Check:
        """Make the check on a subject."""
        seed_everything(subject.seed * 100 + self.number)
        found = self.function(subject)
        return Check(
            number=self.number,
            name=self.name,
            title=self.title,
            status={None: "skipped", True: "flagged", False: "passed"}[found.flag],
            value=found.value,
            threshold=self.threshold,
            sentence=found.sentence,
            source=self.source,
            evidence=found.evidence,
            blind=found.blind,
            hints=found.hints,
            masks=found.masks,
            sign=found.sign or self.title.lower(),
        )


CHECKS: list[CheckDefinition] = []


def over(gap: float, limit: float) -> bool:
    """Tell whether a difference of shares is above a limit, beyond rounding (.88 - .85 > .03)."""
    return gap > limit + 1e-9


def masking_check(
    number: int, title: str, *, flags_when: str, source: str
) -> Callable[[Callable[[Subject], Measurement]], CheckDefinition]:
    """Register a check; its name is the function's, and why it tells anything the docstring."""

    def register(function: Callable[[Subject], Measurement]) -> CheckDefinition:
        CHECKS.append(CheckDefinition(number, title, flags_when, source, function))
        return CHECKS[-1]

    return register
