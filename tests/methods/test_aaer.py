"""AAER where the abnormal examples spread more than the others."""

import pytest
import torch

from surestep import Linf, UserError, methods


def test_only_what_spreads_more_than_usual_is_pulled(make_task):
    task = make_task("mlp")
    method = methods.get("aaer")(Linf(0.1), lam=1.0, lam_loss=0.0, lam_spread=1.0)
    update = method.prepare(task.net, task.x, task.y)
    with torch.no_grad():
        z = task.net(update.points)
    # Far towards the label for the first three, a little away from it for the others.
    push = torch.zeros_like(z)
    push[range(6), task.y] = torch.tensor([30.0, 30, 30, -9, -9, -9], dtype=z.dtype)
    z = (z + push).requires_grad_()
    loss, terms = update.loss(z)
    assert float(terms["abnormal"]) == 0.5
    (grad,) = torch.autograd.grad(loss - terms["ce"], z)
    assert bool((grad[:3].abs().sum(1) > 0).all())
    assert not grad[3:].any()  # the usual spread is what they are measured by
    extra = (loss - terms["ce"]).detach()
    assert float(terms["penalty"].detach()) == pytest.approx(float(extra))


@pytest.mark.parametrize("perturbation", ["zerograd", "multigrad"])
def test_a_step_along_another_gradient_is_refused(perturbation):
    with pytest.raises(UserError, match=rf"perturbation '{perturbation}' is not a step along one"):
        methods.get("aaer")(Linf(0.1), perturbation=perturbation)
