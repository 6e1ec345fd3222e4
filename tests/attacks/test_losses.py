import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

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


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_weighted_log_odds_point_where_the_batchs_cross_entropy_does(scale):
    """Also through batch norm in train mode, where the samples' weights matter."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)).double()
    x, y = torch.rand(5, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    grads = []
    for objective in (losses.weighted_log_odds, losses.cross_entropy):
        leaf = x.clone().requires_grad_()
        objective(scale * net(leaf), y).sum().backward()
        grads.append(leaf.grad)
    ours, true = grads
    factor = (ours * true).sum() / (true * true).sum()
    assert float(factor) >= 1
    torch.testing.assert_close(ours, factor * true, rtol=1e-9, atol=1e-12)


def test_weighted_log_odds_of_a_sample_far_surer_than_the_others_keep_a_gradient():
    logits = torch.tensor([[400.0, 0, 0], [0.5, 0, 0]], requires_grad=True)
    losses.weighted_log_odds(logits, torch.tensor([0, 0])).sum().backward()
    assert logits.grad is not None
    assert 0 < float(logits.grad[0].abs().max()) < 1e-20
    assert float(logits.grad[1].abs().max()) == pytest.approx(1)
