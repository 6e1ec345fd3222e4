"""AutoAttack and its parts, from the authors' package pyautoattack (Croce & Hein 2020).

The package is adapted, not changed: images of any shape (N, ...) and any data range, the random
state left as it was, its warnings (surestep's audit has its own checks) kept quiet, and no point
ever outside the threat model.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from surestep.attacks.gradients import input_gradient
from surestep.attacks.inputs import check_inputs, forward_logits
from surestep.attacks.lending import attacking, frozen
from surestep.attacks.outcomes import in_turn
from surestep.attacks.white_box import pgd
from surestep.devices import exact, finest
from surestep.errors import UserError, need
from surestep.randomness import forked_rng
from surestep.threat import L2, Linf, ThreatModel

_SMALLEST = 5  # pixels, of images that Square divides in the l2 norm
QUERIES = 5000
"""Square's queries in AutoAttack's standard version."""


def apgd_ce(
    model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, steps: int = 100
) -> Tensor:
    """APGD on cross entropy: step sizes that adapt themselves (Croce & Hein 2020, section 3).

    Args:
        model: the classifier.
        x: images (N, ...) in the threat model's range.
        y: labels (N,).
        threat: norm, radius and data range.
        steps: number of steps.

    Returns:
        x_adv, shaped as x, within the ball: misclassified where the attack succeeded.

    Raises:
        UserError: on invalid images or labels, a norm other than L-inf and L2, or a model whose
            output has no input gradient.
    """

    def run(predict: Callable, z: Tensor, y: Tensor, shared: dict) -> Tensor:
        from pyautoattack.autopgd_base import APGDAttack

        attack = APGDAttack(predict, n_iter=steps, logger=_SILENT, **shared)
        return attack.perturb(z, y)

    return _run(run, model, x, y, threat)


def apgd_t(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, steps: int = 100) -> Tensor:
    """APGD on the targeted DLR loss, towards the nine likeliest wrong classes (or all).

    With fewer than four classes, where that loss does not exist, PGD on the margin.

    Args:
        model: the classifier.
        x: images (N, ...) in the threat model's range.
        y: labels (N,).
        threat: norm, radius and data range.
        steps: number of steps for each target.

    Returns:
        x_adv, shaped as x, within the ball: misclassified where the attack succeeded.

    Raises:
        UserError: on invalid images or labels, a norm other than L-inf and L2, or a model whose
            output has no input gradient.
    """

    def run(predict: Callable, z: Tensor, y: Tensor, shared: dict) -> Tensor:
        from pyautoattack.autopgd_base import APGDAttack_targeted

        classes = predict(z[:1]).shape[1]
        if classes < 4:
            size = 2.5 * threat.eps / steps
            return _unscale(
                pgd(model, x, y, threat, steps, size, 5, "margin", stop_when_wrong=True), threat
            ).reshape(z.shape)
        attack = APGDAttack_targeted(
            predict, n_iter=steps, n_target_classes=min(9, classes - 1), logger=_SILENT, **shared
        )
        return attack.perturb(z, y)

    return _run(run, model, x, y, threat)


def fab_t(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, steps: int = 100) -> Tensor:
    """FAB, targeted: steps towards the nearest boundary of each likely class (Croce & Hein 2020b).

    Args:
        model: the classifier.
        x: images (N, ...) in the threat model's range.
        y: labels (N,).
        threat: norm, radius and data range.
        steps: number of steps for each target.

    Returns:
        x_adv, shaped as x, within the ball: misclassified where the attack succeeded.

    Raises:
        UserError: on invalid images or labels, a norm other than L-inf and L2, or a model whose
            output has no input gradient.
    """

    def run(predict: Callable, z: Tensor, y: Tensor, shared: dict) -> Tensor:
        from pyautoattack.fab_pt import FABAttack_PT

        classes = predict(z[:1]).shape[1]
        attack = FABAttack_PT(
            predict, n_iter=steps, targeted=True, n_target_classes=min(9, classes - 1), **shared
        )
        with frozen(model):  # it calls backward, which would add to the user's gradients
            return attack.perturb(z, y)

    return _run(run, model, x, y, threat)


def square(
    model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, queries: int = QUERIES
) -> Tensor:
    """Square: random square-shaped changes, no gradient at all (Andriushchenko et al. 2020).

    Args:
        model: the classifier.
        x: images (N, ...) in the threat model's range.
        y: labels (N,).
        threat: norm, radius and data range.
        queries: number of points tried for each image.

    Returns:
        x_adv, shaped as x, within the ball: misclassified where the attack succeeded.

    Raises:
        UserError: on invalid images or labels, a norm other than L-inf and L2, or in L2 samples
            that have no squares: vectors, or images of less than 5 x 5 pixels.
    """
    if isinstance(threat, L2) and (x.dim() not in (3, 4) or min(x.shape[-2:]) < _SMALLEST):
        raise UserError(
            f"Square (part of AutoAttack and of every audit) needs images of {_SMALLEST} x "
            f"{_SMALLEST} pixels or more in the l2 norm, not samples of shape "
            f"{tuple(x.shape[1:])}: name other attacks"
        )

    def run(predict: Callable, z: Tensor, y: Tensor, shared: dict) -> Tensor:
        from pyautoattack.square import SquareAttack

        def decided(z: Tensor) -> Tensor:
            # A copy, since the package writes into it. It takes a tie for won, but of equal classes
            # the first leads: where that is the true one, the search must go on.
            logits = predict(z).to(finest(z.device), copy=True)
            places = torch.arange(logits.shape[1], device=z.device)
            whole = logits.abs().where(logits.isfinite(), 0)  # a class may be left out by -inf
            size = whole.amax(1, keepdim=True).clamp(min=1)
            return logits - 1e-12 * size * places

        attack = SquareAttack(decided, n_queries=queries, resc_schedule=False, **shared)
        return attack.perturb(z, y)

    return _run(run, model, x, y, threat, gradients=False)


def autoattack(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel) -> Tensor:
    """Run AutoAttack's standard version: the four parts, each on what the earlier ones left.

    Args:
        model: the classifier.
        x: images (N, ...).
        y: labels (N,).
        threat: norm (L-inf or L2), radius and data range.

    Returns:
        x_adv, shaped as x: misclassified where a part succeeded, else the last part's point.

    Raises:
        UserError: on invalid images or labels, another norm, a model whose output has no input
            gradient, or pyautoattack not installed.
    """
    return in_turn(model, x, y, [partial(part, model, threat=threat) for part in PARTS.values()])


PARTS: dict[str, Callable[..., Tensor]] = {
    "apgd-ce": apgd_ce,
    "apgd-t": apgd_t,
    "fab-t": fab_t,
    "square": square,
}
"""What AutoAttack's standard version is made of, in its order."""


_SILENT = logging.getLogger("surestep.autoattack")
_SILENT.addHandler(logging.NullHandler())
_SILENT.propagate = False

Part = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor, dict], Tensor]


def _run(
    run: Part,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    gradients: bool = True,
) -> Tensor:
    """Call a part on images scaled to [0, 1] and shaped (N, C, H, W), as the package wants."""
    need("pyautoattack", "an attack of AutoAttack's", "pyautoattack")
    norm = {Linf: "Linf", L2: "L2"}.get(type(threat))
    if norm is None:
        raise UserError(f"AutoAttack knows the norms linf and l2, not {type(threat).__name__}")
    check_inputs(model, x, y, threat)
    if threat.eps == 0:
        return x.detach().clone()
    z = _unscale(x.detach(), threat)
    if z.dim() == 3 and min(z.shape[1:]) >= _SMALLEST:  # images without a channel
        z = z[:, None]
    z = z if z.dim() == 4 else z.reshape(len(z), 1, 1, -1)
    z = z.contiguous()  # the package views it as rows; images may lie in memory as (N, H, W, C)
    # Drawn before the fork: the seed of the whole evaluation decides it.
    seed = int(torch.randint(2**31 - 1, ()))
    shared = {"norm": norm, "eps": threat.eps / threat.span, "seed": seed, "device": x.device}
    with (
        attacking(model) as inner,
        forked_rng(x.device),
        # The package leaves a point that is wrong by a hair, which TF32 and autocast make.
        exact(x.device),
        _any_algorithm(),
        warnings.catch_warnings(),
        # The package turns gradients on where it takes one. Elsewhere its points would hold on to
        # the graphs of all iterations.
        torch.no_grad(),
    ):
        warnings.simplefilter("ignore")

        def predict(z: Tensor) -> Tensor:
            pixels = threat.bounds[0] + z.reshape(-1, *x.shape[1:]) * threat.span
            # FAB mixes the logits' type with the images'.
            return forward_logits(inner, pixels).to(x.dtype)

        if gradients:  # in one line what the package would say with a traceback
            input_gradient(inner, x[:1], y[:1])
        found = run(predict, z, y, shared).detach()
    found = threat.bounds[0] + found.reshape(x.shape) * threat.span
    # A failed part may return NaN (FAB, on a flat model): the image itself then.
    found = torch.where(found.isfinite(), found, x)
    return threat.project(found, x)


@contextmanager
def _any_algorithm() -> Iterator[None]:
    """Allow what is not deterministic: on CUDA, FAB's sums have no other kernel."""
    asked = torch.are_deterministic_algorithms_enabled()
    only_warn = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(asked, warn_only=only_warn)


def _unscale(x: Tensor, threat: ThreatModel) -> Tensor:
    return (x - threat.bounds[0]) / threat.span
