"""Methods whose attack takes several steps."""

import copy

import torch

from families.core import ce_at, pgd
from families.maths import EPS, ball, cross_entropy, signs

E8, STEP2 = 8 / 255, 2 / 255


def climb(net, x, y, p, steps, alpha):
    for _ in range(steps):
        p = ball(p + alpha * signs(net, p, y), x)
    return p


def uniform_start(x):
    return ball(x + torch.empty_like(x).uniform_(-EPS, EPS), x)


def divergence(p, q):
    p, q = p.log_softmax(0), q.log_softmax(0)
    return sum(p[k].exp() * (p[k] - q[k]) for k in range(len(p)))


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
    """In the first steps the radius is eps where the clean image is right, else 0."""
    p = climb(net, x, y, uniform_start(x), steps, alpha)
    right = copy.deepcopy(net).eval()(x).argmax(1) == y
    points = torch.where(right.view(-1, *[1] * (x.dim() - 1)), p, x)
    return ce_at(points, y, smoothing)


CASES = {
    "uat": (uat, {"labelled": 0.5, "lam": 5.0, "steps": 2}, {}),
    "uat all": (uat, {"labelled": 1.0, "lam": 1.0, "steps": 2, "alpha": 0.07}, {}),
    "iaat": (iaat, {"steps": 3}, {}),
    "pgd-wa": (pgd, {"steps": 4}, {}),
}
STEPS = {"steps": 3, "alpha": 0.05}
SMALL = {
    **dict.fromkeys(("iaat", "pgd-wa"), STEPS),
    "uat": {**STEPS, "labelled": 0.5},
}
BY_HAND = [
    ("iaat", {"steps": 10}, 14, 11, 1),
    ("uat", {"steps": 10}, 13, 12, 2),
    ("pgd-wa", {"steps": 10}, 11, 11, 1),
]
REFUSED = [
    ("iaat", {"gamma": 0.0}, ("iaat", "gamma", "0.0")),
    ("iaat", {"beta": 0.0}, ("iaat", "beta", "0.0")),
    ("uat", {"labelled": 0.0}, ("uat", "labelled", "0.0")),
    ("uat", {"lam": -1}, ("uat", "lam", "-1")),
]
PUBLISHED = [
    (
        "pgd-wa",
        "cifar10",
        E8,
        "resnet18",
        {"steps": 10, "alpha": STEP2},
        {
            **{"ema": 0.9995, "label_smoothing": 0.4, "epochs": 100, "schedule": "onecycle"},
            **{"lr": 0.1, "batch_size": 128},
        },
    ),
]
