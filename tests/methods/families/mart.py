"""MART."""

import torch

from families.maths import EPS, ball, cross_entropy, signs


def mart(net, x, y, smoothing, beta=5.0, steps=10, alpha=EPS / 4, sigma=0.001):
    p = x + sigma * torch.randn_like(x)
    for _ in range(steps):
        p = ball(p + alpha * signs(net, p, y), x)

    def loss(z):
        total = 0.0
        for clean, adversarial, label in zip(z[: len(x)], z[len(x) :], y, strict=True):
            p_clean, p_adv = clean.exp() / clean.exp().sum(), adversarial.exp()
            p_adv = p_adv / p_adv.sum()
            runner_up = max(p_adv[k] for k in range(len(p_adv)) if k != label)
            total += cross_entropy(adversarial, label, smoothing) - (1.0001 - runner_up).log()
            divergence = (p_clean * (p_clean / p_adv).log()).sum()
            total += beta * divergence * (1 - p_clean[label])
        return total / len(x)

    return torch.cat([x, p]), loss, slice(len(x), None)


CASES = {
    "mart": (mart, {"steps": 3}, {}),
    "mart beta alpha sigma": (mart, {"beta": 1.5, "steps": 2, "alpha": 0.03, "sigma": 0.05}, {}),
}
SMALL = {"mart": {"steps": 3, "alpha": 0.05, "sigma": 0.05}}
PUBLISHED = [
    ("mart", "mnist", 0.3, "lenet+", {"beta": 5.0, "steps": 40, "alpha": 0.01}, {}),
    ("mart", "cifar10", 8 / 255, "resnet18", {"beta": 5.0, "steps": 10, "alpha": 0.007}, {}),
]
BY_HAND = [("mart", {"steps": 5}, 7, 7, 2), ("mart", {"steps": 1}, 3, 3, 2)]
REFUSED = [
    ("mart", {"beta": -1.0}, ("mart", "beta", "-1.0", ">= 0")),
    ("mart", {"sigma": -1.0}, ("mart", "sigma", "-1.0", ">= 0")),
    ("mart", {"steps": 0}, ("mart", "steps", "0", ">= 1")),
]
