"""The audit: is a model's robustness real, or are its gradients masked?"""

from surestep.auditing._audit import Audit, audit, estimate
from surestep.auditing.checks import CHECKS, Check

__all__ = ["CHECKS", "Audit", "Check", "audit", "estimate"]
