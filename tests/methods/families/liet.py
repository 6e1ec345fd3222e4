"""LIET. At the first step the weight of the divergence is 0: see test_liet."""

import torch

from families.maths import EPS, ball, box, cross_entropy, mean_ce, signs


def liet(
    net, x, y, smoothing, spread=0.6, far=False, every=20, lam=100.0, done=0.0, between=(0.1, 0.5)
):
    n, classes = len(x), net[-1].out_features
    grey = torch.full_like(x[:1], 0.5).repeat(classes, *[1] * (x.dim() - 1))
    templates = EPS * signs(net, grey, torch.arange(classes))
    least, most = between
    shares = least + (most - least) * torch.rand(n, dtype=x.dtype)
    chances = torch.rand_like(x)
    radius = 2 * EPS if far else EPS
    noise = torch.empty_like(x).uniform_(-radius, radius)
    flips = torch.rand(n)
    mass = torch.rand(n, classes, dtype=x.dtype)
    starts = []
    for i in range(n):
        delta = torch.where(chances[i] < shares[i], noise[i], templates[y[i]])
        starts.append(box(x[i] - delta if flips[i] < 0.5 else x[i] + delta))
    starts = torch.stack(starts)
    x_adv = starts + EPS * signs(net, starts, y)
    x_adv = box(x_adv) if far else ball(x_adv, x)

    def loss(z):
        away = js = 0.0
        for i in range(n):
            p, q = (row.exp() / row.exp().sum() for row in (z[i], z[n + i]))
            wrong = [k for k in range(classes) if k != y[i]]
            total = sum(mass[i, k] for k in wrong)
            away += sum(mass[i, k] / total * cross_entropy(z[n + i], k) for k in wrong) / n
            middle = (p + q) / 2
            js += ((p * (p / middle).log()).sum() + (q * (q / middle).log()).sum()) / 2 / n
        ce = (1 - spread) * mean_ce(z[n:], y, smoothing) + spread * away
        return ce + lam * done * js

    return torch.cat([starts, x_adv]), loss, slice(n, None)


CASES = {
    "liet": (liet, {"far": False}, {}),
    "liet as by default at such an eps": (liet, {}, {"far": True}),
    "liet spread": (liet, {"far": False, "spread": 0.2, "every": 3, "lam": 7.0}, {}),
    "liet far": (liet, {"far": True, "spread": 0.0}, {}),
    "liet noisy": (
        liet,
        {"far": False, "least_noise": 0.2, "most_noise": 0.9},
        {"between": (0.2, 0.9)},
    ),
}
SMALL = {"liet": {"lam": 5.0, "far": False}}
BY_HAND = [("liet", {}, 3, 3, 2)]
WHOLE = {"least_noise": 0.0, "most_noise": 1.0}
PUBLISHED = [
    ("liet", "cifar10", 8 / 255, "resnet18", {"lam": 100.0}, {"epochs": 100}),
    ("liet", "cifar100", 8 / 255, "resnet18", {"lam": 200.0, "spread": 0.8}, {}),
    *(
        ("liet", name, 16 / 255, "resnet18", {"lam": 20.0, "spread": 0.4, **WHOLE, **every}, {})
        for name, every in (("cifar10-16", {"every": 10}), ("cifar100-16", {}))
    ),
]
REFUSED = [
    ("liet", {"lam": -1.0}, ("liet", "lam", "-1.0", ">= 0")),
    ("liet", {"every": 0}, ("liet", "every", "0", ">= 1")),
    ("liet", {"spread": 1.0}, ("liet", "spread", "1.0", "[0, 1)")),
    ("liet", {"least_noise": -0.1}, ("liet", "least_noise", "-0.1", "[0, 1]")),
    ("liet", {"most_noise": 0.05}, ("liet", "most_noise", "0.05", "0.1")),
    ("liet", {"far": "no"}, ("liet", "far", "no")),
]
