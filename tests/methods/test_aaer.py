"""AAER where the abnormal examples spread more than the others."""

import pytest
import torch
from families.single_step import aaer

from surestep import Linf, UserError, methods


def half_abnormal(task, points):
    """Return logits far towards the label for the first three, a little away from it for others."""
    with torch.no_grad():
        z = task.net(points)
    push = torch.zeros_like(z)
    push[range(6), task.y] = torch.tensor([30.0, 30, 30, -9, -9, -9], dtype=z.dtype)
    return (z + push).requires_grad_()


def test_only_what_spreads_more_than_usual_is_pulled(make_task):
    task = make_task("mlp")
    method = methods.get("aaer")(Linf(0.1), lam=1.0, lam_loss=0.0, lam_spread=1.0)
    update = method.prepare(task.net, task.x, task.y)
    z = half_abnormal(task, update.points)
    loss, terms = update.loss(z)
    assert float(terms["abnormal"]) == 0.5
    (grad,) = torch.autograd.grad(loss - terms["ce"], z)
    assert bool((grad[:3].abs().sum(1) > 0).all())
    assert not grad[3:].any()  # the usual spread is what they are measured by


def test_its_parts_are_the_number_the_fall_and_the_spread(make_task):
    """By the loops of the oracle, with what hardly occurs in a small net: half are abnormal."""
    weights = {"lam": 0.7, "lam_loss": 2.5, "lam_spread": 1.5}
    task, seeded = make_task("mlp"), torch.random.fork_rng
    with seeded():
        torch.manual_seed(5)
        update = methods.get("aaer")(Linf(0.1), **weights).prepare(task.net, task.x, task.y)
    with seeded():
        torch.manual_seed(5)
        points, expected, _ = aaer(task.net, task.x, task.y, 0.0, **weights)
    torch.testing.assert_close(update.points, points)
    z = half_abnormal(task, points)
    loss, terms = update.loss(z)
    assert float(terms["abnormal"]) == 0.5
    assert float(loss.detach()) == pytest.approx(float(expected(z).detach()), rel=1e-9)
    ce, penalty = float(terms["ce"].detach()), float(terms["penalty"].detach())
    assert ce + 0.7 * penalty == pytest.approx(float(loss.detach()), rel=1e-9)


def test_a_second_pass_keeps_the_examples_that_were_abnormal(make_task):
    """AWP moves the weights so that no loss falls: what falls is decided at the first."""
    task = make_task("mlp")
    update = methods.get("aaer")(Linf(0.1)).prepare(task.net, task.x, task.y)
    first = half_abnormal(task, update.points)
    _, terms = update.loss(first)
    _, again = update.loss(first.detach() - 60 * torch.nn.functional.one_hot(task.y, 4))
    assert float(terms["abnormal"]) == float(again["abnormal"]) == 0.5


@pytest.mark.parametrize("perturbation", ["rs-fgsm", "n-fgsm noise=0"])
def test_nothing_is_abnormal_where_nothing_moves(make_task, perturbation):
    """Loss and logits before and after are of one function, batch norm's mode included."""
    task = make_task("conv")
    method = methods.get("aaer")(Linf(0.0), perturbation=perturbation)
    for _ in range(3):  # the running statistics become others than the batch's
        terms = method(task.net, task.x, task.y).terms
    assert float(terms["abnormal"]) == float(terms["penalty"]) == 0


@pytest.mark.parametrize("perturbation", ["zerograd", "multigrad", "fgsm", "r-fgsm", "sads"])
def test_a_step_along_another_gradient_is_refused(perturbation):
    with pytest.raises(UserError, match=rf"perturbation '{perturbation}' is not a step along one"):
        methods.get("aaer")(Linf(0.1), perturbation=perturbation)
