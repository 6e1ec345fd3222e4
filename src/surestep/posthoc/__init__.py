"""Post-training hardening of a model: sparsification around the mean."""

from surestep.posthoc.hardening import ATTACKS, JUDGES, THRESHOLDS, Hardened, harden
from surestep.posthoc.mean_sparse import MeanSparse, insert, measure

__all__ = [
    "ATTACKS",
    "JUDGES",
    "THRESHOLDS",
    "Hardened",
    "MeanSparse",
    "harden",
    "insert",
    "measure",
]
