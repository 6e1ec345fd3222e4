"""Models whose truth is known by construction get the verdict they must get."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import surestep
from surestep import attacks
from surestep.auditing import (
    CHECKS,
    Check,
    _audit,
    _subject,
    audit,
    binarization,
    budgets,
    estimate,
    stand_ins,
)
from surestep.auditing.escalation import escalate
from surestep.auditing.verdict import AuditNumbers, judge
from surestep.errors import UserError
from surestep.evaluation import substitute, wilson_interval
from surestep.evaluation.judge import Judge
from surestep.evaluation.suite import Attack, AttackResult


class Layer(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def quantise(x):
    return (x * 7).round() / 7


def thermometer(x):
    return (x > torch.arange(0.05, 1, 0.1).view(1, -1, 1, 1)).float()


MASKS = {
    "quantised": lambda net: nn.Sequential(Layer(quantise), net),
    "detached": lambda net: nn.Sequential(Layer(torch.Tensor.detach), net),
    "no gradient at all": lambda net: Layer(lambda x: net(x.detach()).detach()),
    "probabilities": lambda net: nn.Sequential(net, Layer(lambda z: (8 * z).softmax(1))),
    "logits x 1e4": lambda net: nn.Sequential(net, Layer(lambda z: 1e4 * z)),
    "noise": lambda net: nn.Sequential(Layer(lambda x: x + 0.1 * torch.randn_like(x)), net),
    "thermometer": lambda net: nn.Sequential(
        Layer(thermometer), Layer(lambda x: x.mean(1, keepdim=True)), net
    ),
    "nan gradients": lambda net: nn.Sequential(Layer(lambda x: x + 0 * (x - x).sqrt()), net),
}

UNSEEN = {"quantised", "detached", "no gradient at all", "thermometer", "nan gradients"}
"""What gradient attacks cannot see at all: these masks make a weak model look robust."""


@pytest.mark.parametrize("mask", MASKS)
def test_hidden_or_not_a_weak_model_is_not_called_robust(run, net, mask):
    found = run(MASKS[mask](net))
    assert found.clean_accuracy > 0.9
    assert found.found_accuracy < 0.1
    assert found.verdict == ("pseudo-robust" if mask in UNSEEN else "not robust")
    if mask in UNSEEN:
        assert found.claims["pgd-10"] > 0.8
        assert {"vanishing-gradients", "broken-gradients"} & {c.name for c in found.flagged}


@pytest.mark.parametrize("mask", ["quantised", "detached", "thermometer"])
def test_bpda_is_run_where_a_layer_is_flat(run, net, mask, monkeypatch):
    """What needs no gradient may break only one of three classes first."""
    monkeypatch.setattr(
        "surestep.auditing._audit.transfer", lambda *_: Attack(lambda model, x, y: AttackResult(x))
    )

    def square(_, x, y, threat, **__):
        return torch.where((y == 0).view(-1, 1, 1, 1), attacks.fgsm(net, x, y, threat), x)

    monkeypatch.setattr("surestep.attacks.auto.square", square)
    found = run(MASKS[mask](net))
    (step,) = [s for s in found.escalation if s["name"] == "bpda"]
    assert step["why"] == "no gradient, or a wrong one, flows through 0: straight through it"
    assert step["accuracy"] < 0.1
    assert found.verdict == "pseudo-robust"
    # The reason why it ran stays, though it has since broken what Square had.
    check = found.checks[7]
    assert (check.status, check.evidence["broken only by it"]["square-60"]) == ("flagged", 20)


class Striped(nn.Module):
    """Falls only where stripes, a pixel high, are added: no other attack here finds them.

    Args:
        made_up: pass back the gradient of another function. Else the gradient is right, and flat
            in the stripes until most of them are there.
        weak: share of the images, by their first pixel, that fall at all.
    """

    def __init__(self, made_up, weak=1.0):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("code", torch.randn(3, 3, 8, generator=generator).sign())
        self.register_buffer("other", torch.randn(64, 3, generator=generator))
        self.stripes = torch.tensor([1.0, -1.0]).repeat(2)[:, None].expand(4, 8)
        self.made_up = made_up
        self.y = torch.arange(60) % 3
        self.x = torch.full((60, 1, 8, 8), 0.5)
        self.x += 0.002 * torch.randn(self.x.shape, generator=generator)
        self.x[:, 0, 1:4] = 0.5 + 0.3 * self.code[self.y]
        self.x[:, 0, 0, 0] = torch.where(torch.arange(60) < weak * 60, 0.9, 0.1)

    def forward(self, x):
        z = 10 * torch.einsum("nrc,krc->nk", x[:, 0, 1:4] - 0.5, self.code) / 24
        share = ((x[:, 0, 4:] - 0.5) * self.stripes).mean((1, 2)) / 0.05
        fall = 50 * (share - 0.7).clamp(min=0) * (x[:, 0, 0, 0].detach() > 0.5)
        z = z - fall[:, None] * nn.functional.one_hot(z.argmax(1), 3)
        other = x.flatten(1) @ self.other
        return z.detach() + other - other.detach() if self.made_up else z

    def broken(self, x):
        """Return images with the stripes."""
        point = x.clone()
        point[:, 0, 4:] = 0.5 + 0.049 * self.stripes
        return point


def test_a_made_up_gradient_leaves_nothing_decided(run, monkeypatch):
    """Every attack fails on a model that has no robustness at all."""
    model = Striped(made_up=True)
    assert (model(model.x).argmax(1) == model.y).all()
    assert (model(model.broken(model.x)).argmax(1) != model.y).all()
    found = run(model, 0.05, data=(model.x, model.y))
    assert found.found_accuracy > 0.9
    assert found.verdict == "inconclusive"
    assert "broken gradients" in found.sentence


def trap(model, needed):
    """Return an attack of Square's signature that finds the stripes, given that many queries."""

    def attack(_, x, y, threat, queries=needed):
        return model.broken(x) if queries >= needed else x

    return attack


@pytest.mark.parametrize("late", ["square-200", "autoattack"])
def test_what_falls_to_square_alone_counts_whenever_it_falls(run, monkeypatch, late):
    """After the checks, too: gradients, though right, do not see the stripes."""
    model = Striped(made_up=False, weak=0.4)
    parts = {"apgd-ce": lambda _, x, y, threat: x, "square": trap(model, 0)}
    monkeypatch.setattr("surestep.attacks.auto.PARTS", parts)
    if late == "square-200":
        monkeypatch.setattr("surestep.attacks.auto.square", trap(model, 200))
    small = budgets.BUDGETS["quick"]
    monkeypatch.setitem(budgets.BUDGETS, "quick", replace(small, autoattack=late == "autoattack"))
    # Probabilities are flagged, which calls for more queries.
    probable = nn.Sequential(model, nn.Softmax(1))
    found = run(probable, 0.05, data=(model.x, model.y))
    assert found.found_accuracy == pytest.approx(0.6)
    assert found.attacks["pgd-20"] == found.attacks["square-60"] == 1
    assert found.attacks[late] == pytest.approx(0.6)
    assert found.verdict == "inconclusive"
    assert "fall only to gradient-free attacks" in found.sentence
    if late == "square-200":
        check = found.checks[7]
        assert (check.status, check.evidence["broken only by it"][late]) == ("flagged", 24)
    else:
        gap = found.checks[19].evidence["pgd over all with autoattack"]
        assert gap == pytest.approx(0.4)


def test_the_union_of_what_gradients_do_not_break(net, images):
    """Two attacks that break different images count together; AutoAttack's Square beside them."""
    s = subject(net, images)
    rows = torch.arange(60)
    s.right["clean"] = rows < 50
    s.broke = {
        "square-20": rows < 5,
        "noise-20": (rows >= 3) & (rows < 8),
        "transfer": (rows >= 8) & (rows < 10),
        "pgd-5": rows == 0,
        "bpda": rows == 9,
        "autoattack": rows == 40,
    }
    assert s.only_without_gradients.nonzero().squeeze(1).tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


def test_bpda_explains_what_only_square_had_broken(net, images):
    """It also tries images that Square broke, but what is left counts without them."""
    s = subject(nn.Sequential(Layer(quantise), net), images)
    first = torch.arange(60) < 30
    s.right = {"clean": torch.ones(60, dtype=torch.bool), "square-20": ~first}
    s.broke = {"square-20": first}
    steps = escalate(s, [flagged("vanishing-gradients"), flagged("broken-gradients")])
    assert steps[0]["name"] == "bpda"
    assert int((s.broke["bpda"] & first).sum()) > 25
    assert not (s.right["bpda"] & first).any()
    assert int(s.only_without_gradients.sum()) < 5


def test_of_a_random_model_each_attack_tells_by_itself(net, images):
    """Gradient attacks try all images, also those that are broken; the others have none left."""
    s = subject(nn.Sequential(net, Layer(lambda z: z + 0.1 * torch.randn_like(z))), images)
    all_of_them = torch.ones(60, dtype=torch.bool)
    s.right = {"clean": all_of_them, "pgd-5": ~all_of_them}
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


HONEST = {
    "plain": lambda net: net,
    "logits x 10": lambda net: nn.Sequential(net, Layer(lambda z: 10 * z)),
    "logits x .1": lambda net: nn.Sequential(net, Layer(lambda z: 0.1 * z)),
    "dropout": lambda net: nn.Sequential(nn.Dropout(0.5), net, nn.Dropout(0.5)).eval(),
    "normalised inside": lambda net: nn.Sequential(
        surestep.models.Normalize([0.5], [0.5]), Layer(lambda z: z * 0.5 + 0.5), net
    ),
    "a tuple": lambda net: Layer(lambda x: (net(x), x)),
    "half precision": lambda net: net.bfloat16(),
}


@pytest.mark.parametrize(
    ("kind", "eps"),
    [
        *((kind, 0.05) for kind in HONEST),
        *((kind, 0.3) for kind in ("plain", "a tuple", "half precision")),
    ],
)
def test_honest_models(run, net, kind, eps):
    assert run(HONEST[kind](net), eps).verdict == ("robust" if eps < 0.1 else "not robust")


def test_what_an_audit_says(run, net):
    found = run(net, 0.3)
    values = found.to_dict()
    assert json.loads(json.dumps(values)) == values
    assert [c["number"] for c in values["checks"]] == list(range(1, 21))
    assert values["n"] == 60
    assert set(values["claims"]) == {"fgsm", "pgd-10"}
    assert found.found_accuracy == min(found.attacks.values())
    late = {step["name"] for step in found.escalation}
    on_all = {k: v for k, v in found.attacks.items() if k not in late}
    assert found.attacks[found.found_by] == min(on_all.values())
    low, high = found.found_interval
    assert low <= found.found_accuracy <= high


def test_the_same_twice_and_nothing_is_touched(run, net):
    net.train()
    state = torch.get_rng_state()
    first = run(net)
    assert torch.equal(state, torch.get_rng_state())
    assert net.training
    assert all(p.grad is None for p in net.parameters())
    second = run(net).to_dict()
    for values in (one := first.to_dict(), second):
        values.pop("seconds")
    assert one == second


def test_a_given_source_counts(run, net):
    """A model that only a source's points break (its own substitute is useless) is broken."""
    hidden = Layer(lambda x: net(x.detach()).detach())
    with pytest.MonkeyPatch.context() as patch:
        useless = nn.Sequential(nn.Flatten(), Layer(lambda x: 0 * x[:, :3]))
        patch.setattr("surestep.auditing._audit.substitute", lambda *_: useless)
        without = run(hidden)
        found = run(hidden, sources=[net])
    assert found.attacks["transfer"] < 0.1 < without.attacks["transfer"]
    check = found.checks[7]
    assert check.evidence["substitute agrees"] == pytest.approx(1 / 3, abs=0.05)
    assert "the substitute answers as the model on 3" in check.sentence
    assert run(net).checks[7].evidence["substitute agrees"] > 0.9


def test_near_chance_is_inconclusive(run, net):
    blind = nn.Linear(64, 3)
    nn.init.zeros_(blind.weight)  # one class for all
    found = run(nn.Sequential(nn.Flatten(), blind))
    assert found.verdict == "inconclusive"
    assert "near chance" in found.sentence


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Layer(lambda x: x.flatten(1)[:, :2]), "model has 2 classes"),
        (Layer(lambda x: 1 / 0), "the model fails"),
        (Layer(lambda x: "hello"), "returned a str"),
    ],
)
def test_what_cannot_be_judged(run, model, said):
    with pytest.raises(UserError, match=said) as caught:
        run(model)
    assert "\n" not in str(caught.value)


def test_a_radius_of_zero_says_nothing(run, net):
    with pytest.raises(UserError, match="eps 0: no image may change"):
        run(net, eps=0.0)


@pytest.fixture
def little_else(monkeypatch):
    """Still less of what costs time: how good the substitute and binarization are says nothing."""
    monkeypatch.setattr("surestep.evaluation.substitute.STEPS", 20)
    monkeypatch.setattr("surestep.auditing.binarization.INNER", 30)


@pytest.mark.usefixtures("little_else")
@pytest.mark.parametrize("mask", ["quantised", "noise"])
def test_no_pass_has_more_images_than_asked_for(run, net, images, mask, monkeypatch):
    """But for the network that points are made on, which is trained on 64 at a time."""
    seen = []
    model = MASKS[mask](net)
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    monkeypatch.setattr("surestep.evaluation.substitute.BATCH", 7)
    found = run(model, data=tuple(part[:20] for part in images), batch_size=7)
    assert max(seen) == 7
    assert found.n == 20


@pytest.mark.usefixtures("small_budget")
def test_in_another_data_range(net, images):
    x, y = images
    centred = nn.Sequential(Layer(lambda z: (z + 1) / 2), net)
    wide = surestep.Linf(0.6, bounds=(-1.0, 1.0))
    found = audit(centred, (2 * x - 1, y), wide, budget="quick")
    assert found.verdict == "not robust"
    assert found.threat["bounds"] == [-1.0, 1.0]


def test_a_later_attack_has_a_name_of_its_own():
    """Of the same name it would draw the same numbers, and take the first one's place."""
    for budget in budgets.BUDGETS.values():
        assert budget.queries != budget.late_queries


def test_unknown_budget(net, images):
    with pytest.raises(UserError, match="unknown budget 'quik': did you mean 'quick'"):
        audit(net, images, surestep.Linf(0.1), budget="quik")


def test_nan_for_some_inputs_is_flagged(run, net, images):
    x, _ = images

    def spoil(z):
        out = net(z).clone()
        out[(z.detach() - x[3]).abs().amax((1, 2, 3)) < 1e-6] = float("nan")
        return out

    found = run(Layer(spoil), 0.05)
    (check,) = [c for c in found.checks if c.name == "broken-gradients"]
    assert check.status == "flagged"
    assert found.clean_accuracy <= 59 / 60


def test_one_image_with_a_broken_gradient_decides_nothing(run, net, images):
    x, _ = images

    def spoil(z):
        known = (z.detach() - x[3]).abs().amax((1, 2, 3)) < 1e-6
        out, some = net(z).clone(), z[known]
        out[known] = net(some + 0 * (some - some).sqrt())
        return out

    found = run(Layer(spoil), 0.05)
    (check,) = [c for c in found.checks if c.name == "broken-gradients"]
    assert check.status == "flagged"
    assert 0 < check.value < 0.1
    assert found.verdict == "robust"


def test_one_class_too_many(run, net):
    wide = nn.Sequential(net, Layer(lambda z: nn.functional.pad(z, (0, 1), value=-5.0)))
    assert run(wide, 0.05).verdict == "robust"


def flagged(name, value=1.0, **evidence):
    return Check(1, name, name, "flagged", value, "", "", "", evidence)


COLLAPSE = [flagged("collapse")]


def said_of(
    found,
    n=1000,
    *,
    claims=(0.94, 0.91),
    clean=0.98,
    chance=0.1,
    checks=(),
    blind=0.0,
    missed=0,
    alone=None,
    budget="quick",
):
    """Return verdict and sentence where ``found`` of n images withstand everything."""
    interval = wilson_interval(round(found * n), n)
    named = dict(zip(("fgsm", "pgd-10"), claims, strict=True))
    numbers = AuditNumbers(clean, named, found, interval, chance, blind, missed, n, alone)
    return judge(numbers, list(checks), budget)


@pytest.mark.parametrize(
    ("fgsm", "pgd", "found", "verdict"),
    [
        (0.98, 0.00, 0.00, "pseudo-robust"),
        (0.98, 0.90, 0.10, "pseudo-robust"),
        (0.94, 0.91, 0.86, "robust"),
        (0.94, 0.80, 0.60, "robust"),
        (0.30, 0.00, 0.00, "not robust"),
        (0.10, 0.60, 0.05, "pseudo-robust"),
        (0.50, 0.40, 0.31, "robust"),
        (0.30, 0.25, 0.245, "inconclusive"),
        # 20% under PGD-10 is near chance, which is no claim.
        (0.30, 0.20, 0.02, "not robust"),
    ],
)
def test_the_rule(fgsm, pgd, found, verdict):
    said, sentence = said_of(found, claims=(fgsm, pgd), checks=COLLAPSE)
    assert said == verdict
    assert f"{found:.1%}" in sentence


def test_where_one_class_is_most_of_the_images_the_floor_is_explained():
    claims = {"claims": (0.75, 0.75), "clean": 1.0, "chance": 0.9}
    assert said_of(0.75, **claims)[0] == "not robust"
    said = "withstand all attacks, fewer than an answer that never changes gets right (90.0%), "
    assert said in said_of(0.75, **claims)[1]
    assert "never changes" not in said_of(0.05, chance=0.1)[1]


@pytest.mark.parametrize(
    ("found", "n", "verdict", "words"),
    [
        # Half of the claim is 0.47.
        (0.48, 50, "robust", ""),
        (0.44, 50, "inconclusive", "about half of what the model claims"),
        (0.44, 5000, "pseudo-robust", ""),
        (0.20, 50, "pseudo-robust", ""),
    ],
)
def test_half_of_the_claim_on_few_images(found, n, verdict, words):
    """Two images fewer must not turn an honest model into a masked one."""
    said, sentence = said_of(found, n, checks=COLLAPSE)
    assert said == verdict
    assert words in sentence


@pytest.mark.parametrize(
    ("clean", "chance", "found", "verdict"),
    [
        # Floors of 0.151, 0.076, 0.02, 0.56: what is left counts by what the model knows.
        (0.44, 0.1, 0.24, "robust"),
        (0.44, 0.1, 0.15, "inconclusive"),
        (0.44, 0.1, 0.11, "not robust"),
        (0.48, 0.005, 0.16, "robust"),
        (0.10, 0.005, 0.06, "robust"),
        (0.48, 0.005, 0.05, "not robust"),
        (0.90, 0.5, 0.70, "robust"),
        (0.90, 0.5, 0.50, "not robust"),
        # Itself near chance: twice, or 0.575.
        (0.20, 0.1, 0.20, "inconclusive"),
        (0.01, 0.005, 0.01, "inconclusive"),
        (0.57, 0.5, 0.57, "inconclusive"),
        (0.58, 0.5, 0.57, "robust"),
    ],
)
def test_the_floor_follows_what_the_model_knows(clean, chance, found, verdict):
    said, sentence = said_of(found, clean=clean, chance=chance, claims=(found, found))
    assert said == verdict
    assert ("near chance" in sentence) is (clean <= 2 * chance and clean < 0.575)


@pytest.mark.parametrize(
    ("found", "n", "verdict"),
    # The floor is 0.232.
    [(0.225, 40, "inconclusive"), (0.225, 40_000, "not robust"), (0.0, 25, "not robust"),
     (0.30, 40, "inconclusive"), (0.30, 40_000, "robust")],
)  # fmt: skip
def test_the_floor_on_few_images(found, n, verdict):
    said, sentence = said_of(found, n, claims=(0.4, 0.3))
    assert said == verdict
    assert ("--n" in sentence) == (verdict == "inconclusive")


def test_a_claim_that_fails_where_no_check_flags_is_not_called_masked():
    """Attacked far beyond the radius that it was trained for, say."""
    assert said_of(0.02, claims=(0.6, 0.5))[0] == "not robust"
    assert said_of(0.02, claims=(0.6, 0.5), checks=COLLAPSE)[0] == "pseudo-robust"


@pytest.mark.parametrize(
    ("checks", "found", "verdict"),
    [
        # Flags that sound models have, too, on an image or two: weak, but nothing hides.
        ([flagged("vanishing-gradients", 0.01)], 0.1, "no"),
        ([flagged("random-beats-gradient", 0.001)], 0.1, "no"),
        ([flagged("convergence", 0.02), flagged("gap-profile", 0.04)], 0.1, "no"),
        # An attack that solves 85% of all problems solves no more than 15 of 20 now and then.
        ([flagged("binarization", 0.75, pgd=0.75, random=0.05, posed=20)], 0.1, "no"),
        # Where much is left the gap is the sign.
        ([flagged("convergence", 0.02)], 0.4, "pseudo"),
        ([flagged("losses-agree", 0.3)], 0.1, "pseudo"),
        ([flagged("gap-profile", 0.3, **{"pgd over all with autoattack": 0.3})], 0.1, "pseudo"),
        ([flagged("random-beats-gradient", 0.01)], 0.1, "pseudo"),
        ([flagged("broken-gradients", contradicted=True)], 0.1, "pseudo"),
    ],
)
def test_only_a_sign_of_masking_makes_a_failed_claim_a_pretence(checks, found, verdict):
    said, _ = said_of(found, claims=(0.4, 0.9), checks=checks)
    assert said == {"no": "not robust", "pseudo": "pseudo-robust"}[verdict]


HARMLESS = {"pgd": 0.75, "random": 0.05, "posed": 20, "accuracy": [0.9, 0.0], "n": 100}
"""Evidence of the checks that are judged by it."""


def test_flags_that_count_by_themselves():
    """Which explain a failed claim, and which give weight to what an unbounded attack leaves."""

    def given(verdict, found, *more, **rest):
        return {
            check.name
            for check in CHECKS
            if said_of(found, checks=[flagged(check.name, 0.001, **HARMLESS), *more], **rest)[0]
            == verdict
        }

    assert given("pseudo-robust", 0.1, claims=(0.4, 0.9)) == {
        "deterministic-forward",
        "logits-not-probabilities",
        "optimisation-in-forward",
        "collapse",
        "losses-agree",
        "abnormal-examples",
        "distorted-boundary",
    }
    assert given("inconclusive", 0.86, unbounded(8)) == {
        "vanishing-gradients",
        "broken-gradients",
        "abnormal-examples",
        "binarization",
    }


def test_the_claim_that_is_quoted_is_the_one_that_counts():
    """44% under FGSM is less than half of 90% and no defence, so that PGD-10's 30% is at stake."""
    verdict, sentence = said_of(0.05, claims=(0.44, 0.30), clean=0.9, checks=COLLAPSE)
    assert verdict == "pseudo-robust"
    assert "30.0% under PGD-10" in sentence


def solved(pgd, random, posed=20):
    return flagged("binarization", pgd, pgd=pgd, random=random, posed=posed)


def unbounded(left):
    return flagged("eps-sweep", left / 100, accuracy=[0.9, left / 100], n=100)


@pytest.mark.parametrize(
    ("missed", "verdict"),
    [(0, "robust"), (25, "robust"), (40, "inconclusive")],  # perhaps 2% of a thousand, and surely
)
def test_images_that_only_gradient_free_attacks_break(missed, verdict):
    """Whether a check flagged or not: some were broken after the checks."""
    said, text = said_of(0.86, missed=missed)
    assert said == verdict
    assert ("fall only to gradient-free attacks" in text) is (verdict == "inconclusive")


@pytest.mark.parametrize(
    ("checks", "blind", "verdict"),
    [
        ([], 0.0, "robust"),
        ([], 0.1, "robust"),
        ([], 0.2, "inconclusive"),
        ([flagged("broken-gradients", detached=True)], 0.0, "inconclusive"),
        # NaN on some images: how many counts, as where the gradient is zero.
        ([flagged("broken-gradients", 0.01, detached=False)], 0.01, "robust"),
        ([flagged("broken-gradients", 0.2, detached=False)], 0.2, "inconclusive"),
        ([flagged("random-beats-gradient")], 0.0, "inconclusive"),
        ([flagged("random-beats-gradient", 0.002)], 0.0, "robust"),
        ([flagged("random-beats-gradient", 0.003)], 0.0, "inconclusive"),
        ([flagged("one-step-beats-many", 0.006)], 0.0, "inconclusive"),
        ([flagged("vanishing-gradients"), flagged("convergence")], 0.0, "robust"),
        # A gradient of another function.
        ([flagged("broken-gradients", contradicted=True)], 0.0, "inconclusive"),
        # PGD surely solves too few problems, and no more than random points do.
        ([solved(0.0, 0.05)], 0.0, "inconclusive"),
        ([solved(0.15, 0.15)], 0.0, "inconclusive"),
        ([solved(0.3, 0.05)], 0.0, "robust"),
        ([solved(0.75, 0.75)], 0.0, "robust"),
        ([solved(0.0, 0.0, posed=3)], 0.0, "robust"),
        # Surely more than 2% of 100 withstand an attack without bounds, and gradients are suspect.
        ([unbounded(10), flagged("abnormal-examples")], 0.0, "inconclusive"),
        ([unbounded(8), flagged("abnormal-examples")], 0.0, "inconclusive"),
        ([unbounded(8)], 0.0, "robust"),
        # Surely more than 5% need no second sign.
        ([unbounded(10)], 0.0, "inconclusive"),
        ([unbounded(3), flagged("abnormal-examples")], 0.0, "robust"),
    ],
)
def test_what_gradients_cannot_judge_is_not_called_robust(checks, blind, verdict):
    for budget, advice in (("quick", "--budget standard"), ("thorough", "an attack written for")):
        said, text = said_of(0.86, checks=checks, blind=blind, budget=budget)
        assert said == verdict
        assert (advice in text) is (verdict == "inconclusive")


@pytest.mark.parametrize(
    ("found", "alone", "verdict"),
    [
        # Half of the claim is 0.47, the floor 0.232.
        (0.40, 0.80, "inconclusive"),
        (0.40, 0.45, "pseudo-robust"),
        (0.40, None, "pseudo-robust"),
        (0.86, 0.90, "robust"),
    ],
)
def test_a_random_model_is_not_called_masked_for_the_number_of_attacks(found, alone, verdict):
    said, text = said_of(found, alone=alone, checks=[flagged("deterministic-forward")])
    assert said == verdict
    assert ("Audit the mean of many passes" in text) is (verdict == "inconclusive")


@pytest.mark.parametrize(
    ("alone", "verdict"), [(0.30, "inconclusive"), (0.20, "not robust"), (None, "not robust")]
)
def test_nor_undefended(alone, verdict):
    assert said_of(0.1, alone=alone, claims=(0.2, 0.2))[0] == verdict


def test_found_by_is_the_attack_that_broke_the_most(images):
    """Not the first that came to the end of what another had begun."""
    x, y = images
    right = nn.functional.one_hot(y, 3).float()

    def forward(z):  # right on an image, wrong on one that was moved
        apart, which = (z[:, None] - x).abs().flatten(2).amax(2).min(1)
        said = torch.where((apart > 1e-3)[:, None], right[which].roll(1, 1), right[which])
        return said + 0 * z.sum()

    def moving(rows):
        chosen = torch.zeros(len(x), 1, 1, 1)
        chosen[rows] = 0.01
        return Attack(lambda model, x, y: AttackResult(x + chosen[: len(x)]))

    budget = budgets.Budget(5, 5, 20, 30, 1, 30, autoattack=False)
    s = _subject.Subject(Layer(forward), x, y, surestep.Linf(0.3), budget, 0, 60, lambda _: None)
    s.attack({"few": moving(slice(40, 50)), "many": moving(slice(0, 40))})
    assert {name: int(rows.sum()) for name, rows in s.broke.items()} == {"few": 10, "many": 40}
    s.attack({"late": moving(slice(0, 5))}, s.survivors)  # of the ten that are left
    s.attack({"none": moving(slice(0, 0))}, torch.zeros(60, dtype=torch.bool))
    claims = {"fgsm": 0.1, "pgd-10": 0.1}
    found = _audit._conclude(s, [], claims, [], 0.0, "quick", 1.0)
    assert found.attacks == pytest.approx({"few": 5 / 6, "many": 1 / 3, "late": 1 / 12, "none": 0})
    assert found.found_by == "many"
    s.broke = {name: rows & False for name, rows in s.broke.items()}
    assert _audit._conclude(s, [], claims, [], 0.0, "quick", 1.0).found_by == ""


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
    monkeypatch.setattr("surestep.attacks.auto.PARTS", {"all": spy})
    found = audit(net, images, surestep.Linf(0.12), budget="standard")
    assert found.escalation[-1]["name"] == "autoattack"
    left = round(60 * found.found_accuracy)
    assert 0 < left < 60
    assert seen == [left]


@pytest.mark.usefixtures("small_budget")
def test_declared_preprocessing_is_normalisation_inside(net, images):
    norm = surestep.models.Normalize([0.3], [0.2])
    x, y = images
    given = (x * 0.2 + 0.3, y)
    inside = nn.Sequential(norm, net)
    threat = surestep.Linf(0.02)
    outside, whole = (
        audit(model, given, threat, budget="quick", preprocess=declared)
        for model, declared in ((net, norm), (inside, None))
    )
    assert outside.clean_accuracy > 0.9
    assert (outside.verdict, outside.attacks) == (whole.verdict, whole.attacks)


def test_numbers_that_are_none_are_null_in_json():
    check = Check(1, "a", "A", "flagged", float("nan"), "", "", "", {"x": [1.0, float("inf")]})
    told = check.to_dict()
    assert told["value"] is None
    assert told["evidence"] == {"x": [1.0, None]}
    json.dumps(told, allow_nan=False)


def subject(model, images, *, fast=True):
    x, y = images
    budget = budgets.Budget(5, 5, 20, 30, 1, 30, autoattack=False, fast=fast)
    return _subject.Subject(model, x, y, surestep.Linf(0.3), budget, 0, 25, lambda _: None)


def test_a_quick_audit_crafts_in_bf16_where_the_model_agrees(net, images, monkeypatch):
    monkeypatch.setattr(_subject, "has_bf16", lambda _: True)
    assert subject(net, images).precision == torch.bfloat16
    assert subject(net, images, fast=False).precision == torch.float32
    random = nn.Sequential(Layer(lambda x: x + 0.5 * torch.randn_like(x)), net)
    assert subject(random, images).precision == torch.float32
    cracked = nn.Sequential(net, Layer(lambda z: torch.sin(1000 * z)))
    assert subject(cracked, images).precision == torch.float32
    monkeypatch.setattr(_subject, "has_bf16", lambda _: False)
    assert subject(net, images).precision == torch.float32


def test_the_precision_reaches_the_attacks(net, images, monkeypatch):
    used = []
    original = _subject.evaluate

    def spy(*args, **kwargs):
        used.append(kwargs["precision"])
        return original(*args, **kwargs)

    monkeypatch.setattr(_subject, "has_bf16", lambda _: True)
    monkeypatch.setattr(_subject, "evaluate", spy)
    subject(net, images).attack(["fgsm"])
    assert used == [torch.bfloat16]


def test_the_documents_table_of_budgets():
    text = (Path(__file__).parents[2] / "docs" / "audit.md").read_text("utf-8")
    for name, budget in budgets.BUDGETS.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        numbers = [int(n.replace(",", "")) for n in re.findall(r"\d[\d,]*\d|\d", row)]
        queries = [budget.queries, budget.late_queries]
        assert numbers == [budget.steps, budget.noise, *queries, budget.probe, budget.restarts]
        assert ("AutoAttack" in row) is budget.autoattack
        assert budget.fast is (name == "quick")


def test_what_an_audit_spends_whatever_its_budget(monkeypatch):
    monkeypatch.undo()  # the tests' smaller numbers
    assert substitute.STEPS == 250
    assert (binarization.INNER, binarization.RANDOM, binarization.STEPS) == (999, 200, 30)


@pytest.mark.parametrize("mask", ["quantised", "noise"])
def test_an_audit_takes_no_longer_than_estimated(net, images, monkeypatch, mask):
    """Time is counted in images that pass through the model; a gradient is three passes."""
    budget = budgets.Budget(20, 20, 60, 6, 2, 200, autoattack=False)
    monkeypatch.setitem(budgets.BUDGETS, "quick", budget)
    monkeypatch.setattr(substitute, "STEPS", 250)
    monkeypatch.setattr(substitute, "WIDTH", 1)
    passed = 0

    def count(_module, args):
        nonlocal passed
        passed += len(args[0]) * (3 if args[0].requires_grad else 1)

    model = MASKS[mask](net).eval()  # flagged, so that the answers to flags are run
    model.register_forward_pre_hook(count)
    monkeypatch.setattr(_audit.time, "perf_counter", lambda: float(passed))
    most = estimate(model, surestep.data.as_images(images), "quick", 30)
    found = audit(model, images, surestep.Linf(0.01), budget="quick", n=30)
    assert found.escalation
    assert 0.5 * most < found.seconds <= most


@pytest.mark.usefixtures("little_else")
def test_a_stopped_audit_goes_on_and_finds_the_same(run, net, tmp_path, monkeypatch):
    """It ends with attacks of its own on what is left, as inputs are quantised."""
    attack, done, stops = Judge._attack, [], [9, 20]

    def counting(self, name, *rest):
        if stops and len(done) == stops[0]:
            stops.pop(0)
            raise KeyboardInterrupt
        if name != "pgd-50":  # of the sweep of eps, a check: those are made anew
            done.append(name)
        return attack(self, name, *rest)

    monkeypatch.setattr(Judge, "_attack", counting)
    options = {"eps": 0.15, "batch_size": 25, "state": tmp_path / "deep" / "audit"}
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(MASKS["quantised"](net), **options)
    found = run(MASKS["quantised"](net), **options).to_dict()
    resumed = list(done)
    done.clear()
    whole = run(MASKS["quantised"](net), **{**options, "state": None}).to_dict()
    assert {**found, "seconds": 0} == {**whole, "seconds": 0}
    assert {"transfer", "bpda", "fgsm"} < set(done)
    assert sorted(resumed) == sorted(done)  # nothing twice


def test_a_state_of_another_audit_is_refused(run, net, tmp_path):
    run(net, 0.05, state=tmp_path / "audit")
    with pytest.raises(UserError, match=r"audit\.fgsm is the state of .* other threat"):
        run(net, 0.06, state=tmp_path / "audit")


def test_layers_with_a_way_through_are_attacked_through_it(run, net, monkeypatch):
    """MeanSparse, say: dead in places, where the check for dead layers sees nothing.

    Nothing that needs no gradient may break the model first.
    """
    monkeypatch.setattr(
        "surestep.auditing._audit.transfer", lambda *_: Attack(lambda model, x, y: AttackResult(x))
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
    assert not any("bpda" in step["name"] for step in run(net).escalation)


def test_a_model_hardly_better_than_guessing_is_not_judged():
    """Right on 20% of clean images where chance is 10%."""
    assert said_of(0.1, claims=(0.1, 0.1), clean=0.2)[0] == "inconclusive"
    assert said_of(0.1, claims=(0.1, 0.1), clean=0.3)[0] == "not robust"


def test_images_of_several_sizes_are_refused(net):
    class Sizes(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, k):
            return torch.rand(1, 8 + k, 8), 0

    loader = torch.utils.data.DataLoader(Sizes(), 1)
    with pytest.raises(
        UserError, match=r"\(1, 8, 8\) and \(1, 9, 8\): an audit takes images of one"
    ):
        surestep.audit(net, loader, surestep.Linf(0.1))
