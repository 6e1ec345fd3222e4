"""What is done to a trained model: sparsification around the mean."""

from surestep.posthoc.hardening import ATTACKS, JUDGES, THRESHOLDS, Hardened, Judged, harden, judge
from surestep.posthoc.mean_sparse import MeanSparse, insert, measure

__all__ = [
    "ATTACKS",
    "JUDGES",
    "THRESHOLDS",
    "Hardened",
    "Judged",
    "MeanSparse",
    "harden",
    "insert",
    "judge",
    "measure",
]
