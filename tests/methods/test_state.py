"""What methods keep from step to step, followed over several steps by hand, in float64."""

import copy
import math

import pytest
import torch
from families.maths import EPS, ball, box, cross_entropy, mean_ce, signs, squared_distance

from surestep import L2, Linf, UserError, fit, methods
from surestep.data.augment import CropFlip

EXACT = {"rtol": 0, "atol": 1e-9}


def at(step, epoch=0, epochs=4, **more):
    """Return the progress of a step of an epoch of three."""
    return methods.Progress(3 * epoch + step, 3, epochs, images=20, **more)


def gradients(net, x, y, smoothing=0.0):
    """Return each sample's gradient of its cross entropy, in eval mode."""
    frozen, leaf = copy.deepcopy(net).eval(), x.clone().requires_grad_()
    rows = zip(frozen(leaf), y, strict=True)
    goal = sum(cross_entropy(row, k, smoothing) for row, k in rows)
    return torch.autograd.grad(goal, leaf)[0]


def moved_back(draw, new, old):
    """Return new values where the crop shows the image, the old ones where it was cropped away."""
    return draw.undo(new) + (1 - draw.undo(torch.ones_like(new))) * old


def unit(grad):
    return grad / grad.abs().flatten(1).sum(1).view(-1, *[1] * (grad.dim() - 1))


def step(method, task, rows=slice(None), draw=None, **_):
    """Take a step on some of the images, without changing the network; return the result."""
    net = copy.deepcopy(task.net)
    return method(net, task.x[rows], task.y[rows], task.index[rows], draw)


class TestMEP:
    def test_momentum_and_start_over_epochs(self, make_task):
        task = make_task("mlp")
        method = methods.get("fgsm-mep")(Linf(EPS), decay=0.3)
        method.progress = at(0)
        torch.manual_seed(1)
        first = step(method, task).x_adv
        torch.manual_seed(1)
        delta = torch.empty_like(task.x).uniform_(-EPS, EPS)
        momentum = torch.zeros_like(task.x)
        for epoch in range(1, 4):
            start = ball(task.x + delta, task.x)
            grad = gradients(task.net, start, task.y)
            expected = ball(start + EPS * grad.sign(), task.x)
            torch.testing.assert_close(first, expected, **EXACT)
            momentum = unit(grad) + 0.3 * momentum
            delta = ball(start + EPS * momentum.sign(), task.x) - task.x
            method.progress = at(0, epoch)
            first = step(method, task).x_adv

    def test_a_reset_forgets(self, make_task):
        task = make_task("mlp")
        method = methods.get("fgsm-mep")(Linf(EPS), reset=2)
        points = []
        for epoch in range(4):
            method.progress = at(0, epoch)
            torch.manual_seed(5)
            points.append(step(method, task).x_adv)
        assert torch.equal(points[0], points[2])
        assert not torch.equal(points[0], points[1])
        assert torch.equal(points[1], points[3])  # where the momentum of before would show

    def test_memory_follows_crop_and_flip(self, make_task):
        task = make_task("conv")
        method = methods.get("fgsm-mep")(Linf(EPS), decay=0.5)
        clean = task.x
        delta = momentum = torch.zeros_like(clean)
        for epoch in range(4):
            draw = CropFlip(1).draw(6, torch.Generator().manual_seed(epoch))
            x = task.x = draw.apply(clean)
            method.progress = at(0, epoch)
            torch.manual_seed(epoch)
            found = step(method, task, draw=draw).x_adv
            torch.manual_seed(epoch)
            known = draw.apply(delta) if epoch else torch.empty_like(x).uniform_(-EPS, EPS)
            start = ball(x + known, x)
            grad = gradients(task.net, start, task.y)
            torch.testing.assert_close(found, ball(start + EPS * grad.sign(), x), **EXACT)
            moment = unit(grad) + 0.5 * draw.apply(momentum)
            delta = moved_back(draw, ball(start + EPS * moment.sign(), x) - x, delta)
            momentum = moved_back(draw, moment, momentum)

    def test_images_are_told_apart(self, make_task):
        task = make_task("mlp")
        method = methods.get("fgsm-mep")(Linf(EPS))
        method.progress = at(0)
        step(method, task)
        method.progress = at(0, 1)
        order = torch.tensor([4, 2, 5, 0, 1, 3])
        before = copy.deepcopy(method.state_dict())
        plain = step(method, task).x_adv
        method.load_state_dict(before)
        assert torch.equal(step(method, task, order).x_adv, plain[order])


def test_memory_follows_crop_and_flip(make_task):
    """A perturbation comes back at the pixels that it was stored for, wherever they are now."""
    task = make_task("conv")
    method = methods.get("fgsm-pco")(Linf(EPS))
    draws = [CropFlip(1).draw(6, torch.Generator().manual_seed(k)) for k in (1, 2)]
    task.x, clean = draws[0].apply(task.x), task.x
    method.progress = at(0)
    step(method, task, draw=draws[0])
    seen = draws[0].apply(clean)
    classes = copy.deepcopy(task.net)(task.x).shape[1]
    smoothing = 0.4 * classes / (classes - 1)  # of which the true class gets nothing
    frozen_new = ball(seen + EPS * gradients(task.net, seen, task.y, smoothing).sign(), seen)
    stored = draws[0].undo(frozen_new - seen)
    task.x = draws[1].apply(clean)
    method.progress = at(0, 1)
    update = method.prepare(copy.deepcopy(task.net), task.x, task.y, task.index, draws[1])
    old = box(task.x + draws[1].apply(stored))
    torch.testing.assert_close(update.points[:6], old, **EXACT)


def test_pco_mixes_with_what_it_stored(make_task):
    """From the second epoch on: step and confidence at the stored point, the mixture from there."""
    task = make_task("mlp")
    method = methods.get("fgsm-pco")(Linf(EPS), lam=3.0, stretch=1.3)
    x, y, delta = task.x, task.y, torch.zeros_like(task.x)
    classes = copy.deepcopy(task.net)(x).shape[1]
    smoothing = 0.4 * classes / (classes - 1)  # of which the true class gets nothing
    for epoch in range(3):
        method.progress = at(0, epoch)
        net = copy.deepcopy(task.net)
        update = method.prepare(net, x, y, task.index)
        result = method.take(net, update)
        old = ball(x + delta, x)
        new = ball(old + EPS * gradients(task.net, old, y, smoothing).sign(), x)
        mixed = torch.empty_like(x)
        for i, z in enumerate(copy.deepcopy(task.net).eval()(old).softmax(1).detach()):
            p = z[y[i]]
            mixed[i] = box((1 - p) * old[i] + p * (x[i] + 1.3 * (new[i] - x[i])))
        torch.testing.assert_close(update.points, torch.cat([old, new, mixed]), **EXACT)
        at_old, at_new, at_mixed = copy.deepcopy(task.net).train()(update.points).chunk(3)
        ce = sum(cross_entropy(z, k, 0.0) for z, k in zip(at_mixed, y, strict=True)) / len(y)
        gap = ((at_new - at_old) ** 2).mean() - ((at_new - at_mixed) ** 2).mean()
        torch.testing.assert_close(result.loss, ce + 3.0 * gap.abs(), **EXACT)
        delta = new - x


def test_iaat_radii(make_task):
    task = make_task("mlp")
    method = methods.get("iaat")(Linf(EPS), steps=2, gamma=0.5, beta=0.8, rest=0.1)
    share = torch.zeros(6, dtype=torch.float64)
    with torch.no_grad():
        task.net[1].weight *= 6.0
    frozen = copy.deepcopy(task.net).eval()
    task.y[1:] = frozen(task.x[1:]).argmax(1)
    cases = set()
    for epoch in range(10):
        # The last step of the first epoch, too, though a tenth of four epochs is over by then.
        method.progress = at(2, epoch) if epoch == 0 else at(0, epoch)
        torch.manual_seed(epoch)
        found = step(method, task).x_adv
        torch.manual_seed(epoch)
        p = ball(task.x + torch.empty_like(task.x).uniform_(-EPS, EPS), task.x)
        for _ in range(2):
            p = ball(p + EPS / 4 * signs(task.net, p, task.y), task.x)
        for i in range(6):
            r, move = float(share[i]), 0.0
            right = [
                frozen((task.x[i] + at_r * (p[i] - task.x[i]))[None]).argmax() == task.y[i]
                for at_r in (min(r + 0.5, 1.0), r, 0.0)
            ]
            if not right[2]:
                case, move = "wrong", -r
            elif right[0]:
                case, move = "grows", min(0.5, 1.0 - r)
            elif right[1]:
                case = "stays"
            else:
                case, move = "shrinks", -min(0.5, r)
            if epoch:
                cases.add(case)
                share[i] = r + 0.8 * move
            else:  # the first epoch: the full radius, or none where the image is wrong
                share[i] = float(case != "wrong")
            point = task.x[i] + share[i] * (p[i] - task.x[i])
            torch.testing.assert_close(found[i], point, **EXACT)
    assert cases == {"wrong", "grows", "stays", "shrinks"}


@pytest.mark.parametrize("threat", [Linf(0.9), L2(9.0)])
def test_a_universal_perturbation_may_be_longer_than_half_the_data_range(make_task, threat):
    task, method = make_task("mlp"), methods.get("fgsm-uap")(threat)
    for _ in range(3):
        method(task.net, task.x, task.y, task.index)
    longest = method._u.abs().max() if isinstance(threat, Linf) else method._u.norm()
    assert float(longest) == pytest.approx(1.25 * threat.eps)


@pytest.mark.parametrize("slug", ["fgsm-uap", "fgsm-cuap"])
def test_universal_perturbations(slug, make_task):
    task = make_task("mlp")
    method = methods.get(slug)(Linf(EPS), decay=0.3)
    groups = task.y if slug == "fgsm-cuap" else torch.zeros_like(task.y)
    u = torch.zeros(4, *task.x.shape[1:], dtype=torch.float64)
    m = torch.zeros_like(u)
    for number in range(4):
        method.progress = at(number)
        net = copy.deepcopy(task.net)
        update = method.prepare(net, task.x, task.y, task.index)
        found = method.take(net, update)
        start = ball(task.x + u[groups], task.x)
        grad = gradients(task.net, start, task.y)
        torch.testing.assert_close(found.x_adv, ball(start + EPS * grad.sign(), task.x), **EXACT)
        torch.testing.assert_close(update.points[:6], start, **EXACT)
        here, there = copy.deepcopy(task.net).train()(torch.cat([start, found.x_adv])).chunk(2)
        ce = sum(cross_entropy(z, k, 0.0) for z, k in zip(there, task.y, strict=True)) / 6
        torch.testing.assert_close(found.loss, ce + 10 * ((there - here) ** 2).mean(), **EXACT)
        for k in groups.unique():
            m[k] = unit(grad)[groups == k].mean(0) + 0.3 * m[k]
            u[k] = (u[k] + 1.25 * EPS * m[k].sign()).clamp(-1.25 * EPS, 1.25 * EPS)
    assert len(groups.unique()) > 1 or slug == "fgsm-uap"


def test_the_layer_of_fuap_learns_which_picks_were_good(make_task):
    task = make_task("mlp")
    method = methods.get("fgsm-fuap")(Linf(EPS), count=3, pick_lr=0.5)
    step(method, task)
    before = method.state_dict()
    torch.manual_seed(2)
    found = step(method, task)
    torch.manual_seed(2)
    point = ball(task.x + torch.empty_like(task.x).uniform_(-EPS, EPS), task.x)
    frozen = copy.deepcopy(task.net).eval()
    features = frozen[:-1](point)
    features = features / features.norm(dim=1, keepdim=True)
    w = before["layer"].double().clone().requires_grad_()
    log_p = (features.detach() @ w.T).log_softmax(1)
    picks = log_p.argmax(1)
    z = frozen(ball(task.x + before["u"][picks], task.x))
    losses = torch.stack([cross_entropy(r, k) for r, k in zip(z, task.y, strict=True)]).detach()
    goal = ((losses - losses.mean()) * log_p.gather(1, picks[:, None]).squeeze(1)).mean()
    (pull,) = torch.autograd.grad(goal, w)
    after = method.state_dict()
    torch.testing.assert_close(after["layer"], w.detach() + 0.5 * pull, **EXACT)
    # The step starts at what was picked, and moves that.
    assert bool(before["u"].abs().amax() > 0)
    start = ball(task.x + before["u"][picks], task.x)
    grad = gradients(task.net, start, task.y)
    torch.testing.assert_close(found.x_adv, ball(start + EPS * grad.sign(), task.x), **EXACT)
    here, there = copy.deepcopy(task.net).train()(torch.cat([start, found.x_adv])).chunk(2)
    ce = sum(cross_entropy(z, k, 0.0) for z, k in zip(there, task.y, strict=True)) / 6
    torch.testing.assert_close(found.loss, ce + 10 * ((there - here) ** 2).mean(), **EXACT)
    for k in range(3):
        mine, u = picks == k, before["u"][k]
        if bool(mine.any()):
            m = unit(grad)[mine].mean(0) + 0.3 * before["m"][k]
            u = (u + 1.25 * EPS * m.sign()).clamp(-1.25 * EPS, 1.25 * EPS)
        torch.testing.assert_close(after["u"][k], u, **EXACT)


def test_tdat_goes_on_from_the_batch_before(make_task):
    task = make_task("mlp")
    method = methods.get("tdat")(Linf(EPS))
    last = step(method, task, slice(0, 4)).x_adv - task.x[:4]
    share = 0.6 * math.tan(1)
    start = ball(task.x[1:6] + last[[0, 1, 2, 3, 0]], task.x[1:6])
    found = step(method, task, slice(1, 6)).x_adv
    # Cross entropy's smoothing gives the true class a part of the rest, the relaxed label none.
    classes = copy.deepcopy(task.net)(task.x).shape[1]
    smoothing = (1 - share) * classes / (classes - 1)
    expected = ball(
        start + EPS * gradients(task.net, start, task.y[1:6], smoothing).sign(), task.x[1:6]
    )
    torch.testing.assert_close(found, expected, **EXACT)


def test_free_steps_along_the_gradient_of_the_update(make_task):
    task = make_task("conv")
    method, net = methods.get("free")(Linf(EPS)), task.net
    delta = torch.zeros_like(task.x)
    for _ in range(3):
        points = ball(task.x + delta, task.x)
        leaf = points.clone().requires_grad_()
        mean_ce(copy.deepcopy(net)(leaf), task.y, 0.0).backward()
        delta = ball(points + EPS * leaf.grad.sign(), task.x) - task.x
        result = method(copy.deepcopy(net), task.x, task.y)
        result.loss.backward()
        torch.testing.assert_close(result.x_adv, points, **EXACT)
    kept = method.state_dict()["delta"]
    torch.testing.assert_close(kept, delta, **EXACT)


def test_free_forgets_a_pending_step_when_it_loads(make_task):
    task = make_task("conv")
    method = methods.get("free")(Linf(EPS))
    for _ in range(2):
        method(task.net, task.x, task.y).loss.backward()
    kept = copy.deepcopy(method.state_dict())
    method(task.net, task.x, task.y).loss.backward()
    method.load_state_dict(kept)
    points = method(task.net, task.x, task.y).x_adv
    torch.testing.assert_close(points, ball(task.x + kept["delta"], task.x), **EXACT)


def test_free_takes_each_batch_several_times(tmp_path, make_task):
    import surestep

    seen = []

    class Noting(type(methods.get("free")(Linf(EPS)))):
        def craft(self, model, x, y):
            seen.append(self.positions.index.tolist())
            return super().craft(model, x, y)

    x, y = torch.rand(40, 1, 4, 4), torch.arange(40) % 4
    net = make_task("mlp", dtype=torch.float32).net
    method = Noting(Linf(EPS), replays=3)
    surestep.fit(net, (x, y), method, epochs=2, batch_size=10, val_images=0, quiet=True)
    assert len(seen) == 2 * 4 * 3
    assert all(seen[i] == seen[i - i % 3] for i in range(24))
    assert len({tuple(batch) for batch in seen}) == 8


def test_pap_compares_after_all_steps(make_task):
    """Of three groups the first that entered with its own batch leaves in the fourth step."""
    task = make_task("mlp")
    method = methods.get("pap")(Linf(EPS), lam=0.7, steps=3)
    held = [(task.x[1:2], task.y[1:2], task.x[1:2])] * 3
    batches = [slice(0, 2), slice(1, 3), slice(2, 4), slice(3, 5), slice(4, 6)]
    for number, rows in enumerate(batches):
        x, y = task.x[rows], task.y[rows]
        held = [
            (image, label, ball(p + EPS / 3 * signs(task.net, p, label), image))
            for image, label, p in held
        ]
        (image, label, done), *held = held
        held.append((x[-1:], y[-1:], x[-1:]))
        x_f = ball(x + EPS * signs(task.net, x, y), x)
        leaving = ball(image + EPS * signs(task.net, image, label), image)
        z = copy.deepcopy(task.net).train()(torch.cat([x_f, leaving, done]))
        expected = mean_ce(z[:2], y, 0.0)
        if number >= 2:
            expected = expected + 0.7 * squared_distance(z[2:3], z[3:])
        result = step(method, task, rows)
        torch.testing.assert_close(result.loss.detach(), expected.detach(), **EXACT)
        if number == 1:
            kept = copy.deepcopy(method.state_dict())
            method = methods.get("pap")(Linf(EPS), lam=0.7, steps=3)
            method.load_state_dict(kept)


@pytest.mark.parametrize("fraction", [None, 0.5])
def test_pap_fills_anew_where_the_processes_are_others(make_task, monkeypatch, fraction):
    """The rows of one process's groups are not two processes' groups."""
    task = make_task("mlp")
    first = methods.get("pap")(Linf(EPS), steps=3, fraction=fraction)
    for _ in range(3):
        step(first, task)
    kept = first.state_dict()
    monkeypatch.setattr("surestep.processes.world_size", lambda: 2)
    monkeypatch.setattr("surestep.processes.rank", lambda: 1)
    later = methods.get("pap")(Linf(EPS), steps=3, fraction=fraction)
    later.load_state_dict(kept)
    result = step(later, task)
    assert torch.equal(result.loss.detach(), result.terms["ce"])  # not weighed until it is done
    assert bool(result.loss.detach().isfinite())


def test_elle_a_switches_itself_on(make_task):
    task, lam, gaps = make_task("mlp"), 0.0, []
    method = methods.get("elle-a")(Linf(EPS), lam=50.0, decay=0.9)
    used = []
    for number in range(8):
        torch.manual_seed(number)
        net = copy.deepcopy(task.net)
        with torch.no_grad():
            net[-1].weight *= 4.0 if number in (5, 6) else 1.0
        result = method(net, task.x, task.y)
        gap = float(result.terms["gap"])
        gaps.append(gap)
        mean = sum(gaps) / len(gaps)
        std = (sum((g - mean) ** 2 for g in gaps) / len(gaps)) ** 0.5
        lam = 50.0 if gap > mean + 2 * std else 0.9 * lam
        used.append(lam)
        expected = float(result.terms["ce"]) + lam * gap
        assert float(result.loss.detach()) == pytest.approx(expected, abs=1e-9)
    assert 50.0 in used
    assert used[-1] != 50.0


@pytest.mark.parametrize("compare", ["epoch", "batch"])
def test_converge_smooth_adds_what_leaps(compare, make_task):
    task = make_task("mlp")
    method = methods.get("converge-smooth")(
        Linf(EPS), perturbation="fgsm", compare=compare, gamma=0.05, weight=0.5
    )
    history, mean, before = [], 0.0, 0.0
    jumps = []
    for number in range(12):
        epoch = number // 3
        method.progress = at(number % 3, epoch, lr=0.1)
        if compare == "epoch" and number % 3 == 0 and number:
            mean, before = sum(history) / len(history), mean
            history = []
        net = copy.deepcopy(task.net)
        with torch.no_grad():
            net[-1].weight *= (1.0, 1.2, 1.6, 0.8)[epoch] + 0.01 * number
        x_f = box(task.x + EPS * signs(net, task.x, task.y))
        z = copy.deepcopy(net).train()(torch.cat([x_f, task.x]))
        clean = float(mean_ce(z[6:], task.y, 0.0).detach())
        limit = min(max(0.05, mean - before), 0.05)
        sign = 0.0
        resting = compare == "epoch" and epoch < 2
        if mean > 0 and abs(clean - mean) > limit and not resting:
            sign = math.copysign(1.0, clean - mean)
        jumps.append(sign)
        history.append(clean)
        if compare == "batch":
            mean, before = clean, mean
        expected = float(mean_ce(z[:6], task.y, 0.0).detach()) + 0.5 * sign * clean
        result = method(net, task.x, task.y)
        assert float(result.loss.detach()) == pytest.approx(expected, abs=1e-9)
        if number == 4:
            kept = copy.deepcopy(method.state_dict())
            method = methods.get("converge-smooth")(
                Linf(EPS), perturbation="fgsm", compare=compare, gamma=0.05, weight=0.5
            )
            method.load_state_dict(kept)
    assert {1.0, -1.0} <= set(jumps)


def test_converge_smooth_rests_when_the_rate_drops(make_task):
    task = make_task("mlp")
    method = methods.get("converge-smooth")(Linf(EPS), perturbation="fgsm", gamma=0.0)
    jumps = []
    for epoch, lr in enumerate((0.1, 0.1, 0.1, 0.01, 0.01, 0.01)):
        method.progress = at(0, epoch, lr=lr)
        net = copy.deepcopy(task.net)
        with torch.no_grad():
            net[-1].weight *= 1 + 0.5 * epoch
        jumps.append(float(method(net, task.x, task.y).terms["jump"]) != 0)
    # In the epoch of the drop and in the next, whose loss would be held against that one's.
    # The start of training counts as a drop.
    assert jumps == [False, False, True, False, False, True]
    method.progress = at(1, 5, lr=0.001)
    assert float(step(method, task).terms["jump"]) == 0


def test_weight_centralization_pulls_to_the_mean_of_earlier_epochs(make_task):
    task = make_task("mlp")
    method = methods.get("converge-smooth")(Linf(EPS), perturbation="fgsm", weight=0.0, pull=0.3)
    seen, net = [], task.net
    for epoch in range(4):
        method.progress = at(0, epoch, lr=0.1)
        if epoch:
            seen.append([p.detach().clone() for p in net.parameters()])
        result = method(copy.deepcopy(net), task.x, task.y)
        expected = float(result.terms["ce"])
        if seen:
            means = [sum(ws) / len(seen) for ws in zip(*seen, strict=True)]
            apart = [((p - m) ** 2).sum() for p, m in zip(net.parameters(), means, strict=True)]
            expected += 0.3 * float(sum(a.detach() for a in apart))
        assert float(result.loss.detach()) == pytest.approx(expected, abs=1e-9)
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(1.1)


def test_converge_smooth_wraps_a_method_with_memory(make_task):
    task = make_task("mlp")
    method = methods.get("converge-smooth")(Linf(EPS), perturbation="fgsm-mep")
    assert method.needs_index
    method.progress = at(0)
    step(method, task)
    method.progress = at(0, 1)
    inner = methods.get("fgsm-mep")(Linf(EPS))
    inner.load_state_dict(copy.deepcopy(method.state_dict()["base"]))
    inner.progress = at(0, 1)
    assert torch.equal(step(method, task).x_adv, step(inner, task).x_adv)


def test_eat_takes_its_models_in_turn(make_task):
    task = make_task("mlp")
    others = [make_task("mlp").net for _ in range(2)]
    for k, other in enumerate(others):
        with torch.no_grad():
            other[1].weight += k + 1
    method = methods.get("eat")(Linf(EPS), perturbation="fgsm")
    method.sources = others
    for number in range(6):
        method.progress = at(number)
        attacked = [task.net, *others][number % 3]
        predicted = copy.deepcopy(attacked).eval()(task.x).argmax(1)
        expected = box(task.x + EPS * signs(attacked, task.x, predicted))
        torch.testing.assert_close(step(method, task).x_adv, expected, **EXACT)


def test_eat_leaves_its_models_in_eval_mode(make_task):
    """Even if the perturbation's own training attacks in train mode."""
    task, other = make_task("mlp"), make_task("mlp").net.eval()
    method, modes = methods.get("eat")(Linf(EPS), perturbation="rs-fgsm"), []
    method.sources = [other]
    method.progress = at(1)
    other.register_forward_pre_hook(lambda m, _: modes.append(m.training))
    step(method, task)
    assert modes == [False, False]  # the prediction at the image, and the gradient beside it


def test_eat_attacks_models_that_take_contiguous_images_only(make_task):
    task, shapes = make_task("conv"), []

    class Views(torch.nn.Module):
        def forward(self, x):
            shapes.append(x.view(len(x), -1).shape)
            return torch.cat([x.view(len(x), -1)[:, :4]], dim=1)

    method = methods.get("eat")(Linf(EPS))
    method.sources = [Views()]
    method.progress = at(1)
    last = {"memory_format": torch.channels_last}
    task.x = task.x.contiguous(**last)
    assert step(method, task).x_adv.is_contiguous(**last)
    assert len(shapes) == 1


def test_uat_never_looks_at_other_labels(make_task):
    task = make_task("mlp", n=40)
    method = methods.get("uat")(Linf(EPS), labelled=0.25, steps=1)
    known = method.known(task.index)
    assert 4 <= int(known.sum()) <= 16
    torch.manual_seed(0)
    loss = step(method, task).loss.detach()
    task.y[~known] = (task.y[~known] + 1) % 4
    torch.manual_seed(0)
    assert torch.equal(step(method, task).loss.detach(), loss)
    task.y[known] = (task.y[known] + 1) % 4
    torch.manual_seed(0)
    assert not torch.equal(step(method, task).loss.detach(), loss)


def test_gradalign_leaves_out_what_has_no_gradient():
    """Of constant logits every gradient is zero: the penalty is zero, and finite to train on."""
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3)).double()
    with torch.no_grad():
        net[1].weight.zero_()
    x, y = torch.rand(4, 1, 4, 4, dtype=torch.float64), torch.arange(4) % 3
    result = methods.get("gradalign")(Linf(EPS))(net, x, y)
    result.loss.backward()
    assert float(result.terms["turn"]) == 0
    assert all(bool(p.grad.isfinite().all()) for p in net.parameters())


def test_gradalign_is_the_mean_of_those_that_have_a_gradient(monkeypatch):
    net = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(16, 5), torch.nn.Tanh(), torch.nn.Linear(5, 5)
    ).double()
    net.append(torch.nn.ReLU()).append(torch.nn.Linear(5, 3).double())
    with torch.no_grad():
        net[1].bias.zero_()
        net[3].bias.fill_(-0.3)  # of grey nothing arrives; the rest is loud enough
        net[1].weight.mul_(4)
        net[3].weight.mul_(4)
    x = torch.rand(4, 1, 4, 4, dtype=torch.float64)
    dead = torch.cat([x, torch.zeros(1, 1, 4, 4, dtype=torch.float64)])
    y = torch.arange(5) % 3
    monkeypatch.setattr(Linf, "random_delta", lambda _, x: torch.full_like(x, 0.01))
    method = methods.get("gradalign")(Linf(0.01))
    with_it, without = (method(net, part, y[: len(part)]).terms["turn"] for part in (dead, x))
    assert float(without) > 1e-7
    torch.testing.assert_close(with_it, without, **EXACT)


def test_without_index_a_method_with_memory_says_so(make_task):
    task = make_task("mlp")
    for slug in methods.names():
        if methods.get(slug).needs_index:
            method = methods.get(slug)(Linf(EPS))
            for _ in range(2):  # the first call, and one after a good one
                with pytest.raises(UserError, match=f"{slug} needs .* pass index"):
                    method(task.net, task.x, task.y)
                method(task.net, task.x, task.y, task.index)


def test_memory_needs_images_in_memory(make_task):
    pairs = torch.utils.data.TensorDataset(torch.rand(20, 1, 4, 4), torch.arange(20) % 4)
    net = make_task("mlp", dtype=torch.float32).net
    with pytest.raises(UserError, match=r"iaat .* a pair of tensors"):
        fit(net, pairs, methods.get("iaat")(Linf(EPS)), validation=pairs, quiet=True)


def test_memory_grows_with_the_positions_it_meets(make_task):
    """In a loop of one's own nobody says how many images there are."""
    task = make_task("mlp")
    methods_ = [methods.get("fgsm-pco")(Linf(EPS)) for _ in "ab"]
    found = []
    for method, images in zip(methods_, (0, 12), strict=True):
        method.progress = methods.Progress(step=0, steps_per_epoch=2, epochs=4, images=images)
        for begin in (0, 6, 0):
            index = torch.arange(begin, begin + 6)
            result = method(copy.deepcopy(task.net), task.x + begin / 100, task.y, index)
        found.append((result.x_adv, method.state_dict()["delta"]))
    torch.testing.assert_close(found[0], found[1], **EXACT)


@pytest.mark.parametrize("labelled", [0.1, 0.5])
def test_uat_knows_its_share_of_every_class(labelled):
    """Also of data that lie class by class, whatever the number of classes."""
    known = methods.get("uat")(Linf(EPS), labelled=labelled).known(torch.arange(10_000)).double()
    assert float(known.mean()) == pytest.approx(labelled, abs=0.02)
    for part in (*known.chunk(10), known[::10], known[3::7]):
        assert float(part.mean()) == pytest.approx(labelled, abs=0.05)


def test_uat_learns_from_images_without_a_label(make_task):
    """As if the loss of those without one were zero; in the data two thirds have one."""
    task = make_task("mlp")
    y = task.y.clone()
    y[[1, 4]] = -1
    method = methods.get("uat")(Linf(EPS), labelled=1.0, lam=3.0, steps=2)
    method.progress = methods.Progress(labelled=2 / 3)
    views = []
    handle = task.net.register_forward_pre_hook(lambda _, args: views.append(args[0].detach()))
    result = method(task.net, task.x, y, task.index)
    handle.remove()
    logits = task.net(views[-1]).log_softmax(1).detach()
    ce = apart = 0.0
    for i, label in enumerate(y.tolist()):
        clean, moved = logits[i], logits[len(y) + i]
        apart += float((clean.exp() * (clean - moved)).sum())
        ce -= float(moved[label]) if label >= 0 else 0.0
    assert result.loss.item() == pytest.approx(ce / 4 + 3 * apart / 6, rel=1e-9)
    with pytest.raises(UserError, match=r"from -1 to 3.*only training with uat takes -1"):
        methods.get("fgsm")(Linf(EPS))(task.net, task.x, y)


def test_free_forgets_a_gradient_that_overflowed(make_task):
    task = make_task("conv")
    method = methods.get("free")(L2(0.5))  # the sign of NaN may be 0, its norm not
    for bad in (float("nan"), float("inf")):
        result = method(copy.deepcopy(task.net), task.x, task.y)
        result.loss.backward()
        method._pending[2].grad[0] = bad
    result = method(copy.deepcopy(task.net), task.x, task.y)
    assert bool(result.x_adv.isfinite().all())


@pytest.mark.parametrize("epochs", [2, 3])
def test_meps_momentum_weighs_each_epochs_gradient_alike(make_task, epochs):
    """However long the gradients are: each image's is taken over its own sum."""
    task = make_task("mlp")
    method = methods.get("fgsm-mep")(Linf(EPS), decay=0.3)
    expected = before = torch.zeros_like(task.x)
    torch.manual_seed(1)
    for epoch in range(epochs):
        method.progress = at(0, epoch)
        with torch.no_grad():
            task.net[-1].weight.mul_(10.0 if epoch % 2 else 0.1)
        if epoch:
            start = ball(task.x + method._delta.values[task.index], task.x)
            expected = unit(gradients(task.net, start, task.y)) + 0.3 * before
        step(method, task)
        before = method._momentum.values[task.index]
        if epoch:
            torch.testing.assert_close(before, expected, **EXACT)


def test_meps_reset_forgets_the_momentum(make_task):
    task = make_task("mlp")
    method = methods.get("fgsm-mep")(Linf(EPS), reset=2, decay=0.9)
    for epoch in range(3):
        method.progress = at(0, epoch)
        step(method, task)
    # One gradient's alone, whose absolute values sum to 1.
    total = method._momentum.values[task.index].abs().flatten(1).sum(1)
    torch.testing.assert_close(total, torch.ones_like(total))


def test_uap_in_another_data_range(make_task):
    """Of bytes it is 255 times what it is of pixels in [0, 1]."""
    task = make_task("mlp")

    class Scaled(torch.nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x / 255)

    one = methods.get("fgsm-uap")(Linf(EPS))
    other = methods.get("fgsm-uap")(Linf(255 * EPS, bounds=(0, 255)))
    for _ in range(2):
        small = one(copy.deepcopy(task.net), task.x, task.y).x_adv
        large = other(Scaled(copy.deepcopy(task.net)), 255 * task.x, task.y).x_adv
        torch.testing.assert_close(large, 255 * small)
    torch.testing.assert_close(other._u, 255 * one._u)


def test_loading_a_memory_leaves_the_callers_tensors_alone(make_task):
    task = make_task("mlp")
    method = methods.get("fgsm-mep")(Linf(EPS))
    method.progress = at(0)
    step(method, task)
    state = copy.deepcopy(method.state_dict())
    kept = copy.deepcopy(state)
    method.load_state_dict(state)
    method.progress = at(0, 1)
    step(method, task)
    for name in ("delta", "momentum"):
        assert torch.equal(state[name]["values"], kept[name]["values"])
