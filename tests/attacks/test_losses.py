import math
import re

import pytest
import torch
import torch.nn.functional as F

from surestep import UserError
from surestep.attacks import losses


def logits_and_labels(dtype=torch.float64, scale=3.0, classes=5, n=40):
    g = torch.Generator().manual_seed(0)
    z = scale * torch.randn(n, classes, generator=g, dtype=torch.float64)
    return z.to(dtype), torch.randint(classes, (n,), generator=g)


def by_hand(z, y, name):
    """The objectives in plain arithmetic, sample by sample."""
    values = []
    for row, label in zip(z.double().tolist(), y.tolist(), strict=True):
        top = max(row)
        ce = math.log(math.fsum(math.exp(v - top) for v in row)) + top - row[label]
        others = max(v for k, v in enumerate(row) if k != label)
        value = {"ce": math.log(math.expm1(ce)), "margin": others - row[label]}.get(name)
        if name == "dlr":
            ordered = sorted(row, reverse=True)
            value = (others - row[label]) / (ordered[0] - ordered[2] + 1e-12)
        values.append(value)
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("name", ["ce", "margin", "dlr"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_values(name, dtype, tolerance):
    z, y = logits_and_labels(dtype)
    values = losses.get(name)(z, y)
    assert values.shape == y.shape
    assert values.dtype == dtype
    torch.testing.assert_close(values.double(), by_hand(z, y, name), rtol=tolerance, atol=tolerance)


def test_two_classes_are_enough_for_ce_and_margin():
    z, y = logits_and_labels(classes=2)
    for name in ("ce", "margin"):
        torch.testing.assert_close(losses.get(name)(z, y), by_hand(z, y, name))
    with pytest.raises(UserError, match=r"\A.*dlr.*3 classes.*has 2.*margin.*\Z"):
        losses.dlr(z, y)


def test_log_odds_ranks_as_ce_does():
    z, y = logits_and_labels()
    ce = F.cross_entropy(z, y, reduction="none")
    assert torch.equal(losses.log_odds(z, y).argsort(), ce.argsort())


def test_gradient_of_log_odds_is_parallel_to_that_of_ce():
    z, y = logits_and_labels()
    for row, label in zip(z, y, strict=True):
        row = row[None].clone().requires_grad_()
        (ours,) = torch.autograd.grad(losses.log_odds(row, label[None]).sum(), row)
        (ce,) = torch.autograd.grad(F.cross_entropy(row, label[None]), row)
        share = 1 - float(row.detach().softmax(1)[0, label])
        torch.testing.assert_close(ce, share * ours, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scale", [1e3, 1e4, 1e8])
@pytest.mark.parametrize("name", ["ce", "margin", "dlr"])
def test_no_gradient_vanishes_on_confident_logits(name, scale):
    z, _ = logits_and_labels(torch.float32, scale)
    y = z.argmax(1)
    z.requires_grad_()
    values = losses.get(name)(z, y)
    assert bool(values.isfinite().all())
    if name == "dlr":  # free of scale, so its gradient falls with it
        values = scale * values
    (grad,) = torch.autograd.grad(values.sum(), z)
    assert bool((grad.abs().amax(1) > 0.1).all())
    (naive,) = torch.autograd.grad(F.cross_entropy(z, y, reduction="sum"), z)
    assert float((naive.abs().amax(1) == 0).double().mean()) > 0.8


@pytest.mark.parametrize(("wrong", "nearest"), [("margn", "margin"), ("DLR", ""), ("cee", "ce")])
def test_an_unknown_loss_names_the_nearest(wrong, nearest):
    hint = f"did you mean '{nearest}'" if nearest else "known are ce, dlr, margin"
    with pytest.raises(UserError, match=rf"\A.*attack loss '{wrong}'.*{re.escape(hint)}.*\Z"):
        losses.get(wrong)
