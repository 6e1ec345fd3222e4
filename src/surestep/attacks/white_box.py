"""White-box gradient attacks and random noise, for judging.

All map (model, x, y) to x_adv: x (N, ...) in the threat model's data range, y (N,) int64 labels.
The model is attacked in eval mode and left as it was found.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from surestep.attacks import losses
from surestep.attacks.ascent import Ascent, Best
from surestep.attacks.gradients import attack_gradient
from surestep.attacks.inputs import check_inputs, forward_logits
from surestep.attacks.lending import attacking
from surestep.attacks.outcomes import passes_agree
from surestep.errors import UserError
from surestep.threat import ThreatModel

_FEW = 8  # images that show whether a model is random


def fgsm(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, loss: str = "ce") -> Tensor:
    """Take one full step along the gradient's sign (Goodfellow et al. 2015).

    Args:
        model: the classifier.
        x: images (N, ...) in the threat model's range.
        y: labels (N,).
        threat: norm, radius and data range.
        loss: "ce", "margin" or "dlr".

    Returns:
        x_adv, shaped as x.

    Raises:
        UserError: on invalid images, labels or loss.
    """
    check_inputs(model, x, y, threat)
    x = x.detach()
    grad, _ = attack_gradient(model, x, y, losses.get(loss))
    return threat.ascend(x, grad.nan_to_num(0.0), threat.eps, x)


def r_fgsm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    alpha: float | None = None,
    loss: str = "ce",
) -> Tensor:
    """Take a random step of size alpha, then a gradient step of eps - alpha (Tramèr et al. 2018).

    Args:
        model: the classifier.
        x: images (N, ...).
        y: labels (N,).
        threat: norm, radius and data range.
        alpha: size of the random step, at most eps; eps / 2 by default, as in the paper.
        loss: "ce", "margin" or "dlr".

    Returns:
        x_adv, shaped as x.

    Raises:
        UserError: on invalid images, labels, alpha or loss.
    """
    check_inputs(model, x, y, threat)
    x = x.detach()
    alpha = threat.eps / 2 if alpha is None else alpha
    if not 0 <= alpha <= threat.eps:
        raise UserError(f"alpha {alpha:g} is outside [0, eps = {threat.eps:g}]")
    start = threat.clip(x + threat.random_step(x, alpha))
    grad, _ = attack_gradient(model, start, y, losses.get(loss))
    return threat.ascend(start, grad.nan_to_num(0.0), threat.eps - alpha, x)


def i_fgsm_ascent(threat: ThreatModel, steps: int, loss: str = "ce") -> Ascent:
    """Return what ``i_fgsm`` is: steps of eps / steps from x itself."""
    size = threat.eps / max(steps, 1)
    return Ascent(threat, steps, size, losses.get(loss), start_radius=0.0)


def mi_fgsm_ascent(threat: ThreatModel, steps: int, loss: str = "ce", decay: float = 1.0) -> Ascent:
    """Return what ``mi_fgsm`` is: ``i_fgsm`` with momentum."""
    return replace(i_fgsm_ascent(threat, steps, loss), decay=decay)


def pgd_ascent(
    threat: ThreatModel, steps: int, loss: str = "ce", step_size: float | None = None
) -> Ascent:
    """Return what ``pgd`` is: steps of ``pgd_step_size`` from anywhere in the ball."""
    size = pgd_step_size(threat.eps, steps) if step_size is None else step_size
    return Ascent(threat, steps, size, losses.get(loss))


def pgd_step_size(eps: float, steps: int) -> float:
    """Return the usual step size of PGD: 2.5 eps / steps, but at least eps / 30.

    At eps 0.3 this is 0.01 for PGD-100, at eps 8/255 it is 2/255 for PGD-10.
    """
    return eps * max(2.5 / max(steps, 1), 1 / 30)


def i_fgsm(
    model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, steps: int = 10, loss: str = "ce"
) -> Tensor:
    """Take ``steps`` steps of eps / steps from x itself; keep the best point (Kurakin et al. 2017).

    Args:
        model: the classifier.
        x: images (N, ...) in the threat model's range.
        y: labels (N,).
        threat: norm, radius and data range.
        steps: number of steps.
        loss: "ce", "margin" or "dlr".

    Returns:
        x_adv, shaped as x: of each image's points a misclassified one if there is any, and among
        these the one of the highest loss.

    Raises:
        UserError: on invalid images, labels, steps or loss.
    """
    return search(model, x, y, i_fgsm_ascent(threat, steps, loss)).x_adv


def mi_fgsm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    steps: int = 10,
    decay: float = 1.0,
    loss: str = "ce",
) -> Tensor:
    """I-FGSM with momentum: L1-normalised gradients accumulated with ``decay`` (Dong et al. 2018).

    As ``i_fgsm``, it keeps the best of its points, not the last.

    Args:
        model: the classifier.
        x: images (N, ...) in the threat model's range.
        y: labels (N,).
        threat: norm, radius and data range.
        steps: number of steps of eps / steps.
        decay: share of the accumulated gradient that is kept at each step.
        loss: "ce", "margin" or "dlr".

    Returns:
        x_adv, shaped as x, as of ``i_fgsm``.

    Raises:
        UserError: on invalid images, labels, steps or loss.
    """
    return search(model, x, y, mi_fgsm_ascent(threat, steps, loss, decay)).x_adv


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    steps: int = 10,
    step_size: float | None = None,
    restarts: int = 1,
    loss: str = "ce",
    *,
    start_radius: float | None = None,
    decay: float | None = None,
    stop_when_wrong: bool = False,
) -> Tensor:
    """Projected gradient ascent from random starts (Madry et al. 2018); keeps the best iterate.

    Args:
        model: the classifier.
        x: images (N, ...).
        y: labels (N,).
        threat: norm, radius and data range.
        steps: gradient steps of each restart.
        step_size: in pixel units; by default 2.5 eps / steps, but at least eps / 30, as in
            ``surestep.evaluate``.
        restarts: how many random starts; per sample the strongest result is kept.
        loss: "ce", "margin" or "dlr".
        start_radius: of the random start; eps by default, 0 to start at x.
        decay: momentum as in MI-FGSM; None for none.
        stop_when_wrong: leave a sample alone once it is misclassified (faster, same accuracy),
            unless the model is random.

    Returns:
        x_adv, shaped as x: per sample, over all iterates of all restarts, a misclassified one
        if there is any, else the one with the highest loss.

    Raises:
        UserError: on invalid images, labels, steps, restarts, step size or loss.
    """
    ascent = pgd_ascent(threat, steps, loss, step_size)
    ascent = replace(ascent, start_radius=start_radius, decay=decay)
    return search(model, x, y, ascent, restarts, stop_when_wrong=stop_when_wrong).x_adv


def search(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    ascent: Ascent,
    restarts: int = 1,
    *,
    stop_when_wrong: bool = False,
) -> Best:
    """Run an ascent and return all it found: points, losses, the step at which each was broken."""
    check_inputs(model, x, y, ascent.threat)
    x = x.detach()
    if ascent.steps < 1 or restarts < 1:
        raise UserError(f"steps {ascent.steps} and restarts {restarts} must be at least 1")
    if not ascent.step_size >= 0:
        raise UserError(f"step_size {ascent.step_size} must be a number >= 0, in pixel units")
    with attacking(model) as inner:
        # A random model may be wrong on a point once and right the next time: climb to the end.
        stop_when_wrong = stop_when_wrong and not varies(inner, x[:_FEW])
        best = Best(x, y, ascent.objective, stop_when_wrong=stop_when_wrong)
        for _ in range(restarts):
            if len(best.rows()):
                ascent.search(inner, best)
    return best


@torch.no_grad()
def varies(model: nn.Module, x: Tensor) -> bool:
    """Tell whether two passes over the images x (N, ...) differ by more than rounding."""
    return not passes_agree(forward_logits(model, x), forward_logits(model, x))


def random_noise(
    model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, samples: int = 10
) -> Tensor:
    """Draw ``samples`` uniform points of the ball and keep the worst of them per sample.

    No gradient is used: a gradient attack that does worse than this is failing.

    Args:
        model: the classifier.
        x: images (N, ...) in the threat model's range.
        y: labels (N,).
        threat: norm, radius and data range.
        samples: number of points for each image.

    Returns:
        x_adv, shaped as x, as of ``i_fgsm``.

    Raises:
        UserError: on invalid images, labels or number of samples.
    """
    check_inputs(model, x, y, threat)
    x = x.detach()
    if samples < 1:
        raise UserError(f"samples {samples} must be at least 1")
    best = Best(x, y, losses.margin)
    rows, inside = best.rows(), threat.around(x)
    with attacking(model) as inner:
        for _ in range(samples):
            best.try_points(inner, rows, inside(x + threat.random_delta(x)))
    return best.x_adv
