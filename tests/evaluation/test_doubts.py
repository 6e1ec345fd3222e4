"""An evaluation says by itself where its worst case may be too high."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import surestep
from surestep.attacks.outcomes import logit_distance
from surestep.errors import SurestepWarning, UserError
from surestep.evaluation import Adapted, doubts, evaluate, suite
from surestep.evaluation.suite import Attack

THREAT = surestep.Linf(0.05)


def parsed(*names: str) -> list[Attack]:
    return [suite.parse(name, THREAT, [nn.Identity()]) for name in names]


class Changed(nn.Module):
    """The network with something before or after it."""

    def __init__(self, net: nn.Module, before: Callable[[Tensor], Tensor], after=lambda z: z):
        super().__init__()
        self.net, self.before, self.after = net, before, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.net(self.before(x)))


def flat_where_dark(x: Tensor, limit: float = 0.1) -> Tensor:
    """Stop the gradient of images whose first pixel is dark."""
    return torch.where(x[:, :, :1, :1] < limit, x.detach(), x)


def nan_where_dark(x: Tensor) -> Tensor:
    """The root of a dark pixel has no gradient: there, and nowhere else, it is NaN."""
    return torch.where(x > 0.3, x.sub(0.3).sqrt().square() + 0.3, x)


BLIND = "no gradient reaches 80 of 80 images looked at"
SIGNS = {
    "random": (lambda x: x + 0.01 * torch.randn_like(x), lambda z: z, "the model is random"),
    "sure": (lambda x: x, lambda z: z.softmax(1), "it returns probabilities"),
    "quantised": (lambda x: (x * 50).round() / 50, lambda z: z, BLIND),
    "nan": (lambda x: x + 0 * (x - x).sqrt(), lambda z: z, BLIND),
    "nan in places": (nan_where_dark, lambda z: z, "no gradient reaches "),
}


@pytest.mark.parametrize("sign", SIGNS)
def test_of_a_model(net, images, sign):
    before, after, said = SIGNS[sign]
    model = Changed(net, before, after)
    with pytest.warns(SurestepWarning, match="may be too high") as told:
        found = evaluate(model, images, THREAT, ["fgsm"])
    assert len(found.doubts) == 1
    assert found.doubts[0].startswith(said)
    assert len(told) == 1
    assert found.doubts[0] in str(told[0].message)
    assert f"{found.worst_case_accuracy:.1%}" in str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet = evaluate(model, images, THREAT, ["fgsm"], doubt=False, eps=[0.02])
    assert quiet.doubts is None
    assert quiet.robust_accuracy == found.robust_accuracy


def test_gradients_matter_where_an_attack_follows_them(net, images):
    for before in (lambda x: (x * 50).round() / 50, lambda x: x.detach()):
        model = Changed(net, before)
        assert evaluate(model, images, THREAT, ["noise-3", "square-20"]).doubts == []
        own = {"own": Attack(lambda model, x, y: x)}
        assert evaluate(model, images, THREAT, own).doubts == []


BATCH = ["an image's logits depend on the other images of its batch"]


class Hidden(nn.Module):
    """The network in a list: nobody switches it to eval mode."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.nets = [nn.Sequential(*(m for m in net.train() if not isinstance(m, nn.Dropout)))]

    def forward(self, x: Tensor) -> Tensor:
        return self.nets[0](x)


@pytest.mark.parametrize("batch_size", [2, 7, 90])
@pytest.mark.parametrize(
    "make",
    [
        Hidden,
        lambda net: Changed(net, lambda x: x, lambda z: z - z.mean(0)),
        lambda net: Changed(net, lambda x: x - x.mean(0)),
    ],
)
def test_batches_matter(net, images, make, batch_size):
    for attacks in (["fgsm"], ["noise-3"]):
        with pytest.warns(SurestepWarning):
            found = evaluate(make(net), images, THREAT, attacks, batch_size=batch_size)
        assert found.doubts == BATCH


def test_images_alone_have_no_batch(net, images):
    model = Changed(net, lambda x: x - 0.1 * x.mean(0))
    assert evaluate(model, images, THREAT, ["fgsm"], batch_size=1).doubts == []


def test_another_function_where_gradients_are_on(net, images):
    model = Changed(net, lambda x: 1 - x if x.requires_grad else x)
    with pytest.warns(SurestepWarning, match="differently when gradients are on"):
        found = evaluate(model, images, THREAT, ["fgsm"])
    assert found.doubts == [doubts.OTHER_WITH_GRADIENTS]
    assert evaluate(model, images, THREAT, ["noise-3"]).doubts == []


SEEDING = {
    "torch": lambda x: torch.manual_seed(0),
    "numpy": lambda x: np.random.seed(0),  # noqa: NPY002
    "python": lambda x: random.seed(0),
    # Another seed for each image, and the same at each pass.
    "of the image": lambda x: torch.manual_seed(int(1e6 * x.sum())),
}


@pytest.mark.parametrize("seeding", SEEDING)
def test_a_model_that_seeds_weakens_no_attack(net, images, seeding):
    """Its passes would set the attacks' random numbers back: each point would be the same."""

    def before(x):
        SEEDING[seeding](x)
        return x

    names = ["noise-20", "pgd-3x3", "square-60", "transfer"]
    sound = evaluate(net, images, THREAT, names, doubt=False)
    with pytest.warns(SurestepWarning, match="may be too high"):
        found = evaluate(Changed(net, before), images, THREAT, names)
    assert found.robust_accuracy == sound.robust_accuracy
    assert all(found.right[name].equal(sound.right[name]) for name in names)
    kind = "torch" if seeding == "of the image" else seeding
    (said,) = (doubt for doubt in found.doubts if "seeds" in doubt)
    assert said.startswith(f"its forward seeds the random generator of {kind}, so what it draws")


def test_what_a_model_draws_without_seeding_stays_random(net, images):
    """It seeds one generator and draws from another, too."""

    def before(x):
        torch.manual_seed(0)
        return x + 0.1 * random.random()

    model = Adapted(Changed(net, before)).eval()
    x = images[0]
    state, first = torch.get_rng_state(), model(x)
    assert torch.get_rng_state().equal(state)
    assert model.seeds == ("torch",)
    assert not model(x).equal(first)
    draws = Adapted(Changed(net, lambda x: x + torch.rand_like(x)))
    draws.train()(x)
    assert draws.seeds is None  # a look would count in the statistics of batch norm
    draws.eval()(x)
    assert draws.seeds == ()


def test_a_sound_model_costs_two_passes_and_the_gradients(net, images):
    x, calls = images[0], []
    net.eval().register_forward_hook(lambda _m, args, _o: calls.append(len(args[0])))
    assert doubts.of_model(net, x, net(x).argmax(1), THREAT, parsed("noise-3"), 500) == []
    assert calls == [90, 90, 45, 45]
    calls.clear()
    assert doubts.of_model(net, x, net(x).argmax(1), THREAT, parsed("fgsm"), 500) == []
    assert calls == [90, 90, 45, 45, 90, 90]


def test_half_of_the_digits_is_no_other_answer(net, images):
    net = net.eval().bfloat16()
    assert doubts.rounding_of(net) > doubts.rounding_of(net.float())
    x = images[0]
    out = net(x)
    assert not doubts.differ_on_many(out, 1.005 * out, doubts.rounding_of(net))
    assert doubts.differ_on_many(out, 1.02 * out, doubts.rounding_of(net))
    assert doubts.differ_on_many(out, out.flip(1), 9.0)
    gone = out.clone()
    gone[:2] = math.nan
    assert not doubts.differ_on_many(out, gone, 0.1)  # two images say nothing
    gone[:3] = math.nan
    assert doubts.differ_on_many(out, gone, 0.1)


def test_a_model_that_wants_no_gradient_can_be_judged(net, images):
    """As one that runs elsewhere, and takes arrays."""

    class Elsewhere(nn.Module):
        def forward(self, x):
            with torch.no_grad():
                return net.eval()(torch.from_numpy(x.numpy()))

    assert evaluate(Elsewhere(), images, THREAT, ["noise-3"]).doubts == []


@pytest.mark.parametrize("batch_size", [1, 7, 90])
def test_they_do_not_depend_on_the_batch_size(net, images, batch_size):
    model = Changed(net, lambda x: (x * 50).round() / 50)
    with pytest.warns(SurestepWarning):
        assert evaluate(model, images, THREAT, ["fgsm"], batch_size=batch_size).doubts == [BLIND]
    x, y = images
    # Of two images nothing is said.
    assert evaluate(model, (x[1:3], y[1:3]), THREAT, ["fgsm"]).doubts == []


def test_where_nothing_is_left_nothing_is_too_high(net, images):
    model = Changed(net, lambda x: x, lambda z: (9 * z).softmax(1))
    found = evaluate(model, images, surestep.Linf(0.9), ["pgd-20", "pgd-20-margin"])
    assert found.worst_case_accuracy == 0
    assert found.doubts == [SIGNS["sure"][2] + ", whose gradients vanish where it is sure"]


def test_classes_that_are_left_out_are_no_chance():
    out = torch.tensor([[1.0, 2.0, -math.inf], [math.nan, 1.0, 0.0]])
    assert logit_distance(out, out.clone()) == 0
    assert logit_distance(out, out.roll(1, 1)) == math.inf
    # What is left may differ all the same.
    assert doubts.differing_rows(out, out * torch.tensor([2.0, 2.0, 1.0]), 0.01).all()
    assert not doubts.differing_rows(out, out.clone(), 0.01).any()


def test_a_stop_changes_no_doubt(net, images, tmp_path):
    """What begins at random begins where it did: the model is flat there, on some images."""

    def flat_off_the_grid(x):
        return torch.where((10 * x[:, :, :1, :1]).frac().sub(0.4).abs() < 0.2, x.detach(), x)

    model, state = Changed(net, flat_off_the_grid), tmp_path / "state"
    x = (images[0] * 10).round() / 10
    data = x, net.eval()(x).argmax(1)
    with pytest.warns(SurestepWarning):
        found = [evaluate(model, data, THREAT, ["pgd-3"], state=state) for _ in range(2)]
    with pytest.warns(SurestepWarning):
        other = [evaluate(model, data, THREAT, ["pgd-3"], seed=k) for k in range(1, 6)]
    assert found[0].doubts == found[1].doubts != []
    assert len({doubt for one in other for doubt in one.doubts}) > 1


def test_images_of_different_sizes(images):
    """As a loader may give them, one batch each."""
    net = nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(9, 3)).eval()
    x, _ = images
    batches = [x[:40], x[40:, :, :6, :6]]
    data = [(z, net(z).argmax(1)) for z in batches]
    loader = DataLoader(data, batch_size=None)
    assert evaluate(net, loader, THREAT, ["fgsm"]).doubts == []


def test_an_own_attack_may_be_called_as_it_likes(net, images):
    own = {name: Attack(lambda model, x, y: x) for name in ("pgd", "i-fgsm-margin", "square")}
    assert evaluate(net, images, THREAT, own).doubts == []
    hidden = Changed(net, lambda x: x.detach())
    assert evaluate(hidden, images, THREAT, {"fgsm": Attack(lambda model, x, y: x)}).doubts == []


def test_none_of_a_sound_one(net, images):
    found = evaluate(net, images, THREAT, ["fgsm", "noise-3", "pgd-5", "square-20"])
    assert found.doubts == []
    assert found.to_dict()["doubts"] == []
    assert found.precision == "float32"


@pytest.mark.parametrize(("share", "said"), [(0.01, False), (0.2, True)])
def test_a_few_images_without_a_gradient_are_none(net, share, said):
    x = torch.rand(100, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    x[:, 0, 0, 0] = 0.5
    x[: round(100 * share), 0, 0, 0] = 0.0
    y = net.eval()(x).argmax(1)
    # Radius 0: at a random start, too, the images that were dark are.
    model, still = Changed(net, flat_where_dark), surestep.Linf(0.0)
    found = doubts.of_model(model, x, y, still, parsed("fgsm"), 9)
    assert found == (["no gradient reaches 20 of 100 images looked at"] if said else [])


def left(*broken: range) -> Tensor:
    right = torch.ones(1000, dtype=torch.bool)
    for some in broken:
        right[list(some)] = False
    return right


FEWER = ["one step breaks more images than many"]


@pytest.mark.parametrize(
    ("right", "square", "said"),
    [
        ({"fgsm": left(range(100)), "pgd-99": left(range(300))}, None, []),
        ({"fgsm": left(range(105)), "pgd-99": left(range(100))}, None, []),
        ({"fgsm": left(range(106)), "pgd-99": left(range(100))}, None, FEWER),
        # Of few steps nobody says that they find more.
        ({"fgsm": left(range(106)), "pgd-9": left(range(100))}, None, []),
        ({"fgsm": left(range(106)), "pgd-1": left(range(100))}, None, []),
        ({"fgsm": left(range(106)), "fab-t": left(range(100))}, None, []),
        # The best of those of one step, and of many.
        (
            {
                **{"fgsm": left(range(9)), "r-fgsm": left(range(20))},
                **{"pgd-99": left(range(9)), "i-fgsm-30": left(range(12))},
            },
            None,
            FEWER,
        ),
        # Nobody says that FGSM finds all there is.
        ({"fgsm": left(range(5)), "noise-3": left(range(90))}, None, []),
        (
            {"pgd-99": left(range(100)), "noise-3": left(range(98, 103))},
            None,
            ["noise-3 breaks 3 images that gradients do not"],
        ),
        ({"pgd-99": left(range(100)), "noise-3": left(range(98, 102))}, None, []),
        # Together with fewer steps none is left that only random points break.
        (
            {"pgd-99": left(range(9)), "pgd-5": left(range(9, 12)), "noise-3": left(range(12))},
            None,
            [],
        ),
        ({"pgd-99": left(range(100)), "square-20": left(range(90, 120))}, None, []),
        (
            {"pgd-99": left(range(100)), "square-20": left(range(90, 121))},
            None,
            ["square-20 breaks 21 images that gradients do not"],
        ),
        (
            {"pgd-99": left(range(100)), "transfer": left(range(200))},
            None,
            ["transfer breaks 100 images that gradients do not"],
        ),
        # Of few steps that is said, too, and of others that follow gradients.
        (
            {"fgsm": left(range(9)), "pgd-7": left(range(99)), "noise-3": left(range(102))},
            None,
            ["noise-3 breaks 3 images that gradients do not"],
        ),
        ({"fab-t": left(range(100)), "square-20": left(range(50, 120))}, None, []),
        ({"fab-t": left(range(100)), "pgd-9": left(range(9)), "square": left(range(90))}, None, []),
        ({"pgd-99": left(range(100))}, 20, []),
        ({}, 21, ["autoattack's square breaks 21 images that gradients do not"]),
    ],
)
def test_of_results(right, square, said):
    attacks = dict(zip(right, parsed(*right), strict=True))
    assert doubts.of_results({"clean": left(), **right}, attacks, square) == said


def test_what_attacks_left_is_looked_at(told, monkeypatch):
    """The whole way, with attacks that break what they are told to."""
    x = torch.stack([torch.zeros(1000), torch.arange(1000) / 1000], 1)
    y = torch.zeros(1000, dtype=torch.int64)
    monkeypatch.setattr(doubts, "of_model", lambda *_, **__: [])
    model = told(**{"fgsm": set(range(106)), "pgd-50": set(range(100)), "noise-3": {500, 501, 502}})
    with pytest.warns(SurestepWarning):
        found = evaluate(model, (x, y), surestep.Linf(0.2), ["fgsm", "pgd-50", "noise-3"])
    assert found.doubts == [*FEWER, "noise-3 breaks 3 images that gradients do not"]


def test_square_after_the_gradients_of_autoattack_is_looked_at(told, monkeypatch):
    """And not what AutoAttack left of the others' images: no gradient broke these three."""
    x = torch.stack([torch.zeros(200), torch.arange(200) / 1000], 1)
    y = torch.zeros(200, dtype=torch.int64)
    monkeypatch.setattr(doubts, "of_model", lambda *_, **__: [])
    broken = {"pgd-50": set(range(9)), "noise-3": {196, 197, 198}, "apgd-ce": {20}}
    broken |= {"apgd-t": set(), "fab-t": set(), "square": set(range(100, 120))}
    model = told(**broken)
    made = {name: suite.parse(name, THREAT) for name in broken}
    parts = {name: made[name].run for name in ("apgd-ce", "apgd-t", "fab-t", "square")}
    whole = Attack(parts, survivors_only=True)
    given = {name: made[name] for name in ("pgd-50", "noise-3")} | {"autoattack": whole}
    with pytest.warns(SurestepWarning):
        found = evaluate(model, (x, y), surestep.Linf(0.2), given)
    assert found.doubts == [
        "autoattack's square breaks 20 images that gradients do not",
        "noise-3 breaks 3 images that gradients do not",
    ]


def test_sources(net, images):
    x, _ = images
    good = nn.Sequential(net)
    upside_down = Changed(net, lambda z: 1 - 3 * z)  # as one that wants normalised images
    assert doubts.of_sources([good], x, net.eval()(x).argmax(1), 40) == []
    with pytest.warns(SurestepWarning, match="source 2 of the transfer attack is right on"):
        evaluate(net, images, THREAT, ["transfer"], sources=[good, upside_down])


def test_a_source_that_fails(net, images):
    narrow = nn.Sequential(nn.Flatten(), nn.Linear(3, 3))
    with pytest.raises(UserError, match="the model fails on one batch of shape"):
        evaluate(net, images, THREAT, ["transfer"], sources=[narrow])
    with pytest.raises(UserError, match="the model fails on one batch of shape"):
        doubts.of_sources([narrow], *images, 40)
    # Which is not looked at where no attack asks for it.
    assert evaluate(net, images, THREAT, ["fgsm"], sources=[narrow]).doubts == []


@pytest.mark.parametrize("kind", [tuple, lambda pair: TensorDataset(*pair)])
def test_sorted_images_are_looked_at_in_every_batch(net, images, monkeypatch, kind):
    x, y = images
    order, seen = y.argsort(stable=True), []
    monkeypatch.setattr(doubts, "LOOKED_AT", 9)
    monkeypatch.setattr(doubts, "of_model", lambda m, x, y, *_: seen.extend(x) or [])
    evaluate(net, kind((x[order], y[order])), THREAT, ["fgsm"], batch_size=30)
    places = [int((x[order] == one).flatten(1).all(1).nonzero()) for one in seen]
    assert [place // 30 for place in places] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_probabilities_of_half_precision(net, images):
    model = Changed(net, lambda x: x.bfloat16(), lambda z: z.softmax(1)).bfloat16()
    with pytest.warns(SurestepWarning, match="it returns probabilities"):
        evaluate(model, images, THREAT, ["fgsm"])


def test_a_loader_of_fewer_images_than_asked_for(net, images, monkeypatch):
    seen = []
    monkeypatch.setattr(doubts, "of_model", lambda m, x, y, *_: seen.extend(x) or [])
    loader = DataLoader(TensorDataset(*images), 9)
    evaluate(net, loader, THREAT, ["fgsm"], n=10_000)
    assert len(seen) == 80  # all that are right


@pytest.mark.parametrize(
    ("attack", "looked_at"),
    [
        (Attack(lambda model, x, y: x), False),
        (Attack(lambda model, x, y: x, uses_gradient=True), True),
        *((suite.parse(name, THREAT), name != "noise-3") for name in ("pgd-2", "noise-3")),
    ],
)
def test_an_attack_says_whether_it_uses_gradients_whatever_its_name(net, images, attack, looked_at):
    model = Changed(net, lambda x: (x * 50).round() / 50)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = evaluate(model, images, THREAT, {"own": attack})
    assert found.doubts == ([BLIND] if looked_at else [])


def test_attacks_in_a_precision_that_the_model_does_not_stand(net, images):
    """Its logits overflow in float16, so that attacks there have no gradient."""
    with pytest.warns(SurestepWarning, match="answers differently in float16"):
        evaluate(
            Changed(net, lambda x: x, lambda z: 1e7 * z),
            images,
            THREAT,
            ["fgsm"],
            precision=torch.float16,
        )
    found = evaluate(net, images, THREAT, ["fgsm"], precision=torch.bfloat16)
    assert not any("bfloat16" in doubt for doubt in found.doubts)
