from __future__ import annotations

from typing import Any

import pytest
import torch

import surestep
from surestep import attacks
from surestep.errors import UserError
from surestep.evaluation import suite

THREAT = surestep.Linf(0.3)


@pytest.mark.parametrize(
    ("name", "called", "args"),
    [
        ("fgsm", "fgsm", ("ce",)),
        ("fgsm-margin", "fgsm", ("margin",)),
        ("r-fgsm", "r_fgsm", ("ce",)),
        ("i-fgsm-10", "i_fgsm", (10, "ce")),
        ("i-fgsm-3-dlr", "i_fgsm", (3, "dlr")),
        ("mi-fgsm-10", "mi_fgsm", (10, "ce")),
        ("noise-10", "random_noise", (10,)),
        ("pgd-100", "pgd", (100, 0.01, 1, "ce", True)),
        ("pgd-20x2", "pgd", (20, 0.3 / 8, 2, "ce", True)),
        ("pgd-100-margin", "pgd", (100, 0.01, 1, "margin", True)),
        ("pgd-50x10-dlr", "pgd", (50, 0.015, 10, "dlr", True)),
        ("pgd-1-ce", "pgd", (1, 0.75, 1, "ce", True)),
    ],
)
def test_names(monkeypatch, name, called, args):
    calls: list[Any] = []

    def note(model: Any, x: Any, y: Any, threat: Any, *rest: Any, **named: Any) -> str:
        calls.append((model, x, y, threat, *rest, *named.values()))
        return "x_adv"

    monkeypatch.setattr(attacks, called, note)
    assert suite.parse(name, THREAT)("model", "x", "y") == "x_adv"
    (call,) = calls
    assert call[:4] == ("model", "x", "y", THREAT)
    given = [pytest.approx(a) if type(a) is float else a for a in args]
    assert list(call[4:]) == given


@pytest.mark.parametrize(
    "name",
    [
        "",
        "pgd",
        "pgd-0",
        "pgd-",
        "pgd-10x0",
        "pgd-010",
        "pgd-1.5",
        "pgd--5",
        "pgd-10x",
        "pgdx2",
        "pgd-10-cw",
        "pgd-10-margin-ce",
        "PGD-10",
        "pgd-10 ",
        "pgd-10\n",
        "fgsm-3",
        "fgsmx2",
        "r-fgsm-3",
        "i-fgsm",
        "i-fgsm-10x2",
        "mi-fgsm",
        "noise",
        "noise-5-margin",
        "noise-5x2",
        "autoattak",
    ],
)
def test_what_is_no_name(name):
    with pytest.raises(UserError, match=r"unknown attack .*: write one of fgsm, ") as caught:
        suite.parse(name, THREAT)
    assert "\n" not in str(caught.value)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize(
    ("eps", "steps", "size"),
    [(0.3, 100, 0.01), (8 / 255, 10, 2 / 255), (8 / 255, 20, 1 / 255), (0.3, 1000, 0.01)],
)
def test_step_sizes(eps, steps, size):
    assert suite.pgd_step_size(eps, steps) == pytest.approx(size)


@pytest.mark.parametrize("steps", [1, 2, 5, 20, 100, 1000])
def test_any_number_of_steps_crosses_the_ball(steps):
    # From one side of the ball to the other is 2 eps.
    assert steps * suite.pgd_step_size(0.3, steps) >= 2 * 0.3


@pytest.mark.parametrize(
    "name", ["fgsm", "r-fgsm", "i-fgsm-3", "mi-fgsm-3", "noise-3", "pgd-3x2", "pgd-3-margin"]
)
def test_points_are_in_the_ball(net, images, name):
    x, y = images
    torch.manual_seed(0)
    x_adv = suite.parse(name, THREAT)(net, x, y)
    assert (x_adv - x).abs().max() <= 0.3
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert not torch.equal(x_adv, x)
