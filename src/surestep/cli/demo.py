"""``surestep demo``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from surestep.cli._options import (
    check_overwrite,
    check_writable,
    hand_over,
    json_option,
    seed_option,
)
from surestep.cli._report import check_report, of_model, report_options, write_report
from surestep.cli._show import evaluation_table, progress_bar, provenance, share_of_images

if TYPE_CHECKING:
    from surestep.auditing import Audit
    from surestep.evaluation import Evaluation

_METHODS = ("fgsm", "sat-r2")
_AUDITED = 100  # images: enough to detect masking, in about a minute


@click.command(short_help="See FGSM training fail and SAT succeed, in minutes on a laptop.")
@seed_option("Seed of the trainings, attacks and audits.")
@click.option(
    "--n",
    type=click.IntRange(1, 10_000),
    default=1000,
    show_default=True,
    help="Number of test images to judge on.",
)
@click.option("--out", metavar="DIR", help="Keep both run folders in DIR. [default: keep nothing]")
@click.option("--overwrite", is_flag=True, help="Replace the run folders in DIR.")
@json_option
@report_options
def demo(
    seed: int,
    n: int,
    out: str | None,
    overwrite: bool,
    json_file: str | None,
    html: str | None,
    plots: str | None,
) -> None:
    """See FGSM training fail and SAT succeed, on MNIST at eps 0.3.

    Trains the same small network twice: with plain FGSM, which ends in gradient masking, and with
    SAT-R2, whose steps take twice as long. Then it attacks both with FGSM and PGD-100 and audits
    both. MNIST comes with surestep, so nothing is downloaded.
    """
    check_overwrite(overwrite, out, "DIR")
    check_writable(json_file)
    check_report(html, plots)
    # The next import takes a moment, so print something first.
    click.echo("surestep demo: LeNet+ on MNIST, l-inf eps 0.3, two training methods", err=True)

    import surestep
    from surestep import runs, verdicts
    from surestep.training.run_folder import RunFolder

    for name in _METHODS if out else ():
        RunFolder.plan(f"{out}/{name}", overwrite=overwrite)
    start = time.perf_counter()
    results, audits, costs, seconds, pictures = {}, {}, {}, {}, {}
    for name in _METHODS:
        config = runs.resolve({"method": name, "seed": seed}, "mnist-demo")
        click.echo(f"training with {name}", err=True)
        fitted = runs.train(config, f"{out}/{name}" if out else None, overwrite=overwrite)
        images, threat = runs.load_data(config, "test"), runs.build_threat(config)
        with progress_bar(f"attacking {name}") as watched:
            results[name] = surestep.evaluate(
                fitted.model,
                images,
                threat,
                ("fgsm", "pgd-100", "pgd-100-margin"),
                n=n,
                seed=seed,
                **watched._asdict(),
            )
        click.echo(f"auditing {name}", err=True)
        audits[name] = surestep.audit(
            fitted.model, images, threat, budget="quick", n=min(n, _AUDITED), seed=seed
        )
        costs[name] = runs.build_method(config).cost(config.batch_size).total
        seconds[name] = fitted.train_seconds
        if html or plots:
            pictures[name] = of_model(fitted.model, images, threat, name, config.batch_size)
    told = {
        name: {
            **results[name].to_dict(),
            "passes": costs[name],
            "train_seconds": seconds[name],
            "audit": audits[name].to_dict(),
        }
        for name in _METHODS
    }

    def report() -> None:
        if html or plots:
            # A model without pictures has no surfaces.
            shown = [one.get("surfaces", {}) for one in pictures.values()]
            surfaces = {name: surface for one in shown for name, surface in one.items()}
            parts = {**pictures["sat-r2"], "surfaces": surfaces, "seeds": {"training": seed}}
            comparison = [_row(k, results[k], audits[k], costs[k], seconds[k]) for k in _METHODS]
            parts["config"] = {
                "data set": config.dataset,
                "norm": config.norm,
                "eps": threat.eps,
                "test images": n,
                "audited images": audits["sat-r2"].n,
            }
            parts["notes"] = [
                f"The accuracies are on {n:,} test images, worst case (95% interval): "
                + ", ".join(f"{k} {_worst(results[k])}" for k in _METHODS)
                + f". The verdicts come from an audit of {audits['sat-r2'].n:,} of them."
            ]
            write_report(html, plots, "demo", comparison=comparison, **parts, **provenance())

    def show() -> None:
        rows = {
            f"audit, {audits['fgsm'].n} images": {
                k: f"{found.verdict}, {found.found_accuracy:.0%} left"
                for k, found in audits.items()
            },
            "passes per image": {k: f"{v:g}" for k, v in costs.items()},
            "training seconds": {k: f"{v:.0f}" for k, v in seconds.items()},
        }
        evaluation_table(results, rows)
        masked = audits["fgsm"].verdict == verdicts.PSEUDO
        click.echo(_sentence(results["fgsm"], results["sat-r2"], masked=masked))
        for name, found in audits.items():
            click.echo(f"audit of {name}: {found.sentence}")
        click.echo(f"({time.perf_counter() - start:.0f} s in all)")

    hand_over(told, json_file, show, report)


def _worst(judged: Evaluation) -> str:
    return share_of_images(judged.worst_case_accuracy, judged.n)


def _row(
    name: str, judged: Evaluation, found: Audit, passes: float, seconds: float
) -> dict[str, Any]:
    """Return a row of the report's comparison."""
    pgd = min(v for k, v in judged.robust_accuracy.items() if k.startswith("pgd"))
    return {
        "method": name,
        "clean_accuracy": judged.clean_accuracy,
        "fgsm": judged.robust_accuracy["fgsm"],
        "pgd": pgd,
        "worst_case_accuracy": judged.worst_case_accuracy,
        "verdict": found.verdict,
        "passes": passes,
        "seconds": seconds,
    }


def _sentence(fgsm: Evaluation, sat: Evaluation, *, masked: bool) -> str:
    """Describe the outcome, from the numbers and from what the audit of FGSM's model says."""
    looks, holds = fgsm.robust_accuracy["fgsm"], fgsm.worst_case_accuracy
    if looks - holds > 0.2:
        first = (
            f"FGSM training looks robust under the attack it trained on ({looks:.1%}), but the "
            f"stronger attacks leave {holds:.1%}" + (": its gradients are masked" if masked else "")
        )
    elif fgsm.clean_accuracy < 0.5:
        first = (
            f"FGSM training failed to learn this time ({fgsm.clean_accuracy:.1%} clean accuracy), "
            "another --seed may lead to masked gradients"
        )
    else:
        first = f"FGSM training kept {holds:.1%} under the strongest attack this time"
    return f"{first}; SAT-R2, which penalises masking, keeps {sat.worst_case_accuracy:.1%}."
