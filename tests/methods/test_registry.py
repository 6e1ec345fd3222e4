import re
import runpy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from families import joined

from surestep import L2, Linf, UserError, methods
from surestep.config import FitSettings
from surestep.errors import SurestepWarning
from surestep.methods import _registry
from surestep.methods._registry import METHODS

E8, STEP2 = 8 / 255, 2 / 255
PUBLISHED, REFUSED = joined("PUBLISHED"), joined("REFUSED")


def refusal(*words):
    """Match a message of one line that has all the words."""
    return r"\A" + "".join(f"(?=.*{re.escape(w)})" for w in words) + r".*\Z"


def test_names():
    fixed = {"fgsm", "r-fgsm", "rs-fgsm", "n-fgsm", "pgd", "trades", "sat-r1", "sat-r2", "sat-r3"}
    assert fixed <= set(methods.names())
    for slug in methods.names():
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
    for cls in (methods.TRADES, methods.get("mart")):
        assert cls(Linf(8, bounds=(0, 255))).sigma == pytest.approx(0.255)
    assert methods.SATR3(Linf(0.3)).eps_low == pytest.approx(0.1)


@pytest.mark.parametrize(("slug", "params", "words"), REFUSED)
def test_build_refuses(slug, params, words):
    with pytest.raises(UserError, match=refusal(*words)):
        methods.build(slug, Linf(0.1), params)


@pytest.mark.parametrize(
    ("slug", "smoothing"),
    [
        *(("sat-r2", smoothing) for smoothing in (-0.1, float("nan"), "some")),
        *((slug, 1.0) for slug in methods.names()),  # each says its own name
    ],
)
def test_label_smoothing_has_a_range(slug, smoothing):
    words = [] if smoothing == "some" else ["label_smoothing", str(smoothing)]
    with pytest.raises(UserError, match=refusal(slug, *words)):
        methods.build(slug, Linf(0.1), {}, label_smoothing=smoothing)


@pytest.mark.parametrize(("slug", "name", "eps", "model", "params", "settings"), PUBLISHED)
def test_preset_holds_the_published_numbers(slug, name, eps, model, params, settings):
    preset = methods.preset(slug, name)
    assert preset.eps == pytest.approx(eps)
    assert preset.params.keys() == params.keys()
    for key, value in params.items():
        close = value if isinstance(value, str) else pytest.approx(value)
        assert preset.params[key] == close
    assert {key: preset.settings[key] for key in settings} == {
        k: v if isinstance(v, str) else pytest.approx(v) for k, v in settings.items()
    }
    assert preset.dataset == name.split("-")[0]
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


def test_the_page_of_methods_is_up_to_date():
    script = Path(__file__).parents[2] / "docs" / "methods.py"
    namespace = runpy.run_path(str(script))
    assert script.with_name("methods.md").read_text("utf-8") == namespace["page"](), (
        "run python docs/methods.py"
    )


@pytest.mark.parametrize("kind", [Literal["a", "b"], tuple[float, float], list[float] | None])
def test_a_hyperparameter_of_another_kind_is_refused_when_it_is_registered(kind):
    class Odd(methods.FGSM):
        mode: str = "a"

    Odd.__annotations__ = {"mode": kind}
    with pytest.raises(
        UserError, match=r"mode of Odd is a .*: hyperparameters must be float, int, bool"
    ):
        methods.register("odd")(dataclass(Odd))
    assert "odd" not in methods.names()


def test_what_is_no_threat_model_is_refused():
    with pytest.raises(UserError, match=r"0\.03 is not a threat model: give surestep.Linf"):
        methods.SATR2(0.03)


@pytest.fixture
def scratch(monkeypatch):
    """What a test registers is gone afterwards."""
    monkeypatch.setattr("surestep.methods._registry.METHODS", dict(METHODS))


@pytest.mark.usefixtures("scratch")
def test_lengths_scale_with_eps():
    @methods.register("mine")
    @dataclass
    class Mine(methods.Standard):
        radius: float = methods.of_eps(0.5)
        noise: float = methods.of_span(0.1)

    mine = Mine(Linf(0.1))
    mine.set_strength(0.5)
    assert (mine.radius, mine.noise) == (pytest.approx(0.025), 0.1)
    assert methods.length_names(Mine) == ["radius"]


@pytest.mark.usefixtures("scratch")
@pytest.mark.parametrize(("old", "new"), [("validate", "set_up"), ("lengths", "of_eps")])
def test_what_earlier_versions_read_is_refused(old, new):
    class Mine(methods.Standard):
        pass

    setattr(Mine, old, ("alpha",))
    with pytest.raises(UserError, match=f"'mine' has {old}, which nothing reads: use .*{new}"):
        methods.register("mine")(Mine)


@pytest.mark.parametrize(
    ("bounds", "right", "wrong", "said"),
    [
        ({"ge": 0}, (0, 2.5), (-0.1,), ">= 0"),
        ({"gt": 0}, (0.1,), (0,), "> 0"),
        ({"le": 2}, (2, -5), (2.1,), "<= 2"),
        ({"lt": 2}, (1.9,), (2,), "< 2"),
        ({"ge": 0, "lt": 1}, (0, 0.99), (-0.1, 1), r"in \[0, 1\)"),
        ({"gt": 0, "le": 0.64}, (0.64,), (0, 0.65), r"in \(0, 0.64\]"),
    ],
)
def test_bounds_of_a_hyperparameter(bounds, right, wrong, said):
    @dataclass
    class Mine(methods.Standard):
        share: float | None = methods.param(None, **bounds)

    for value in (None, *right):
        assert Mine(Linf(0.1), share=value).share == value
    for value in wrong:
        with pytest.raises(UserError, match=f"Mine: share {value} is not {said}$"):
            Mine(Linf(0.1), share=value)


def test_a_perturbation_with_state_or_schedule_is_refused(monkeypatch):
    monkeypatch.setattr(methods.NFGSM, "kept", ("_mean",))
    with pytest.raises(UserError, match="is not a single-step method without schedule or state"):
        methods.SATR2(Linf(0.1), perturbation="n-fgsm")


def test_a_perturbation_with_a_step_of_its_own_is_refused(monkeypatch):
    """SAT-R2 and SAT-R3 end their steps themselves, so that they would train something else."""
    monkeypatch.setattr(methods.NFGSM, "step", lambda self, start, grad, x: start)
    with pytest.raises(UserError, match="perturbation 'n-fgsm' is not a single-step method: "):
        methods.SATR2(Linf(0.1), perturbation="n-fgsm")


def test_a_plug_in_whose_cost_fails_does_not_break_the_list(monkeypatch):
    class Broken(methods.Standard):
        def cost(self, batch_size):
            return 1 / 0

    Broken.slug = "broken"
    monkeypatch.setitem(METHODS, "broken", Broken)
    with pytest.warns(SurestepWarning, match="the passes of broken are unknown"):
        rows = methods.overview()
    assert (rows[-1]["name"], rows[-1]["passes"]) == ("broken", None)


def test_other_names_lead_to_methods():
    for name, slug in _registry._OTHER_NAMES.items():
        with pytest.raises(UserError, match=f"unknown method '{name}': did you mean '{slug}'"):
            methods.get(name)
        assert slug in methods.names()
