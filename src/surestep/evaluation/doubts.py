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
from surestep.attacks.core import NoGradient, in_parts, input_gradient, misclassified, share_of
from surestep.attacks.inputs import forward_logits
from surestep.attacks.lending import attacking
from surestep.devices import exact, finest
from surestep.evaluation import suite
from surestep.evaluation.adapt import Adapted
from surestep.threat import ThreatModel

LOOKED_AT = 96
"""Images, right as they are, that are looked at."""
BY_CHANCE = 3
"""Images by which two attacks may differ by chance: fewer say nothing."""
BEATEN = 0.005
"""Share of images by which one step may do better than many."""
MISSED = 0.02
"""Share of images that may be without a gradient, or fall to an attack without gradients alone."""
SAME = 1e-4
"""How far apart, in length one, the logits of two passes may be."""
_MANY = 10  # steps, which one step is not to beat


def of_model(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    attacks: Sequence[str],
    batch_size: int,
) -> list[str]:
    """Say in words what may blind gradient attacks on a model.

    Args:
        model: pixels in, logits out, in eval mode.
        x: images (N, ...) that are right as they are.
        y: labels (N,).
        threat: norm, radius and data range.
        attacks: by name. Where none follows the gradient, that is not looked at; where some went
            straight through layers that know such a way, it is, too.
        batch_size: of the passes.
    """
    found = []
    with torch.no_grad(), exact(x.device):
        first, second = (
            in_parts(batch_size, lambda z: forward_logits(model, z), x) for _ in range(2)
        )
    if not apart(first, second) <= SAME:
        found.append("the model is random, and each point was judged by a single draw")
    if are_probabilities(first):
        found.append("it returns probabilities, whose gradients vanish where it is sure")
    if any(map(suite.follows, attacks)):
        bpda = any(name.endswith("-bpda") for name in attacks)

        def flat(z: Tensor, labels: Tensor) -> Tensor:
            try:
                return is_flat(input_gradient(model, z, labels)[0])
            except NoGradient:
                return torch.ones(len(z), dtype=torch.bool)

        with straight_through(model) if bpda else nullcontext():
            places = (x, threat.random_start(x))
            blind = [in_parts(batch_size, flat, place, y) for place in places]
        count = max(int(some.sum()) for some in blind)
        if count >= BY_CHANCE and count > MISSED * len(x):
            found.append(f"no gradient reaches {count} of {len(x)} images looked at")
    return found


def of_sources(sources: Sequence[nn.Module], x: Tensor, y: Tensor, batch_size: int) -> list[str]:
    """Say in words which models for the transfer attack are wrong on most images themselves.

    Args:
        sources: pixels in, logits out; maybe not in eval mode.
        x: images (N, ...) that are right as they are.
        y: labels (N,).
        batch_size: of the passes.

    Raises:
        UserError: one fails on such images, or returns no logits.
    """
    found = []
    for number, source in enumerate(sources, 1):
        with attacking(Adapted(source)) as inner, torch.no_grad():
            out = in_parts(batch_size, lambda z, inner=inner: forward_logits(inner, z), x)
        right = share_of(~misclassified(out, y))
        if right < 0.5:
            found.append(
                f"source {number} of the transfer attack is right on {right:.0%} of the images (it "
                "may want normalised ones), so that its points say little"
            )
    return found


def of_results(right: Mapping[str, Tensor], square: int | None = None) -> list[str]:
    """Say in words where what attacks left shows that gradients mislead.

    Args:
        right: which images (N,) were right "clean", and by attack.
        square: how many images AutoAttack's Square broke of those that gradients had left.
    """
    steps = {name: suite.ascent(name) for name in right}
    one = [right[name] for name, taken in steps.items() if taken == 1]
    many = [right[name] for name, taken in steps.items() if taken and taken >= _MANY]
    found: list[str] = []
    n = len(right["clean"])
    if one and many:
        more = _fewest(many) - _fewest(one)
        if more >= BY_CHANCE and more > BEATEN * n:
            found.append("one step breaks more images than many")
    alone = {} if square is None else {"autoattack's square": square}
    seeing = {name: right[name] for name in right if suite.follows(name)}
    # Nobody says that one step finds all there is.
    if any(steps[name] != 1 for name in seeing):
        left = torch.stack(list(seeing.values())).all(0)
        alone |= {k: int((left & ~right[k]).sum()) for k, taken in steps.items() if taken == 0}
    for name, count in alone.items():
        # Random points find next to nothing; a search by answers alone finds a few.
        if count >= BY_CHANCE and (name.startswith("noise") or count > MISSED * n):
            found.append(f"{name} breaks {count:,} images that gradients do not")
    return found


def apart(first: Tensor, second: Tensor) -> float:
    """Return how far apart two passes' logits (N, K) are at most, brought to length one.

    What is not finite must be so in the same places.
    """
    whole = first.isfinite()
    if not whole.equal(second.isfinite()):
        return float("inf")
    one, two = (F.normalize(z.where(whole, 0).to(finest(z.device)), dim=1) for z in (first, second))
    return (one - two).norm(dim=1).max().item()


def are_probabilities(out: Tensor) -> bool:
    """Tell whether all of a model's outputs (N, K) lie in [0, 1] and sum to 1 within 1e-5."""
    inside = bool(out.min() >= 0 and out.max() <= 1)
    return inside and bool((out.sum(1) - 1).abs().max() <= 1e-5)


def is_flat(grad: Tensor) -> Tensor:
    """Tell which images (N,) have a gradient (N, ...) of zeros, or of NaN in a tenth of it.

    An attack can go nowhere by it, or not there.
    """
    flat = grad.flatten(1)
    return flat.eq(0).all(1) | (flat.isnan().float().mean(1) >= 0.1)


def _fewest(left: Sequence[Tensor]) -> int:
    return min(int(one.sum()) for one in left)
