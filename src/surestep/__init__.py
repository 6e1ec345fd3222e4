"""Single-step adversarial training with regularizers (SAT-R1, SAT-R2, SAT-R3) for PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Resolved on first use (PEP 562), so that the command line's help does not import torch.
_HOMES = {
    "Linf": "surestep.threat",
    "L2": "surestep.threat",
    "ThreatModel": "surestep.threat",
    "SurestepWarning": "surestep.errors",
    "UserError": "surestep.errors",
    "audit": "surestep.auditing",
    "Audit": "surestep.auditing",
    "evaluate": "surestep.evaluation",
    "Evaluation": "surestep.evaluation",
    "fit": "surestep.training",
    "FitResult": "surestep.training",
    "load": "surestep.runs",
    "Run": "surestep.runs",
}

__all__ = [
    "L2",
    "Audit",
    "Evaluation",
    "FitResult",
    "Linf",
    "Run",
    "SurestepWarning",
    "ThreatModel",
    "UserError",
    "attacks",
    "audit",
    "auditing",
    "comparing",
    "config",
    "data",
    "errors",
    "evaluate",
    "evaluation",
    "fit",
    "interchange",
    "load",
    "methods",
    "models",
    "posthoc",
    "report",
    "runs",
    "threat",
    "training",
]

if TYPE_CHECKING:
    from surestep import (
        attacks,
        auditing,
        comparing,
        config,
        data,
        errors,
        evaluation,
        interchange,
        methods,
        models,
        posthoc,
        report,
        runs,
        threat,
        training,
    )
    from surestep.auditing import Audit, audit
    from surestep.errors import SurestepWarning, UserError
    from surestep.evaluation import Evaluation, evaluate
    from surestep.runs import Run, load
    from surestep.threat import L2, Linf, ThreatModel
    from surestep.training import FitResult, fit


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in __all__:  # a room
        return importlib.import_module(f"surestep.{name}")
    raise AttributeError(f"module 'surestep' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
