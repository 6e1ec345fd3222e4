"""Which attacks the flags call for, in which order and on which images."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from constructed import MASKS, PLAIN, Gated, Layer, flagged, quantise, subject
from torch import nn

import surestep
from surestep.attacks import auto
from surestep.auditing import _subject, audit, budgets, escalation, stand_ins
from surestep.auditing.escalation import Planned, escalate
from surestep.evaluation import suite, wilson_interval
from surestep.evaluation.suite import Attack, AttackResult
from surestep.posthoc.mean_sparse import MeanSparse


def test_bpda_explains_what_only_square_had_broken(net, images):
    """It also tries images that Square broke, but what is left counts without them."""
    s = subject(nn.Sequential(Layer(quantise), net), images)
    first = torch.arange(60) < 30
    s.right = {"clean": torch.ones(60, dtype=torch.bool), "square-20": ~first}
    s.ran, s.broke = suite.parse_all(["square-20"], s.threat), {"square-20": first}
    steps = escalate(s, [flagged("vanishing-gradients"), flagged("broken-gradients")])
    assert steps[0]["name"] == "bpda"
    assert int((s.broke["bpda"] & first).sum()) > 25
    assert not (s.right["bpda"] & first).any()
    assert int(s.only_without_gradients.sum()) < 5


@pytest.mark.parametrize(
    ("uses_gradient", "has_parts", "clears"),
    [(False, False, False), (True, False, True), (True, True, False)],
)
def test_only_a_gradient_attack_clears_gradients(
    net, images, monkeypatch, uses_gradient, has_parts, clears
):
    """What another breaks is no sign that gradients see something, whatever it is called.

    Of one with parts, such as AutoAttack, a part without gradients may have broken it.
    """
    s = subject(net, images)
    first = torch.arange(60) < 30
    s.right = {"clean": torch.ones(60, dtype=torch.bool), "square-20": ~first}
    s.ran, s.broke = suite.parse_all(["square-20"], s.threat), {"square-20": first}
    seen = []

    def away(model, x, y):
        seen.append(len(x))
        return 1 - x

    run = {"part": away} if has_parts else away
    boundary = Planned("boundary", "why", Attack(run, uses_gradient=uses_gradient))
    monkeypatch.setattr(escalation, "ANSWERS", (lambda *_: (p for p in [boundary]),))
    escalate(s, [])
    assert sum(seen) == (60 if clears else 30)
    assert bool(s.only_without_gradients[first].all()) is not clears


def test_of_a_random_model_each_attack_tells_by_itself(net, images):
    """Gradient attacks try all images, also those that are broken; the others have none left."""
    s = subject(nn.Sequential(net, Layer(lambda z: z + 0.1 * torch.randn_like(z))), images)
    all_of_them = torch.ones(60, dtype=torch.bool)
    s.right = {"clean": all_of_them, "pgd-5": ~all_of_them}
    s.ran = suite.parse_all(["pgd-5"], s.threat)
    s.broke, s.tried = {"pgd-5": all_of_them}, {"pgd-5": 60}
    steps = escalate(s, [flagged("deterministic-forward")])
    assert [step["name"] for step in steps] == ["eot-10", "pgd-10-margin"]
    assert s.tried["eot-10"] > 50
    assert s.left_by_the_strongest == pytest.approx(wilson_interval(0, 60)[1])


def test_restarts_are_those_of_the_budget(net, images, monkeypatch):
    s, losses = subject(nn.Sequential(Layer(quantise), net), images), []
    s.budget = replace(s.budget, restarts=2)
    s.right["clean"] = torch.ones(60, dtype=torch.bool)
    monkeypatch.setattr(stand_ins, "pgd", lambda _, x, *__, loss, **___: losses.append(loss) or x)
    steps = escalate(s, [flagged("broken-gradients")])
    assert [step["name"] for step in steps] == ["bpda", "pgd-10x2-margin", "square-30"]
    assert losses == 3 * ["margin", "ce", "margin", "ce"]  # of three batches


@pytest.mark.parametrize(
    ("mask", "name"),
    [("noise", "eot-10"), ("probabilities", "log-probabilities")],
)
def test_what_a_flag_calls_for_is_run(run, net, mask, name, monkeypatch):
    """Also where the other attacks would do: here they leave some images."""
    monkeypatch.setattr(_subject.Subject, "survivors", property(lambda s: s.right["clean"]))
    found = run(MASKS[mask](net))
    names = [step["name"] for step in found.escalation]
    assert name in names
    assert names[-2:] == ["pgd-40-margin", "square-200"]


def test_autoattack_comes_last_and_on_what_is_left(net, images, monkeypatch):
    seen = []

    def spy(model, x, y, threat):
        seen.append(len(x))
        return x.clone()

    budget = budgets.Budget(5, 5, 20, 30, 1, 30, autoattack=True)
    monkeypatch.setitem(budgets.BUDGETS, "standard", budget)
    monkeypatch.setattr("surestep.attacks.auto.PARTS", {"all": spy, "square": spy})
    found = audit(net, images, surestep.Linf(0.12), budget="standard")
    assert found.escalation[-1]["name"] == "autoattack"
    left = round(60 * found.found_accuracy)
    assert 0 < left < 60
    assert seen == [left, left]


def test_layers_with_a_way_through_are_attacked_through_it(plain, run, net, monkeypatch):
    """MeanSparse, say: dead in places, where the check for dead layers sees nothing.

    Nothing that needs no gradient may break the model first.
    """
    monkeypatch.setattr(
        "surestep.evaluation.suite.transfer", lambda *_: Attack(lambda model, x, y: AttackResult(x))
    )
    monkeypatch.setattr("surestep.attacks.auto.square", lambda model, x, *_, **__: x)

    class Dead(nn.Module):
        straight_through = False

        def forward(self, x):
            dead = (x * 7).round() / 7
            return dead + (x - x.detach()) if self.straight_through else dead

    hidden = Dead()
    found = run(nn.Sequential(hidden, net))
    steps = {step["name"]: step for step in found.escalation}
    why = "1 layers pass no gradient in places: straight through them"
    assert steps["pgd-40-margin-bpda"]["why"] == why
    assert steps["pgd-40-margin-bpda"]["accuracy"] < 0.1
    assert hidden.straight_through is False
    assert not any("bpda" in step["name"] for step in plain.escalation)


@pytest.mark.parametrize(
    ("answer", "masked", "has"),
    [
        ("_straight_through", lambda net: nn.Sequential(MeanSparse(1, 1), net), {"straight": True}),
        ("_undo_softmax", MASKS["probabilities"], {"probabilities": True}),
        ("_expect", MASKS["noise"], {"random": True}),
        ("_bpda", MASKS["quantised"], {}),
        ("_switch", Gated, {"switches": 1}),
        ("_longer", lambda net: net, {}),
    ],
)
def test_an_answer_takes_what_it_is_counted_with(net, images, monkeypatch, answer, masked, has):
    """In images that pass through the model, where a gradient counts as three."""
    s, passed = subject(masked(net), images), 0
    s.threat, s.budget = surestep.Linf(0.001), replace(s.budget, steps=40, restarts=2)
    s.right["clean"] = s.logits(s.x).argmax(1) == s.y

    def count(_module, args):
        nonlocal passed
        passed += len(args[0]) * (escalation.GRADIENT if args[0].requires_grad else 1)

    s.model.register_forward_pre_hook(count)
    monkeypatch.setattr(escalation, "ANSWERS", (getattr(escalation, answer),))
    escalate(s, [flagged("logits-not-probabilities")])
    most = escalation.most_forwards(s.budget, **{**PLAIN, **has})
    assert 0.9 * most < passed / 60 < 1.2 * most


def test_autoattack_is_counted_with_all_its_parts():
    budget = budgets.BUDGETS["quick"]
    without, whole = (
        escalation.most_forwards(replace(budget, autoattack=given), **PLAIN)
        for given in (False, True)
    )
    parts = suite.parse_all(auto.PARTS, surestep.Linf(0.1)).values()
    assert whole - without == sum(a.passes * (1.5 if a.uses_gradient else 1) for a in parts)


def test_a_later_attack_has_a_name_of_its_own():
    """Of the same name it would draw the same numbers, and take the first one's place."""
    for budget in budgets.BUDGETS.values():
        assert budget.queries != budget.late_queries
