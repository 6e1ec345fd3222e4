"""Runs: from a configuration to a trained model, and from a run folder back to the model.

This is what the command line does, callable from Python.
"""

from surestep.runs._harden import harden
from surestep.runs._load import Run, check_rerunnable, load, read_config
from surestep.runs._models import build_model, in_class_order_of
from surestep.runs._parts import build_method, build_threat, from_anywhere, load_data, passes_of
from surestep.runs._presets import resolve, usual_preset
from surestep.runs._train import train

__all__ = [
    "Run",
    "build_method",
    "build_model",
    "build_threat",
    "check_rerunnable",
    "from_anywhere",
    "harden",
    "in_class_order_of",
    "load",
    "load_data",
    "passes_of",
    "read_config",
    "resolve",
    "train",
    "usual_preset",
]
