"""Attacks: (model, x, y, threat) to x_adv."""

from surestep.attacks.auto import apgd_ce, apgd_t, autoattack, fab_t, square
from surestep.attacks.nearest import cw_l2, deepfool
from surestep.attacks.white_box import fgsm, i_fgsm, mi_fgsm, pgd, r_fgsm, random_noise

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
    "pgd",
    "r_fgsm",
    "random_noise",
    "square",
]
