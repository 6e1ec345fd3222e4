"""``surestep demo``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
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
    from surestep.config import RunConfig
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

    from surestep import runs
    from surestep.training.run_folder import RunFolder

    for name in _METHODS if out else ():
        RunFolder.plan(f"{out}/{name}", overwrite=overwrite)
    start = time.perf_counter()
    pictured = bool(html or plots)
    found = {}
    for name in _METHODS:
        config = runs.resolve({"method": name, "seed": seed}, "mnist-demo")
        folder = f"{out}/{name}" if out else None
        found[name] = _train_and_judge(config, folder, n, overwrite=overwrite, pictured=pictured)

    def report() -> None:
        if pictured:
            write_report(html, plots, "demo", **_report(found), **provenance())

    def show() -> None:
        _show(found)
        click.echo(f"({time.perf_counter() - start:.0f} s in all)")

    hand_over({name: one.to_dict() for name, one in found.items()}, json_file, show, report)


@dataclass(frozen=True)
class _Trained:
    """A model of the demo.

    Attributes:
        config: the settings of its run.
        evaluation, audit: what was found about it.
        passes: per image and step of its training.
        seconds: of its training.
        pictures: parts of the report about it; empty if no report is asked for.
    """

    config: RunConfig
    evaluation: Evaluation
    audit: Audit
    passes: float
    seconds: float
    pictures: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.evaluation.to_dict(),
            "passes": self.passes,
            "train_seconds": self.seconds,
            "audit": self.audit.to_dict(),
        }

    def row(self) -> dict[str, Any]:
        """Return a row of the report's comparison."""
        robust = self.evaluation.robust_accuracy
        return {
            "method": self.config.method,
            "clean_accuracy": self.evaluation.clean_accuracy,
            "fgsm": robust["fgsm"],
            "pgd": min(v for k, v in robust.items() if k.startswith("pgd")),
            "worst_case_accuracy": self.evaluation.worst_case_accuracy,
            "verdict": self.audit.verdict,
            "passes": self.passes,
            "seconds": self.seconds,
        }


def _train_and_judge(
    config: RunConfig, out: str | None, n: int, *, overwrite: bool, pictured: bool
) -> _Trained:
    """Train a run, then attack it on ``n`` test images and audit it on some of them."""
    import surestep
    from surestep import runs

    name = config.method
    click.echo(f"training with {name}", err=True)
    fitted = runs.train(config, out, overwrite=overwrite)
    images, threat = runs.load_data(config, "test"), runs.build_threat(config)
    attacks = ("fgsm", "pgd-100", "pgd-100-margin")
    judged = (fitted.model, images, threat)
    with progress_bar(f"attacking {name}") as watched:
        evaluation = surestep.evaluate(*judged, attacks, n=n, seed=config.seed, **watched)
    click.echo(f"auditing {name}", err=True)
    audit = surestep.audit(*judged, budget="quick", n=min(n, _AUDITED), seed=config.seed)
    pictures = of_model(*judged, name, config.batch_size) if pictured else {}
    passes = runs.passes_of(config)
    return _Trained(config, evaluation, audit, passes, fitted.train_seconds, pictures)


def _report(found: Mapping[str, _Trained]) -> dict[str, Any]:
    """Return the parts of the report: SAT's pictures, and both loss surfaces and rows."""
    sat = found["sat-r2"]
    n, audited = sat.evaluation.n, sat.audit.n
    worst = ", ".join(
        f"{name} {share_of_images(one.evaluation.worst_case_accuracy, n)}"
        for name, one in found.items()
    )
    # A model without pictures has no surfaces.
    shown = [one.pictures.get("surfaces", {}) for one in found.values()]
    return {
        **sat.pictures,
        "surfaces": {name: surface for one in shown for name, surface in one.items()},
        "seeds": {"training": sat.config.seed},
        "comparison": [one.row() for one in found.values()],
        "config": {
            "data set": sat.config.dataset,
            "norm": sat.config.norm,
            "eps": sat.config.eps,
            "test images": n,
            "audited images": audited,
        },
        "notes": [
            f"The accuracies are on {n:,} test images, worst case (95% interval): {worst}. The "
            f"verdicts come from an audit of {audited:,} of them."
        ],
    }


def _show(found: Mapping[str, _Trained]) -> None:
    """Print the table, a sentence on what it shows, and the audits' sentences."""
    from surestep import verdicts

    fgsm, sat = found["fgsm"], found["sat-r2"]
    rows = {
        f"audit, {fgsm.audit.n} images": {
            name: f"{one.audit.verdict}, {one.audit.found_accuracy:.0%} left"
            for name, one in found.items()
        },
        "passes per image": {name: f"{one.passes:g}" for name, one in found.items()},
        "training seconds": {name: f"{one.seconds:.0f}" for name, one in found.items()},
    }
    evaluation_table({name: one.evaluation for name, one in found.items()}, rows)
    masked = fgsm.audit.verdict == verdicts.PSEUDO
    click.echo(_sentence(fgsm.evaluation, sat.evaluation, masked=masked))
    for name, one in found.items():
        click.echo(f"audit of {name}: {one.audit.sentence}")


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
