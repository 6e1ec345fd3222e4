"""Models that are masked in part: in one of two branches, behind a padded class, by noise."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import surestep
from surestep import attacks

SIDE, EPS = 16, 0.05


def checkered(generator):
    """Return three codes of fine checkers, whose signs are what a class is known by."""
    coarse = torch.randn(3, 1, SIDE // 2, SIDE // 2, generator=generator).sign()
    checkers = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(SIDE // 2, SIDE // 2)
    return F.interpolate(coarse, scale_factor=2, mode="nearest") * checkers


def matched(templates):
    """Return a linear classifier by templates (3, 1, SIDE, SIDE), of logits scaled by 20."""
    layer = nn.Linear(SIDE * SIDE, 3, bias=False)
    rows = templates.flatten(1)
    layer.weight = nn.Parameter(20 * rows / rows.abs().sum(1, keepdim=True))
    return nn.Sequential(nn.Flatten(), layer)


class Parts(nn.Module):
    """Two classifiers of the same images.

    Attributes:
        broad: by a bright quarter, from which eps is far.
        fine: by checkers of less than eps, which an attack takes away.

    Args:
        code: size of the checkers in the images.
    """

    def __init__(self, code=0.04):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        quarters = torch.zeros(3, 1, SIDE, SIDE)
        half = SIDE // 2
        quarters[0, :, :half, :half] = quarters[1, :, :half, half:] = quarters[
            2, :, half:, :half
        ] = 1
        codes = checkered(generator)
        # The broad one last: its features are those that the binarization test looks at.
        self.fine, self.broad = matched(codes), matched(quarters)
        self.y = torch.arange(60) % 3
        noise = 0.01 * torch.randn(60, 1, SIDE, SIDE, generator=generator)
        self.x = 0.4 + 0.3 * quarters[self.y] + code * codes[self.y] + noise


class Branches(Parts):
    """What the fine classifier says, by far, behind a mask; the broad one adds a little."""

    def __init__(self, mask, pad=False):
        super().__init__()
        self.mask, self.pad = mask, pad

    def forward(self, x):
        z = 5 * self.fine(self.mask(x)) + 0.05 * self.broad(x)
        return F.pad(z, (0, 1), value=-1e9) if self.pad else z


class Detach(nn.Module):
    def forward(self, x):
        return x.detach()


class Rounded(nn.Module):
    def forward(self, x):
        return (15 * x).round() / 15


def accuracy_of(model, gradients_of):
    """Return the accuracy of a model at points that PGD finds on another."""
    found = attacks.pgd(gradients_of, model.x, model.y, surestep.Linf(EPS), steps=20, loss="margin")
    return (model(found).argmax(1) == model.y).float().mean().item()


@pytest.mark.parametrize("mask", [Detach(), Rounded()], ids=["detached", "rounded"])
def test_a_mask_in_one_branch(run, mask):
    """The other branch has a gradient, which is right and leads nowhere."""
    model = Branches(mask).eval()
    assert accuracy_of(model, Branches(nn.Identity()).eval()) < 0.3
    found = run(model, EPS, data=(model.x, model.y))
    assert found.claims["pgd-10"] == 1
    assert found.verdict != "robust"
    if isinstance(mask, Rounded):
        (step,) = [step for step in found.escalation if step["name"] == "bpda"]
        assert "through mask" in step["why"]
        assert found.found_accuracy < 0.5
    else:
        assert "sweep of eps" in found.sentence


class Hidden(Parts):
    """What the fine classifier says, through a hole in the graph; the broad one has its own say.

    Unbounded, an attack on the broad one wins.
    """

    def __init__(self, hide=torch.Tensor.detach):
        super().__init__(code=0.02)
        self.hide = hide

    def forward(self, x):
        return 10 * self.fine(self.hide(x)) + self.broad(x)


def on_some(x):
    """Detach two images of five."""
    return torch.where((torch.arange(len(x)) % 5 < 2)[:, None, None, None], x.detach(), x)


def round_half(x):
    """Round the differences inside blocks of two by two pixels, and not their mean."""
    mean = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="nearest")
    return mean + (25 * (x - mean)).round() / 25


@pytest.mark.parametrize("hide", [torch.Tensor.detach, on_some, round_half])
def test_a_hole_that_lies_across_the_gradient(run, hide):
    """Along the gradient the loss grows as predicted, and the unbounded attack wins."""
    model = Hidden(hide).eval()
    assert accuracy_of(model, Hidden(lambda x: x).eval()) < 0.7
    found = run(model, EPS, data=(model.x, model.y))
    check = found.checks[3]
    assert check.evidence["difference error"] < 0.5
    assert check.evidence["off across"] > 0.3 * check.evidence["looked at across"] > 5
    assert "along random directions finite differences contradict the gradient" in check.sentence
    assert found.verdict == "inconclusive"


def test_nothing_lies_across_a_sound_gradient(run):
    model = Hidden(lambda x: x).eval()
    evidence = run(model, EPS, data=(model.x, model.y)).checks[3].evidence
    assert evidence["off across"] == 0
    assert evidence["looked at across"] > 20
    assert not evidence["contradicted"]


class Rejecting(Parts):
    """The broad classifier's answer, or a fourth class where the fine one disagrees."""

    def __init__(self, sign=False):
        super().__init__(code=0.02)
        self.odd = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.odd.weight)
        self.sign = sign

    def forward(self, x):
        broad, fine = self.broad(x), self.fine(x)
        odd = (broad.argmax(1) != fine.argmax(1))[:, None]
        if self.sign:  # a detector with one output
            own = fine.gather(1, broad.argmax(1)[:, None])
            odd = self.odd(fine.topk(2, dim=1).values.sum(1, keepdim=True) - 2 * own) > 0
        return torch.cat([torch.where(odd, broad - 50, broad), torch.where(odd, 20.0, -50.0)], 1)


@pytest.mark.parametrize("sign", [False, True])
def test_what_decides_without_a_gradient_is_attacked(run, sign):
    model = Rejecting(sign).eval()
    found = run(model, EPS, data=(model.x, model.y))
    steps = {step["name"]: step for step in found.escalation}
    name = "switch-odd" if sign else "switch-fine"
    assert "reaches the logits through no gradient" in steps[name]["why"]
    assert steps[name]["accuracy"] == 0
    assert found.found_accuracy == 0
    assert found.verdict in ("not robust", "pseudo-robust")


class MadeUp(Parts):
    """The fine classifier's logits with the gradient of the broad one."""

    def __init__(self, pad):
        super().__init__()
        self.pad = pad

    def forward(self, x):
        borrowed = self.broad(x)
        z = 5 * self.fine(x).detach() + borrowed - borrowed.detach()
        return F.pad(z, (0, 1), value=self.pad) if self.pad else z


@pytest.mark.parametrize("pad", [0, -1e9, float("-inf")])
def test_a_padded_class_hides_no_made_up_gradient(run, pad):
    model = MadeUp(pad).eval()
    found = run(model, EPS, data=(model.x, model.y))
    assert found.checks[3].evidence["difference error"] > 0.5
    assert found.verdict == "pseudo-robust"
    assert "switch-fine" in {step["name"] for step in found.escalation}


class Noisy(Parts):
    """The broad classifier, which is robust, with noise on its logits."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, x):
        z = self.broad(x)
        return z + self.size * torch.randn_like(z)


@pytest.mark.parametrize(("size", "verdict"), [(0.5, "robust"), (2.2, "inconclusive")])
def test_honest_noise(run, size, verdict):
    """More attacks are more draws: fewer images are right in all of them."""
    model = Noisy(size).eval()
    found = run(model, EPS, data=(model.x, model.y))
    assert found.verdict == verdict
    if verdict == "inconclusive":
        assert found.found_accuracy < 0.5
        assert found.claims["pgd-10"] > 0.6
        assert "random" in found.sentence


class NoisyAndWeak(Parts):
    """A classifier that falls in every pass, with noise before it."""

    def forward(self, x):
        return self.fine(x + 0.02 * torch.randn_like(x))


def test_noise_saves_no_weak_model(run):
    model = NoisyAndWeak().eval()
    found = run(model, EPS, data=(model.x, model.y))
    assert found.clean_accuracy > 0.9
    assert found.verdict in ("pseudo-robust", "not robust")
