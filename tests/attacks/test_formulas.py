"""Each attack against its formula, written again in float64 loops over samples."""

import pytest
import torch
import torch.nn.functional as F

from surestep import L2, Linf, attacks

EPS = {"linf": 0.07, "l2": 0.4}
THREATS = {"linf": Linf(EPS["linf"]), "l2": L2(EPS["l2"])}


def gradient(net, x, y):
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(net(x[None]), y[None]), x)
    return grad


def step(grad, size, norm):
    return size * (grad.sign() if norm == "linf" else grad / grad.square().sum().sqrt())


def back_inside(p, x, norm):
    if norm == "linf":
        return torch.maximum(torch.minimum(p, x + EPS[norm]), x - EPS[norm]).clamp(0, 1)
    delta = p.clamp(0, 1) - x
    length = float(delta.square().sum().sqrt())
    return x + delta * min(1.0, EPS[norm] / max(length, 1e-30))


def path(net, x, y, start, steps, size, norm, decay=None):
    """All iterates of one sample, the start among them."""
    points, velocity = [start], torch.zeros_like(x)
    for _ in range(steps):
        direction = gradient(net, points[-1], y)
        if decay is not None:
            velocity = decay * velocity + direction / direction.abs().sum()
            direction = velocity
        points.append(back_inside(points[-1] + step(direction, size, norm), x, norm))
    return points


def strength(net, p, y):
    """Wrong before right, then by cross entropy."""
    logits = net(p[None]).detach()
    return int(logits.argmax()) != int(y), float(F.cross_entropy(logits, y[None]))


def strongest(net, points, y):
    return max(points, key=lambda p: strength(net, p, y))


def assert_same(x_adv, expected):
    torch.testing.assert_close(x_adv, torch.stack(expected), rtol=0, atol=1e-9)


@pytest.fixture(params=["linf", "l2"])
def norm(request):
    return request.param


@pytest.fixture
def batch(digits):
    x, y = digits()
    return x, y, list(zip(x, y, strict=True))


def test_fgsm(mlp, batch, norm):
    x, y, pairs = batch
    moved = [a + step(gradient(mlp, a, b), EPS[norm], norm) for a, b in pairs]
    expected = [back_inside(p, a, norm) for p, (a, _) in zip(moved, pairs, strict=True)]
    assert_same(attacks.fgsm(mlp, x, y, THREATS[norm]), expected)


@pytest.mark.parametrize("alpha", [None, 0.03])
def test_r_fgsm(mlp, batch, norm, alpha):
    x, y, pairs = batch
    torch.manual_seed(3)
    x_adv = attacks.r_fgsm(mlp, x, y, THREATS[norm], alpha)
    torch.manual_seed(3)
    noise = torch.randn_like(x)
    first = EPS[norm] / 2 if alpha is None else alpha
    expected = []
    for (a, b), n in zip(pairs, noise, strict=True):
        start = (a + step(n, first, norm)).clamp(0, 1)
        moved = start + step(gradient(mlp, start, b), EPS[norm] - first, norm)
        expected.append(back_inside(moved, a, norm))
    assert_same(x_adv, expected)


@pytest.mark.parametrize(
    ("attack", "decay"), [("i_fgsm", None), ("mi_fgsm", 1.0), ("mi_fgsm", 0.4)]
)
def test_iterated_fgsm(mlp, batch, norm, attack, decay):
    x, y, pairs = batch
    extra = {} if decay is None else {"decay": decay}
    x_adv = getattr(attacks, attack)(mlp, x, y, THREATS[norm], 4, **extra)
    paths = [path(mlp, a, b, a, 4, EPS[norm] / 4, norm, decay) for a, b in pairs]
    best = [strongest(mlp, points, b) for points, (_, b) in zip(paths, pairs, strict=True)]
    assert_same(x_adv, best)


@pytest.mark.parametrize("restarts", [1, 3])
def test_pgd(mlp, batch, restarts):
    x, y, pairs = batch
    torch.manual_seed(5)
    x_adv = attacks.pgd(mlp, x, y, THREATS["linf"], 5, 0.03, restarts)
    torch.manual_seed(5)
    points = [[] for _ in pairs]
    for _ in range(restarts):
        noise = torch.empty_like(x).uniform_(-EPS["linf"], EPS["linf"])
        for tried, (a, b), n in zip(points, pairs, noise, strict=True):
            start = back_inside(a + n, a, "linf")
            tried += path(mlp, a, b, start, 5, 0.03, "linf")
    assert_same(x_adv, [strongest(mlp, p, b) for p, (_, b) in zip(points, pairs, strict=True)])


def test_random_noise(mlp, batch):
    x, y, pairs = batch
    torch.manual_seed(7)
    x_adv = attacks.random_noise(mlp, x, y, THREATS["linf"], samples=6)
    torch.manual_seed(7)
    drawn = [torch.empty_like(x).uniform_(-EPS["linf"], EPS["linf"]) for _ in range(6)]

    def margin(p, label):
        logits = mlp(p[None])[0].tolist()
        return max(v for k, v in enumerate(logits) if k != label) - logits[label]

    expected = [
        max((back_inside(a + d[i], a, "linf") for d in drawn), key=lambda p: margin(p, int(b)))
        for i, (a, b) in enumerate(pairs)
    ]
    assert_same(x_adv, expected)
