"""Stable single-step adversarial training."""

import copy

import torch

from families.maths import EPS, ball, ce_at, train_signs


def ssat(net, x, y, smoothing, checkpoints=3, alpha=1.25 * EPS):
    start = x + torch.empty_like(x).uniform_(-EPS, EPS)
    full = ball(start + alpha * train_signs(net, start, y), x)
    with torch.no_grad():
        at_start = copy.deepcopy(net).train()(start)
    frozen, points = copy.deepcopy(net).eval(), []
    for i, label in enumerate(y):
        point = full[i]
        if at_start[i].argmax() != label:
            point = x[i]
        else:
            for k in range(1, checkpoints):
                between = x[i] + (full[i] - x[i]) * k / checkpoints
                if frozen(between[None])[0].argmax() != label:
                    point = between
                    break
        points.append(point)
    return ce_at(torch.stack(points), y, smoothing)


CASES = {
    "ssat": (ssat, {}, {}),
    "ssat checkpoints": (ssat, {"checkpoints": 8}, {}),
    "ssat none between": (ssat, {"checkpoints": 1}, {}),
    "ssat alpha": (ssat, {"checkpoints": 4, "alpha": 0.06}, {}),
}
BY_HAND = [("ssat", {}, 4, 2, 1), ("ssat", {"checkpoints": 1}, 2, 2, 1)]
TRAIN_PASSES = {"ssat": 2}
PUBLISHED = [
    ("ssat", "cifar10", 8 / 255, None, {"checkpoints": 3},
     {"epochs": 30, "lr": 0.2, "schedule": "triangular"}),
]  # fmt: skip
REFUSED = [
    ("ssat", {"checkpoints": 0}, ("ssat", "checkpoints", "0", ">= 1")),
    ("ssat", {"checkpoints": 2.5}, ("ssat", "checkpoints", "2.5")),
    ("ssat", {"alpha": -1.0}, ("ssat", "alpha", "-1.0")),
]
