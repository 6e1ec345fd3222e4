"""The audit: claims, checks, escalation, verdict."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from surestep.attacks.core import input_gradient, share_of
from surestep.attacks.inputs import check_inputs, check_labels, count_classes, forward_logits
from surestep.attacks.lending import (
    attacking,
    device_of,
    forked_rng,
    interpreted,
    seed_everything,
    uncompiled,
    unwrapped,
)
from surestep.auditing._subject import Subject
from surestep.auditing.answers import escalate
from surestep.auditing.budgets import budget_of
from surestep.auditing.checks import CHECKS, Check, blind_share
from surestep.auditing.verdict import Findings, judge
from surestep.data import Images
from surestep.devices import autocast, has_bf16, memory_for
from surestep.errors import UserError
from surestep.evaluation import Adapted, doubts, wilson_interval
from surestep.evaluation.batches import batches_of, warn_of_one_class
from surestep.evaluation.substitute import substitute
from surestep.evaluation.suite import Attack, transfer
from surestep.threat import ThreatModel
from surestep.threat import check as check_threat

FORMAT, VERSION = "surestep-audit", 1


@dataclass(frozen=True)
class Audit:
    """What an audit found. Accuracies are shares in [0, 1].

    Attributes:
        verdict: "robust", "pseudo-robust", "not robust" or "inconclusive".
        sentence: the verdict in words.
        checks: the twenty masking checks.
        clean_accuracy: share of images classified right as they are.
        claims: the accuracy that a report on FGSM alone, or on PGD-10 alone, would have given.
        found_accuracy: share of images that nothing broke.
        found_interval: its 95% interval.
        found_by: the attack that broke the most of the images it was run on.
        attacks: accuracy by attack; of those on survivors only, what was left after it.
        escalation: what was run because checks flagged, why, and what it left.
        chance: share of the commonest label.
        n: number of images.
        budget: its name.
        seed: of all that is random.
        threat: norm, eps and data range in words.
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

    The model's accuracy is measured as a weak report would (FGSM, PGD-10) and as attacks can
    that use gradients, queries only, and points made on a substitute. Twenty checks look for
    masking; where one flags, attacks made for it follow. The verdict rests on what all of these
    found. The model is judged in eval mode and left as it was found; so is the random state.

    Args:
        model: any classifier of images in the threat model's range.
        data: a pair of tensors (x, y), a Dataset or a DataLoader; images it was not trained on.
        threat: norm, radius and data range.
        budget: "quick", "standard" or "thorough".
        n: only n images, chosen as ``surestep.evaluate`` does; None for all.
        seed: of all that is random.
        batch_size: of the attacks.
        preprocess: what the model needs done to the pixels first, such as ``models.Normalize``.
        sources: further models for the transfer attack, which take the same pixels.
        state: path prefix of the progress files, one per round of attacks; given again after a
            stop, the audit continues from there and finds the same.
        tell: called with a sentence on what is being done.

    Raises:
        UserError: an unknown budget, a radius of 0, a state of another audit, or a model or data
            that cannot be judged.
    """
    start = time.perf_counter()
    spend = budget_of(budget)
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
        batches = list(batches_of(data, batch_size, n, device, threat.bounds)[0])
        if not batches:
            raise UserError("there is no image to audit on")
        for batch in batches:
            check_inputs(adapted, *batch, threat)
        x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
        if n is not None:
            warn_of_one_class(Counter(y.tolist()), stacklevel=2)
        subject = Subject(
            adapted, x, y, threat, spend, seed, batch_size, tell, list(sources), state
        )
        _suite(subject)
        tell("masking checks")
        checks = [check(subject) for check in CHECKS]
        blind = blind_share(subject)
        claims = {name: subject.accuracy(name) for name in ("fgsm", "pgd-10")}
        steps = escalate(subject, checks, blind)
        # The profile of gaps can only now tell what the strongest attacks took.
        checks[-1] = CHECKS[-1](subject)
    return _conclude(subject, checks, claims, steps, blind, budget, time.perf_counter() - start)


def _suite(s: Subject) -> None:
    """Run what every audit runs, on every image that is right clean."""
    steps, budget = s.budget.steps, s.budget
    s.attack(
        [
            *("fgsm", "fgsm-margin", "pgd-10", f"noise-{budget.noise}"),
            *(f"pgd-{steps}", f"pgd-{steps}-margin", f"square-{budget.queries}"),
        ]
    )
    if s.right["clean"].any():
        attack = _from_a_substitute(s)
        s.attack({"transfer": attack}, s.right["clean"])


def _from_a_substitute(s: Subject) -> Attack:
    """Return the transfer attack from a substitute of the subject, and from its sources."""
    s.tell("training a substitute for the transfer attack")
    stand_in = substitute(s.model, s.x, s.threat, s.seed)
    with torch.no_grad():
        alike = s.logits(s.x).argmax(1) == s.map(stand_in, s.x).argmax(1)
    s.agreement = share_of(alike)
    for doubt in doubts.of_sources(s.sources, *s.probe, s.batch_size):
        s.tell(doubt)
    return transfer([stand_in, *s.sources], s.threat)


def _conclude(
    s: Subject,
    checks: list[Check],
    claims: dict[str, float],
    steps: list[dict[str, Any]],
    blind: float,
    budget: str,
    seconds: float,
) -> Audit:
    n, left = len(s.x), s.survivors
    found = Findings(
        clean=s.accuracy("clean"),
        claims=claims,
        found=share_of(left),
        interval=wilson_interval(int(left.sum()), n),
        chance=s.y.bincount().max().item() / n,
        blind=blind,
        n=n,
    )
    verdict, sentence = judge(found, checks, budget)
    return Audit(
        verdict=verdict,
        sentence=sentence,
        checks=checks,
        clean_accuracy=found.clean,
        claims=claims,
        found_accuracy=found.found,
        found_interval=found.interval,
        found_by=max(s.broke, key=lambda name: s.broke[name]),
        attacks={name: s.accuracy(name) for name in s.right if name != "clean"},
        escalation=steps,
        chance=found.chance,
        n=n,
        budget=budget,
        seed=s.seed,
        threat=s.threat.to_dict(),
        seconds=seconds,
    )


def estimate(
    model: nn.Module,
    images: Images,
    budget: str,
    n: int,
    preprocess: nn.Module | None = None,
    batch_size: int = 250,
) -> float:
    """Return about how many seconds an audit takes at most: what a robust model costs.

    Args:
        model: on its device.
        images: to be audited on.
        budget: its name.
        n: images.
        preprocess: as for ``audit``.
        batch_size: of the attacks.

    Raises:
        UserError: the model fails on these images, or has no such labels.
    """
    spend = budget_of(budget)
    device = device_of(model)
    batch = images.first(min(100, batch_size, len(images)))
    x, y = batch.pixels().to(device), batch.y.to(device)
    adapted = Adapted(model, preprocess)
    check_labels(y, count_classes(adapted, x))

    def forward_seconds(precision: torch.dtype) -> float:
        for _ in range(2):  # the first pass prepares kernels
            start = time.perf_counter()
            with attacking(adapted), autocast(device, precision):
                try:
                    values = input_gradient(adapted, x, y)[0]
                except UserError:  # without a gradient the forward is the cost, or fails again
                    values = forward_logits(adapted, x)
                float(values.flatten()[0])  # a GPU is only done once a number is read
        return (time.perf_counter() - start) / len(x) / 3  # a gradient is about three forwards

    full = forward_seconds(torch.float32)
    fast = forward_seconds(torch.bfloat16) if spend.fast and has_bf16(device) else full
    forwards = 3 * (2 * spend.steps + 12 + 70) + spend.noise + spend.queries
    forwards += 3 * 4 * spend.steps * spend.restarts + spend.late_queries
    forwards += 12_000 if spend.autoattack else 0
    close = (3 * 900 + 250) * spend.probe  # of it, a fifth reads 1,250 features each
    return fast * forwards * n + full * (close + 20_000)  # and the substitute's questions
