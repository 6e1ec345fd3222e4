"""The audit: is a model's robustness real, or are its gradients masked?"""

from surestep.auditing._audit import FORMAT, VERSION, Audit, audit
from surestep.auditing._check import CHECKS, Check
from surestep.auditing._estimate import estimate

__all__ = ["CHECKS", "FORMAT", "VERSION", "Audit", "Check", "audit", "estimate"]
