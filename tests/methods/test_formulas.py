"""Every method against its recipe, written again in float64 from the papers.

The oracles are in ``families/``: they loop over samples, differentiate plain cross entropy and draw
their noise from the same seed.
"""

import copy
import inspect
import math

import pytest
import torch
from families import core, joined, merged
from families.maths import EPS

from surestep import L2, Linf, UserError, methods

CASES = merged("CASES")


def test_every_method_has_an_oracle():
    assert {name.split()[0] for name in CASES} == set(methods.names())


@pytest.mark.parametrize(
    ("task", "smoothing"),
    [("mlp", 0.1), ("conv", 0.1), ("flat", 0.1), ("conv", 0.0)],
    indirect=["task"],
)
@pytest.mark.parametrize("case", CASES)
def test_step_equals_the_recipe(case, smoothing, task):
    oracle, params, renamed = CASES[case]
    parameters = {k: v for k, v in params.items() if k != "progress"}
    method = methods.get(case.split()[0])(Linf(EPS), **parameters, label_smoothing=smoothing)
    method.progress = methods.Progress(**params.get("progress", {}))
    reference = copy.deepcopy(task.net)

    torch.manual_seed(11)
    result = method(task.net, task.x, task.y, task.index)
    result.loss.backward()

    torch.manual_seed(11)
    hidden = ("fraction", "perturbation", "progress", "late_from", "smoothing")
    hidden += ("guide_every", "full_from", "least_noise", "most_noise")
    arguments = {k: v for k, v in params.items() if k not in hidden}
    views, loss, adv = oracle(reference, task.x, task.y, smoothing, **{**arguments, **renamed})
    logits = reference.train()(views)
    expected = loss(logits)
    expected.backward()

    exact = {"rtol": 0, "atol": 1e-8}
    torch.testing.assert_close(result.x_adv, views[adv], **exact)
    torch.testing.assert_close(result.logits, logits[adv].detach(), **exact)
    torch.testing.assert_close(result.loss, expected, **exact)
    for ours, theirs in zip(task.net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, **exact)
    # Batch norm has seen the update's images once, together, and nothing of the attack.
    for ours, theirs in zip(task.net.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, **exact)


def r3_between(net, x, y, smoothing):
    """The cross entropy of SAT-R3's own step, the regularizer left out."""
    views, loss, adv = core.sat_r3(net, x, y, smoothing, **{**core.R3, "lam": 0.0}, last=6)
    return views[adv], lambda z: loss(torch.cat([z, z])), slice(None)


@pytest.mark.parametrize(
    ("slug", "params", "oracle", "between"),
    [
        ("sat-r1", {"lam": 0.2, "steps": 2, "fraction": 1 / 6}, core.sat_r1, core.fgsm),
        ("sat-r1", {"lam": 0.2, "steps": 2}, core.sat_r1, core.fgsm),
        ("sat-r2", {**core.R2, "fraction": 1 / 6}, core.sat_r2, core.fgsm),
        ("sat-r2", core.R2, core.sat_r2, core.fgsm),
        ("sat-r3", {**core.R3, "fraction": 1 / 6}, core.sat_r3, r3_between),
        ("sat-r3", core.R3, core.sat_r3, r3_between),
    ],
)
def test_regularising_every_third_step(task, slug, params, oracle, between):
    """Two steps without, then one with the images and the weight of three; it survives a resume."""

    def make():
        return methods.get(slug)(Linf(EPS), **params, every=3)

    method, kept = make(), {}
    few = slug == "sat-r1" or "fraction" in params
    rest = {k: v for k, v in params.items() if k != "fraction"}
    for number in range(1, 8):
        net = copy.deepcopy(task.net)
        torch.manual_seed(number)
        if number in (3, 6):
            last = {"last": 3 if few else 6, "lam": 3 * params["lam"]}
            views, loss, adv = oracle(net, task.x, task.y, 0.0, **{**rest, **last})
        else:
            views, loss, adv = between(net, task.x, task.y, 0.0)
        logits = net.train()(views)
        torch.manual_seed(number)
        result = method(copy.deepcopy(task.net), task.x, task.y, task.index)
        torch.testing.assert_close(result.loss, loss(logits), rtol=0, atol=1e-8)
        torch.testing.assert_close(result.x_adv, views[adv], rtol=0, atol=1e-8)
        assert set(result.terms) == {"ce"} or number in (3, 6)
        if number == 4:
            kept = method.state_dict()
            method = make()
            method.load_state_dict(kept)


@pytest.mark.parametrize(
    ("slug", "options"),
    [
        ("sat-r1", {}),
        *(
            (slug, {"project": project, "alpha": 0.03})
            for slug in ("sat-r2", "sat-r3")
            for project in (True, False)
        ),
    ],
)
def test_regularising_every_second_step_in_a_round_ball(make_task, slug, options):
    """Between, it trains on what its single step alone does, in any norm and memory format."""
    task = make_task("conv")
    x = task.x.contiguous(memory_format=torch.channels_last)
    method, seen = methods.get(slug)(L2(0.5), every=2, **options), []
    task.net.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for step in range(1, 5):
        result = method(task.net, x, task.y)
        assert len(seen[-1]) == (len(x) if step % 2 else method.peak_images(len(x)))
        assert seen[-1].is_contiguous(memory_format=torch.channels_last)
        far = (result.x_adv - x).flatten(1).norm(dim=1)
        assert float(far.max()) <= 0.5 + (0 if options.get("project", True) else 0.03) + 1e-9
        assert float(far.min()) > 0.1


@pytest.mark.parametrize(
    ("slug", "weight", "terms"),
    [
        ("sat-r1", "lam", ("ce", "distance")),
        ("sat-r2", "lam", ("ce", "distance")),
        ("sat-r3", "lam", ("ce", "hinge")),
        ("trades", "beta", ("ce", "kl")),
    ],
)
def test_terms_add_up_to_the_loss(build, make_task, slug, weight, terms):
    task = make_task("conv")
    method = build(slug, **{weight: 0.7})
    result = method(task.net, task.x, task.y, task.index)
    first, second = (result.terms[name] for name in terms)
    torch.testing.assert_close(result.loss.detach(), first + 0.7 * second)
    assert float(second) > 0


@pytest.mark.parametrize(("name", "tau"), [("mlp", 0.93), ("conv", 0.78), ("flat", 0.78)])
def test_hinge_of_the_means_is_not_the_mean_of_the_hinges(make_task, name, tau):
    """So the cases above tell the two apart: some losses grow enough there, some do not."""
    task, hinges = make_task(name), []
    for per_sample in (False, True):
        torch.manual_seed(11)
        method = methods.SATR3(Linf(EPS), **{**core.R3, "tau": tau}, per_sample=per_sample)
        hinges.append(float(method(task.net, task.x, task.y, task.index).terms["hinge"]))
    assert hinges[1] > hinges[0] + 1e-3


def test_hinge_is_inactive_where_the_loss_grows(build, make_task):
    task = make_task("mlp")
    active = build("sat-r3", tau=0.01)(task.net, task.x, task.y, task.index).terms["hinge"]
    slack = build("sat-r3", tau=50.0)(task.net, task.x, task.y, task.index).terms["hinge"]
    assert float(active) > 0
    assert float(slack) == 0


@pytest.mark.parametrize(
    ("slug", "inside"), [("sat-r2", True), ("sat-r2", False), ("sat-r3", True), ("sat-r3", False)]
)
def test_how_far_the_authors_points_lie(build, make_task, slug, inside):
    """Without project the second view of R2 and the far point of R3 reach eps + alpha."""
    task = make_task("mlp")
    seen = []
    task.net.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    x = task.x.clamp(0.3, 0.7)
    build(slug, project=inside)(task.net, x, task.y, task.index)
    far = float((seen[-1][len(x) :] - x).abs().max())
    assert far == pytest.approx(EPS if inside else EPS + 0.03, abs=1e-9)


@pytest.mark.parametrize("slug", ["rs-fgsm", "n-fgsm", "zerograd", "multigrad", "aaer"])
def test_attacks_in_train_mode_see_confident_networks(build, make_task, monkeypatch, slug):
    """Without a random start it is seen: cross entropy has no gradient, the step must have one."""
    monkeypatch.setattr(Linf, "random_delta", lambda self, x, *_: torch.zeros_like(x))
    task = make_task("mlp", dtype=torch.float32)
    with torch.no_grad():
        task.net[-1].weight *= 1e4
    x = task.x.clamp(0.2, 0.8)
    y = task.net(x).argmax(1)
    leaf = x.clone().requires_grad_()
    torch.nn.functional.cross_entropy(task.net(leaf), y, reduction="sum").backward()
    assert bool((leaf.grad.flatten(1) == 0).all(1).any())
    far = (build(slug)(task.net, x, y).x_adv - x).abs()
    if slug == "zerograd":
        assert bool((far > EPS - 1e-6).flatten(1).any(1).all())
    else:
        torch.testing.assert_close(far, torch.full_like(x, EPS), rtol=0, atol=1e-6)


@pytest.mark.parametrize("random", [True, False])
def test_methods_survive_confident_networks(build, slug, make_task, monkeypatch, random):
    """Logits of thousands: every part of the loss and every gradient stays finite.

    Without a random start it is seen that the attack has a gradient, which cross entropy has not.
    """
    if not random:
        monkeypatch.setattr(Linf, "random_delta", lambda self, x, *_: torch.zeros_like(x))
        monkeypatch.setattr(Linf, "random_step", lambda self, x, *_: torch.zeros_like(x))
    task = make_task("mlp", dtype=torch.float32)
    with torch.no_grad():
        task.net[-1].weight *= 1e4
    x = task.x.clamp(0.2, 0.8)
    result = build(slug)(task.net, x, task.net(x).argmax(1), task.index)
    result.loss.backward()
    assert math.isfinite(float(result.loss.detach()))
    assert all(bool(p.grad.isfinite().all()) for p in task.net.parameters())
    moved = (result.x_adv != x).flatten(1).any(1)
    # Without a start UAT climbs a divergence from the image itself, which has no gradient there.
    # SSAT trains images that are wrong at the start clean.
    stay = {"standard", *joined("MAY_STAY"), "ssat" if random else "uat"}
    assert bool(moved.all()) == (slug not in stay)


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("sat_r1_loss", "sat-r1"),
        ("sat_r2_loss", "sat-r2"),
        ("sat_r3_loss", "sat-r3"),
        ("trades_loss", "trades"),
    ],
)
def test_functional_forms(name, slug, make_task):
    """The same as the method with its defaults; those that the function has, too, are its own."""
    task, function = make_task("mlp"), getattr(methods, name)
    assert function.__name__ == name
    given = inspect.signature(function).parameters
    needed = [name for name, one in given.items() if one.default is one.empty]
    found = []
    for call in (methods.get(slug)(Linf(EPS)), None):
        torch.manual_seed(0)
        net = copy.deepcopy(task.net)
        if call:
            params = {k: v for k, v in call.params().items() if k in needed}
            found.append(call(net, task.x, task.y).loss)
        else:
            found.append(function(net, task.x, task.y, Linf(EPS), **params).loss)
    torch.testing.assert_close(found[0], found[1])
    # Some make no difference here.
    defaults = methods.get(slug)(Linf(EPS)).params()
    for name in given.keys() & defaults.keys() - set(needed):
        assert given[name].default == defaults[name]
    if "base" in given:
        base = methods.FGSM(Linf(EPS / 2))
        with pytest.raises(UserError, match=r"base fgsm attacks within Linf.*, but threat is Linf"):
            function(net, task.x, task.y, Linf(EPS), base=base, **params)
