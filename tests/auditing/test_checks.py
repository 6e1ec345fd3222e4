"""Each check flags where its property is broken on purpose, and passes where it holds."""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from constructed import Layer
from torch import nn

import surestep
from surestep.attacks.white_box import pgd_step_size
from surestep.auditing import CHECKS, budgets, checks
from surestep.auditing._check import over as over_limit
from surestep.auditing._subject import Subject
from surestep.evaluation import Adapted, suite

BY_NAME = {check.name: check for check in CHECKS}


def told(accuracies):
    """An evaluation that leaves these, one after the other, and the radii and attacks it saw."""
    left, seen = iter(accuracies), []

    def evaluate(_model, _data, threat, attacks, **_):
        seen.append((threat.eps, list(attacks)))
        return SimpleNamespace(worst_case_accuracy=next(left))

    return evaluate, seen


@pytest.fixture
def in_order(monkeypatch):
    """The probe has its images in the order of the data, as the plain loops do."""
    monkeypatch.setattr("surestep.auditing._subject.mixed", torch.arange)


@pytest.fixture
def ask(images, in_order):
    """Return ``ask(name, model)``: the outcome of one check, on attacks' results as given.

    Of each the share of images that it left right, the first ones; below 0 the last ones. The
    sixty images are taken ``times`` over.
    """

    def call(name, model, eps=0.05, norm=surestep.Linf, times=1, **right):
        x, y = images[0].repeat(times, 1, 1, 1), images[1].repeat(times)
        budget = budgets.Budget(20, 20, 60, 30, 1, 200, autoattack=False)
        torch.manual_seed(0)
        s = Subject(Adapted(model).eval(), x, y, norm(eps), budget, 0, 25, lambda _: None)
        s.right["clean"] = s.logits(x).argmax(1) == y
        for attack, share in right.items():
            left = torch.arange(len(x)) < round(abs(share) * len(x))
            left = left if share >= 0 else left.flip(0)
            kind = attack.replace("_", "-")
            s.right[kind], s.broke[kind] = left, s.right["clean"] & ~left
            s.ran[kind] = suite.parse(kind, s.threat, sources=[model])
        return BY_NAME[name](s)

    return call


def random(net):
    return nn.Sequential(Layer(lambda x: x + 0.1 * torch.randn_like(x)), net)


def quantised(net):
    return nn.Sequential(Layer(lambda x: (x * 7).round() / 7), net)


def with_gradient_inside(net):
    def forward(x):
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            torch.autograd.grad(net(z).sum(), z)
        return net(x)

    return Layer(forward)


def wavy(net):
    """Ripples too fine to matter to the class: gradients that say nothing about the ball."""
    return Layer(lambda x: net(x) + 3 * torch.sin(300 * x.flatten(1)[:, :3]))


FLAGGED = {
    "deterministic-forward": random,
    "logits-not-probabilities": lambda net: nn.Sequential(net, nn.Softmax(1)),
    "vanishing-gradients": quantised,
    "broken-gradients": lambda net: nn.Sequential(
        Layer(lambda x: x + 0 * (x - x.detach()).abs().sqrt()), net
    ),
    "optimisation-in-forward": with_gradient_inside,
    "gradient-alignment": wavy,
    "local-linearity": wavy,
    "abnormal-examples": wavy,
    "eps-sweep": quantised,
    "binarization": quantised,
    "sat-properties": quantised,
}


@pytest.mark.parametrize("name", FLAGGED)
def test_models(ask, net, name):
    assert ask(name, net).status == "passed"
    found = ask(name, FLAGGED[name](net))
    assert found.status == "flagged", found
    assert math.isfinite(found.value)
    assert found.sentence
    assert found.threshold
    assert found.source


def made_up(net):
    """The answers of one function, the gradient of another."""
    other = torch.randn(64, 3, generator=torch.Generator().manual_seed(1))

    def forward(x):
        fake = x.flatten(1) @ other
        return net(x).detach() + fake - fake.detach()

    return Layer(forward)


def drawing_itself(net):
    """Noise from a generator of its own, so that no seed repeats it."""
    own = torch.Generator().manual_seed(0)
    return Layer(lambda x: net(x + 0.1 * torch.randn(x.shape, generator=own)))


def in_bfloat16(net):
    """Autocast in its own forward, which no caller turns off."""

    def forward(x):
        with torch.autocast("cpu", torch.bfloat16):
            return net(x).float()

    return Layer(forward)


SOUND = {
    "plain": lambda net: net,
    "scaled": lambda net: Layer(lambda x: 1e4 * net(x)),
    "bfloat16": lambda net: net.bfloat16(),
    "bfloat16 inside": in_bfloat16,
    "random": random,
    "kwta": lambda net: nn.Sequential(
        *net[:2], Layer(lambda z: torch.where(z >= z.topk(6).values[:, -1:], z, 0)), net[3]
    ),
    "max-pooling, with ties": lambda net: nn.Sequential(
        Layer(lambda x: (x.clamp(0.3, 0.7)).repeat_interleave(2, 3)), nn.MaxPool2d((1, 2)), net
    ),
    # Nothing can be measured, or only over the longest steps.
    "flat": quantised,
    "drawing itself": drawing_itself,
    "sure probabilities": lambda net: nn.Sequential(net, Layer(lambda z: 100 * z), nn.Softmax(1)),
}


@pytest.mark.parametrize("eps", [0.3, 1 / 255])
@pytest.mark.parametrize("kind", SOUND)
def test_the_gradient_of_a_sound_model_is_not_contradicted(ask, net, kind, eps):
    found = ask("broken-gradients", SOUND[kind](net), eps)
    assert found.status == "passed", found
    error = found.evidence["difference error"]
    if kind == "flat":
        assert error is None
    elif kind not in ("bfloat16", "bfloat16 inside", "drawing itself", "sure probabilities"):
        assert error < 0.02


@pytest.mark.parametrize("eps", [0.3, 1 / 255])
def test_a_made_up_gradient_is_contradicted(ask, net, eps):
    found = ask("broken-gradients", made_up(net), eps)
    assert (found.status, found.value) == ("flagged", 1.0)
    assert found.evidence["contradicted"]
    assert found.evidence["difference error"] > 0.7
    assert "finite differences contradict the gradient" in found.sentence


@pytest.mark.parametrize(("error", "flagged"), [(0.55, True), (0.45, False)])
def test_how_far_a_gradient_may_be_off(ask, net, error, flagged):
    """The model grows by more than its gradient says."""

    def forward(x):
        out = net(x)
        return out.detach() + (out - out.detach()) / (1 + error)

    found = ask("broken-gradients", Layer(forward))
    assert found.evidence["difference error"] == pytest.approx(error, abs=0.02)
    assert (found.status == "flagged") is flagged


@pytest.mark.parametrize(
    ("name", "losses", "value", "flagged"),
    [
        # At two points, and at the one between them.
        ("local-linearity", (1, 1, 1.65), 0.52, True),
        ("local-linearity", (1, 1, 1.6), 0.49, False),
        # At tenths of the step, and at a third of it.
        ("sat-properties", (*[1] * 11, 0.91), 0.91, True),
        ("sat-properties", (*[1] * 11, 0.89), 0.89, False),
    ],
)
def test_how_the_loss_may_go(ask, net, monkeypatch, name, losses, value, flagged):
    left = iter(losses)
    monkeypatch.setattr(Subject, "loss", lambda s, x, y: torch.full((len(x),), float(next(left))))
    found = ask(name, net)
    assert found.value == pytest.approx(value, abs=0.005)
    assert (found.status == "flagged") is flagged


@pytest.mark.parametrize(
    ("name", "right", "flagged"),
    [
        ("one-step-beats-many", {"fgsm": 0.5, "pgd_20": 0.7}, True),
        ("one-step-beats-many", {"fgsm": 0.7, "pgd_20": 0.5}, False),
        ("collapse", {"fgsm": 0.9, "pgd_20": 0.9, "pgd_10": 0.1}, True),
        ("collapse", {"fgsm": 0.3, "pgd_20": 0.0}, False),
        ("collapse", {"fgsm": 0.9, "pgd_20": 0.8}, False),
        ("black-box-beats-white-box", {"fgsm": 0.9, "pgd_20": 0.8, "square_60": 0.7}, True),
        ("black-box-beats-white-box", {"fgsm": 0.9, "pgd_20": 0.8, "transfer": 0.7}, True),
        ("black-box-beats-white-box", {"fgsm": 0.9, "pgd_20": 0.8, "square_60": 0.9}, False),
        # Each breaks images that the other does not.
        ("black-box-beats-white-box", {"fgsm": 0.9, "pgd_20": 0.5, "square_60": -0.6}, True),
        ("random-beats-gradient", {"fgsm": 0.9, "pgd_20": 0.9, "noise_20": 0.8}, True),
        ("random-beats-gradient", {"fgsm": 0.9, "pgd_20": 0.7, "noise_20": 0.8}, False),
        # Fewer images, but others.
        ("random-beats-gradient", {"fgsm": 0.9, "pgd_20": 0.5, "noise_20": -0.95}, True),
        ("losses-agree", {"pgd_20": 0.9, "pgd_20_margin": 0.8}, True),
        ("losses-agree", {"pgd_20": 0.8, "pgd_20_margin": 0.9}, False),
        ("gap-profile", {"pgd_10": 0.9, "pgd_20": 0.8}, True),
        ("gap-profile", {"pgd_10": 0.82, "pgd_20": 0.8}, False),
        ("gap-profile", {"pgd_10": 0.8, "pgd_20": 0.8, "autoattack": 0.6}, True),
        # On either side of each limit, of sixty images.
        ("one-step-beats-many", {"fgsm": 0.7, "pgd_20": 0.72}, True),
        ("one-step-beats-many", {"fgsm": 0.7, "pgd_20": 0.7}, False),
        ("collapse", {"fgsm": 0.9, "pgd_20": 0.67}, True),
        ("collapse", {"fgsm": 0.9, "pgd_20": 0.72}, False),
        ("collapse", {"fgsm": 0.6, "pgd_20": 0.3}, True),
        ("collapse", {"fgsm": 0.45, "pgd_20": 0.1}, False),
        ("black-box-beats-white-box", {"fgsm": 0.9, "pgd_20": 0.8, "square_60": 0.78}, True),
        ("black-box-beats-white-box", {"fgsm": 0.9, "pgd_20": 0.8, "square_60": 0.8}, False),
        # Of what white-box attacks leave FGSM counts, too.
        ("black-box-beats-white-box", {"fgsm": 0.5, "pgd_20": 0.9, "square_60": 0.7}, False),
        ("losses-agree", {"pgd_20": 0.9, "pgd_20_margin": 0.83}, True),
        ("losses-agree", {"pgd_20": 0.9, "pgd_20_margin": 0.87}, False),
        ("gap-profile", {"pgd_10": 0.85, "pgd_20": 0.8}, True),
        ("gap-profile", {"pgd_10": 0.8, "pgd_20": 0.8, "autoattack": 0.7}, True),
        ("gap-profile", {"pgd_10": 0.8, "pgd_20": 0.8, "autoattack": 0.75}, False),
    ],
)
def test_accuracies(ask, net, name, right, flagged):
    found = ask(name, net, **right)
    assert found.status == ("flagged" if flagged else "passed"), found


@pytest.mark.parametrize(
    ("name", "right", "flagged"),
    [
        ("one-step-beats-many", {"fgsm": 0.7, "pgd_20": 0.706}, True),
        ("one-step-beats-many", {"fgsm": 0.7, "pgd_20": 0.704}, False),
        ("collapse", {"fgsm": 0.51, "pgd_20": 0.2}, True),
        ("collapse", {"fgsm": 0.49, "pgd_20": 0.2}, False),
        ("black-box-beats-white-box", {"fgsm": 0.8, "pgd_20": 0.8, "square_60": 0.7975}, True),
        ("black-box-beats-white-box", {"fgsm": 0.8, "pgd_20": 0.8, "square_60": 0.7985}, False),
        # Other images, 25 and 24 of 1,200.
        ("black-box-beats-white-box", {"fgsm": 0.98, "pgd_20": 0.98, "square_60": -0.979}, True),
        ("black-box-beats-white-box", {"fgsm": 0.98, "pgd_20": 0.98, "square_60": -0.98}, False),
    ],
)
def test_limits_that_take_many_images(ask, net, name, right, flagged):
    found = ask(name, net, times=20, **right)
    assert found.status == ("flagged" if flagged else "passed"), found


@pytest.mark.parametrize(
    ("name", "right", "times", "blind"),
    [
        # From three images on.
        ("one-step-beats-many", {"fgsm": 57 / 60, "pgd_20": 1.0}, 1, True),
        ("one-step-beats-many", {"fgsm": 58 / 60, "pgd_20": 1.0}, 1, False),
        ("one-step-beats-many", {"fgsm": 1193 / 1200, "pgd_20": 1.0}, 20, True),
        # More than three, and too few of 1,200 to flag.
        ("one-step-beats-many", {"fgsm": 1195 / 1200, "pgd_20": 1.0}, 20, False),
        ("random-beats-gradient", {"pgd_20": 1.0, "noise_20": -57 / 60}, 1, True),
        ("random-beats-gradient", {"pgd_20": 1.0, "noise_20": -58 / 60}, 1, False),
        # No other flag of this kind is a sign.
        ("black-box-beats-white-box", {"pgd_20": 1.0, "square_60": 0.5}, 1, False),
        ("losses-agree", {"pgd_20": 0.9, "pgd_20_margin": 0.1}, 1, False),
        ("collapse", {"fgsm": 0.9, "pgd_20": 0.1}, 1, False),
        ("gap-profile", {"pgd_10": 0.9, "pgd_20": 0.8, "autoattack": 0.1}, 1, False),
    ],
)
def test_accuracies_that_show_gradients_to_be_blind(ask, net, name, right, times, blind):
    found = ask(name, net, times=times, **right)
    assert (found.blind, found.sign) == (blind, found.title.lower())
    assert found.flagged or not blind


@pytest.mark.parametrize(
    ("right", "masks"),
    [
        ({"pgd_10": 0.9, "pgd_20": 0.8}, False),
        ({"pgd_10": 0.9, "pgd_20": 0.8, "autoattack": 0.75}, False),
        ({"pgd_10": 0.8, "pgd_20": 0.8, "autoattack": 0.7}, True),
    ],
)
def test_which_gap_explains_a_failed_claim(ask, net, right, masks):
    found = ask("gap-profile", net, **right)
    assert found.flagged
    assert found.masks is masks


def test_nothing_to_compare_is_skipped(ask, net):
    found = ask("black-box-beats-white-box", net, fgsm=0.9, pgd_20=0.8)
    assert (found.status, found.value) == ("skipped", None)


@pytest.fixture
def task(net, images):
    """Return what the checks work on: a smooth net, the first thirty images that it has right."""
    smooth = nn.Sequential(*net[:2], nn.Tanh(), net[3])
    x, y = images
    right = smooth(x).argmax(1) == y
    return SimpleNamespace(net=smooth, x=x[right][:30], y=y[right][:30], threat=surestep.Linf(0.3))


def loss_of(net, point, label):
    return float(F.cross_entropy(net.double()(point[None].double()), label[None]).detach())


def gradient_of(net, point, label):
    point = point.double()[None].requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(net.double()(point), label[None]), point)
    return grad[0]


def cosine_of(a, b):
    a, b = a.flatten(), b.flatten()
    return float(a @ b / (a.norm() * b.norm()))


def test_alignment_against_plain_loops(ask, task):
    found = ask("gradient-alignment", task.net, eps=0.3)
    torch.manual_seed(14)
    near = task.threat.random_start(task.x)
    cosines = []
    for x, n, y in zip(task.x, near, task.y, strict=True):
        here = gradient_of(task.net, x, y)
        cosines.append(cosine_of(here, gradient_of(task.net, n, y)))
    task.net.float()
    assert found.value == pytest.approx(sum(cosines) / len(cosines), abs=1e-4)
    assert found.value < 0.999


def test_linearity_against_plain_loops(ask, task):
    found = ask("local-linearity", task.net, eps=0.3)
    torch.manual_seed(15)
    ends = task.threat.random_start(task.x), task.threat.random_start(task.x)
    errors, sizes = [], []
    for a, b, t, y in zip(*ends, torch.rand(len(task.x)).tolist(), task.y, strict=True):
        at = [loss_of(task.net, p, y) for p in (a, b, (1 - t) * a + t * b)]
        errors.append((at[2] - (1 - t) * at[0] - t * at[1]) ** 2)
        sizes += [value**2 for value in at]
    task.net.float()
    assert found.evidence["error"] == pytest.approx(sum(errors) / len(errors), rel=1e-2)
    ratio = (sum(errors) / len(errors) / (sum(sizes) / len(sizes))) ** 0.5
    assert found.value == pytest.approx(ratio, rel=1e-2)


def test_sat_properties_against_plain_loops(ask, task):
    """The course along FGSM, its ratio, and the logits' distances of SAT-R1 and SAT-R2."""
    eps, (low, high) = 0.1, (0, 1)
    found = ask("sat-properties", task.net, eps=eps)
    torch.manual_seed(18)
    noise = torch.randn_like(task.x).sign()
    course, ratio, apart = [[] for _ in range(11)], [[], []], {"I": [], "R": []}
    sizes = []
    for x, n, y in zip(task.x.double(), noise.double(), task.y, strict=True):
        sign = gradient_of(task.net, x, y).sign()
        for k in range(11):
            course[k].append(loss_of(task.net, (x + k / 10 * eps * sign).clamp(low, high), y))
        x_i = x
        for _ in range(10):
            x_i = x_i + eps / 10 * gradient_of(task.net, x_i, y).sign()
            x_i = torch.minimum(torch.maximum(x_i, x - eps), x + eps).clamp(low, high)
        x_r = (x + eps / 30 * n).clamp(low, high)
        x_r = x_r + eps * gradient_of(task.net, x_r, y).sign()
        x_r = torch.minimum(torch.maximum(x_r, x - eps), x + eps).clamp(low, high)
        points = torch.stack([(x + eps * sign).clamp(low, high), x_i, x_r])
        at_f, at_i, at_r = task.net.double()(points).detach()
        sizes.append(float((at_f**2).sum()))
        apart["I"].append(float(((at_f - at_i) ** 2).sum()))
        apart["R"].append(float(((at_f - at_r) ** 2).sum()))
        if int(at_f.argmax()) == int(y):
            ratio[0].append(loss_of(task.net, (x + eps / 3 * sign).clamp(low, high), y))
            ratio[1].append(course[10][-1])
    task.net.float()
    assert found.evidence["loss"] == pytest.approx([sum(c) / len(c) for c in course], rel=1e-3)
    assert found.value == pytest.approx(sum(ratio[0]) / sum(ratio[1]), rel=1e-3)
    for name, which in (("FGSM to I-FGSM", "I"), ("FGSM to R-FGSM", "R")):
        wanted = sum(apart[which]) / sum(sizes)
        assert found.evidence[name] == pytest.approx(wanted, rel=1e-2, abs=1e-6)
        assert wanted > 0


@pytest.mark.parametrize(
    ("accuracy", "flagged"),
    [
        # At a quarter, half, 3/4, 1 and 3/2 of eps 0.05, at 0.5 and without bounds; chance is 1/3.
        ([0.9, 0.8, 0.7, 0.6, 0.4, 0.38, 0.0], False),
        ([0.9, 0.8, 0.83, 0.6, 0.4, 0.38, 0.0], True),  # it rises
        ([0.9, 0.8, 0.81, 0.6, 0.4, 0.38, 0.0], False),  # by less than noise
        ([0.9, 0.8, 0.7, 0.6, 0.4, 0.39, 0.0], True),  # above chance at eps 0.5
        ([0.9, 0.8, 0.7, 0.6, 0.4, 0.38, 0.01], True),  # something withstands everything
    ],
)
def test_what_flags_a_sweep(ask, net, monkeypatch, accuracy, flagged):
    evaluate, seen = told(accuracy)
    monkeypatch.setattr(checks, "evaluate", evaluate)
    found = ask("eps-sweep", net)
    assert seen == [(eps, ["pgd-50"]) for eps in found.evidence["eps"]]
    assert found.evidence["accuracy"] == accuracy
    assert (found.status == "flagged") is flagged


@pytest.mark.parametrize(
    ("left", "blind", "hints"),
    [(4, True, True), (3, False, True), (2, False, False)],  # surely 5.3, 3.5 and 1.8% of thirty
)
def test_how_many_may_withstand_an_attack_without_bounds(ask, net, monkeypatch, left, blind, hints):
    evaluate, _ = told([0.9, 0.8, 0.7, 0.6, 0.4, 0.38, left / 30])
    monkeypatch.setattr(checks, "evaluate", evaluate)
    found = ask("eps-sweep", net)
    assert found.flagged
    assert (found.blind, found.hints, found.sign) == (blind, hints, "sweep of eps")


def test_a_ball_that_holds_every_image(ask, net, monkeypatch):
    """In L2 its radius is the diagonal of 64 pixels; nothing is said there of half the range."""
    evaluate, _ = told([0.9, 0.9, 0.9, 0.9, 0.9, 0.0])
    monkeypatch.setattr(checks, "evaluate", evaluate)
    found = ask("eps-sweep", net, 0.5, surestep.L2)
    assert found.evidence["eps"] == [0.125, 0.25, 0.375, 0.5, 0.75, 8.0]
    assert found.status == "passed"


@pytest.mark.parametrize(
    ("steps", "again", "moving", "flagged"),
    [
        # Of thirty images: the steps after which they are first wrong, -1 for never.
        ([3] * 10 + [20] * 10 + [-1] * 10, 0, 0.0, False),
        ([3] * 10 + [70] * 1 + [-1] * 19, 0, 0.0, True),  # between step 50 and 100
        ([3] * 10 + [-1] * 20, 1, 0.0, True),  # by another start
        ([3] * 10 + [-1] * 20, 0, 0.06, True),
        ([3] * 10 + [-1] * 20, 0, 0.04, False),
    ],
)
def test_convergence(ask, net, monkeypatch, steps, again, moving, flagged):
    searches = []

    def search(self, x, y, *_, **__):
        searches.append(len(x))
        if len(searches) == 1:
            first = torch.tensor(steps)
            return SimpleNamespace(first_wrong=first, wrong=first >= 0)
        return SimpleNamespace(wrong=torch.arange(len(x)) < (again if len(searches) == 2 else 0))

    monkeypatch.setattr(Subject, "search", search)
    monkeypatch.setattr(Subject, "probe", property(lambda s: (s.x[:30], s.y[:30])))
    monkeypatch.setattr(checks, "_late_movement", lambda s: moving)
    found = ask("convergence", net)
    assert (found.status == "flagged") is flagged
    right = [sum(not 0 <= first <= k for first in steps) / 30 for k in (5, 10, 25, 50, 100)]
    assert found.evidence["accuracy"] == pytest.approx(right)
    left = steps.count(-1)
    assert searches == [30, left, left - again]
    wanted = [left / 30, (left - again) / 30, (left - again) / 30]
    assert found.evidence["restart_accuracy"] == pytest.approx(wanted)


def test_sweep_evidence(ask, net):
    found = ask("eps-sweep", net)
    assert found.evidence["eps"][-1] == 1.0
    assert found.evidence["accuracy"][-1] == 0
    assert found.evidence["accuracy"][0] == 1


def test_optimisation_check_puts_autograd_back(ask, net):
    before = torch.autograd._engine_run_backward
    ask("optimisation-in-forward", with_gradient_inside(net))
    assert torch.autograd._engine_run_backward is before


def test_a_gradient_function_that_was_imported_before_is_counted(ask, net):
    grad = torch.autograd.grad  # as by "from torch.autograd import grad"

    def forward(x):
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            grad(net(z).sum(), z)
            net(z).sum().backward()
        return net(x)

    found = ask("optimisation-in-forward", Layer(forward))
    assert (found.status, found.value) == ("flagged", 2.0)


def test_the_page_of_checks_is_up_to_date():
    script = Path(__file__).parents[2] / "docs" / "checks.py"
    page = script.with_name("checks.md").read_text("utf-8")
    assert page == runpy.run_path(str(script))["page"](), "run python docs/checks.py"
    assert [check.number for check in CHECKS] == list(range(1, len(CHECKS) + 1))


@pytest.mark.usefixtures("in_order")
def test_the_course_of_pgd_is_that_of_a_plain_loop(net, images):
    x, y = (part[:20] for part in images)
    budget = budgets.Budget(20, 20, 60, 30, 1, 200, autoattack=False)
    s = Subject(Adapted(net).eval(), x, y, surestep.Linf(0.17), budget, 0, 25, lambda _: None)
    s.right["clean"] = torch.ones(20, dtype=torch.bool)
    torch.manual_seed(4)
    found = s.pgd_course
    torch.manual_seed(4)
    point, size = s.threat.random_start(x), pgd_step_size(0.17, 50)
    losses, wrong = [], []
    for _ in range(51):
        point.requires_grad_()
        logits = net(point)
        losses.append(F.cross_entropy(logits, y).item())
        wrong.append([int(z.argmax()) != int(k) for z, k in zip(logits, y, strict=True)])
        (grad,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), point)
        point = (point + size * grad.sign()).detach()
        point = torch.min(torch.max(point, x - 0.17), x + 0.17).clamp(0, 1)
    assert found.losses == pytest.approx(losses, rel=1e-3)
    assert found.ever_wrong.tolist() == [any(column) for column in zip(*wrong, strict=True)]
    assert found.wrong.tolist() == wrong[-1]
    assert any(wrong[-1])
    assert not all(wrong[-1])


@pytest.mark.usefixtures("in_order")
def test_nan_gradients_do_not_end_the_course_of_pgd(net, images):
    """A NaN would stay in the point, and break the model."""
    x, y = (part[:20] for part in images)
    budget = budgets.Budget(20, 20, 60, 30, 1, 200, autoattack=False)
    model = FLAGGED["broken-gradients"](net)
    s = Subject(Adapted(model).eval(), x, y, surestep.L2(0.05), budget, 0, 25, lambda _: None)
    s.right["clean"] = torch.ones(20, dtype=torch.bool)
    assert all(map(math.isfinite, s.pgd_course.losses))
    assert not s.pgd_course.ever_wrong.any()


def test_what_is_broken_only_on_the_way(ask, net, monkeypatch):
    def watch(_, x, y):
        seen = torch.zeros(len(x), 51, 2)
        seen[:, :, 0] = torch.linspace(0, 1, 51).clamp(max=0.9)
        seen[::2, 7, 1] = 1  # and right again
        seen[1::4, 7:, 1] = 1
        return seen

    monkeypatch.setattr(Subject, "_watch_pgd", watch)
    found = ask("silent-success", net)
    assert (found.status, found.value) == ("flagged", pytest.approx(0.5, abs=0.05))
    moved = ask("convergence", net).evidence["late_movement"]
    assert moved == pytest.approx((0.9 - 0.82) / 0.9, rel=1e-4)


@pytest.mark.parametrize(
    ("band", "count", "value", "flagged"),
    [
        ((0.49, 0.515), 100, 1.0, True),
        ((0.49, 0.515), 6, 0.06, True),
        ((0.49, 0.515), 4, 0.04, False),
        ((0.999, 1.001), 100, 0.0, False),
    ],
)
def test_a_narrow_band_on_the_line_is_seen(monkeypatch, band, count, value, flagged):
    """Twenty points would step over the first one; the last holds the end itself."""
    low, high = band

    def forward(x):
        share = (x.flatten(1).mean(1) - 0.5) / 0.05
        inside = ((share > low) & (share < high)).float()
        return torch.stack([1 - 2 * inside, 0 * inside], 1)

    x, y = torch.full((100, 1, 4, 4), 0.5), torch.zeros(100, dtype=torch.int64)
    x[count:] = 0.1  # from where the line does not meet the band
    budget = budgets.Budget(20, 20, 60, 100, 1, 200, autoattack=False)
    s = Subject(Layer(forward), x, y, surestep.Linf(0.05), budget, 0, 25, lambda _: None)
    s.right["clean"] = torch.ones(100, dtype=torch.bool)
    monkeypatch.setattr(Subject, "fgsm", lambda self, x, y: x + 0.05)
    found = BY_NAME["distorted-boundary"](s)
    assert found.value == pytest.approx(value)
    assert found.status == ("flagged" if flagged else "passed")


def test_a_few_images_that_only_a_black_box_breaks(ask, net):
    """Three of sixty, where both leave as many."""
    found = ask("black-box-beats-white-box", net, fgsm=0.95, pgd_20=0.95, square_60=-0.95)
    assert found.status == "flagged"
    assert found.evidence["broken only by it"] == {"square-60": 3}
    found = ask("black-box-beats-white-box", net, fgsm=1.0, pgd_20=1.0, square_60=-1.0)
    assert found.status == "passed"


def test_a_class_that_is_left_out_is_no_noise(ask, net):
    left_out = torch.tensor([0.0, 0.0, -math.inf])
    assert ask("deterministic-forward", Layer(lambda x: net(x) + left_out)).status == "passed"


def test_little_noise_is_noise(ask, net):
    found = ask("deterministic-forward", Layer(lambda x: net(x) + 1e-2 * torch.randn(len(x), 3)))
    assert found.status == "flagged"
    assert 1e-4 < found.value < 0.1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x - x.mean(0), "depends on the rest of the batch"),
        (lambda x: 1 - x if x.requires_grad else x, "answers differently with gradients on"),
        (
            lambda x: x + 0 * torch.manual_seed(0).initial_seed(),
            "seeds the random generator of torch in its forward",
        ),
        (lambda x: x + 0.1 * torch.rand_like(x), "is random"),
    ],
)
def test_passes_that_do_not_agree(ask, net, change, said):
    found = ask("deterministic-forward", Layer(lambda x: net(change(x))))
    assert found.status == "flagged"
    assert found.sentence == f"the model {said}"
    assert len(found.evidence["right"]) == 5
    assert (found.value > 1e-4) is ("seeds" not in said)


def test_outputs_between_0_and_1_that_do_not_sum_to_1_are_logits(ask, net):
    found = ask("logits-not-probabilities", Layer(lambda x: net(x).sigmoid()))
    assert (found.evidence["min"] >= 0, found.evidence["max"] <= 1) == (True, True)
    assert found.status == "passed"


def test_one_image_without_a_gradient_is_enough(ask, net, images):
    first = images[0][:1]

    def forward(x):
        known = (x.detach() - first).abs().flatten(1).amax(1) < 1e-6
        return net(torch.where(known[:, None, None, None], x.detach(), x))

    found = ask("vanishing-gradients", Layer(forward))
    assert found.status == "flagged"
    assert 0 < found.value < 0.1


@pytest.mark.parametrize(
    ("objective", "flat", "blind"),
    [("log_odds", 4, True), ("log_odds", 3, False), ("cross_entropy", 30, False)],
)
@pytest.mark.parametrize("beside", [False, True])
def test_how_many_images_without_a_gradient_are_a_sign(
    ask, net, images, monkeypatch, objective, flat, blind, beside
):
    """Of thirty, and where even log-odds have none: at the images or beside them."""

    def gradient(self, x, y, kind):
        grad = torch.ones_like(x)
        if kind.__name__ == objective and beside != torch.equal(x, self.probe[0]):
            grad[:flat] = 0
        return grad

    monkeypatch.setattr(Subject, "gradient", gradient)
    found = ask("vanishing-gradients", net)
    assert found.flagged
    assert found.blind is blind
    if blind:
        assert found.sign == "no gradient on 13% of the images"


@pytest.mark.parametrize(
    ("change", "blind"),
    [
        (lambda net: Layer(lambda x: net(x.detach()).detach()), True),
        (made_up, True),
        (FLAGGED["broken-gradients"], False),  # NaN gradients
    ],
    ids=["detached", "made up", "nan"],
)
def test_which_broken_gradients_are_a_sign(ask, net, change, blind):
    found = ask("broken-gradients", change(net))
    assert found.flagged
    assert (found.blind, found.sign) == (blind, "broken gradients")


def test_a_model_that_is_flat_beside_the_images(ask, net, images):
    x, _ = images

    def forward(z):
        known = (z.detach()[:, None] - x[None]).abs().flatten(2).amax(2).amin(1) < 1e-6
        return net(torch.where(known[:, None, None, None], z, z.detach()))

    found = ask("vanishing-gradients", Layer(forward))
    assert found.evidence["shares"]["ce at x"] == 0
    assert found.status == "flagged"


@pytest.mark.parametrize(("cosine", "flagged"), [(0.1, True), (0.4, False)])
def test_how_far_gradients_may_turn(ask, net, monkeypatch, cosine, flagged):
    """Two directions of unit length, so far apart, by turns."""
    calls = []

    def gradient(self, x, y, *_):
        calls.append(1)
        flat = torch.zeros(len(x), 64)
        flat[:, 0] = 1.0 if len(calls) == 1 else cosine
        flat[:, 1] = 0.0 if len(calls) == 1 else (1 - cosine**2) ** 0.5
        return flat.view_as(x)

    monkeypatch.setattr(Subject, "gradient", gradient)
    found = ask("gradient-alignment", net)
    assert found.value == pytest.approx(cosine, abs=1e-5)
    assert (found.status == "flagged") is flagged


@pytest.mark.parametrize(("lost", "flagged"), [(2, True), (1, False)])
def test_how_many_are_broken_only_on_the_way(ask, net, monkeypatch, lost, flagged):
    """One of a hundred is no sign."""
    way = SimpleNamespace(ever_wrong=torch.arange(100) < lost, wrong=torch.zeros(100).bool())
    monkeypatch.setattr(Subject, "pgd_course", way)
    assert (ask("silent-success", net).status == "flagged") is flagged


@pytest.mark.parametrize(
    ("pgd", "noise", "flagged"),
    [(0.9, 0.9, True), (0.9, 0.5, False), (0.81, 0.5, False), (0.79, 0.5, True)],
)
def test_how_many_problems_are_solved(ask, net, monkeypatch, pgd, noise, flagged):
    """Four fifths at least, and more than random points solve."""
    monkeypatch.setattr(checks, "binarization_rates", lambda *_: (pgd, noise, 20))
    assert (ask("binarization", net).status == "flagged") is flagged


@pytest.mark.parametrize(
    ("pgd", "noise", "posed", "blind"),
    [
        (0.0, 0.05, 20, True),
        (0.15, 0.15, 20, True),
        # More than by chance.
        (0.3, 0.05, 20, False),
        # An attack that solves 85% of all problems solves no more than 15 of 20 now and then.
        (0.75, 0.75, 20, False),
        (0.0, 0.0, 4, True),
        (0.0, 0.0, 3, False),
    ],
)
def test_how_few_solved_problems_show_gradients_to_be_blind(
    ask, net, monkeypatch, pgd, noise, posed, blind
):
    monkeypatch.setattr(checks, "binarization_rates", lambda *_: (pgd, noise, posed))
    found = ask("binarization", net)
    assert found.flagged
    assert found.blind is blind


@pytest.mark.parametrize(("lowered", "flagged"), [(3, True), (1, False)])
def test_how_many_abnormal_examples(ask, net, monkeypatch, lowered, flagged):
    seen = []

    def loss(self, x, y):
        seen.append(1)
        at_image = torch.ones(len(x))
        at_fgsm = torch.where(torch.arange(len(x)) < lowered, 0.5, 2.0)
        return at_fgsm if len(seen) == 1 else at_image

    monkeypatch.setattr(Subject, "loss", loss)
    found = ask("abnormal-examples", net)
    assert found.value == pytest.approx(lowered / 30)
    assert (found.status == "flagged") is flagged


def test_a_check_finds_the_same_whichever_ran_before(net, images):
    """Each has a seed of its own."""
    budget = budgets.Budget(20, 20, 60, 30, 1, 200, autoattack=False)

    def found(*names):
        torch.manual_seed(3)
        s = Subject(
            Adapted(net).eval(), *images, surestep.Linf(0.05), budget, 0, 25, lambda _: None
        )
        s.right["clean"] = s.logits(images[0]).argmax(1) == images[1]
        return [BY_NAME[name](s) for name in names][-1]

    assert found("local-linearity") == found("gradient-alignment", "local-linearity")


@pytest.mark.parametrize(
    ("gap", "limit", "over"),
    [(0.88 - 0.85, 0.03, False), (0.95 - 0.94, 0.01, False), (0.88 - 0.84, 0.03, True)],
)
def test_a_difference_of_shares_is_not_above_its_limit_by_rounding(gap, limit, over):
    assert over_limit(gap, limit) is over


def test_a_close_look_at_sorted_images_sees_every_class(net, images):
    x, y = images
    order = y.argsort(stable=True)
    budget = budgets.Budget(20, 20, 60, 12, 1, 200, autoattack=False)
    s = Subject(
        Adapted(net), x[order], y[order], surestep.Linf(0.05), budget, 0, 25, lambda _: None
    )
    s.right["clean"] = torch.arange(60) > 0
    shown, labels = s.probe
    assert (len(shown), set(labels.tolist())) == (12, {0, 1, 2})
    assert not any(torch.equal(one, s.x[0]) for one in shown)
