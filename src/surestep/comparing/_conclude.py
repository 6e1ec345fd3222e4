"""What a comparison found: its rows, and the notes that a reader needs to interpret them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surestep import environment, runs
from surestep.comparing._outcome import Outcome
from surestep.comparing._rows import different_settings, engine_and_precision
from surestep.comparing._run import Entrant, Judging, numbers_of
from surestep.comparing._table import Comparison, Failure, Number, Row
from surestep.devices import pick_device
from surestep.evaluation import share_interval
from surestep.report.columns import COLUMNS
from surestep.verdicts import SEVERITY


@dataclass(frozen=True)
class _Ended:
    """A run that was trained, evaluated and, if asked for, audited."""

    entrant: Entrant
    outcome: Outcome
    numbers: Mapping[str, float | None]

    @property
    def label(self) -> str:
        return self.entrant.label

    @property
    def evaluation(self) -> Mapping[str, Any]:
        assert self.outcome.evaluation is not None
        return self.outcome.evaluation

    @property
    def audit(self) -> Mapping[str, Any] | None:
        return self.outcome.audit

    @property
    def worst_case(self) -> float:
        return float(self.evaluation["worst_case_accuracy"])

    @property
    def doubts(self) -> list[str]:
        """The signs that the run's worst case is too high; none if it is 0."""
        found = self.evaluation.get("doubts") or ()
        return list(found) if self.worst_case > 0 else []


def conclude(
    groups: Mapping[str, Sequence[Entrant]],
    outcomes: Mapping[str, Outcome],
    failures: list[Failure],
    asked: Judging,
) -> Comparison:
    """Build the comparison from the runs' outcomes.

    Args:
        groups: the runs of each row, by the row's name.
        outcomes: by a run's label, of the runs that came to their end; at least one.
        failures: the other runs.
        asked: how the runs were judged.
    """
    ended = {
        name: [
            _Ended(entrant, outcomes[entrant.label], numbers_of(entrant, outcomes[entrant.label]))
            for entrant in group
            if entrant.label in outcomes
        ]
        for name, group in groups.items()
    }
    ended = {name: group for name, group in ended.items() if group}
    rows = [_row(name, group) for name, group in ended.items()]
    every = [run for group in ended.values() for run in group]
    config = every[0].entrant.config
    n = every[0].evaluation["n"]
    return Comparison(
        rows=rows,
        runs=[_summary(run) for run in every],
        failures=failures,
        dataset=config.dataset,
        threat={"norm": config.norm, "eps": config.eps},
        n=n,
        attacks=list(asked.attacks),
        audit=asked.audit,
        split=asked.split,
        notes=[
            _precision(rows, n, asked.split),
            *_of_split(asked.split),
            *_of_attacks(asked.attacks),
            *_of_audits(ended),
            *_of_doubts(ended),
            *_of_settings(ended),
            *_of_engines(every),
            *_of_machines(every),
            *_of_memory(every),
            *_of_resumed(every),
            *_of_failures(failures),
        ],
    )


def _row(name: str, group: Sequence[_Ended]) -> Row:
    numbers = {}
    for key in COLUMNS:
        values = [value for run in group if (value := run.numbers.get(key)) is not None]
        if values:
            numbers[key] = Number.of(values)
    verdicts = [run.audit["verdict"] for run in group if run.audit is not None]
    counts = {v: verdicts.count(v) for v in SEVERITY if v in verdicts}
    return Row(name, [run.entrant.config.seed for run in group], numbers, counts)


def _summary(run: _Ended) -> dict[str, Any]:
    audited = ("verdict", "sentence", "found_accuracy", "found_by")
    return {
        "run": run.label,
        "method": run.entrant.config.method,
        "seed": run.entrant.config.seed,
        **run.numbers,
        "doubts": run.doubts,
        **({} if run.audit is None else {key: run.audit[key] for key in audited}),
    }


def _precision(rows: list[Row], n: int, split: str) -> str:
    """Describe how precisely n images measure the best worst case."""
    best = max(row.numbers["worst_case_accuracy"].mean for row in rows)
    low, high = share_interval(best, n)
    return (
        f"With {n:,} {split} images the best worst case has a 95% interval of {100 * low:.1f} to "
        f"{100 * high:.1f}%; more seeds do not narrow it."
    )


def _of_split(split: str) -> list[str]:
    if split != "validation":
        return []
    return ["Training may have selected weights by validation images: accuracies may be too high."]


def _of_attacks(attacks: Sequence[str]) -> list[str]:
    notes = []
    pgd = [name for name in attacks if name.startswith("pgd-")]
    if len(pgd) > 1:
        notes.append(f"PGD is the lowest accuracy under {' and '.join(pgd)}, for each run.")
    if "autoattack" in attacks and len(attacks) > 1:
        notes.append(
            "AutoAttack attacks only what the others left: its accuracy includes their effect."
        )
    return notes


def _of_audits(ended: Mapping[str, Sequence[_Ended]]) -> list[str]:
    """Name the rows in which an audit's attacks found more than the evaluation's."""
    below = []
    for name, group in ended.items():
        found = [(run.audit["found_accuracy"], run.worst_case) for run in group if run.audit]
        if any(left < worst for left, worst in found):
            below.append(f"{name} {statistics.fmean(map(min, found)):.1%}")
    if not below:
        return []
    return [f"The audit's attacks leave less than the worst case: {', '.join(below)}."]


def _of_doubts(ended: Mapping[str, Sequence[_Ended]]) -> list[str]:
    notes = []
    for name, group in ended.items():
        told = "; ".join(f"{run.label}: {', '.join(run.doubts)}" for run in group if run.doubts)
        if told:
            notes.append(f"The worst case of {name} may be too high ({told}).")
    return notes


def _of_settings(ended: Mapping[str, Sequence[_Ended]]) -> list[str]:
    different = different_settings({k: [run.entrant for run in g] for k, g in ended.items()})
    if not different:
        return []
    return [f"The runs were trained with different settings: {'; '.join(different)}."]


def _of_engines(every: Sequence[_Ended]) -> list[str]:
    ways: dict[str, list[str]] = {}
    for run in every:
        used = engine_and_precision(runs.read_config(run.entrant.folder))
        if "auto" not in used:  # a run replaces "auto" by its choice; if not, it is unknown
            ways.setdefault(used, []).append(run.label)
    if len(ways) < 2:
        return []
    told = "; ".join(f"{used}: {', '.join(labels)}" for used, labels in ways.items())
    return [
        f"Runs used different engines or precisions: their seconds are not comparable ({told})."
    ]


def _of_machines(every: Sequence[_Ended]) -> list[str]:
    """Describe how the runs' machines and versions differ from the first's, where recorded."""
    known = [
        (run.label, there)
        for run in every
        if (there := run.entrant.run.recorded_environment()) is not None
    ]
    others: dict[tuple[environment.Difference, ...], str] = {}
    for label, there in known[1:]:
        # Runs with the same differences are reported once, by the first of them.
        others.setdefault(tuple(environment.differences(known[0][1], there)), label)
    told = [
        f"{name} {before} of {known[0][0]}, {there} of {label}"
        for found, label in others.items()
        for name, before, there in found
    ]
    if not told:
        return []
    return [
        f"Runs were trained on different machines or versions ({'; '.join(told)}): their seconds "
        "are not comparable."
    ]


def _of_memory(every: Sequence[_Ended]) -> list[str]:
    measured = [run for run in every if run.numbers["peak_memory_mb"] is not None]
    if not measured:
        return []
    host = ", on the host only" if any(map(_on_accelerator, measured)) else ""
    return [f"Peak memory is the training process's resident memory{host}."]


def _on_accelerator(run: _Ended) -> bool:
    """Tell whether a run was trained on a GPU, whatever it is judged on."""
    device = run.entrant.config.device
    if device is not None:
        return not device.startswith("cpu")
    there = run.entrant.run.recorded_environment() or {}
    # Of Apple's GPUs nothing is recorded; assume that the run was trained on this machine.
    return bool(there.get("gpus")) or pick_device().type == "mps"


def _of_resumed(every: Sequence[_Ended]) -> list[str]:
    named = ", ".join(run.label for run in every if run.outcome.resumed)
    return [f"Peak memory is unknown where training was resumed: {named}."] if named else []


def _of_failures(failures: Sequence[Failure]) -> list[str]:
    named = ", ".join(failure.run for failure in failures)
    return [f"Failed, and not included: {named}."] if failures else []
