"""Accuracy under attack, for anybody's model and data."""

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

from surestep.activations import with_a_way_through
from surestep.attacks.lending import attacking, device_of, forked_rng, seed_everything
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
from surestep.threat import ThreatModel
from surestep.threat import check as check_threat

_ASKED_ABOUT = 1000  # images that a substitute is trained on


def evaluate(
    model: nn.Module,
    data: Images | tuple[Tensor, Tensor] | Dataset | DataLoader,
    threat: ThreatModel,
    attacks: Sequence[str] | Mapping[str, suite.Attack] | None = None,
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
    attack when it is right clean and at the attack's point. Only images that are right clean are
    attacked, cheap attacks first; AutoAttack only attacks what the others left, which cannot
    change the worst case. The global random state is left as it was.

    Args:
        model: returns logits (N, K) for images in the threat model's range; alone, or first in a
            tuple, or as "logits" in a dict.
        data: a pair of tensors (x, y), a Dataset or a DataLoader of such pairs.
        threat: norm, radius and data range.
        attacks: names, see ``surestep.evaluation.suite``, or ``suite.Attack`` by name; by default
            those of the budget. Where layers know a way straight through them (MeanSparse), each
            name that follows the gradient runs a second time as "NAME-bpda".
        budget: "quick", "standard" or "thorough"; without ``attacks``.
        batch_size: of the attacks.
        n: only n images: the first ones; of tensors that are sorted by class, and of a Dataset,
            n drawn from all, always the same. All by default. Warns where a DataLoader's first n
            images share one class.
        seed: of the random starts.
        eps: further radii, for the curve of accuracy against eps.
        precision: bfloat16 or float16 crafts the perturbations under autocast. Whether a point is
            misclassified is decided in float32 in any case.
        preprocess: what the model needs done to the pixels first, such as ``models.Normalize``.
        sources: models whose points the "transfer" attack tries, which take the same pixels (what
            normalises is inside); without any, a small one is trained on the model's own answers.
        state: progress file; given again after a stop, the evaluation continues from there and
            ends with the same numbers.
        progress: called after each batch with images done, images in all (0 if unknown) and the
            worst-case accuracy so far.
        tell: called with a few words when an attack begins on a batch.
        doubt: look for signs that gradients say little of this model, at the price of a few passes
            over 96 images, and warn of them unless nothing is left.

    Raises:
        UserError: unknown attack or budget, no data, a state of another evaluation, or images,
            labels or model that cannot be judged.
    """
    check_threat(threat)
    attacks = [attacks] if isinstance(attacks, str) else attacks
    if isinstance(attacks, Mapping) and (taken := {"clean", "worst case"} & set(attacks)):
        raise UserError(f"{min(taken)!r} is what is found without attacks, and of all: rename it")
    if isinstance(attacks, Mapping) and eps:
        raise UserError("eps takes attacks by name: an Attack is made for one radius")
    names = suite.budget(budget) if attacks is None else attacks
    if not isinstance(names, Mapping) and with_a_way_through(model):
        names = suite.and_through(names)
    radii = [threat.with_eps(e) for e in eps]
    device, start = device_of(model), time.perf_counter()
    given = list(sources)  # a substitute follows from the rest, but for the last digits
    judged = Adapted(model, preprocess)
    advice = f"lower batch_size ({batch_size})"
    if "transfer" in names and not isinstance(names, Mapping) and not sources:
        with forked_rng(device), memory_for("the substitute", advice):
            sources = _stand_in(judged, data, batch_size, threat, seed)

    def at(radius: ThreatModel, place: str | Path | None) -> Evaluation:
        by_name = (
            dict(names) if isinstance(names, Mapping) else suite.parse_all(names, radius, sources)
        )
        settings = {
            "version": 2,
            "attacks": list(by_name),
            "threat": radius.to_dict(),
            "batch_size": batch_size,
            "n": n,
            "seed": seed,
            "precision": str(precision),
        }
        if place is not None:
            settings |= _digests(model, preprocess, given)
        judge = Judge(judged, radius, by_name, seed, precision, State(place, settings), tell)
        with (
            contextlib.closing(judge.state),
            attacking(judged),
            forked_rng(device),
            memory_for("an attack", advice),
        ):
            seed_everything(seed)
            batches, total = batches_of(data, batch_size, n, device, radius.bounds)
            for x, y in batches:
                judge.batch(x, y)
                if progress:
                    progress(judge.done, total, judge.survivors / judge.done)
            if doubt and radius is threat:
                judge.look(given if "transfer" in names else [], batch_size)
        return judge.result()

    whole = at(threat, state)
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
    for radius in radii:
        place = None if state is None else f"{state}.eps-{radius.eps:g}"
        curve.append(_row(radius, whole if radius.eps == threat.eps else at(radius, place)))
    return replace(whole, curve=curve, seconds=time.perf_counter() - start)


def _stand_in(
    model: nn.Module, data: Any, batch_size: int, threat: ThreatModel, seed: int
) -> list[nn.Module]:
    """Train a substitute on what the model answers to the first images; none without any."""
    seed_everything(seed)
    batches, _ = batches_of(data, batch_size, _ASKED_ABOUT, device_of(model), threat.bounds)
    shown = [x for x, _ in batches]
    return [substitute(model, torch.cat(shown), threat, seed)] if shown else []


def _digests(
    model: nn.Module, preprocess: nn.Module | None, sources: Sequence[nn.Module]
) -> dict[str, Any]:
    """Tell the models of an evaluation from others, for its state."""
    return {
        "model": model_digest(model),
        "preprocess": "none" if preprocess is None else model_digest(preprocess),
        "sources": [model_digest(source) for source in sources],
    }


def _row(threat: ThreatModel, found: Evaluation) -> dict[str, Any]:
    kept = ("clean_accuracy", "robust_accuracy", "worst_case_accuracy", "n")
    return {"eps": threat.eps, **{name: getattr(found, name) for name in kept}}
