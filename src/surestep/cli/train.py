"""``surestep train``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surestep.cli._main import is_first_process
from surestep.cli._options import (
    check_overwrite,
    check_writable,
    config_options,
    given,
    hand_over,
    json_option,
    new_folder,
    parse_params,
)
from surestep.cli._report import LOOKED_AT, of_model, of_run, write_report
from surestep.cli._show import provenance, share_of_images
from surestep.config import CHANGEABLE, RunConfig, parse, read_yaml
from surestep.errors import UserError

if TYPE_CHECKING:
    from torch import nn

_FIRST = ("method", "dataset", "model", "eps", "epochs", "batch_size", "lr", "seed")


@click.command(short_help="Train a robust classifier with a method.")
@config_options(_FIRST)
@click.option(
    "--preset",
    metavar="NAME",
    help="A preset of the method (`surestep methods NAME` lists them), or none. "
    "[default: the one named after the data set, or its variant such as cifar10-16 if that is "
    "nearer to --eps; for cifar100, if the method has none, cifar10's]",
)
@click.option(
    "--param",
    "pairs",
    multiple=True,
    metavar="NAME=VALUE",
    help="Hyperparameter of the method; repeatable.",
)
@click.option("--out", metavar="RUN", help="Run folder. [default: runs/<date>-<method>-<dataset>]")
@click.option(
    "--config",
    "config_file",
    metavar="FILE",
    help="YAML file of settings, such as a run's config.yaml.",
)
@click.option(
    "--resume",
    metavar="RUN",
    help="Continue a run with the settings in its folder. Only --device, --max-memory, "
    "--checkpoint-every and --tensorboard may be given anew.",
)
@click.option("--overwrite", is_flag=True, help="Replace the run folder if it exists.")
@json_option
@click.option("--quiet", is_flag=True, help="Show nothing while training.")
@config_options(n for n in RunConfig.model_fields if n not in (*_FIRST, "params", "mean_sparse"))
def train(
    preset: str | None,
    pairs: tuple[str, ...],
    out: str | None,
    config_file: str | None,
    resume: str | None,
    overwrite: bool,
    json_file: str | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Train a robust classifier with a method.

    Settings come from these sources, each overriding the ones before it: the defaults, the method's
    preset for the data set (with --config, only if --preset names one), the --config file, the
    command line. With another --eps, step sizes and other lengths of a preset or file are scaled in
    proportion.

    \b
    Examples:
      surestep train --method sat-r2 --dataset mnist --preset mnist-fast
      surestep train --method sat-r3 --dataset cifar10 --model preactresnet18 --epochs 30
      surestep train --config runs/one/config.yaml --seed 1 --out runs/two
      surestep train --resume runs/one
      surestep train --resume runs/one --max-memory 10
    """
    settings, from_file = given(options), None
    if params := parse_params(pairs):
        settings["params"] = params
    check_writable(json_file)
    others = {"preset": preset, "config": config_file, "out": out, "overwrite": overwrite}
    extra = [name for name in settings if name not in CHANGEABLE]
    extra += [name for name, value in others.items() if value]
    if resume is not None and extra:
        named = ", ".join("--" + e.replace("_", "-").replace("params", "param") for e in extra)
        raise UserError(
            f"--resume takes its settings from {resume}/config.yaml: leave out {named}, or start a "
            "new run with --config"
        )

    check_overwrite(overwrite, out, "RUN")

    from surestep import runs

    on_start: Callable[[], None] | None = None
    if resume is not None:
        begun, out = runs.read_config(resume), resume
        config = parse(RunConfig, {**begun.model_dump(), **settings})
    else:
        if config_file is not None:
            from_file = read_yaml(config_file)
            runs.check_rerunnable(from_file, config_file)
            parse(RunConfig, from_file, where=f"{config_file}: ")
            # A file is complete in itself: a preset is used only if one is named.
            preset = preset or "none"
        config = runs.resolve(settings, preset, from_file)
        out = out or new_folder(f"{config.method}-{config.dataset.partition(':')[0]}")
        if (
            is_first_process()
            and preset is None
            and not runs.usual_preset(config.method, config.dataset)
        ):
            on_start = partial(_tell_defaults, config, settings)
    try:
        result = runs.train(
            config,
            out,
            resume=resume is not None,
            overwrite=overwrite,
            quiet=quiet,
            on_start=on_start,
        )
    except BaseException as e:
        # If one process fails, the others wait for it, and destroying an NCCL group would wait for
        # them. On SIGTERM all processes stop together.
        _leave_group(together=isinstance(e, SystemExit))
        raise
    _leave_group(together=True)
    if not is_first_process():
        return
    _report(config, out, result.model)
    last = next(r for r in result.history if r["epoch"] == result.best_epoch)

    def show() -> None:
        judged = ""
        if "val_worst_case" in last:
            share, n = last["val_worst_case"], last["val_n"]
            judged = f", worst case {share_of_images(share, n)} of {n:,} held-out images"
        seconds = f"{result.train_seconds:.0f} s of training"
        click.echo(f"{out}: epoch {result.best_epoch} selected{judged}, {seconds}")
        click.echo(f"judge it on test data: surestep evaluate {out} --budget quick")

    told = {
        "run": str(out),
        "method": config.method,
        "best_epoch": result.best_epoch,
        "train_seconds": result.train_seconds,
        "validation": {k: v for k, v in last.items() if k.startswith("val_")},
        "collapsed_epochs": [row["epoch"] for row in result.history if row.get("collapse")],
    }
    hand_over(told, json_file, (lambda: None) if quiet else show)


def _tell_defaults(config: RunConfig, settings: dict[str, Any]) -> None:
    """Print to stderr which defaults are used because there is no preset for the data set."""
    left = [name for name in ("model", "epochs", "lr") if name not in settings]
    if left:
        from surestep import runs
        from surestep.methods import get

        taken = [f"{name} {getattr(config, name)}" for name in left]
        own = runs.build_method(config).params()
        taken += [
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in own.items()
            if name not in config.params
        ]
        colour = "cifar10" in get(config.method).presets
        advice = ", such as cifar10 for colour images" if colour else ""
        click.echo(
            f"{config.method} has no preset for {config.dataset}, using defaults, most of them "
            f"meant for MNIST: {', '.join(taken)}; --preset NAME uses another data set's{advice}",
            err=True,
        )


def _report(config: RunConfig, out: str, model: nn.Module) -> None:
    """Write the run's report.html; if that fails, say why on stderr."""
    from surestep import report, runs
    from surestep.training.run_folder import RunFolder

    run, threat = RunFolder(Path(out)), runs.build_threat(config)
    try:
        report.require()
        images = runs.load_data(config, "validation", LOOKED_AT)
        shown = of_model(model, images, threat, out, config.batch_size)
        parts = {**shown, **of_run(run), **provenance()}
        write_report(str(run.report), None, out, **parts)
    except Exception as e:  # the run itself is complete and saved
        click.echo(f"no report.html: {e}", err=True)


def _leave_group(*, together: bool) -> None:
    """Destroy the process group; if left until exit, its threads may abort the process."""
    from torch import distributed

    if distributed.is_initialized() and (together or distributed.get_backend() == "gloo"):
        distributed.destroy_process_group()
