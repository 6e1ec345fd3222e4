"""The audit: claims, checks, escalation, verdict."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from surestep.attacks.inputs import check_inputs
from surestep.attacks.lending import (
    attacking,
    check_module,
    device_of,
    interpreted,
    uncompiled,
    unwrapped,
)
from surestep.attacks.outcomes import share_of
from surestep.auditing._check import CHECKS, Check
from surestep.auditing._subject import Subject
from surestep.auditing.budgets import budget_of
from surestep.auditing.checks import black_box_beats_white_box, gap_profile
from surestep.auditing.escalation import escalate
from surestep.auditing.verdict import AuditNumbers, decide
from surestep.data import Images
from surestep.devices import memory_for
from surestep.errors import UserError
from surestep.evaluation import Adapted, doubts, suite, wilson_interval
from surestep.evaluation.batches import batches_of, warn_of_one_class
from surestep.evaluation.substitute import substitute
from surestep.evaluation.suite import Attack
from surestep.randomness import forked_rng, seed_everything
from surestep.threat import ThreatModel, check_threat

FORMAT, VERSION = "surestep-audit", 1


@dataclass(frozen=True)
class Audit:
    """What an audit found. Accuracies are shares in [0, 1].

    Attributes:
        verdict: "robust", "pseudo-robust", "not robust" or "inconclusive".
        sentence: the verdict in words.
        checks: the masking checks.
        clean_accuracy: share of images classified right as they are.
        claims: accuracy under FGSM alone and under PGD-10 alone, as a weak report would print it.
        found_accuracy: share of images that nothing broke.
        found_interval: its 95% interval.
        found_by: the attack that broke the most images; "" if none broke any.
        attacks: accuracy by attack; for attacks on survivors only, the share left after them.
        escalation: the attacks run because of what the checks or the layers showed, why, and what
            they left.
        chance: share of the most common label.
        n: number of images.
        budget: name of the budget.
        seed: seed of everything random.
        threat: norm, eps and data range as plain values.
        seconds: wall time.
    """

    verdict: str
    sentence: str
    checks: list[Check]
    clean_accuracy: float
    claims: dict[str, float]
    found_accuracy: float
    found_interval: tuple[float, float]
    found_by: str
    attacks: dict[str, float]
    escalation: list[dict[str, Any]]
    chance: float
    n: int
    budget: str
    seed: int
    threat: dict[str, Any]
    seconds: float

    @property
    def flagged(self) -> list[Check]:
        """The checks that flagged."""
        return [check for check in self.checks if check.flagged]

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings, lists and dicts, as written by ``--json``."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["checks"] = [check.to_dict() for check in self.checks]
        values["found_interval"] = list(self.found_interval)
        return {"format": FORMAT, "version": VERSION, **values}


def audit(
    model: nn.Module,
    data: Images | tuple[Tensor, Tensor] | Dataset | DataLoader,
    threat: ThreatModel,
    *,
    budget: str = "standard",
    n: int | None = 1000,
    seed: int = 0,
    batch_size: int = 250,
    preprocess: nn.Module | None = None,
    sources: Sequence[nn.Module] = (),
    state: str | Path | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Audit:
    """Tell whether a model's robustness is real, or gradients are masked.

    Accuracy is measured as a weak report would (FGSM, PGD-10), and under attacks that use
    gradients, queries only, or points made on a substitute. Checks look for masking; where one
    flags, attacks made for it follow. The verdict rests on what all of these attacks found.
    The model is judged in eval mode; it and the random state are left as they were found.

    Args:
        model: any classifier of images in the threat model's range.
        data: a pair of tensors (x, y), a Dataset or a DataLoader of images the model was not
            trained on.
        threat: norm, radius and data range.
        budget: "quick", "standard" or "thorough".
        n: only n images, chosen as ``surestep.evaluate`` does; None for all.
        seed: seed of everything random.
        batch_size: images per pass of the attacks.
        preprocess: applied to the pixels before the model, such as ``models.Normalize``.
        sources: further models for the transfer attack, which take the same pixels.
        state: path prefix of the progress files, one per round of attacks. Given again after a
            stop, the audit continues from there and finds the same.
        tell: called with a sentence that says what is being done.

    Raises:
        UserError: the budget is unknown, the radius is 0, the state belongs to another audit, or
            the model or data cannot be judged.
    """
    start = time.perf_counter()
    spend = budget_of(budget)
    check_module(model)
    check_threat(threat)
    if threat.eps == 0:
        raise UserError("eps 0: no image may change, so there is nothing to audit; give a radius")
    adapted = Adapted(uncompiled(unwrapped(model)), preprocess)
    device = device_of(model)
    advice = f"lower batch_size ({batch_size})"
    with (
        attacking(adapted),
        forked_rng(device),
        memory_for("the audit", advice),
        interpreted(adapted),  # the checks hang hooks on modules
    ):
        seed_everything(seed)
        x, y = _images(adapted, data, threat, n, batch_size, device)
        subject = Subject(
            model=adapted,
            x=x,
            y=y,
            threat=threat,
            budget=spend,
            seed=seed,
            batch_size=batch_size,
            tell=tell,
            sources=list(sources),
            state=state,
        )
        _first_attacks(subject)
        claims = {name: subject.accuracy(name) for name in ("fgsm", "pgd-10")}
        tell("masking checks")
        checks = {check.name: check(subject) for check in CHECKS}
        answers = escalate(subject, checks.values())
        _look_again(subject, checks)
    seconds = time.perf_counter() - start
    return _conclude(subject, list(checks.values()), claims, answers, budget, seconds)


def _images(
    model: nn.Module,
    data: Images | tuple[Tensor, Tensor] | Dataset | DataLoader,
    threat: ThreatModel,
    n: int | None,
    batch_size: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Return all images to audit on (N, ...) and their labels (N,); arguments as for ``audit``.

    Raises:
        UserError: there is no image, they are of several sizes, or the model cannot judge them.
    """
    batches = list(batches_of(data, batch_size, n, device, threat.bounds)[0])
    if not batches:
        raise UserError("there is no image to audit on")
    sizes = {tuple(images.shape[1:]) for images, _ in batches}
    if len(sizes) > 1:
        raise UserError(
            f"images of several sizes, such as {' and '.join(map(str, sorted(sizes)[:2]))}: an "
            "audit takes images of one size, resize them"
        )
    for batch in batches:
        check_inputs(model, *batch, threat)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    if n is not None:
        warn_of_one_class(Counter(y.tolist()), stacklevel=3)
    return x, y


def _first_attacks(s: Subject) -> None:
    """Run the attacks of every audit on every image that is right clean."""
    s.attack(suite.parse_all(s.budget.attacks, s.threat))
    if s.right["clean"].any():
        attack = _from_a_substitute(s)
        s.attack({"transfer": attack}, s.right["clean"])


def _from_a_substitute(s: Subject) -> Attack:
    """Return the transfer attack from a substitute for the subject and from the given sources."""
    s.tell("training a substitute for the transfer attack")
    own = substitute(s.model, s.x, s.threat, s.seed)
    with torch.no_grad():
        alike = s.logits(s.x).argmax(1) == s.map(own, s.x).argmax(1)
    s.agreement = share_of(alike)
    for doubt in doubts.of_sources(s.sources, *s.probe, s.batch_size):
        s.tell(doubt)
    return suite.transfer([own, *s.sources], s.threat)


def _look_again(s: Subject, checks: dict[str, Check]) -> None:
    """Make again the checks whose answer the escalation may have changed."""
    # A black-box flag stays even if BPDA has since broken the same images: it is the reason why
    # BPDA ran.
    if not checks[black_box_beats_white_box.name].flagged:
        checks[black_box_beats_white_box.name] = black_box_beats_white_box(s)
    checks[gap_profile.name] = gap_profile(s)


def _conclude(
    s: Subject,
    checks: Sequence[Check],
    claims: dict[str, float],
    answers: list[dict[str, Any]],
    budget_name: str,
    seconds: float,
) -> Audit:
    """Return the audit: the verdict on what was found, and all numbers."""
    n, left = len(s.x), s.survivors
    found = AuditNumbers(
        clean=s.accuracy("clean"),
        claims=claims,
        found=share_of(left),
        interval=wilson_interval(int(left.sum()), n),
        chance=s.y.bincount().max().item() / n,
        missed=int(s.only_without_gradients.sum()) + s.square_in_autoattack,
        n=n,
        alone=s.left_by_the_strongest if s.random else None,
    )
    verdict, sentence = decide(found, checks, budget_name)
    return Audit(
        verdict=verdict,
        sentence=sentence,
        checks=list(checks),
        clean_accuracy=found.clean,
        claims=claims,
        found_accuracy=found.found,
        found_interval=found.interval,
        found_by=_most_broken_by(s.broke),
        attacks={name: s.accuracy(name) for name in s.right if name != "clean"},
        escalation=answers,
        chance=found.chance,
        n=n,
        budget=budget_name,
        seed=s.seed,
        threat=s.threat.to_dict(),
        seconds=seconds,
    )


def _most_broken_by(broke: Mapping[str, Tensor]) -> str:
    """Return the name of the attack that broke the most images; "" if none broke any."""
    name = max(broke, key=lambda name: int(broke[name].sum()))
    return name if broke[name].any() else ""
