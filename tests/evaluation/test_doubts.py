"""An evaluation says by itself where its worst case may be too high."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import surestep
from surestep.errors import SurestepWarning, UserError
from surestep.evaluation import _doubts, evaluate

THREAT = surestep.Linf(0.05)


class Changed(nn.Module):
    """The network with something before or after it."""

    def __init__(self, net: nn.Module, before: Callable[[Tensor], Tensor], after=lambda z: z):
        super().__init__()
        self.net, self.before, self.after = net, before, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.net(self.before(x)))


def flat_where_dark(x: Tensor) -> Tensor:
    """Stop the gradient of images whose first pixel is below a tenth."""
    return torch.where(x[:, :, :1, :1] < 0.1, x.detach(), x)


SIGNS = {
    "random": (lambda x: x + 0.01 * torch.randn_like(x), lambda z: z, "the model is random"),
    "sure": (lambda x: x, lambda z: z.softmax(1), "it returns probabilities"),
    "quantised": (lambda x: (x * 50).round() / 50, lambda z: z, "no gradient reaches 100% of"),
    "detached": (lambda x: x.detach(), lambda z: z, "no gradient reaches 100% of"),
    "nan": (lambda x: x + 0 * (x - x).sqrt(), lambda z: z, "no gradient reaches 100% of"),
}


@pytest.mark.parametrize("sign", SIGNS)
def test_of_a_model(net, images, sign):
    before, after, said = SIGNS[sign]
    with pytest.warns(SurestepWarning, match="may be too high") as told:
        found = evaluate(Changed(net, before, after), images, THREAT, ["noise-3"])
    assert len(found.doubts) == 1
    assert found.doubts[0].startswith(said)
    assert len(told) == 1
    assert found.doubts[0] in str(told[0].message)
    assert f"{found.worst_case_accuracy:.1%}" in str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet = evaluate(
            Changed(net, before, after), images, THREAT, ["noise-3"], doubt=False, eps=[0.02]
        )
    assert quiet.doubts == []
    assert quiet.robust_accuracy == found.robust_accuracy


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
    found = _doubts.of_model(Changed(net, flat_where_dark), x, y, surestep.Linf(0.0))
    assert found == ([f"no gradient reaches {share:.0%} of 100 images looked at"] if said else [])


def left(*broken: range) -> Tensor:
    right = torch.ones(1000, dtype=torch.bool)
    for some in broken:
        right[list(some)] = False
    return right


FEWER = ["one step breaks more images than many"]


@pytest.mark.parametrize(
    ("right", "square", "said"),
    [
        ({"fgsm": left(range(100)), "pgd-9": left(range(300))}, None, []),
        ({"fgsm": left(range(104)), "pgd-9": left(range(100))}, None, []),
        ({"fgsm": left(range(105)), "pgd-9": left(range(100))}, None, FEWER),
        # The best of those of one step, and of many.
        (
            {
                **{"fgsm": left(range(9)), "r-fgsm": left(range(20))},
                **{"pgd-9": left(range(9)), "i-fgsm-3": left(range(12))},
            },
            None,
            FEWER,
        ),
        # Nobody says that FGSM finds all there is.
        ({"fgsm": left(range(5)), "noise-3": left(range(90))}, None, []),
        (
            {"pgd-9": left(range(100)), "noise-3": left(range(98, 103))},
            None,
            ["noise-3 breaks 3 images that gradients do not"],
        ),
        ({"pgd-9": left(range(100)), "noise-3": left(range(98, 102))}, None, []),
        # Together with FGSM none is left that only random points break.
        (
            {"pgd-9": left(range(9)), "fgsm": left(range(9, 12)), "noise-3": left(range(12))},
            None,
            [],
        ),
        ({"pgd-9": left(range(100)), "square-20": left(range(90, 120))}, None, []),
        (
            {"pgd-9": left(range(100)), "square-20": left(range(90, 121))},
            None,
            ["square-20 breaks 21 images that gradients do not"],
        ),
        (
            {"pgd-9": left(range(100)), "transfer": left(range(200))},
            None,
            ["transfer breaks 100 images that gradients do not"],
        ),
        ({"pgd-9": left(range(100))}, 20, []),
        ({}, 21, ["autoattack's square breaks 21 images that gradients do not"]),
    ],
)
def test_of_results(right, square, said):
    kinds = {name: surestep.evaluation.suite.gradients(name) for name in right}
    assert _doubts.of_results({"clean": left(), **right}, kinds, square) == said


def test_what_attacks_left_is_looked_at(told, monkeypatch):
    """The whole way, with attacks that break what they are told to."""
    x = torch.stack([torch.zeros(1000), torch.arange(1000) / 1000], 1)
    y = torch.zeros(1000, dtype=torch.int64)
    monkeypatch.setattr(_doubts, "of_model", lambda *_, **__: [])
    model = told(**{"fgsm": set(range(105)), "pgd-9": set(range(100)), "noise-3": {500, 501, 502}})
    with pytest.warns(SurestepWarning):
        found = evaluate(model, (x, y), surestep.Linf(0.2), ["fgsm", "pgd-9", "noise-3"])
    assert found.doubts == [*FEWER, "noise-3 breaks 3 images that gradients do not"]


def test_sources(net, images):
    x, _ = images
    good = nn.Sequential(net)
    upside_down = Changed(net, lambda z: 1 - 3 * z)  # as one that wants normalised images
    assert _doubts.of_sources([good], x, net.eval()(x).argmax(1)) == []
    with pytest.warns(SurestepWarning, match="source 2 of the transfer attack is right on"):
        evaluate(net, images, THREAT, ["transfer"], sources=[good, upside_down])


def test_a_source_that_fails(net, images):
    narrow = nn.Sequential(nn.Flatten(), nn.Linear(3, 3))
    for doubt in (True, False):
        with pytest.raises(UserError, match="the model fails on one batch of shape"):
            evaluate(net, images, THREAT, ["transfer"], sources=[narrow], doubt=doubt)


def test_the_random_state_is_left_alone(net, images):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    _doubts.of_model(net.eval(), *images, THREAT)
    assert torch.equal(torch.get_rng_state(), before)
