"""Models whose truth is known by construction get the verdict they must get."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from constructed import MASKS, UNSEEN, Layer
from torch import nn

import surestep
from surestep import attacks
from surestep.auditing import budgets
from surestep.evaluation.suite import Attack, AttackResult


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
        "surestep.evaluation.suite.transfer", lambda *_: Attack(lambda model, x, y: AttackResult(x))
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
        *((kind, 0.3) for kind in ("a tuple", "half precision")),
    ],
)
def test_honest_models(run, net, kind, eps):
    assert run(HONEST[kind](net), eps).verdict == ("robust" if eps < 0.1 else "not robust")


def test_an_honest_weak_model(plain):
    assert plain.verdict == "not robust"


def test_a_given_source_counts(plain, run, net):
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
    assert plain.checks[7].evidence["substitute agrees"] > 0.9


def test_near_chance_is_inconclusive(run, net):
    blind = nn.Linear(64, 3)
    nn.init.zeros_(blind.weight)  # one class for all
    found = run(nn.Sequential(nn.Flatten(), blind))
    assert found.verdict == "inconclusive"
    assert "near chance" in found.sentence


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
