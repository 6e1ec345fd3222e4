"""Compare methods over seeds, or existing runs: which runs share a row, and the table's notes."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from surestep import environment, runs
from surestep import methods as zoo
from surestep.auditing.budgets import budget_of
from surestep.comparing._run import (
    OUTCOME_FILE,
    Entrant,
    Failed,
    Judging,
    bring_to_end,
    epochs_done,
    finished,
    numbers_of,
    read,
    whole,
)
from surestep.comparing._table import COLUMNS, Comparison, Failure, Number, Row, Tell
from surestep.config import RunConfig
from surestep.data import Images
from surestep.devices import pick_device
from surestep.errors import UserError
from surestep.evaluation import suite, wilson_interval
from surestep.training.run_folder import RunFolder
from surestep.verdicts import SEVERITY

ATTACKS = ("fgsm", "pgd-100", "pgd-100-margin")
"""The default attacks of a comparison."""

_ALIKE = ("dataset", "norm", "eps")
# Settings that may differ within a row: except the seed, they change results by rounding at most.
_NO_MATTER = ("seed", "tensorboard", "checkpoint_every", "engine", "precision")


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
    eval_batch_size: int | None = None,
    tell: Tell = lambda _: None,
    **settings: Any,
) -> Comparison:
    """Train methods with several seeds each and judge them the same way.

    Runs are trained one after another into ``out/<method>-seed<k>``, each in its own process, then
    evaluated and audited on test images. Each run's results are saved there in
    ``comparison.json``: when called again, finished runs are skipped and a half-finished one is
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
        n: number of test images, as taken by ``Images.first``.
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
    asked = _asked(attacks, budget, audit, n, eval_batch_size)
    for name, instead in (("method", "methods"), ("seed", "seeds")):
        if name in settings:
            raise UserError(f"{name} is not a setting of a comparison: give {instead}")
    names = _distinct("method", list(methods))
    numbers = _distinct("seed", list(range(seeds)) if isinstance(seeds, int) else list(seeds))
    for name in names:
        zoo.get(name)
    out, entrants = _folder(out), []
    for name in names:
        for number in numbers:
            config = runs.resolve({**settings, "method": name, "seed": number}, preset)
            label = f"{name}-seed{number}"
            path = out / label / OUTCOME_FILE
            entrants.append(Entrant(label, out / label, whole(config), path, trains=True))
    return _compare(entrants, asked, tell)


def compare_runs(
    folders: Sequence[str | Path],
    *,
    out: str | Path | None = None,
    attacks: Sequence[str] | None = None,
    budget: str | None = None,
    audit: str | None = "quick",
    n: int = 1000,
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
        n: number of test images, as taken by ``Images.first``.
        eval_batch_size: images attacked at a time; by default as in ``surestep.evaluate`` and
            ``surestep.audit``.
        device: where to judge; by default each run's own device setting.
        tell: called with one line of text on what is being done.

    Raises:
        UserError: a folder is not a finished run, two are the same run, their test images or threat
            models differ, or no run could be judged.
    """
    asked = _asked(attacks, budget, audit, n, eval_batch_size)
    place = None if out is None else _folder(out)
    entrants: list[Entrant] = []
    for folder in _distinct("run folder", [Path(f) for f in folders]):
        config = runs.read_config(folder)
        done = epochs_done(folder)
        if not finished(folder, config):
            raise UserError(
                f"{folder} is not finished (epoch {done} of {config.epochs}): continue it with "
                f"surestep train --resume {folder}"
            )
        base = folder.resolve().name
        taken = [entrant.label for entrant in entrants]
        label = next(k for k in _numbered(base) if k not in taken)
        path = None if place is None else place / label / OUTCOME_FILE
        entrants.append(Entrant(label, folder, whole(config), path, trains=False, device=device))
    return _compare(entrants, asked, tell)


def _asked(
    attacks: Sequence[str] | None,
    budget: str | None,
    audit: str | None,
    n: int,
    batch_size: int | None,
) -> Judging:
    if attacks is not None and budget is not None:
        raise UserError("attacks and budget exclude each other: give one of them")
    if audit is not None:
        budget_of(audit)
    if n < 1:
        raise UserError(f"n {n}: give at least 1 test image")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"eval_batch_size {batch_size}: give 1 or more")
    if attacks is None:
        attacks = ATTACKS if budget is None else suite.budget(budget)
    return Judging(tuple(dict.fromkeys(attacks)), audit, n, batch_size)


def _distinct(what: str, values: list[Any]) -> list[Any]:
    """Refuse a list that is empty or has duplicates."""
    if not values:
        raise UserError(f"there is nothing to compare: give at least one {what}")
    twice = next((v for k, v in enumerate(values) if v in values[:k]), None)
    if twice is not None:
        raise UserError(f"{what} {str(twice)!r} is named twice: leave one of them out")
    return values


def _folder(out: str | Path) -> Path:
    if Path(out).exists() and not Path(out).is_dir():
        raise UserError(f"{out} is a file: give a folder for the results")
    run = RunFolder(Path(out))
    if run.config.is_file() and any(p.exists() for p in (run.environment, run.metrics)):
        raise UserError(f"{out} is a run folder, whose report would be overwritten: give another")
    return Path(out)


def _numbered(base: str) -> Iterable[str]:
    yield base
    number = 2
    while True:
        yield f"{base}-{number}"
        number += 1


def _compare(entrants: list[Entrant], asked: Judging, tell: Tell) -> Comparison:
    """Check everything, then train and judge one run after another."""
    images = _check_alike(entrants, None if "transfer" in asked.attacks else asked.n)
    rows = _group(entrants)
    # Identity stands in for the substitute that a transfer attack trains later.
    suite.parse_all(asked.attacks, runs.build_threat(entrants[0].config), [torch.nn.Identity()])
    known = {entrant.label: read(entrant, asked) for entrant in entrants}
    different = _different(rows)
    if different and any(e.trains for e in entrants):  # before the work, and in the notes
        tell(f"the methods are trained with different settings: {'; '.join(different)}")
    outcomes, failures = {}, []
    for k, entrant in enumerate(entrants, 1):
        try:
            told = f"{entrant.label} ({k} of {len(entrants)})"
            before = known[entrant.label]
            outcomes[entrant.label] = bring_to_end(entrant, before, asked, images, told, tell)
        except (UserError, Failed) as e:
            failures.append(Failure(entrant.label, str(e), isinstance(e, Failed) and e.fault))
            tell(f"{entrant.label} failed: {e}")
    if not outcomes:
        first = failures[0]
        if first.fault:
            raise RuntimeError(f"{first.run}: {first.message}")
        raise UserError(f"no run succeeded; {first.run}: {first.message}")
    return _conclude(entrants, rows, outcomes, failures, asked)


def _check_alike(entrants: list[Entrant], n: int | None) -> Images:
    """Check that all runs share test images and threat model; return the images."""
    first = entrants[0]
    images = runs.load_data(first.config, "test", n)
    known = {_place(first.config): images}
    for entrant in entrants[1:]:
        for name in _ALIKE:
            one, other = getattr(first.config, name), getattr(entrant.config, name)
            if _kind(one) != _kind(other):
                raise UserError(
                    f"{first.name} and {entrant.name} cannot be compared: {name} {one!r} and "
                    f"{other!r}"
                )
        place = _place(entrant.config)
        if place not in known:
            # Two paths may hold the same data, and two archives of one kind may differ.
            known[place] = runs.load_data(entrant.config, "test", n)
        if not _same(images, known[place]):
            raise UserError(
                f"{first.name} and {entrant.name} cannot be compared: their test images differ "
                f"({_told(first.config)} and {_told(entrant.config)})"
            )
    return images


def _kind(value: Any) -> Any:
    """Return a setting, a data set without its path: its images are compared instead."""
    return value.partition(":")[0] if isinstance(value, str) else value


def _place(config: RunConfig) -> tuple[Any, ...]:
    return (config.dataset, config.data, config.image_size)


def _told(config: RunConfig) -> str:
    return config.data or config.dataset


def _same(one: Images, other: Images) -> bool:
    if one is other:
        return True
    alike = one.x.shape == other.x.shape and one.x.dtype == other.x.dtype
    return alike and torch.equal(one.x, other.x) and torch.equal(one.y, other.y)


def _group(entrants: list[Entrant]) -> dict[str, list[Entrant]]:
    """Return the runs by row; runs that differ only in the seed share one.

    Raises:
        UserError: two runs are the same, which would make the standard deviation too small.
    """
    groups: list[list[Entrant]] = []
    for entrant in entrants:
        for group in groups:
            # A seed that occurs twice means that engines or precisions are compared: separate rows.
            twice = [j for j in group if j.config.seed == entrant.config.seed]
            other_way = any(_way(j.config) != _way(entrant.config) for j in twice)
            if _settings(group[0].config) == _settings(entrant.config) and not other_way:
                group.append(entrant)
                break
        else:
            groups.append([entrant])
    for group in groups:
        seen: dict[int, str] = {}
        for entrant in group:
            if entrant.config.seed in seen:
                raise UserError(
                    f"{seen[entrant.config.seed]} and {entrant.name} are the same run (method "
                    f"{entrant.config.method}, seed {entrant.config.seed}): leave one of them out"
                )
            seen[entrant.config.seed] = entrant.name
    return dict(zip(_row_names(groups), groups, strict=True))


def _settings(config: RunConfig) -> dict[str, Any]:
    """Return the settings that runs of a row share, including the method's hyperparameters."""
    values = config.model_dump(mode="json", exclude={*_NO_MATTER, "params"})
    return {**values, **config.params}


def _way(config: RunConfig) -> str:
    """Return the engine and precision that a run's settings name."""
    return f"{config.engine} {config.precision}"


def _row_names(groups: list[list[Entrant]]) -> list[str]:
    """Return the rows' names: the method, and the settings in which its rows differ."""
    names = []
    for group in groups:
        mine = _settings(group[0].config)
        same = [_settings(g[0].config) for g in groups if g[0].config.method == mine["method"]]
        told = ", ".join(
            f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
            for key, value in mine.items()
            if any(other[key] != value for other in same)
        )
        names.append(f"{mine['method']} ({told})" if told else mine["method"])
    return [
        f"{name} ({_way(group[0].config)})" if names.count(name) > 1 else name
        for name, group in zip(names, groups, strict=True)
    ]


def _conclude(
    entrants: list[Entrant],
    groups: dict[str, list[Entrant]],
    outcomes: dict[str, dict[str, Any]],
    failures: list[Failure],
    asked: Judging,
) -> Comparison:
    """Build the comparison from the runs' outcomes."""
    ended = [entrant for entrant in entrants if entrant.label in outcomes]
    found = {entrant.label: numbers_of(entrant, outcomes[entrant.label]) for entrant in ended}
    rows = []
    for name, group in groups.items():
        done = [entrant for entrant in group if entrant.label in outcomes]
        if not done:
            continue
        numbers = {}
        for key in COLUMNS:
            values = [found[entrant.label].get(key) for entrant in done]
            known = [value for value in values if value is not None]
            if known:
                numbers[key] = Number.of(known)
        verdicts = [outcomes[entrant.label]["audit"]["verdict"] for entrant in done if asked.audit]
        counts = {v: verdicts.count(v) for v in SEVERITY if v in verdicts}
        rows.append(Row(name, [entrant.config.seed for entrant in done], numbers, counts))
    config, first = entrants[0].config, next(iter(outcomes.values()))
    return Comparison(
        rows=rows,
        runs=[
            {
                "run": entrant.label,
                "method": entrant.config.method,
                "seed": entrant.config.seed,
                **found[entrant.label],
                "doubts": _doubts(outcomes[entrant.label]),
                **_judged(outcomes[entrant.label]["audit"]),
            }
            for entrant in ended
        ],
        failures=failures,
        dataset=config.dataset,
        threat={"norm": config.norm, "eps": config.eps},
        n=first["evaluation"]["n"],
        attacks=list(asked.attacks),
        audit=asked.audit,
        notes=_notes(entrants, groups, rows, outcomes, failures, asked),
    )


def _doubts(outcome: Mapping[str, Any]) -> list[str]:
    """Return the signs that a run's worst case is too high; none if it is 0."""
    judged = outcome["evaluation"]
    return list(judged.get("doubts") or ()) if judged["worst_case_accuracy"] > 0 else []


def _judged(audit: Mapping[str, Any] | None) -> dict[str, Any]:
    if audit is None:
        return {}
    return {key: audit[key] for key in ("verdict", "sentence", "found_accuracy", "found_by")}


def _notes(
    entrants: list[Entrant],
    groups: dict[str, list[Entrant]],
    rows: list[Row],
    outcomes: dict[str, dict[str, Any]],
    failures: list[Failure],
    asked: Judging,
) -> list[str]:
    """Return what a reader must know to interpret the table, one line each."""
    notes = [_precision(rows, next(iter(outcomes.values()))["evaluation"]["n"])]
    pgd = [name for name in asked.attacks if name.startswith("pgd-")]
    if len(pgd) > 1:
        notes.append(f"PGD is the lowest accuracy under {' and '.join(pgd)}, for each run.")
    if "autoattack" in asked.attacks and len(asked.attacks) > 1:
        notes.append(
            "AutoAttack attacks only what the others left: its accuracy includes their effect."
        )
    below = []
    for name, group in groups.items():
        done = [outcomes[entrant.label] for entrant in group if entrant.label in outcomes]
        gaps = [
            (o["audit"]["found_accuracy"], o["evaluation"]["worst_case_accuracy"])
            for o in done
            if asked.audit
        ]
        if any(found < worst for found, worst in gaps):
            below.append(f"{name} {statistics.fmean(found for found, _ in gaps):.1%}")
    if below:
        notes.append(f"The audit's attacks leave less than the worst case: {', '.join(below)}.")
    for name, group in groups.items():
        ended = [e.label for e in group if e.label in outcomes]
        doubts = [(label, found) for label in ended if (found := _doubts(outcomes[label]))]
        if doubts:
            told = "; ".join(f"{label}: {', '.join(found)}" for label, found in doubts)
            notes.append(f"The worst case of {name} may be too high ({told}).")
    different = _different(groups)
    if different:
        notes.append(f"The runs were trained with different settings: {'; '.join(different)}.")
    ways: dict[str, list[str]] = {}
    for entrant in entrants:
        if entrant.label in outcomes:  # "auto" was settled when the run began
            way = _way(runs.read_config(entrant.folder))
            if "auto" not in way:  # otherwise it is not known which was used
                ways.setdefault(way, []).append(entrant.label)
    if len(ways) > 1:
        told = "; ".join(f"{way}: {', '.join(labels)}" for way, labels in ways.items())
        notes.append(
            f"Runs used different engines or precisions: their seconds are not comparable ({told})."
        )
    machines = _machines(e for e in entrants if e.label in outcomes)
    if machines:
        notes.append(
            f"Runs were trained on different machines or versions ({'; '.join(machines)}): their "
            "seconds are not comparable."
        )
    if any("peak_memory_mb" in row.numbers for row in rows):
        memory = "Peak memory is the training process's resident memory"
        devices = {pick_device(e.device or e.config.device).type for e in entrants}
        notes.append(f"{memory}, on the host only." if devices != {"cpu"} else f"{memory}.")
    if failures:
        named = ", ".join(failure.run for failure in failures)
        notes.append(f"Failed, and not included: {named}.")
    return notes


def _machines(entrants: Iterable[Entrant]) -> list[str]:
    """Describe how the runs' machines and versions differ from the first's, where recorded."""
    known = [(e.label, there) for e in entrants if (there := RunFolder(e.folder).begun_on())]
    told: dict[tuple[str, ...], list[str]] = {}
    for label, there in known[1:]:
        first, before = known[0]
        # Runs with the same differences are reported once, by the first of them.
        key = tuple(environment.differences(before, there))
        told.setdefault(key, environment.differences(before, there, (f"of {first}", f"of {label}")))
    return [line for lines in told.values() for line in lines]


def _precision(rows: list[Row], n: int) -> str:
    """Describe how precisely n images measure the best worst case."""
    best = max(row.numbers["worst_case_accuracy"].mean for row in rows)
    low, high = wilson_interval(round(best * n), n)
    return (
        f"With {n:,} test images the best worst case has a 95% interval of {100 * low:.1f} to "
        f"{100 * high:.1f}%; more seeds do not narrow it."
    )


def _different(groups: Mapping[str, list[Entrant]]) -> list[str]:
    """List the training settings that differ between rows, such as those of presets."""
    told = []
    configs = {name: group[0].config for name, group in groups.items()}
    for key in RunConfig.model_fields:
        if key in ("method", "params", "data", *_NO_MATTER):
            continue
        values = {name: getattr(config, key) for name, config in configs.items()}
        if len(set(values.values())) > 1:
            told.append(f"{key} {', '.join(f'{v} ({name})' for name, v in values.items())}")
    return told
