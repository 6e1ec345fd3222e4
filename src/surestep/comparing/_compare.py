"""Compare methods over seeds, or existing runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from surestep import methods as zoo
from surestep import runs
from surestep.auditing.budgets import budget_of
from surestep.comparing._conclude import conclude
from surestep.comparing._process import TrainingFailed
from surestep.comparing._rows import different_settings, group_by_row
from surestep.comparing._run import (
    OUTCOME_FILE,
    Entrant,
    Judging,
    Work,
    is_finished,
    read_saved_outcome,
    resolved,
)
from surestep.comparing._table import Comparison, Failure, Tell
from surestep.config import RunConfig
from surestep.data import Images, check_judged
from surestep.errors import UserError
from surestep.evaluation import suite
from surestep.training.run_folder import RunFolder

ATTACKS = ("fgsm", "pgd-100", "pgd-100-margin")
"""The default attacks of a comparison."""

_SHARED_SETTINGS = ("dataset", "norm", "eps")


def compare(
    methods: Sequence[str],
    seeds: int | Sequence[int] = 3,
    *,
    out: str | Path,
    preset: str | None = None,
    attacks: Sequence[str] | None = None,
    budget: str | None = None,
    audit: str | None = "quick",
    n: int = 1000,
    split: str = "test",
    eval_batch_size: int | None = None,
    tell: Tell = lambda _: None,
    **settings: Any,
) -> Comparison:
    """Train methods with several seeds each and judge them the same way.

    Runs are trained one after another into ``out/<method>-seed<k>``, each in its own process, then
    evaluated and audited. Each run's results are saved there in
    ``judged.json``: when called again, finished runs are skipped and a half-finished one is
    continued.

    A run that fails does not end the comparison; it is listed in ``failures``.

    Args:
        methods: slugs, as `surestep methods` lists them.
        seeds: the number of seeds, counted from 0, or a list of seeds.
        out: the folder for the run folders.
        preset: as in ``surestep train``: a preset's name, or "none"; by default each method's
            preset for the data set.
        attacks: names of the evaluation's attacks; by default ``ATTACKS``.
        budget: a set of attacks instead of ``attacks``: "quick", "standard" or "thorough".
        audit: budget of the audit; None for no audit.
        n: number of images, as taken by ``Images.first``.
        split: judge on images of "test" or "validation". The weights were selected on validation
            images, so that the results on them are optimistic.
        eval_batch_size: images attacked at a time; by default as in ``surestep.evaluate`` and
            ``surestep.audit``.
        tell: called with one line of text on what is being done.
        settings: training settings by their names in ``RunConfig``: dataset, eps, epochs, ...

    Returns:
        The comparison, with a row for each method that has a successful run.

    Raises:
        UserError: a name is unknown, no method or seed is given, a setting is invalid, the methods
            differ in data set or threat model, a run folder or saved result has other settings, or
            no run succeeded.
        RuntimeError: no run succeeded, and the first failure is a bug in surestep.
    """
    asked = _judging(attacks, budget, audit, n, split, eval_batch_size)
    for name, instead in (("method", "methods"), ("seed", "seeds")):
        if name in settings:
            raise UserError(f"{name} is not a setting of a comparison: give {instead}")
    names = _distinct("method", list(methods))
    numbers = _distinct("seed", list(range(seeds)) if isinstance(seeds, int) else list(seeds))
    for name in names:
        zoo.get(name)
    out, entrants = _check_out(out), []
    for name in names:
        for number in numbers:
            config = runs.resolve({**settings, "method": name, "seed": number}, preset)
            label = f"{name}-seed{number}"
            path = out / label / OUTCOME_FILE
            entrants.append(Entrant(label, out / label, resolved(config), path, trains=True))
    return _compare(entrants, asked, tell)


def compare_runs(
    folders: Sequence[str | Path],
    *,
    out: str | Path | None = None,
    attacks: Sequence[str] | None = None,
    budget: str | None = None,
    audit: str | None = "quick",
    n: int = 1000,
    split: str = "test",
    eval_batch_size: int | None = None,
    device: str | None = None,
    tell: Tell = lambda _: None,
) -> Comparison:
    """Judge finished runs the same way.

    Runs that differ only in the seed share a row. Peak memory is known only for runs that
    ``compare`` trained.

    Args:
        folders: run folders, as written by ``surestep train``.
        out: a folder to save each run's results in, so that a stopped comparison can continue;
            None saves nothing.
        attacks: names of the evaluation's attacks; by default ``ATTACKS``.
        budget: a set of attacks instead of ``attacks``: "quick", "standard" or "thorough".
        audit: budget of the audit; None for no audit.
        n: number of images, as taken by ``Images.first``.
        split: judge on images of "test" or "validation". The weights were selected on validation
            images, so that the results on them are optimistic.
        eval_batch_size: images attacked at a time; by default as in ``surestep.evaluate`` and
            ``surestep.audit``.
        device: where to judge; by default each run's own device setting.
        tell: called with one line of text on what is being done.

    Raises:
        UserError: a folder is not a finished run, two are the same run, their images or threat
            models differ, or no run could be judged.
    """
    asked = _judging(attacks, budget, audit, n, split, eval_batch_size)
    results = None if out is None else _check_out(out)
    entrants: list[Entrant] = []
    for folder in _distinct("run folder", [Path(f) for f in folders]):
        config = runs.read_config(folder)
        if not is_finished(RunFolder(folder), config):
            done = len(RunFolder(folder).history())
            raise UserError(
                f"{folder} is not finished (epoch {done} of {config.epochs}): continue it with "
                f"surestep train --resume {folder}"
            )
        base = folder.resolve().name
        taken = [entrant.label for entrant in entrants]
        label = next(k for k in _numbered_names(base) if k not in taken)
        path = None if results is None else results / label / OUTCOME_FILE
        entrants.append(Entrant(label, folder, resolved(config), path, trains=False, device=device))
    return _compare(entrants, asked, tell)


def _judging(
    attacks: Sequence[str] | None,
    budget: str | None,
    audit: str | None,
    n: int,
    split: str,
    batch_size: int | None,
) -> Judging:
    if attacks is not None and budget is not None:
        raise UserError("attacks and budget exclude each other: give one of them")
    if audit is not None:
        budget_of(audit)
    if n < 1:
        raise UserError(f"n {n}: give at least 1 image")
    check_judged(split)
    if batch_size is not None and batch_size < 1:
        raise UserError(f"eval_batch_size {batch_size}: give 1 or more")
    if attacks is None:
        attacks = ATTACKS if budget is None else suite.budget(budget)
    return Judging(tuple(dict.fromkeys(attacks)), audit, n, split, batch_size)


def _distinct(what: str, values: list[Any]) -> list[Any]:
    """Refuse a list that is empty or has duplicates."""
    if not values:
        raise UserError(f"there is nothing to compare: give at least one {what}")
    twice = next((v for k, v in enumerate(values) if v in values[:k]), None)
    if twice is not None:
        raise UserError(f"{what} {str(twice)!r} is named twice: leave one of them out")
    return values


def _check_out(out: str | Path) -> Path:
    if Path(out).exists() and not Path(out).is_dir():
        raise UserError(f"{out} is a file: give a folder for the results")
    run = RunFolder(Path(out))
    # A hardened run has only its weights beside its settings.
    marks = (run.environment, run.metrics, run.weights)
    if run.config.is_file() and any(mark.exists() for mark in marks):
        raise UserError(f"{out} is a run folder, whose report would be overwritten: give another")
    page = Path(out) / "report.html"
    if page.exists() and not (Path(out) / "comparison.json").exists():
        raise UserError(
            f"{page} is not a comparison's and would be overwritten: give another --out"
        )
    return Path(out)


def _numbered_names(base: str) -> Iterable[str]:
    yield base
    number = 2
    while True:
        yield f"{base}-{number}"
        number += 1


def _compare(entrants: list[Entrant], asked: Judging, tell: Tell) -> Comparison:
    """Check everything, then train and judge one run after another."""
    images = _check_alike(entrants, asked)
    rows = group_by_row(entrants)
    # Identity stands in for the substitute that a transfer attack trains later.
    suite.parse_all(asked.attacks, runs.build_threat(entrants[0].config), [torch.nn.Identity()])
    known = {entrant.label: read_saved_outcome(entrant, asked) for entrant in entrants}
    if entrants[0].trains:
        out = entrants[0].folder.parent
        tell(f"runs and results go to {out}: the same comparison with this folder continues")
        if different := different_settings(rows):  # now as well as in the notes at the end
            tell(f"the methods are trained with different settings: {'; '.join(different)}")
    outcomes, failures = {}, []
    for k, entrant in enumerate(entrants, 1):
        try:
            told = f"{entrant.label} ({k} of {len(entrants)})"
            before = known[entrant.label]
            outcomes[entrant.label] = Work(entrant, before, asked, images, told, tell).complete()
        except (UserError, TrainingFailed) as e:
            fault = isinstance(e, TrainingFailed) and e.fault
            failures.append(Failure(entrant.label, str(e), fault))
            tell(f"{entrant.label} failed: {e}")
    if not outcomes:
        first = failures[0]
        if first.fault:
            raise RuntimeError(f"{first.run}: {first.message}")
        raise UserError(f"no run succeeded; {first.run}: {first.message}")
    return conclude(rows, outcomes, failures, asked)


def _check_alike(entrants: list[Entrant], asked: Judging) -> Images:
    """Check that all runs share the images to judge on and the threat model; return the images."""
    # A substitute for the transfer attack is trained on more images than are judged.
    first, n = entrants[0], None if "transfer" in asked.attacks else asked.n
    images = runs.load_data(first.config, asked.split, n)
    known = {_source(first.config): images}
    for entrant in entrants[1:]:
        for name in _SHARED_SETTINGS:
            one, other = getattr(first.config, name), getattr(entrant.config, name)
            if _without_path(one) != _without_path(other):
                raise UserError(
                    f"{first.name} and {entrant.name} cannot be compared: {name} {one!r} and "
                    f"{other!r}"
                )
        source = _source(entrant.config)
        if source not in known:
            # Two paths may hold the same data, and two archives of one kind may differ.
            known[source] = runs.load_data(entrant.config, asked.split, n)
        if not _same(images, known[source]):
            raise UserError(
                f"{first.name} and {entrant.name} cannot be compared: their {asked.split} images "
                f"differ ({_data_name(first.config)} and {_data_name(entrant.config)})"
            )
    return images


def _without_path(value: Any) -> Any:
    """Return a setting, of a data set only the kind: its images are compared instead."""
    return value.partition(":")[0] if isinstance(value, str) else value


def _source(config: RunConfig) -> tuple[Any, ...]:
    return (config.dataset, config.data, config.image_size)


def _data_name(config: RunConfig) -> str:
    return config.data or config.dataset


def _same(one: Images, other: Images) -> bool:
    if one is other:
        return True
    alike = one.x.shape == other.x.shape and one.x.dtype == other.x.dtype
    return alike and torch.equal(one.x, other.x) and torch.equal(one.y, other.y)
