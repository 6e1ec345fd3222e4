from __future__ import annotations

import itertools
import math

import pytest

from surestep.errors import UserError
from surestep.training.schedules import SCHEDULES, learning_rate, momentum, warm_up

TOTALS = [1, 2, 7, 100, 391 * 30]


def whole(name: str, total: int, peak: float = 1.0) -> list[float]:
    return [learning_rate(name, peak, i / total) for i in range(total)]


@pytest.mark.parametrize("epochs", [1, 3, 5, 10, 20])
@pytest.mark.parametrize("steps_per_epoch", [1, 4, 37, 390, 391])
def test_step_divides_exactly_at_the_quarters(epochs, steps_per_epoch):
    # The authors' code compares `epoch == epochs / 4`: an epoch late, and never if 4 does not
    # divide. Integers only, so that no rounding of ours can hide a rounding of theirs.
    total = epochs * steps_per_epoch
    for i, lr in enumerate(whole("step", total, peak=2.0)):
        quarters_done = (4 * i >= total) + (4 * i >= 2 * total) + (4 * i >= 3 * total)
        assert lr == pytest.approx(2.0 / 5**quarters_done, rel=1e-15)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize("total", TOTALS)
def test_a_rate_is_positive_and_at_most_the_peak(name, total):
    rates = whole(name, total, peak=0.3)
    assert max(rates) <= 0.3
    assert min(rates) >= 0.0
    # Triangular starts at zero, as published; no step but the first may be lost.
    assert min(rates[1:], default=1.0) > 0.0


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_a_rate_scales_with_the_peak(name):
    for one, three in zip(whole(name, 50), whole(name, 50, peak=3.0), strict=True):
        assert three == pytest.approx(3 * one)


@pytest.mark.parametrize(
    ("name", "points"),
    [
        ("onecycle", {0: 1 / 25, 0.15: (1 + 1 / 25) / 2, 0.3: 1.0, 0.65: (1 + 1e-5) / 2}),
        ("triangular", {0: 0.0, 0.2: 0.5, 0.4: 1.0, 0.7: 0.5, 0.85: 0.25}),
        ("cosine", {0: 1.0, 0.5: 0.5, 1 / 3: 0.75, 2 / 3: 0.25}),
        ("constant", {0: 1.0, 0.5: 1.0, 0.99: 1.0}),
    ],
)
def test_known_points(name, points):
    for done, rate in points.items():
        assert SCHEDULES[name](done) == pytest.approx(rate)


@pytest.mark.parametrize(("name", "end"), [("onecycle", 1e-5), ("triangular", 0), ("cosine", 0)])
def test_the_end(name, end):
    assert SCHEDULES[name](1.0) == pytest.approx(end, abs=1e-12)
    assert whole(name, 10_000)[-1] < 2e-4


@pytest.mark.parametrize(("name", "peak"), [("onecycle", 0.3), ("triangular", 0.4), ("cosine", 0)])
def test_it_rises_to_the_peak_and_then_falls(name, peak):
    rates = whole(name, 1000)
    top = rates.index(max(rates))
    assert top == round(peak * 1000)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


def test_triangular_is_linear():
    rates = whole("triangular", 1000)
    steps = [b - a for a, b in itertools.pairwise(rates)]
    assert steps[:400] == pytest.approx([1 / 400] * 400)
    assert steps[400:] == pytest.approx([-1 / 600] * 599)


def test_cosine_is_the_formula():
    for i, rate in enumerate(whole("cosine", 77)):
        assert rate == pytest.approx((1 + math.cos(math.pi * i / 77)) / 2)


def test_an_unknown_name_names_the_nearest():
    with pytest.raises(UserError, match=r"unknown schedule 'cosin'.*'cosine'") as caught:
        learning_rate("cosin", 0.1, 0)
    assert "\n" not in str(caught.value)


def test_the_warm_up_is_linear_and_ends():
    assert [warm_up(i, 4) for i in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert [warm_up(i, 1.5) for i in range(3)] == pytest.approx([2 / 3, 1, 1])
    assert [warm_up(i, 0) for i in range(3)] == [1, 1, 1]


@pytest.mark.parametrize("base", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("name", sorted(set(SCHEDULES) - {"onecycle"}))
def test_momentum_is_constant_elsewhere(name, base):
    assert {momentum(name, base, i / 50) for i in range(50)} == {base}


def test_momentum_of_onecycle_mirrors_the_rate():
    course = [momentum("onecycle", 0.9, i / 1000) for i in range(1000)]
    assert course[0] == pytest.approx(0.95)
    assert course[150] == pytest.approx(0.9)
    assert course[300] == min(course) == pytest.approx(0.85)
    assert course[-1] == pytest.approx(0.95, abs=1e-4)
    assert momentum("onecycle", 0.0, 0.3) == 0.0


@pytest.mark.parametrize(
    "base",
    [
        0.02,
        0.05,
        0.5,
        0.97,
        0.999,
    ],
)
def test_momentum_stays_one(base):
    assert all(0 <= momentum("onecycle", base, i / 100) < 1 for i in range(100))
