"""What a report shows of the model itself: its loss around a few images, adversarial examples."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surestep.attacks import pgd
from surestep.attacks.gradients import input_gradient
from surestep.attacks.inputs import check_inputs, forward_logits
from surestep.attacks.lending import attacking, device_of
from surestep.attacks.losses import cross_entropy
from surestep.devices import exact, memory_for
from surestep.errors import UserError
from surestep.randomness import forked_rng, seed_everything
from surestep.report import _png
from surestep.threat import ThreatModel, per_sample

_LARGEST = 96  # pixels on a side of an embedded picture


def gather(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    name: str = "this model",
    samples: int = 8,
    points: int = 21,
    steps: int = 50,
    batch_size: int = 256,
    seed: int = 0,
) -> dict[str, Any]:
    """Compute the loss surface and adversarial examples that a report shows.

    The first ``samples`` correctly classified images are taken (others only if there are too few).
    The model runs in eval mode and in float32; its modes and the global random state are restored.

    Args:
        model: returns logits (N, K) for images in the threat model's range.
        x: images (N, ...); of shape (N, 1 or 3, H, W) they are also shown as pictures.
        y: labels (N,).
        threat: norm, radius and data range.
        name: the model's name in the report.
        samples: number of images.
        points: grid points along each of the surface's two directions; odd, so that 0 is one.
        steps: PGD steps for the adversarial examples.
        batch_size: images in one forward pass.
        seed: seed of the random direction and of PGD's start.

    Returns:
        ``surfaces`` and ``examples``, plain data that ``Report`` takes.

    Raises:
        UserError: images, labels or sizes are invalid, the model has no input gradient, or the
            batches are too large for the memory.
    """
    sizes = {"samples": samples, "points": points, "steps": steps, "batch_size": batch_size}
    for what, value in sizes.items():
        if value < 1:
            raise UserError(f"{what} {value}: give 1 or more")
    if points % 2 == 0 or points < 3:
        raise UserError(f"points {points}: give an odd number >= 3, so that one is the image")
    device = device_of(model)
    with (
        memory_for("the report's pictures", f"lower batch_size ({batch_size})"),
        attacking(model) as inner,
        forked_rng(device),
        exact(device),
    ):
        seed_everything(seed)
        x, y = _choose(inner, x, y, threat, samples, batch_size, device)
        surface = _surface(inner, x, y, threat, points, batch_size)
        described = threat.to_dict()
        surface |= {"norm": described["norm"], "eps": described["eps"], "seed": seed}
        examples = _examples(inner, x, y, threat, steps)
    return {"surfaces": {name: surface}, "examples": examples}


def _choose(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    samples: int,
    batch_size: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Return the first correctly classified images, filled up with the first misclassified ones."""
    right: list[int] = []
    wrong: list[int] = []
    for start in range(0, len(x), batch_size):
        part, labels = x[start : start + batch_size].to(device), y[start : start + batch_size]
        part = part.float() if part.is_floating_point() else part
        if start == 0:
            check_inputs(model, part, labels.to(device), threat)
        with torch.no_grad():
            predicted = forward_logits(model, part).argmax(1).cpu()
        for i, ok in enumerate((predicted == labels.cpu()).tolist(), start):
            (right if ok else wrong).append(i)
        if len(right) >= samples:
            break
    if not right and not wrong:
        raise UserError("there is no image for the report: give at least one")
    rows = torch.tensor((right + wrong)[:samples])
    return x[rows].to(device).float(), y[rows].to(device)


def _surface(
    model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, points: int, batch_size: int
) -> dict[str, Any]:
    """Measure cross entropy at x + a (FGSM step) + b (random step) for a, b from -1 to 1."""
    grad, _ = input_gradient(model, x, y)
    steps = threat.steepest_step(grad, threat.eps)
    # Drawn on the CPU, so that every device measures along the same direction.
    noise = torch.randn(x.shape).to(x)
    aside = threat.steepest_step(noise, threat.eps)
    shares = torch.linspace(-1, 1, points, device=x.device)
    losses = []
    for start in range(0, len(x) * points * points, batch_size):
        at = torch.arange(start, min(start + batch_size, len(x) * points * points), device=x.device)
        row, place = at // points**2, at % points**2
        along = per_sample(shares[place % points], x)
        across = per_sample(shares[place // points], x)
        # The corners lie outside the ball: a surface shows the neighbourhood, it is not an attack.
        around = threat.clip(x[row] + along * steps[row] + across * aside[row])
        with torch.no_grad():
            losses.append(cross_entropy(forward_logits(model, around), y[row]))
    grid = torch.cat(losses).view(len(x), points, points).cpu().double()
    return {
        "format": "surestep-surface",
        "version": 1,
        "shares": [round(v, 4) for v in shares.tolist()],
        "mean": _rounded(grid.mean(0)),
        "samples": [
            {"label": int(label), "loss": _rounded(one)}
            for label, one in zip(y.tolist(), grid, strict=True)
        ],
        "n": len(x),
    }


def _rounded(grid: Tensor) -> list[list[float]]:
    """Round to four digits: more than a colour can show, and the page stays small."""
    return [[float(f"{v:.4g}") for v in row] for row in grid.tolist()]


def _examples(
    model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, steps: int
) -> list[dict[str, Any]]:
    """Attack the images and encode the results as pictures; none unless x is (N, 1 or 3, H, W)."""
    if x.dim() != 4 or x.shape[1] not in (1, 3):
        return []
    x_adv = pgd(model, x, y, threat, steps)
    with torch.no_grad():
        clean, attacked = (forward_logits(model, v).softmax(1).cpu() for v in (x, x_adv))
    delta = (x_adv - x).cpu()
    largest = delta.abs().max().item()
    factor = threat.span / (2 * largest) if largest > 0 else 1.0
    low, span = threat.bounds[0], threat.span
    return [
        {
            "label": int(y[i]),
            "clean": _png.data_uri(_shrink((x[i].cpu() - low) / span)),
            "perturbation": _png.data_uri(_shrink(delta[i] * factor / span + 0.5, mix=False)),
            "adversarial": _png.data_uri(_shrink((x_adv[i].cpu() - low) / span)),
            "clean_prediction": int(clean[i].argmax()),
            "clean_confidence": round(float(clean[i].max()), 4),
            "adversarial_prediction": int(attacked[i].argmax()),
            "adversarial_confidence": round(float(attacked[i].max()), 4),
            "factor": float(f"{factor:.3g}"),
            "linf": float(f"{delta[i].abs().max().item():.4g}"),
            "l2": float(f"{delta[i].flatten().norm().item():.4g}"),
            "attack": f"pgd-{steps}",
        }
        for i in range(len(x))
    ]


def _shrink(picture: Tensor, *, mix: bool = True) -> Tensor:
    """Downscale a large picture (C, H, W) to the size at which it is shown.

    Args:
        picture: the picture.
        mix: average pixels; False picks some of them, since perturbations average out.
    """
    height, width = picture.shape[1:]
    scale = _LARGEST / max(height, width)
    if scale >= 1:
        return picture
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    return F.interpolate(picture[None], size, mode="area" if mix else "nearest")[0]
