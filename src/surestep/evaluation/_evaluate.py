"""Accuracy under attack, for any model and data."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from surestep.activations import straight_through_layers
from surestep.attacks import auto
from surestep.attacks.lending import attacking, check_module, device_of
from surestep.data import Images
from surestep.devices import memory_for
from surestep.errors import SurestepWarning, UserError
from surestep.evaluation import suite
from surestep.evaluation._state import State, model_digest
from surestep.evaluation.adapt import Adapted
from surestep.evaluation.batches import batches_of, warn_of_one_class
from surestep.evaluation.judge import Judge
from surestep.evaluation.result import Evaluation
from surestep.evaluation.substitute import substitute
from surestep.randomness import forked_rng, seed_everything
from surestep.threat import ThreatModel, check_threat

_ASKED_ABOUT = 1000  # images that a substitute is trained on


def evaluate(
    model: nn.Module,
    data: Images | tuple[Tensor, Tensor] | Dataset | DataLoader,
    threat: ThreatModel,
    attacks: Sequence[str] | Mapping[str, suite.Attack | suite.AttackFn] | None = None,
    *,
    budget: str = "standard",
    batch_size: int = 500,
    n: int | None = None,
    seed: int = 0,
    eps: Sequence[float] = (),
    precision: torch.dtype = torch.float32,
    preprocess: nn.Module | None = None,
    sources: Sequence[nn.Module] = (),
    state: str | Path | None = None,
    progress: Callable[[int, int, float], None] | None = None,
    tell: Callable[[str], None] | None = None,
    doubt: bool = True,
) -> Evaluation:
    """Measure clean accuracy and accuracy under each attack.

    The model is judged in eval mode and left as it was found. An image counts as robust to an
    attack if the model is right both on the clean image and at the attack's point. Only images
    that are right clean are attacked, cheap attacks first; AutoAttack attacks only what the others
    left, which cannot change the worst case. The global random state is left as it was.

    Args:
        model: returns logits (N, K) for images in the threat model's range; alone, or first in a
            tuple, or as "logits" in a dict.
        data: a pair of tensors (x, y), a Dataset or a DataLoader of such pairs.
        threat: norm, radius and data range.
        attacks: names, see ``surestep.evaluation.suite``, or a ``suite.Attack`` or a function of
            (model, x, y) that returns x_adv, by name; its points are projected to the ball. By
            default the attacks of the budget. If the model has layers with a straight-through
            gradient (MeanSparse), each name that uses the gradient also runs as "NAME-bpda".
        budget: "quick", "standard" or "thorough"; ignored if ``attacks`` is given.
        batch_size: number of images attacked at a time.
        n: number of images, all by default: the first n; of tensors that are sorted by class, and
            of a Dataset, n drawn from all, always the same. Warns if a DataLoader's first n images
            share one class.
        seed: of everything that attacks draw at random.
        eps: further radii, for the curve of accuracy against eps.
        precision: bfloat16 or float16 crafts the perturbations under autocast. Whether a point is
            misclassified is decided in float32 in any case.
        preprocess: applied to the pixels before the model, such as ``models.Normalize``.
        sources: models on which the "transfer" attack makes its points; they take the same pixels,
            with any normalisation inside. Without sources, a small model is trained on the judged
            model's answers.
        state: progress file; given again after a stop, the evaluation continues from there and
            ends with the same numbers.
        progress: called before each attack on a batch, and after the batch, with the number of
            images done, of all images (0 if unknown) and the worst-case accuracy so far. Of the
            batch it counts the share of the work that is done.
        tell: called with a few words when an attack begins on a batch.
        doubt: look for signs that attacks are misled by this model, which costs a few passes over
            96 images, and warn of them unless nothing is left. Without, ``doubts`` is None.

    Raises:
        UserError: no or an unknown attack or budget, no data, a state file of another evaluation or
            one that is in use, or images, labels or a model that cannot be judged.
    """
    check_module(model)
    check_threat(threat)
    if isinstance(eps, float | int):
        raise UserError(
            f"eps {eps:g} is a number, expected a list of further radii: the radius is threat's"
        )
    other_radii = [threat.with_eps(e) for e in eps]
    device, start = device_of(model), time.perf_counter()
    user_sources = list(sources)
    # An audit passes an adapted model: adapting it again would cast the pixels before they are
    # normalised.
    adapted = preprocess is None and any(isinstance(part, Adapted) for part in model.modules())
    judged = model if adapted else Adapted(model, preprocess)
    advice = f"lower batch_size ({batch_size})"
    if isinstance(attacks, Mapping):
        by_name = _own_attacks(attacks, eps)
    else:
        names = _names(attacks, budget, model)
        if "transfer" in names and not sources:
            with forked_rng(device), memory_for("the substitute", advice):
                sources = _substitute_for(judged, data, batch_size, threat, seed)
        by_name = suite.parse_all(names, threat, sources)
    # Without the substitute: it follows from the rest, except for the last digits.
    digests = {} if state is None else _digests(model, preprocess, user_sources)

    def attack_within(
        radius: ThreatModel, attacks: dict[str, suite.Attack], path: str | Path | None
    ) -> Judge:
        settings = {
            "version": 3,
            "attacks": list(attacks),
            "threat": radius.to_dict(),
            "batch_size": batch_size,
            "n": n,
            "seed": seed,
            "precision": str(precision),
            **digests,
        }
        kept = State(path, settings)
        judge = Judge(judged, radius, attacks, seed, precision, kept, tell, progress)
        with contextlib.closing(kept):
            seed_everything(seed)
            batches, judge.total = batches_of(data, batch_size, n, device, radius.bounds)
            for x, y in batches:
                judge.run_batch(x, y)
        return judge

    with attacking(judged), forked_rng(device), memory_for("an attack", advice):
        judge = attack_within(threat, by_name, state)
        if doubt:
            judge.look_for_doubts(user_sources if "transfer" in by_name else [], batch_size)
        whole = judge.result()
        if whole.doubts and whole.worst_case_accuracy > 0:
            warnings.warn(
                f"the worst case of {whole.worst_case_accuracy:.1%} may be too high: "
                f"{'; '.join(whole.doubts)}. An audit looks closer",
                SurestepWarning,
                stacklevel=2,
            )
        if n is not None:
            warn_of_one_class({row["label"]: row["n"] for row in whole.per_class}, stacklevel=2)
        curve = []
        for radius in other_radii:
            found = whole
            if radius.eps != threat.eps:
                again = suite.parse_all(by_name, radius, sources)
                path = None if state is None else f"{state}.eps-{radius.eps:g}"
                found = attack_within(radius, again, path).result()
            curve.append(_row(radius, found))
    return replace(whole, curve=curve, seconds=time.perf_counter() - start)


def _own_attacks(
    attacks: Mapping[str, suite.Attack | suite.AttackFn], eps: Sequence[float]
) -> dict[str, suite.Attack]:
    """Return attacks that were not given as names, with plain functions wrapped."""
    made = suite.as_attacks(attacks)
    if taken := {"clean", "worst case"} & made.keys():
        raise UserError(
            f"an attack cannot be called {min(taken)!r}, a name the result needs: rename it"
        )
    # RobustBench's entries take the accuracy under these names.
    for name in sorted({"autoattack", "autoattack-bpda"} & made.keys()):
        run = made[name].run
        if not isinstance(run, Mapping) or run.keys() != auto.PARTS.keys():
            raise UserError(f"{name!r} means the four attacks of AutoAttack: rename your own")
    if eps:
        raise UserError("eps takes attacks by name: an Attack is made for one radius")
    return made


def _names(attacks: str | Sequence[str] | None, budget: str, model: nn.Module) -> list[str]:
    """Return the names of the attacks, also of those straight through layers."""
    if attacks is None:
        names = list(suite.budget(budget))
    else:
        names = [attacks] if isinstance(attacks, str) else list(attacks)
        suite.check_names(names)
    return suite.with_bpda(names) if straight_through_layers(model) else names


def _substitute_for(
    model: nn.Module, data: Any, batch_size: int, threat: ThreatModel, seed: int
) -> list[nn.Module]:
    """Train a substitute on the model's answers to the first images."""
    seed_everything(seed)
    batches, _ = batches_of(data, batch_size, _ASKED_ABOUT, device_of(model), threat.bounds)
    shown = [x for x, _ in batches]
    if not shown:
        raise UserError("there is no image to evaluate on")
    return [substitute(model, torch.cat(shown), threat, seed)]


def _digests(
    model: nn.Module, preprocess: nn.Module | None, sources: Sequence[nn.Module]
) -> dict[str, Any]:
    """Return digests of the models of an evaluation, for its state."""
    return {
        "model": model_digest(model),
        "preprocess": "none" if preprocess is None else model_digest(preprocess),
        "sources": [model_digest(source) for source in sources],
    }


def _row(threat: ThreatModel, found: Evaluation) -> dict[str, Any]:
    kept = ("clean_accuracy", "robust_accuracy", "worst_case_accuracy", "n")
    return {"eps": threat.eps, **{name: getattr(found, name) for name in kept}}
