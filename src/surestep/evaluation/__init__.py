"""Evaluation: how many images survive the strongest attack found."""

from surestep.evaluation import suite
from surestep.evaluation._evaluate import Evaluation, evaluate, wilson_interval
from surestep.evaluation.adapt import Adapted

__all__ = ["Adapted", "Evaluation", "evaluate", "suite", "wilson_interval"]
