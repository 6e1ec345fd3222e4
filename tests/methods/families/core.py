"""The baselines and the three SAT."""

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


def standard(net, x, y, smoothing):
    return ce_at(x, y, smoothing)


def fgsm(net, x, y, smoothing):
    return ce_at(box(x + EPS * signs(net, x, y)), y, smoothing)


def r_fgsm(net, x, y, smoothing, alpha=EPS / 2):
    start = box(x + alpha * noise_signs(x))
    return ce_at(box(start + (EPS - alpha) * signs(net, start, y)), y, smoothing)


def rs_fgsm(net, x, y, smoothing, alpha=1.25 * EPS):
    delta = torch.empty_like(x).uniform_(-EPS, EPS)
    delta = delta + alpha * train_signs(net, x + delta, y)
    return ce_at(box(x + delta.clamp(-EPS, EPS)), y, smoothing)


def n_fgsm(net, x, y, smoothing, noise=2.0, alpha=EPS):
    start = box(x + torch.empty_like(x).uniform_(-noise * EPS, noise * EPS))
    return ce_at(box(start + alpha * train_signs(net, start, y)), y, smoothing)


def pgd(net, x, y, smoothing, steps, alpha=EPS / 4):
    p = ball(x + torch.empty_like(x).uniform_(-EPS, EPS), x)
    for _ in range(steps):
        p = ball(p + alpha * signs(net, p, y), x)
    return ce_at(p, y, smoothing)


def trades(net, x, y, smoothing, beta, steps, alpha, sigma):
    frozen = copy.deepcopy(net).eval()

    def divergence(p, q):
        p, q = p.log_softmax(0), q.log_softmax(0)
        return sum(p[k].exp() * (p[k] - q[k]) for k in range(len(p)))

    adversarial = []
    for image, start in zip(x, x + sigma * torch.randn_like(x), strict=True):
        clean = frozen(image[None])[0].detach()
        for _ in range(steps):
            leaf = start.clone().requires_grad_()
            (grad,) = torch.autograd.grad(divergence(clean, frozen(leaf[None])[0]), leaf)
            start = ball(start + alpha * grad.sign(), image)
        adversarial.append(start)

    def loss(z):
        pairs = zip(z[: len(x)], z[len(x) :], strict=True)
        kl = sum(divergence(p, q) for p, q in pairs) / len(x)
        return mean_ce(z[: len(x)], y, smoothing) + beta * kl

    return torch.cat([x, torch.stack(adversarial)]), loss, slice(len(x), None)


def sat_r1(net, x, y, smoothing, lam, steps, last=1):
    m = len(x)
    x_f, x_i = box(x + EPS * signs(net, x, y)), x[-last:]
    for _ in range(steps):
        x_i = ball(x_i + EPS / steps * signs(net, x_i, y[-last:]), x[-last:])

    def loss(z):
        return mean_ce(z[:m], y, smoothing) + lam * squared_distance(z[m - last : m], z[m:])

    return torch.cat([x_f, x_i]), loss, slice(m)


def sat_r2(net, x, y, smoothing, lam, alpha, project=False, last=6):
    m, x_l = len(x), x[-last:]
    noisy = x_l + alpha * noise_signs(x_l)
    x_f = box(x + EPS * signs(net, x, y))
    x_r = noisy + EPS * signs(net, noisy, y[-last:])
    x_r = ball(x_r, x_l) if project else box(x_r)

    def loss(z):
        return mean_ce(z[:m], y, smoothing) + lam * squared_distance(z[m - last : m], z[m:])

    return torch.cat([x_f, x_r]), loss, slice(m)


def sat_r3(net, x, y, smoothing, lam, tau, alpha, eps_low, project=False, per_sample=False, last=6):
    start = box(x + alpha * noise_signs(x))
    g = signs(net, start, y)
    views = [box(start + size * g) for size in (eps_low, EPS)]
    if project:
        views = [ball(start + size * g, x) for size in (eps_low, EPS)]

    views[0] = views[0][-last:]

    def loss(z):
        low = [cross_entropy(row, k) for row, k in zip(z[:last], y[-last:], strict=True)]
        high = [cross_entropy(row, k) for row, k in zip(z[last:], y, strict=True)]
        pairs = list(zip(low, high[-last:], strict=True))
        if per_sample:
            hinge = sum((a - tau * b).clamp(min=0) for a, b in pairs) / last
        else:
            hinge = (sum(a for a, _ in pairs) / last - tau * sum(b for _, b in pairs) / last).clamp(
                min=0
            )
        return mean_ce(z[last:], y, smoothing) + lam * hinge

    return torch.cat(views), loss, slice(last, None)


def sat_r1_on_n_fgsm(net, x, y, smoothing, lam, steps, noise):
    """Neither ends in the ball, so that noise is left in both."""
    start = box(x + torch.empty_like(x).uniform_(-noise * EPS, noise * EPS))
    g = train_signs(net, start, y)
    x_f, x_i = box(start + EPS * g), box(start[-1:] + EPS / steps * g[-1:])
    for _ in range(steps - 1):
        x_i = box(x_i + EPS / steps * signs(net, x_i, y[-1:]))

    def loss(z):
        return mean_ce(z[:-1], y, smoothing) + lam * squared_distance(z[-2:-1], z[-1:])

    return torch.cat([x_f, x_i]), loss, slice(len(x))


def sat_r1_on_rs_fgsm(net, x, y, smoothing, lam, steps):
    """I-FGSM starts at RS-FGSM's start, its steps add up to RS-FGSM's."""
    size = 1.25 * EPS
    start = x + torch.empty_like(x).uniform_(-EPS, EPS)
    g = train_signs(net, start, y)
    x_f = ball(start + size * g, x)
    x_i = ball(start[-1:] + size / steps * g[-1:], x[-1:])
    for _ in range(steps - 1):
        x_i = ball(x_i + size / steps * signs(net, x_i, y[-1:]), x[-1:])

    def loss(z):
        return mean_ce(z[:-1], y, smoothing) + lam * squared_distance(z[-2:-1], z[-1:])

    return torch.cat([x_f, x_i]), loss, slice(len(x))


def sat_r2_on_n_fgsm(net, x, y, smoothing, lam, alpha, noise=2.0):
    start = box(x + torch.empty_like(x).uniform_(-noise * EPS, noise * EPS))
    both = torch.cat([start, start + alpha * noise_signs(x)])
    views = box(both + EPS * train_signs(net, both, torch.cat([y, y])))

    def loss(z):
        first, second = z.chunk(2)
        return mean_ce(first, y, smoothing) + lam * squared_distance(first, second)

    return views, loss, slice(len(x))


def sat_r3_on_rs_fgsm(net, x, y, smoothing, lam, tau, alpha, eps_low):
    first = x + torch.empty_like(x).uniform_(-EPS, EPS)
    start = box(first + alpha * noise_signs(x))
    g = train_signs(net, start, y)
    views = torch.cat([ball(start + eps_low * g, x), ball(start + 1.25 * EPS * g, x)])

    def loss(z):
        low, high = (mean_ce(part, y, 0.0) for part in z.chunk(2))
        hinge = (low - tau * high).clamp(min=0)
        return mean_ce(z[len(x) :], y, smoothing) + lam * hinge

    return views, loss, slice(len(x), None)


R2 = {"lam": 5.0, "alpha": 0.03}
R3 = {"lam": 1.5, "tau": 0.4, "alpha": 0.03, "eps_low": 0.04}
# (oracle, the method's parameters, what the oracle calls differently)
CASES = {
    "standard": (standard, {}, {}),
    "fgsm": (fgsm, {}, {}),
    "r-fgsm": (r_fgsm, {}, {}),
    "r-fgsm alpha": (r_fgsm, {"alpha": 0.02}, {}),
    "rs-fgsm": (rs_fgsm, {}, {}),
    "rs-fgsm alpha": (rs_fgsm, {"alpha": 0.06}, {}),
    "n-fgsm": (n_fgsm, {}, {}),
    "n-fgsm noise alpha": (n_fgsm, {"noise": 0.5, "alpha": 0.07}, {}),
    "pgd": (pgd, {"steps": 4}, {}),
    "pgd alpha": (pgd, {"steps": 2, "alpha": 0.07}, {}),
    "trades": (trades, {"beta": 6.0, "steps": 3, "alpha": 0.03, "sigma": 0.001}, {}),
    "trades far": (trades, {"beta": 1.0, "steps": 2, "alpha": 0.08, "sigma": 0.05}, {}),
    "sat-r1": (sat_r1, {"lam": 0.2, "steps": 3}, {}),
    "sat-r1 K=1": (sat_r1, {"lam": 2.0, "steps": 1}, {}),
    "sat-r1 K=10": (sat_r1, {"lam": 2.0, "steps": 10}, {}),
    "sat-r1 half": (sat_r1, {"lam": 2.0, "steps": 3, "fraction": 0.5}, {"last": 3}),
    "sat-r1 rounded": (sat_r1, {"lam": 2.0, "steps": 2, "fraction": 0.45}, {"last": 3}),
    "sat-r1 all": (sat_r1, {"lam": 2.0, "steps": 2, "fraction": 1.0}, {"last": 6}),
    "sat-r1 few": (sat_r1, {"lam": 2.0, "steps": 2, "fraction": 0.01}, {"last": 1}),
    "sat-r2": (sat_r2, R2, {}),
    "sat-r2 project": (sat_r2, {**R2, "project": True}, {}),
    "sat-r2 on n-fgsm": (sat_r2_on_n_fgsm, {**R2, "perturbation": "n-fgsm"}, {}),
    "sat-r2 on n-fgsm, less noise": (
        sat_r2_on_n_fgsm,
        {**R2, "perturbation": "n-fgsm noise=1/2"},
        {"noise": 0.5},
    ),
    "sat-r3 on rs-fgsm": (sat_r3_on_rs_fgsm, {**R3, "perturbation": "rs-fgsm"}, {}),
    "sat-r1 on rs-fgsm": (
        sat_r1_on_rs_fgsm,
        {"lam": 2.0, "steps": 3, "perturbation": "rs-fgsm"},
        {},
    ),
    "sat-r1 on n-fgsm": (
        sat_r1_on_n_fgsm,
        {"lam": 2.0, "steps": 3, "perturbation": "n-fgsm noise=3/2"},
        {"noise": 1.5},
    ),
    "sat-r2 half": (sat_r2, {**R2, "fraction": 0.5}, {"last": 3}),
    "sat-r2 few project": (sat_r2, {**R2, "fraction": 0.01, "project": True}, {"last": 1}),
    "sat-r3": (sat_r3, R3, {}),
    "sat-r3 slack": (sat_r3, {**R3, "tau": 50.0}, {}),
    "sat-r3 project": (sat_r3, {**R3, "project": True}, {}),
    "sat-r3 third": (sat_r3, {**R3, "fraction": 1 / 3}, {"last": 2}),
    "sat-r3 half each": (
        sat_r3,
        {**R3, "tau": 0.78, "per_sample": True, "fraction": 0.5},
        {"last": 3},
    ),
    "sat-r3 few project": (sat_r3, {**R3, "fraction": 0.01, "project": True}, {"last": 1}),
    "sat-r3 tau .78": (sat_r3, {**R3, "tau": 0.78}, {}),
    "sat-r3 tau .93": (sat_r3, {**R3, "tau": 0.93}, {}),
    "sat-r3 tau .78 each": (sat_r3, {**R3, "tau": 0.78, "per_sample": True}, {}),
    "sat-r3 tau .93 each": (sat_r3, {**R3, "tau": 0.93, "per_sample": True}, {}),
}

SMALL = {
    "r-fgsm": {"alpha": 0.03},
    "sat-r1": {"steps": 3, "lam": 2.0},
    "sat-r2": {"alpha": 0.03},
    "sat-r3": {"tau": 0.5, "alpha": 0.03, "eps_low": 0.04},
    "pgd": {"steps": 3, "alpha": 0.05},
    "trades": {"steps": 3, "alpha": 0.05, "sigma": 0.01},
}
# Worked out by hand for a batch of 8.
BY_HAND = [
    ("standard", {}, 1, 1, 1),
    ("fgsm", {}, 2, 2, 1),
    ("r-fgsm", {}, 2, 2, 1),
    ("rs-fgsm", {}, 2, 2, 1),
    ("n-fgsm", {}, 2, 2, 1),
    ("pgd", {"steps": 7}, 8, 8, 1),
    ("trades", {"steps": 10}, 13, 12, 2),
    ("trades", {"steps": 1}, 4, 3, 2),
    ("sat-r1", {"steps": 10}, 2 + 10 / 8, 2 + 10 / 8, 1 + 1 / 8),
    ("sat-r1", {"steps": 3, "fraction": 0.5}, 2 + 1.5, 2 + 1.5, 1.5),
    ("sat-r1", {"steps": 1, "fraction": 1.0}, 3, 3, 2),
    ("sat-r2", {}, 4, 4, 2),
    ("sat-r2", {"fraction": 0.125}, 2.25, 2.25, 1.125),
    ("sat-r3", {}, 3, 3, 2),
    ("sat-r3", {"fraction": 0.25}, 2.25, 2.25, 1.25),
]
E8, STEP2 = 8 / 255, 2 / 255
MNIST_SAT = {"epochs": 20, "batch_size": 32, "lr": 0.01, "schedule": "step"}
CIFAR_SAT = {"epochs": 100, "batch_size": 64, "lr": 0.1, "schedule": "step"}
R3_MNIST = {"lam": 1.0, "tau": 0.4, "alpha": 0.01, "eps_low": 0.1}
FAST = {"epochs": 10, "batch_size": 100, "optimizer": "adam", "lr": 5e-3, "schedule": "triangular"}
# The published numbers: (method, preset, eps, model, parameters, training settings).
PUBLISHED = [
    ("sat-r1", "mnist", 0.3, "lenet+", {"lam": 0.2, "steps": 10}, MNIST_SAT),
    ("sat-r2", "mnist", 0.3, "lenet+", {"lam": 5.0, "alpha": 0.01}, MNIST_SAT),
    ("sat-r3", "mnist", 0.3, "lenet+", R3_MNIST, {**MNIST_SAT, "lr": 0.05}),
    ("sat-r1", "cifar10", E8, "wrn-28-10", {"lam": 0.2, "steps": 3}, CIFAR_SAT),
    ("sat-r2", "cifar10", E8, "wrn-28-10", {"lam": 25.0, "alpha": STEP2}, CIFAR_SAT),
    ("sat-r3", "cifar10", E8, "wrn-28-10",
     {"lam": 1.0, "tau": 0.6, "alpha": STEP2, "eps_low": STEP2}, CIFAR_SAT),
    ("fgsm", "mnist", 0.3, "lenet+", {}, MNIST_SAT),
    ("fgsm", "cifar10", E8, None, {}, {"batch_size": 128}),
    ("r-fgsm", "mnist", 0.3, "lenet+", {}, {}),
    ("r-fgsm", "cifar10", E8, None, {}, {"batch_size": 128}),
    ("rs-fgsm", "mnist", 0.3, "cnn-small", {"alpha": 0.375}, FAST),
    ("rs-fgsm", "cifar10", E8, "preactresnet18", {"alpha": 10 / 255},
     {"epochs": 15, "lr": 0.2, "schedule": "triangular", "batch_size": 128}),
    ("n-fgsm", "cifar10", E8, None, {"noise": 2.0},
     {"epochs": 30, "lr": 0.2, "schedule": "triangular", "batch_size": 128}),
    ("pgd", "mnist", 0.3, "lenet+", {"steps": 40, "alpha": 0.01}, {}),
    ("pgd", "cifar10", E8, None, {"steps": 10, "alpha": STEP2}, {"batch_size": 128}),
    ("trades", "mnist", 0.3, "lenet+", {"beta": 1.0, "steps": 40, "alpha": 0.01}, {}),
    ("trades", "cifar10", E8, None, {"beta": 6.0, "steps": 10, "alpha": 0.007},
     {"batch_size": 128}),
]  # fmt: skip
REFUSED = [
    (
        "sat-r2",
        {"perturbation": "pgd"},
        ("sat-r2", "perturbation", "'pgd'", "single-step", "n-fgsm"),
    ),
    ("sat-r2", {"perturbation": "m-fgsm"}, ("method", "'m-fgsm'", "n-fgsm")),
    ("sat-r2", {"perturbation": "n-fgsm noise"}, ("'n-fgsm noise'", "noise=1")),
    ("sat-r2", {"perturbation": "n-fgsm noise=-1"}, ("n-fgsm", "noise", "-1")),
    ("sat-r2", {"perturbation": ""}, ("method", "''")),
    ("sat-r3", {"taw": 0.5}, ("parameter of sat-r3", "'taw'", "did you mean 'tau'")),
    (
        "sat-r1",
        {"eps": 0.5},
        ("parameter of sat-r1", "'eps'", "every, fraction, lam, perturbation, steps"),
    ),
    ("fgsm", {"alpha": 0.5}, ("parameter of fgsm", "'alpha'")),
    ("pgd", {"threat": 0.1}, ("parameter of pgd", "'threat'")),
    ("sat-r1", {"lam": "much"}, ("sat-r1", "much")),
    ("sat-r1", {"steps": None}, ("sat-r1", "steps")),
    ("sat-r1", {"steps": 2.5}, ("sat-r1", "steps", "2.5")),
    ("pgd", {"steps": "10"}, ("pgd", "10")),
    ("pgd", {"steps": 2.5}, ("pgd", "steps", "2.5")),
    ("trades", {"steps": 2.5}, ("trades", "steps", "2.5")),
    ("sat-r2", {"project": "false"}, ("sat-r2", "project", "false")),
    ("sat-r3", {"per_sample": "no"}, ("sat-r3", "per_sample", "no")),
    ("sat-r1", {"lam": -0.1}, ("sat-r1", "lam", "-0.1", ">= 0")),
    ("sat-r1", {"lam": float("nan")}, ("sat-r1", "lam", "nan")),
    ("sat-r1", {"lam": float("inf")}, ("sat-r1", "lam", "inf")),
    ("sat-r1", {"steps": 0}, ("sat-r1", "steps", "0", ">= 1")),
    ("sat-r1", {"fraction": 0.0}, ("sat-r1", "fraction", "0.0", "(0, 1]")),
    ("sat-r1", {"fraction": 1.5}, ("sat-r1", "fraction", "1.5")),
    *((f"sat-r{k}", {"every": 0}, (f"sat-r{k}", "every", "0", ">= 1")) for k in (1, 2, 3)),
    ("sat-r2", {"lam": -1}, ("sat-r2", "lam", "-1")),
    ("sat-r2", {"alpha": -1}, ("sat-r2", "alpha", "-1")),
    ("sat-r2", {"fraction": 0.0}, ("sat-r2", "fraction", "0.0", "(0, 1]")),
    ("sat-r3", {"lam": -1}, ("sat-r3", "lam", "-1")),
    ("sat-r3", {"fraction": 1.5}, ("sat-r3", "fraction", "1.5", "(0, 1]")),
    ("sat-r3", {"tau": 0}, ("sat-r3", "tau", "0", "> 0")),
    ("sat-r3", {"alpha": -0.1}, ("sat-r3", "alpha", "-0.1")),
    ("sat-r3", {"eps_low": 0.4}, ("sat-r3", "eps_low", "0.4", "0.1")),
    ("sat-r3", {"eps_low": -0.1}, ("sat-r3", "eps_low", "-0.1")),
    ("r-fgsm", {"alpha": 0.2}, ("r-fgsm", "alpha", "0.2", "0.1")),
    ("r-fgsm", {"alpha": -0.2}, ("r-fgsm", "alpha", "-0.2")),
    ("rs-fgsm", {"alpha": -0.2}, ("rs-fgsm", "alpha", "-0.2")),
    ("n-fgsm", {"noise": -1.0}, ("n-fgsm", "noise", "-1.0")),
    ("pgd", {"steps": 0}, ("pgd", "steps", "0")),
    ("pgd", {"alpha": -0.1}, ("pgd", "alpha", "-0.1")),
    ("trades", {"beta": -1}, ("trades", "beta", "-1")),
    ("trades", {"steps": 0}, ("trades", "steps", "0")),
    ("trades", {"alpha": -1}, ("trades", "alpha", "-1")),
    ("trades", {"sigma": -1}, ("trades", "sigma", "-1")),
]
# R3 by its random step, N-FGSM by noise of two eps: their authors have it so.
REACH = {"sat-r3": 0.03, "n-fgsm": 0.2}
TRAIN_PASSES = {"rs-fgsm": 2, "n-fgsm": 2}
DETERMINISTIC = ("standard", "fgsm", "sat-r1")
# By default R1's are the last images of each process's share, and R3's hinge is of mean losses.
APART = {"sat-r1": {"fraction": 1.0}, "sat-r3": {"per_sample": True}}
