"""GAT and NuAT beyond the first step: the guided attack, and the course of the weight."""

import copy

import pytest
import torch
from families.maths import EPS, ball, box, mean_ce, noise_signs

from surestep import Linf, methods


def apart(slug, one, other):
    if slug == "gat":
        return ((one.softmax(1) - other.softmax(1)) ** 2).sum() / len(one)
    gram = (one - other).T @ (one - other)  # its eigenvalues are the squared singular values
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum() / len(one)


def weight(slug, step, lam):
    """Of a run of 100 steps."""
    return lam * (4 if step >= 90 else 1) if slug == "gat" else lam * min(1, step / 90)


@pytest.mark.parametrize("step", [20, 21, 91, 92])
@pytest.mark.parametrize("slug", ["gat", "nuat"])
def test_odd_steps_are_guided(slug, step, task):
    method, lam = methods.get(slug)(Linf(EPS), lam=6.0), weight(slug, step, 6.0)
    method.progress = methods.Progress(step=step, steps_per_epoch=25, epochs=4)
    torch.manual_seed(11)
    start = box(task.x + EPS / 2 * noise_signs(task.x)).requires_grad_()
    frozen = copy.deepcopy(task.net).eval()
    z = frozen(start)
    ascended = mean_ce(z, task.y, 0.0)
    if step % 2:
        ascended = ascended + lam * apart(slug, frozen(task.x).detach(), z)
    direction = torch.autograd.grad(ascended, start)[0].sign()
    x_adv = ball(start.detach() + EPS * direction, task.x)
    one, other = copy.deepcopy(task.net)(torch.cat([task.x, x_adv])).chunk(2)
    torch.manual_seed(11)
    result = method(task.net, task.x, task.y)
    torch.testing.assert_close(result.x_adv, x_adv, rtol=0, atol=1e-8)
    distance = apart(slug, one, other)
    torch.testing.assert_close(result.loss, mean_ce(one, task.y, 0.0) + lam * distance)
    torch.testing.assert_close(result.terms["distance"], distance.detach())


@pytest.mark.parametrize("slug", ["gat", "nuat"])
def test_the_guide_changes_the_attack(slug, make_task):
    """So the test above tells odd from even steps."""
    task, found = make_task("conv"), []
    for step in (90, 91):
        method = methods.get(slug)(Linf(EPS), lam=60.0)
        method.progress = methods.Progress(step=step, steps_per_epoch=100)
        torch.manual_seed(11)
        found.append(method(task.net, task.x, task.y).x_adv)
    assert not torch.equal(*found)


@pytest.mark.parametrize("slug", ["gat", "nuat"])
def test_an_odd_step_takes_one_forward_more(slug, make_task):
    task, seen = make_task("conv"), []
    method = methods.get(slug)(Linf(EPS))
    method(task.net, task.x, task.y)
    task.net.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
    for step in (4, 5):
        method.progress = methods.Progress(step=step, steps_per_epoch=10)
        seen.clear()
        method(task.net, task.x, task.y)
        assert sum(seen) == 6 * (3 + step % 2)


@pytest.mark.parametrize("slug", ["gat", "nuat"])
def test_no_difference_is_no_trouble(slug, make_task):
    """A norm has no gradient at zero: the one that is taken must be finite."""
    task = make_task("conv")
    method = methods.get(slug)(Linf(0.0))
    method.progress = methods.Progress(step=51, steps_per_epoch=100)
    result = method(task.net, task.x, task.y)
    result.loss.backward()
    assert float(result.terms["distance"]) == 0
    assert all(bool(p.grad.isfinite().all()) for p in task.net.parameters())


def test_weight_averaging_is_a_setting():
    plain, averaged = (methods.preset("nuat", name) for name in ("cifar10", "cifar10-wa"))
    assert averaged.settings["ema"] == 0.9998
    assert "ema" not in plain.settings


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_nuat_of_logits_that_are_not_finite(bad):
    """The loss is NaN, which the loop tells as divergence; torch alone would raise."""
    one, other = torch.zeros(4, 3), torch.ones(4, 3)
    method = methods.get("nuat")(Linf(EPS))
    assert float(method.distance(one, other)) == pytest.approx(12**0.5)
    other[1, 2] = bad
    assert torch.isnan(method.distance(one, other))
