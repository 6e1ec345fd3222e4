"""Every method against its recipe, written again in float64 from the papers.

Nothing here comes from surestep but the method under test: the oracles loop over samples,
differentiate plain cross entropy and draw their noise from the same seed. An oracle returns the
images of the update pass, what is minimised there, and the rows that are x_adv.
"""

import copy
import math

import pytest
import torch

from surestep import Linf, methods

EPS = 0.1


def cross_entropy(row, label, smoothing=0.0):
    log_p = row - row.exp().sum().log()
    return -(1 - smoothing) * log_p[label] - smoothing * log_p.sum() / len(row)


def mean_ce(logits, y, smoothing):
    return sum(cross_entropy(row, k, smoothing) for row, k in zip(logits, y, strict=True)) / len(y)


def signs(net, x, y):
    """Sign of each sample's own gradient, in eval mode, one sample at a time."""
    net = copy.deepcopy(net).eval()
    result = []
    for image, label in zip(x, y, strict=True):
        image = image.clone().requires_grad_()
        loss = torch.nn.functional.cross_entropy(net(image[None]), label[None])
        result.append(torch.autograd.grad(loss, image)[0].sign())
    return torch.stack(result)


def train_signs(net, x, y):
    """Sign of the gradient of the batch's mean loss, in train mode: batch norm couples samples."""
    x = x.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(copy.deepcopy(net).train()(x), y)
    return torch.autograd.grad(loss, x)[0].sign()


def box(p):
    return p.clamp(0, 1)


def ball(p, x):
    return box(x + (p - x).clamp(-EPS, EPS))


def noise_signs(x):
    return torch.randn_like(x).sign()


def squared_distance(a, b):
    return sum(((p - q) ** 2).sum() for p, q in zip(a, b, strict=True)) / len(a)


def ce_at(points, y, smoothing):
    return points, lambda z: mean_ce(z, y, smoothing), slice(None)


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
    start = x + torch.empty_like(x).uniform_(-noise * EPS, noise * EPS)
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
    m = len(x)
    start = box(x + alpha * noise_signs(x))
    g = signs(net, start, y)
    views = [box(start + size * g) for size in (eps_low, EPS)]
    if project:
        views = [ball(start + size * g, x) for size in (eps_low, EPS)]

    views[0] = views[0][-last:]

    def loss(z):
        low = [cross_entropy(row, k, smoothing) for row, k in zip(z[:last], y[-last:], strict=True)]
        high = [cross_entropy(row, k, smoothing) for row, k in zip(z[last:], y, strict=True)]
        pairs = list(zip(low, high[-last:], strict=True))
        if per_sample:
            hinge = sum((a - tau * b).clamp(min=0) for a, b in pairs) / last
        else:
            hinge = (sum(a for a, _ in pairs) / last - tau * sum(b for _, b in pairs) / last).clamp(
                min=0
            )
        return sum(high) / m + lam * hinge

    return torch.cat(views), loss, slice(last, None)


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


def test_every_method_has_an_oracle():
    assert {name.split()[0] for name in CASES} == set(methods.names())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("case", CASES)
def test_step_equals_the_recipe(case, smoothing, task):
    oracle, params, renamed = CASES[case]
    method = methods.get(case.split()[0])(Linf(EPS), **params, label_smoothing=smoothing)
    reference = copy.deepcopy(task.net)

    torch.manual_seed(11)
    result = method(task.net, task.x, task.y)
    result.loss.backward()

    torch.manual_seed(11)
    arguments = {k: v for k, v in params.items() if k != "fraction"}
    views, loss, adv = oracle(reference, task.x, task.y, smoothing, **arguments, **renamed)
    logits = reference.train()(views)
    expected = loss(logits)
    expected.backward()

    exact = {"rtol": 0, "atol": 1e-8}
    torch.testing.assert_close(result.x_adv, views[adv], **exact)
    torch.testing.assert_close(result.logits, logits[adv].detach(), **exact)
    torch.testing.assert_close(result.loss, expected, **exact)
    for ours, theirs in zip(task.net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, **exact)
    # Batch norm has seen the update's images once, together, and nothing of the attack.
    for ours, theirs in zip(task.net.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, **exact)


def test_regularising_every_third_step(task):
    """Two steps of FGSM, then one with the images and the weight of three; it survives a resume."""

    def make():
        return methods.SATR1(Linf(EPS), lam=0.2, steps=2, fraction=1 / 6, every=3)

    method, kept = make(), {}
    for number in range(1, 8):
        net = copy.deepcopy(task.net)
        if number in (3, 6):
            views, loss, adv = sat_r1(net, task.x, task.y, 0.0, 3 * 0.2, 2, last=3)
        else:
            views, loss, adv = fgsm(net, task.x, task.y, 0.0)
        logits = net.train()(views)
        result = method(copy.deepcopy(task.net), task.x, task.y)
        torch.testing.assert_close(result.loss, loss(logits), rtol=0, atol=1e-8)
        torch.testing.assert_close(result.x_adv, views[adv], rtol=0, atol=1e-8)
        if number == 4:
            kept = method.state_dict()
            method = make()
            method.load_state_dict(kept)


@pytest.mark.parametrize(
    ("slug", "weight", "terms"),
    [
        ("sat-r1", "lam", ("ce", "distance")),
        ("sat-r2", "lam", ("ce", "distance")),
        ("sat-r3", "lam", ("ce", "hinge")),
        ("trades", "beta", ("ce", "kl")),
    ],
)
def test_terms_add_up_to_the_loss(build, make_task, slug, weight, terms):
    task = make_task("conv")
    method = build(slug, **{weight: 0.7})
    result = method(task.net, task.x, task.y)
    first, second = (result.terms[name] for name in terms)
    torch.testing.assert_close(result.loss.detach(), first + 0.7 * second)
    assert float(second) > 0


@pytest.mark.parametrize(("name", "tau"), [("mlp", 0.93), ("conv", 0.78), ("flat", 0.78)])
def test_hinge_of_the_means_is_not_the_mean_of_the_hinges(make_task, name, tau):
    """So the cases above tell the two apart: some losses grow enough there, some do not."""
    task, hinges = make_task(name), []
    for per_sample in (False, True):
        torch.manual_seed(11)
        method = methods.SATR3(Linf(EPS), **{**R3, "tau": tau}, per_sample=per_sample)
        hinges.append(float(method(task.net, task.x, task.y).terms["hinge"]))
    assert hinges[1] > hinges[0] + 1e-3


def test_hinge_is_inactive_where_the_loss_grows(build, make_task):
    task = make_task("mlp")
    active = build("sat-r3", tau=0.01)(task.net, task.x, task.y).terms["hinge"]
    slack = build("sat-r3", tau=50.0)(task.net, task.x, task.y).terms["hinge"]
    assert float(active) > 0
    assert float(slack) == 0


@pytest.mark.parametrize(
    ("slug", "inside"), [("sat-r2", True), ("sat-r2", False), ("sat-r3", True), ("sat-r3", False)]
)
def test_how_far_the_authors_points_lie(build, make_task, slug, inside):
    """Without project the second view of R2 and the far point of R3 reach eps + alpha."""
    task = make_task("mlp")
    seen = []
    task.net.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    x = task.x.clamp(0.3, 0.7)
    build(slug, project=inside)(task.net, x, task.y)
    far = float((seen[-1][len(x) :] - x).abs().max())
    assert far == pytest.approx(EPS if inside else EPS + 0.03, abs=1e-9)


def test_methods_survive_confident_networks(build, slug, make_task):
    """Logits of thousands: every part of the loss and every gradient stays finite."""
    task = make_task("mlp", dtype=torch.float32)
    with torch.no_grad():
        task.net[-1].weight *= 1e4
    x = task.x.clamp(0.2, 0.8)
    result = build(slug)(task.net, x, task.net(x).argmax(1))
    result.loss.backward()
    assert math.isfinite(float(result.loss.detach()))
    assert all(bool(p.grad.isfinite().all()) for p in task.net.parameters())
    assert bool((result.x_adv != x).all()) == (slug != "standard")
