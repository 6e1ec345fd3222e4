"""Attacks: (model, x, y, threat) to x_adv; AutoAttack itself is ``autoattack.autoattack``."""

from surestep.attacks import autoattack, nearest
from surestep.attacks.autoattack import apgd_ce, apgd_t, fab_t, square
from surestep.attacks.gradient import fgsm, i_fgsm, mi_fgsm, pgd, r_fgsm, random_noise
from surestep.attacks.nearest import cw_l2, deepfool

__all__ = [
    "apgd_ce",
    "apgd_t",
    "autoattack",
    "cw_l2",
    "deepfool",
    "fab_t",
    "fgsm",
    "i_fgsm",
    "mi_fgsm",
    "nearest",
    "pgd",
    "r_fgsm",
    "random_noise",
    "square",
]
