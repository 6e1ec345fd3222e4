import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surestep import L2, Linf, UserError, threat

BOUNDS = [(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0), (-0.3, 0.7)]
SHAPES = [(1, 1), (3, 7), (1, 50), (2, 1, 3, 3), (4, 3, 2, 2), (2, 2, 2, 2, 2)]
quick = settings(max_examples=150, derandomize=True)


def one_line(*words):
    """Match a message of one line that has all the words."""
    return r"\A" + "".join(f"(?=.*{re.escape(w)})" for w in words) + r".*\Z"


def size_of(shape):
    return math.prod(shape[1:])


@st.composite
def points(draw, norm):
    """A threat model, images in its range and points near, at and far from them."""
    low, high = draw(st.sampled_from(BOUNDS))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    shape = draw(st.sampled_from(SHAPES))
    largest = high - low if norm is Linf else 2 * (high - low) * math.sqrt(size_of(shape))
    usual = st.sampled_from([0.0, *(k / 255 for k in (1, 2, 8, 16)), 0.1, 0.3])
    eps = draw(st.floats(0, largest) | usual)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    # Values that hypothesis finds nasty, values of 8-bit images, values at random.
    pool = draw(st.lists(st.floats(low, high), min_size=1, max_size=4))
    pool += [low, high, 0.0, *(low + (high - low) * k / 255 for k in (1, 77, 254))]
    pool = torch.tensor(pool, dtype=dtype)
    chosen = pool[torch.randint(len(pool), shape, generator=generator)]
    spread = low + (high - low) * torch.rand(shape, generator=generator, dtype=dtype)
    x = torch.where(torch.rand(shape, generator=generator) < 0.5, chosen, spread)
    x = x.clamp(low, high)
    reach = draw(st.sampled_from([1e-9, 1e-3, 1.0, 5.0])) * max(eps, 1e-6)
    x_adv = x + reach * torch.randn(shape, generator=generator, dtype=dtype)
    return norm(eps, (low, high)), x, x_adv


def assert_inside(model, out, x):
    low, high = (torch.tensor(b, dtype=x.dtype) for b in model.bounds)
    assert out.dtype == x.dtype
    assert out.shape == x.shape
    assert bool((out >= low).all())
    assert bool((out <= high).all())
    if isinstance(model, Linf):
        assert bool((out - x).abs().max() <= torch.tensor(model.eps, dtype=x.dtype))
    else:
        assert float((out - x).double().flatten(1).norm(dim=1).max()) <= model.eps


@pytest.mark.parametrize("norm", [Linf, L2])
def test_projection_is_exact(norm):
    @quick
    @given(points(norm))
    def holds(case):
        model, x, x_adv = case
        out = model.project(x_adv, x)
        assert_inside(model, out, x)
        assert torch.equal(model.project(out, x), out)
        assert torch.equal(model.project(x, x), x)
        assert torch.equal(model.with_eps(0.0).project(x_adv, x), x)

    holds()


@quick
@given(points(Linf))
def test_linf_projection_is_the_nearest_point(case):
    model, x, x_adv = case
    low, high = model.bounds
    exact = torch.empty(x.shape, dtype=torch.float64)
    for i, (p, a) in enumerate(zip(x_adv.flatten().tolist(), x.flatten().tolist(), strict=True)):
        exact.view(-1)[i] = min(max(p, a - model.eps, low), a + model.eps, high)
    ulp = torch.finfo(x.dtype).eps * max(map(abs, model.bounds))
    torch.testing.assert_close(model.project(x_adv, x).double(), exact, rtol=0, atol=2 * ulp)


@quick
@given(points(L2))
def test_l2_projection_scales_the_perturbation(case):
    model, x, x_adv = case
    low, high = model.bounds
    out = model.project(x_adv, x)
    # A float32 pixel has an ulp of its own, and the radius gives way by one per pixel.
    ulp = torch.finfo(x.dtype).eps * max(map(abs, model.bounds))
    for result, p, a in zip(out.double(), x_adv.double(), x.double(), strict=True):
        delta = p.clamp(low, high) - a
        share = min(1.0, model.eps / max(float(delta.norm()), 1e-300))
        slack = 4 * ulp * math.sqrt(size_of(x.shape))
        torch.testing.assert_close(result, a + share * delta, rtol=0, atol=slack)


def test_linf_naive_clamp_shows_the_trap():
    """Without care x + eps rounds to a point further than eps away: the projection's reason."""
    x, eps = torch.arange(256) / 255, 8 / 255
    limit = torch.tensor(eps)
    naive = (x + 1).clamp(x - eps, x + eps).clamp(0, 1)
    assert bool((naive - x > limit).any())
    assert not bool((Linf(eps).project(x + 1, x) - x > limit).any())


@pytest.mark.parametrize("norm", [Linf, L2])
def test_random_start_is_inside(norm):
    @quick
    @given(points(norm), st.none() | st.floats(0, 2))
    def holds(case, share):
        model, x, _ = case
        radius = None if share is None else share * model.eps
        start = model.random_start(x, radius)
        assert_inside(model, start, x)
        if radius == 0:
            assert torch.equal(start, x)

    holds()


def test_linf_random_delta_is_uniform():
    torch.manual_seed(0)
    x = torch.zeros(100, 500)
    for radius, delta in ((0.3, Linf(0.3).random_delta(x)), (0.1, Linf(0.3).random_delta(x, 0.1))):
        assert float(delta.abs().max()) == pytest.approx(radius, rel=1e-3)
        shares = torch.histc(delta, 10, -radius, radius) / delta.numel()
        torch.testing.assert_close(shares, torch.full((10,), 0.1), rtol=0, atol=0.01)
        assert len(torch.unique(delta[:, 0])) == 100


@pytest.mark.parametrize("dimension", [1, 2, 30])
def test_l2_random_delta_fills_the_ball_evenly(dimension):
    torch.manual_seed(0)
    delta = L2(0.5).random_delta(torch.zeros(20000, dimension), 2.0)
    norms = delta.double().norm(dim=1)
    assert float(norms.max()) <= 2.0 * (1 + 1e-6)
    # The volume inside radius r is (r / 2) ** dimension of the ball's.
    for share in (0.1, 0.5, 0.9):
        inside = float((norms <= 2 * share ** (1 / dimension)).double().mean())
        assert inside == pytest.approx(share, abs=0.02)
    assert float(delta.mean(0).abs().max()) < 0.05


def test_linf_step_is_the_sign():
    grad = torch.tensor([[0.5, -1e-30, 0.0], [0.0, 0.0, 0.0]])
    expected = torch.tensor([[0.25, -0.25, 0.0], [0.0, 0.0, 0.0]])
    assert torch.equal(Linf(0.3).steepest_step(grad, 0.25), expected)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1.0, 1e30])
@pytest.mark.parametrize("shape", SHAPES)
def test_l2_step_has_the_full_length_per_sample(shape, scale):
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale
    grad[-1] = 0 if len(grad) > 1 else grad[-1]
    step = L2(0.5).steepest_step(grad, 0.7)
    for g, s in zip(grad, step, strict=True):
        if not g.any():
            assert not s.any()
            continue
        assert float(s.double().norm()) == pytest.approx(0.7, rel=1e-6)
        cosine = (s.double() / 0.7 * g.double() / g.double().norm()).sum()
        assert float(cosine) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("model", [Linf(1.0), L2(1.0)])
def test_no_direction_is_steeper(model):
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64)
    step = model.steepest_step(grad, 0.3)
    for g, s in zip(grad, step, strict=True):
        gain = sum(a * b for a, b in zip(g.flatten().tolist(), s.flatten().tolist(), strict=True))
        for _ in range(200):
            other = torch.randn(8, generator=generator, dtype=torch.float64)
            length = other.abs().max() if isinstance(model, Linf) else other.norm()
            other = (0.3 * other / length).tolist()
            assert sum(a * b for a, b in zip(g.flatten().tolist(), other, strict=True)) <= gain


@pytest.mark.parametrize("model", [Linf(0.1), L2(0.5)])
def test_operations_on_the_meta_device(model):
    x = torch.empty(2, 3, 8, 8, device="meta")
    results = [
        model.project(x + 1, x),
        model.random_start(x),
        model.random_delta(x, 0.05),
        model.steepest_step(x, 0.1),
        model.clip(x),
    ]
    assert all(r.is_meta and r.shape == x.shape for r in results)


def test_small_surface():
    model = Linf(0.1, (-1.0, 1.0))
    assert model.span == 2.0
    assert model.with_eps(0.2) == Linf(0.2, (-1.0, 1.0))
    assert model == Linf(0.1, bounds=(-1.0, 1.0))
    assert torch.equal(model.clip(torch.tensor([-3.0, 0.5, 3.0])), torch.tensor([-1.0, 0.5, 1.0]))
    assert threat.make("linf", 0.1, (-1.0, 1.0)) == model
    assert threat.make("l2", 3.0) == L2(3.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((-0.1,), ("eps", "-0.1", ">= 0")),
        ((float("nan"),), ("eps", "nan")),
        ((float("inf"),), ("eps", "inf")),
        ((0.1, (1.0, 0.0)), ("bounds", "(1.0, 0.0)", "low < high")),
        ((0.1, (0.5, 0.5)), ("bounds", "(0.5, 0.5)")),
        ((0.1, (0.0, float("nan"))), ("bounds", "nan")),
        ((0.1, (float("-inf"), 1.0)), ("bounds", "-inf")),
    ],
)
@pytest.mark.parametrize("norm", [Linf, L2])
def test_refuses(norm, arguments, words):
    with pytest.raises(UserError, match=one_line(*words)):
        norm(*arguments)


@pytest.mark.parametrize("kind", [np.float32, np.float64, torch.tensor, int])
def test_takes_numbers_of_numpy_and_torch(kind):
    threat = Linf(kind(1), (kind(0), kind(2)))
    assert (threat.eps, threat.bounds) == (1, (0, 2))
    assert all(type(number) in (float, int) for number in (threat.eps, *threat.bounds))
    assert threat == Linf(1.0, (0.0, 2.0))


def test_linf_refuses_a_radius_beyond_the_range():
    with pytest.raises(UserError, match=one_line("eps 8", "(0.0, 1.0)", "8/255")):
        Linf(8)
    assert Linf(8, (0.0, 255.0)).eps == 8
    assert Linf(1.0).eps == 1.0
    with pytest.raises(UserError, match=one_line("eps 2")):
        Linf(0.5).with_eps(2)


@pytest.mark.parametrize(("wrong", "nearest"), [("Linf", "linf"), ("l_2", "l2"), ("linff", "linf")])
def test_an_unknown_norm_names_the_nearest(wrong, nearest):
    with pytest.raises(UserError, match=one_line("norm", repr(wrong), f"did you mean '{nearest}'")):
        threat.make(wrong, 0.1)
    with pytest.raises(UserError, match=one_line("norm", "'zzz'", "known are l2, linf")):
        threat.make("zzz", 0.1)


@pytest.mark.parametrize("radius", [0.0, 0.25])
def test_nothing_shrinks_to_nan(radius):
    delta = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    shrunk = L2(0.5).shrink(delta, radius)
    torch.testing.assert_close(shrunk, torch.tensor([[0.0, 0.0], [0.6, 0.8]]) * radius)
