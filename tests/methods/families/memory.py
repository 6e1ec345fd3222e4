"""Methods that keep something from step to step; here their first step, when there is nothing."""

import copy

import torch

from families.maths import EPS, ball, box, mean_ce, relaxed, signs

E8 = 8 / 255


def mse(a, b):
    return sum((p - q) ** 2 for p, q in zip(a.flatten(), b.flatten(), strict=True)) / a.numel()


def fgsm_mep(net, x, y, smoothing, lam, alpha=EPS):
    start = ball(x + torch.empty_like(x).uniform_(-EPS, EPS), x)
    x_adv = ball(start + alpha * signs(net, start, y), x)

    def loss(z):
        return mean_ce(z[len(x) :], y, smoothing) + lam * mse(z[len(x) :], z[: len(x)])

    return torch.cat([start, x_adv]), loss, slice(len(x), None)


def fgsm_pco(net, x, y, smoothing, lam, stretch=1.5, smooth=0.4):
    frozen, leaf = copy.deepcopy(net).eval(), x.clone().requires_grad_()
    z = frozen(leaf)
    goal = sum(relaxed(row, k, 1 - smooth) for row, k in zip(z, y, strict=True))
    new = ball(x + EPS * torch.autograd.grad(goal, leaf)[0].sign(), x)
    mixed = []
    for i, k in enumerate(y):
        c = 1 - float(z[i].softmax(0)[k].detach())
        mixed.append(box(c * x[i] + (1 - c) * (x[i] + stretch * (new[i] - x[i]))))
    n = len(x)

    def loss(z):
        old, new, mixed = z[:n], z[n : 2 * n], z[2 * n :]
        return mean_ce(mixed, y, smoothing) + lam * (mse(new, old) - mse(new, mixed)).abs()

    return torch.cat([x, new, torch.stack(mixed)]), loss, slice(2 * n, None)


def fgsm_uap(net, x, y, smoothing, lam, **_):
    x_adv = ball(x + EPS * signs(net, x, y), x)

    def loss(z):
        return mean_ce(z[len(x) :], y, smoothing) + lam * mse(z[len(x) :], z[: len(x)])

    return torch.cat([x, x_adv]), loss, slice(len(x), None)


def fgsm_fuap(net, x, y, smoothing, lam, **_):
    torch.empty_like(x).uniform_(-EPS, EPS)  # the features' random point
    return fgsm_uap(net, x, y, smoothing, lam)


def free(net, x, y, smoothing, **_):
    return x, lambda z: mean_ce(z, y, smoothing), slice(None)


def pap(net, x, y, smoothing, steps, last=1, **_):
    """The pipeline begins full of the last images; what leaves it has no weight yet."""
    x_l = x[-last:]
    x_f = ball(x + EPS * signs(net, x, y), x)
    leaving_f = ball(x_l + EPS * signs(net, x_l, y[-last:]), x_l)
    leaving = ball(x_l + EPS / steps * signs(net, x_l, y[-last:]), x_l)
    points = torch.cat([x_f, leaving_f, leaving])
    return points, lambda z: mean_ce(z[: len(x)], y, smoothing), slice(len(x))


CASES = {
    "fgsm-mep": (fgsm_mep, {"lam": 10.0}, {}),
    "fgsm-mep alpha": (fgsm_mep, {"lam": 1.0, "alpha": 0.03}, {}),
    "fgsm-pco": (fgsm_pco, {"lam": 10.0}, {}),
    "fgsm-pco stretch": (
        fgsm_pco,
        {"lam": 1.0, "stretch": 0.8, "smoothing": 0.1},
        {"smooth": 0.1},
    ),
    "fgsm-uap": (fgsm_uap, {"lam": 10.0}, {}),
    "fgsm-uap alpha": (fgsm_uap, {"lam": 1.0, "alpha": 0.02, "decay": 0.5}, {}),
    "fgsm-cuap": (fgsm_uap, {"lam": 10.0}, {}),
    "fgsm-fuap": (fgsm_fuap, {"lam": 10.0, "count": 5}, {}),
    "free": (free, {"replays": 4}, {}),
    "pap": (pap, {"lam": 0.2, "steps": 3}, {}),
    "pap half": (pap, {"lam": 2.0, "steps": 2, "fraction": 0.5}, {"last": 3}),
}
SMALL = {"pap": {"steps": 2, "lam": 2.0}, "free": {"replays": 2}, "fgsm-fuap": {"count": 4}}
BY_HAND = [
    ("fgsm-mep", {}, 3, 3, 2),
    ("fgsm-pco", {}, 4, 4, 3),
    ("fgsm-uap", {}, 3, 3, 2),
    ("fgsm-cuap", {}, 3, 3, 2),
    ("fgsm-fuap", {}, 4, 3, 2),
    ("free", {}, 1, 1, 1),
    ("pap", {"steps": 4}, 2 + 7 / 8, 2 + 7 / 8, 1 + 2 / 8),
]
REFUSED = [
    ("fgsm-mep", {"lam": -1}, ("fgsm-mep", "lam", "-1")),
    ("fgsm-mep", {"decay": -1}, ("fgsm-mep", "decay", "-1")),
    ("fgsm-mep", {"reset": 0}, ("fgsm-mep", "reset", "0")),
    ("fgsm-mep", {"alpha": -1}, ("fgsm-mep", "alpha", "-1")),
    ("fgsm-pco", {"lam": -1}, ("fgsm-pco", "lam", "-1")),
    ("fgsm-pco", {"stretch": -1}, ("fgsm-pco", "stretch", "-1")),
    ("fgsm-pco", {"smoothing": 1.0}, ("fgsm-pco", "smoothing", "1.0")),
    ("fgsm-uap", {"lam": -1}, ("fgsm-uap", "lam", "-1")),
    ("fgsm-uap", {"decay": -1}, ("fgsm-uap", "decay", "-1")),
    ("fgsm-uap", {"alpha": -1}, ("fgsm-uap", "alpha", "-1")),
    ("fgsm-fuap", {"count": 0}, ("fgsm-fuap", "count", "0")),
    ("fgsm-fuap", {"pick_lr": -1}, ("fgsm-fuap", "pick_lr", "-1")),
    ("free", {"replays": 0}, ("free", "replays", "0")),
    ("pap", {"lam": -1}, ("pap", "lam", "-1")),
    ("pap", {"steps": 1}, ("pap", "steps", "1")),
    ("pap", {"fraction": 0.0}, ("pap", "fraction", "0.0")),
]
PUBLISHED = [
    ("fgsm-mep", "cifar10", E8, None, {"lam": 10.0}, {"label_smoothing": 4 / 9}),
    ("fgsm-mep", "cifar100", E8, None, {"lam": 10.0}, {"epochs": 100}),
    ("fgsm-pco", "cifar10", E8, None, {"lam": 10.0}, {"label_smoothing": 4 / 9}),
    ("fgsm-uap", "cifar10", E8, None, {"lam": 10.0}, {"label_smoothing": 0.4}),
    ("free", "cifar10", E8, None, {"replays": 8}, {}),
]
REACH = {"fgsm-pco": 0.05}  # the new perturbation, stretched by half
DETERMINISTIC = ("pap", "fgsm-uap", "fgsm-cuap", "fgsm-fuap", "fgsm-pco", "free")
COUPLED = {"pap": "the last images of each process's share enter its pipeline"}
MAY_STAY = ("free",)
