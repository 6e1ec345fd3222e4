"""Which runs of a comparison share a row, and what the rows are called."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from surestep.comparing._run import Entrant
from surestep.config import RunConfig
from surestep.errors import UserError

# Settings that may differ within a row. Except the seed, they affect results only by rounding.
_MAY_DIFFER = ("seed", "tensorboard", "checkpoint_every", "engine", "precision")


def group_by_row(entrants: list[Entrant]) -> dict[str, list[Entrant]]:
    """Return the runs by row; runs that differ only in the seed share one.

    Raises:
        UserError: two runs are the same, which would make the standard deviation too small.
    """
    groups: list[list[Entrant]] = []
    for group in _alike(entrants, _settings):
        # A seed that occurs twice means that engines or precisions are compared: separate rows.
        twice = len({entrant.config.seed for entrant in group}) < len(group)
        groups += _alike(group, engine_and_precision) if twice else [group]
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


def _alike(entrants: list[Entrant], of: Callable[[RunConfig], object]) -> list[list[Entrant]]:
    """Group the entrants by the value of ``of`` for their settings."""
    groups: list[list[Entrant]] = []
    for entrant in entrants:
        for group in groups:
            if _equal(of(group[0].config), of(entrant.config)):
                group.append(entrant)
                break
        else:
            groups.append([entrant])
    return groups


def _equal(one: object, other: object) -> bool:
    """Compare settings; floats may differ by rounding, as lengths scaled to eps do."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-9)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(v, other[k]) for k, v in one.items())
    return one == other


def _settings(config: RunConfig) -> dict[str, Any]:
    """Return the settings that runs of a row share, including the method's hyperparameters."""
    values = config.model_dump(mode="json", exclude={*_MAY_DIFFER, "params"})
    return {**values, **config.params}


def engine_and_precision(config: RunConfig) -> str:
    """Return the engine and precision that a run's settings name."""
    return f"{config.engine} {config.precision}"


def _row_names(groups: list[list[Entrant]]) -> list[str]:
    """Return the rows' names: the method, and the settings in which its rows differ."""
    names = []
    for group in groups:
        mine = _settings(group[0].config)
        same = [_settings(g[0].config) for g in groups if g[0].config.method == mine["method"]]
        told = ", ".join(
            f"{key}={_text(value, [other[key] for other in same])}"
            for key, value in mine.items()
            if not all(_equal(other[key], value) for other in same)
        )
        names.append(f"{mine['method']} ({told})" if told else mine["method"])
    return [
        f"{name} ({engine_and_precision(group[0].config)})" if names.count(name) > 1 else name
        for name, group in zip(names, groups, strict=True)
    ]


def _text(value: object, others: Iterable[object]) -> str:
    """Return a setting as text, in full if another value would read the same when rounded."""
    alike = (o for o in others if _rounded(o) == _rounded(value))
    return _rounded(value) if all(_equal(other, value) for other in alike) else repr(value)


def _rounded(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def different_settings(groups: Mapping[str, list[Entrant]]) -> list[str]:
    """List the training settings that differ between rows, such as those of presets."""
    told = []
    configs = {name: group[0].config for name, group in groups.items()}
    for key in RunConfig.model_fields:
        if key in ("method", "params", "data", *_MAY_DIFFER):
            continue
        values = {name: getattr(config, key) for name, config in configs.items()}
        first, *others = values.values()
        if not all(_equal(first, other) for other in others):
            told.append(f"{key} {', '.join(f'{v} ({name})' for name, v in values.items())}")
    return told
