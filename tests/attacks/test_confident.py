"""Networks so sure of themselves that float32 cross entropy has no gradient left."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from surestep import L2, Linf, attacks
from surestep.attacks.gradients import NoGradient, input_gradient
from surestep.attacks.lending import attacking
from surestep.attacks.losses import cross_entropy, log_odds


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
        ours, logits = input_gradient(inner, x, y)
    leaf = x.clone().requires_grad_()
    (naive,) = torch.autograd.grad(F.cross_entropy(net(leaf), y, reduction="sum"), leaf)
    assert float((naive.flatten(1).abs().amax(1) == 0).double().mean()) > 0.5
    assert bool((ours.flatten(1).abs().amax(1) > 1e-3).all())
    assert bool(ours.isfinite().all())
    assert bool(log_odds(logits, y).isfinite().all())


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


@pytest.fixture
def sure():
    """Return a network so sure that only float32 has its losses' gradients, images, labels."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    x = torch.rand(24, 1, 4, 4)
    y = net(x).argmax(1)
    shift = 20 * torch.eye(4)

    class Sure(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.labels = net, y

        def forward(self, x):
            return self.inner(x) + shift[self.labels]

    return Sure(), x, y


def divergence(logits, y):
    """Return KL from the outputs that were there before, as TRADES climbs it."""
    before = (logits.detach() + 1e-3 * torch.arange(4)).log_softmax(1)
    return (before.exp() * (before - logits.log_softmax(1))).sum(1)


@pytest.mark.parametrize("objective", [cross_entropy, divergence])
@pytest.mark.parametrize("train_mode", [False, True])
def test_fp16_has_the_gradient_of_a_sure_image(sure, objective, train_mode):
    net, x, y = sure
    net.train(train_mode)
    exact, _ = input_gradient(net, x, y, objective)
    with torch.autocast("cpu", torch.float16):
        ours, _ = input_gradient(net, x, y, objective)
        leaf = x.clone().requires_grad_()
        (naive,) = torch.autograd.grad(objective(net(leaf).float(), y).sum(), leaf)
    assert float((naive == 0).double().mean()) > 0.5, "what this is about"
    assert ours.dtype == torch.float32
    # In train mode one factor serves all images: those that pull far less than others get less.
    rows = exact.flatten(1).abs().amax(1)
    told = rows > (1e-2 * rows.max() if train_mode else 0)
    assert int(told.sum()) > 3
    error = (ours - exact)[told].flatten(1).norm(dim=1) / exact[told].flatten(1).norm(dim=1)
    assert float(error.max()) < 0.02


def test_fp16_still_says_that_there_is_no_gradient(sure):
    net, x, y = sure

    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(4))

        def forward(self, x):
            return net(x.detach()) + self.bias

    with torch.autocast("cpu", torch.float16), pytest.raises(NoGradient):
        input_gradient(Detached(), x, y)
