"""LIET beyond the first step: when templates are renewed, and the divergence that grows."""

import copy

import pytest
import torch
from families import liet
from families.maths import EPS, signs

from surestep import Linf, methods


def at(method, step):
    method.progress = methods.Progress(step=step, steps_per_epoch=10, epochs=2)
    return method


def grey_signs(task):
    grey = torch.full_like(task.x[:1], 0.5).repeat(task.classes, *[1] * (task.x.dim() - 1))
    return signs(task.net, grey, torch.arange(task.classes))


def moved(task):
    """Return the task with other weights: training went on."""
    with torch.no_grad():
        for parameter in task.net.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return task


def test_the_divergence_grows_with_training(task):
    method = at(methods.get("liet")(Linf(EPS), lam=30.0, far=True), 15)
    reference = copy.deepcopy(task.net)
    torch.manual_seed(11)
    result = method(task.net, task.x, task.y)
    torch.manual_seed(11)
    points, loss, rows = liet.liet(reference, task.x, task.y, 0.0, far=True, lam=30.0, done=15 / 20)
    expected = loss(reference.train()(points))
    torch.testing.assert_close(result.x_adv, points[rows], rtol=0, atol=1e-8)
    torch.testing.assert_close(result.loss, expected, rtol=0, atol=1e-8)
    assert float(result.terms["js"]) > 1e-4


def test_templates_are_renewed_every_so_many_steps(make_task):
    task = make_task("conv")
    method, made = methods.get("liet")(Linf(EPS), every=3), []
    for step in range(2, 8):
        expected = grey_signs(moved(task))
        at(method, step)(task.net, task.x, task.y)
        made.append(torch.equal(method.state_dict()["templates"].sign(), expected))
    # The first time there were none; then at steps 3 and 6.
    assert made == [True, True, False, False, True, False]


def test_templates_are_made_no_more_images_at_a_time_than_a_batch(make_task):
    task, sizes, made = make_task("conv"), [], []
    for n in (6, 3):
        method, net = methods.get("liet")(Linf(EPS)), copy.deepcopy(task.net)
        net.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
        at(method, 0)(net, task.x[:n], task.y[:n])
        made.append(method.state_dict()["templates"].sign())
    assert torch.equal(*made)
    assert sizes == [1, 1, 4, 6, 12, 1, 1, 3, 1, 3, 6]


def test_templates_are_the_mean_over_the_processes(make_task, monkeypatch):
    """Each has batch statistics of its own, but labels start at the same template in all."""
    task, made = make_task("conv"), []
    for shared in (1.0, 2.0):
        monkeypatch.setattr("surestep.processes.mean", lambda value, shared=shared: shared * value)
        method = methods.get("liet")(Linf(EPS))
        at(method, 0)(copy.deepcopy(task.net), task.x, task.y)
        made.append(method.state_dict()["templates"])
    assert bool(made[0].any())
    torch.testing.assert_close(made[1], 2 * made[0])


@pytest.mark.parametrize("before", [0, 1, 2])
def test_a_resume_keeps_the_templates(make_task, before):
    """Also of a checkpoint taken before the first step, and with the weights moved on since."""
    task = make_task("conv")
    one, other = (methods.get("liet")(Linf(EPS), every=3) for _ in range(2))
    for step in range(before):
        at(one, step)(task.net, task.x, task.y)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for step in range(before, 5):
        moved(task)
        found = []
        for method in (one, other):
            torch.manual_seed(step)
            found.append(at(method, step)(copy.deepcopy(task.net), task.x, task.y))
        assert torch.equal(found[0].x_adv, found[1].x_adv)
        assert torch.equal(found[0].loss, found[1].loss)


def test_loaded_templates_are_its_own(make_task):
    task = make_task("mlp")
    method = methods.get("liet")(Linf(EPS))
    method(task.net, task.x, task.y)
    state = method.state_dict()
    other = methods.get("liet")(Linf(EPS))
    other.load_state_dict(state)
    state["templates"].zero_()
    assert bool(other.state_dict()["templates"].any())


def test_batches_of_other_sizes(make_task):
    task = make_task("conv")
    method = methods.get("liet")(Linf(EPS))
    for n in (6, 2, 5):
        assert method(task.net, task.x[:n], task.y[:n]).x_adv.shape == task.x[:n].shape


def test_the_start_is_the_labels_own_direction(make_task):
    """Half of the images go along it, half against; 10 to 50% of the pixels are noise."""
    task = make_task("conv", n=300)
    x = task.x.clamp(0.2, 0.8)
    templates, seen = EPS * grey_signs(task), []
    task.net.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    methods.get("liet")(Linf(EPS), far=False)(task.net, x, task.y)
    delta = (seen[-1][:300] - x) / templates[task.y]
    along, against = ((delta - sign).abs().lt(1e-6).flatten(1).double().mean(1) for sign in (1, -1))
    forward = along > against
    assert 0.4 < float(forward.double().mean()) < 0.6
    noisy = 1 - torch.where(forward, along, against)
    assert 0.25 < float(noisy.mean()) < 0.35
    assert float(delta.abs().max()) <= 1 + 1e-9
