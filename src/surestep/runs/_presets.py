"""Complete a user's settings by a method's preset."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from surestep import data, methods
from surestep.config import RunConfig, parse
from surestep.errors import UserError

_RADIUS_KEYS = ("dataset", "norm")
"""Settings that a radius is tied to."""
_HEAD_KEYS = ("head_scale", "head_margin")
"""Settings that only a hypersphere head has."""
_PRESETS_OF = {"cifar100": "cifar10"}
"""Data sets that use the presets of another one if a method has none for them."""


def resolve(
    values: Mapping[str, Any], preset: str | None = None, file: Mapping[str, Any] | None = None
) -> RunConfig:
    """Complete a user's settings with those of a preset and of a file.

    A preset sets the data set, model, eps, the method's parameters and the training settings;
    settings from a file override it, and the user's own settings override both. If eps differs
    from theirs, their step sizes and other lengths scale in proportion. Without a preset name, the
    method's preset named after the data set is taken, if there is one (for cifar100, else that of
    cifar10), or a variant such as cifar10-16 if its eps is nearer to the user's. Pretrained weights
    turn normalisation on, unless the user turns it off.

    Args:
        values: the user's settings, by field name of ``RunConfig``.
        preset: name of one of the method's presets, or "none". What follows the data set's name
            is enough, such as "speed" for "mnist-speed".
        file: settings read from a file, such as a run's ``config.yaml``.

    Raises:
        UserError: an unknown name or an invalid value; no eps, if there is no default for this
            data set and norm; a file's eps for another norm or kind of data set; a head scale or
            margin for a head that is not a hypersphere; another optimizer with the learning rate
            that was meant for SGD.
    """
    user, from_file = values, file or {}
    given = {**from_file, **user, "params": user.get("params") or {}}
    method = str(_setting(given, "method"))
    preset = _preset_for(method, given, preset)
    _check_radius_known(method, given, preset)
    preset_values: dict[str, Any] = {"method": method}
    layers: list[tuple[Mapping[str, Any], float]] = []
    if preset != "none":
        chosen = methods.preset(method, preset)
        of_preset = ("dataset", "model", "eps", "normalize")
        preset_values |= {name: getattr(chosen, name) for name in of_preset} | dict(chosen.settings)
        layers.append((chosen.params, chosen.eps))
    if given.get("weights") == "pretrained":
        # They expect normalised images. A file's normalize counts if it is of a pretrained model.
        own = given if from_file.get("weights") == "pretrained" else user
        given["normalize"] = own.get("normalize", True)
    config = parse(RunConfig, {**preset_values, **given})
    _check_head(config, user)
    _check_rate(preset_values, from_file, user)
    if "eps" in from_file and "eps" not in user:
        _check_radius_applies(config, from_file)
    if from_file:
        params = from_file.get("params") or {}
        stored = parse(RunConfig, {**preset_values, **from_file, "params": params})
        # If the file has no eps, the radius that its lengths are for is unknown: do not scale them.
        layers.append((stored.params, stored.eps if "eps" in from_file else config.eps))
    scaled = _scaled_params(layers, config.eps, methods.length_names(methods.get(method)))
    return config.model_copy(update={"params": {**scaled, **config.params}})


def _setting(given: Mapping[str, Any], name: str) -> Any:
    """Return a setting, by default that of ``RunConfig``."""
    return given.get(name, RunConfig.model_fields[name].default)


def _preset_for(method: str, given: Mapping[str, Any], preset: str | None) -> str:
    """Return the full name of the preset to use, or "none"; see ``resolve``."""
    known = methods.get(method).presets
    dataset = str(_setting(given, "dataset"))
    if preset is None:
        # The radii of presets are for l-inf: an l2 radius is near to none of them.
        eps = given.get("eps") if _setting(given, "norm") == "linf" else None
        return usual_preset(method, dataset, eps) or "none"
    full = f"{dataset.partition(':')[0]}-{preset}"
    return full if full in known else preset


def _check_radius_known(method: str, given: Mapping[str, Any], preset: str) -> None:
    """Refuse settings without eps, if there is no default for their data set and norm.

    Raises:
        UserError: eps is missing; or the data are not where they are said to be, which is then
            the mistake to report first.
    """
    dataset, norm = (str(_setting(given, key)) for key in _RADIUS_KEYS)
    name, _, location = dataset.partition(":")
    # The default eps is meant for MNIST in l-inf. Unknown data set names are reported later.
    elsewhere = preset == "none" and name != "mnist" and name in data.names()
    if "eps" in given or not (elsewhere or norm == "l2"):
        return
    root = str(given.get("data") or location)
    if name in ("npz", "folder") and root and not Path(os.path.expanduser(root)).exists():
        raise UserError(f"{root} does not exist: give the location of the data set, --data")
    raise UserError(
        f"no radius is known for {method} on {dataset} in {norm}: give --eps, such as 8/255"
    )


def _check_radius_applies(config: RunConfig, from_file: Mapping[str, Any]) -> None:
    """Refuse a file's radius for another norm, or another kind of data set, than the file's.

    A file that names no data set is for any.

    Raises:
        UserError: the user has changed one of these.
    """
    values = {"dataset": config.dataset, **from_file}
    dataset, norm = (str(_setting(values, key)) for key in _RADIUS_KEYS)
    if norm != config.norm or _kind(dataset) != _kind(config.dataset):
        raise UserError(
            f"the file's eps {config.eps:g} is for {dataset} in {norm}, which says nothing about "
            f"{config.dataset} in {config.norm}: give --eps, too"
        )


def _kind(dataset: str) -> str:
    """Return a data set's kind: its name without its place, or that of one with its radii."""
    name = dataset.partition(":")[0]
    return _PRESETS_OF.get(name, name)


def _scaled_params(
    layers: Iterable[tuple[Mapping[str, Any], float]], eps: float, lengths: Collection[str]
) -> dict[str, Any]:
    """Return hyperparameters for a radius; those named in ``lengths`` scale with it.

    Args:
        layers: hyperparameters and the radius they are for; each overrides those before it.
        eps: the radius.
        lengths: names of the hyperparameters that are lengths.
    """
    scaled: dict[str, Any] = {}
    for params, own_eps in layers:
        scale = eps / own_eps if own_eps else 1.0
        for name, value in params.items():
            is_length = name in lengths and type(value) in (int, float)
            scaled[name] = value * scale if is_length and scale != 1 else value
    return scaled


def _check_head(config: RunConfig, given: Mapping[str, Any]) -> None:
    """Refuse a head scale or margin that would be ignored, unless it merely spells out defaults.

    Raises:
        UserError: a scale or margin is given, but the head is not a hypersphere.
    """
    for name in _HEAD_KEYS if config.head != "hypersphere" else ():
        default = RunConfig.model_fields[name].default
        if name in given and ("head" not in given or getattr(config, name) != default):
            raise UserError(
                f"{name} {given[name]} applies only to a hypersphere head, but head is "
                f"{config.head}: give --head hypersphere, or leave it out"
            )


def _check_rate(*layers: Mapping[str, Any]) -> None:
    """Refuse a learning rate of SGD for Adam, or of Adam for SGD.

    Args:
        layers: settings; each overrides those before it.

    Raises:
        UserError: the last optimizer and the last learning rate were not meant for each other.
    """
    optimizer = meant = RunConfig.model_fields["optimizer"].default
    rate = RunConfig.model_fields["lr"].default
    for layer in layers:
        optimizer = layer.get("optimizer", optimizer)
        if "lr" in layer:
            meant, rate = optimizer, layer["lr"]
    if (optimizer == "sgd") != (meant == "sgd"):
        raise UserError(
            f"optimizer {optimizer} needs a learning rate of its own: give --lr, too (the present "
            f"one, {rate}, is meant for {meant})"
        )


def usual_preset(method: str, dataset: str, eps: Any = None) -> str | None:
    """Return the preset that a data set uses if none is named, or None if there is none.

    Args:
        method: the method's slug.
        dataset: as for training.
        eps: the radius in l-inf, if given: among the data set's presets, the one for the nearest
            radius is returned, since regularizer weights depend on it.
    """
    kind = dataset.partition(":")[0]
    known = methods.get(method).presets
    name = next((n for n in (kind, _PRESETS_OF.get(kind)) if n in known), None)
    if name is None or eps is None:
        return name
    radius = parse(RunConfig, {"eps": eps}).eps
    variants = [name, *(n for n in known if re.fullmatch(rf"{name}-\d+", n))]
    return min(variants, key=lambda n: abs(known[n].eps - radius))
