import warnings
from types import SimpleNamespace

import pytest
import torch
from families import merged
from torch import nn

from surestep import Linf, methods

EPS = 0.1
SMALL = merged("SMALL")


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4))


def conv():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.SiLU(),
        nn.Conv2d(4, 6, 3, stride=2),
        nn.BatchNorm2d(6),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(24, 4),
    )


def flat():
    return nn.Sequential(nn.Linear(7, 10), nn.BatchNorm1d(10), nn.Tanh(), nn.Linear(10, 3))


NETS = {"mlp": (mlp, (1, 4, 4), 4), "conv": (conv, (2, 5, 5), 4), "flat": (flat, (7,), 3)}


@pytest.fixture(autouse=True)
def _steps_at_no_point_of_a_course():
    """Tests here take steps that belong to no training; one of them tests what is said of that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* follows a schedule, but its progress is not set")
        yield


@pytest.fixture(params=methods.names())
def slug(request):
    return request.param


@pytest.fixture
def build():
    """Build a method with few steps."""

    def make(slug, **params):
        method = methods.get(slug)(Linf(EPS), **{**SMALL.get(slug, {}), **params})
        method.progress = methods.Progress(step=3, steps_per_epoch=10, epochs=2, images=64)
        return method

    return make


@pytest.fixture
def method(build, slug):
    return build(slug)


@pytest.fixture
def make_task():
    """Make a network in train mode, a batch and labels; batch statistics as after some training."""

    def make(name, n=6, dtype=torch.float64):
        torch.manual_seed(0)
        factory, shape, classes = NETS[name]
        net = factory().to(dtype)
        g = torch.Generator().manual_seed(1)
        x = (1.4 * torch.rand(n, *shape, generator=g, dtype=dtype) - 0.2).clamp(0, 1)
        y = torch.randint(classes, (n,), generator=g)
        with torch.no_grad():
            for _ in range(3):
                net.train()(torch.rand(32, *shape, generator=g, dtype=dtype))
            net[-1].weight *= 3
        return SimpleNamespace(net=net, x=x, y=y, classes=classes, index=torch.arange(n))

    return make


@pytest.fixture(params=NETS)
def task(request, make_task):
    return make_task(request.param)
