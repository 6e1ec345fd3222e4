"""The audit: claims, checks, escalation, verdict."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from surestep.activations import straight_through, with_a_way_through
from surestep.attacks.core import (
    alone,
    attacking,
    check_inputs,
    check_labels,
    count_classes,
    device_of,
    forked_rng,
    forward_logits,
    input_gradient,
    interpreted,
    share_of,
    uncompiled,
)
from surestep.attacks.losses import log_odds
from surestep.auditing import escalation
from surestep.auditing._subject import Subject
from surestep.auditing._subject import budget as budget_of
from surestep.auditing.checks import CHECKS, Check, zero_share
from surestep.data import Images
from surestep.devices import autocast, has_bf16, memory_for
from surestep.errors import UserError
from surestep.evaluation import Adapted, wilson_interval
from surestep.evaluation._evaluate import batches_of, warn_of_one_class
from surestep.evaluation.suite import parse
from surestep.threat import ThreatModel
from surestep.threat import check as check_threat

FORMAT, VERSION = "surestep-audit", 1
ROBUST, PSEUDO, NOT_ROBUST, INCONCLUSIVE = "robust", "pseudo-robust", "not robust", "inconclusive"


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
        sources: further models for the transfer attack.
        state: begins the names of files, one of each round of attacks, in which what they found is
            kept; given again after a stop, the audit goes on from there and finds the same.
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
    # One process judges: the others must not be waited for.
    adapted = Adapted(uncompiled(alone(model)), preprocess)
    device = device_of(model)
    advice = f"lower batch_size ({batch_size})"
    with (
        attacking(adapted),
        forked_rng(device),
        memory_for("the audit", advice),
        interpreted(adapted),  # the checks hang hooks on modules
    ):
        torch.manual_seed(seed)
        batches = list(batches_of(data, batch_size, n, device, threat.bounds)[0])
        if not batches:
            raise UserError("there is no image to audit on")
        for batch in batches:
            check_inputs(adapted, *batch, threat)
        x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
        if n is not None:
            warn_of_one_class(
                [{"label": k, "n": int((y == k).sum())} for k in y.unique().tolist()], 2
            )
        subject = Subject(
            adapted, x, y, threat, spend, seed, batch_size, tell, list(sources), state
        )
        _suite(subject)
        tell("masking checks")
        checks = [check(subject) for check in CHECKS]
        blind = zero_share(subject, *subject.probe, log_odds)
        claims = {name: subject.accuracy(name) for name in ("fgsm", "pgd-10")}
        steps = _escalate(subject, checks, blind)
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
        attack = escalation.substitute_attack(s)
        s.attack({"transfer": attack}, s.right["clean"])


def _escalate(s: Subject, checks: list[Check], blind: float) -> list[dict[str, Any]]:
    """Run attacks made for what flagged, on what is left, and say why each was run."""
    flagged = {check.name for check in checks if check.flagged}
    own_way = with_a_way_through(s.model)
    if not (flagged or own_way or s.budget.autoattack):
        return []
    steps: list[dict[str, Any]] = []

    def run(name: str, why: str, attack: Any = None) -> None:
        left = s.survivors
        if left.any():
            s.attack([name] if attack is None else {name: attack}, left)
            steps.append({"name": name, "why": why, "accuracy": share_of(s.survivors)})

    budget, pgd_steps = s.budget, 2 * s.budget.steps
    if own_way:
        why = f"{len(own_way)} layers pass no gradient in places: straight through them"
        with straight_through(s.model):
            run(f"pgd-{pgd_steps}-margin-bpda", why, parse(f"pgd-{pgd_steps}-margin", s.threat))
            run(f"pgd-{pgd_steps}-bpda", why, parse(f"pgd-{pgd_steps}", s.threat))
    some = s.probe[0][: s.batch_size]
    if "logits-not-probabilities" in flagged:
        inverse = escalation.LogProbabilities(s.model)
        run(
            "log-probabilities",
            "the model returns probabilities: attack their logarithm",
            escalation.on_stand_in(inverse, s.threat, budget.steps),
        )
    if "deterministic-forward" in flagged:
        expected = escalation.Expected(s.model)
        run(
            f"eot-{escalation.EOT_SAMPLES}",
            "the model is random: attack its mean over passes",
            escalation.on_stand_in(expected, s.threat, budget.steps),
        )
    if blind > 0 or flagged & {
        "broken-gradients",
        "random-beats-gradient",
        "one-step-beats-many",
        "black-box-beats-white-box",
        "optimisation-in-forward",
    }:
        layers = escalation.flat_layers(s.model, some[:32])
        if layers:
            wrapping = {id(m): name for name, m in s.model.named_modules()}[id(s.inner)] + "."
            names = ", ".join(name.removeprefix(wrapping) for name in layers)
            with escalation.bpda(s.model, some[:64], layers) as smooth:
                run(
                    "bpda",
                    f"no gradient flows through {names}: straight through it",
                    escalation.on_stand_in(smooth, s.threat, budget.steps, budget.restarts),
                )
    if flagged:
        why = f"flagged: {', '.join(sorted(flagged))}"
        restarts = f"x{budget.restarts}" if budget.restarts > 1 else ""
        run(f"pgd-{pgd_steps}{restarts}-margin", why)
        run(f"square-{budget.late_queries}", why)
    if budget.autoattack:
        run("autoattack", "part of this budget")
    return steps


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
    found = share_of(left)
    interval = wilson_interval(int(left.sum()), n)
    chance = s.y.bincount().max().item() / n
    clean = s.accuracy("clean")
    taken = {name: s.accuracy(name) for name in s.right if name != "clean"}
    strongest = max(s.broke, key=lambda name: s.broke[name])
    verdict, sentence = judge(clean, claims, found, interval, chance, checks, blind, budget, n)
    return Audit(
        verdict=verdict,
        sentence=sentence,
        checks=checks,
        clean_accuracy=clean,
        claims=claims,
        found_accuracy=found,
        found_interval=interval,
        found_by=strongest,
        attacks=taken,
        escalation=steps,
        chance=chance,
        n=n,
        budget=budget,
        seed=s.seed,
        threat=s.threat.to_dict(),
        seconds=seconds,
    )


_BY_COUNT = ("random-beats-gradient", "one-step-beats-many")
_FEW = 3
"""Images by which two attacks may differ by chance."""
_MISSED = 0.02
"""Share of images that only an attack without gradients breaks, above which gradients mislead."""


def judge(
    clean: float,
    claims: dict[str, float],
    found: float,
    interval: tuple[float, float],
    chance: float,
    checks: list[Check],
    blind: float,
    budget: str,
    n: int,
) -> tuple[str, str]:
    """Return the verdict and its sentence.

    Args:
        clean: clean accuracy.
        claims: accuracy under FGSM and PGD-10, as a weak report has it.
        found: accuracy after all attacks.
        interval: its 95% interval.
        chance: share of the commonest label.
        checks: the twenty.
        blind: share of images on which even a safe loss has no gradient.
        budget: the name of the one spent.
        n: number of images.
    """
    flags = [check.title.lower() for check in checks if check.flagged]
    seen = f"flagged: {', '.join(flags)}" if flags else "no check flagged"
    floor = chance + 0.15 * (1 - chance)
    low, high = interval
    if clean <= floor:
        return INCONCLUSIVE, (
            f"The model is right on {clean:.1%} of clean images, near chance ({chance:.1%}): there "
            "is no robustness to judge; check data, labels and preprocessing."
        )
    # FGSM alone is weak: an undefended model may keep some accuracy under it. Only where it
    # leaves half does it look like a defence.
    looks = max(
        claims["fgsm"] if claims["fgsm"] >= 0.5 * clean else 0.0,
        claims["pgd-10"] if claims["pgd-10"] > floor else 0.0,
    )
    name = max(claims, key=lambda k: claims[k])
    claimed = f"{claims[name]:.1%} under {name.upper()}"
    # Where nothing is wrong with the gradients, a claim that does not hold is only a weak one.
    if flags and high < 0.5 * looks:
        return PSEUDO, (
            f"The model only looks robust: {claimed}, but {found:.1%} withstand all attacks; "
            f"{seen}."
        )
    if flags and found < 0.5 * looks:
        return INCONCLUSIVE, (
            f"{claimed}, but {found:.1%} withstand all attacks ({100 * low:.0f} to "
            f"{100 * high:.0f}% at 95%): about half of what the model claims, too close to tell on "
            "so few images: give more with --n."
        )
    # An undefended model may be hidden well enough that nothing here broke it.
    doubt = [c.title.lower() for c in checks if c.flagged and _decisive(c, n)]
    if blind > 0.1:
        doubt.append(f"no gradient on {blind:.0%} of the images")
    if (missed := _missed(checks, n)) > _MISSED:
        doubt.append(f"{missed:.0%} of the images or more fall to attacks without gradients alone")
    if found > floor and doubt:
        more = {"quick": "standard", "standard": "thorough"}.get(budget)
        advice = f"--budget {more}" if more else "an attack written for this model"
        return INCONCLUSIVE, (
            f"{found:.1%} withstood everything tried, but gradient attacks are blind here "
            f"({', '.join(doubt)}): {advice} would decide."
        )
    if low > floor:
        return ROBUST, (
            f"The model is robust: {found:.1%} of the images withstand all attacks, {clean:.1%} "
            f"are right clean; {seen}."
        )
    if high > floor:
        return INCONCLUSIVE, (
            f"{found:.1%} withstand all attacks ({100 * low:.0f} to {100 * high:.0f}% at 95%), too "
            f"close to chance ({chance:.1%}) to tell on so few images: give more with --n."
        )
    return NOT_ROBUST, (
        f"The model is not robust: {found:.1%} withstand all attacks, of {clean:.1%} that are "
        f"right clean; {seen}."
    )


def _decisive(check: Check, n: int) -> bool:
    """Tell whether a check that flags says that gradient attacks mean nothing here."""
    if check.name in _BY_COUNT:
        return check.value is not None and round(check.value * n) >= _FEW
    # Without gradients, what attacks by gradients leave says nothing.
    return check.name == "broken-gradients"


def _missed(checks: list[Check], n: int) -> float:
    """Return the share of images, at least, that an attack without gradients breaks alone."""
    counts = [
        count
        for check in checks
        if check.name == "black-box-beats-white-box" and check.flagged
        for count in check.evidence.get("broken only by it", {}).values()
    ]
    return wilson_interval(max(counts), n)[0] if counts else 0.0


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
