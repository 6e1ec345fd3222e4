"""Friendly adversarial training."""

import copy

import torch

from families.maths import EPS, ball, ce_at, signs


def fat(net, x, y, smoothing, tau=0, steps=10, alpha=EPS / 4):
    starts = ball(x + torch.empty_like(x).uniform_(-EPS, EPS), x)
    frozen, points = copy.deepcopy(net).eval(), []
    for image, label, point in zip(x, y, starts, strict=True):
        left = tau
        for _ in range(steps):
            if frozen(point[None])[0].argmax() != label:
                if left == 0:
                    break
                left -= 1
            point = ball(point + alpha * signs(net, point[None], label[None])[0], image)
        points.append(point)
    return ce_at(torch.stack(points), y, smoothing)


CASES = {
    "fat": (fat, {"steps": 5}, {}),
    "fat alpha": (fat, {"steps": 3, "alpha": 0.06}, {}),
    "fat tau": (fat, {"steps": 5, "tau": 1, "alpha": 0.01}, {}),
    "fat late": (fat, {"steps": 5, "tau": 3, "alpha": 0.01}, {}),
}
SMALL = {"fat": {"steps": 3, "alpha": 0.05}}
BY_HAND = [("fat", {"steps": 5}, 6, 6, 1), ("fat", {"steps": 5, "tau": 2}, 6, 6, 1)]
REFUSED = [
    ("fat", {"tau": -1}, ("fat", "tau", "-1", ">= 0")),
    ("fat", {"tau": 0.5}, ("fat", "tau", "0.5")),
    ("fat", {"steps": 0}, ("fat", "steps", "0", ">= 1")),
]
