"""Evaluation: how many images survive the strongest attack found."""

from surestep.evaluation import suite
from surestep.evaluation._evaluate import ASKED_ABOUT, Evaluation, evaluate, wilson_interval
from surestep.evaluation.adapt import Adapted

__all__ = ["ASKED_ABOUT", "Adapted", "Evaluation", "evaluate", "suite", "wilson_interval"]
