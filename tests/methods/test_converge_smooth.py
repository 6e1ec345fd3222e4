"""What ConvergeSmooth takes over from the method inside."""

import copy
from types import SimpleNamespace

import pytest
import torch

from surestep import Linf, methods

EPS = 0.1


@pytest.mark.parametrize("inside", methods.names())
def test_the_method_inside_keeps_its_flags_and_takes_its_step(inside, make_task):
    ours = methods.get("converge-smooth")(Linf(EPS), perturbation=inside)
    alone = methods.get(inside)(Linf(EPS))
    for name in ("needs_index", "second_order", "replays", "dropout"):
        assert getattr(ours, name) == getattr(alone, name)
    task = make_task("mlp")
    ours.progress = methods.Progress(step=3, steps_per_epoch=10, epochs=2, images=6)
    result = ours(task.net, task.x, task.y, task.index)
    result.loss.backward()
    assert bool(result.loss.isfinite())
    assert all(bool(p.grad.isfinite().all()) for p in task.net.parameters())


def test_the_steps_of_the_method_inside():
    inside = "sat-r2 every=4 fraction=0.25"
    ours = methods.get("converge-smooth")(Linf(EPS), perturbation=inside)
    assert ours.cycle == 4
    assert ours.peak_images(128) == 128 + 2 * 128  # all are regularised then, and clean


def test_the_method_inside_takes_settings():
    ours = methods.get("converge-smooth")(Linf(EPS), perturbation="fgsm-mep alpha=0.15")
    assert ours.base.alpha == 0.15


def test_memory_inside_follows_the_flip(make_task):
    task = make_task("mlp")
    flip = SimpleNamespace(apply=lambda v: v.flip(-1), undo=lambda v: v.flip(-1))
    ours = methods.get("converge-smooth")(Linf(EPS), perturbation="fgsm-mep")
    alone = methods.get("fgsm-mep")(Linf(EPS))
    for number, draw in enumerate((flip, None)):
        seen = []
        for method in (ours, alone):
            method.progress = methods.Progress(step=number, steps_per_epoch=1, epochs=4, images=6)
            torch.manual_seed(number)
            step = method(copy.deepcopy(task.net), task.x, task.y, task.index, draw)
            seen.append(step.x_adv)
        assert torch.equal(*seen)


@pytest.mark.parametrize(("before", "sign"), [(0.98, 1.0), (0.96, 0.0), (0.5, 0.0), (1.2, 1.0)])
def test_the_limit_lies_between_two_gammas(before, sign):
    """T is 0.03 at 0.6 of the rate, the last rise (no fall) above that, but at most 0.05."""
    method = methods.get("converge-smooth")(Linf(EPS), gamma=0.05)
    sums = torch.tensor([0.0, 0.0, 1.0, before], dtype=torch.float64)
    known = {"sums": sums, "lr": 0.1, "steady": True, "calm": True}
    method.load_state_dict({**method.state_dict(), **known})
    method.progress = methods.Progress(step=1, steps_per_epoch=4, epochs=4, lr=0.06)
    assert float(method._sign(torch.tensor(1.035))) == sign


def test_the_mean_weights_survive_a_resume(make_task):
    task, losses = make_task("mlp"), []
    made = [methods.get("converge-smooth")(Linf(EPS), perturbation="fgsm", pull=0.3) for _ in "ab"]
    for epoch in range(2):
        made[0].progress = methods.Progress(step=2 * epoch, steps_per_epoch=2, epochs=4, lr=0.1)
        made[0](copy.deepcopy(task.net), task.x, task.y)
    made[1].load_state_dict(copy.deepcopy(made[0].state_dict()))
    with torch.no_grad():
        task.net[-1].weight *= 2
    # Wrapped, so that its parameters have other names.
    for method, net in zip(made, (task.net, torch.nn.Sequential(task.net)), strict=True):
        method.progress = methods.Progress(step=3, steps_per_epoch=2, epochs=4, lr=0.1)
        losses.append(method(copy.deepcopy(net), task.x, task.y).loss.detach())
    assert torch.equal(*losses)
    assert made[1].state_dict()["centre"]


def test_the_method_inside_attacks_its_sources(make_task):
    task, asked = make_task("mlp"), []
    source = copy.deepcopy(task.net)
    source.register_forward_hook(lambda *_: asked.append(1))
    ours = methods.get("converge-smooth")(Linf(EPS), perturbation="eat")
    assert ours.takes_sources
    assert not methods.get("converge-smooth")(Linf(EPS), perturbation="fgsm").takes_sources
    ours.sources = [source]
    for number in range(4):
        ours.progress = methods.Progress(step=number, steps_per_epoch=10, epochs=2, images=6)
        ours(task.net, task.x, task.y)
    assert asked
