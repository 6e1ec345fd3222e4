"""Signs that a worst case is too high, such as gradients that say little about the model.

Attacks that follow misleading gradients, or attack another function than the one that is judged,
leave images right that other attacks would break. Looking for signs of that costs a few passes; an
audit looks closer, and attacks what it finds.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from surestep.activations import straight_through
from surestep.attacks.gradients import NoGradient, input_gradient
from surestep.attacks.inputs import forward_logits
from surestep.attacks.lending import attacking
from surestep.attacks.outcomes import map_batches, misclassified, passes_agree, share_of
from surestep.devices import autocast, exact, finest
from surestep.evaluation import suite
from surestep.evaluation.adapt import Adapted, seeds_of
from surestep.threat import ThreatModel

LOOKED_AT = 96
"""Number of correctly classified clean images that are looked at."""
BY_CHANCE = 3
"""Fewest images that mean something: two attacks may differ on fewer by chance."""
BEATEN = 0.005
"""Share of images by which one step may do better than many."""
MISSED = 0.02
"""Share of images that may lack a gradient, or that only an attack without gradients may break."""
ROUNDED, ROUNDED_IN_HALF = 0.01, 0.05
"""Largest relative distance between logits that were computed in another order: in batches of
another size, with gradients on, or on another machine. The second is for 16-bit weights."""
BATCH_DEPENDENT = "an image's logits depend on the other images of its batch"
OTHER_WITH_GRADIENTS = (
    "it answers differently when gradients are on, so attacks climb another function"
)
_MANY = 10  # steps: an attack of so many should find more than a single step


def of_model(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    attacks: Collection[suite.Attack],
    batch_size: int,
) -> list[str]:
    """Describe what may mislead attacks on a model.

    Args:
        model: pixels in, logits out, in eval mode.
        x: images (N, ...) that are right as they are.
        y: labels (N,).
        threat: norm, radius and data range.
        attacks: gradients are looked at only if one of them uses these, and straight through layers
            if one went so.
        batch_size: of the passes.
    """
    uses_gradient = any(attack.uses_gradient for attack in attacks)
    first = logits(model, x, batch_size)
    found = _of_passes(model, x, first, batch_size, uses_gradient)
    if seeds := seeds_of(model):
        found.append(
            f"its forward seeds the random generator of {' and '.join(seeds)}, so what it draws is "
            "the same in every pass"
        )
    if are_probabilities(model, first):
        found.append("it returns probabilities, whose gradients vanish where it is sure")
    if uses_gradient:

        def flat(z: Tensor, labels: Tensor) -> Tensor:
            try:
                return is_flat(input_gradient(model, z, labels)[0])
            except NoGradient:
                return torch.ones(len(z), dtype=torch.bool)

        bpda = any(attack.bpda for attack in attacks)
        with straight_through(model) if bpda else nullcontext():
            places = (x, threat.random_start(x))
            blind = [map_batches(batch_size, flat, place, y) for place in places]
        count = max(int(some.sum()) for some in blind)
        if count >= BY_CHANCE and count > MISSED * len(x):
            found.append(f"no gradient reaches {count} of {len(x)} images looked at")
    return found


def _of_passes(
    model: nn.Module, x: Tensor, first: Tensor, batch_size: int, uses_gradient: bool
) -> list[str]:
    """Describe in what respect other passes over the images x do not give the ``first`` logits.

    Where gradients are on and each image stands in another batch, most models give the same
    logits, so that one pass settles it.
    """
    if passes_agree(first, regrouped(model, x, batch_size, gradients=uses_gradient)):
        return []
    if not passes_agree(first, logits(model, x, batch_size)):
        return ["the model is random, and each point was judged by a single draw"]
    found, limit = [], rounding_of(model)
    if differ_on_many(first, regrouped(model, x, batch_size), limit):
        found.append(BATCH_DEPENDENT)
    if uses_gradient and differ_on_many(first, logits(model, x, batch_size, gradients=True), limit):
        found.append(OTHER_WITH_GRADIENTS)
    return found


def logits(
    model: nn.Module,
    x: Tensor,
    batch_size: int,
    *,
    gradients: bool = False,
    precision: torch.dtype = torch.float32,
) -> Tensor:
    """Return the logits (N, K) of images.

    Args:
        model: pixels in, logits out, in eval mode.
        x: images (N, ...).
        batch_size: of the passes.
        gradients: let the passes record a graph from the images, as in a gradient attack.
        precision: float32 computes exactly, another runs under autocast to it.
    """

    def run(z: Tensor) -> Tensor:
        return forward_logits(model, z.detach().clone().requires_grad_(gradients)).detach()

    within = exact(x.device) if precision == torch.float32 else autocast(x.device, precision)
    # An image that was made in inference mode cannot require a gradient in it.
    with torch.inference_mode(False), torch.set_grad_enabled(gradients), within:
        return map_batches(batch_size, run, x)


def of_precision(model: nn.Module, x: Tensor, precision: torch.dtype, batch_size: int) -> list[str]:
    """Describe that a model answers differently under autocast to a precision, if it does.

    One that is random, that quantises or whose logits saturate may.
    """
    if precision == torch.float32:
        return []
    full, half = (
        logits(model, x, batch_size, precision=kind) for kind in (torch.float32, precision)
    )
    if not differ_on_many(full, half, ROUNDED_IN_HALF):
        return []
    name = str(precision).removeprefix("torch.")
    return [f"it answers differently in {name}, in which its attacks were made"]


def regrouped(model: nn.Module, x: Tensor, batch_size: int, *, gradients: bool = False) -> Tensor:
    """Return the logits (N, K) of images in reverse order and in batches half as large."""
    half = max(1, min(batch_size, len(x)) // 2)
    return logits(model, x.flip(0), half, gradients=gradients).flip(0)


def of_sources(sources: Sequence[nn.Module], x: Tensor, y: Tensor, batch_size: int) -> list[str]:
    """Describe which source models of the transfer attack misclassify most images themselves.

    Args:
        sources: pixels in, logits out; in any mode.
        x: images (N, ...) that the judged model classifies correctly.
        y: labels (N,).
        batch_size: of the passes.

    Raises:
        UserError: a source fails on such images, or returns no logits.
    """
    found = []
    for number, source in enumerate(sources, 1):
        with attacking(Adapted(source)) as inner, torch.no_grad():
            out = map_batches(batch_size, lambda z, inner=inner: forward_logits(inner, z), x)
        right = share_of(~misclassified(out, y))
        if right < 0.5:
            found.append(
                f"source {number} of the transfer attack is right on {right:.0%} of the images (it "
                "may want normalised ones), so that its points say little"
            )
    return found


def of_results(
    right: Mapping[str, Tensor], attacks: Mapping[str, suite.Attack], square: int | None = None
) -> list[str]:
    """Describe where the attacks' results show that gradients mislead.

    Args:
        right: which images (N,) were right "clean", and under each attack, by its name.
        attacks: these attacks, by name.
        square: number of images that AutoAttack's Square broke after its gradient attacks.
    """
    steps = {name: attack.gradient_steps for name, attack in attacks.items()}
    one = [right[name] for name, taken in steps.items() if taken == 1]
    many = [right[name] for name, taken in steps.items() if taken and taken >= _MANY]
    found: list[str] = []
    n = len(right["clean"])
    if one and many:
        more = _fewest(many) - _fewest(one)
        if more >= BY_CHANCE and more > BEATEN * n:
            found.append("one step breaks more images than many")
    alone = {} if square is None else {"autoattack's square": square}
    seeing = {name: right[name] for name, attack in attacks.items() if attack.uses_gradient}
    # A single step is not expected to find everything.
    if any(steps[name] != 1 for name in seeing):
        left = torch.stack(list(seeing.values())).all(0)
        alone |= {k: int((left & ~right[k]).sum()) for k, taken in steps.items() if taken == 0}
    for name, count in alone.items():
        # Random points break hardly any image; a search by queries alone breaks a few more.
        if count >= BY_CHANCE and (name.startswith("noise") or count > MISSED * n):
            found.append(f"{name} breaks {count:,} images that gradients do not")
    return found


def differing_rows(first: Tensor, second: Tensor, limit: float) -> Tensor:
    """Tell for which images (N,) two passes' logits (N, K) differ.

    They do if they give another class, if other entries are finite, or if their distance is more
    than ``limit`` times the longer of the two.
    """
    finite = first.isfinite()
    one, two = (z.where(finite & z.isfinite(), 0).to(finest(z.device)) for z in (first, second))
    far = (one - two).norm(dim=1) > limit * torch.maximum(one.norm(dim=1), two.norm(dim=1))
    return far | (finite != second.isfinite()).any(1) | (first.argmax(1) != second.argmax(1))


def differ_on_many(first: Tensor, second: Tensor, limit: float) -> bool:
    """Tell whether two passes' logits (N, K) differ on more images than a few by chance."""
    count = int(differing_rows(first, second, limit).sum())
    return count >= BY_CHANCE and count > MISSED * len(first)


def rounding_of(model: nn.Module) -> float:
    """Return the ``limit`` of ``differing_rows`` that allows for the rounding of the weights."""
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
    return ROUNDED_IN_HALF if half else ROUNDED


def are_probabilities(model: nn.Module, out: Tensor) -> bool:
    """Tell whether a model's outputs (N, K) lie in [0, 1] and sum to 1, within their rounding."""
    limit = 1e-5 if rounding_of(model) == ROUNDED else 0.02
    inside = bool(out.min() >= 0 and out.max() <= 1)
    return inside and bool((out.sum(1) - 1).abs().max() <= limit)


def is_flat(grad: Tensor) -> Tensor:
    """Tell which images (N,) have a gradient (N, ...) of zeros, or of NaN in a tenth of the pixels.

    A zero gradient gives an attack no direction, and it cannot move pixels whose gradient is NaN.
    """
    flat = grad.flatten(1)
    return flat.eq(0).all(1) | (flat.isnan().float().mean(1) >= 0.1)


def _fewest(left: Sequence[Tensor]) -> int:
    return min(int(one.sum()) for one in left)
