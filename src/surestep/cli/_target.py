"""Options of the commands that judge a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from surestep.cli._options import device_option, names, numbers, seed_option
from surestep.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from surestep.targets import Target

POSITIVE = click.IntRange(min=1)
BUDGET = "standard"


def split_option(text: str) -> Callable[..., Any]:
    """Return the option ``--split``; ``text`` is its help."""
    return click.option(
        "--split",
        type=click.Choice(["test", "validation"]),
        default="test",
        show_default=True,
        help=text,
    )


_OPTIONS = (
    click.argument("model", metavar="MODEL"),
    click.option(
        "--weights", metavar="FILE", help="Weights for FILE.py:FACTORY or an architecture."
    ),
    click.option(
        "--dataset",
        metavar="TEXT",
        help="mnist, cifar10, cifar100, folder:PATH, npz:FILE or hf:NAME. [default: the run's]",
    ),
    split_option("Split to judge on; a run selected its weights on the validation images."),
    click.option("--data", "root", metavar="TEXT", help="Folder or file of the data set."),
    click.option(
        "--image-size",
        type=POSITIVE,
        help="Side to crop and resize images of a folder or the Hub to. [default: the run's]",
    ),
    click.option("--norm", metavar="linf|l2", help="[default: the run's, or linf]"),
    click.option("--mean", metavar="A,B,...", help="Mean per channel to normalise images with."),
    click.option(
        "--std",
        metavar="A,B,...",
        help="Standard deviation per channel, with --mean; of pixels in [0, 1].",
    ),
    device_option,
    seed_option("Random seed."),
)


def budget_option(what: str, default: str | None = BUDGET) -> Callable[..., Any]:
    """Return the option ``--budget``, None if not given; ``what`` begins its help."""
    told = f" [default: {default}]" if default else ""
    return click.option(
        "--budget",
        type=click.Choice(["quick", "standard", "thorough"]),
        help=f"{what}; standard and thorough end with AutoAttack.{told}",
    )


def chosen_attacks(attacks: str | None, budget: str | None) -> list[str] | None:
    """Return the names that ``--attacks`` gives; None if it is not given.

    Raises:
        UserError: ``--budget`` is given, too.
    """
    if attacks is None:
        return None
    if budget is not None:
        raise UserError("--attacks and --budget exclude each other: give one of them")
    return names(attacks)


def source_option(on_substitute: str) -> Callable[..., Any]:
    """Return the option ``--source``; its help ends with ``on_substitute``."""
    return click.option(
        "--source",
        "sources",
        multiple=True,
        metavar="MODEL",
        help="Model to craft transfer attacks on, given like MODEL; repeatable. " + on_substitute,
    )


def target_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the argument MODEL and the options for its weights, data, norm, device and seed."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def open_target(
    values: dict[str, Any], eps: str | None, sources: tuple[str, ...], n: int | None
) -> tuple[Target, list[nn.Module]]:
    """Pop the options that describe the target from a command's values, and load the target.

    Only ``n`` images are loaded; None loads all.

    Returns:
        The target, and the models of ``source_option`` on the same device.

    Raises:
        UserError: as in ``surestep.targets.open_target``, or a source is not a model.
    """
    from surestep import targets
    from surestep.devices import keep_freed_memory

    keep_freed_memory()  # otherwise every attack step pays for page faults on its activations
    described = ("weights", "dataset", "root", "image_size", "norm", "device", "split")
    options = {name: values.pop(name) for name in described}
    mean, std = (_per_channel(f"--{name}", values.pop(name)) for name in ("mean", "std"))
    target = targets.open_target(values.pop("model"), eps=eps, mean=mean, std=std, n=n, **options)
    if options["split"] != "test":
        click.echo(f"judged on the {options['split']} split, not on test images", err=True)
    for note in filter(None, (target.images.note, target.note)):
        click.echo(note, err=True)
    return target, [targets.open_source(name, target) for name in sources]


def _per_channel(flag: str, text: str | None) -> list[float] | None:
    wanted = "numbers, one per channel: 0.49,0.48,0.45"
    return None if text is None else numbers(flag, text, wanted, float)
