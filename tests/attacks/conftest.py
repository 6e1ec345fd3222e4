from functools import partial

import pytest
import torch
from torch import nn

from surestep import Linf, attacks

CALLS = {
    "fgsm": attacks.fgsm,
    "r-fgsm": attacks.r_fgsm,
    "i-fgsm": partial(attacks.i_fgsm, steps=3),
    "mi-fgsm": partial(attacks.mi_fgsm, steps=3),
    "pgd": partial(attacks.pgd, steps=3, step_size=0.02, restarts=2, loss="margin"),
    "pgd-stop": partial(attacks.pgd, steps=3, step_size=0.02, restarts=2, stop_when_wrong=True),
    "random-noise": partial(attacks.random_noise, samples=3),
}


@pytest.fixture(params=CALLS)
def attack(request):
    """Each attack with few steps, called as (model, x, y, threat)."""
    return CALLS[request.param]


@pytest.fixture(params=[name for name in CALLS if name != "random-noise"])
def gradient_attack(request):
    return CALLS[request.param]


@pytest.fixture
def threat():
    return Linf(0.05)


@pytest.fixture
def mlp():
    """A smooth network of 12 pixels and 4 classes, in float64 so that formulas can be compared."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4)).double()


@pytest.fixture
def convnet():
    """Everything that has a mode, and modes of its own that no attack may change."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(4 * 36, 4),
    )
    with torch.no_grad():
        net.train()(torch.rand(8, 1, 6, 6))
    net[1].eval()
    net[6].eval()
    net[4].weight.requires_grad_(False)
    return net


@pytest.fixture
def images():
    """Draw a batch (n, 1, side, side) away from the range's ends, and labels of 4 classes."""

    def draw(n=6, side=6, dtype=torch.float32, seed=1):
        g = torch.Generator().manual_seed(seed)
        x = 0.1 + 0.8 * torch.rand(n, 1, side, side, generator=g, dtype=dtype)
        return x, torch.randint(4, (n,), generator=g)

    return draw


@pytest.fixture
def digits():
    """Draw a batch (n, 1, 3, 4) in float64 for ``mlp``; some pixels lie at the ends of [0, 1]."""

    def draw(n=8, seed=1):
        g = torch.Generator().manual_seed(seed)
        x = (1.4 * torch.rand(n, 1, 3, 4, generator=g, dtype=torch.float64) - 0.2).clamp(0, 1)
        return x, torch.randint(4, (n,), generator=g)

    return draw


@pytest.fixture
def autocast_at_logits(monkeypatch):
    """Return a function that notes for a module, at each pass of its model, if autocast is on."""

    def watch(module):
        seen, forward = [], module.forward_logits

        def noting(model, x):
            seen.append(torch.is_autocast_enabled("cpu"))
            return forward(model, x)

        monkeypatch.setattr(module, "forward_logits", noting)
        return seen

    return watch
