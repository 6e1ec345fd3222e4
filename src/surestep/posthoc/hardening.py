"""Hardening a trained model, judged by attacks that its masked gradients do not stop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surestep.activations import straight_through
from surestep.attacks.core import device_of, share_of, uncompiled
from surestep.data import Images
from surestep.errors import UserError
from surestep.evaluation import Evaluation, evaluate, suite
from surestep.posthoc.mean_sparse import insert, layers, measure, set_statistics
from surestep.threat import ThreatModel

THRESHOLDS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4)
ATTACKS = ("apgd-ce", "pgd-50-margin", "square-1000")
"""With true gradients and with straight-through ones; Square needs none."""
JUDGES = (*ATTACKS, "transfer")
"""Of the result: also the points of the model as it was, whose gradients are whole."""


@dataclass(frozen=True)
class Judged:
    """How a model with dead zones withstood attacks.

    Attributes:
        clean_accuracy: share of images right as they are.
        worst_case_accuracy: share that no attack broke, neither with the true gradients nor with
            straight-through ones, per image.
        n: number of images.
        robust_accuracy: by attack; names that end in "-bpda" had straight-through gradients.
        right: which images withstood everything (n,).
    """

    clean_accuracy: float
    worst_case_accuracy: float
    n: int
    robust_accuracy: dict[str, float]
    right: Tensor

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers."""
        return {k: v for k, v in vars(self).items() if k != "right"}


@dataclass(frozen=True)
class Hardened:
    """What hardening gave.

    Attributes:
        model: with ``MeanSparse`` layers, a copy.
        threshold: the one taken, in standard deviations; 0 if none helped.
        search: of each threshold tried, accuracies on the validation images.
    """

    model: nn.Module
    threshold: float
    search: list[dict[str, Any]]


def judge(
    model: nn.Module, data: Any, threat: ThreatModel, attacks: Sequence[str], **options: Any
) -> Judged:
    """Attack a model with its true gradients and, if it has dead zones, with straight-through ones.

    Args:
        model: with or without ``MeanSparse`` layers.
        data: as for ``surestep.evaluate``.
        threat: norm, radius and data range.
        attacks: names of attacks.
        options: of ``surestep.evaluate``: n, seed, batch_size, sources.
    """
    found: list[tuple[str, Evaluation]] = [("", evaluate(model, data, threat, attacks, **options))]
    with_gradients = suite.with_gradients(attacks)
    if layers(model) and with_gradients:
        with straight_through(model):
            found.append(("-bpda", evaluate(model, data, threat, with_gradients, **options)))
    right = torch.stack([found[0][1].right["worst case"], found[-1][1].right["worst case"]]).all(0)
    return Judged(
        found[0][1].clean_accuracy,
        share_of(right),
        found[0][1].n,
        {f"{k}{kind}": v for kind, one in found for k, v in one.robust_accuracy.items()},
        right,
    )


def harden(
    model: nn.Module,
    train: Images,
    validation: Any,
    threat: ThreatModel,
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    attacks: Sequence[str] = ATTACKS,
    n: int | None = 500,
    seed: int = 0,
    batch_size: int = 500,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> Hardened:
    """Sparsify activations around their means by the threshold that withstands attacks best.

    Args:
        model: trained; is left as it was.
        train: the images that means and deviations are taken over.
        validation: the images that the threshold is chosen on; never test images.
        threat: norm, radius and data range.
        thresholds: to try; of equal worst cases the smallest wins, and 0 is always tried.
        attacks: names; each with a gradient is run twice, see ``judge``.
        n: only the first n validation images.
        seed: of the attacks.
        batch_size: of the attacks.
        progress: called with each row of the search.

    Raises:
        UserError: no activation modules, or a negative threshold.
    """
    if any(t < 0 for t in thresholds):
        raise UserError(f"thresholds {list(thresholds)}: give deviations >= 0, such as 0.2")
    dense = uncompiled(model)
    statistics = measure(dense, train)
    image = train.pixels(slice(0, 1)).to(device_of(dense))
    model = insert(copy.deepcopy(dense), image, 0.0)
    options = {"seed": seed, "batch_size": batch_size}
    set_statistics(model, statistics)
    rows = []
    for threshold in sorted({0.0, *thresholds}):
        for layer in layers(model):
            layer.threshold = threshold
        found = judge(model, validation, threat, attacks, n=n, sources=[dense], **options)
        rows.append({"threshold": threshold, **found.to_dict()})
        if progress:
            progress(rows[-1])
    best = max(rows, key=lambda row: row["worst_case_accuracy"])["threshold"]
    for layer in layers(model):
        layer.threshold = best
    return Hardened(model, best, rows)
