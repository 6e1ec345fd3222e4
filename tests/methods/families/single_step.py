"""Methods of one gradient step and their regularizers."""

import copy

import torch

from families.maths import (
    EPS,
    ball,
    box,
    ce_at,
    cross_entropy,
    mean_ce,
    noise_signs,
    signs,
    squared_distance,
    train_signs,
)

E8 = 8 / 255
FAST = {"epochs": 30, "lr": 0.2, "schedule": "triangular", "batch_size": 128}


def uniform(x, radius=EPS):
    return torch.empty_like(x).uniform_(-radius, radius)


def train_gradient(net, x, y):
    x = x.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(copy.deepcopy(net).train()(x), y)
    return torch.autograd.grad(loss, x)[0]


def zerograd(net, x, y, smoothing, q=0.35, alpha=2 * EPS):
    start = x + uniform(x)
    step = []
    for grad in train_gradient(net, start, y):
        sizes = sorted(grad.abs().flatten().tolist())
        cut = sizes[int(q * len(sizes))]
        step.append(torch.where(grad.abs() >= cut, grad.sign(), 0.0))
    return ce_at(ball(start + alpha * torch.stack(step), x), y, smoothing)


def multigrad(net, x, y, smoothing, starts=3, alpha=2 * EPS):
    seen = [train_signs(net, box(x + uniform(x)), y) for _ in range(starts)]
    agreed = seen[0].clone()
    for other in seen[1:]:
        agreed[other != seen[0]] = 0
    return ce_at(ball(x + alpha * agreed, x), y, smoothing)


def sat_r2_on_zerograd(net, x, y, smoothing, lam, alpha, q=0.35):
    start = x + uniform(x)
    both = torch.cat([start, start + alpha * noise_signs(x)])
    views = []
    for point, grad in zip(both, train_gradient(net, both, torch.cat([y, y])), strict=True):
        cut = sorted(grad.abs().flatten().tolist())[int(q * grad.numel())]
        views.append(point + 2 * EPS * torch.where(grad.abs() >= cut, grad.sign(), 0.0))
    n = len(x)
    views = ball(torch.stack(views), torch.cat([x, x]))

    def loss(z):
        return mean_ce(z[:n], y, smoothing) + lam * squared_distance(z[:n], z[n:])

    return views, loss, slice(n)


def gradalign(net, x, y, smoothing, lam):
    n, x_f = len(x), box(x + EPS * signs(net, x, y))
    here = train_gradient(net, x, y)
    views = torch.cat([x_f, x + uniform(x)]).requires_grad_()

    def loss(z):
        beside = sum(cross_entropy(row, k) for row, k in zip(z[n:], y, strict=True))
        there = torch.autograd.grad(beside, views, create_graph=True)[0][n:]
        turn = 0
        for a, b in zip(here, there, strict=True):
            a, b = a.flatten() * 1e6, b.flatten() * 1e6
            turn = turn + 1 - (a * b).sum() / ((a * a).sum().sqrt() * (b * b).sum().sqrt())
        return mean_ce(z[:n], y, smoothing) + lam * turn / n

    return views, loss, slice(n)


def noisy_step(net, x, y, noise, alpha):
    """N-FGSM's point, which does not return to the ball."""
    start = box(x + uniform(x, noise * EPS))
    return box(start + alpha * train_signs(net, start, y))


def elle(net, x, y, smoothing, lam, noise=0.0, alpha=EPS):
    n = len(x)
    x_f = noisy_step(net, x, y, noise, alpha) if noise else box(x + alpha * signs(net, x, y))
    a, b = x + uniform(x), x + uniform(x)
    share = torch.rand(n, *[1] * (x.dim() - 1), dtype=x.dtype)
    views = torch.cat([x_f, a, b, (1 - share) * a + share * b])

    def loss(z):
        gap = 0
        for i in range(n):
            at_a, at_b, between = (cross_entropy(z[k * n + i], y[i]) for k in (1, 2, 3))
            s = share[i].item()
            gap = gap + (between - (1 - s) * at_a - s * at_b) ** 2
        return mean_ce(z[:n], y, smoothing) + lam * gap / n

    return views, loss, slice(n)


def elle_a(net, x, y, smoothing, lam=0.0, **on_n):
    return elle(net, x, y, smoothing, 0.0, **on_n)  # off until the gap leaps


def aaer(net, x, y, smoothing, lam=1.0, lam_loss=2.5, lam_spread=1.5, noise=0.0, alpha=1.25 * EPS):
    """With noise: over N-FGSM, whose point does not return to the ball."""
    start = box(x + uniform(x, noise * EPS)) if noise else x + uniform(x, EPS)
    was = copy.deepcopy(net).train()(start).detach()
    before = [cross_entropy(row, k) for row, k in zip(was, y, strict=True)]
    points = start + alpha * train_signs(net, start, y)
    points = box(points) if noise else ball(points, x)

    def loss(z):
        normal, abnormal = [], []
        for i, row in enumerate(z):
            after = cross_entropy(row, y[i])
            group = abnormal if float(after.detach()) < float(before[i]) else normal
            fall = float(before[i].detach() - after.detach())  # the authors' has no gradient
            group.append((fall, ((row - was[i]) ** 2).sum()))
        extra = 0
        if abnormal and normal:
            fall = sum(f for f, _ in abnormal) / len(abnormal)
            wide = sum(v for _, v in abnormal) / len(abnormal)
            usual = float(sum(v.detach() for _, v in normal)) / len(normal)
            spread = torch.clamp(wide - usual, min=0)
            extra = len(abnormal) / len(z) * (lam_loss * fall + lam_spread * spread)
        return mean_ce(z, y, smoothing) + lam * extra

    return points, loss, slice(None)


def sads(net, x, y, smoothing, dropout=0.4):
    points = box(x + EPS * signs(net, x, y))

    def drop(module, args, output):
        maps = output.dim() == 4
        drop_from = torch.nn.functional.dropout2d if maps else torch.nn.functional.dropout
        return drop_from(output, dropout, module.training)

    for module in net.modules():
        if isinstance(module, torch.nn.Tanh | torch.nn.SiLU):
            module.register_forward_hook(drop)
    return ce_at(points, y, smoothing)


def r_mgm(net, x, y, smoothing, lam, alpha=EPS / 2):
    start = box(x + alpha * noise_signs(x))
    x_f = box(x + EPS * signs(net, x, y))
    x_r = ball(start + (EPS - alpha) * signs(net, start, y), x)

    def loss(z):
        first, second = z.chunk(2)
        return mean_ce(first, y, smoothing) + lam * squared_distance(first, second)

    return torch.cat([x_f, x_r]), loss, slice(len(x))


def eat(net, x, y, smoothing, clean=0.5, noise=0.0, alpha=EPS):
    """The attack starts from the predicted label, which is not always the true one."""
    predicted = copy.deepcopy(net).train(bool(noise))(x).argmax(1)
    assert not torch.equal(predicted, y)
    if noise:
        x_adv = noisy_step(net, x, predicted, noise, alpha)
    else:
        x_adv = box(x + alpha * signs(net, x, predicted))

    def loss(z):
        at_clean, at_adv = (mean_ce(part, y, smoothing) for part in z.chunk(2))
        return clean * at_clean + (1 - clean) * at_adv

    return torch.cat([x, x_adv]), loss, slice(len(x), None)


ON_N, AS_N = {"perturbation": "n-fgsm noise=2 alpha=0.9"}, {"noise": 2.0, "alpha": 0.9}
CASES = {
    "zerograd": (zerograd, {}, {}),
    "zerograd q alpha": (zerograd, {"q": 0.8, "alpha": 0.04}, {}),
    "zerograd none": (zerograd, {"q": 0.0}, {}),
    "sat-r2 on zerograd": (
        sat_r2_on_zerograd,
        {"lam": 2.0, "alpha": 0.03, "perturbation": "zerograd"},
        {},
    ),
    "multigrad": (multigrad, {}, {}),
    "multigrad 2 alpha": (multigrad, {"starts": 2, "alpha": 0.05}, {}),
    "gradalign": (gradalign, {"lam": 0.2}, {}),
    "gradalign more": (gradalign, {"lam": 3.0}, {}),
    "elle": (elle, {"lam": 1000.0}, {}),
    "elle less": (elle, {"lam": 3.0}, {}),
    "elle-a": (elle_a, {"lam": 4000.0}, {}),
    "elle on n-fgsm": (elle, {"lam": 3.0, **ON_N}, AS_N),
    "elle-a on n-fgsm": (elle_a, {"lam": 4000.0, **ON_N}, AS_N),
    "aaer": (aaer, {}, {}),
    "aaer weights": (aaer, {"lam": 0.7, "lam_loss": 1.1, "lam_spread": 0.3}, {}),
    "aaer on n-fgsm": (aaer, {"lam": 0.7, **ON_N}, AS_N),
    "sads": (sads, {}, {}),
    "sads more": (sads, {"dropout": 0.7}, {}),
    "r-mgm": (r_mgm, {"lam": 5.0}, {}),
    "r-mgm alpha": (r_mgm, {"lam": 1.0, "alpha": 0.02}, {}),
    "eat": (eat, {}, {}),
    "eat clean": (eat, {"clean": 0.2}, {}),
    "eat on n-fgsm": (eat, ON_N, AS_N),
}
APART = {"aaer": {"lam_spread": 0.0}}  # which compares the means of the batch
SMALL = {"elle": {"lam": 300.0}, "elle-a": {"lam": 300.0}}
BY_HAND = [
    ("zerograd", {}, 2, 2, 1),
    ("multigrad", {}, 4, 4, 1),
    ("gradalign", {}, 4, 6, 2),
    ("gradalign", {"perturbation": "multigrad"}, 6, 8, 2),
    ("elle", {}, 5, 5, 4),
    ("elle-a", {}, 5, 5, 4),
    ("aaer", {}, 2, 2, 1),
    ("sads", {}, 2, 2, 1),
    ("r-mgm", {}, 4, 4, 2),
    ("eat", {}, 3, 3, 2),
    ("sat-r2", {"perturbation": "multigrad"}, 8, 8, 2),
]
REFUSED = [
    ("zerograd", {"q": 1.0}, ("zerograd", "q", "1.0", "[0, 1)")),
    ("zerograd", {"alpha": -1.0}, ("zerograd", "alpha", "-1.0")),
    ("multigrad", {"starts": 0}, ("multigrad", "starts", "0")),
    ("gradalign", {"lam": -0.2}, ("gradalign", "lam", "-0.2")),
    ("gradalign", {"perturbation": "pgd"}, ("gradalign", "'pgd'", "single-step")),
    ("elle", {"lam": -1}, ("elle", "lam", "-1")),
    ("elle-a", {"decay": 1.0}, ("elle-a", "decay", "1.0")),
    ("aaer", {"lam": -1}, ("aaer", "lam", "-1")),
    ("aaer", {"lam_loss": -1}, ("aaer", "lam_loss", "-1")),
    ("aaer", {"lam_spread": -1}, ("aaer", "lam_spread", "-1")),
    ("r-mgm", {"lam": -1}, ("r-mgm", "lam", "-1")),
    ("r-mgm", {"alpha": 0.2}, ("r-mgm", "alpha", "0.2", "0.1")),
    ("eat", {"clean": 1.0}, ("eat", "clean", "1.0")),
]
PUBLISHED = [
    ("zerograd", "cifar10", E8, None, {"q": 0.35}, FAST),
    ("zerograd", "cifar100", E8, None, {"q": 0.45}, FAST),
    ("aaer", "cifar10", E8, None, {"lam": 1.0, "lam_loss": 2.5, "lam_spread": 1.5}, FAST),
    ("aaer", "cifar10-16", 16 / 255, None, {"lam": 1.0, "lam_loss": 7.0, "lam_spread": 3.25}, FAST),
    ("aaer", "cifar100", E8, None, {"lam": 1.0, "lam_loss": 3.5, "lam_spread": 1.5}, FAST),
    (
        *("aaer", "cifar10-n-16", 16 / 255, None),
        {"lam": 1.0, "lam_loss": 8.5, "lam_spread": 1.5, "perturbation": "n-fgsm"},
        FAST,
    ),
    ("r-mgm", "mnist", 0.3, None, {"lam": 5.0, "alpha": 0.01}, {}),
    ("r-mgm", "cifar10", E8, None, {"lam": 25.0, "alpha": 2 / 255}, {}),
    (
        *("aaer", "cifar10-n", E8, None),
        {"lam": 1.0, "lam_loss": 1.5, "lam_spread": 0.15, "perturbation": "n-fgsm"},
        FAST,
    ),
    ("multigrad", "cifar10", E8, None, {"starts": 3}, FAST),
    ("gradalign", "cifar10", E8, None, {"lam": 0.2}, {"epochs": 30}),
    ("elle", "cifar10", E8, None, {"lam": 1000.0}, FAST),
    ("elle-a", "cifar10", E8, None, {"lam": 4000.0}, FAST),
]
TRAIN_PASSES = {"zerograd": 2, "multigrad": 4, "gradalign": 2, "aaer": 2}
DETERMINISTIC = ("eat",)
