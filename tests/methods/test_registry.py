import re

import pytest

from surestep import L2, Linf, UserError, methods
from surestep.config import FitSettings

SLUGS = [
    *("fgsm", "n-fgsm", "pgd", "r-fgsm", "rs-fgsm"),
    *("sat-r1", "sat-r2", "sat-r3", "standard", "trades"),
]
E8, STEP2 = 8 / 255, 2 / 255
MNIST_SAT = {"epochs": 20, "batch_size": 32, "lr": 0.01, "schedule": "step"}
CIFAR_SAT = {"epochs": 100, "batch_size": 64, "lr": 0.1, "schedule": "step"}
R3 = {"lam": 1.0, "tau": 0.4, "alpha": 0.01, "eps_low": 0.1}
FAST = {"epochs": 10, "batch_size": 100, "optimizer": "adam", "lr": 5e-3, "schedule": "triangular"}
# The published numbers: (method, preset, eps, model, parameters, training settings).
PUBLISHED = [
    ("sat-r1", "mnist", 0.3, "lenet+", {"lam": 0.2, "steps": 10}, MNIST_SAT),
    ("sat-r2", "mnist", 0.3, "lenet+", {"lam": 5.0, "alpha": 0.01}, MNIST_SAT),
    ("sat-r3", "mnist", 0.3, "lenet+", R3, {**MNIST_SAT, "lr": 0.05}),
    ("sat-r1", "cifar10", E8, "wrn-28-10", {"lam": 0.2, "steps": 3}, CIFAR_SAT),
    ("sat-r2", "cifar10", E8, "wrn-28-10", {"lam": 25.0, "alpha": STEP2}, CIFAR_SAT),
    ("sat-r3", "cifar10", E8, "wrn-28-10",
     {"lam": 1.0, "tau": 0.6, "alpha": STEP2, "eps_low": STEP2}, CIFAR_SAT),
    ("fgsm", "mnist", 0.3, "lenet+", {}, MNIST_SAT),
    ("fgsm", "cifar10", E8, None, {}, {"batch_size": 128}),
    ("r-fgsm", "mnist", 0.3, "lenet+", {}, {}),
    ("r-fgsm", "cifar10", E8, None, {}, {"batch_size": 128}),
    ("rs-fgsm", "mnist", 0.3, "cnn-small", {"alpha": 0.375}, FAST),
    ("rs-fgsm", "cifar10", E8, None, {"alpha": 10 / 255},
     {"epochs": 15, "lr": 0.2, "schedule": "triangular", "batch_size": 128}),
    ("n-fgsm", "cifar10", E8, None, {"noise": 2.0},
     {"epochs": 30, "lr": 0.2, "schedule": "triangular", "batch_size": 128}),
    ("pgd", "mnist", 0.3, "lenet+", {"steps": 40, "alpha": 0.01}, {}),
    ("pgd", "cifar10", E8, None, {"steps": 10, "alpha": STEP2}, {"batch_size": 128}),
    ("trades", "mnist", 0.3, "lenet+", {"beta": 1.0, "steps": 40, "alpha": 0.01}, {}),
    ("trades", "cifar10", E8, None, {"beta": 6.0, "steps": 10, "alpha": 0.007},
     {"batch_size": 128}),
]  # fmt: skip


def refusal(*words):
    """Match a message of one line that has all the words."""
    return r"\A" + "".join(f"(?=.*{re.escape(w)})" for w in words) + r".*\Z"


def test_names():
    assert methods.names() == SLUGS
    for slug in SLUGS:
        cls = methods.get(slug)
        assert cls.slug == slug
        assert issubclass(cls, methods.Method)
        assert cls(Linf(0.1)).threat == Linf(0.1)
        assert cls.summary
        assert cls.paper


def test_classes_are_public():
    assert methods.get("sat-r1") is methods.SATR1
    assert methods.get("sat-r2") is methods.SATR2
    assert methods.get("sat-r3") is methods.SATR3


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("sat-r4", "sat-r"),
        ("satr3", "sat-r3"),
        ("FGSM-AT", ""),
        ("trade", "trades"),
        ("pdg", "pgd"),
    ],
)
def test_a_misspelt_method_names_the_nearest(wrong, nearest):
    words = [f"did you mean '{nearest}"] if nearest else []
    for action in (methods.get, methods.card, lambda s: methods.preset(s, "mnist")):
        with pytest.raises(UserError, match=refusal("method", repr(wrong), *words, "known are")):
            action(wrong)


def test_build():
    method = methods.build("sat-r3", Linf(E8), {"tau": 0.6, "lam": 2}, label_smoothing=0.1)
    assert method == methods.SATR3(Linf(E8), tau=0.6, lam=2, label_smoothing=0.1)
    assert methods.build("fgsm", L2(0.5), {}) == methods.FGSM(L2(0.5))


def test_defaults_that_follow_eps():
    assert methods.RFGSM(Linf(0.2)).alpha == pytest.approx(0.1)
    assert methods.RSFGSM(Linf(0.2)).alpha == pytest.approx(0.25)
    assert methods.PGD(Linf(E8)).alpha == pytest.approx(STEP2)
    assert methods.TRADES(Linf(E8)).alpha == pytest.approx(0.007)
    assert methods.TRADES(Linf(E8)).sigma == 0.001
    assert methods.SATR3(Linf(0.3)).eps_low == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("slug", "params", "words"),
    [
        ("sat-r3", {"taw": 0.5}, ("parameter of sat-r3", "'taw'", "did you mean 'tau'")),
        ("sat-r1", {"eps": 0.5}, ("parameter of sat-r1", "'eps'", "every, fraction, lam, steps")),
        ("fgsm", {"alpha": 0.5}, ("parameter of fgsm", "'alpha'")),
        ("pgd", {"threat": Linf(0.1)}, ("parameter of pgd", "'threat'")),
        ("sat-r1", {"lam": "much"}, ("sat-r1", "much")),
        ("sat-r1", {"steps": None}, ("sat-r1", "steps")),
        ("sat-r1", {"steps": 2.5}, ("sat-r1", "steps", "2.5")),
        ("pgd", {"steps": "10"}, ("pgd", "10")),
        ("pgd", {"steps": 2.5}, ("pgd", "steps", "2.5")),
        ("trades", {"steps": 2.5}, ("trades", "steps", "2.5")),
        ("sat-r2", {"project": "false"}, ("sat-r2", "project", "false")),
        ("sat-r3", {"per_sample": "no"}, ("sat-r3", "per_sample", "no")),
        ("sat-r1", {"lam": -0.1}, ("sat-r1", "lam", "-0.1", ">= 0")),
        ("sat-r1", {"lam": float("nan")}, ("sat-r1", "lam", "nan")),
        ("sat-r1", {"lam": float("inf")}, ("sat-r1", "lam", "inf")),
        ("sat-r1", {"steps": 0}, ("sat-r1", "steps", "0", ">= 1")),
        ("sat-r1", {"fraction": 0.0}, ("sat-r1", "fraction", "0.0", "(0, 1]")),
        ("sat-r1", {"fraction": 1.5}, ("sat-r1", "fraction", "1.5")),
        ("sat-r1", {"every": 0}, ("sat-r1", "every", "0", ">= 1")),
        ("sat-r1", {"fraction": 0.5, "every": 4}, ("every", "4", "1 / fraction (0.5)")),
        ("sat-r2", {"lam": -1}, ("sat-r2", "lam", "-1")),
        ("sat-r2", {"alpha": -1}, ("sat-r2", "alpha", "-1")),
        ("sat-r2", {"fraction": 0.0}, ("sat-r2", "fraction", "0.0", "(0, 1]")),
        ("sat-r3", {"lam": -1}, ("sat-r3", "lam", "-1")),
        ("sat-r3", {"fraction": 1.5}, ("sat-r3", "fraction", "1.5", "(0, 1]")),
        ("sat-r3", {"tau": 0}, ("sat-r3", "tau", "0", "> 0")),
        ("sat-r3", {"alpha": -0.1}, ("sat-r3", "alpha", "-0.1")),
        ("sat-r3", {"eps_low": 0.4}, ("sat-r3", "eps_low", "0.4", "0.1")),
        ("sat-r3", {"eps_low": -0.1}, ("sat-r3", "eps_low", "-0.1")),
        ("r-fgsm", {"alpha": 0.2}, ("r-fgsm", "alpha", "0.2", "0.1")),
        ("r-fgsm", {"alpha": -0.2}, ("r-fgsm", "alpha", "-0.2")),
        ("rs-fgsm", {"alpha": -0.2}, ("rs-fgsm", "alpha", "-0.2")),
        ("n-fgsm", {"noise": -1.0}, ("n-fgsm", "noise", "-1.0")),
        ("pgd", {"steps": 0}, ("pgd", "steps", "0")),
        ("pgd", {"alpha": -0.1}, ("pgd", "alpha", "-0.1")),
        ("trades", {"beta": -1}, ("trades", "beta", "-1")),
        ("trades", {"steps": 0}, ("trades", "steps", "0")),
        ("trades", {"alpha": -1}, ("trades", "alpha", "-1")),
        ("trades", {"sigma": -1}, ("trades", "sigma", "-1")),
    ],
)
def test_build_refuses(slug, params, words):
    with pytest.raises(UserError, match=refusal(*words)):
        methods.build(slug, Linf(0.1), params)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, float("nan"), "some"])
def test_label_smoothing_has_a_range(slug, smoothing):
    words = [] if smoothing == "some" else ["label_smoothing", str(smoothing)]
    with pytest.raises(UserError, match=refusal(slug, *words)):
        methods.build(slug, Linf(0.1), {}, label_smoothing=smoothing)


@pytest.mark.parametrize(("slug", "name", "eps", "model", "params", "settings"), PUBLISHED)
def test_preset_holds_the_published_numbers(slug, name, eps, model, params, settings):
    preset = methods.preset(slug, name)
    assert preset.eps == pytest.approx(eps)
    assert dict(preset.params) == pytest.approx(params)
    assert {key: preset.settings[key] for key in settings} == settings
    assert preset.dataset == name
    assert model in (None, preset.model)
    assert preset.source


def test_every_preset_builds(slug):
    known = set(FitSettings.model_fields)
    for name, preset in methods.get(slug).presets.items():
        assert methods.preset(slug, name) is preset
        assert methods.build(slug, Linf(preset.eps), preset.params).slug == slug
        assert set(preset.settings) <= known
        assert preset.dataset == name.split("-")[0]
    assert {"mnist", "cifar10"} <= set(methods.get(slug).presets)


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match=refusal("preset of sat-r1", "did you mean 'cifar10'")):
        methods.preset("sat-r1", "cifar-10")


def test_card(slug):
    text = methods.card(slug)
    assert text.startswith("# ")
    assert len(text) > 300
    paper = methods.get(slug).paper
    assert "arXiv" not in paper or paper.split("arXiv ")[1] in text
