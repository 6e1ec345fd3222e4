from __future__ import annotations

from typing import Any

import pytest

from surestep import UserError
from surestep.report import charts
from surestep.report._plots import masked_surface


def rows(chart: Any) -> list[dict[str, Any]]:
    """Return the data of a chart, which must be written once, at the top."""
    spec = chart.to_dict()
    assert str(spec).count("'data'") == 1
    return spec["data"]["values"]


def encodings(spec: Any, channel: str) -> list[dict[str, Any]]:
    """Return all encodings of a channel in a spec, at any depth."""
    if isinstance(spec, list):
        return [found for part in spec for found in encodings(part, channel)]
    if not isinstance(spec, dict):
        return []
    here = spec.get("encoding", {})
    own = [here[channel]] if channel in here else []
    return own + [e for k, v in spec.items() if k != "data" for e in encodings(v, channel)]


def test_accuracy_by_eps_of_an_evaluation(evaluation):
    chart = charts.accuracy_by_eps(evaluation["curve"])
    found = {(r["attack"], r["x"]): r["accuracy"] for r in rows(chart)}
    assert len(found) == 9
    assert found["clean", 0.1] == 0.98
    assert found["fgsm", 0.2] == pytest.approx(0.78)
    assert found["worst case", 0.3] == pytest.approx(0.38)
    assert encodings(chart.to_dict(), "y")[0]["scale"]["domain"] == [0, 1]


def test_accuracy_by_eps_of_a_check():
    found = rows(charts.accuracy_by_eps({"eps": [0.1, 0.2], "accuracy": [0.9, float("nan")]}))
    assert [(r["x"], r["accuracy"]) for r in found] == [(0.1, 0.9), (0.2, None)]


@pytest.mark.parametrize(
    ("eps", "kind"),
    [([0.05, 0.1, 0.2], "linear"), ([0.03, 0.1, 1.0], "log"), ([0, 0.1, 1], "linear")],
)
def test_a_sweep_to_the_whole_range_is_logarithmic(eps, kind):
    chart = charts.accuracy_by_eps({"eps": eps, "accuracy": [0.9, 0.5, 0.0]})
    assert encodings(chart.to_dict(), "x")[0]["scale"]["type"] == kind


def test_accuracy_by_step(evaluation, audit):
    found = rows(charts.accuracy_by_step(evaluation["attacks"]))
    assert [(r["attack"], r["x"], r["accuracy"]) for r in found] == [
        ("pgd-50", 0, 0.98),
        ("pgd-50", 1, 0.9),
        ("pgd-50", 2, 0.88),
    ]
    found = rows(charts.accuracy_by_step(audit["checks"][10]["evidence"]))
    assert [(r["x"], r["accuracy"]) for r in found] == [(1, 0.9), (10, 0.2), (50, 0.01)]


def test_restarts_are_whole(audit):
    chart = charts.accuracy_by_restart({"restarts": [1, 2, 3], "restart_accuracy": [0.5, 0.4, 0.4]})
    assert encodings(chart.to_dict(), "x")[0]["axis"]["values"] == [1, 2, 3]


def test_accuracy_by_restart(audit):
    found = rows(charts.accuracy_by_restart(audit["checks"][10]["evidence"]))
    assert [(r["x"], r["accuracy"]) for r in found] == [(1, 0.05), (5, 0.01)]


def test_loss_along_fgsm(audit):
    evidence = audit["checks"][17]["evidence"]
    found = rows(charts.loss_along_fgsm(evidence))
    assert [(r["model"], r["x"], r["loss"]) for r in found] == [
        ("this model", 0.0, 0.1),
        ("this model", 0.5, 2.5),
        ("this model", 1.0, 0.4),
    ]
    both = rows(charts.loss_along_fgsm({"a": evidence, "b": evidence}))
    assert [r["model"] for r in both] == ["a"] * 3 + ["b"] * 3
    # Beside each other shapes are compared: each over its largest.
    assert [r["loss"] for r in both] == pytest.approx([0.04, 1.0, 0.16] * 2)


def test_a_surface_is_cut_through_the_images():
    surface = {
        "shares": [-1.0, 0.0, 1.0],
        "mean": [[9.0, 9.0, 9.0], [1.0, 2.0, 3.0], [9.0, 9.0, 9.0]],
    }
    assert charts.along_fgsm(surface) == {"step": [0.0, 1.0], "loss": [2.0, 3.0]}


def test_loss_surface(gathered):
    surface = gathered["surfaces"]["this model"]
    chart = charts.loss_surface(surface)
    found = {(r["of"], r["r"], r["f"]): r["loss"] for r in rows(chart)}
    assert len(found) == 4 * 25
    assert found[0, -0.5, 1.0] == surface["mean"][1][4]
    assert found[2, 1.0, -1.0] == surface["samples"][1]["loss"][4][0]
    spec = chart.to_dict()
    (menu,) = [p for p in spec["params"] if "bind" in p]
    assert menu["bind"]["labels"][0] == "mean of 3 images"
    assert len(menu["bind"]["options"]) == 4


def test_the_masked_surface_is_masked():
    surface = masked_surface()
    assert surface["fgsm_accuracy"] - surface["pgd_accuracy"] > 0.5
    assert {"seed", "n", "command"} <= surface.keys()
    losses = charts.along_fgsm(surface)["loss"]
    assert max(losses) > 1.5 * losses[-1]
    assert len(rows(charts.loss_surface(surface))) == 9 * 21 * 21


def test_training_curves(history):
    found = rows(charts.training_curves(history))
    assert {r["attack"] for r in found} == {"training batches", "clean", "pgd-20x2", "worst case"}
    assert {r["x"] for r in found} == {1, 2, 3}


def test_training_losses_leave_nan_out(history):
    found = rows(charts.training_losses(history))
    assert {r["term"] for r in found} == {"loss", "ce"}
    assert [r["loss"] for r in found if r["term"] == "loss"] == [2.0, 1.0]


def test_pareto(comparison):
    fgsm, sat = rows(charts.pareto(comparison))
    assert (fgsm["method"], fgsm["cost"], fgsm["low"], fgsm["high"]) == ("fgsm", 5, 0, 0.01)
    assert (sat["accuracy"], sat["low"], sat["verdict"]) == (0.868, 0.868, "robust")
    seconds = rows(charts.pareto(comparison, "seconds"))
    assert [r["cost"] for r in seconds] == [61, 98]
    del comparison[0]["passes"]
    assert [r["cost"] for r in rows(charts.pareto(comparison))] == [61, 98]


def test_long_histories_are_not_refused():
    long = [{"epoch": e, "val_clean": 0.5, "val_fgsm": 0.5} for e in range(4000)]
    assert len(rows(charts.training_curves(long))) == 8000


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: charts.accuracy_by_eps([]), "the curve is empty"),
        (lambda: charts.accuracy_by_step([{"name": "fgsm", "by_step": None}]), "is empty"),
        (lambda: charts.training_curves([]), "the history is empty"),
        (lambda: charts.training_curves([{"epoch": 1}]), "accuracies of the history is empty"),
        (lambda: charts.pareto([{"method": "a"}]), "worst case and seconds"),
        (lambda: charts.pareto([], "money"), "unknown cost 'money'"),
    ],
)
def test_bad_input(draw, message):
    with pytest.raises(UserError, match=message) as raised:
        draw()
    assert "\n" not in str(raised.value)
