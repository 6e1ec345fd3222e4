"""The binarization test (Zimmermann et al. 2022, "Increasing confidence...", section 3).

Around each image points are drawn well inside the ball and one on its surface. A linear readout of
the model's features is fitted that tells the one from the others: so an adversarial point exists,
and an attack that does not find one is too weak for this model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from surestep.attacks.core import forward_logits, share_of
from surestep.devices import finest
from surestep.threat import ThreatModel

INNER, RANDOM, STEPS = 999, 200, 30


def feature_reader(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a function from images to what the model's last linear layer sees (N, D).

    Without such a layer: to the logits.
    """
    seen: list[Tensor] = []
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]

    def features(z: Tensor) -> Tensor:
        if not linear:
            return forward_logits(model, z)
        handle = linear[-1].register_forward_hook(lambda _m, args, _out: seen.append(args[0]))
        try:
            logits = forward_logits(model, z)
        finally:
            handle.remove()
        found = seen[-1].flatten(1).float() if seen else logits
        seen.clear()
        return found if len(found) == len(z) else logits

    return features


def binarization_rates(
    model: nn.Module, x: Tensor, threat: ThreatModel, batch_size: int = 1000
) -> tuple[float, float, int] | None:
    """Return the success rates of PGD and of random points, and how many problems were posed.

    Args:
        model: in eval mode.
        x: images (N, ...).
        threat: norm, radius and data range.
        batch_size: of the passes.

    Returns:
        None if no problem could be posed: the features of the planted point are no different.
    """
    features, fine = feature_reader(model), finest(x.device)
    readouts, biases, kept = [], [], []
    for row in range(len(x)):
        image = x[row : row + 1]
        planted = threat.project(image + threat.random_step(image, threat.eps), image)
        with torch.no_grad():
            # Large images: never are there more points at a time than are passed at once.
            sizes = [min(batch_size, INNER - k) for k in range(0, INNER, batch_size)]
            drawn = (
                threat.random_start(image.repeat_interleave(k, 0), 0.95 * threat.eps) for k in sizes
            )
            inner = torch.cat([features(z).to(fine) for z in (image, *drawn)])
            readout = _separate(inner, features(planted).to(fine)[0])
        if readout is not None:
            readouts.append(readout[0])
            biases.append(readout[1])
            kept.append(row)
    if not kept:
        return None
    weight, bias, x = torch.stack(readouts), torch.stack(biases), x[kept]

    def score(z: Tensor, rows: Tensor) -> Tensor:
        return (features(z).to(fine) * weight[rows]).sum(1) + bias[rows]

    def gradient(z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            value = score(z, rows)
            if not value.requires_grad:
                return value, None
            return value.detach(), torch.autograd.grad(value.sum(), z, allow_unused=True)[0]

    parts = torch.arange(len(x), device=x.device).split(batch_size)
    solved = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    lucky, point = solved.clone(), threat.random_start(x)
    for _ in range(STEPS):
        values, grads = zip(*(gradient(point[rows], rows) for rows in parts), strict=True)
        solved |= torch.cat(values) > 0
        if any(grad is None for grad in grads):
            break
        step = threat.steepest_step(torch.cat(grads).nan_to_num(0), threat.eps * 2.5 / STEPS)
        point = threat.project(point + step, x)
    with torch.no_grad():
        solved |= torch.cat([score(point[rows], rows) for rows in parts]) > 0
        for _ in range(RANDOM):
            tried = threat.random_start(x)
            lucky |= torch.cat([score(tried[rows], rows) for rows in parts]) > 0
    return share_of(solved), share_of(lucky), len(x)


def _separate(inner: Tensor, planted: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return weight (D,) and bias of a readout positive at ``planted`` only, if there is one."""
    mean, std = inner.mean(0), inner.std(0)
    away = planted - mean
    # Whitened by a ridge, in the span of the samples: D may be far above their number.
    centred = inner - mean
    ridge = 1e-3 * centred.square().sum() / len(inner) + 1e-12
    gram = centred @ centred.T + len(inner) * ridge * torch.eye(len(inner)).to(inner)
    weight = (away - centred.T @ torch.linalg.solve(gram, centred @ away)) / ridge
    if not weight.isfinite().all() or not std.any():
        return None
    highest, at = (inner @ weight).max(), planted @ weight
    if not at > highest * (1 + 1e-9) + 1e-9:
        return None
    # Close to the planted point, as the authors have it: little else is on its side.
    return weight, -(highest + 0.9 * (at - highest))
