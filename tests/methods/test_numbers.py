"""Numbers of the papers that the formulas' tests pass by, since they give their own."""

from __future__ import annotations

import pytest

from surestep import L2, Linf, methods, posthoc, runs
from surestep.config import RunConfig

DEFAULTS = [
    ("elle-a", "decay", 0.99),
    ("fgsm-mep", "decay", 0.3),
    ("fgsm-mep", "reset", 40),
    ("fgsm-uap", "decay", 0.3),
    ("fgsm-cuap", "decay", 0.3),
    ("fgsm-fuap", "count", 50),
    ("fgsm-pco", "lam", 10.0),
    ("fgsm-pco", "stretch", 1.5),
    ("liet", "every", 20),
    ("liet", "spread", 0.6),
    ("tdat", "least", 0.15),
    ("converge-smooth", "gamma", 0.03),
    ("converge-smooth", "weight", 1.0),
    ("sat-r3", "lam", 1.0),
    ("trades", "beta", 6.0),
    ("iaat", "gamma", 1.9 / 8),
    ("iaat", "beta", 0.1),
    ("iaat", "rest", 0.1),
    ("gat", "late_from", 0.86),
]


@pytest.mark.parametrize(("slug", "name", "value"), DEFAULTS)
def test_defaults(slug, name, value):
    assert methods.get(slug)(Linf(0.1)).params()[name] == value


@pytest.mark.parametrize(
    ("slug", "name", "eps", "lam"),
    [
        ("gradalign", "cifar10", 8, 0.2),
        ("gradalign", "cifar10-16", 16, 2.0),
        ("elle", "cifar10", 8, 1000),
        ("elle", "cifar10-16", 16, 5000),
    ],
)
def test_weights_that_grow_with_the_radius(slug, name, eps, lam):
    config = runs.resolve({"method": slug}, name)
    assert (config.eps, config.params["lam"]) == (pytest.approx(eps / 255), lam)


def test_hypersphere_head():
    config = RunConfig(method="pgd", head="hypersphere", eps="8/255")
    assert config.head_scale == 15
    assert runs.build_method(config).margin == pytest.approx(15 * 0.2)


@pytest.mark.parametrize("slug", ["sat-r1", "sat-r2", "sat-r3"])
def test_sat_neither_normalises_nor_averages(slug):
    for name in ("mnist", "cifar10"):
        preset = methods.preset(slug, name)
        assert not {"ema", "swa"} & set(preset.settings)
    assert preset.normalize is False
    assert RunConfig.model_fields["ema"].default is RunConfig.model_fields["swa"].default is None


def test_the_share_of_r1_in_large_batches_is_the_published_one():
    assert methods.preset("sat-r1", "mnist-fast").params["fraction"] == 1 / 32


def test_mean_sparse_searches_the_published_thresholds():
    assert {0.1, 0.2, 0.3} <= set(posthoc.THRESHOLDS)
    assert "transfer" in posthoc.JUDGES
    assert any(name.startswith("square") for name in posthoc.JUDGES)


@pytest.mark.parametrize(
    ("dataset", "eps", "far"),
    [("cifar10", "8/255", False), ("cifar10", "16/255", True), ("mnist", "0.3", False)],
)
def test_liet_leaves_the_ball_above_8(dataset, eps, far):
    config = runs.resolve({"method": "liet", "dataset": dataset, "eps": eps})
    assert runs.build_method(config).far is far


@pytest.mark.parametrize(
    ("slug", "name", "expected"),
    [
        ("zerograd", "q", 0.45),
        ("fgsm-mep", "label_smoothing", 0.4 * 100 / 99),
        ("fgsm-pco", "label_smoothing", 0.4 * 100 / 99),
        ("sat-r2", "lam", 25.0),  # it has CIFAR-10's
    ],
)
def test_cifar100_has_numbers_of_its_own(slug, name, expected):
    config = runs.resolve({"method": slug, "dataset": "cifar100"})
    assert config.dataset == "cifar100"
    found = config.params.get(name, getattr(config, name, None))
    assert found == pytest.approx(expected)
    if name == "label_smoothing":
        # Torch gives the true class its share of the smoothing back.
        assert 1 - found + found / 100 == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("threat", "alpha"),
    [
        (Linf(0.3), 0.01),
        (Linf(8 / 255), 2 / 255),
        (Linf(0.001), 0.00025),
        (L2(0.5), 0.125),  # the length of the whole step, not of a pixel's
    ],
)
@pytest.mark.parametrize("slug", ["sat-r2", "sat-r3"])
def test_the_random_step_of_sat_fits_any_radius(slug, threat, alpha):
    """The published lengths at the published radii, and never beyond eps."""
    assert methods.get(slug)(threat).alpha == pytest.approx(alpha)


def test_the_random_step_of_sat_follows_the_data_range():
    bytes_ = Linf(76.5, bounds=(0.0, 255.0))
    assert methods.get("sat-r2")(bytes_).alpha == pytest.approx(2.55)
