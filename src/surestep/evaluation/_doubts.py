"""Signs that a worst case is too high: gradients that say little of the model.

Attacks that cannot see leave images right that others would break. To look here costs a few
passes; an audit looks closer, and attacks what it finds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surestep.activations import straight_through
from surestep.attacks.core import NoGradient, input_gradient, misclassified, share_of
from surestep.attacks.inputs import forward_logits
from surestep.attacks.lending import attacking, forked_rng
from surestep.devices import finest
from surestep.evaluation.adapt import Adapted
from surestep.evaluation.suite import Gradients
from surestep.threat import ThreatModel

LOOKED_AT = 100
"""Images of the first batch, right as they are, that are looked at."""
BY_CHANCE = 3
"""Images by which two attacks may differ by chance: fewer say nothing."""
BEATEN = 0.005
"""Share of images by which one step may do better than many."""
MISSED = 0.02
"""Share of images that may be without a gradient, or fall to an attack without gradients alone."""


def of_model(
    model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, *, through: bool = False
) -> list[str]:
    """Say in words what may blind gradient attacks on a model.

    Args:
        model: pixels in, logits out, in eval mode.
        x: images (N, ...) that are right as they are.
        y: labels (N,).
        threat: norm, radius and data range.
        through: attacks went straight through layers that know such a way.
    """
    found = []
    with forked_rng(x.device), straight_through(model) if through else nullcontext():
        with torch.no_grad():
            first, second = (forward_logits(model, x) for _ in range(2))
        if not apart(first, second) <= SAME:
            found.append("the model is random, and each point was judged by a single draw")
        if are_probabilities(first):
            found.append("it returns probabilities, whose gradients vanish where it is sure")
        blind = max(_blind_share(model, z, y) for z in (x, threat.random_start(x)))
    if blind > MISSED:
        found.append(f"no gradient reaches {blind:.0%} of {len(x)} images looked at")
    return found


def of_sources(sources: Sequence[nn.Module], x: Tensor, y: Tensor) -> list[str]:
    """Say in words which models for the transfer attack are wrong on most images themselves.

    Args:
        sources: pixels in, logits out; maybe not in eval mode.
        x: images (N, ...) that are right as they are.
        y: labels (N,).

    Raises:
        UserError: one fails on such images, or returns no logits.
    """
    found = []
    for number, source in enumerate(sources, 1):
        with attacking(Adapted(source)) as inner, torch.no_grad():
            right = share_of(~misclassified(forward_logits(inner, x), y))
        if right < 0.5:
            found.append(
                f"source {number} of the transfer attack is right on {right:.0%} of the images (it "
                "may want normalised ones), so that its points say little"
            )
    return found


def of_results(
    right: Mapping[str, Tensor], gradients: Mapping[str, Gradients], square: int | None = None
) -> list[str]:
    """Say in words where what attacks left shows that gradients mislead.

    Args:
        right: which images (N,) were right "clean", and by attack.
        gradients: how many an attack follows, by its name; of others nothing is said.
        square: how many images AutoAttack's Square broke of those that gradients had left.
    """
    one, many, none = (
        {name: right[name] for name in gradients if gradients[name] == kind}
        for kind in ("one", "many", "none")
    )
    found: list[str] = []
    n = len(right["clean"])
    alone = {} if square is None else {"autoattack's square": square}
    if many:
        fewest = [min(int(left.sum()) for left in some.values()) for some in (many, one or many)]
        if fewest[0] - fewest[1] >= max(BY_CHANCE, BEATEN * n):
            found.append("one step breaks more images than many")
        seeing = torch.stack([*one.values(), *many.values()]).all(0)
        alone |= {name: int((seeing & ~left).sum()) for name, left in none.items()}
    for name, count in alone.items():
        # Random points find next to nothing; a search by answers alone finds a few.
        if count >= BY_CHANCE and (name.startswith("noise") or count > MISSED * n):
            found.append(f"{name} breaks {count:,} images that gradients do not")
    return found


SAME = 1e-4
"""How far apart, in length one, the logits of two passes may be."""


def apart(first: Tensor, second: Tensor) -> float:
    """Return how far apart two passes' logits (N, K) are at most, brought to length one."""
    one, two = (F.normalize(z.to(finest(z.device)), dim=1) for z in (first, second))
    return (one - two).norm(dim=1).max().item()


def are_probabilities(out: Tensor) -> bool:
    """Tell whether all of a model's outputs (N, K) lie in [0, 1] and sum to 1 within 1e-5."""
    inside = bool(out.min() >= 0 and out.max() <= 1)
    return inside and bool((out.sum(1) - 1).abs().max() <= 1e-5)


def is_flat(grad: Tensor) -> Tensor:
    """Tell which images (N,) have a gradient (N, ...) that says nothing: zero, or NaN, all over."""
    return grad.nan_to_num(0).flatten(1).eq(0).all(1)


def _blind_share(model: nn.Module, x: Tensor, y: Tensor) -> float:
    try:
        return share_of(is_flat(input_gradient(model, x, y)[0]))
    except NoGradient:
        return 1.0
