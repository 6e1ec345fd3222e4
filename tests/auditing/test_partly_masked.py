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
    """

    def __init__(self):
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
        self.x = 0.4 + 0.3 * quarters[self.y] + 0.04 * codes[self.y] + noise


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
    assert found.verdict == "inconclusive"


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
