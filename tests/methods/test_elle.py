"""When ELLE-A switches itself on: its history, fed by hand."""

import pytest
import torch

from surestep import Linf, methods


def weights(gaps):
    method = methods.get("elle-a")(Linf(0.1), lam=50.0, decay=0.9)
    return [float(method.weight(torch.tensor(g, dtype=torch.float64))) for g in gaps]


def test_noise_leaves_it_off():
    """A few gaps alone have no spread to speak of: the second is above the first half the time."""
    on = 0
    for seed in range(200):
        g = torch.Generator().manual_seed(seed)
        on += any(weights((1 + 0.1 * torch.randn(6, generator=g)).tolist()))
    assert on <= 10


@pytest.mark.parametrize(("last", "leaps"), [(1.9, False), (2.8, True)])
def test_two_deviations_are_a_leap(last, leaps):
    """The last gap lies 1.9 or 2.8 of the others' deviations out, 1.8 and 2.5 of all of them's."""
    gaps = [1.0 + (-1) ** k for k in range(40)]
    assert weights([*gaps, 1.0 + last])[-1] == (50.0 if leaps else 0.0)


def test_the_spread_is_that_of_all_gaps():
    gaps = [1.0, 5.0, 2.0, 2.0, 9.0, 0.5]
    method = methods.get("elle-a")(Linf(0.1))
    for gap in gaps:
        method.weight(torch.tensor(gap, dtype=torch.float64))
    n, mean, squares, _ = method.state_dict()["history"].tolist()
    exact = sum(gaps) / 6
    assert (n, mean) == (6, pytest.approx(exact))
    assert squares == pytest.approx(sum((g - exact) ** 2 for g in gaps))
