"""Evaluation: how many images survive the strongest attack found."""

from surestep.evaluation import suite
from surestep.evaluation._evaluate import evaluate
from surestep.evaluation.adapt import Adapted
from surestep.evaluation.result import Evaluation, share_interval, wilson_interval

__all__ = ["Adapted", "Evaluation", "evaluate", "share_interval", "suite", "wilson_interval"]
