"""How long an audit takes at most."""

from __future__ import annotations

import time

import torch
from torch import nn

from surestep.activations import straight_through_layers
from surestep.attacks.gradients import input_gradient
from surestep.attacks.inputs import check_labels, count_classes, forward_logits
from surestep.attacks.lending import attacking, device_of, interpreted, uncompiled, unwrapped
from surestep.attacks.white_box import varies
from surestep.auditing.budgets import budget_of
from surestep.auditing.escalation import GRADIENT, most_forwards
from surestep.auditing.stand_ins import switches
from surestep.data import Images
from surestep.devices import autocast, has_bf16
from surestep.errors import UserError
from surestep.evaluation import Adapted, doubts, suite
from surestep.evaluation.suite import Attack
from surestep.randomness import forked_rng
from surestep.threat import Linf


def estimate(
    model: nn.Module,
    images: Images,
    budget: str,
    n: int,
    preprocess: nn.Module | None = None,
    batch_size: int = 250,
) -> float:
    """Estimate how many seconds an audit takes at most: the cost for a fully robust model.

    Args:
        model: the model, on its device.
        images: images to audit on.
        budget: name of the budget.
        n: number of images.
        preprocess: as for ``audit``.
        batch_size: images per pass of the attacks.

    Raises:
        UserError: the model fails on these images, or has no such labels.
    """
    spend = budget_of(budget)
    device = device_of(model)
    batch = images.first(min(100, batch_size, len(images)))
    x, y = batch.pixels().to(device), batch.y.to(device)
    adapted = Adapted(uncompiled(unwrapped(model)), preprocess)
    check_labels(y, count_classes(adapted, x))

    def forward_seconds(precision: torch.dtype) -> float:
        for _ in range(2):  # the first pass prepares kernels
            start = time.perf_counter()
            with attacking(adapted), autocast(device, precision):
                try:
                    values = input_gradient(adapted, x, y)[0]
                except UserError:  # without a gradient the forward is all the cost, or fails again
                    values = forward_logits(adapted, x)
                float(values.flatten()[0])  # reading a number waits for the GPU
        return (time.perf_counter() - start) / len(x) / GRADIENT

    full = forward_seconds(torch.float32)
    fast = forward_seconds(torch.bfloat16) if spend.fast and has_bf16(device) else full
    any_radius = Linf(1.0)  # none costs more than another
    forwards = sum(map(_forwards, suite.parse_all(spend.attacks, any_radius).values()))
    # Of gradients, too, though another model's.
    forwards += GRADIENT / 2 * suite.transfer([adapted], any_radius).passes
    with attacking(adapted) as inner, forked_rng(device), interpreted(adapted):
        forwards += most_forwards(
            spend,
            straight=bool(straight_through_layers(inner)),
            probabilities=doubts.are_probabilities(inner, doubts.logits(inner, x, len(x))),
            random=varies(inner, x),
            switches=len(switches(inner, x[:8])),
        )
    # The checks' gradients, most of them of eps-sweep and convergence, and binarization's 1,250
    # passes for a fifth of the images.
    close = (900 * GRADIENT + 250) * spend.probe
    questions = 20_000  # of the substitute
    return fast * forwards * n + full * (close + questions)


def _forwards(attack: Attack) -> float:
    """Return how many forward passes an attack takes for an image that withstands it."""
    return attack.passes * (GRADIENT / 2 if attack.uses_gradient else 1)
