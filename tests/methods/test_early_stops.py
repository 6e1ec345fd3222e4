"""SSAT and FAT choose a point for each image: all kinds of images occur in their oracles' cases."""

import copy

import pytest
import torch
from families import fat, ssat
from families.maths import EPS, ball

from surestep import Linf, methods


def lengths(points, x):
    return (points - x).flatten(1).norm(dim=1)


def test_ssat_takes_no_part_or_all_of_the_step(make_task):
    task = make_task("conv", n=40)
    torch.manual_seed(11)
    points = methods.get("ssat")(Linf(EPS), checkpoints=4)(task.net, task.x, task.y).x_adv
    torch.manual_seed(11)
    # Every label as the network has it at the start and between: the whole step.
    whole, _, _ = ssat.ssat(copy.deepcopy(task.net), task.x, task.y, 0.0, checkpoints=1)
    moved = lengths(whole, task.x) > 0
    share = lengths(points, task.x)[moved] / lengths(whole, task.x)[moved]
    kinds = {round(float(4 * s), 6) for s in share}
    assert kinds <= {1.0, 2.0, 3.0, 4.0}
    assert len(kinds) >= 2
    assert not bool(moved.all())
    assert float(lengths(points, task.x)[~moved].max()) == 0


def test_ssat_trains_misclassified_images_clean(make_task):
    task = make_task("mlp")
    wrong = (task.net(task.x).argmax(1) + 1) % task.classes
    result = methods.get("ssat")(Linf(1e-6))(task.net, task.x, wrong)
    assert torch.equal(result.x_adv, task.x)


@pytest.mark.parametrize("tau", [0, 1, 2])
def test_fat_counts_the_steps_after_the_flip(make_task, tau):
    """Of images that are misclassified everywhere: tau steps from the start, and no more."""
    task = make_task("mlp")
    wrong = (task.net(task.x).argmax(1) + 1) % task.classes
    tiny = 1e-6
    torch.manual_seed(11)
    result = methods.get("fat")(Linf(tiny), steps=5, tau=tau, alpha=tiny)(task.net, task.x, wrong)
    torch.manual_seed(11)
    start = task.x + torch.empty_like(task.x).uniform_(-tiny, tiny)
    inside = (task.x > 0.01) & (task.x < 0.99)
    moved = (result.x_adv - start).abs()[inside] > tiny / 1e4
    assert bool(moved.double().mean() > 0.9) == (tau > 0)


def test_fat_stops_some_images_and_not_others(make_task):
    task, found = make_task("conv", n=40), []
    y = copy.deepcopy(task.net).eval()(task.x).argmax(1)
    for tau in (0, 1, 10):
        torch.manual_seed(11)
        method = methods.get("fat")(Linf(EPS), steps=5, alpha=0.02, tau=tau)
        found.append(method(copy.deepcopy(task.net), task.x, y).x_adv)
    early = lengths(found[0], found[2]) > 0
    assert 0 < int(early.sum()) < len(early)
    assert bool((lengths(found[1], found[0]) > 0)[early].any())
    torch.manual_seed(11)
    points, _, _ = fat.fat(task.net, task.x, y, 0.0, tau=10, steps=5, alpha=0.02)
    torch.testing.assert_close(found[2], points)
    torch.testing.assert_close(found[2], ball(found[2], task.x))
