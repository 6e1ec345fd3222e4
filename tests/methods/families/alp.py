"""Adversarial logit pairing."""

import torch

from families.maths import EPS, ball, cross_entropy, signs


def alp(net, x, y, smoothing, lam=0.5, steps=10, alpha=EPS / 4):
    p = ball(x + torch.empty_like(x).uniform_(-EPS, EPS), x)
    for _ in range(steps):
        p = ball(p + alpha * signs(net, p, y), x)

    def loss(z):
        clean, adversarial = z[: len(x)], z[len(x) :]
        total = 0.0
        for one, other, label in zip(clean, adversarial, y, strict=True):
            total += cross_entropy(one, label, smoothing) / 2
            total += cross_entropy(other, label, smoothing) / 2
            total += lam * ((one - other) ** 2).sum() / len(one)
        return total / len(x)

    return torch.cat([x, p]), loss, slice(len(x), None)


CASES = {
    "alp": (alp, {"steps": 3}, {}),
    "alp lam alpha": (alp, {"lam": 4.0, "steps": 2, "alpha": 0.06}, {}),
}
SMALL = {"alp": {"steps": 3, "alpha": 0.05}}
BY_HAND = [("alp", {"steps": 5}, 7, 7, 2), ("alp", {"steps": 1}, 3, 3, 2)]
PUBLISHED = [
    ("alp", "mnist", 0.3, "lenet+", {"lam": 1.0, "steps": 40, "alpha": 0.01}, {}),
    ("alp", "cifar10", 8 / 255, None, {"lam": 0.5, "steps": 10, "alpha": 2 / 255}, {}),
]
REFUSED = [
    ("alp", {"lam": -0.5}, ("alp", "lam", "-0.5", ">= 0")),
    ("alp", {"steps": 0}, ("alp", "steps", "0", ">= 1")),
    ("alp", {"alpha": -1.0}, ("alp", "alpha", "-1.0")),
]
