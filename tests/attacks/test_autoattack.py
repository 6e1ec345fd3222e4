"""AutoAttack: the authors' package, adapted."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from torch import nn

import surestep
from surestep.attacks import auto
from surestep.errors import UserError

THREAT = surestep.Linf(0.05)


@pytest.fixture
def pixels():
    """Ninety images (90, 1, 8, 8) in [0, 1]."""
    return torch.rand(90, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def breakable(net, x, y, eps):
    """Which images of a linear model in [-1, 1] have a wrong point within eps: some margin < 0."""
    w = net.weight[y][:, None] - net.weight[None]
    low, high = (x - eps).clamp(-1, 1)[:, None], (x + eps).clamp(-1, 1)[:, None]
    least = torch.where(w > 0, w * low, w * high).sum(2) + net.bias[y][:, None] - net.bias
    return (least < 0).any(1)


class TestAutoAttack:
    def test_any_shape_and_range(self, pixels):
        """Vectors in [-1, 1] are attacked like images in [0, 1]."""
        torch.manual_seed(0)
        net = nn.Linear(64, 4)
        flat = (pixels[:30] * 2 - 1).flatten(1)
        y = net(flat).argmax(1).detach()
        threat = surestep.Linf(0.05, (-1.0, 1.0))
        truth = breakable(net, flat, y, 0.05)
        assert 10 < int(truth.sum()) < 25
        state = torch.get_rng_state()
        for name, count in (("apgd_ce", 20), ("apgd_t", 20), ("fab_t", 10), ("square", 200)):
            x_adv = getattr(auto, name)(net, flat, y, threat, count)
            assert x_adv.shape == flat.shape
            assert (x_adv - flat).abs().max() <= torch.tensor(0.05)
            assert x_adv.abs().max() <= 1
            broken = net(x_adv).argmax(1) != y
            assert not (broken & ~truth).any()
            least = 0.9 if name.endswith("_t") else 0.6
            assert broken.sum() >= least * truth.sum(), name
        # The package seeds the global state; drawing one number for it each time is all it may see.
        torch.set_rng_state(state)
        torch.randint(2**31 - 1, (5,))
        expected = torch.rand(3)
        torch.set_rng_state(state)
        for _ in range(5):
            auto.square(net, flat, y, threat, 5)
        assert torch.equal(torch.rand(3), expected)

    @pytest.mark.parametrize("classes", [2, 4])
    def test_the_whole_of_it_breaks_what_can_be_broken(self, pixels, classes):
        torch.manual_seed(0)
        net = nn.Linear(64, classes)
        flat = (pixels[:20] * 2 - 1).flatten(1)
        y = net(flat).argmax(1).detach()
        x_adv = auto.autoattack(net, flat, y, surestep.Linf(0.1, (-1.0, 1.0)))
        truth, broken = breakable(net, flat, y, 0.1), net(x_adv).argmax(1) != y
        assert not (broken & ~truth).any()
        assert broken.sum() >= 0.95 * truth.sum() > 0

    def test_with_three_classes_the_margin_is_climbed(self, pixels):
        """The targeted DLR loss does not exist there; cross entropy breaks 28 of these 32."""
        torch.manual_seed(0)
        net = nn.Linear(64, 3)
        flat = (pixels[:45] * 2 - 1).flatten(1)
        y = net(flat).argmax(1).detach()
        x_adv = auto.apgd_t(net, flat, y, surestep.Linf(0.07, (-1.0, 1.0)), 10)
        truth = breakable(net, flat, y, 0.07)
        assert int(truth.sum()) == 32
        assert torch.equal(net(x_adv).argmax(1) != y, truth)

    def test_missing_package(self, net, pixels, monkeypatch):
        monkeypatch.setitem(sys.modules, "pyautoattack", None)
        with pytest.raises(UserError, match="pip install 'pyautoattack'"):
            auto.square(net, pixels, torch.zeros(90, dtype=torch.int64), THREAT, 5)

    def test_eps_zero(self, net, pixels):
        x_adv = auto.autoattack(net, pixels, torch.zeros(90, dtype=torch.int64), surestep.Linf(0.0))
        assert torch.equal(x_adv, pixels)

    @pytest.mark.parametrize("part", ["apgd_ce", "apgd_t", "fab_t", "autoattack", "square"])
    def test_no_input_gradient(self, pixels, part):
        """A line instead of the package's traceback; Square asks for no gradient."""

        class Detached(nn.Linear):
            def forward(self, x):
                return super().forward(x.detach().flatten(1))

        torch.manual_seed(0)
        net = Detached(64, 4)
        y = net(pixels).argmax(1)
        attack = getattr(auto, part)
        if part == "square":
            assert (net(attack(net, pixels, y, surestep.Linf(0.2), 200)).argmax(1) != y).any()
        else:
            with pytest.raises(UserError, match="no gradient with respect to its input"):
                attack(net, pixels, y, surestep.Linf(0.2))


def test_autoattack_is_its_four_parts_on_what_is_left(monkeypatch):
    seen = []

    def spy(name):
        def part(model, x, y, threat):
            seen.append((name, len(x)))
            found = x.clone()
            found[0] = 0.8  # breaks the first of those left
            return found

        return part

    class Half(nn.Module):
        def forward(self, x):
            return torch.cat([0.5 - x, x - 0.5], 1)

    parts = ("apgd-ce", "apgd-t", "fab-t", "square")
    for name in parts:
        monkeypatch.setitem(auto.PARTS, name, spy(name))
    x, y = torch.full((5, 1), 0.2), torch.zeros(5, dtype=torch.int64)
    x_adv = auto.autoattack(Half(), x, y, surestep.Linf(0.7))
    assert seen == list(zip(parts, (5, 4, 3, 2), strict=True))
    assert Half()(x_adv).argmax(1).tolist() == [1, 1, 1, 1, 0]


def test_autoattack_is_as_strong_as_the_standard_version(net, pixels, monkeypatch):
    from pyautoattack import AutoAttack, autopgd_base, fab_pt, square

    standard = AutoAttack(net, eps=0.05, version="standard")
    assert standard.attacks_to_run == ["apgd-ce", "apgd-t", "fab-t", "square"]
    made = []

    def spy(self, x, y):
        made.append(self)
        return x  # everything is left to the next part

    for room, name in (
        (autopgd_base, "APGDAttack"),
        (autopgd_base, "APGDAttack_targeted"),
        (fab_pt, "FABAttack_PT"),
        (square, "SquareAttack"),
    ):
        monkeypatch.setattr(getattr(room, name), "perturb", spy)
    x = pixels[:4]
    ten = nn.Sequential(nn.Flatten(), nn.Linear(64, 12))  # targets are nine at most
    auto.autoattack(ten, x, ten(x).argmax(1), THREAT)
    standard.fab.targeted = True  # as it sets for fab-t when it runs
    theirs = (standard.apgd, standard.apgd_targeted, standard.fab, standard.square)
    for ours, known in zip(made, theirs, strict=True):
        for name, value in vars(known).items():
            if type(value) in (int, float, bool, str) and name not in ("device", "seed"):
                assert getattr(ours, name) == value, (type(known), name)
        assert ours.n_restarts == 1


@pytest.mark.parametrize("part", ["apgd_ce", "apgd_t", "fab_t", "square"])
@pytest.mark.parametrize("threat", [surestep.Linf(0.1), surestep.L2(0.5)])
def test_autoattack_on_logits_in_float64(part, threat, pixels):
    class Doubles(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Linear(64, 5).double()

        def forward(self, x):
            return self.net(x.flatten(1).double())

    model, x = Doubles(), pixels
    y = model(x).argmax(1)
    x_adv = getattr(auto, part)(model, x, y, threat, 5)
    assert x_adv.dtype == torch.float32
    assert (model(x_adv).argmax(1) != y).any()


@pytest.mark.parametrize("threat", [surestep.Linf(0.1), surestep.L2(0.5)])
def test_square_moves_squares_of_images_without_a_channel(threat, pixels):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    x = pixels[:, 0]
    y = net(x).argmax(1)
    torch.manual_seed(1)
    flat = auto.square(net, x, y, threat, 30)
    torch.manual_seed(1)
    whole = auto.square(net, x[:, None], y, threat, 30)
    assert torch.equal(flat, whole[:, 0])


@pytest.mark.parametrize("part", auto.PARTS)
def test_it_decides_in_float32(pixels, part, autocast_at_logits):
    """The package leaves a point that is wrong, be it by a hair of bf16's."""
    seen = autocast_at_logits(auto)
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), pixels[:8]
    with torch.autocast("cpu", torch.bfloat16):
        auto.PARTS[part](net, x, net(x).argmax(1), THREAT, 3)
    assert seen
    assert not any(seen)


@pytest.mark.parametrize("part", auto.PARTS)
def test_images_that_lie_in_memory_with_the_channels_last(part, threat_of_color):
    x = torch.rand(6, 8, 8, 3, generator=torch.Generator().manual_seed(0)).permute(0, 3, 1, 2)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    found = []
    for images in (x, x.contiguous()):
        torch.manual_seed(1)
        run = auto.PARTS[part]
        found.append(run(net, images, net(x).argmax(1), threat_of_color, 3))
    assert torch.equal(*found)


@pytest.fixture(params=[surestep.Linf(0.05), surestep.L2(0.5)])
def threat_of_color(request):
    return request.param


@pytest.mark.parametrize(
    ("part", "kind"), [("apgd-ce", "APGDAttack"), ("apgd-t", "APGDAttack_targeted")]
)
def test_points_hold_on_to_no_graph(pixels, part, kind, monkeypatch):
    """With gradients on throughout, APGD's best points kept those of all iterations in memory."""
    attack = getattr(importlib.import_module("pyautoattack.autopgd_base"), kind)
    perturb, made = attack.perturb, []

    def watched(*args, **kwargs):
        made.append(perturb(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(attack, "perturb", watched)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    with torch.enable_grad():
        auto.PARTS[part](net, pixels, net(pixels).argmax(1), THREAT, 3)
    (points,) = made
    assert not points.requires_grad


def test_deterministic_mode_is_off_only_for_the_package(pixels, monkeypatch):
    """On CUDA FAB's sums have no deterministic kernel, so that the mode would end in an error."""
    net, seen = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), []
    net.register_forward_hook(lambda *_: seen.append(torch.are_deterministic_algorithms_enabled()))
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        auto.fab_t(net, pixels[:5], net(pixels[:5]).argmax(1), THREAT, 2)
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert not seen[-1]
