"""Networks so sure of themselves that float32 cross entropy has no gradient left."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from surestep import L2, Linf, attacks
from surestep.attacks.core import attacking, input_gradient


@pytest.fixture(params=[1e3, 1e4])
def confident(request, mlp, digits):
    """Return a network whose logits are scaled up, images, and the labels it believes in."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp.float()

        def forward(self, x):
            return request.param * self.inner(x)

    net = Scaled()
    x = digits(64)[0].float().clamp(0.2, 0.8)
    return net, x, net(x).argmax(1)


def test_naive_cross_entropy_vanishes_and_ours_does_not(confident):
    net, x, y = confident
    with attacking(net) as inner:
        ours, values, _ = input_gradient(inner, x, y)
    leaf = x.clone().requires_grad_()
    (naive,) = torch.autograd.grad(F.cross_entropy(net(leaf), y, reduction="sum"), leaf)
    assert float((naive.flatten(1).abs().amax(1) == 0).double().mean()) > 0.5
    assert bool((ours.flatten(1).abs().amax(1) > 1e-3).all())
    assert bool(ours.isfinite().all())
    assert bool(values.isfinite().all())


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
def test_fgsm_moves_every_pixel(confident, loss):
    net, x, y = confident
    moved = attacks.fgsm(net, x, y, Linf(0.1), loss) - x
    torch.testing.assert_close(moved.abs(), torch.full_like(x, 0.1))


def test_l2_step_keeps_its_length(confident):
    net, x, y = confident
    moved = attacks.fgsm(net, x, y, L2(0.15)) - x
    torch.testing.assert_close(moved.flatten(1).norm(dim=1), torch.full((64,), 0.15))


def test_pgd_is_as_strong_as_on_the_unscaled_network(confident):
    """The more confident, the closer cross entropy comes to the margin."""
    net, x, y = confident

    def accuracy(model, loss):
        x_adv = attacks.pgd(model, x, y, Linf(0.3), 10, 0.06, loss=loss, start_radius=0.0)
        return float((model(x_adv).argmax(1) == y).double().mean())

    assert accuracy(net, "ce") == pytest.approx(accuracy(net.inner, "margin"), abs=0.02)
    assert accuracy(net, "ce") < 0.9
