"""Training: the loop, the step, schedules, checkpoints."""

from surestep.training._fit import FitResult, fit
from surestep.training.averaging import WeightAverage
from surestep.training.engine import Engine, TrainStep, make_optimizer, make_step
from surestep.training.loop import TrainingDiverged
from surestep.training.picking import Pick, pick_engine

__all__ = [
    "Engine",
    "FitResult",
    "Pick",
    "TrainStep",
    "TrainingDiverged",
    "WeightAverage",
    "fit",
    "make_optimizer",
    "make_step",
    "pick_engine",
]
