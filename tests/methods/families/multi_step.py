"""Methods whose attack takes several steps."""

import copy

import torch

from families.core import pgd
from families.maths import EPS, ball, cross_entropy, mean_ce, signs

E8, STEP2 = 8 / 255, 2 / 255


def climb(net, x, y, p, steps, alpha):
    for _ in range(steps):
        p = ball(p + alpha * signs(net, p, y), x)
    return p


def uniform_start(x):
    return ball(x + torch.empty_like(x).uniform_(-EPS, EPS), x)


def alp(net, x, y, smoothing, lam, steps, alpha=EPS / 4):
    p = climb(net, x, y, uniform_start(x), steps, alpha)

    def loss(z):
        clean, adv = z.chunk(2)
        ce = (mean_ce(clean, y, smoothing) + mean_ce(adv, y, smoothing)) / 2
        return (
            ce
            + lam
            * sum((a - b) ** 2 for a, b in zip(clean.flatten(), adv.flatten(), strict=True))
            / clean.numel()
        )

    return torch.cat([x, p]), loss, slice(len(x), None)


def divergence(p, q):
    p, q = p.log_softmax(0), q.log_softmax(0)
    return sum(p[k].exp() * (p[k] - q[k]) for k in range(len(p)))


def mart(net, x, y, smoothing, beta, steps, alpha, sigma=0.001):
    p = climb(net, x, y, x + sigma * torch.randn_like(x), steps, alpha)

    def loss(z):
        total = 0
        for i, k in enumerate(y):
            clean, adv = z[i], z[len(x) + i]
            others = [adv.softmax(0)[j] for j in range(len(adv)) if j != k]
            total = total - torch.log(1.0001 - torch.stack(others).max())
            total = total + beta * divergence(clean, adv) * (1 - clean.softmax(0)[k])
        return mean_ce(z[len(x) :], y, smoothing) + total / len(x)

    return torch.cat([x, p]), loss, slice(len(x), None)


def fat(net, x, y, smoothing, steps, tau=0, alpha=EPS / 4):
    frozen, points = copy.deepcopy(net).eval(), []
    for image, label, p in zip(x, y, uniform_start(x), strict=True):
        left = tau
        for _ in range(steps):
            if frozen(p[None])[0].argmax() != label:
                left -= 1
            if left < 0:
                break
            p = ball(p + alpha * signs(net, p[None], label[None])[0], image)
        points.append(p)
    points = torch.stack(points)
    return points, lambda z: mean_ce(z, y, smoothing), slice(None)


def uat(net, x, y, smoothing, labelled, lam, steps, alpha=EPS / 4):
    frozen, points = copy.deepcopy(net).eval(), []
    start = uniform_start(x)
    for image, p in zip(x, start, strict=True):
        clean = frozen(image[None])[0].detach()
        for _ in range(steps):
            leaf = p.clone().requires_grad_()
            (grad,) = torch.autograd.grad(divergence(clean, frozen(leaf[None])[0]), leaf)
            p = ball(p + alpha * grad.sign(), image)
        points.append(p)

    def loss(z):
        ce = apart = 0
        for i, k in enumerate(y):
            if (i * 2654435761) % 2**32 < labelled * 2**32:
                ce = ce + cross_entropy(z[len(x) + i], k, smoothing)
            apart = apart + divergence(z[i].detach(), z[len(x) + i])
        return ce / labelled / len(x) + lam * apart / len(x)

    return torch.cat([x, torch.stack(points)]), loss, slice(len(x), None)


def iaat(net, x, y, smoothing, steps, alpha=EPS / 4, **_):
    """In the first step every radius is eps."""
    return pgd(net, x, y, smoothing, steps, alpha)


CASES = {
    "alp": (alp, {"lam": 0.5, "steps": 3}, {}),
    "alp more": (alp, {"lam": 4.0, "steps": 2, "alpha": 0.07}, {}),
    "mart": (mart, {"beta": 5.0, "steps": 3, "alpha": 0.03}, {}),
    "mart far": (mart, {"beta": 1.0, "steps": 2, "alpha": 0.08, "sigma": 0.05}, {}),
    "fat": (fat, {"steps": 5}, {}),
    "fat tau": (fat, {"steps": 6, "tau": 2, "alpha": 0.04}, {}),
    "uat": (uat, {"labelled": 0.5, "lam": 5.0, "steps": 2}, {}),
    "uat all": (uat, {"labelled": 1.0, "lam": 1.0, "steps": 2, "alpha": 0.07}, {}),
    "iaat": (iaat, {"steps": 3}, {}),
    "pgd-wa": (pgd, {"steps": 4}, {}),
}
STEPS = {"steps": 3, "alpha": 0.05}
SMALL = {
    **dict.fromkeys(("alp", "fat", "iaat", "pgd-wa"), STEPS),
    "uat": {**STEPS, "labelled": 0.5},
    "mart": {**STEPS, "sigma": 0.05},
}
BY_HAND = [
    ("alp", {"steps": 7}, 9, 9, 2),
    ("mart", {"steps": 10}, 12, 12, 2),
    ("fat", {"steps": 10}, 11, 11, 1),
    ("iaat", {"steps": 10}, 12, 11, 1),
    ("uat", {"steps": 10}, 13, 12, 2),
    ("pgd-wa", {"steps": 10}, 11, 11, 1),
]
REFUSED = [
    ("alp", {"lam": -1}, ("alp", "lam", "-1")),
    ("alp", {"steps": 0}, ("alp", "steps", "0")),
    ("mart", {"beta": -1}, ("mart", "beta", "-1")),
    ("mart", {"sigma": -1}, ("mart", "sigma", "-1")),
    ("fat", {"tau": -1}, ("fat", "tau", "-1")),
    ("iaat", {"gamma": 0.0}, ("iaat", "gamma", "0.0")),
    ("iaat", {"beta": 1.0}, ("iaat", "beta", "1.0")),
    ("uat", {"labelled": 0.0}, ("uat", "labelled", "0.0")),
    ("uat", {"lam": -1}, ("uat", "lam", "-1")),
]
PUBLISHED = [
    (
        "pgd-wa",
        "cifar10",
        E8,
        None,
        {"steps": 10, "alpha": STEP2},
        {"ema": 0.9995, "label_smoothing": 0.4},
    ),
    ("mart", "cifar10", E8, None, {"beta": 5.0, "steps": 10, "alpha": STEP2}, {"batch_size": 128}),
    ("fat", "cifar10", E8, None, {"tau": 1, "steps": 10, "alpha": STEP2}, {"batch_size": 128}),
]
