"""The audit: is a model's robustness real, or are its gradients masked?"""

from surestep.auditing._audit import Audit, audit
from surestep.auditing._check import CHECKS, Check
from surestep.auditing._estimate import estimate

__all__ = ["CHECKS", "Audit", "Check", "audit", "estimate"]
