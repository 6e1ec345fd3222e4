"""Evaluation: how many images survive the strongest attack found."""

from surestep.evaluation import suite
from surestep.evaluation._evaluate import DEFAULT_ATTACKS, Evaluation, evaluate, wilson_interval

__all__ = ["DEFAULT_ATTACKS", "Evaluation", "evaluate", "suite", "wilson_interval"]
