"""``surestep evaluate``."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import click

from surestep.cli._options import check_writable, hand_over, json_option, names
from surestep.cli._report import check_report, report_options, report_target
from surestep.cli._show import evaluation_table, progress_bar, provenance, share_of_images
from surestep.cli._target import (
    BUDGET,
    POSITIVE,
    budget_option,
    chosen_attacks,
    open_target,
    source_option,
    target_options,
)
from surestep.errors import UserError

if TYPE_CHECKING:
    from surestep.evaluation import Evaluation

_FEW = 20  # images on which a good model may be no better than chance


@click.command(short_help="Measure a model's accuracy on clean images and under attack.")
@target_options
@click.option(
    "--eps",
    metavar="A,B,...",
    help="Radius, such as 0.3 or 8/255. Several give a curve; the last one is reported. "
    "[default: the run's]",
)
@budget_option("Which attacks to run")
@click.option(
    "--attacks",
    metavar="A,B,...",
    help="Attacks, instead of a budget: fgsm, r-fgsm, i-fgsm-K, mi-fgsm-K, noise-K, "
    "pgd-K[xRESTARTS][-ce|-margin|-dlr], apgd-ce, apgd-t, fab-t, square[-K], autoattack, transfer; "
    "with foolbox also cw-l2[-K], deepfool[-K].",
)
@source_option("Without one, transfer trains a substitute on the model's answers.")
@click.option(
    "--n",
    type=POSITIVE,
    help="Use the first N images, or N drawn from all if sorted by class. [default: all]",
)
@click.option(
    "--batch-size", type=POSITIVE, default=500, show_default=True, help="Images attacked at a time."
)
@click.option(
    "--state", metavar="FILE", help="Save progress here; rerun with the same FILE to continue."
)
@json_option
@report_options
def evaluate(
    eps: str | None,
    budget: str | None,
    attacks: str | None,
    sources: tuple[str, ...],
    json_file: str | None,
    html: str | None,
    plots: str | None,
    seed: int,
    **values: Any,
) -> None:
    """Measure the accuracy of MODEL on held-out images, clean and under attack.

    MODEL is a run folder, FILE.py:FACTORY, an architecture such as lenet+ with --weights, a
    TorchScript (.pt) or torch.export (.pt2) program, timm:NAME or hf:NAME. The worst case takes the
    strongest attack on each image; it is the number to quote.

    \b
    Examples:
      surestep evaluate runs/one --budget quick
      surestep evaluate runs/one --attacks pgd-50x10,pgd-50x10-margin --n 1000 --json result.json
      surestep evaluate net.py:make --weights w.safetensors --dataset cifar10 --eps 8/255
    """
    check_writable(json_file)
    check_report(html, plots)

    import surestep

    radii = names(eps) if eps is not None else [None]
    if not radii:
        raise UserError(
            f"--eps {eps!r} holds no radius: give one, such as 8/255, or several with commas"
        )
    chosen = chosen_attacks(attacks, budget)
    budget = budget or BUDGET
    if sources and chosen is not None and "transfer" not in chosen:
        raise UserError("--source is for the transfer attack: add transfer to --attacks")
    # A substitute for the transfer attack is trained on more images than are judged.
    learns = "transfer" in (chosen or ()) and not sources
    n = None if learns else values["n"]
    target, others = open_target(values, radii[-1], sources, n)
    more = [target.threat.with_eps(e).eps for e in _parse_radii(radii)] if len(radii) > 1 else []
    if chosen is None and others:
        chosen = [*surestep.evaluation.suite.budget(budget), "transfer"]
    with progress_bar("attacking") as watched:
        result = surestep.evaluate(
            target.model,
            target.images,
            target.threat,
            chosen,
            budget=budget,
            seed=seed,
            eps=more,
            preprocess=target.preprocess,
            sources=others,
            **watched,
            **values,
        )
    if _at_chance(result):
        click.echo(
            f"surestep: warning: clean accuracy {result.clean_accuracy:.1%} is at chance: are the "
            "weights, --mean and --std, and the order of the labels those of the model?",
            err=True,
        )
    told = {**result.to_dict(), "run": target.name, **target.judged_on, **provenance()}
    curve = {
        f"worst case at eps {at['eps']:.4g}": {
            target.name: share_of_images(at["worst_case_accuracy"], at["n"])
        }
        for at in result.curve
        if at["eps"] != result.threat["eps"]
    }
    hand_over(
        told,
        json_file,
        show=partial(evaluation_table, {target.name: result}, curve),
        also=partial(report_target, html, plots, target, values["batch_size"], evaluation=told),
    )


def _at_chance(result: Evaluation) -> bool:
    """Tell whether clean accuracy is no better than that of always giving the commonest label."""
    of_label = [row["n"] for row in result.per_class]
    low, _ = result.intervals["clean"]
    return result.n >= _FEW and len(of_label) > 1 and low <= max(of_label) / result.n


def _parse_radii(texts: list[Any]) -> list[float]:
    from surestep.config import RunConfig, parse

    return [parse(RunConfig, {"eps": text}).eps for text in texts]
