"""How long an audit takes at most."""

from __future__ import annotations

import time

import torch
from torch import nn

from surestep.attacks.gradients import input_gradient
from surestep.attacks.inputs import check_labels, count_classes, forward_logits
from surestep.attacks.lending import attacking, device_of, interpreted, uncompiled, unwrapped
from surestep.attacks.white_box import varies
from surestep.auditing.budgets import budget_of
from surestep.auditing.stand_ins import EOT_SAMPLES, switches
from surestep.data import Images
from surestep.devices import autocast, has_bf16
from surestep.errors import UserError
from surestep.evaluation import Adapted
from surestep.randomness import forked_rng


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
        return (time.perf_counter() - start) / len(x) / 3  # a gradient is about three forwards

    full = forward_seconds(torch.float32)
    fast = forward_seconds(torch.bfloat16) if spend.fast and has_bf16(device) else full
    # Gradients: PGD with two losses, fgsm, fgsm-margin and pgd-10, and 70 for the transfer attack.
    forwards = 3 * (2 * spend.steps + 12 + 70) + spend.noise + spend.queries
    # The answers to flags: BPDA with two losses, and PGD of twice the steps.
    forwards += 3 * 4 * spend.steps * spend.restarts + spend.late_queries
    with attacking(adapted) as inner, forked_rng(device), interpreted(adapted):
        if varies(inner, x):  # PGD with two losses on the mean of several passes
            forwards += 3 * 2 * spend.steps * EOT_SAMPLES
        forwards += 3 * spend.steps * len(switches(inner, x[:8]))
    # 9700 in suite.py, where a gradient counts as two forwards.
    forwards += 12_000 if spend.autoattack else 0
    # The checks' gradients, most of them of eps-sweep and convergence, and binarization's 1,250
    # passes for a fifth of the images.
    close = (3 * 900 + 250) * spend.probe
    questions = 20_000  # of the substitute
    return fast * forwards * n + full * (close + questions)
