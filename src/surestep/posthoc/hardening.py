"""Harden a trained model, judged by attacks that its masked gradients do not stop."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from surestep.attacks.lending import device_of, uncompiled
from surestep.clock import each_minute
from surestep.data import Images, as_images
from surestep.devices import memory_for
from surestep.errors import UserError
from surestep.evaluation import evaluate
from surestep.posthoc.mean_sparse import insert, layers, measure, set_statistics
from surestep.threat import ThreatModel

THRESHOLDS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4)
ATTACKS = ("apgd-ce", "pgd-50-margin", "square-1000")
"""An evaluation also runs the first two with straight-through gradients; Square uses none."""
JUDGES = (*ATTACKS, "transfer")
"""Attacks on the result: "transfer" adds points crafted on the original, unmasked model."""
_TOLD = ("clean_accuracy", "worst_case_accuracy", "n", "robust_accuracy")


@dataclass(frozen=True)
class Hardened:
    """The result of hardening.

    Attributes:
        model: a copy of the model, with ``MeanSparse`` layers.
        threshold: the selected threshold, in standard deviations; 0 if none helped.
        search: a row per threshold tried: accuracies on the validation images and their number.
    """

    model: nn.Module
    threshold: float
    search: list[dict[str, Any]]


def harden(
    model: nn.Module,
    train: Images | tuple[Tensor, Tensor],
    validation: Any,
    threat: ThreatModel,
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    attacks: Sequence[str] = ATTACKS,
    n: int | None = 500,
    seed: int = 0,
    batch_size: int = 500,
    progress: Callable[[dict[str, Any]], None] | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Hardened:
    """Sparsify activations around their means, with the threshold that withstands attacks best.

    Args:
        model: a trained model without MeanSparse layers, which is left unchanged.
        train: images in memory over which means and standard deviations are measured.
        validation: images on which the threshold is selected; never test images.
        threat: norm, radius and data range.
        thresholds: thresholds to try; 0 is always tried, and the smallest wins a tie.
        attacks: names of attacks; gradient attacks run twice, see ``surestep.evaluate``.
        n: use only the first n validation images; None uses all.
        seed: seed of the attacks.
        batch_size: number of images in a pass or an attack.
        progress: called with each row of the search.
        tell: called about once a minute with a few words on the attack that begins.

    Raises:
        UserError: the model has no activation modules or is hardened already, a threshold is
            negative or not finite, or memory is full.
    """
    if not all(math.isfinite(t) and t >= 0 for t in thresholds):
        raise UserError(
            f"thresholds {list(thresholds)}: give finite standard deviations >= 0, such as 0.2"
        )
    dense = uncompiled(model)
    if layers(dense):
        raise UserError("the model has MeanSparse layers already: harden the one without them")
    train = as_images(train)
    with memory_for("measuring activations", f"lower batch_size ({batch_size})"):
        statistics = measure(dense, train, batch_size)
    image = train.pixels(slice(0, 1)).to(device_of(dense))
    model = insert(copy.deepcopy(dense), image, 0.0)
    options: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "tell": each_minute(tell)}
    set_statistics(model, statistics)
    rows = []
    for threshold in sorted({0.0, *thresholds}):
        for layer in layers(model):
            layer.threshold = threshold
        found = evaluate(
            model, validation, threat, attacks, n=n, sources=[dense], doubt=False, **options
        )
        rows.append({"threshold": threshold, **{name: getattr(found, name) for name in _TOLD}})
        if progress:
            progress(rows[-1])
    best = max(rows, key=lambda row: row["worst_case_accuracy"])["threshold"]
    for layer in layers(model):
        layer.threshold = best
    return Hardened(model, best, rows)
