"""``surestep audit``."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import click

from surestep.cli._options import check_writable, hand_over, json_option
from surestep.cli._report import check_report, report_options, report_target
from surestep.cli._show import audit_tables, provenance
from surestep.cli._target import (
    BUDGET,
    POSITIVE,
    budget_option,
    open_target,
    source_option,
    target_options,
)


@click.command(short_help="Tell real robustness from masked gradients.")
@target_options
@click.option("--eps", metavar="NUMBER", help="Radius, such as 0.3 or 8/255. [default: the run's]")
@budget_option("How much to spend on attacks")
@source_option("Used in addition to a substitute trained on the model's answers.")
@click.option("--n", type=POSITIVE, default=1000, show_default=True, help="Number of images.")
@click.option(
    "--batch-size", type=POSITIVE, default=250, show_default=True, help="Images attacked at a time."
)
@click.option(
    "--state",
    metavar="FILE",
    help="Save progress in FILE.ATTACK; rerun with the same FILE to continue.",
)
@json_option
@report_options
def audit(
    eps: str | None,
    budget: str | None,
    sources: tuple[str, ...],
    json_file: str | None,
    html: str | None,
    plots: str | None,
    seed: int,
    **values: Any,
) -> None:
    """Tell whether the robustness of MODEL is real or an effect of masked gradients.

    MODEL is a run folder, FILE.py:FACTORY, an architecture such as lenet+ with --weights, a
    TorchScript (.pt) or torch.export (.pt2) program, timm:NAME or hf:NAME. The verdict is robust,
    pseudo-robust, not robust or inconclusive.

    \b
    Examples:
      surestep audit runs/one --budget quick --html audit.html
      surestep audit net.py:make --weights w.safetensors --dataset cifar10 --eps 8/255
    """
    check_writable(json_file)
    check_report(html, plots)
    budget = budget or BUDGET

    import surestep
    from surestep.auditing import estimate
    from surestep.devices import memory_for

    target, others = open_target(values, eps, sources, values["n"])
    n = min(values["n"], len(target.images))
    size = values["batch_size"]
    with memory_for("the estimate of its cost", f"lower --batch-size ({size})"):
        seconds = estimate(target.model, target.images, budget, n, target.preprocess, size)
    click.echo(f"audit of {n:,} images, budget {budget}: {_about(seconds)}", err=True)
    found = surestep.audit(
        target.model,
        target.images,
        target.threat,
        budget=budget,
        seed=seed,
        preprocess=target.preprocess,
        sources=others,
        tell=lambda text: print(f"  {text}", file=sys.stderr, flush=True),
        **values,
    )
    told = {**found.to_dict(), "run": target.name, **target.judged_on, **provenance()}
    hand_over(
        told,
        json_file,
        show=partial(audit_tables, target.name, found),
        also=partial(report_target, html, plots, target, values["batch_size"], audit=told),
    )


def _about(seconds: float) -> str:
    return (
        f"at most about {seconds / 60:.0f} minutes here"
        if seconds > 90
        else f"at most about {seconds:.0f} seconds here"
    )
