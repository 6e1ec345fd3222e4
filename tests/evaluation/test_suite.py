from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import surestep
from surestep import attacks
from surestep.attacks.ascent import Ascent
from surestep.attacks.losses import dlr, log_odds, margin
from surestep.attacks.white_box import pgd_step_size
from surestep.errors import SurestepWarning, UserError
from surestep.evaluation import evaluate, suite

THREAT = surestep.Linf(0.3)


@pytest.mark.parametrize(
    ("name", "called", "args"),
    [
        ("fgsm", "attacks.fgsm", ["ce"]),
        ("fgsm-margin", "attacks.fgsm", ["margin"]),
        ("r-fgsm", "attacks.r_fgsm", ["ce"]),
        ("noise-10", "attacks.random_noise", [10]),
        ("square", "auto.square", [5000]),
        ("square-30", "auto.square", [30]),
        ("apgd-ce", "auto.apgd_ce", []),
        ("apgd-t", "auto.apgd_t", []),
        ("fab-t", "auto.fab_t", []),
        ("deepfool", "nearest.deepfool", [50]),
        ("deepfool-7", "nearest.deepfool", [7]),
    ],
)
def test_names(monkeypatch, name, called, args):
    calls: list[Any] = []

    def note(model: Any, x: Any, y: Any, threat: Any, **named: Any) -> Any:
        calls.append((model, x, y, threat, *named.values()))
        return "x_adv"

    monkeypatch.setattr(f"surestep.evaluation.suite.{called}", note)
    assert suite.parse(name, THREAT).run("model", "x", "y") == "x_adv"
    assert calls == [("model", "x", "y", THREAT, *args)]


@pytest.mark.parametrize(
    ("name", "ascent", "restarts"),
    [
        ("i-fgsm-10", Ascent(THREAT, 10, 0.03, log_odds, None, 0.0), 1),
        ("i-fgsm-3-dlr", Ascent(THREAT, 3, 0.1, dlr, None, 0.0), 1),
        ("mi-fgsm-10", Ascent(THREAT, 10, 0.03, log_odds, 1.0, 0.0), 1),
        ("pgd-100", Ascent(THREAT, 100, 0.01, log_odds, None, None), 1),
        ("pgd-20x2", Ascent(THREAT, 20, 0.3 / 8, log_odds, None, None), 2),
        ("pgd-100-margin", Ascent(THREAT, 100, 0.01, margin, None, None), 1),
        ("pgd-50x10-dlr", Ascent(THREAT, 50, 0.015, dlr, None, None), 10),
        ("pgd-1-ce", Ascent(THREAT, 1, 0.75, log_odds, None, None), 1),
    ],
)
def test_names_of_ascents(monkeypatch, name, ascent, restarts):
    calls: list[Any] = []

    def note(*given: Any, stop_when_wrong: bool) -> Any:
        calls.append((*given, stop_when_wrong))
        return SimpleNamespace(x_adv="x_adv", first_wrong="steps")

    monkeypatch.setattr("surestep.evaluation.suite.search", note)
    monkeypatch.setattr("surestep.evaluation.suite.count_classes", lambda *_: 3)
    found = suite.parse(name, THREAT)
    assert found.run("model", "x", "y") == suite.AttackResult("x_adv", "steps")
    ((*images, made, times, stops),) = calls
    assert images == ["model", "x", "y"]
    assert made.step_size == pytest.approx(ascent.step_size)
    assert replace(made, step_size=ascent.step_size) == ascent
    assert (times, stops) == (restarts, True)
    assert (found.gradient_steps, found.points_tried) == (ascent.steps, times * (ascent.steps + 1))


@pytest.mark.parametrize(
    ("name", "uses_gradient", "steps"),
    [
        ("fgsm", True, 1),
        ("r-fgsm", True, 1),
        ("apgd-ce", True, 100),
        ("apgd-t", True, 100),
        ("fab-t", True, None),
        ("autoattack", True, None),
        ("noise-10", False, 0),
        ("square", False, 0),
        ("transfer", False, 0),
    ],
)
def test_use_of_the_gradient(net, name, uses_gradient, steps):
    found = suite.parse(name, THREAT, [net])
    assert (found.uses_gradient, found.gradient_steps) == (uses_gradient, steps)


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
        "autoattack-3",
        "square-margin",
        "squarex2",
        "apgd",
        "apgd-t-3",
        "transferx2",
    ],
)
def test_what_is_no_name(name):
    with pytest.raises(UserError, match=r"unknown attack .*write one of fgsm\[") as caught:
        suite.parse(name, THREAT)
    assert "\n" not in str(caught.value)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize(
    ("eps", "steps", "size"),
    [(0.3, 100, 0.01), (8 / 255, 10, 2 / 255), (8 / 255, 20, 1 / 255), (0.3, 1000, 0.01)],
)
def test_step_sizes(eps, steps, size):
    assert pgd_step_size(eps, steps) == pytest.approx(size)


@pytest.mark.parametrize("steps", [1, 2, 5, 20, 100, 1000])
def test_any_number_of_steps_crosses_the_ball(steps):
    # From one side of the ball to the other is 2 eps.
    assert steps * pgd_step_size(0.3, steps) >= 2 * 0.3


@pytest.mark.parametrize(
    "name",
    [
        *("fgsm", "r-fgsm", "i-fgsm-3", "mi-fgsm-3", "noise-3", "pgd-3x2", "pgd-3-margin"),
        *("square-30", "apgd-ce", "transfer"),
    ],
)
def test_points_are_in_the_ball(net, images, name):
    x, y = images
    torch.manual_seed(0)
    found = suite.parse(name, THREAT, [net]).run(net, x, y)
    x_adv = found.x_adv if isinstance(found, suite.AttackResult) else found
    assert (x_adv - x).abs().max() <= 0.3
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert not torch.equal(x_adv, x)


def test_transfer_needs_a_source():
    with pytest.raises(UserError, match="needs source models"):
        suite.parse("transfer", THREAT)


def test_transfer_finds_on_the_source_what_breaks_the_model(net, images):
    """The model shows no gradient; one with its weights and a gradient does."""

    class Hidden(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return net(x.detach())

    (x, y), threat = images, surestep.Linf(0.13)
    net.eval()
    torch.manual_seed(0)
    found = suite.parse("transfer", threat, [net]).run(Hidden(), x, y)
    torch.manual_seed(0)
    halves = attacks.pgd(net, x, y, threat, 50), attacks.mi_fgsm(net, x, y, threat, 20, 1, "margin")
    with torch.no_grad():
        clean, left, pgd, mi = (net(z).argmax(1) == y for z in (x, found, *halves))
    assert torch.equal(left, pgd & mi)
    assert int(left.sum()) < int(mi.sum()) < int(pgd.sum()) < int(clean.sum())


def test_steps_of_success(net, images):
    """``first_wrong`` is the first iterate that a plain loop finds misclassified."""
    x, y = images
    net.eval()
    found = suite.parse("i-fgsm-6", THREAT).run(net, x, y)
    expected = torch.full((len(x),), -1)
    point = x.clone()
    for step in range(7):
        point = point.detach().requires_grad_()
        logits = net(point)
        wrong = logits.argmax(1) != y
        expected[wrong & (expected < 0)] = step
        loss = torch.nn.functional.cross_entropy(logits, y, reduction="sum")
        (grad,) = torch.autograd.grad(loss, point)
        point = (point + 0.05 * grad.sign()).clamp(x - 0.3, x + 0.3).clamp(0, 1)
    assert found.first_wrong.tolist() == expected.tolist()
    assert len(expected.unique()) > 2


def test_budgets():
    for name, names in suite.BUDGETS.items():
        assert suite.budget(name) == names
        suite.parse_all(names, THREAT)
    with pytest.raises(UserError, match="unknown budget 'quik': did you mean 'quick'"):
        suite.budget("quik")


def test_every_kind_is_told_to_people_as_it_can_be_written():
    written = suite.NAMES.split(", ")
    assert len(written) == len(suite.KINDS)
    for text, kind in zip(written, suite.KINDS, strict=True):
        if kind in ("transfer", "cw-l2", "deepfool"):
            continue  # of a source, of a norm, of a package
        for full in (True, False):
            name = re.sub(r"\[(.*?)\]", r"\1" if full else "", text)
            name = re.sub("STEPS|SAMPLES|QUERIES", "3", name)
            suite.parse(name.replace("RESTARTS", "2").replace("LOSS", "dlr"), THREAT)


def test_attacks_that_follow_the_gradient_go_straight_through_too():
    names = ["fgsm", "noise-3", "pgd-5-margin", "square-30", "transfer", "apgd-ce", "apgd-ce-bpda"]
    assert suite.with_bpda(names) == [
        "fgsm", "fgsm-bpda", "noise-3", "pgd-5-margin", "pgd-5-margin-bpda", "square-30",
        "transfer", "apgd-ce", "apgd-ce-bpda",
    ]  # fmt: skip
    for name in ("noise-3-bpda", "square-bpda", "transfer-bpda", "pgd-5-bpda-bpda"):
        with pytest.raises(UserError, match=f"unknown attack '{name}'"):
            suite.parse(name, THREAT)


class Dead(nn.Module):
    """A layer that is flat nearly everywhere, and knows a way through itself."""

    straight_through = False

    def forward(self, x):
        flat = (x * 7).round() / 7
        return flat + (x - x.detach()) if self.straight_through else flat


def test_dead_layers_do_not_count_as_robustness(net, images):
    x, y = images
    model = nn.Sequential(Dead(), net)
    with pytest.warns(SurestepWarning, match="no gradient reaches"):
        masked = evaluate(model, (x, y), THREAT, {"pgd-10": suite.parse("pgd-10", THREAT)})
    found = evaluate(model, (x, y), THREAT, ["pgd-10"])
    assert found.robust_accuracy["pgd-10"] == masked.worst_case_accuracy
    assert found.robust_accuracy["pgd-10-bpda"] == found.worst_case_accuracy
    assert found.worst_case_accuracy < masked.worst_case_accuracy - 0.2
    assert model[0].straight_through is False
    assert list(evaluate(net, (x, y), THREAT, ["pgd-10"]).robust_accuracy) == ["pgd-10"]
