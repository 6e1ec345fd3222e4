"""Training: the loop, the step, schedules, checkpoints."""

from surestep.training.averaging import WeightAverage
from surestep.training.engine import Engine, TrainStep, make_optimizer, make_step
from surestep.training.loop import FitResult, TrainingDiverged, fit

__all__ = [
    "Engine",
    "FitResult",
    "TrainStep",
    "TrainingDiverged",
    "WeightAverage",
    "fit",
    "make_optimizer",
    "make_step",
]
