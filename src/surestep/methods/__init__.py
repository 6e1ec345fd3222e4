"""Training methods: what one training step minimises."""

from surestep.methods._base import (
    Cost,
    Method,
    Preset,
    StepResult,
    build,
    card,
    get,
    names,
    preset,
    register,
)
from surestep.methods.fgsm import FGSM, NFGSM, RFGSM, RSFGSM
from surestep.methods.pgd import PGD
from surestep.methods.sat import SATR1, SATR2, SATR3, sat_r1_loss, sat_r2_loss, sat_r3_loss
from surestep.methods.standard import Standard
from surestep.methods.trades import TRADES, trades_loss

__all__ = [
    "FGSM",
    "NFGSM",
    "PGD",
    "RFGSM",
    "RSFGSM",
    "SATR1",
    "SATR2",
    "SATR3",
    "TRADES",
    "Cost",
    "Method",
    "Preset",
    "Standard",
    "StepResult",
    "build",
    "card",
    "get",
    "names",
    "preset",
    "register",
    "sat_r1_loss",
    "sat_r2_loss",
    "sat_r3_loss",
    "trades_loss",
]
