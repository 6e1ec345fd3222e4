"""Methods that follow a course: guided attacks, relaxed labels, templates, smooth convergence."""

import copy
import math

import torch

from families.maths import (
    EPS,
    ball,
    box,
    cross_entropy,
    mean_ce,
    noise_signs,
    relaxed,
    train_signs,
)

E8 = 8 / 255
HALF = {"step": 10, "steps_per_epoch": 5, "epochs": 4}  # even
ODD = {"step": 7, "steps_per_epoch": 5, "epochs": 4}
LATE = {"step": 18, "steps_per_epoch": 5, "epochs": 4}


def probabilities_apart(a, b):
    return ((a.softmax(1) - b.softmax(1)) ** 2).sum()


def nuclear(a, b):
    eigenvalues = torch.linalg.eigvalsh((a - b).T @ (a - b))
    return eigenvalues.clamp(min=1e-18).sqrt().sum()


def guided(distance):
    def oracle(net, x, y, smoothing, lam, odd=False, alpha=EPS / 2):
        start = box(x + alpha * noise_signs(x))
        frozen = copy.deepcopy(net).eval()
        leaf = start.clone().requires_grad_()
        z = frozen(leaf)
        goal = sum(cross_entropy(row, k) for row, k in zip(z, y, strict=True))
        if odd:
            goal = goal + lam * distance(frozen(x).detach(), z)
        x_adv = ball(start + EPS * torch.autograd.grad(goal, leaf)[0].sign(), x)

        def loss(z):
            clean, adv = z.chunk(2)
            return mean_ce(clean, y, smoothing) + lam * distance(clean, adv) / len(x)

        return torch.cat([x, x_adv]), loss, slice(len(x), None)

    return oracle


def tdat(net, x, y, smoothing, lam=0.65, relax=0.6, least=0.15, done=0.0):
    share = max(relax * math.tan(1 - done), least)
    start = ball(x + torch.empty_like(x).uniform_(-EPS, EPS), x)
    frozen, leaf = copy.deepcopy(net).eval(), start.clone().requires_grad_()
    goal = sum(relaxed(row, k, share) for row, k in zip(frozen(leaf), y, strict=True))
    x_adv = ball(start + EPS * torch.autograd.grad(goal, leaf)[0].sign(), x)

    def loss(z):
        total = 0
        for i, k in enumerate(y):
            a, b = z[i], z[len(x) + i]
            log_p = b.log_softmax(0)
            total = total + share * cross_entropy(b, k, smoothing) - (1 - share) * log_p.mean()
            total = total + lam * ((a - b) ** 2).sum() * torch.tanh(1 - a.softmax(0)[k])
        return total / len(x)

    return torch.cat([start, x_adv]), loss, slice(len(x), None)


def converge_smooth(net, x, y, smoothing):
    """In the first epoch there is nothing to compare with: the clean images only come along."""
    start = x + torch.empty_like(x).uniform_(-EPS, EPS)
    x_adv = ball(start + 1.25 * EPS * train_signs(net, start, y), x)
    return torch.cat([x_adv, x]), lambda z: mean_ce(z[: len(x)], y, smoothing), slice(len(x))


gat, nuat = guided(probabilities_apart), guided(nuclear)
CASES = {
    "gat": (gat, {"lam": 10.0}, {}),
    "gat alpha": (gat, {"lam": 1.0, "alpha": 0.03}, {}),
    "gat odd": (gat, {"lam": 10.0, "progress": ODD}, {"odd": True}),
    "gat late": (gat, {"lam": 2.0, "progress": LATE}, {"lam": 8.0}),
    "gat later": (gat, {"lam": 2.0, "late_from": 0.95, "progress": LATE}, {"lam": 2.0}),
    "gat always": (gat, {"lam": 10.0, "guide_every": 1}, {"odd": True}),
    "nuat": (nuat, {"lam": 4.5, "progress": HALF}, {"lam": 2.5}),
    "nuat to the end": (nuat, {"lam": 4.5, "full_from": 1.0, "progress": HALF}, {"lam": 2.25}),
    "nuat full": (nuat, {"lam": 4.5, "full_from": 0.4, "progress": HALF}, {"lam": 4.5}),
    "nuat begins": (nuat, {"lam": 4.5}, {"lam": 0.0}),
    "nuat odd": (
        nuat,
        {"lam": 4.0, "full_from": 1.0, "progress": ODD, "alpha": 0.02},
        {"lam": 1.4, "odd": True},
    ),
    "tdat": (tdat, {}, {}),
    "tdat half": (tdat, {"lam": 2.0, "progress": HALF}, {"done": 0.5}),
    "tdat late": (tdat, {"relax": 0.5, "least": 0.2, "progress": LATE}, {"done": 0.9}),
    "converge-smooth": (converge_smooth, {}, {}),
}
BY_HAND = [
    ("gat", {}, 3.5, 3, 2),
    ("gat", {"guide_every": 1}, 4, 3, 2),
    ("nuat", {}, 3.5, 3, 2),
    ("tdat", {}, 3, 3, 2),
    ("converge-smooth", {}, 3, 3, 2),
    ("converge-smooth", {"perturbation": "trades"}, 14, 13, 3),
]
REFUSED = [
    ("gat", {"lam": -1}, ("gat", "lam", "-1")),
    ("gat", {"alpha": -0.1}, ("gat", "alpha", "-0.1")),
    ("gat", {"guide_every": 0}, ("gat", "guide_every", "0")),
    ("nuat", {"full_from": 0.0}, ("nuat", "full_from", "0.0")),
    ("nuat", {"lam": -1}, ("nuat", "lam", "-1")),
    ("tdat", {"lam": -1}, ("tdat", "lam", "-1")),
    ("tdat", {"relax": 0.7}, ("tdat", "relax", "0.7")),
    ("tdat", {"least": 0.0}, ("tdat", "least", "0.0")),
    ("converge-smooth", {"perturbation": "nothing"}, ("method", "'nothing'")),
    ("converge-smooth", {"compare": "step"}, ("converge-smooth", "compare", "'step'")),
    ("converge-smooth", {"gamma": -1}, ("converge-smooth", "gamma", "-1")),
    ("converge-smooth", {"weight": -1}, ("converge-smooth", "weight", "-1")),
    ("converge-smooth", {"pull": -1}, ("converge-smooth", "pull", "-1")),
]
ON_MNIST = {"lam": 15.0, "late": 3.0, "late_from": 0.52, "alpha": 0.3, "guide_every": 1}
PUBLISHED = [
    ("gat", "cifar10", E8, None, {"lam": 10.0}, {}),
    ("gat", "mnist", 0.3, "lenet+", ON_MNIST, {}),
    ("gat", "mnist-long", 0.3, "lenet+", ON_MNIST, {"epochs": 50}),
    ("nuat", "cifar10", E8, None, {"lam": 4.5}, {"batch_size": 64}),
    (
        "nuat",
        "cifar10-wa",
        E8,
        None,
        {"lam": 4.0, "full_from": 1.0},
        {"batch_size": 64, "ema": 0.9998},
    ),
    ("tdat", "cifar10", E8, None, {"lam": 0.65}, {}),
]
TRAIN_PASSES = {"converge-smooth": 2}
COUPLED = {"nuat": "the nuclear norm is of the batch's matrix of logits"}
