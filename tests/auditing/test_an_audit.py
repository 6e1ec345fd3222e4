"""What an audit says, takes and refuses, whatever its verdict."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from constructed import MASKS, PLAIN, Gated, Layer, subject
from torch import nn

import surestep
from surestep import attacks
from surestep.auditing import (
    CHECKS,
    Check,
    _audit,
    _estimate,
    _subject,
    audit,
    binarization,
    budgets,
    estimate,
)
from surestep.errors import UserError
from surestep.evaluation import substitute, suite
from surestep.evaluation.judge import Judge
from surestep.evaluation.suite import Attack, AttackResult
from surestep.posthoc.mean_sparse import MeanSparse


def test_what_an_audit_says(plain):
    found, values = plain, plain.to_dict()
    assert json.loads(json.dumps(values)) == values
    assert [c["number"] for c in values["checks"]] == [check.number for check in CHECKS]
    assert values["n"] == 60
    assert set(values["claims"]) == {"fgsm", "pgd-10"}
    assert found.found_accuracy == min(found.attacks.values())
    late = {step["name"] for step in found.escalation}
    on_all = {k: v for k, v in found.attacks.items() if k not in late}
    assert found.attacks[found.found_by] == min(on_all.values())
    low, high = found.found_interval
    assert low <= found.found_accuracy <= high


def test_the_same_twice_and_nothing_is_touched(plain, run, net):
    net.train()
    state = torch.get_rng_state()
    second = run(net).to_dict()
    assert torch.equal(state, torch.get_rng_state())
    assert net.training
    assert all(p.grad is None for p in net.parameters())
    for values in (one := plain.to_dict(), second):
        values.pop("seconds")
    assert one == second


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
    claims = {"fgsm": 0.1, "pgd-10": 0.1}
    found = _audit._conclude(s, [], claims, [], "quick", 1.0)
    assert found.attacks == pytest.approx({"few": 5 / 6, "many": 1 / 3, "late": 1 / 12})
    assert found.found_by == "many"
    s.broke = {name: rows & False for name, rows in s.broke.items()}
    assert _audit._conclude(s, [], claims, [], "quick", 1.0).found_by == ""


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
    by_gradient = {"pgd-5", "bpda"}
    s.ran = {name: Attack(attacks.pgd, uses_gradient=name in by_gradient) for name in s.broke}
    s.ran["autoattack"] = suite.parse("autoattack", s.threat)
    assert s.only_without_gradients.nonzero().squeeze(1).tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert not s.white_box[[0, 9]].any()
    assert s.white_box[40]


def test_what_an_attack_is_counted_as_is_what_it_says_of_itself(net, images):
    """Whatever its name."""
    s = subject(net, images)
    away = Attack(lambda model, x, y: 1 - x)
    s.attack({"pgd-5": away, "noise-5": Attack(lambda model, x, y: x, uses_gradient=True)})
    assert s.broke["pgd-5"].any()
    assert torch.equal(s.only_without_gradients, s.broke["pgd-5"])
    s.ran["pgd-5"] = replace(away, uses_gradient=True)
    assert not s.only_without_gradients.any()


def test_how_a_check_counts_is_not_told():
    """The schema of an audit does not know it."""
    known = {"blind": True, "hints": True, "masks": True, "sign": "no gradient"}
    told = Check(1, "a", "A", "flagged", 1.0, "", "", "", {}, **known).to_dict()
    assert not told.keys() & known.keys()


def test_numbers_that_are_none_are_null_in_json():
    check = Check(1, "a", "A", "flagged", float("nan"), "", "", "", {"x": [1.0, float("inf")]})
    told = check.to_dict()
    assert told["value"] is None
    assert told["evidence"] == {"x": [1.0, None]}
    json.dumps(told, allow_nan=False)


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


def test_unknown_budget(net, images):
    with pytest.raises(UserError, match="unknown budget 'quik': did you mean 'quick'"):
        audit(net, images, surestep.Linf(0.1), budget="quik")


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


@pytest.mark.usefixtures("small_budget")
def test_in_another_data_range(net, images):
    x, y = images
    centred = nn.Sequential(Layer(lambda z: (z + 1) / 2), net)
    wide = surestep.Linf(0.6, bounds=(-1.0, 1.0))
    found = audit(centred, (2 * x - 1, y), wide, budget="quick")
    assert found.verdict == "not robust"
    assert found.threat["bounds"] == [-1.0, 1.0]


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
    s = subject(net, images)
    s.attack(suite.parse_all(["fgsm"], s.threat))
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


def test_the_first_attacks_of_a_budget():
    pgd = ("pgd-50", "pgd-50-margin")
    first = ("fgsm", "fgsm-margin", "pgd-10", "noise-50", *pgd, "square-200")
    assert budgets.BUDGETS["quick"].attacks == first


def test_what_an_audit_spends_whatever_its_budget(monkeypatch):
    monkeypatch.undo()  # the tests' smaller numbers
    assert substitute.STEPS == 250
    assert (binarization.INNER, binarization.RANDOM, binarization.STEPS) == (999, 200, 30)


def sparse(net):
    """Probabilities of a model whose inputs near the middle are replaced by it."""
    layer = MeanSparse(1, 0.2)
    layer.mean += 0.5
    layer.std += 0.2
    return nn.Sequential(layer, net, Layer(lambda z: z.softmax(1)))


@pytest.mark.parametrize(
    ("masked", "steps", "restarts"),
    [(MASKS["quantised"], 20, 2), (MASKS["noise"], 20, 2), (sparse, 50, 1)],
)
def test_an_audit_takes_no_longer_than_estimated(net, images, monkeypatch, masked, steps, restarts):
    """Time is counted in images that pass through the model; a gradient is three passes."""
    budget = budgets.Budget(steps, 20, 60, 6, restarts, 200, autoattack=False)
    monkeypatch.setitem(budgets.BUDGETS, "quick", budget)
    monkeypatch.setattr(substitute, "STEPS", 250)
    monkeypatch.setattr(substitute, "WIDTH", 1)
    passed = 0

    def count(_module, args):
        nonlocal passed
        passed += len(args[0]) * (3 if args[0].requires_grad else 1)

    model = masked(net).eval()  # flagged, so that the answers to flags are run
    model.register_forward_pre_hook(count)
    monkeypatch.setattr(_audit.time, "perf_counter", lambda: float(passed))
    most = estimate(model, surestep.data.as_images(images), "quick", 30)
    found = audit(model, images, surestep.Linf(0.01), budget="quick", n=30)
    assert found.escalation
    assert 0.5 * most < found.seconds <= most


@pytest.mark.parametrize(
    ("masked", "has"),
    [
        (lambda net: net, {}),
        (sparse, {"straight": True, "probabilities": True}),
        (MASKS["noise"], {"random": True}),
        (Gated, {"switches": 1}),
    ],
)
def test_an_estimate_counts_what_a_model_calls_for(net, images, monkeypatch, masked, has):
    asked = []
    monkeypatch.setattr(_estimate, "most_forwards", lambda _, **kinds: asked.append(kinds) or 0)
    estimate(masked(net), surestep.data.as_images(images), "quick", 30)
    assert asked == [{**PLAIN, **has}]


def test_a_gradient_counts_as_three_passes():
    attacks = suite.parse_all(["pgd-20", "square-20"], surestep.Linf(0.1)).values()
    assert list(map(_estimate._forwards, attacks)) == [60, 20]


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
