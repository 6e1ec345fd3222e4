"""The charts of a report, with their titles and captions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from surestep.report import charts

if TYPE_CHECKING:
    import altair as alt

    from surestep.report._report import Report


@dataclass(frozen=True)
class Plot:
    """A chart of a report.

    Attributes:
        name: the name of its files, and its id in the page.
        section: the section of the page.
        title: the text above the chart.
        caption: the text below it, which says what to look for.
        chart: the chart.
    """

    name: str
    section: str
    title: str
    caption: str
    chart: alt.TopLevelMixin


def masked_surface() -> dict[str, Any]:
    """Return the loss surface of a masked model, which is part of surestep."""
    text = (resources.files("surestep.report") / "masked_surface.json").read_text("utf-8")
    return json.loads(text)


def plots(report: Report) -> list[Plot]:
    """Return all charts that the report's contents allow.

    Raises:
        UserError: a package is missing.
    """
    evidence = {c.get("name"): c.get("evidence") or {} for c in report.checks}
    found = [*_curves(report, evidence), *_surfaces(report), *_training(report)]
    if report.comparison and charts.priced(report.comparison)[1]:
        found.append(
            Plot(
                "pareto",
                "comparison",
                "Robustness against cost",
                "Higher and further left is better. Lines reach one standard deviation each way.",
                charts.pareto(report.comparison),
            )
        )
    return found


def _curves(report: Report, evidence: Mapping[Any, Any]) -> Iterator[Plot]:
    evaluation = report.evaluation or {}
    curve = evaluation.get("curve") or _holding(evidence.get("eps-sweep"), "eps", "accuracy")
    # The checks use only correctly classified images, so their curves start at 100%.
    some = " Measured on correctly classified images."
    if curve:
        yield Plot(
            "accuracy-by-eps",
            "curves",
            "Accuracy against eps",
            "Under a sound attack, accuracy falls to chance or below once eps is large enough; a "
            "plateau above that is a sign of masking." + ("" if evaluation.get("curve") else some),
            charts.accuracy_by_eps(curve),
        )
    stepped = [a for a in evaluation.get("attacks") or () if a.get("by_step")]
    by_step = stepped or _holding(evidence.get("convergence"), "steps", "accuracy")
    if by_step:
        yield Plot(
            "accuracy-by-step",
            "curves",
            "Accuracy against attack steps",
            "If the curve is flat at the end, more steps would not find more. Restarts follow one "
            "another." + ("" if stepped else some),
            charts.accuracy_by_step(by_step),
        )
    if restarts := _holding(evidence.get("convergence"), "restarts", "restart_accuracy"):
        yield Plot(
            "accuracy-by-restart",
            "curves",
            "Accuracy against restarts",
            "If the curve is still falling at the end, the attack depends on luck and has not "
            "converged." + some,
            charts.accuracy_by_restart(restarts),
        )
    losses: dict[str, Mapping[str, Any]] = {
        name: charts.along_fgsm(s) for name, s in report.surfaces.items()
    }
    if checked := _holding(evidence.get("sat-properties"), "step", "loss"):
        # The check measured more images, so its curve replaces that of the first surface.
        losses.pop(next(iter(losses), ""), None)
        losses = {"this model": checked, **losses}
    if losses:
        if "masked example" not in losses:
            losses["masked example"] = charts.along_fgsm(masked_surface())
        yield Plot(
            "loss-along-fgsm",
            "curves",
            "Loss along the FGSM direction",
            "If the model is locally linear, the loss rises steadily up to the full step. A masked "
            "model's loss peaks early and falls again: the single step jumps over the peak.",
            charts.loss_along_fgsm(losses),
        )


def _surfaces(report: Report) -> Iterator[Plot]:
    if not report.surfaces:
        return
    surfaces = dict(report.surfaces)
    # A page must stay small enough to be sent by e-mail.
    if len(surfaces) > 3:
        surfaces = {name: {**s, "samples": []} for name, s in surfaces.items()}
    for i, (name, surface) in enumerate(surfaces.items(), 1):
        yield Plot(
            f"loss-surface-{i}",
            "surfaces",
            name[:1].upper() + name[1:],
            f"{surface.get('n')} images, {surface.get('norm')} eps {surface.get('eps', 0):.4g}, "
            f"seed {surface.get('seed')}.",
            charts.loss_surface(surface),
        )
    masked = masked_surface()
    yield Plot(
        "loss-surface-masked",
        "surfaces",
        "A masked model, for comparison",
        f"{masked['model']}: {masked['fgsm_accuracy']:.0%} under FGSM, "
        f"{masked['pgd_accuracy']:.0%} under PGD-50.",
        charts.loss_surface(masked),
    )


def _training(report: Report) -> Iterator[Plot]:
    rows = report.history or []
    columns = {k for row in rows for k in row}
    if any(k == "adv_accuracy" or k.startswith("val_") for k in columns):
        yield Plot(
            "training-accuracy",
            "training",
            "Accuracy while training",
            "On held-out images, except for “training batches”: the perturbed images of the steps. "
            "FGSM far above the worst case, or a sudden drop of the worst case, is a sign of "
            "catastrophic overfitting.",
            charts.training_curves(rows),
        )
    if "loss" in columns:
        yield Plot(
            "training-loss",
            "training",
            "Loss and its terms",
            "Mean over each epoch.",
            charts.training_losses(rows),
        )


def _holding(evidence: Any, *keys: str) -> Mapping[str, Any]:
    """Return the evidence if all the keys are present and not empty, else an empty dict.

    A skipped check has no evidence.
    """
    if isinstance(evidence, Mapping) and all(evidence.get(key) for key in keys):
        return evidence
    return {}
