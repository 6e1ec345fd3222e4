"""What makes an attack a judge: the best iterate, restarts, stopping, and staying inside."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from surestep import L2, Linf, UserError, attacks
from surestep.attacks import ascent, losses, outcomes
from surestep.attacks.lending import attacking


class Peak(nn.Module):
    """Two classes, the second one in front only near x = 0.57: a step of 0.1 jumps over it."""

    def forward(self, x):
        height = 0.05 - (x - 0.57).abs().sum(1)
        return torch.stack([torch.zeros_like(height), height], 1)


@pytest.mark.parametrize("stop", [False, True])
def test_pgd_keeps_the_best_iterate(stop):
    """From 0.5 it steps to 0.6 (wrong), then back to 0.5 (right)."""
    x, y = torch.full((3, 1), 0.5), torch.zeros(3, dtype=torch.int64)
    run = {"start_radius": 0.0, "stop_when_wrong": stop}
    x_adv = attacks.pgd(Peak(), x, y, Linf(0.3), 2, 0.1, **run)
    torch.testing.assert_close(x_adv, torch.full((3, 1), 0.6))
    assert Peak()(x_adv).argmax(1).tolist() == [1, 1, 1]


def test_pgd_has_default_steps(mlp, digits, threat):
    """2.5 eps in all, but steps of at least eps / 30: the same as in an evaluation."""
    x, y = digits()
    for steps, size in ((10, threat.eps / 4), (5, threat.eps / 2), (100, threat.eps / 30)):
        found = []
        for own in ({}, {"step_size": size}):
            torch.manual_seed(0)
            found.append(attacks.pgd(mlp, x, y, threat, steps, **own))
        assert torch.equal(*found)


def test_best_is_kept_per_sample():
    """Samples that start at different places peak at different steps."""
    x, y = torch.tensor([[0.5], [0.4], [0.1]]), torch.zeros(3, dtype=torch.int64)
    x_adv = attacks.pgd(Peak(), x, y, Linf(0.3), 2, 0.1, start_radius=0.0)
    torch.testing.assert_close(x_adv, torch.tensor([[0.6], [0.6], [0.3]]))


def test_a_nan_point_does_not_keep_its_place():
    """It counts as wrong, but may be right in another precision: a point that is wrong is taken."""
    x, y = torch.zeros(1, 1), torch.tensor([0])
    best = ascent.Best(x, y, losses.log_odds)
    for point, leads in ((0.1, float("nan")), (0.2, 1.0), (0.3, 0.5)):
        best.offer(torch.tensor([0]), x + point, torch.tensor([[0.0, leads]]))
    assert best.x_adv.item() == pytest.approx(0.2)
    assert best.first_wrong.tolist() == [0]


class Votes(nn.Module):
    """Whole votes: equal, until the image is bright. It keeps the votes and returns them again."""

    def __init__(self):
        super().__init__()
        left_out = float("-inf")
        self.cast = nn.Parameter(torch.tensor([[0.0, 0.0, left_out], [0.0, 1.0, left_out]]))

    def forward(self, x):
        bright = (x.flatten(1).mean(1) > 0.6).long()
        return self.cast[:1].expand(len(x), 3) if not bright.any() else self.cast[bright]


def test_square_goes_on_at_a_tie_and_writes_into_no_model():
    model, x = Votes(), torch.full((2, 1, 8, 8), 0.5)
    torch.manual_seed(0)
    x_adv = attacks.square(model, x, torch.tensor([0, 0]), Linf(0.3), 200)
    assert model(x_adv).argmax(1).tolist() == [1, 1]
    assert model.cast[:, :2].tolist() == [[0, 0], [0, 1]]


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
def test_restarts_never_hurt(mlp, digits, loss):
    x, y = digits(32)
    worst = []
    for restarts in (1, 2, 5):
        torch.manual_seed(0)
        x_adv = attacks.pgd(mlp, x, y, Linf(0.03), 2, 0.02, restarts, loss)
        logits = mlp(x_adv).detach()
        worst.append((logits.argmax(1) != y, losses.get(loss)(logits, y)))
    for (wrong, value), (more_wrong, more_value) in pairwise(worst):
        assert bool((more_wrong | ~wrong).all())
        assert bool((more_value >= value - 1e-6)[wrong == more_wrong].all())
    assert not torch.equal(worst[0][1], worst[-1][1])


@pytest.mark.parametrize("decay", [None, 0.9])
def test_stopping_early_gives_the_same_accuracy_for_less(mlp, digits, decay):
    x, _ = digits(256)
    y = mlp(x).argmax(1)
    seen, right = [], []
    handle = mlp.register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
    work = []
    for stop in (False, True):
        torch.manual_seed(0)
        seen.clear()
        run = {"decay": decay, "stop_when_wrong": stop}
        x_adv = attacks.pgd(mlp, x, y, Linf(0.8), 10, 0.1, **run)
        work.append(sum(seen))
        right.append(mlp(x_adv).argmax(1) == y)
    handle.remove()
    assert torch.equal(*right)
    assert 0 < int(right[0].sum()) < 256
    assert work[1] < 0.9 * work[0]


def test_stopping_early_when_all_are_wrong_at_once(mlp, digits):
    x, _ = digits()
    y = (mlp(x).argmax(1) + 1) % 4
    x_adv = attacks.pgd(mlp, x, y, Linf(0.0), 3, 0.1, 2, stop_when_wrong=True)
    assert torch.equal(x_adv, x)


@pytest.mark.parametrize("limit", [Linf(0.05), L2(0.3), Linf(0.0), Linf(0.1, (-1.0, 1.0))])
def test_result_is_inside(convnet, images, attack, limit):
    x, y = images()
    x = (x * limit.span + limit.bounds[0]).clamp(*limit.bounds)
    x_adv = attack(convnet, x, y, limit)
    delta = (x_adv - x).flatten(1)
    size = delta.abs().amax() if isinstance(limit, Linf) else delta.double().norm(dim=1).amax()
    assert bool(size <= torch.tensor(limit.eps, dtype=size.dtype))
    assert limit.bounds[0] <= float(x_adv.min())
    assert float(x_adv.max()) <= limit.bounds[1]
    assert bool(delta.any()) == (limit.eps > 0)


def test_random_noise_is_worst_of_its_draws(mlp, digits):
    x, y = digits(32)
    values = []
    for samples in (1, 4, 16):
        torch.manual_seed(0)
        x_adv = attacks.random_noise(mlp, x, y, Linf(0.3), samples)
        values.append(losses.margin(mlp(x_adv), y).detach())
    assert bool((values[1] >= values[0] - 1e-6).all())
    assert bool((values[2] >= values[1] - 1e-6).all())
    assert float((values[2] - values[0]).max()) > 0.01


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("pgd", {"steps": 0, "step_size": 0.1}, "steps 0"),
        ("pgd", {"steps": 1, "step_size": 0.1, "restarts": 0}, "restarts 0"),
        ("pgd", {"steps": 1, "step_size": -0.1}, "step_size -0.1"),
        ("pgd", {"steps": 1, "step_size": float("nan")}, "step_size nan"),
        ("pgd", {"steps": 1, "step_size": 0.1, "loss": "margn"}, "did you mean 'margin'"),
        ("i_fgsm", {"steps": 0}, "steps 0"),
        ("mi_fgsm", {"steps": -1}, "steps -1"),
        ("r_fgsm", {"alpha": 0.06}, "alpha 0.06"),
        ("r_fgsm", {"alpha": -0.01}, "alpha -0.01"),
        ("r_fgsm", {"alpha": float("nan")}, "alpha nan"),
        ("fgsm", {"loss": "cee"}, "did you mean 'ce'"),
        ("random_noise", {"samples": 0}, "samples 0"),
    ],
)
def test_refuses_settings(mlp, digits, threat, name, arguments, words):
    x, y = digits()
    with pytest.raises(UserError, match=rf"\A.*{words}.*\Z"):
        getattr(attacks, name)(mlp, x, y, threat, **arguments)


def test_attacks_in_turn_see_only_what_is_left():
    """Images 0 to 1 in eighths; Peak is misled near 0.57 only, or by NaN."""
    x, y = torch.arange(4.0).view(4, 1) / 8, torch.zeros(4, dtype=torch.int64)
    seen = []

    def sends(value, to):
        def attack(images, labels):
            seen.append((images * 8).flatten().int().tolist())
            assert len(labels) == len(images)
            return torch.where(images * 8 == value, torch.tensor(to), images)

        return attack

    tries = [sends(1, 0.57), sends(2, 0.9), sends(0, 0.57), sends(2, float("nan")), sends(3, 0.57)]
    x_adv = outcomes.in_turn(Peak(), x, y, [*tries, sends(3, 0.57)])
    assert seen == [[0, 1, 2, 3], [0, 2, 3], [0, 2, 3], [2, 3], [3]]
    expected = torch.tensor([[0.57], [0.57], [float("nan")], [0.57]])
    torch.testing.assert_close(x_adv, expected, equal_nan=True)


def test_attacks_in_turn_return_the_last_point_where_none_succeeds():
    """A random model may be wrong there in the next pass: the image itself would be another."""
    x, y = torch.tensor([[0.25]]), torch.zeros(1, dtype=torch.int64)
    assert outcomes.in_turn(Peak(), x, y, [lambda x, _: x + 0.1, lambda x, _: x - 0.1]).equal(
        x - 0.1
    )


def test_attacks_in_turn_are_decided_in_float32():
    """A point that only bf16 takes for wrong is not done: the next attack gets it."""
    net, seen = nn.Linear(1, 2, bias=False), []
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0], [1.001]]))  # alike in bf16, and argmax takes 0

    def keep(x, _):
        seen.append(len(x))
        return x

    x, y = torch.ones(3, 1), torch.ones(3, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        assert net(x).argmax(1).tolist() == [0, 0, 0]
        outcomes.in_turn(net, x, y, [keep, keep])
    assert seen == [3, 3]


class Hair(nn.Module):
    """Of (1, 0.125) bf16 sees class 0 in front by a hair, float32 class 1; 0 gains with pixel 2."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        with torch.no_grad():
            self.layer.weight.copy_(torch.tensor([[1.0, 1.0], [1.0038, 0.0]]))
            self.layer.bias.copy_(torch.tensor([-0.25, -0.1285]))

    def forward(self, x):
        return self.layer(x)


def test_a_hair_in_bf16_is_no_reason_to_stop():
    net, y = Hair(), torch.ones(2, dtype=torch.int64)
    x = torch.tensor([[1.0, 0.125]]).repeat(2, 1)
    assert net(x).argmax(1).tolist() == [1, 1]
    with torch.autocast("cpu", torch.bfloat16):
        assert net(x).argmax(1).tolist() == [0, 0]
        run = {"start_radius": 0.0, "stop_when_wrong": True}
        x_adv = attacks.pgd(net, x, y, Linf(0.1), 3, 0.04, **run)
    assert net(x_adv).argmax(1).tolist() == [0, 0]


class Cracked(nn.Module):
    """Its gradient is NaN in the first pixel, on which the network does not look."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        first = x.flatten(1)[:, :1]
        return self.net(x) + 0 * (first - first.detach()).sqrt()


@pytest.mark.parametrize("threat", [Linf(0.3), L2(1.0)])  # the sign of NaN may be 0, its norm not
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fgsm", {}),
        ("r_fgsm", {}),
        *(("pgd", {"steps": 5, "stop_when_wrong": stop}) for stop in (False, True)),
    ],
)
def test_a_nan_gradient_in_a_pixel_costs_no_strength(mlp, digits, name, options, threat):
    x, _ = digits(64)
    with torch.no_grad():
        mlp[1].weight[:, 0] = 0
    y = mlp(x).argmax(1)
    broken = []
    for model in (mlp, Cracked(mlp)):
        torch.manual_seed(1)
        x_adv = getattr(attacks, name)(model, x, y, threat, **options)
        assert bool(x_adv.isfinite().all())
        broken.append(mlp(x_adv).argmax(1) != y)
    assert torch.equal(*broken)
    assert bool(broken[0].any())


class Slow(ascent.Best):
    """Takes points as one would write it first: by booleans, for each of which a GPU is awaited."""

    def offer(self, rows, x_adv, logits):
        values = self.objective(logits, self.y[rows]).to(self.values.dtype)
        wrong = outcomes.misclassified(logits, self.y[rows])
        was_wrong = self.wrong[rows]
        better = (wrong & ~was_wrong) | ((wrong == was_wrong) & (values > self.values[rows]))
        taken = rows[better]
        self.x_adv[taken], self.values[taken] = x_adv[better], values[better]
        self.wrong[rows] = was_wrong | wrong
        self.first_wrong[rows[wrong & ~was_wrong]] = self.offers
        self.offers += 1
        if self.stop_when_wrong:
            self.done[rows] |= wrong  # in float64 nothing is wrong by a hair


@pytest.mark.parametrize("padding", [-1e9, float("-inf")])
@pytest.mark.parametrize("slack", [0.0, 0.01])
def test_a_class_that_is_left_out_does_not_keep_an_image_under_attack(slack, padding):
    """Clearly wrong is a matter of the two classes that count."""
    x, y = torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64)
    best = ascent.Best(x, y, losses.log_odds, stop_when_wrong=True)
    best.slack = slack
    logits = torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 1.001]])
    best.offer(best.rows(), x, torch.cat([logits, torch.full((3, 1), padding)], 1))
    assert best.wrong.tolist() == [True, False, True]
    assert best.done.tolist() == [True, False, slack == 0]


class Anew:
    """A threat model that keeps nothing from step to step."""

    def __init__(self, threat):
        self.threat = threat

    def around(self, x):
        return lambda x_adv: self.threat.project(x_adv, x)

    def __getattr__(self, name):
        return getattr(self.threat, name)


@pytest.mark.parametrize("threat", [Linf(0.3), L2(1.0)])
@pytest.mark.parametrize("decay", [None, 0.9])
@pytest.mark.parametrize("stop", [False, True])
def test_a_search_finds_what_the_plain_way_finds(mlp, digits, stop, decay, threat):
    x, _ = digits(200)
    y = mlp(x).argmax(1)
    found = []
    for kind, limit in ((ascent.Best, threat), (Slow, Anew(threat))):
        torch.manual_seed(3)
        best = kind(x, y, losses.log_odds, stop_when_wrong=stop)
        climber = ascent.Ascent(limit, 7, threat.eps / 4, decay=decay)
        with attacking(mlp) as inner:
            for _ in range(2):
                climber.search(inner, best)
        found.append((best.x_adv, best.values, best.wrong, best.first_wrong, best.done))
    for mine, plain in zip(*found, strict=True):
        assert torch.equal(mine, plain)
    assert 0 < int(found[0][2].sum()) < 200
    assert len(found[0][3].unique()) > 3


class Waits(TorchDispatchMode):
    """Notes the operations for which a GPU's host would wait."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name.strip("_").startswith("index") and len(args) > 1 else []
        by_flags = any(i is not None and i.dtype == torch.bool for i in indices)
        if by_flags or name in ("nonzero", "_local_scalar_dense", "masked_select"):
            self.seen.append(name)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("stop", [False, True])
def test_nothing_waits_for_the_device_where_points_are_taken(mlp, digits, stop):
    x, y = digits(64)
    best = ascent.Best(x, y, losses.log_odds, stop_when_wrong=stop)
    rows = best.rows()
    for kind, waits in ((ascent.Best, False), (Slow, True)):
        with Waits() as waited, torch.no_grad():
            kind.offer(best, rows, x, mlp(x))
        assert bool(waited.seen) == waits


def test_a_step_of_a_search_waits_once_and_only_to_stop_early(mlp, digits):
    x, y = digits(64)
    for stop, each in ((False, 0), (True, 1)):
        counts = []
        for steps in (3, 5):
            with attacking(mlp) as inner, Waits() as waited:
                best = ascent.Best(x, y, losses.log_odds, stop_when_wrong=stop)
                ascent.Ascent(Linf(1e-4), steps, 1e-5).search(inner, best)
            counts.append(len(waited.seen))
        assert counts[1] - counts[0] == 2 * each


def test_on_a_random_model_the_climb_goes_on(monkeypatch):
    """At the first lucky draw it would end where the next draw is right."""

    class Noisy(nn.Module):
        def forward(self, x):
            z = x.flatten(1).mean(1, keepdim=True) - 0.9 + 0.5 * torch.randn(len(x), 1)
            return torch.cat([-z, z], 1)

    def reached():
        torch.manual_seed(0)
        x, y = torch.full((200, 1, 4, 4), 0.5), torch.zeros(200, dtype=torch.int64)
        options = {"start_radius": 0.0, "stop_when_wrong": True}
        return float(attacks.pgd(Noisy(), x, y, Linf(0.3), 10, 0.06, **options).mean())

    whole = reached()
    monkeypatch.setattr("surestep.attacks.white_box.varies", lambda *_: False)
    assert reached() < whole - 0.05
