"""What a result depends on besides its settings: the machine and the versions."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from surestep import __version__
from surestep.devices import cores

_PACKAGES = (
    "torch",
    "accelerate",
    "numpy",
    "safetensors",
    "pyautoattack",
    "pydantic",
    "click",
    "rich",
    "timm",
)
_ROUNDING = ("surestep", "torch", "cpu capability", "torch threads", "gpus")
"""The facts that affect the last digits of results."""


def describe() -> dict[str, Any]:
    """Return versions, cores, threads and GPUs, by readable names."""
    facts: dict[str, Any] = {
        "surestep": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "usable cores": cores(),
        "torch threads": torch.get_num_threads(),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
    }
    if torch.cuda.is_available():
        facts["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return facts | {name: _version(name) for name in _PACKAGES}


@functools.cache
def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


class Difference(NamedTuple):
    """A fact that differs between two environments."""

    name: str
    before: str
    now: str


def versions() -> dict[str, str]:
    """Return the versions to store with a result."""
    return {
        "surestep": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """List how two environments differ in the facts that affect the last digits of results.

    Args:
        before: what ``describe`` returned.
        now: what ``describe`` returned elsewhere or later.
    """
    return [
        Difference(name, str(before.get(name)), str(now.get(name)))
        for name in _ROUNDING
        if before.get(name) != now.get(name)
    ]
